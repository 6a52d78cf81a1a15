"""Treatments give the values that kept and pruned weights start from once masks are chosen.

A treatment of kept weights is a pure function from a `Kernel` (the mask and records of one masked
weight) to the values that the kept entries start from. A treatment of pruned weights is a pure
function of a `Kernel` and these values. It returns all values: kept entries start from them, and
pruned entries are frozen at them. To add one, write a function and register it:

```python
@register_kept("halved")
def halved(kernel):
    '''Starts from half of the initial weights.'''
    return kernel.initial / 2
```

Notation in the docstrings: `w0` is the recorded initial weight and `wf` the recorded final weight.
Every round starts from the same `w0`, so permutations do not accumulate.

Reference:
    - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 3 and 4 ("mask-1"
      and "mask-0 actions")
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.registry import Registry
from lottery_ticket_pruner.variables import widened
from masked_layers import randomness

# Typed as an array, because a treatment only reads final weights if it needs them.
_NOT_RECORDED: Any = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """The mask and records of one masked weight, as arrays of its shape.

    Args:
        mask: Bool array, True where an entry is kept.
        rng: Random generator of this weight. Depends only on the seed and the path of the weight.
        initial: Recorded initial weights, read-only.
        final: Recorded final weights, read-only. None if not recorded.
        draw: Function that returns new values from the layer's initializer, the same at every call.
    """

    mask: np.ndarray
    rng: np.random.Generator
    initial: np.ndarray
    final: np.ndarray = _NOT_RECORDED
    draw: Callable[[], np.ndarray]


P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Treatment(Generic[P]):
    """A named treatment.

    Created by `get_kept`, `get_pruned`, `register_kept` and `register_pruned`; not meant to be
    constructed directly.

    Args:
        name: Name under which the treatment is registered.
        function: `function(kernel)` for kept weights, `function(kernel, values)` for pruned
            weights.
        needs_final: Whether the treatment requires the final weights.
        weights: The weights that the treatment is for, `"kept"` or `"pruned"`. None if unknown.
    """

    name: str
    function: Callable[P, np.ndarray]
    needs_final: bool = False
    weights: str | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> np.ndarray:
        """Returns the values, an array of the shape of the weight."""
        return self.function(*args, **kwargs)

    @property
    def doc(self) -> str:
        """First line of the function's docstring, for tables and help texts."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def get_config(self) -> dict[str, Any]:
        """Returns a dict from which `get_kept` or `get_pruned` restores a registered treatment."""
        for registry in _registries(self.weights):
            registry.checked(self.name, self.function)
        config = {"name": self.name}
        return config if self.weights is None else config | {"weights": self.weights}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Treatment[...]":
        """Returns the treatment that `get_kept` or `get_pruned` resolves a configuration to.

        Raises:
            ValueError: If the configuration does not say which weights the treatment is for, and
                the name is registered for both or for neither.
        """
        weights = config.get("weights")
        known = [r for r in _registries(weights) if config.get("name") in r]
        if weights is None and len(known) > 1:
            raise ValueError(
                'Both a treatment of kept and one of pruned weights have this name. Add "weights", '
                f'"kept" or "pruned". Received: {dict(config)}'
            )
        return (known or _registries(weights))[0].get(config)


KeptFunction = Callable[[Kernel], np.ndarray]
PrunedFunction = Callable[[Kernel, np.ndarray], np.ndarray]
KeptIdentifier = str | Mapping[str, Any] | Treatment[[Kernel]] | KeptFunction
PrunedIdentifier = str | Mapping[str, Any] | Treatment[[Kernel, np.ndarray]] | PrunedFunction

_F = TypeVar("_F", bound=Callable[..., np.ndarray])
_Kept = TypeVar("_Kept", bound=KeptFunction)
_Pruned = TypeVar("_Pruned", bound=PrunedFunction)


def _treatments(weights: str, register: str, takes: str) -> Registry[Treatment[P]]:
    def wrap(function: Callable[P, np.ndarray]) -> Treatment[P]:
        registry = _registries(weights)[0]
        name = registry.checked(registry.name_of(function), function)
        return registry.value_of(function) or Treatment(name, function, weights=weights)

    def make(treatment: Treatment[P], arguments: dict[str, Any]) -> Treatment[P]:
        if arguments not in ({}, {"weights": weights}):
            raise TypeError(f'it takes no arguments other than {{"weights": {weights!r}}}')
        return treatment

    kind = f"treatment of {weights} weights"
    return Registry(kind, Treatment, register=register, wrap=wrap, make=make, takes=takes)


