"""Grids of untrained masks: every cell equals the pruner's result for that mask."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.supermasks import evaluate_grid
from lottery_ticket_pruner.variables import read

BACKEND = keras.backend.backend()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 6)).astype("float32")
    return x, (x[:, 0] > x[:, 1]).astype("int64")


@pytest.fixture(scope="module")
def pruner(data):
    """A trained model with some pruned, some frozen, and all rescaled weights."""
    keras.utils.set_random_seed(0)
    model = ml.convert_to_masked(
        keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(12, "relu", bias_initializer="random_normal"),
                layers.BatchNormalization(),
                layers.Dense(2, bias_initializer="random_normal"),
            ]
        )
    )
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    pruner = LotteryTicketPruner(model)
    model.fit(*data, epochs=2, batch_size=30, verbose=0)
    pruner.set_pretrained_weights()
    return pruner


def everything(model):
    variables = {id(v): v for v in [*model.variables, *model.metrics_variables]}
    variables |= {id(v): v for v in model.optimizer.variables}
    return [read(variable) for variable in variables.values()]


def test_every_cell_equals_the_evaluation_by_the_pruner(pruner, data):
    model = pruner.model
    criteria, sparsities = ["large_final", "random"], [0.75, 0.3]
    before = everything(model)
    rows = evaluate_grid(pruner, *data, criteria=criteria, sparsities=sparsities, seed=3)
    for now, then in zip(everything(model), before, strict=True):
        np.testing.assert_array_equal(now, then)
    cells = itertools.product(
        criteria, sparsities, ["initial", "signed_constant"], [False, True]
    )  # in this order
    for row, (criterion, sparsity, weights, dwr) in zip(rows, cells, strict=True):
        if weights == "initial" and not dwr:
            pruner.reset_masks()
            pruner.set_pretrained_weights()
            pruner.update_masks(criterion, sparsity=sparsity, seed=3)
        expected = pruner.evaluate_supermask(
            *data, weights=weights, dwr=dwr, verbose=0, batch_size=1000
        )
        cell = {"criterion": criterion, "sparsity": sparsity, "weights": weights, "dwr": dwr}
        assert {name: row[name] for name in cell} == cell
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4)
    assert len({row["loss"] for row in rows}) == 16
    pruner.reset_masks()


def test_frozen_values_masks_and_factors_do_not_matter_and_are_restored(pruner, data):
    model = pruner.model
    options = {"criteria": ["movement"], "sparsities": [0.5], "seed": 1}
    expected = evaluate_grid(pruner, *data, **options)
    final = [read(variable) for variable in model.weights]
    pruner.update_masks("large_init", rate=0.6)
    pruner.treat("rewind", "zero")
    masks_alone = pruner.evaluate_supermask(*data, verbose=0)
    pruner.treat("rewind", "freeze")
    assert pruner.evaluate_supermask(*data, verbose=0) == masks_alone
    assert any(read(ref.mask.frozen).any() for ref in ml.masked_refs(model))
    pruner.apply_dwr(model)
    before = everything(model), ops.convert_to_numpy(model(data[0]))
    rows = evaluate_grid(pruner, *data, **options)
    for row, then in zip(rows, expected, strict=True):
        assert row.pop("loss") == pytest.approx(then.pop("loss"), rel=1e-5)
        assert row == then
    for now, then in zip(everything(model), before[0], strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(data[0])), before[1])
    assert all(ref.mask.rescale for ref in ml.masked_refs(model))
    for ref in ml.masked_refs(model):
        ref.mask.rescale = False
    pruner.reset_masks()
    for variable, value in zip(model.weights, final, strict=True):
        variable.assign(value)


@pytest.mark.skipif(BACKEND == "torch", reason="Runs without compiling.")
def test_nothing_is_traced_again_for_another_cell(data):
    traces = []

    class Traced(layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    model = ml.convert_to_masked(keras.Sequential([keras.Input((6,)), Traced(), layers.Dense(2)]))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruner = LotteryTicketPruner(model)

    def grid(sparsities):
        traces.clear()
        rows = evaluate_grid(pruner, *data, criteria=["large_init"], sparsities=sparsities)
        return len(rows), len(traces)

    grid([0.1])
    (few, at_once), (many, in_all) = grid([0.2]), grid([0.3, 0.5, 0.7])
    assert (few, many) == (4, 12)
    # Each evaluation may trace Keras' check of shapes; traces of the step would depend on batches.
    assert in_all <= 3 * max(at_once, 1)
    assert all(shape[0] in (1, None) for shape in traces)


def test_arguments_that_make_no_sense_are_refused_before_anything_is_evaluated(pruner, data):
    before = everything(pruner.model)
    good = {"criteria": ["large_final"], "sparsities": [0.5]}
    for wrong, message in [
        ({"criteria": ["largest"]}, "Unknown criterion"),
        ({"criteria": "large_final"}, "must be lists.*criteria='large_final'"),
        ({"sparsities": 0.5}, "must be lists.*sparsities=0.5"),
        ({"sparsities": [0.5, 1.0]}, r"in \[0, 1\)"),
        ({"weights": ["initial", "zero"]}, r"Received: \['zero'\]"),
        ({"scope": "filter"}, "`scope` must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_grid(pruner, *data, **good | wrong)
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    for model in (plain, ml.convert_to_masked(plain)):
        with pytest.raises(ValueError, match="needs a compiled masked model"):
            evaluate_grid(LotteryTicketPruner(model), *data, **good)
    for now, then in zip(everything(pruner.model), before, strict=True):
        np.testing.assert_array_equal(now, then)
