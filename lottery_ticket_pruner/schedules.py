"""Schedules give the sparsity of a model at each training step, and say when its masks change.

A schedule is a function of the step. To add one, write a function of a line or two and register it:

```python
@register("staircase")
def staircase(step):
    '''Adds 0.1 every thousand steps, up to 0.9.'''
    return min(step // 1000, 9) / 10
```

A step is a trained batch: `schedule(100)` is the sparsity after one hundred batches.

References:
    - [Zhu & Gupta, arXiv 1710.01878](https://arxiv.org/abs/1710.01878) (polynomial)
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

import numpy as np

from lottery_ticket_pruner.checks import is_integer, is_number, share_meant
from lottery_ticket_pruner.registry import Registry


class Schedule:
    """A sparsity for each training step, and the steps at which masks are updated to it.

    Masks change at `begin_step` and every `frequency` steps after it, up to and including
    `end_step`. Subclasses implement `sparsity` and store their arguments as attributes of the same
    names.

    Args:
        begin_step: First step at which masks change.
        end_step: Last step at which masks may change. None for no end.
        frequency: Number of steps between changes.

    Raises:
        ValueError: If a step is not a non-negative integer, `end_step` is before `begin_step`, or
            `frequency` is below 1.
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
        """Returns the share of pruned weights after `step` steps, in [0, 1)."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Returns True if the masks change after `step` steps."""
        ended = self.end_step is not None and step > self.end_step
        since = step - self.begin_step
        return since >= 0 and not ended and since % self.frequency == 0

    @property
    def falls(self) -> bool:
        """True if the sparsity is known to fall, which requires pruned weights to come back."""
        return False

    def __call__(self, step: int) -> float:
        """Returns `sparsity(step)`."""
        return self.sparsity(step)

    def get_config(self) -> dict[str, Any]:
        """Returns a dict of the name and arguments, from which `get` restores the schedule."""
        arguments = [
            name for name in inspect.signature(type(self).__init__).parameters if name != "self"
        ]
        name = _REGISTRY.checked(self.name, type(self))
        return {"name": name} | {name: getattr(self, name) for name in arguments}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Returns what `get` resolves `config` to, or this class if it is not registered."""
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
        except Exception:  # Messages also name schedules that cannot be restored.
            arguments = list(vars(self).items())
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments)})"


class Function(Schedule):
    """A schedule from a custom function.

    Args:
        function: A function that takes the step and returns a sparsity in [0, 1).
        begin_step: First step at which masks change.
        end_step: Last step at which masks may change. None for no end.
        frequency: Number of steps between changes.
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
    def name(self) -> str:  # type: ignore[override]  # Follows the function, and is not set.
        """The registered name, or else the name of the function."""
        return _REGISTRY.name_of(self.function)

    def sparsity(self, step: int) -> float:
        """Returns the value of the function at this step."""
        return self.function(step)

    def get_config(self) -> dict[str, Any]:
        """Returns a dict of the name and steps; `get` finds the function if it is registered."""
        return {
            "name": _REGISTRY.checked(self.name, self.function),
            "begin_step": self.begin_step,
            "end_step": self.end_step,
            "frequency": self.frequency,
        }


class _Pairs(Schedule):
    """A tfmot schedule: a function that returns `(whether masks change, sparsity)` at each step."""

    def __init__(self, function: Callable[[int], tuple[Any, Any]]) -> None:
        super().__init__()
        self.function = function

    def sparsity(self, step: int) -> float:
        # As a float32, 0.9 is 0.8999999762, which would prune 89 of a hundred weights.
        return float(str(np.float32(self.function(step)[1])))

    def due(self, step: int) -> bool:
        return bool(self.function(step)[0])

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError(
            f"{type(self.function).__name__} is a schedule of TensorFlow Model Optimization that "
            "this library cannot restore. Write it as a function `step -> sparsity` and "
            "`schedules.register` it."
        )

    def __repr__(self) -> str:
        return repr(self.function)


