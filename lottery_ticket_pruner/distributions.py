"""Distributions share one sparsity of a whole model out among its kernels, to the exact count.

Adding one takes a function from a kernel's shape to its density, relative to those of the others,
and one registration:

>>> @register("small_dense")
... def small_dense(shape):
...     '''A higher density for smaller kernels: 1 / sqrt(size).'''
...     return math.prod(shape) ** -0.5
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lottery_ticket_pruner.registry import Registry

Rule = Callable[[tuple[int, ...]], float]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A rule of which share of each kernel is kept, such that the whole has a given sparsity.

    Densities are in proportion to what the rule says. None exceeds 1: kernels that would are dense,
    and the others take over what they cannot. All in all exactly `floor(sparsity * size + 1e-6)`
    weights are pruned; a kernel's own count is rounded up or down for that, and it keeps at least
    one weight.

    Args:
        name: `"uniform"`: one density for all; `"erk"`, Erdos-Renyi-kernel: in proportion to
            sum(shape) / prod(shape) of each kernel; or the name of a rule that was registered.
        dense_first: Whether the first layer stays dense: the first kernel, and whatever else of its
            layer is masked. The others make up for it.
        dense_last: Whether the last one does.
        rule: The rule itself, a function from a kernel's shape to its relative density; by default
            the one that is known by the name.

    Raises:
        ValueError: If no rule has this name.

    Reference:
        - [Evci et al., arXiv 1911.11134](https://arxiv.org/abs/1911.11134), section 3 (1)
    """

    name: str
    dense_first: bool = False
    dense_last: bool = False
    rule: Rule | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.rule is None:
            object.__setattr__(self, "rule", _RULES.get(self.name).rule)

    def __call__(self, shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
        """The sparsity of each kernel, by path.

        Args:
            shapes: The shapes of the kernels by path, from the first of the model to the last.
            sparsity: Share of all weights that are to be pruned, in [0, 1).

        Raises:
            ValueError: A sparsity outside [0, 1), or one that cannot be reached since each kernel
                keeps a weight and some are dense.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` must be a number in [0, 1). Received: {sparsity!r}")
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
                f"{most.sum()} can go: each kernel keeps a weight, and dense ones keep all."
            )
        counts = _counts(sizes, weights, most, drop)
        return {
            path: int(count) / int(size) if size else 0.0
            for path, count, size in zip(paths, counts, sizes, strict=True)
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments, from which `get` makes the same distribution."""
        return {
            "name": _RULES.checked(self.name, self.rule),
            "dense_first": self.dense_first,
            "dense_last": self.dense_last,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Distribution":
        """Returns what `get` makes of a configuration."""
        return get(config)


Identifier = str | Mapping | Distribution | Rule


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


def register(name: str) -> Callable[[Callable], Callable]:
    """Makes a rule known by name: a function from a kernel's shape to its relative density.

    Raises:
        ValueError: If another rule has the name. The same one defined again (a notebook cell run
            twice) replaces the earlier one.
    """

    def decorate(rule: Rule) -> Rule:
        _RULES.add(name, rule)
        return rule

    return decorate


def names() -> list[str]:
    """The known names, in the order of registration."""
    return list(_RULES)


@register("uniform")
def uniform(shape: tuple[int, ...]) -> float:
    """The same density for every kernel."""
    return 1.0


@register("erk")
def erk(shape: tuple[int, ...]) -> float:
    """A higher density for smaller kernels: sum(shape) / prod(shape)."""
    return sum(shape) / max(math.prod(shape), 1)


def get(identifier: Identifier) -> Distribution:
    """Turns whatever names a distribution into a `Distribution`.

    Args:
        identifier: `"uniform"`, `"erk"` or a registered name; a dict from `get_config()` or Keras'
            `serialize_keras_object`; a `Distribution`; a function from a kernel's shape to its
            relative density, as `register` takes it.

    Raises:
        ValueError: An unknown name, arguments that a distribution does not take, an unregistered
            function that has the name of a known rule, or something that is none of these.
    """
    return _RULES.get(identifier)


def _counts(sizes: np.ndarray, weights: np.ndarray, most: np.ndarray, drop: int) -> np.ndarray:
    """Returns the number of weights to prune in each kernel: `drop` in all, each in [0, `most`]."""
    shared = np.flatnonzero(most)
    # Density = scale * weight. Kernels for which it exceeds 1 are dense, and the scale grows.
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
    # What rounding down left over goes where the most was cut off, if a weight is left to give.
    while missing := drop - int(counts.sum()):
        order = np.argsort(counts - exact, kind="stable")
        counts[order[counts[order] < most[order]][:missing]] += 1
    return counts
