"""Treatments say what weights start from once the masks are chosen: the kept and the pruned ones.

A treatment of kept weights is a pure function from what is known of one masked weight (`Kernel`) to
the values that the kept entries start from. A treatment of pruned weights is a pure function from
that and these values to all values: what kept entries start from, what pruned ones are frozen at.

>>> @register_kept("halved")
... def halved(kernel):
...     '''Half of the initial weights.'''
...     return kernel.initial / 2

Notation in the docstrings: `w0` the recorded initial weight, `wf` the recorded final one. Every
round starts from the same `w0`, so that permutations do not compound.

Reference:
    - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 3 and 4 ("mask-1"
      and "mask-0 actions")
"""

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.registry import Registry
from lottery_ticket_pruner.variables import widened


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """The mask and records of one masked weight, as arrays of its shape.

    Args:
        mask: Bool array, True where an entry is kept.
        rng: The generator of this weight; it depends on the seed and the path of the weight alone.
        initial: The recorded initial weights, read-only.
        final: The recorded final weights, read-only; None where not recorded.
        draw: A fresh draw from the layer's own initializer, the same at every call.
    """

    mask: np.ndarray
    rng: np.random.Generator
    initial: np.ndarray
    final: np.ndarray  # a treatment that needs it may rely on it
    draw: Callable[[], np.ndarray]


F = TypeVar("F", bound=Callable[..., np.ndarray])


@dataclasses.dataclass(frozen=True)
class Treatment(Generic[F]):
    """A named treatment. Made by `get_kept`, `get_pruned` and what registers, not by hand.

    Args:
        name: The name it is known by.
        function: `function(kernel)` for kept weights, `function(kernel, values)` for pruned ones.
        needs_final: Whether it cannot do without the final weights.
        weights: Which ones it is for, `"kept"` or `"pruned"`; None where that is not known.
    """

    name: str
    function: F
    needs_final: bool = False
    weights: str | None = None

    def __call__(self, *args: Any) -> np.ndarray:
        """The values, an array of the weight's shape."""
        return self.function(*args)

    @property
    def doc(self) -> str:
        """The first line of the function's docstring, for tables and help texts."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def get_config(self) -> dict:
        """The name and which weights it is for; `get_kept` and `get_pruned` find it again."""
        for registry in _registries(self.weights):
            registry.checked(self.name, self.function)
        config = {"name": self.name}
        return config if self.weights is None else config | {"weights": self.weights}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Treatment":
        """Resolves a configuration by `get_kept` or `get_pruned`.

        Raises:
            ValueError: If it does not say which weights it is for, and both kinds have the name, or
                neither.
        """
        weights = config.get("weights")
        known = [r for r in _registries(weights) if config.get("name") in r]
        if weights is None and len(known) > 1:
            raise ValueError(
                'A treatment of kept and one of pruned weights have this name: add "weights", '
                f'"kept" or "pruned". Received: {dict(config)}'
            )
        return (known or _registries(weights))[0].get(config)


def _treatments(weights: str, register: str, takes: str) -> Registry[Treatment]:
    def wrap(function: Callable) -> Treatment:
        registry = _registries(weights)[0]
        name = registry.checked(registry.name_of(function), function)
        return registry.value_of(function) or Treatment(name, function, weights=weights)

    def make(treatment: Treatment, arguments: dict[str, Any]) -> Treatment:
        if arguments not in ({}, {"weights": weights}):
            raise TypeError(f'it takes no more than {{"weights": {weights!r}}}')
        return treatment

    kind = f"treatment of {weights} weights"
    return Registry(kind, Treatment, register=register, wrap=wrap, make=make, takes=takes)


_KEPT = _treatments("kept", "treatments.register_kept", "a `Kernel`")
_PRUNED = _treatments("pruned", "treatments.register_pruned", "a `Kernel` and values")


def _registries(weights: str | None) -> list[Registry[Treatment]]:
    return {"kept": [_KEPT], "pruned": [_PRUNED]}.get(weights, [_KEPT, _PRUNED])


def kept_names() -> list[str]:
    """The known treatments of kept weights, in the order of registration."""
    return list(_KEPT)


def pruned_names() -> list[str]:
    """The known treatments of pruned weights, in the order of registration."""
    return list(_PRUNED)


def register_kept(name: str, *, needs_final: bool = False) -> Callable[[Callable], Callable]:
    """Makes a treatment of kept weights known by name; decorates `function(kernel)`.

    Args:
        name: The name for `get_kept`, configurations and command lines.
        needs_final: Whether it cannot do without the final weights.

    Raises:
        ValueError: If another function has the name.
    """
    return _registering("kept", name, needs_final)


def register_pruned(name: str, *, needs_final: bool = False) -> Callable[[Callable], Callable]:
    """Makes a treatment of pruned weights known by name; decorates `function(kernel, values)`.

    Args:
        name: The name for `get_pruned`, configurations and command lines.
        needs_final: Whether it cannot do without the final weights.

    Raises:
        ValueError: If another function has the name.
    """
    return _registering("pruned", name, needs_final)


def get_kept(identifier: str | Mapping | Treatment | Callable) -> Treatment:
    """Turns whatever names a treatment of kept weights into a `Treatment`.

    Args:
        identifier: A known name; a dict from `get_config()` or Keras' `serialize_keras_object`; a
            `Treatment`; or a function of a `Kernel`.

    Raises:
        ValueError: An unknown name, an unregistered function that has the name of a known
            treatment, a treatment of the other weights, or something that is none of these.
    """
    return _get("kept", identifier)


def get_pruned(identifier: str | Mapping | Treatment | Callable) -> Treatment:
    """Turns whatever names a treatment of pruned weights into a `Treatment`.

    Args:
        identifier: A known name; a dict from `get_config()` or Keras' `serialize_keras_object`; a
            `Treatment`; or a function of a `Kernel` and the values that the kept entries start
            from.

    Raises:
        ValueError: An unknown name, an unregistered function that has the name of a known
            treatment, a treatment of the other weights, or something that is none of these.
    """
    return _get("pruned", identifier)


def _registering(weights: str, name: str, needs_final: bool) -> Callable[[Callable], Callable]:
    def decorate(function: Callable) -> Callable:
        treatment = Treatment(name, function, needs_final, weights)
        _registries(weights)[0].add(name, function, treatment)
        return function

    return decorate


def _get(weights: str, identifier: str | Mapping | Treatment | Callable) -> Treatment:
    treatment = _registries(weights)[0].get(identifier)
    if treatment.weights not in (None, weights):
        raise ValueError(
            f"Expected a treatment of {weights} weights. Received: {treatment.name!r}, one of "
            f"{treatment.weights} weights."
        )
    return treatment


def treat(kernel: Kernel, kept: Treatment, pruned: Treatment) -> np.ndarray:
    """Returns the kept and pruned entries of one weight that the forward pass starts from.

    Raises:
        ValueError: If a treatment gave values of another shape or that are not finite.
    """
    values = _checked(kernel, kept, kept(kernel), kernel.mask)
    return _checked(kernel, pruned, pruned(kernel, values), np.ones_like(kernel.mask))


def generator(seed: int, path: str) -> np.random.Generator:
    """The generator of the weight at a path: it depends on nothing else than these two."""
    return np.random.default_rng([seed, zlib.crc32(path.encode())])


def draw_again(ref: ml.WeightRef, seed: int) -> np.ndarray:
    """A fresh draw of a weight from the layer's own initializer, whose own seed is not used.

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
    """sign(w0) times the standard deviation of w0, which is taken over the whole weight."""
    return (np.sign(initial) * _deviation(initial)).astype(initial.dtype)


