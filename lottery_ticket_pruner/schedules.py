"""Schedules say how sparse a model is to be at each training step, and when its masks change.

A schedule is a function of the step. Adding one takes a function of a line or two and one
registration:

>>> @register("staircase")
... def staircase(step):
...     '''Another tenth every thousand steps, up to 0.9.'''
...     return min(step // 1000, 9) / 10

Steps are counted as batches that were trained on: `schedule(100)` is for the weights as a hundred
batches left them.

References:
    - [Zhu & Gupta, arXiv 1710.01878](https://arxiv.org/abs/1710.01878) (polynomial)
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lottery_ticket_pruner.registry import Registry

Identifier = Any


class Schedule:
    """The sparsity at each step, and the steps at which masks are brought to it.

    Masks change at `begin_step` and every `frequency` steps from there, up to and including
    `end_step`. Subclasses give `sparsity`, and keep their arguments as attributes of those names.

    Args:
        begin_step: First step at which masks change.
        end_step: Last step at which they may; None for no end.
        frequency: Steps from one change to the next.

    Raises:
        ValueError: If a step is negative or no integer, the end lies before the beginning, or the
            frequency is below 1.
    """

    name = "schedule"

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__  # until it is registered

    def __init__(
        self, begin_step: int = 0, end_step: int | None = None, frequency: int = 100
    ) -> None:
        self.begin_step = _integer("begin_step", begin_step, 0)
        self.frequency = _integer("frequency", frequency, 1)
        self.end_step = None if end_step is None else _integer("end_step", end_step, begin_step)

    def sparsity(self, step: int) -> float:
        """The share of weights that is pruned after this many steps, in [0, 1)."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Returns True if the masks change after this many steps."""
        ended = self.end_step is not None and step > self.end_step
        since = step - self.begin_step
        return since >= 0 and not ended and since % self.frequency == 0

    @property
    def falls(self) -> bool:
        """True if the sparsity is known to fall, so that pruned weights have to come back."""
        return False

    def __call__(self, step: int) -> float:
        """Returns `sparsity(step)`."""
        return self.sparsity(step)

    def get_config(self) -> dict[str, Any]:
        """The name and the arguments, from which `get` makes the schedule again."""
        arguments = [
            name for name in inspect.signature(type(self).__init__).parameters if name != "self"
        ]
        name = _REGISTRY.checked(self.name, type(self))
        return {"name": name} | {name: getattr(self, name) for name in arguments}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Resolves a configuration by `get`; one of an unregistered class makes this class."""
        name = config.get("name")
        if name == cls.name and name not in _REGISTRY:
            return cls(**{key: value for key, value in config.items() if key != "name"})
        return get(config)

    def __eq__(self, other: object) -> bool:
        """Compares class and attributes."""
        if type(other) is not type(self):
            return NotImplemented
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.begin_step, self.end_step, self.frequency))

    def __repr__(self) -> str:
        try:
            arguments = list(self.get_config().items())[1:]
        except Exception:  # Not to be made again: messages name it all the same.
            arguments = list(vars(self).items())
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments)})"


class Function(Schedule):
    """A custom function as a schedule.

    Args:
        function: `function(step)` gives a sparsity in [0, 1).
        begin_step: First step at which masks change.
        end_step: Last step at which they may; None for no end.
        frequency: Steps from one change to the next.
    """

    def __init__(
        self,
        function: Callable[[int], float],
        begin_step: int = 0,
        end_step: int | None = None,
        frequency: int = 100,
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self.function = function
        _REGISTRY.checked(self.name, function)

    @property
    def name(self) -> str:
        """The name it was registered under, else that of the function."""
        return _REGISTRY.name_of(self.function)

    def sparsity(self, step: int) -> float:
        """Returns what the function gives."""
        return self.function(step)

    def get_config(self) -> dict[str, Any]:
        """The name and the steps; `get` finds the function again if it is registered."""
        return {
            "name": _REGISTRY.checked(self.name, self.function),
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "frequency": self.frequency,
        }


class _Pairs(Schedule):
    """A schedule that gives `(whether masks change, sparsity)` at each step, as those of tfmot."""

    def __init__(self, function: Callable[[int], tuple[Any, Any]]) -> None:
        super().__init__()
        self.function = function

    def sparsity(self, step: int) -> float:
        # In float32, 0.9 is 0.8999999762: of a hundred weights 89 would go.
        return float(str(np.float32(self.function(step)[1])))

    def due(self, step: int) -> bool:
        return bool(self.function(step)[0])

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError(
            f"{type(self.function).__name__} is a schedule of TensorFlow Model Optimization that "
            "this library cannot make again. Write it as a function `step -> sparsity` and "
            "`schedules.register` it."
        )

    def __repr__(self) -> str:
        return repr(self.function)


def _made(known: Any, arguments: dict[str, Any]) -> Schedule:
    return known(**arguments) if isinstance(known, type) else Function(known, **arguments)


_REGISTRY = Registry(
    "schedule",
    Schedule,
    register="schedules.register",
    wrap=Function,
    make=_made,
    takes="the step",
)


def register(name: str) -> Callable[[Any], Any]:
    """Makes a schedule known by name; decorates it and hands it back.

    Args:
        name: The name for `get` and configurations.

    Returns:
        A decorator of a function `step -> sparsity` or of a subclass of `Schedule`.

    Raises:
        ValueError: If another schedule has that name. The same one defined again (a notebook cell
            run twice) replaces the earlier one.
    """

    def decorate(schedule: Any) -> Any:
        _REGISTRY.add(name, schedule)
        if isinstance(schedule, type):
            schedule.name = name
        return schedule

    return decorate


def names() -> list[str]:
    """The known names, in the order of registration."""
    return list(_REGISTRY)


def get(identifier: Identifier) -> Schedule:
    """Turns whatever stands for a schedule into a `Schedule`.

    Args:
        identifier: A `Schedule`; a number, for a sparsity that does not change; a dict from
            `get_config()`, Keras' `serialize_keras_object` of one, or any other with a `"name"` and
            arguments; the name of a registered function; a function `step -> sparsity`, which is
            asked every 100 steps (`Function` has other intervals); a `PruningSchedule` of
            TensorFlow Model Optimization or what its
            `get_config()` gives.

    Raises:
        ValueError: An unknown name, arguments that do not fit it, an unregistered function that
            has the name of a known schedule, or something that is none of these.
    """
    if isinstance(identifier, numbers.Real) and not isinstance(identifier, bool):
        return Constant(float(identifier))
    if isinstance(identifier, Mapping) and "class_name" in identifier:
        config = identifier.get("config", {})
        if isinstance(config, Mapping) and "name" not in config:  # Else Keras' form of ours.
            return _from_tfmot_config(identifier["class_name"], config)
    if _is_tfmot(type(identifier)):
        if type(identifier).__name__ in _TFMOT:
            return get(identifier.get_config())
        return _Pairs(identifier)
    return _REGISTRY.get(identifier)


def _is_tfmot(cls: type) -> bool:
    # By name: importing the package changes the process (see `interop.tfmot`).
    return any(
        base.__name__ == "PruningSchedule"
        and base.__module__.startswith("tensorflow_model_optimization.")
        for base in cls.__mro__
    )


def _from_tfmot_config(name: str, config: Mapping[str, Any]) -> Schedule:
    if name not in _TFMOT:
        raise ValueError(
            f"Unknown schedule class {name!r}. Configurations of TensorFlow Model Optimization "
            f"are known for: {', '.join(_TFMOT)}."
        )
    arguments = {_TFMOT_ARGUMENTS.get(key, key): value for key, value in config.items()}
    if arguments.get("end_step") == -1:
        arguments["end_step"] = None
    return get({"name": _TFMOT[name]} | arguments)


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}"
        )
    return int(value)


def check_sparsity(name: str, value: float) -> float:
    """The sparsity as a float.

    Raises:
        ValueError: If it is not a number in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={value!r}")
    return float(value)


