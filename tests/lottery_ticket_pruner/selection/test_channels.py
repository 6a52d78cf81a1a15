"""Coupled channels on arrays, against a loop over channels."""

import dataclasses

import numpy as np
import pytest

from lottery_ticket_pruner import selection
from lottery_ticket_pruner.selection import Request, Weights, kept_channels, select
from lottery_ticket_pruner.structures import Channels

pytestmark = pytest.mark.once


@dataclasses.dataclass(frozen=True)
class Family:
    layers: tuple
    size: int
    weights: dict
    made: dict


# a and b are added up; c reads them flattened over two positions, and d reads c.
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
    """Yields (path, index) of every weight of a channel, one by one."""
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
def test_each_family_loses_its_weakest_channels_to_the_exact_count(pooling):
    weights = kernels()
    masks = select(
        request(rate=0.4, structure=Channels(pooling=pooling)), weights, families=FAMILIES
    )
    expected = {path: np.ones(shape, bool) for path, shape in SHAPES.items()}
    for family, drop in ((JOINED, 2), (ALONE, 3)):
        scores = by_brute_force(weights, family, POOLS[pooling])
        for channel in np.argsort(scores)[:drop]:
            for path, index in members(family, channel):
                expected[path][index] = False
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, expected[path])


def test_a_second_round_drops_of_what_is_kept_and_nothing_comes_back():
    first = select(request(rate=0.4), kernels(), families=FAMILIES)
    second = select(request(rate=0.4), kernels(masks=first), families=FAMILIES)
    counts = [[int(kept_channels(f, m).sum()) for f in FAMILIES] for m in (first, second)]
    assert counts == [[3, 5], [2, 3]]
    assert not any((second[path] & ~first[path]).any() for path in SHAPES)


def test_a_sparsity_is_the_share_of_channels():
    masks = select(request(sparsity=0.6), kernels(), families=FAMILIES)
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_global_ranking_is_by_scores_over_the_mean_of_the_family(seed):
    weights = kernels(seed)
    masks = select(request(rate=0.5, scope="global"), weights, families=FAMILIES)
    scores = [by_brute_force(weights, family, np.mean) for family in FAMILIES]
    ranked = sorted(
        (value / values.mean(), number, channel)
        for number, values in enumerate(scores)
        for channel, value in enumerate(values)
        if channel != values.argmax()  # at least one stays
    )
    gone = {(number, channel) for _, number, channel in ranked[:6]}  # floor(0.5 * 13)
    for number, family in enumerate(FAMILIES):
        expected = [(number, channel) not in gone for channel in range(family.size)]
        np.testing.assert_array_equal(kept_channels(family, masks), expected)


def test_a_kernel_scaled_as_a_whole_changes_no_global_ranking():
    weights = kernels()
    scaled = dict(weights)
    for path in ("c", "d"):
        scaled[path] = dataclasses.replace(weights[path], current=weights[path].current * 64)
    lone = (dataclasses.replace(JOINED, weights={k: JOINED.weights[k] for k in "ab"}), ALONE)
    masks = [
        select(request(rate=0.5, scope="global"), kernel, families=lone)
        for kernel in (weights, scaled)
    ]
    for path in SHAPES:
        np.testing.assert_array_equal(*(mask[path] for mask in masks))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_rounded_up_to_multiples_and_one_channel_stays(scope):
    masks = select(
        request(rate=0.7, scope=scope, structure=Channels(round_to=4)), kernels(), families=FAMILIES
    )
    counts = [int(kept_channels(family, masks).sum()) for family in FAMILIES]
    assert counts[0] in (4, 5)
    assert counts[1] in (4, 8)
    masks = select(
        request(rate=0.99, scope="layer", structure=Channels(at_most=0.99)),
        kernels(),
        families=FAMILIES,
    )
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [1, 1]


def test_at_most_holds_for_each_family():
    half = Channels(at_most=0.5)
    masks = select(request(rate=0.9, structure=half), kernels(), families=FAMILIES)
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [3, 4]
    with pytest.raises(ValueError, match=r"sparsity of 0.6 is above the share"):
        select(request(sparsity=0.6, structure=half), kernels(), families=FAMILIES)
    with pytest.raises(ValueError, match=r"7 of 13 channels were to go.* at most 6 go"):
        select(request(rate=0.6, structure=half, scope="global"), kernels(), families=FAMILIES)


def test_a_layer_that_is_to_keep_all_keeps_the_family():
    rate = {"^b$": 0.0, "default": 0.5}
    masks = select(request(rate=rate), kernels(), families=FAMILIES)
    assert [int(kept_channels(family, masks).sum()) for family in FAMILIES] == [5, 4]


def test_ties_go_by_the_seed_alone():
    weights = {
        path: dataclasses.replace(kernel, current=np.ones_like(kernel.current))
        for path, kernel in kernels().items()
    }
    kept = [
        kept_channels(ALONE, select(request(rate=0.5, seed=seed), weights, families=FAMILIES))
        for seed in (0, 0, 1, 2)
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert len({tuple(flags) for flags in kept}) > 1
    assert {int(flags.sum()) for flags in kept} == {4}


def test_what_reads_a_pruned_filter_is_pruned_with_it():
    weights = kernels()
    masks = {path: np.ones(shape, bool) for path, shape in SHAPES.items()}
    masks["a"][:, [0, 1]] = False  # b still makes both
    masks["c"][:, 3] = False
    weights = kernels(masks=masks)
    new = select(request(rate=0.0, structure="filters"), weights, families=FAMILIES)
    assert new["c"][:, [0, 1, 2, 4, 5, 6, 7]].all()
    np.testing.assert_array_equal(new["d"].any(axis=1), np.arange(8) != 3)
    masks["b"][..., 1] = False
    new = select(request(rate=0.0, structure="filters"), kernels(masks=masks), families=FAMILIES)
    np.testing.assert_array_equal(new["c"][:, 0], np.arange(10) % 5 != 1)


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(ValueError, match="finds no channels that could be removed"):
        select(request(rate=0.5), kernels())
    with pytest.raises(ValueError, match="Leave `distribution` out"):
        select(request(sparsity=0.5, distribution="erk"), kernels(), families=FAMILIES)
    with pytest.raises(ValueError, match="for each sparsity"):
        selection.update_many("smallest_weights", kernels(), sparsities=[0.5], structure="channels")
    for arguments in ({"pooling": "sum"}, {"at_most": 1.0}, {"round_to": 0}):
        with pytest.raises(ValueError, match="Received"):
            Channels(**arguments)
