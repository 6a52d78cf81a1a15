"""Registers everything built in with Keras, so that `serialize_keras_object` round-trips it."""

from types import FunctionType, ModuleType

import keras

from lottery_ticket_pruner import criteria, distributions, schedules, structures, treatments
from lottery_ticket_pruner.registry import PACKAGE, Registry

_MODULES = (criteria, distributions, schedules, structures, treatments)


def _register(module: ModuleType) -> None:
    """Registers the public classes that a module's registries return, and their functions."""
    registries = [thing for thing in vars(module).values() if isinstance(thing, Registry)]
    made = tuple(registry.made for registry in registries)
    for name, thing in vars(module).items():
        own = isinstance(thing, type) and thing.__module__ == module.__name__
        if own and issubclass(thing, made) and not name.startswith("_"):
            keras.saving.register_keras_serializable(PACKAGE)(thing)
    # Functions as well, because Keras serializes an unregistered function only by its name, which
    # does not distinguish it from a user's function.
    for registry in registries:
        for name, thing in registry.items():
            if isinstance(thing, FunctionType):
                keras.saving.register_keras_serializable(module.__name__, name)(thing)


for _module in _MODULES:
    _register(_module)
