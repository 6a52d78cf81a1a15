"""Scores of channels and what is ranked together, compared with loops over single weights."""

import dataclasses
import types

import numpy as np
import pytest

from channel_graphs import Family
from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection import Request, Weights, kept_channels, select
from lottery_ticket_pruner.structures import Channels

pytestmark = pytest.mark.once


def graph(*families, positions=None, unmasked=None):
    return types.SimpleNamespace(
        families=families, positions=positions or {}, products={}, unmasked=unmasked or {}
    )


def weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        path: Weights(mask=rng.random(shape) < 0.8, current=rng.normal(size=shape))
        for path, shape in shapes.items()
    }


def lowest(scores, count):
    return np.isin(np.arange(len(scores)), np.argsort(scores)[:count])


POOLS = {
    "average": np.mean,
    "max": np.max,
    "norm": lambda values: np.sqrt(np.mean(np.square(values))),
}

# The gates of an LSTM of 6 units, which read 3 inputs and the units themselves.
RECURRENT = Family(
    ("lstm",),
    6,
    {
        "kernel": {1: np.tile(np.arange(6), 4)},
        "recurrent": {0: np.arange(6), 1: np.tile(np.arange(6), 4)},
        "next": {0: np.arange(6)},
    },
    {"kernel": 1, "recurrent": 1},
)
# A weight whose first and last axes have the same channels, two of them in other families.
THREE_AXES = Family(
    ("mix",),
    4,
    {"mix": {0: np.array([0, 1, 2, 3, -1]), 1: np.array([3, 3, -1]), 2: np.tile(range(4), 2)}},
    {"mix": 2},
)
CASES = [
    (RECURRENT, {"kernel": (3, 24), "recurrent": (6, 24), "next": (6, 5)}),
    (THREE_AXES, {"mix": (5, 3, 8)}),
]


@pytest.mark.parametrize(("family", "shapes"), CASES)
@pytest.mark.parametrize("pooling", POOLS)
def test_every_weight_counts_once_for_a_channel(family, shapes, pooling):
    kernels = weights(shapes)
    scores = []
    for channel in range(family.size):
        values = [
            abs(kernels[path].current[index])
            for path, axes in family.weights.items()
            for index in np.ndindex(shapes[path])
            if kernels[path].mask[index]
            and any(channels[index[axis]] == channel for axis, channels in axes.items())
        ]
        scores.append(POOLS[pooling](values))
    for count in range(1, family.size):
        structure = Channels(pooling=pooling, at_most=0.99)
        request = Request.of("smallest_weights", rate=count / family.size, structure=structure)
        masks = select(request, kernels, graph=graph(family))
        expected = ~lowest(scores, count)
        np.testing.assert_array_equal(kept_channels(family, masks), expected)


def test_geometric_median_is_the_sum_of_distances_to_the_kept_filters_of_each_layer():
    family = Family(
        ("a", "b"),
        7,
        {"a": {1: np.arange(7)}, "b": {3: np.arange(7)[::-1]}, "c": {0: np.arange(7)}},
        {"a": 1, "b": 3},
    )
    shapes = {"a": (5, 7), "b": (2, 2, 3, 7), "c": (7, 4)}
    kernels = weights(shapes, 3)
    for path, axes in family.weights.items():  # Channel 6 is pruned.
        for axis, channels in axes.items():
            np.moveaxis(kernels[path].mask, axis, 0)[channels == 6] = False
    values = {path: np.where(k.mask, k.current, 0) for path, k in kernels.items()}
    scores = []
    for channel in range(6):
        total = 0.0
        for path, axis in family.made.items():
            filters = [
                np.take(values[path], np.flatnonzero(family.weights[path][axis] == c), axis)
                for c in range(6)
            ]
            total += sum(np.linalg.norm(filters[channel] - other) for other in filters)
        scores.append(total)
    request = Request.of("geometric_median", rate=0.5, structure="channels")
    masks = select(request, kernels, graph=graph(family))
    expected = np.append(~lowest(scores, 3), False)
    np.testing.assert_array_equal(kept_channels(family, masks), expected)


