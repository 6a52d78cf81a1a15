"""Distributions against the equations of the RigL paper, and their exact counts."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, distributions
from lottery_ticket_pruner.selection import Weights, update

RESNET = {
    "stem": (3, 3, 3, 64),
    "block": (3, 3, 64, 64),
    "narrow": (1, 1, 64, 128),
    "wide": (3, 3, 256, 512),
    "head": (512, 10),
}


def dropped(shapes, sparsities):
    return {path: sparsities[path] * math.prod(shape) for path, shape in shapes.items()}


@pytest.mark.once
@settings(max_examples=60)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
    ),
    sparsity=st.floats(0, 0.999),
    name=st.sampled_from(["uniform", "erk"]),
    first=st.booleans(),
    last=st.booleans(),
)
def test_the_total_is_exact_and_every_kernel_keeps_a_weight(shapes, sparsity, name, first, last):
    shapes = {f"{i}": shape for i, shape in enumerate(shapes)}
    sizes = [math.prod(shape) for shape in shapes.values()]
    distribution = distributions.Distribution(name, dense_first=first, dense_last=last)
    wanted = math.floor(sparsity * sum(sizes) + 1e-6)
    able = [size - 1 for size in sizes]
    if first:
        able[0] = 0
    if last:
        able[-1] = 0
    if wanted > sum(able):
        with pytest.raises(ValueError, match=f"means {wanted} of {sum(sizes)} weights, but only"):
            distribution(shapes, sparsity)
        return
    sparsities = distribution(shapes, sparsity)
    assert list(sparsities) == list(shapes)
    assert all(0 <= share < 1 for share in sparsities.values())
    if first:
        assert sparsities["0"] == 0
    if last:
        assert sparsities[f"{len(sizes) - 1}"] == 0
    weights = {
        path: Weights(mask=np.ones(shape, bool), initial=np.ones(shape))
        for path, shape in shapes.items()
    }
    masks = update("large_init", weights, sparsity=sparsities)
    assert sum(int((~mask).sum()) for mask in masks.values()) == wanted
    assert all(mask.any() for mask in masks.values())


@pytest.mark.once
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_erk_solves_the_equations_of_the_paper(sparsity):
    optimize = pytest.importorskip("scipy.optimize")
    sizes = np.array([math.prod(shape) for shape in RESNET.values()])
    raw = np.array([sum(shape) / math.prod(shape) for shape in RESNET.values()])

    def missing(log_scale):  # densities proportional to `raw`, at most 1, with this total
        return (np.minimum(np.exp(log_scale) * raw, 1) * sizes).sum() - (1 - sparsity) * sizes.sum()

    scale = np.exp(optimize.brentq(missing, -30, 30, xtol=1e-13))
    expected = sizes * (1 - np.minimum(scale * raw, 1))
    found = dropped(RESNET, distributions.get("erk")(RESNET, sparsity))
    np.testing.assert_allclose(
        list(found.values()), expected, atol=2
    )  # rounded, to a rounded total


@pytest.mark.once
def test_uniform_is_the_same_for_all_and_dense_layers_are_made_up_for():
    for path, count in dropped(RESNET, distributions.get("uniform")(RESNET, 0.9)).items():
        assert abs(count - 0.9 * math.prod(RESNET[path])) < 2  # rounded, to a rounded total
    dense = {"name": "uniform", "dense_first": True, "dense_last": True}
    sparsities = distributions.get(dense)(RESNET, 0.9)
    assert sparsities["stem"] == sparsities["head"] == 0
    inner = sum(math.prod(RESNET[path]) for path in ("block", "narrow", "wide"))
    total = sum(math.prod(shape) for shape in RESNET.values())
    for path in ("block", "narrow", "wide"):
        assert sparsities[path] == pytest.approx(0.9 * total / inner, abs=1e-3)


@pytest.mark.once
def test_update_accepts_a_name_or_a_distribution():
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (20, 10), "b/a/kernel": (10, 5), "b/kernel": (5, 3)}
    weights = {
        path: Weights(mask=np.ones(shape, bool), initial=rng.normal(size=shape))
        for path, shape in shapes.items()
    }
    by_name = update("large_init", weights, sparsity=0.7, distribution="erk")
    mapping = distributions.get("erk")(shapes, 0.7)
    by_mapping = update("large_init", weights, sparsity=mapping)
    assert all((by_name[path] == by_mapping[path]).all() for path in shapes)
    assert sum(int((~mask).sum()) for mask in by_name.values()) == math.floor(0.7 * 265)
    assert mapping["b/kernel"] < mapping["b/a/kernel"] < mapping["a/kernel"]
    for wrong in (
        {"rate": 0.5},
        {"sparsity": mapping},
        {"sparsity": 0.5, "scope": "global"},
        {},
        {"sparsity": 0.5, "rate": 0.5},
    ):
        with pytest.raises(ValueError, match="divides a single `sparsity` among all kernels"):
            update("large_init", weights, distribution="erk", **wrong)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        update("large_init", weights, distribution="erk", sparsity=1.0)


def test_a_model_takes_a_distribution_and_a_structure_together():
    keras.utils.set_random_seed(0)
    model = ml.convert_to_masked(
        keras.Sequential([keras.Input((30,)), layers.Dense(20), layers.Dense(10), layers.Dense(5)])
    )
    report = LotteryTicketPruner(model).update_masks(
        "large_init", sparsity=0.8, distribution={"name": "uniform", "dense_last": True}
    )
    assert report.size - report.alive == math.floor(0.8 * report.size)
    assert report.rows[-1].sparsity == 0
    LotteryTicketPruner(model).reset_masks()
    report = LotteryTicketPruner(model).update_masks(
        "large_init", sparsity=0.5, distribution="uniform", structure="units"
    )
    # Half of the units of each layer (of five, two), and the inputs that were pruned units.
    assert [row.sparsity for row in report] == [0.5, 0.75, 0.7]


def test_a_dense_layer_is_so_in_all_that_it_holds():
    shapes = {
        "s/depthwise_kernel": (3, 3, 4, 1),
        "s/pointwise_kernel": (1, 1, 4, 8),
        "a/kernel": (20, 20),
        "b/kernel": (20, 5),
        "b/bias": (5,),
    }
    found = distributions.Distribution("uniform", dense_first=True, dense_last=True)(shapes, 0.5)
    assert [path for path, share in found.items() if share] == ["a/kernel"]
    assert sum(dropped(shapes, found).values()) == pytest.approx(573 // 2)


@pytest.mark.once
@pytest.mark.parametrize("name", ["uniform", "erk"])
def test_configurations_round_trip(name):
    distribution = distributions.Distribution(name, dense_last=True)
    assert distributions.get(distribution) is distribution
    assert distributions.get(distribution.get_config()) == distribution
    assert distributions.Distribution.from_config(distribution.get_config()) == distribution
    assert distributions.get(keras.saving.serialize_keras_object(distribution)) == distribution
    assert distributions.get(name) == distributions.Distribution(name)


@pytest.mark.once
@pytest.mark.parametrize("identifier", ["erg", None, 3, {}, {"name": "erk", "dense": True}])
def test_everything_but_a_distribution_is_an_error(identifier):
    with pytest.raises(ValueError, match=r"Received|Unknown distribution|cannot be created"):
        distributions.get(identifier)


@pytest.mark.once
def test_a_registered_rule_works_by_name(monkeypatch):
    monkeypatch.setattr(distributions, "_RULES", distributions._RULES.copy())

    @distributions.register("wide")
    def wide(shape):
        return shape[-1]

    sparsities = distributions.get("wide")({"a": (10, 10), "b": (10, 30)}, 0.5)
    assert 1 - sparsities["b"] == pytest.approx(3 * (1 - sparsities["a"]), abs=0.02)
    with pytest.raises(ValueError, match=r"taken by .*\.uniform"):
        distributions.register("uniform")(wide)
