"""Criteria: functions that score weights, so that the highest-scoring ones are kept.

A criterion is a pure function from a `Group` of weights, ranked together, to one score per weight.
To add one, write a function of a few lines and register it:

```python
@register("small_step", needs=("initial", "final"))
def small_step(group):
    '''Keeps the weights that moved least.'''
    return -np.abs(group.final - group.initial)
```

Notation in the docstrings: `w0` is the recorded initial weight, `wf` the recorded final weight and
`w` the current raw weight. A criterion can also request *evidence*, which the pruner measures
before it calls the function: `g` is the dense gradient of the loss, `H g` the product of the
Hessian of the loss with `g`, and so on.

References:
    - [Frankle & Carbin, arXiv 1803.03635](https://arxiv.org/abs/1803.03635), section 2
    - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), section 2 (the criteria)
      and section 5 (criteria that compare signs)
    - [Lee et al., arXiv 1810.02340](https://arxiv.org/abs/1810.02340) (`snip`)
    - [Wang et al., arXiv 2002.07376](https://arxiv.org/abs/2002.07376) (`grasp`)
    - [Tanaka et al., arXiv 2006.05467](https://arxiv.org/abs/2006.05467) (`synflow`)
    - [Sun et al., arXiv 2306.11695](https://arxiv.org/abs/2306.11695) (`wanda`)
    - [Liu et al., arXiv 1708.06519](https://arxiv.org/abs/1708.06519) (`scale`, network slimming)
    - [He et al., arXiv 1811.00250](https://arxiv.org/abs/1811.00250) (`geometric_median`)
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from lottery_ticket_pruner.registry import Registry

RECORDS = ("initial", "final", "current")
EVIDENCE = ("gradient", "hessian_gradient", "flow", "input_norm")
SCOPES = ("layer", "global", "output")

# Typed as Any: a criterion only reads records that it has declared in `needs`, which are arrays.
_NOT_NEEDED: Any = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Weights that are ranked together, as 1-D arrays of the same length.

    Args:
        mask: Bool array, True where a weight is kept so far. Scores of pruned entries are ignored.
        rng: Random generator of the group. Depends only on the seed and the group.
        drop: Number of kept weights to prune, if only the set of lowest scores matters. None if the
            full order of the scores matters.
        initial: Recorded initial weights, a read-only, finite float array (float32 or wider). None
            if not recorded or not requested.
        final: Recorded final weights, in the same form as `initial`.
        current: Current raw weights, in the same form as `initial`.
        gradient: Dense gradient of the loss with respect to each weight, or None if not requested.
        hessian_gradient: Product of the Hessian of the loss, over all masked weights, with the
            gradient of the loss, or None if not requested.
        flow: Gradient of the sum of the logits of the model with absolute weights, or None if not
            requested.
        input_norm: 2-norm, over the data, of the inputs that each weight multiplies, or None if not
            requested.
    """

    mask: np.ndarray
    rng: np.random.Generator
    drop: int | None = None
    initial: np.ndarray = _NOT_NEEDED
    final: np.ndarray = _NOT_NEEDED
    current: np.ndarray = _NOT_NEEDED
    gradient: np.ndarray = _NOT_NEEDED
    hessian_gradient: np.ndarray = _NOT_NEEDED
    flow: np.ndarray = _NOT_NEEDED
    input_norm: np.ndarray = _NOT_NEEDED