def scaled(sizes=(8, 6)):
    """Two families, of which the first passes through two normalization layers."""
    a, b = sizes
    gammas = [np.linspace(-1, 1, a), np.append(np.linspace(1, 0, a), [9.0, 9.0])]
    places = [np.arange(a), np.append(np.arange(a), [-1, -1])]
    return graph(
        Family(
            ("a",),
            a,
            {"a": {1: np.arange(a)}, "b": {0: np.arange(a)}},
            {"a": 1},
            scales=tuple(zip(gammas, places, strict=True)),
        ),
        Family(("b",), b, {"b": {1: np.arange(b)}, "c": {0: np.arange(b)}}, {"b": 1}),
    ), weights({"a": (4, a), "b": (a, b), "c": (b, 2)})


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scales_rank_the_families_that_have_them(scope):
    found, kernels = scaled()
    masks = select(
        Request.of("scale", rate=0.5, scope=scope, structure="channels"), kernels, graph=found
    )
    scores = (np.abs(np.linspace(-1, 1, 8)) + np.linspace(1, 0, 8)) / 2
    np.testing.assert_array_equal(kept_channels(found.families[0], masks), ~lowest(scores, 4))
    assert kept_channels(found.families[1], masks).all()


def test_a_model_without_scales_cannot_be_ranked_by_them():
    found, kernels = scaled()
    request = Request.of("scale", rate=0.5, structure="channels")
    with pytest.raises(ValueError, match="has no scores for any channel of the model"):
        select(request, kernels, graph=graph(found.families[1]))


def test_random_channels_are_uniform_whatever_the_number_of_their_weights():
    # Channel 0 has one weight, and the others 200: their average scores would all be about 0.5.
    family = Family(("a",), 5, {"a": {1: np.arange(5)}}, {"a": 1})
    mask = np.ones((200, 5), bool)
    mask[1:, 0] = False
    kernels = {"a": Weights(mask=mask, current=np.ones((200, 5)))}
    times = np.zeros(5)
    for seed in range(500):
        request = Request.of("random", rate=0.2, structure="channels", seed=seed)
        times += ~kept_channels(family, select(request, kernels, graph=graph(family)))
    # 100 expected of a binomial distribution with a deviation of 9.
    assert np.abs(times - 100).max() < 45
    again = [select(request, kernels, graph=graph(family))["a"] for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_random_channels_are_uniform_over_families_ranked_together():
    # Divided by the mean of their family, scores of a family of two would add up to two.
    families = [
        Family((name,), size, {name: {1: np.arange(size)}}, {name: 1})
        for name, size in (("a", 2), ("b", 2), ("c", 40))
    ]
    kernels = {
        family.layers[0]: Weights(
            mask=np.ones((3, family.size), bool), current=np.ones((3, family.size))
        )
        for family in families
    }
    times = np.zeros(3)
    for seed in range(300):
        request = Request.of("random", rate=0.5, scope="global", structure="channels", seed=seed)
        masks = select(request, kernels, graph=graph(*families))
        times += [family.size - kept_channels(family, masks).sum() for family in families]
    # Either channel is pruned with a chance of a half, but never both: 0.75 channels on average.
    assert np.abs(times[:2] / 300 - 0.75).max() < 0.1


def alike():
    """Three families, of which the first and the last have the same form."""
    families = [
        Family((name,), size, {name: {1: np.arange(size)}}, {name: 1}, form=form)
        for name, size, form in (("a", 8, ("x",)), ("b", 8, ("y",)), ("c", 8, ("x",)))
    ]
    kernels = weights({"a": (4, 8), "b": (6, 8), "c": (4, 8)}, 5)
    # Families of the same form are compared as they are, so most of `c` is kept.
    kernels["c"] = dataclasses.replace(kernels["c"], current=kernels["c"].current * 3)
    return graph(*families), kernels


def test_isomorphic_ranking_compares_families_of_equal_form_and_no_others():
    found, kernels = alike()
    request = Request.of("smallest_weights", rate=0.5, scope="isomorphic", structure="channels")
    masks = select(request, kernels, graph=found)
    scores = {
        path: [np.abs(k.current[k.mask[:, c], c]).mean() for c in range(8)]
        for path, k in (("a", kernels["a"]), ("b", kernels["b"]), ("c", kernels["c"]))
    }
    ranked = sorted(
        (scores[path][c], path, c)
        for path in "ac"
        for c in range(8)
        if c != np.argmax(scores[path])  # At least one channel is kept.
    )
    gone = {(path, c) for _, path, c in ranked[:8]}
    for path, family in zip("ac", (found.families[0], found.families[2]), strict=True):
        expected = [(path, c) not in gone for c in range(8)]
        np.testing.assert_array_equal(kept_channels(family, masks), expected)
    np.testing.assert_array_equal(kept_channels(found.families[1], masks), ~lowest(scores["b"], 4))
    assert kept_channels(found.families[2], masks).sum() > 4


def test_isomorphic_budgets_are_met():
    found, kernels = alike()
    request = Request.of(
        "smallest_weights", budget={"weights": 0.4}, scope="isomorphic", structure="channels"
    )
    masks = select(request, kernels, graph=found)
    left = sum(mask.any(0).sum() * len(mask) for mask in masks.values())
    assert 0.3 < left / (8 * 14) <= 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "scale"}, "scores whole channels and needs"),
        ({"strategy": "geometric_median", "structure": "filters"}, "scores whole channels"),
        ({"strategy": "random", "scope": "isomorphic"}, "equal shapes together and needs"),
        ({"strategy": "random", "scope": "isomorphic", "structure": "4x1"}, "equal shapes"),
    ],
)
def test_rankings_of_channels_need_channels(arguments, message):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        Request.of(arguments.pop("strategy"), rate=0.5, **arguments)


