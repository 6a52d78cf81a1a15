"""Distributions divide the sparsity of a whole model among its kernels, with exact counts.

To add one, write a function that maps the shape of a kernel to its density relative to the other
kernels, and register it:

```python
@register("small_dense")
def small_dense(shape):
    '''A higher density for smaller kernels: 1 / sqrt(size).'''
    return math.prod(shape) ** -0.5
```
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lottery_ticket_pruner.checks import share_meant
from lottery_ticket_pruner.registry import Registry

Rule = Callable[[tuple[int, ...]], float]
_R = TypeVar("_R", bound=Rule)

# Never None for type checkers, because `__post_init__` finds the rule by its name.
_BY_NAME: Any = None


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A rule that divides the sparsity of a model among its kernels.

    Densities are proportional to the values of the rule, up to a maximum of 1: kernels that would
    exceed it stay dense, and the others are pruned more. In total exactly
    `floor(sparsity * size + 1e-6)` weights are pruned. To reach this total, the count of each
    kernel is rounded up or down. Each kernel keeps at least one weight.

    Args:
        name: `"uniform"` for the same density everywhere; `"erk"` (Erdos-Renyi-kernel) for
            densities proportional to sum(shape) / prod(shape); or the name of a registered rule.
        dense_first: Whether to keep the first layer dense: the first kernel and all other masked
            weights of its layer. The other layers are pruned more to compensate.
        dense_last: Whether to keep the last layer dense, in the same way.
        rule: A function from the shape of a kernel to its relative density. By default the rule
            registered under `name`.

    Raises:
        ValueError: If no rule is registered under this name.

    Reference:
        - [Evci et al., arXiv 1911.11134](https://arxiv.org/abs/1911.11134), section 3 (1)
    """

    name: str
    dense_first: bool = False
    dense_last: bool = False
    rule: Rule = dataclasses.field(default=_BY_NAME, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.rule is _BY_NAME:
            object.__setattr__(self, "rule", _RULES.get(self.name).rule)

    def __call__(self, shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
        """Returns the sparsity of each kernel, by path.

        Args:
            shapes: Shapes of the kernels by path, ordered from the first kernel of the model to the
                last.
            sparsity: Share of all weights to prune, in [0, 1).

        Raises:
            ValueError: If the sparsity is outside [0, 1), or cannot be reached because each kernel
                keeps a weight and some kernels are dense.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"`sparsity` must be a number in [0, 1). Received: {sparsity!r}."
                f"{share_meant(sparsity)}"
            )
        paths = list(shapes)
        sizes = np.array([math.prod(shapes[path]) for path in paths], dtype=np.int64)
        drop = math.floor(sparsity * int(sizes.sum()) + 1e-6)
        weights = np.array([self.rule(tuple(shapes[path])) for path in paths], dtype=float)
        most = np.maximum(sizes - 1, 0)
        layers = np.array([path.rpartition("/")[0] or path for path in paths])
        if paths and self.dense_first:
            most[layers == layers[0]] = 0
        if paths and self.dense_last:
            most[layers == layers[-1]] = 0
        if drop > most.sum():
            raise ValueError(
                f"A sparsity of {sparsity} means {drop} of {sizes.sum()} weights, but only "
                f"{most.sum()} can be pruned: each kernel keeps one weight, dense ones all."
            )
        counts = _counts(sizes, weights, most, drop)
        return {
            path: int(count) / int(size) if size else 0.0
            for path, count, size in zip(paths, counts, sizes, strict=True)
        }

    def get_config(self) -> dict[str, Any]:
        """Returns a dict of the arguments, from which `get` restores the distribution."""
        return {
            "name": _RULES.checked(self.name, self.rule),
            "dense_first": self.dense_first,
            "dense_last": self.dense_last,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Distribution":
        """Returns the distribution that `get` resolves a configuration to."""
        return get(config)


Identifier = str | Mapping[str, Any] | Distribution | Rule


def _made(rule: Rule, arguments: dict[str, Any]) -> Distribution:
    name = _RULES.checked(_RULES.name_of(rule), rule)
    return Distribution(name, rule=rule, **arguments)


_RULES = Registry(
    "distribution",
    Distribution,
    register="distributions.register",
    wrap=lambda rule: _made(rule, {}),
    make=_made,
    takes="a kernel's shape",
)


def register(name: str) -> Callable[[_R], _R]:
    """Registers a rule under a name: a function from a kernel's shape to its relative density.

    Raises:
        ValueError: If another rule has this name. Defining the same rule again (a notebook cell run
            twice) replaces the earlier one.
    """

    def decorate(rule: _R) -> _R:
        _RULES.add(name, rule)
        return rule

    return decorate


def names() -> list[str]:
    """Returns the registered names in order of registration."""
    return list(_RULES)


@register("uniform")
def uniform(shape: tuple[int, ...]) -> float:
    """Returns the same density for every kernel."""
    return 1.0


@register("erk")
def erk(shape: tuple[int, ...]) -> float:
    """Returns a higher density for smaller kernels: sum(shape) / prod(shape)."""
    return sum(shape) / max(math.prod(shape), 1)


def get(identifier: Identifier) -> Distribution:
    """Resolves an identifier to a `Distribution`.

    Args:
        identifier: `"uniform"`, `"erk"` or another registered name; a dict from `get_config()` or
            Keras' `serialize_keras_object`; a `Distribution`; or a function from a kernel's shape
            to its relative density.

    Raises:
        ValueError: If the name is unknown, the arguments do not fit, an unregistered function has
            the name of a registered rule, or the type of `identifier` is not supported.
    """
    return _RULES.get(identifier)


def _counts(sizes: np.ndarray, weights: np.ndarray, most: np.ndarray, drop: int) -> np.ndarray:
    """Returns the number of weights to prune in each kernel: `drop` in all, each in [0, `most`]."""
    shared = np.flatnonzero(most)
    # Density = scale * weight. Kernels whose density would exceed 1 are dense; the scale grows.
    while len(shared):
        left = sizes[shared].sum() - drop
        scale = left / (weights[shared] * sizes[shared]).sum()
        over = scale * weights[shared] > 1
        if not over.any():
            break
        shared = shared[~over]
    exact = np.zeros(len(sizes))
    if len(shared):
        exact[shared] = sizes[shared] * (1 - scale * weights[shared])
    counts = np.minimum(np.floor(exact + 1e-6).astype(np.int64), most)
    # Weights missing because counts were rounded down: first those with the largest remainder.
    while missing := drop - int(counts.sum()):
        order = np.argsort(counts - exact, kind="stable")
        counts[order[counts[order] < most[order]][:missing]] += 1
    return counts