# --- Kept weights ---------------------------------------------------------------------------------


@register_kept("rewind")
def rewind(kernel: Kernel) -> np.ndarray:
    """Their initial values: w0."""
    return kernel.initial


@register_kept("reinit")
def reinit(kernel: Kernel) -> np.ndarray:
    """A fresh draw from the layer's own initializer."""
    return kernel.draw()


@register_kept("reshuffle")
def reshuffle(kernel: Kernel) -> np.ndarray:
    """The kept initial values in another order within the layer."""
    values = np.array(kernel.initial)
    values[kernel.mask] = kernel.rng.permutation(values[kernel.mask])
    return values


@register_kept("constant")
def constant(kernel: Kernel) -> np.ndarray:
    """Plus or minus the layer's initial standard deviation, by coin toss."""
    signs = kernel.rng.choice([-1.0, 1.0], kernel.initial.shape)
    return (signs * _deviation(kernel.initial)).astype(kernel.initial.dtype)


@register_kept("finetune", needs_final=True)
def finetune(kernel: Kernel) -> np.ndarray:
    """Their trained values: wf."""
    return kernel.final


@register_kept("reinit_same_sign")
def reinit_same_sign(kernel: Kernel) -> np.ndarray:
    """A fresh draw with the signs of w0."""
    return np.copysign(reinit(kernel), kernel.initial)


@register_kept("reshuffle_same_sign")
def reshuffle_same_sign(kernel: Kernel) -> np.ndarray:
    """The magnitudes of the kept initial values in another order, each sign where it was."""
    return np.copysign(reshuffle(kernel), kernel.initial)


@register_kept("constant_same_sign")
def constant_same_sign(kernel: Kernel) -> np.ndarray:
    """The layer's initial standard deviation with the sign of w0: sign(w0) std(w0)."""
    return signed_constant(kernel.initial)


# --- Pruned weights -------------------------------------------------------------------------------


@register_pruned("zero")
def zero(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Zero."""
    return np.where(kernel.mask, values, 0)


@register_pruned("freeze")
def freeze(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Frozen at w0."""
    return np.where(kernel.mask, values, kernel.initial)


@register_pruned("zero_if_shrunk", needs_final=True)
def zero_if_shrunk(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """Zero where abs(wf) < abs(w0), elsewhere frozen at w0."""
    return np.where(kernel.mask, values, np.where(_shrunk(kernel), 0, kernel.initial))


@register_pruned("zero_if_shrunk_all", needs_final=True)
def zero_if_shrunk_all(kernel: Kernel, values: np.ndarray) -> np.ndarray:
    """The same, and kept weights with abs(wf) < abs(w0) start from zero, too."""
    return np.where(_shrunk(kernel), 0, freeze(kernel, values))


def _shrunk(kernel: Kernel) -> np.ndarray:
    return np.abs(kernel.final) < np.abs(kernel.initial)


def _deviation(initial: np.ndarray) -> float:
    return float(initial.astype("float64").std())


# --- Inside ---------------------------------------------------------------------------------------


def _checked(
    kernel: Kernel, treatment: Treatment, values: np.ndarray, used: np.ndarray
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
        f"{ref.path} cannot be drawn again: {type(ref.layer).__name__} has no "
        f"`{ref.name}_initializer`. Give the layer that attribute, or choose a treatment or "
        "control that draws nothing again."
    )