def _made(known: Any, arguments: dict[str, Any]) -> Schedule:
    return known(**arguments) if isinstance(known, type) else Function(known, **arguments)


Identifier = Schedule | float | str | Mapping[str, Any] | Callable[[int], Any]
_Registered = TypeVar("_Registered", bound=type[Schedule] | Callable[[int], float])

_REGISTRY = Registry(
    "schedule",
    Schedule,
    register="schedules.register",
    wrap=Function,
    make=_made,
    takes="the step",
)


def register(name: str) -> Callable[[_Registered], _Registered]:
    """Registers a schedule under a name. Used as a decorator; returns the schedule unchanged.

    Args:
        name: Name for `get` and configurations.

    Returns:
        A decorator for a function `step -> sparsity` or a subclass of `Schedule`.

    Raises:
        ValueError: If another schedule has this name. Defining the same one again (a notebook cell
            run twice) replaces the earlier one.
    """

    def decorate(schedule: _Registered) -> _Registered:
        _REGISTRY.add(name, schedule)
        if isinstance(schedule, type) and issubclass(schedule, Schedule):
            schedule.name = name
        return schedule

    return decorate


def names() -> list[str]:
    """Returns the registered names in order of registration."""
    return list(_REGISTRY)


def get(identifier: Identifier) -> Schedule:
    """Resolves an identifier to a `Schedule`.

    Args:
        identifier: A `Schedule`; a number, for a constant sparsity; a dict from `get_config()` or
            from Keras' `serialize_keras_object`, or any other dict with a `"name"` and arguments;
            the name of a registered function; a function `step -> sparsity`, evaluated every 100
            steps (use `Function` for other intervals); a `PruningSchedule` of TensorFlow Model
            Optimization, or the result of its `get_config()`.

    Raises:
        ValueError: If the name is unknown, the arguments do not fit, an unregistered function has
            the name of a registered schedule, or the type of `identifier` is not supported.
    """
    if is_number(identifier):
        return Constant(float(identifier))
    if isinstance(identifier, Mapping) and "class_name" in identifier:
        config = identifier.get("config", {})
        if isinstance(config, Mapping) and "name" not in config:  # Otherwise one of our own.
            return _from_tfmot_config(identifier["class_name"], config)
    if _is_tfmot(identifier):
        if type(identifier).__name__ in _TFMOT:
            return get(identifier.get_config())
        return _Pairs(identifier)
    return _REGISTRY.get(identifier)


def _is_tfmot(thing: object) -> TypeGuard[Any]:
    # Compares names, because importing the package changes the process (see `interop.tfmot`).
    return any(
        base.__name__ == "PruningSchedule"
        and base.__module__.startswith("tensorflow_model_optimization.")
        for base in type(thing).__mro__
    )


def _from_tfmot_config(name: str, config: Mapping[str, Any]) -> Schedule:
    if name not in _TFMOT:
        raise ValueError(
            f"Unknown schedule class {name!r}. Supported configurations of TensorFlow Model "
            f"Optimization: {', '.join(_TFMOT)}."
        )
    arguments = {_TFMOT_ARGUMENTS.get(key, key): value for key, value in config.items()}
    if arguments.get("end_step") == -1:
        arguments["end_step"] = None
    return get({"name": _TFMOT[name]} | arguments)


def _integer(name: str, value: object, least: int) -> int:
    if not is_integer(value) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}"
        )
    return int(value)


def check_sparsity(name: str, value: object) -> float:
    """Returns the sparsity as a float.

    Raises:
        ValueError: If it is not a number in [0, 1).
    """
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number in [0, 1). Received: {name}={value!r}.{share_meant(value)}"
        )
    return float(value)