ScoreFunction = Callable[[Group], np.ndarray]
_F = TypeVar("_F", bound=ScoreFunction)
_G = TypeVar("_G", bound="ChannelFunction")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A named score function, with the records and evidence it reads.

    Created by `register` and `get`; not meant to be constructed directly.

    Args:
        name: Name by which `get` finds the criterion.
        function: A function that takes a `Group` and returns an array of scores with the shape of
            `group.mask`. Scores may be minus infinity but not NaN.
        needs: Names of required inputs, from `RECORDS` and `EVIDENCE`.
        optional: Names of records that are passed if they exist.
        scope: The only supported scope. None if the criterion supports every scope.
        elementwise: Whether the score of a weight depends only on its own records. If True, weights
            are scored in chunks, and scores have the dtype of the records.
        rounds: Number of steps in which the requested sparsity is reached. Evidence is measured
            again before each of them.
        at_initialization: Whether the criterion ranks untrained weights (pruning at
            initialization). If True, `find_ticket` ranks the rewound model instead of the model
            that was trained last.
    """

    name: str
    function: ScoreFunction
    needs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    scope: str | None = None
    elementwise: bool = False
    rounds: int = 1
    at_initialization: bool = False

    @property
    def evidence(self) -> frozenset[str]:
        """Measurements that the criterion needs."""
        return self.needs & set(EVIDENCE)

    def __call__(self, group: Group) -> np.ndarray:
        """Returns the scores of the weights in `group`. The highest-scoring weights are kept."""
        return self.function(group)

    @property
    def doc(self) -> str:
        """First line of the function's docstring, for tables and help texts."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def get_config(self) -> dict[str, Any]:
        """Returns a dict with the name, from which `get` restores a registered criterion."""
        return {"name": _REGISTRY.checked(self.name, self.function)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Criterion":
        """Returns the criterion that `get` resolves a configuration to."""
        return get(config)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ChannelGroup:
    """The channels of a family of layers, for criteria that score channels as a whole.

    Args:
        mask: Bool array of shape (channels,), True where a channel is kept so far. Scores of pruned
            channels are ignored.
        rng: Random generator of the family. Depends only on the seed and the family.
        kernels: For each kernel that makes the channels, an array of shape (channels, weights) with
            the current weights of each channel, and zeros where they are pruned.
        scales: For each normalization that the channels pass through, an array of shape (channels,)
            with the absolute value of its scale, and NaN for channels that it does not have.
    """

    mask: np.ndarray
    rng: np.random.Generator
    kernels: Sequence[np.ndarray]
    scales: Sequence[np.ndarray]


ChannelFunction = Callable[[ChannelGroup], np.ndarray | None]


class ChannelCriterion(Criterion):
    """A criterion that scores channels as a whole, for `structure="channels"`.

    Its function takes a `ChannelGroup` and returns an array of one score per channel, or None for
    families that it cannot rank, which are then not pruned.
    """

    def scores(self, group: ChannelGroup) -> np.ndarray | None:
        """Returns the scores of the channels, or None."""
        found = cast(ChannelFunction, self.function)(group)
        return None if found is None else np.asarray(found, np.float64)


Identifier = str | Mapping[str, Any] | Criterion | ScoreFunction


def _made(criterion: Criterion, arguments: dict[str, Any]) -> Criterion:
    if arguments:
        raise TypeError("a criterion takes no arguments")
    return criterion


def _from_function(function: ScoreFunction) -> Criterion:
    name = _REGISTRY.checked(_REGISTRY.name_of(function), function)
    known = _REGISTRY.value_of(function)
    return known or Criterion(name, function, optional=frozenset(RECORDS))


_REGISTRY = Registry(
    "criterion",
    Criterion,
    register="criteria.register",
    wrap=_from_function,
    make=_made,
    takes="a `Group`",
)


def register(
    name: str,
    *,
    needs: Iterable[str] = (),
    scope: str | None = None,
    elementwise: bool = False,
    rounds: int = 1,
    at_initialization: bool = False,
) -> Callable[[_F], _F]:
    """Registers a score function under a name. Used as a decorator; returns the function unchanged.

    Args:
        name: Name for `get`, configurations and command lines.
        needs: Inputs that the function reads: records (`"initial"`, `"final"`, `"current"`) and
            evidence (`"gradient"`, `"hessian_gradient"`, `"flow"`, `"input_norm"`). All other
            inputs are None in its `Group`.
        scope: The only scope that the criterion supports. None for any scope.
        elementwise: Whether the score of a weight depends only on its own records, not on other
            weights, the mask or randomness. Ranking large models then takes less memory.
        rounds: Number of pruning steps, with new evidence before each of them. More than one
            requires `scope="global"`.
        at_initialization: Whether `find_ticket` ranks the rewound model.

    Raises:
        ValueError: If a record or the scope is unknown, `rounds` is below 1, `rounds` is above 1
            without `scope="global"`, or a different function is registered under this name.
            Defining the same function again (a notebook cell run twice) replaces the earlier one.
    """
    needs = frozenset((needs,) if isinstance(needs, str) else needs)
    if not needs <= {*RECORDS, *EVIDENCE}:
        known = (*RECORDS, *EVIDENCE)
        raise ValueError(
            f"`needs` must contain only names from {known}. Received: needs={sorted(needs)}"
        )
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1. Received: rounds={rounds}")
    if rounds > 1 and scope != "global":
        raise ValueError(
            'Multi-round criteria need scope="global", because each round has a single sparsity '
            f"for the whole model. Received: rounds={rounds}, scope={scope!r}"
        )
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"`scope` must be None or one of {SCOPES}. Received: scope={scope!r}")

    def decorate(function: _F) -> _F:
        criterion = Criterion(
            name,
            function,
            needs,
            scope=scope,
            elementwise=elementwise,
            rounds=rounds,
            at_initialization=at_initialization,
        )
        _REGISTRY.add(name, function, criterion)
        return function

    return decorate