_KEPT: Registry[Treatment[[Kernel]]]
_KEPT = _treatments("kept", "treatments.register_kept", "a `Kernel`")
_PRUNED: Registry[Treatment[[Kernel, np.ndarray]]]
_PRUNED = _treatments("pruned", "treatments.register_pruned", "a `Kernel` and values")


def _registries(weights: str | None) -> list[Registry[Treatment[...]]]:
    if weights == "kept":
        return [_KEPT]
    return [_PRUNED] if weights == "pruned" else [_KEPT, _PRUNED]


def kept_names() -> list[str]:
    """Returns the registered treatments of kept weights, in order of registration."""
    return list(_KEPT)


def pruned_names() -> list[str]:
    """Returns the registered treatments of pruned weights, in order of registration."""
    return list(_PRUNED)


def register_kept(name: str, *, needs_final: bool = False) -> Callable[[_Kept], _Kept]:
    """Registers a treatment of kept weights under a name. Used to decorate `function(kernel)`.

    Args:
        name: Name for `get_kept`, configurations and command lines.
        needs_final: Whether the treatment requires the final weights.

    Raises:
        ValueError: If another function has this name.
    """
    return _registering("kept", name, needs_final)


def register_pruned(name: str, *, needs_final: bool = False) -> Callable[[_Pruned], _Pruned]:
    """Registers a treatment of pruned weights. Used to decorate `function(kernel, values)`.

    Args:
        name: Name for `get_pruned`, configurations and command lines.
        needs_final: Whether the treatment requires the final weights.

    Raises:
        ValueError: If another function has this name.
    """
    return _registering("pruned", name, needs_final)


def get_kept(identifier: KeptIdentifier) -> Treatment[[Kernel]]:
    """Resolves an identifier to a treatment of kept weights.

    Args:
        identifier: A registered name; a dict from `get_config()` or Keras'
            `serialize_keras_object`; a `Treatment`; or a function of a `Kernel`.

    Raises:
        ValueError: If the name is unknown, an unregistered function has the name of a registered
            treatment, the treatment is for pruned weights, or the type of `identifier` is not
            supported.
    """
    return _only("kept", _KEPT.get(identifier))


def get_pruned(identifier: PrunedIdentifier) -> Treatment[[Kernel, np.ndarray]]:
    """Resolves an identifier to a treatment of pruned weights.

    Args:
        identifier: A registered name; a dict from `get_config()` or Keras'
            `serialize_keras_object`; a `Treatment`; or a function of a `Kernel` and the values that
            the kept entries start from.

    Raises:
        ValueError: If the name is unknown, an unregistered function has the name of a registered
            treatment, the treatment is for kept weights, or the type of `identifier` is not
            supported.
    """
    return _only("pruned", _PRUNED.get(identifier))


def _registering(weights: str, name: str, needs_final: bool) -> Callable[[_F], _F]:
    def decorate(function: _F) -> _F:
        treatment = Treatment(name, function, needs_final, weights)
        _registries(weights)[0].add(name, function, treatment)
        return function

    return decorate


def _only(weights: str, treatment: Treatment[P]) -> Treatment[P]:
    if treatment.weights not in (None, weights):
        raise ValueError(
            f"Expected a treatment of {weights} weights. Received: {treatment.name!r}, for "
            f"{treatment.weights} weights."
        )
    return treatment


def treat(
    kernel: Kernel, kept: Treatment[[Kernel]], pruned: Treatment[[Kernel, np.ndarray]]
) -> np.ndarray:
    """Returns all values of one weight that training starts from, kept and pruned entries.

    Raises:
        ValueError: If a treatment returns values of another shape or values that are not finite.
    """
    values = _checked(kernel, kept, kept(kernel), kernel.mask)
    return _checked(kernel, pruned, pruned(kernel, values), np.ones_like(kernel.mask))


def generator(seed: int, path: str) -> np.random.Generator:
    """Returns a random generator that depends only on the seed and the path of the weight."""
    return randomness.stream("treatments", seed, path)


def draw_again(ref: ml.WeightRef, seed: int) -> np.ndarray:
    """Draws new values of a weight from its initializer, with `seed` instead of its own seed.

    Raises:
        ValueError: If the layer has no initializer for this weight.
    """
    initializer = _initializer(ref)
    config = initializer.get_config()
    if "seed" in config:
        initializer = type(initializer).from_config({**config, "seed": seed})
    drawn = initializer(tuple(ref.variable.shape), dtype=ref.variable.dtype)
    return widened(np.array(keras.ops.convert_to_numpy(drawn)))