@register("constant")
class Constant(Schedule):
    """A constant sparsity.

    Args:
        sparsity: Share of pruned weights, in [0, 1).
        begin_step: First step at which masks change.
        end_step: Last step at which masks may change, where pruned weights can come back.
        frequency: Number of steps between changes.
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
        """Returns the sparsity, which is the same at every step."""
        return self._sparsity

    def get_config(self) -> dict[str, Any]:
        """Returns a dict of the name and the arguments."""
        return super().get_config() | {"sparsity": self._sparsity}


class _Ramp(Schedule):
    """A change from one sparsity to another between two steps."""

    end_step: int  # required here

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int,
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self.end_step = _integer("end_step", end_step, begin_step)
        self.initial_sparsity = check_sparsity("initial_sparsity", initial_sparsity)
        self.final_sparsity = check_sparsity("final_sparsity", final_sparsity)

    @property
    def falls(self) -> bool:
        """True if the sparsity falls."""
        return self.initial_sparsity > self.final_sparsity

    def _progress(self, step: int) -> float:
        # Compared first, because a ramp that ends where it begins has no length to divide by.
        if step >= self.end_step:
            return 1.0
        if step <= self.begin_step:
            return 0.0
        return (step - self.begin_step) / (self.end_step - self.begin_step)


@register("polynomial")
class Polynomial(_Ramp):
    """A sparsity that changes fast at first and slowly at the end.

    The sparsity is `final + (initial - final) (1 - p)^power`, where p rises from 0 at `begin_step`
    to 1 at `end_step`. If both steps are equal, masks change once, to the final sparsity.

    Args:
        initial_sparsity: Sparsity at `begin_step`, in [0, 1).
        final_sparsity: Sparsity from `end_step` on, in [0, 1). If it is lower than the initial one,
            pruned weights come back, which `GradualPruning` allows only with `regrowth=True`.
        begin_step: First step at which masks change.
        end_step: Last step at which masks change. The final sparsity is reached only if `end_step`
            is a whole number of `frequency` steps after `begin_step`.
        power: Exponent, above 0. 1 gives a straight line.
        frequency: Number of steps between changes.

    Raises:
        ValueError: If a sparsity is outside [0, 1), a step is not a non-negative integer,
            `end_step` is before `begin_step`, or `power` is not a positive finite number.

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
        if not is_number(power) or not 0 < power < math.inf:
            raise ValueError(
                "`power` must be a finite number above 0, so that the sparsity changes from the "
                f"initial to the final value. Received: power={power!r}"
            )
        self.power = power

    def sparsity(self, step: int) -> float:
        """Returns the value of the polynomial at this step."""
        left = (1 - self._progress(step)) ** self.power
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left


@register("geometric")
class Geometric(_Ramp):
    """A sparsity that prunes the same share of the remaining weights at every change.

    The share of kept weights is `(1 - initial) ((1 - final) / (1 - initial))^p`, where p rises from
    0 at `begin_step` to 1 at `end_step`. If both steps are equal, masks change once, to the final
    sparsity.

    Args:
        initial_sparsity: Sparsity at `begin_step`, in [0, 1).
        final_sparsity: Sparsity from `end_step` on, in [0, 1). If it is lower than the initial one,
            pruned weights come back, which `GradualPruning` allows only with `regrowth=True`.
        begin_step: First step at which masks change.
        end_step: Last step at which masks change. The final sparsity is reached only if `end_step`
            is a whole number of `frequency` steps after `begin_step`.
        frequency: Number of steps between changes.
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
        """Returns 1 minus the geometric mean of both densities, weighted by the progress."""
        first, last = 1 - self.initial_sparsity, 1 - self.final_sparsity
        return 1 - first * (last / first) ** self._progress(step)


# The equivalent schedules of tfmot, and the argument that has another name there.
_TFMOT = {"ConstantSparsity": "constant", "PolynomialDecay": "polynomial"}
_TFMOT_ARGUMENTS = {"target_sparsity": "sparsity"}