def register_for_channels(name: str) -> Callable[[_G], _G]:
    """Registers a function that scores channels. Used as a decorator; returns it unchanged.

    Args:
        name: Name for `get`, configurations and command lines.

    Returns:
        A decorator for functions that take a `ChannelGroup` and return one score per channel, or
        None (see `ChannelCriterion`).

    Raises:
        ValueError: If a different function is registered under this name.
    """

    def decorate(function: _G) -> _G:
        score = cast(ScoreFunction, function)
        _REGISTRY.add(name, function, ChannelCriterion(name, score, frozenset({"current"})))
        return function

    return decorate


def names() -> list[str]:
    """Returns the names of criteria that score weights, in order of registration.

    `get(name).doc` describes each.
    """
    return [name for name in _REGISTRY if not isinstance(get(name), ChannelCriterion)]


def channel_names() -> list[str]:
    """Returns the names of criteria that score channels, in order of registration."""
    return [name for name in _REGISTRY if isinstance(get(name), ChannelCriterion)]


def get(identifier: Identifier) -> Criterion:
    """Resolves an identifier to a `Criterion`.

    Args:
        identifier: A registered name; a dict from `get_config()` or Keras'
            `serialize_keras_object`; a `Criterion`; or a function `Group -> scores`. An
            unregistered function receives all records that exist.

    Raises:
        ValueError: If the name is unknown, the type of `identifier` is not supported, or an
            unregistered function has the name of a registered criterion (its configuration would
            restore the registered one).
    """
    return _REGISTRY.get(identifier)


@register("large_final", needs={"final"}, elementwise=True)
def large_final(group: Group) -> np.ndarray:
    """Keeps weights that end large: abs(wf)."""
    return np.abs(group.final)


@register("small_final", needs={"final"}, elementwise=True)
def small_final(group: Group) -> np.ndarray:
    """Keeps weights that end small: -abs(wf)."""
    return -np.abs(group.final)


@register("large_init", needs={"initial"}, elementwise=True)
def large_init(group: Group) -> np.ndarray:
    """Keeps weights that start large: abs(w0)."""
    return np.abs(group.initial)


@register("small_init", needs={"initial"}, elementwise=True)
def small_init(group: Group) -> np.ndarray:
    """Keeps weights that start small: -abs(w0)."""
    return -np.abs(group.initial)


@register("large_init_large_final", needs={"initial", "final"})
def large_init_large_final(group: Group) -> np.ndarray:
    """Keeps weights that start and end large: min(rank(abs(w0)), rank(abs(wf))).

    The paper uses min(alpha abs(wf), abs(w0)), where alpha aligns the two distributions. Ranks
    among the kept weights of the scope need no alpha.
    """
    return _lower_rank(np.abs(group.initial), np.abs(group.final), group)


@register("small_init_small_final", needs={"initial", "final"})
def small_init_small_final(group: Group) -> np.ndarray:
    """Keeps weights that start and end small: min(rank(-abs(w0)), rank(-abs(wf)))."""
    return _lower_rank(-np.abs(group.initial), -np.abs(group.final), group)


