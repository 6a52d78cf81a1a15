"""Selection of coupled channels on arrays, compared with a loop over channels."""

import dataclasses
import re
import types

import numpy as np
import pytest

from channel_graphs import Family
from lottery_ticket_pruner import selection
from lottery_ticket_pruner.selection import Request, Weights, kept_channels, select
from lottery_ticket_pruner.structures import Channels

pytestmark = pytest.mark.once


# The outputs of a and b are added, c reads the sum flattened over two positions, and d reads c.
JOINED = Family(
    ("a", "b"),
    5,
    {
        "a": {1: np.arange(5)},
        "b": {3: np.arange(5)},
        "c": {0: np.tile(np.arange(5), 2)},
    },
    {"a": 1, "b": 3},
)
ALONE = Family(("c",), 8, {"c": {1: np.arange(8)}, "d": {0: np.arange(8)}}, {"c": 1})
FAMILIES = (JOINED, ALONE)
POSITIONS = {"a": 1, "b": 9, "c": 1, "d": 4}
GRAPH = types.SimpleNamespace(families=FAMILIES, positions=POSITIONS, products={}, unmasked={})
SHAPES = {"a": (4, 5), "b": (2, 2, 3, 5), "c": (10, 8), "d": (8, 2)}


def kernels(seed=0, masks=None):
    rng = np.random.default_rng(seed)
    return {
        path: Weights(
            mask=np.ones(shape, bool) if masks is None else masks[path],
            current=rng.normal(size=shape).astype("float32"),
        )
        for path, shape in SHAPES.items()
    }


def request(**arguments):
    arguments = {"structure": "channels"} | arguments
    return Request.of("smallest_weights", **arguments)


def members(family, channel):
    """Yields (path, index) of every weight of a channel."""
    for path, axes in family.weights.items():
        for index in np.ndindex(SHAPES[path]):
            for axis, channels in axes.items():
                if channels[index[axis]] == channel:
                    yield path, index


def by_brute_force(weights, family, pool):
    scores = []
    for channel in range(family.size):
        values = [
            abs(float(weights[path].current[index]))
            for path, index in members(family, channel)
            if weights[path].mask[index]
        ]
        scores.append(pool(values) if values else 0.0)
    return np.array(scores)


POOLS = {
    "average": np.mean,
    "max": np.max,
    "norm": lambda values: np.sqrt(np.mean(np.square(values))),
}


@pytest.mark.parametrize("pooling", POOLS)
def test_the_exact_count_of_lowest_channels_of_each_family_is_pruned(pooling):
    weights = kernels()
    masks = select(request(rate=0.4, structure=Channels(pooling=pooling)), weights, graph=GRAPH)
    expected = {path: np.ones(shape, bool) for path, shape in SHAPES.items()}
    for family, drop in ((JOINED, 2), (ALONE, 3)):
        scores = by_brute_force(weights, family, POOLS[pooling])
        for channel in np.argsort(scores)[:drop]:
            for path, index in members(family, channel):
                expected[path][index] = False
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, expected[path])


def test_a_second_round_prunes_a_share_of_the_kept_channels_and_restores_none():
    first = select(request(rate=0.4), kernels(), graph=GRAPH)
    second = select(request(rate=0.4), kernels(masks=first), graph=GRAPH)
    counts = [[int(kept_channels(f, m).sum()) for f in FAMILIES] for m in (first, second)]
    assert counts == [[3, 5], [2, 3]]
    assert not any((second[path] & ~first[path]).any() for path in SHAPES)


def test_a_sparsity_is_the_share_of_channels():
    masks = select(request(sparsity=0.6), kernels(), graph=GRAPH)
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_global_ranking_divides_scores_by_the_mean_of_the_family(seed):
    weights = kernels(seed)
    masks = select(request(rate=0.5, scope="global"), weights, graph=GRAPH)
    scores = [by_brute_force(weights, family, np.mean) for family in FAMILIES]
    ranked = sorted(
        (value / values.mean(), number, channel)
        for number, values in enumerate(scores)
        for channel, value in enumerate(values)
        if channel != values.argmax()  # At least one is kept.
    )
    gone = {(number, channel) for _, number, channel in ranked[:6]}  # floor(0.5 * 13)
    for number, family in enumerate(FAMILIES):
        expected = [(number, channel) not in gone for channel in range(family.size)]
        np.testing.assert_array_equal(kept_channels(family, masks), expected)