def test_isomorphic_ranking_has_one_rate():
    found, kernels = alike()
    rates = {"default": 0.5}
    request = Request.of("random", rate=rates, scope="isomorphic", structure="channels")
    with pytest.raises(ValueError, match="per layer contradicts"):
        select(request, kernels, graph=found)


def test_a_custom_criterion_for_channels_is_checked(monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())

    @criteria.register_for_channels("first")
    def first(group):
        """Keeps the first channels."""
        return -np.arange(len(group.mask))

    assert "first" in criteria.channel_names()
    assert "first" not in criteria.names()
    assert criteria.get({"name": "first"}) is criteria.get(first)
    found, kernels = alike()
    masks = select(Request.of(first, rate=0.5, structure="channels"), kernels, graph=found)
    for family in found.families:
        np.testing.assert_array_equal(kept_channels(family, masks), np.arange(8) < 4)
    for result, message in (
        (np.zeros(3), r"on 'a': scores of shape \(3,\), not \(8,\)"),
        (np.full(8, np.nan), "on 'a': NaN"),
    ):
        criterion = criteria.ChannelCriterion("bad", lambda _, r=result: r, frozenset({"current"}))
        with pytest.raises(ValueError, match=message):
            select(Request.of(criterion, rate=0.5, structure="channels"), kernels, graph=found)


def test_budgets_count_unmasked_weights_and_rows_that_stay():
    family = Family(("a",), 8, {"a": {1: np.arange(8)}, "b": {0: np.arange(8)}}, {"a": 1})
    kernels = {
        path: Weights(mask=np.ones(shape, bool), current=np.random.default_rng(0).random(shape))
        for path, shape in {"a": (10, 8), "b": (8, 2)}.items()
    }
    kernels["a"].mask[:5] = False  # Inputs of the model, which `shrink` cannot remove.
    found = graph(family, positions={"a": 1, "b": 1, "c": 3}, unmasked={"c": 40})

    def left(name, share):
        request = Request.of("smallest_weights", budget={name: share}, structure="channels")
        return int(kept_channels(family, select(request, kernels, graph=found)).sum())

    # 12 weights per channel and 40 others, and 12 multiply-adds per channel and 120 others.
    assert left("weights", 0.7) == int((0.7 * (96 + 40) - 40) // 12) == 4
    assert left("macs", 0.7) == int((0.7 * (96 + 120) - 120) // 12) == 2
    with pytest.raises(ValueError, match=r"cannot be met: .* are left: macs 0\.611\. Pass larger"):
        left("macs", 0.5)
