"""Registers everything built in with Keras, so that `serialize_keras_object` round-trips it."""

from types import ModuleType

import keras

from lottery_ticket_pruner import criteria, distributions, schedules, structures, treatments
from lottery_ticket_pruner.registry import PACKAGE

_CLASSES = (
    criteria.Criterion,
    distributions.Distribution,
    schedules.Constant,
    schedules.Function,
    schedules.Geometric,
    schedules.Polynomial,
    structures.Blocks,
    structures.NOfM,
    structures.Outputs,
    structures.Tiles,
    treatments.Treatment,
)


def _register(module: ModuleType, names: list[str]) -> None:
    for name in names:
        keras.saving.register_keras_serializable(module.__name__, name)(getattr(module, name))


for _class in _CLASSES:
    keras.saving.register_keras_serializable(PACKAGE)(_class)
# Functions as well, because Keras serializes an unregistered function only by its name, which does
# not distinguish it from a user's function.
_register(criteria, criteria.names())
_register(distributions, distributions.names())
_register(treatments, treatments.kept_names() + treatments.pruned_names())