@register("constant")
class Constant(Schedule):
    """The same sparsity throughout.

    Args:
        sparsity: Share of weights that is pruned, in [0, 1).
        begin_step: Step at which they are.
        end_step: Last step at which masks may change, where pruned weights can come back.
        frequency: Steps from one change to the next.
    """

    def __init__(
        self,
        sparsity: float,
        begin_step: int = 0,
        end_step: int | None = None,
        frequency: int = 100,
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self._sparsity = check_sparsity("sparsity", sparsity)

    def sparsity(self, step: int) -> float:
        """The sparsity, at any step."""
        return self._sparsity

    def get_config(self) -> dict[str, Any]:
        """The name and the arguments."""
        return super().get_config() | {"sparsity": self._sparsity}


class _Ramp(Schedule):
    """From one sparsity to another, between two steps."""

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int,
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self.end_step = _integer("end_step", end_step, begin_step)  # here it must be given
        self.initial_sparsity = check_sparsity("initial_sparsity", initial_sparsity)
        self.final_sparsity = check_sparsity("final_sparsity", final_sparsity)

    @property
    def falls(self) -> bool:
        """True if the sparsity falls."""
        return self.initial_sparsity > self.final_sparsity

    def _progress(self, step: int) -> float:
        # Outside of the ramp first: one that begins where it ends has no length to divide by.
        if step >= self.end_step:
            return 1.0
        if step <= self.begin_step:
            return 0.0
        return (step - self.begin_step) / (self.end_step - self.begin_step)


@register("polynomial")
class Polynomial(_Ramp):
    """Prunes fast at first and slowly at the end.

    With p from 0 at `begin_step` to 1 at `end_step`, the sparsity is
    `final + (initial - final) (1 - p)^power`. Where both steps are the same, masks change once, to
    the final sparsity.

    Args:
        initial_sparsity: Sparsity at `begin_step`, in [0, 1).
        final_sparsity: Sparsity at `end_step` and after it, in [0, 1). Below the initial one
            weights come back, where `GradualPruning` has `regrowth=True`; without, it refuses.
        begin_step: First step at which masks change.
        end_step: Last step at which they do; to reach the final sparsity it must be a whole
            number of `frequency` steps after `begin_step`.
        power: The exponent, above 0; 1 for a straight line.
        frequency: Steps from one change to the next.

    Raises:
        ValueError: If a sparsity is outside [0, 1), a step is negative or no integer, the end lies
            before the beginning, or the power is not a positive finite number.

    Reference:
        - [Zhu & Gupta, arXiv 1710.01878](https://arxiv.org/abs/1710.01878), section 3
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        power: float = 3,
        frequency: int = 100,
    ) -> None:
        super().__init__(initial_sparsity, final_sparsity, begin_step, end_step, frequency)
        number = isinstance(power, numbers.Real) and not isinstance(power, bool)
        if not number or not 0 < power < math.inf:
            raise ValueError(
                "`power` must be a finite number above 0, so that the sparsity goes from the "
                f"initial one to the final one. Received: power={power!r}"
            )
        self.power = power

    def sparsity(self, step: int) -> float:
        """The polynomial at this step."""
        left = (1 - self._progress(step)) ** self.power
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left


@register("geometric")
class Geometric(_Ramp):
    """Drops the same share of the weights that are left at every change, as rounds of pruning do.

    With p from 0 at `begin_step` to 1 at `end_step`, the share of weights that are left is
    `(1 - initial) ((1 - final) / (1 - initial))^p`. Where both steps are the same, masks change
    once, to the final sparsity.

    Args:
        initial_sparsity: Sparsity at `begin_step`, in [0, 1).
        final_sparsity: Sparsity at `end_step` and after it, in [0, 1). Below the initial one
            weights come back, where `GradualPruning` has `regrowth=True`; without, it refuses.
        begin_step: First step at which masks change.
        end_step: Last step at which they do; to reach the final sparsity it must be a whole
            number of `frequency` steps after `begin_step`.
        frequency: Steps from one change to the next.
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int = 100,
    ) -> None:
        super().__init__(initial_sparsity, final_sparsity, begin_step, end_step, frequency)

    def sparsity(self, step: int) -> float:
        """The geometric mean of both densities, weighted by the progress."""
        first, last = 1 - self.initial_sparsity, 1 - self.final_sparsity
        return 1 - first * (last / first) ** self._progress(step)


# Their classes of the same meaning, and the argument that has another name.
_TFMOT = {"ConstantSparsity": "constant", "PolynomialDecay": "polynomial"}
_TFMOT_ARGUMENTS = {"target_sparsity": "sparsity"}
