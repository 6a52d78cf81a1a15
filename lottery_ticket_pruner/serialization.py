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
# The functions, too: alone, a function is no more than its name to Keras, which is not enough to
# tell it from one of a user's.
_register(criteria, criteria.names())
_register(distributions, distributions.names())
_register(treatments, treatments.kept_names() + treatments.pruned_names())
