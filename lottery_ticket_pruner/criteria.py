"""Criteria say how much a weight matters: one score per weight, the highest are kept.

A criterion is a pure function from the arrays of one competition group (`Group`) to scores. Adding
one takes a function of a few lines and one registration:

>>> @register("small_step", needs=("initial", "final"))
... def small_step(group):
...     '''Keeps the weights that moved least.'''
...     return -np.abs(group.final - group.initial)

Notation in the docstrings: `w0` the recorded initial weight, `wf` the recorded final one, `w` the
raw one as it is now. A criterion may also need *evidence*, which the pruner prepares for it: `g`
the dense gradient of the loss, `H g` the product of the loss's Hessian with it, and the like.

References:
    - [Frankle & Carbin, arXiv 1803.03635](https://arxiv.org/abs/1803.03635), section 2
    - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), section 2 (the criteria)
      and section 5 (those that look at signs)
    - [Lee et al., arXiv 1810.02340](https://arxiv.org/abs/1810.02340) (`snip`)
    - [Wang et al., arXiv 2002.07376](https://arxiv.org/abs/2002.07376) (`grasp`)
    - [Tanaka et al., arXiv 2006.05467](https://arxiv.org/abs/2006.05467) (`synflow`)
    - [Sun et al., arXiv 2306.11695](https://arxiv.org/abs/2306.11695) (`wanda`)
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lottery_ticket_pruner.registry import Registry

RECORDS = ("initial", "final", "current")
EVIDENCE = ("gradient", "hessian_gradient", "flow", "input_norm")
SCOPES = ("layer", "global", "output")

# A criterion that needs a record may rely on it: to type checkers it is an array.
_NOT_NEEDED: Any = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """The weights that compete with each other, as 1-D arrays of one length.

    Args:
        mask: Bool array, True where a weight is alive. Dead entries are scored and ignored.
        rng: The group's generator; it depends on the seed and the group alone.
        drop: How many of those alive go, where scores need to tell no more than which; None where
            their whole order counts.
        initial: Float array of the recorded initial weights, or None where not recorded or not
            asked for. Read-only, finite, float32 or wider. So are the next two.
        final: The recorded final weights.
        current: The raw weights as they are now.
        gradient: The dense gradient of the loss by each weight, or None where the criterion does
            not need it. So are the next three; `evidence` says how each is found.
        hessian_gradient: The Hessian of the loss, by all masked weights, times its gradient.
        flow: The gradient of the sum of the logits of the model made positive.
        input_norm: The 2-norm of what each weight is multiplied with, over the data.
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


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A named score function and the records and evidence it reads.

    Made by `register` and `get`, not by hand.

    Args:
        name: The name `get` knows it by.
        function: `function(group)` gives an array of scores with the shape of `group.mask`. Minus
            infinity is a legal score, NaN is not.
        needs: What it cannot do without, out of `RECORDS` and `EVIDENCE`.
        optional: The records it is given where they exist.
        scope: The only scope that goes with this criterion; None where any does.
        elementwise: Whether the score of a weight depends on nothing but its own records. Then
            weights are scored some at a time, into an array of the records' dtype.
        rounds: In how many steps the pruner goes to what is asked of it; the evidence is prepared
            anew before each.
        at_initialization: Whether it is made for a model that is yet to be trained. `find_ticket`
            has it rank the rewound model, not the one that was trained last.
    """

    name: str
    function: Callable[[Group], np.ndarray]
    needs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    scope: str | None = None
    elementwise: bool = False
    rounds: int = 1
    at_initialization: bool = False

    @property
    def evidence(self) -> frozenset[str]:
        """The measurements that the pruner takes for it."""
        return self.needs & set(EVIDENCE)

    def __call__(self, group: Group) -> np.ndarray:
        """The scores of a group's weights; the highest are kept."""
        return self.function(group)

    @property
    def doc(self) -> str:
        """The first line of the function's docstring, for tables and help texts."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def get_config(self) -> dict:
        """The name, from which `get` finds the criterion again if it is registered."""
        return {"name": _REGISTRY.checked(self.name, self.function)}

    @classmethod
    def from_config(cls, config: Mapping) -> "Criterion":
        """Returns what `get` makes of a configuration."""
        return get(config)


Identifier = str | Mapping | Criterion | Callable[[Group], np.ndarray]


def _made(criterion: Criterion, arguments: dict) -> Criterion:
    if arguments:
        raise TypeError("a criterion takes none")
    return criterion


def _from_function(function: Callable[[Group], np.ndarray]) -> Criterion:
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
) -> Callable[[Callable], Callable]:
    """Makes a score function known by name; decorates it and hands it back unchanged.

    Args:
        name: The name for `get`, configurations and command lines.
        needs: What the function reads, out of the records `"initial"`, `"final"`, `"current"` and
            the evidence `"gradient"`, `"hessian_gradient"`, `"flow"`, `"input_norm"`; the others
            are None in its `Group`.
        scope: The only scope that makes sense with it, or None.
        elementwise: Whether the score of a weight depends on nothing but its own records, not on
            other weights, the mask or chance. Large models are then ranked with less memory.
        rounds: In how many steps to prune, with new evidence before each; several need
            `scope="global"`.
        at_initialization: Whether `find_ticket` is to rank the rewound model.

    Raises:
        ValueError: An unknown record or scope, rounds below 1 or several of them where layers do
            not compete with each other, or a name that another function has. The same function
            defined again (a notebook cell run twice) replaces the earlier one.
    """
    needs = frozenset((needs,) if isinstance(needs, str) else needs)
    if not needs <= {*RECORDS, *EVIDENCE}:
        known = (*RECORDS, *EVIDENCE)
        raise ValueError(f"`needs` must be out of {known}. Received: needs={sorted(needs)}")
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1. Received: rounds={rounds}")
    if rounds > 1 and scope != "global":
        raise ValueError(
            'A criterion of several rounds needs scope="global": each round has one sparsity, of '
            f"all layers together. Received: rounds={rounds}, scope={scope!r}"
        )
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"`scope` must be None or one of {SCOPES}. Received: scope={scope!r}")

    def decorate(function: Callable) -> Callable:
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


def names() -> list[str]:
    """The known names, in the order of registration; `get(name).doc` describes each in a line."""
    return list(_REGISTRY)


def get(identifier: Identifier) -> Criterion:
    """Turns whatever names a criterion into a `Criterion`.

    Args:
        identifier: A known name; a dict from `get_config()` or Keras' `serialize_keras_object`; a
            `Criterion`; or a function `Group -> scores`. A function that was not registered is
            given every record that exists.

    Raises:
        ValueError: An unknown name, something that is none of these, or an unregistered function
            that has the name of a known criterion (its configuration would restore the other one).
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

    The paper writes min(alpha abs(wf), abs(w0)) with an alpha that aligns the two; ranks among the
    alive weights of the scope need no alpha.
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

    Flipped weights go first, in seeded order. Zero has no sign, so a `w0` or `wf` of zero is no
    flip: it scores 0 and goes after every flipped weight.
    """
    aligned = group.final * np.sign(group.initial)
    return np.where(aligned < 0, -np.inf, aligned)


@register("large_final_diff_sign", needs={"initial", "final"}, elementwise=True)
def large_final_diff_sign(group: Group) -> np.ndarray:
    """Keeps weights that end large with the other sign: max(0, -wf sign(w0)).

    Weights that kept their sign go first, in seeded order; a `w0` or `wf` of zero scores 0.
    """
    opposed = -group.final * np.sign(group.initial)
    return np.where(opposed < 0, -np.inf, opposed)


@register("magnitude_increase_same_sign", needs={"initial", "final"}, elementwise=True)
def magnitude_increase_same_sign(group: Group) -> np.ndarray:
    """Keeps weights that grew most without flipping: abs(wf) - abs(w0), -infinity if flipped.

    A `w0` or `wf` of zero is not a flip.
    """
    flipped = group.final * np.sign(group.initial) < 0
    return np.where(flipped, -np.inf, magnitude_increase(group))


@register("magnitude_increase_diff_sign", needs={"initial", "final"}, elementwise=True)
def magnitude_increase_diff_sign(group: Group) -> np.ndarray:
    """Keeps weights that grew most and flipped: abs(wf) - abs(w0), -infinity if the sign is kept.

    A `w0` or `wf` of zero keeps no sign.
    """
    kept = group.final * np.sign(group.initial) > 0
    return np.where(kept, -np.inf, magnitude_increase(group))


@register("smallest_weights", needs={"current"}, elementwise=True)
def smallest_weights(group: Group) -> np.ndarray:
    """Drops the smallest weights as they are now: abs(w)."""
    return np.abs(group.current)


@register("smallest_weights_global", needs={"current"}, scope="global", elementwise=True)
def smallest_weights_global(group: Group) -> np.ndarray:
    """Drops the smallest weights as they are now, over all layers together: abs(w)."""
    return np.abs(group.current)


@register(
    "snip",
    needs={"current", "gradient"},
    scope="global",
    elementwise=True,
    at_initialization=True,
)
def snip(group: Group) -> np.ndarray:
    """Keeps connections that the loss at initialization feels most: abs(g w)."""
    return np.abs(group.gradient * group.current)


@register(
    "grasp",
    needs={"current", "hessian_gradient"},
    scope="global",
    elementwise=True,
    at_initialization=True,
)
def grasp(group: Group) -> np.ndarray:
    """Keeps what lets the gradient flow at initialization: w (H g).

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
    """Keeps weights that the loss would change most: abs(g)."""
    return np.abs(group.gradient)