def test_scaling_a_kernel_does_not_change_the_global_ranking():
    weights = kernels()
    scaled = dict(weights)
    for path in ("c", "d"):
        scaled[path] = dataclasses.replace(weights[path], current=weights[path].current * 64)
    lone = (dataclasses.replace(JOINED, weights={k: JOINED.weights[k] for k in "ab"}), ALONE)
    masks = [
        select(
            request(rate=0.5, scope="global"),
            kernel,
            graph=types.SimpleNamespace(families=lone, positions={}, products={}),
        )
        for kernel in (weights, scaled)
    ]
    for path in SHAPES:
        np.testing.assert_array_equal(*(mask[path] for mask in masks))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_rounded_up_to_multiples_and_one_channel_is_kept(scope):
    masks = select(
        request(rate=0.7, scope=scope, structure=Channels(round_to=4)), kernels(), graph=GRAPH
    )
    counts = [int(kept_channels(family, masks).sum()) for family in FAMILIES]
    assert counts[0] in (4, 5)
    assert counts[1] in (4, 8)
    masks = select(
        request(rate=0.99, scope="layer", structure=Channels(at_most=0.99)),
        kernels(),
        graph=GRAPH,
    )
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [1, 1]


def test_at_most_holds_for_each_family():
    half = Channels(at_most=0.5)
    masks = select(request(rate=0.9, structure=half), kernels(), graph=GRAPH)
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [3, 4]
    with pytest.raises(ValueError, match=r"sparsity of 0.6 exceeds `at_most`"):
        select(request(sparsity=0.6, structure=half), kernels(), graph=GRAPH)
    with pytest.raises(
        ValueError, match=r"prune 7 of 13 channels in the model as a whole, .* at most 6\."
    ):
        select(request(rate=0.6, structure=half, scope="global"), kernels(), graph=GRAPH)


def test_a_layer_with_a_rate_of_zero_keeps_its_family():
    rate = {"^b$": 0.0, "default": 0.5}
    masks = select(request(rate=rate), kernels(), graph=GRAPH)
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [5, 4]