@register("magnitude_increase", needs={"initial", "final"}, elementwise=True)
def magnitude_increase(group: Group) -> np.ndarray:
    """Keeps weights whose magnitude grew most: abs(wf) - abs(w0)."""
    return np.abs(group.final) - np.abs(group.initial)


@register("movement", needs={"initial", "final"}, elementwise=True)
def movement(group: Group) -> np.ndarray:
    """Keeps weights that moved furthest: abs(wf - w0)."""
    return np.abs(group.final - group.initial)


@register("random")
def random(group: Group) -> np.ndarray:
    """Keeps weights at random: seeded uniform."""
    return group.rng.random(group.mask.size, dtype=np.float32)


@register("large_final_same_sign", needs={"initial", "final"}, elementwise=True)
def large_final_same_sign(group: Group) -> np.ndarray:
    """Keeps weights that end large with the sign they started with: max(0, wf sign(w0)).

    Weights that changed sign are pruned first, in seeded order. Zero has no sign: a weight with a
    `w0` or `wf` of zero scores 0 and is pruned after all weights that changed sign.
    """
    aligned = group.final * np.sign(group.initial)
    return np.where(aligned < 0, -np.inf, aligned)


@register("large_final_diff_sign", needs={"initial", "final"}, elementwise=True)
def large_final_diff_sign(group: Group) -> np.ndarray:
    """Keeps weights that end large with the opposite sign: max(0, -wf sign(w0)).

    Weights that kept their sign are pruned first, in seeded order. A weight with a `w0` or `wf` of
    zero scores 0.
    """
    opposed = -group.final * np.sign(group.initial)
    return np.where(opposed < 0, -np.inf, opposed)


@register("magnitude_increase_same_sign", needs={"initial", "final"}, elementwise=True)
def magnitude_increase_same_sign(group: Group) -> np.ndarray:
    """Keeps weights that grew most with the same sign: abs(wf) - abs(w0), -infinity if flipped.

    A weight with a `w0` or `wf` of zero does not count as flipped.
    """
    flipped = group.final * np.sign(group.initial) < 0
    return np.where(flipped, -np.inf, magnitude_increase(group))


@register("magnitude_increase_diff_sign", needs={"initial", "final"}, elementwise=True)
def magnitude_increase_diff_sign(group: Group) -> np.ndarray:
    """Keeps weights that grew most and flipped: abs(wf) - abs(w0), -infinity if not flipped.

    A weight with a `w0` or `wf` of zero does not count as keeping its sign.
    """
    kept = group.final * np.sign(group.initial) > 0
    return np.where(kept, -np.inf, magnitude_increase(group))


@register("smallest_weights", needs={"current"}, elementwise=True)
def smallest_weights(group: Group) -> np.ndarray:
    """Drops the smallest current weights: abs(w)."""
    return np.abs(group.current)


@register("smallest_weights_global", needs={"current"}, scope="global", elementwise=True)
def smallest_weights_global(group: Group) -> np.ndarray:
    """Drops the smallest current weights across all layers: abs(w)."""
    return np.abs(group.current)


@register(
    "snip",
    needs={"current", "gradient"},
    scope="global",
    elementwise=True,
    at_initialization=True,
)
def snip(group: Group) -> np.ndarray:
    """Keeps connections with the largest effect on the loss at initialization: abs(g w)."""
    return np.abs(group.gradient * group.current)


@register(
    "grasp",
    needs={"current", "hessian_gradient"},
    scope="global",
    elementwise=True,
    at_initialization=True,
)
def grasp(group: Group) -> np.ndarray:
    """Keeps weights that preserve the gradient flow at initialization: w (H g).

    The paper prunes the highest of -w (H g).
    """
    return group.current * group.hessian_gradient


@register(
    "synflow",
    needs={"current", "flow"},
    scope="global",
    elementwise=True,
    rounds=100,
    at_initialization=True,
)
def synflow(group: Group) -> np.ndarray:
    """Keeps paths from input to output, without data: abs(w dR/dw), in 100 rounds."""
    return np.abs(group.current) * np.abs(group.flow)


@register("gradient", needs={"gradient"}, elementwise=True)
def gradient(group: Group) -> np.ndarray:
    """Keeps weights with the largest gradient of the loss: abs(g)."""
    return np.abs(group.gradient)