@register("saliency", needs={"final", "gradient"}, elementwise=True)
def saliency(group: Group) -> np.ndarray:
    """Keeps trained weights that the loss would miss most, to first order: abs(g wf)."""
    return np.abs(group.gradient * group.final)


@register("wanda", needs={"current", "input_norm"}, scope="output", elementwise=True)
def wanda(group: Group) -> np.ndarray:
    """Keeps, of each output, what passes most on: abs(w) times the norm of its input.

    The norms of all layers are those of the model before the update, while the paper goes through
    the blocks of a transformer and measures behind those that are pruned already.
    """
    return np.abs(group.current) * group.input_norm


def _lower_rank(first: np.ndarray, second: np.ndarray, group: Group) -> np.ndarray:
    """min(rank(first), rank(second)), or scores that drop the same weights."""
    if group.drop is None:
        return np.minimum(_rank(first, group.mask), _rank(second, group.mask))
    scores = np.zeros(group.mask.shape, dtype=np.int8)
    if group.drop:
        scores[group.mask] = _about_place(first[group.mask], second[group.mask], group.drop)
    return scores


def _about_place(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """0, 1 or 2 where the lower of two ranks is below, at or above the `count`-th lowest of them.

    A rank is at most t if the value is at most the one at place t of the order. So two order
    statistics tell how many of the lower ranks are at most t, and t is found by bisection. What is
    left to put in order halves with each step, where ranking everything would take two sorts.
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
            values[low : high + 1].partition(middle - low)
        if np.count_nonzero(are_among([values[middle] for values in ordered])) >= count:
            high = middle
        else:
            low = middle + 1
    scores = 2 - are_among([values[low] for values in ordered]).astype(np.int8)
    if low:
        scores -= are_among([values[:low].max() for values in ordered])
    return scores


def _rank(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Counts the kept weights of a smaller value: equal values share a rank, pruned ones have 0."""
    alive = values[mask]
    order = np.argsort(alive)
    ordered = alive[order]
    ranks = np.empty(alive.shape, dtype=np.int64)
    # Sorted needles make the binary search cheap: it walks through memory.
    ranks[order] = np.searchsorted(ordered, ordered)
    spread = np.zeros(values.shape, dtype=np.int64)
    spread[mask] = ranks
    return spread