def test_ties_are_broken_by_the_seed_alone():
    weights = {
        path: dataclasses.replace(kernel, current=np.ones_like(kernel.current))
        for path, kernel in kernels().items()
    }
    kept = [
        kept_channels(ALONE, select(request(rate=0.5, seed=seed), weights, graph=GRAPH))
        for seed in (0, 0, 1, 2)
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert len({tuple(flags) for flags in kept}) > 1
    assert {int(flags.sum()) for flags in kept} == {4}


def test_weights_that_read_a_pruned_filter_are_pruned_with_it():
    weights = kernels()
    masks = {path: np.ones(shape, bool) for path, shape in SHAPES.items()}
    masks["a"][:, [0, 1]] = False  # b still makes both
    masks["c"][:, 3] = False
    weights = kernels(masks=masks)
    new = select(request(rate=0.0, structure="filters"), weights, graph=GRAPH)
    assert new["c"][:, [0, 1, 2, 4, 5, 6, 7]].all()
    np.testing.assert_array_equal(new["d"].any(axis=1), np.arange(8) != 3)
    masks["b"][..., 1] = False
    new = select(request(rate=0.0, structure="filters"), kernels(masks=masks), graph=GRAPH)
    np.testing.assert_array_equal(new["c"][:, 0], np.arange(10) % 5 != 1)


def test_invalid_requests_raise():
    with pytest.raises(ValueError, match="finds no channels that can be removed"):
        select(request(rate=0.5), kernels())
    with pytest.raises(ValueError, match="Leave `distribution` out"):
        select(request(sparsity=0.5, distribution="erk"), kernels(), graph=GRAPH)
    with pytest.raises(ValueError, match="for each sparsity"):
        selection.update_many("smallest_weights", kernels(), sparsities=[0.5], structure="channels")


@pytest.mark.parametrize(
    "arguments",
    [
        *({"at_most": share} for share in (0, 0.0, -0.5, 1, 1.0, True, "0.5", None)),
        *({"round_to": number} for number in (0, -1, 1.5, True)),
        *({"attention": "all"}, {"pooling": "sum"}),
    ],
)
def test_errors_quote_arguments_of_channels(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(
        ValueError, match=rf"`{name}` must be .* Received: {re.escape(repr(value))}"
    ):
        Channels(**arguments)


def test_channels_of_attention_are_taken_by_their_kind():
    kinds = ("", "heads", "keys", "values")
    taken = {
        attention: [kind for kind in kinds if Channels(attention=attention).takes(kind)]
        for attention in ("widths", "heads", "both")
    }
    assert taken == {"widths": ["", "keys", "values"], "heads": ["", "heads"], "both": [*kinds]}


def macs(a, c):
    """Returns the multiply-adds for given numbers of channels of the families."""
    return 4 * a + 9 * 12 * a + 2 * a * c + 4 * c * 2


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_a_budget_of_multiply_adds_prunes_the_fewest_channels_that_meet_it(share):
    structure = Channels(at_most=0.8)
    masks = select(request(budget={"macs": share}, structure=structure), kernels(), graph=GRAPH)
    counts = [int(kept_channels(family, masks).sum()) for family in FAMILIES]
    assert macs(*counts) <= share * macs(5, 8)
    sparsities = sorted({k / n for n in (5, 8) for k in range(n)})
    possible = [[n - int(s * n + 1e-6) for n in (5, 8)] for s in sparsities if s <= 0.8]
    fitting = [pair for pair in possible if macs(*pair) <= share * macs(5, 8)]
    assert counts == max(fitting)


def test_several_budgets_are_met_together():
    budget = {"macs": 0.9, "weights": 0.4}
    masks = select(request(budget=budget, scope="global"), kernels(), graph=GRAPH)
    a, c = (int(kept_channels(family, masks).sum()) for family in FAMILIES)
    assert macs(a, c) <= 0.9 * macs(5, 8)
    weights = 4 * a + 12 * a + 2 * a * c + c * 2
    assert weights <= 0.4 * sum(np.prod(shape) for shape in SHAPES.values())


def test_a_budget_that_is_invalid_or_cannot_be_met_raises():
    with pytest.raises(ValueError, match=r"cannot be met: .* are left"):
        select(request(budget={"macs": 0.01}), kernels(), graph=GRAPH)
    open_shape = types.SimpleNamespace(
        families=FAMILIES, positions={**POSITIONS, "b": None}, products={}, unmasked={}
    )
    with pytest.raises(ValueError, match="input shape of the model is not fixed"):
        select(request(budget={"macs": 0.5}), kernels(), graph=open_shape)
    for arguments, message in (
        ({"budget": {"time": 0.5}}, "some of the keys"),
        ({"budget": {"macs": 1.5}}, r"number in \(0, 1\]"),
        ({"budget": {"macs": 0.5}, "rate": 0.5}, "leave out `rate`"),
        (
            {"budget": {"macs": 0.5}, "structure": "filters"},
            'single weights or for structure="channels"',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            request(**arguments)
    with pytest.raises(ValueError, match="prunes in 100 rounds"):
        Request.of("synflow", budget={"macs": 0.5}, structure="channels")


@pytest.mark.parametrize("pooling", POOLS)
def test_scores_may_be_integers_or_minus_infinity(pooling):
    def whole_numbers(group):
        return np.arange(group.mask.size)

    def no_numbers(group):
        return np.full(group.mask.size, -np.inf)

    for function in (whole_numbers, no_numbers)[: 1 if pooling == "norm" else 2]:
        new = Request.of(function, rate=0.5, structure=Channels(pooling=pooling))
        masks = select(new, kernels(), graph=GRAPH)
        assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [3, 4]


def test_a_norm_of_negative_scores_is_refused():
    new = Request.of(lambda group: group.current, rate=0.5, structure=Channels(pooling="norm"))
    with pytest.raises(ValueError, match=r"some scores of .* are negative"):
        select(new, kernels(), graph=GRAPH)