@register("saliency", needs={"final", "gradient"}, elementwise=True)
def saliency(group: Group) -> np.ndarray:
    """Keeps trained weights whose removal changes the loss most, to first order: abs(g wf)."""
    return np.abs(group.gradient * group.final)


@register("wanda", needs={"current", "input_norm"}, scope="output", elementwise=True)
def wanda(group: Group) -> np.ndarray:
    """Keeps the largest products within each output: abs(w) times the norm of its input.

    `update_masks` measures the norms of a layer behind the layers that it has pruned already (the
    paper prunes block by block), or with `sequential=False` all of them before the update.
    """
    return np.abs(group.current) * group.input_norm


@register_for_channels("scale")
def scale(group: ChannelGroup) -> np.ndarray | None:
    """Keeps channels with the largest scale of the normalization layers that they pass through.

    The mean of the scales' absolute values. Families without such layers are not pruned.
    """
    if not group.scales:
        return None
    scales = np.stack(group.scales)
    known = ~np.isnan(scales)
    if not known.any(axis=0)[group.mask].all():
        return None
    return np.sum(scales, axis=0, where=known) / np.maximum(np.count_nonzero(known, axis=0), 1)


@register_for_channels("geometric_median")
def geometric_median(group: ChannelGroup) -> np.ndarray | None:
    """Keeps channels whose filters are far from the other filters of their layer.

    The sum of the Euclidean distances to all kept filters of the layer, averaged over the layers of
    the family: filters near the geometric median can be replaced by the others.
    """
    if not group.kernels:
        return None
    scores = np.zeros(len(group.mask))
    for kernel in group.kernels:
        filters = kernel.astype(np.float64)
        kept = filters[group.mask]
        squares = np.square(filters).sum(axis=1)[:, None] + np.square(kept).sum(axis=1)
        # Rounding may make the square of a small distance negative.
        scores += np.sqrt(np.maximum(squares - 2 * filters @ kept.T, 0)).sum(axis=1)
    return scores / len(group.kernels)


def _lower_rank(first: np.ndarray, second: np.ndarray, group: Group) -> np.ndarray:
    """Returns min(rank(first), rank(second)), or scores that prune the same weights."""
    if group.drop is None:
        return np.minimum(_rank(first, group.mask), _rank(second, group.mask))
    scores = np.zeros(group.mask.shape, dtype=np.int8)
    if group.drop:
        scores[group.mask] = _about_place(first[group.mask], second[group.mask], group.drop)
    return scores


def _about_place(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Compares the lower of two ranks of each weight with the `count`-th lowest of these values.

    A rank is at most t if the value is at most the t-th smallest value. Two order statistics
    therefore give the number of lower ranks that are at most t, and t is found by bisection. Each
    step halves the range that is still unordered, whereas ranking all values would take two sorts.

    Returns:
        An int8 array: 0 if the lower rank is below the `count`-th lowest, 1 if equal, 2 if above.
    """
    ordered = first.copy(), second.copy()

    def are_among(values: list[np.floating]) -> np.ndarray:
        return (first <= values[0]) | (second <= values[1])

    low, high = 0, count - 1
    for values in ordered:
        values.partition(high)
    while low < high:
        middle = (low + high) // 2
        for values in ordered:
            values[low:high].partition(middle - low)  # The one at `high` is in its place.
        if np.count_nonzero(are_among([values[middle] for values in ordered])) >= count:
            high = middle
        else:
            low = middle + 1
    scores = 2 - are_among([values[low] for values in ordered]).astype(np.int8)
    if low:
        scores -= are_among([values[:low].max() for values in ordered])
    return scores


def _rank(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the number of smaller kept values for each kept value, and 0 for pruned entries."""
    alive = values[mask]
    order = np.argsort(alive)
    ordered = alive[order]
    ranks = np.empty(alive.shape, dtype=np.int64)
    # With sorted queries, the binary search accesses memory in order, which is fast.
    ranks[order] = np.searchsorted(ordered, ordered)
    spread = np.zeros(values.shape, dtype=np.int64)
    spread[mask] = ranks
    return spread