def signed_constant(initial: np.ndarray) -> np.ndarray:
    """Returns sign(w0) times the standard deviation of w0, computed over the whole weight."""
    return (np.sign(initial) * _deviation(initial)).astype(initial.dtype)


# --- Kept weights ---------------------------------------------------------------------------------


@register_kept("rewind")
def rewind(kernel: Kernel) -> np.ndarray:
    """Rewinds weights to their initial values: w0."""
    return kernel.initial


@register_kept("reinit")
def reinit(kernel: Kernel) -> np.ndarray:
    """Draws new values from the layer's initializer."""
    return kernel.draw()


@register_kept("reshuffle")
def reshuffle(kernel: Kernel) -> np.ndarray:
    """Shuffles the kept initial values within the layer."""
    values = np.array(kernel.initial)
    values[kernel.mask] = kernel.rng.permutation(values[kernel.mask])
    return values


@register_kept("constant")
def constant(kernel: Kernel) -> np.ndarray:
    """Sets weights to plus or minus the layer's initial standard deviation, at random."""
    signs = kernel.rng.choice([-1.0, 1.0], kernel.initial.shape)
    return (signs * _deviation(kernel.initial)).astype(kernel.initial.dtype)


@register_kept("finetune", needs_final=True)
def finetune(kernel: Kernel) -> np.ndarray:
    """Keeps the trained values: wf."""
    return kernel.final


@register_kept("reinit_same_sign")
def reinit_same_sign(kernel: Kernel) -> np.ndarray:
    """Draws new values and gives them the signs of w0."""
    return np.copysign(reinit(kernel), kernel.initial)


@register_kept("reshuffle_same_sign")
def reshuffle_same_sign(kernel: Kernel) -> np.ndarray:
    """Shuffles the magnitudes of the kept initial values; signs stay in place."""
    return np.copysign(reshuffle(kernel), kernel.initial)


@register_kept("constant_same_sign")
def constant_same_sign(kernel: Kernel) -> np.ndarray:
    """Sets weights to the layer's initial standard deviation with the sign of w0."""
    return signed_constant(kernel.initial)


# --- Pruned weights -------------------------------------------------------------------------------


@register_pruned("zero")
def zero(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Sets pruned weights to zero."""
    return np.where(kernel.mask, values, 0)


@register_pruned("freeze")
def freeze(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Freezes pruned weights at w0."""
    return np.where(kernel.mask, values, kernel.initial)


@register_pruned("zero_if_shrunk", needs_final=True)
def zero_if_shrunk(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Sets pruned weights with abs(wf) < abs(w0) to zero and freezes the others at w0."""
    return np.where(kernel.mask, values, np.where(_shrunk(kernel), 0, kernel.initial))


@register_pruned("zero_if_shrunk_all", needs_final=True)
def zero_if_shrunk_all(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Sets all weights with abs(wf) < abs(w0) to zero and freezes other pruned ones at w0."""
    return np.where(_shrunk(kernel), 0, freeze(kernel, values))


def _shrunk(kernel: Kernel) -> np.ndarray:
    return np.abs(kernel.final) < np.abs(kernel.initial)


def _deviation(initial: np.ndarray) -> float:
    return float(initial.astype("float64").std())


# --- Inside ---------------------------------------------------------------------------------------


def _checked(
    kernel: Kernel, treatment: Treatment[...], values: np.ndarray, used: np.ndarray
) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != kernel.mask.shape or not np.isfinite(values[used]).all():
        raise ValueError(
            f"The treatment {treatment.name!r} must give finite numbers in the weight's shape, "
            f"{kernel.mask.shape}. Received: shape {values.shape}"
            + (", some not finite" if values.shape == kernel.mask.shape else "")
        )
    return values.astype(kernel.initial.dtype, copy=False)


def _initializer(ref: ml.WeightRef) -> keras.initializers.Initializer:
    # `recurrent_kernel` is drawn by `recurrent_initializer`, `kernel` by `kernel_initializer`.
    for name in (ref.name, ref.name.removesuffix("_kernel")):
        initializer = getattr(ref.layer, f"{name}_initializer", None)
        if initializer is not None:
            return keras.initializers.get(initializer)
    raise ValueError(
        f"{ref.path} cannot be reinitialized: {type(ref.layer).__name__} has no "
        f"`{ref.name}_initializer`. Add this attribute to the layer, or choose a treatment or "
        "control that does not reinitialize weights."
    )
