"""Kernels at the edges of numbers: empty, of one entry, all equal, denormal, of other dtypes."""

import keras
import numpy as np
import pytest

import masked_layers as ml
from kernels import BY_RECORDS, kernel
from lottery_ticket_pruner import LotteryTicketPruner, criteria
from lottery_ticket_pruner.selection import update

pytestmark = pytest.mark.once

CORNERS = {
    "equal": np.full((4, 4), 0.5, "float32"),
    "zeros": np.zeros((4, 4), "float32"),
    "denormal": np.linspace(1e-45, 1e-40, 16, dtype="float32").reshape(4, 4),
    "largest": np.full((4, 4), np.finfo("float32").max),
    "largest double": np.full((4, 4), np.finfo("float64").max),
    "one column": np.ones((4, 1), "float32"),
    "empty": np.zeros((0, 4), "float32"),
}


@pytest.mark.parametrize("scope", criteria.SCOPES)
@pytest.mark.parametrize("name", [name for name in BY_RECORDS if not name.endswith("_global")])
def test_counts_are_exact_for_all_values(name, scope):
    with np.errstate(over="ignore"):
        for corner, values in CORNERS.items():
            weights = {"k": kernel(values, initial=-values)}
            for rate in (1e-9, 0.5):
                mask = update(name, weights, rate=rate, scope=scope)["k"]
                assert mask.sum() == values.size * (1 if rate < 0.5 else 0.5), (corner, rate)
    one = {"k": kernel(np.ones((1, 1)))}
    assert update(name, one, rate=1e-9, scope=scope)["k"].all()


def test_denormal_weights_are_ranked_by_value():
    mask = update("large_final", {"k": kernel(CORNERS["denormal"])}, rate=0.5)["k"]
    assert mask.ravel().tolist() == [False] * 8 + [True] * 8


def model_of(dtype):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(6, activation="relu", dtype=dtype, name="wide"),
        keras.layers.Dense(1, dtype=dtype, name="narrow"),
        keras.layers.Dense(1, dtype=dtype, name="one"),
    ]
    return ml.convert_to_masked(keras.Sequential([keras.Input((4,)), *layers]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_survive_pruning_rewinding_and_files(dtype, tmp_path):
    model = model_of(dtype)
    initial = [keras.ops.convert_to_numpy(w) for w in model.weights]
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", sparsity=0.5, scope="global")
    assert ml.sparsity_report(model).alive == 16  # of 24 + 6 + 1, half of which rounds down
    for weight in model.weights:
        weight.assign(keras.ops.zeros_like(weight))
    pruner.rewind()
    for weight, value in zip(model.weights, initial, strict=True):
        assert keras.backend.standardize_dtype(weight.dtype) == dtype
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), value)
    x = np.ones((2, 4), dtype if dtype != "bfloat16" else "float32")
    outputs = keras.ops.convert_to_numpy(model(x))
    pruner.save(tmp_path / "pruner.npz")
    ml.save_ticket(model, tmp_path / "ticket")
    other = model_of(dtype)
    LotteryTicketPruner.load(tmp_path / "pruner.npz", other).rewind()
    for again in (other, ml.load_ticket(tmp_path / "ticket")):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(again(x)), outputs)


def test_layers_with_nothing_left_are_pruned_past_and_rewound():
    model = model_of("float32")
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    ml.set_masks(model, {"narrow/kernel": np.zeros((6, 1))})
    pruner.update_masks("large_final", rate=0.5, scope="layer")
    kept = {row.path: row.alive for row in ml.sparsity_report(model)}
    assert (kept["wide/kernel"], kept["narrow/kernel"]) == (12, 0)
    pruner.rewind()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(np.ones((2, 4)))), 0)


def test_a_rate_so_small_that_nothing_goes_says_so():
    pruner = LotteryTicketPruner(model_of("float32"))
    pruner.set_pretrained_weights()
    with pytest.warns(UserWarning, match="(?i)no weight|nothing|without effect|not changed"):
        pruner.update_masks("large_final", rate=1e-6, scope="layer")
    assert ml.sparsity_report(pruner.model).sparsity == 0


def test_an_empty_kernel_is_no_obstacle():
    inputs = [keras.Input((0,)), keras.Input((3,))]
    outputs = [keras.layers.Dense(2, name=f"d{n}")(x) for n, x in enumerate(inputs)]
    model = ml.convert_to_masked(keras.Model(inputs, keras.layers.Add()(outputs)))
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", rate=0.5, scope="layer")
    report = ml.sparsity_report(model)
    assert (report.size, report.alive) == (6, 3)
    assert "d0" in str(report)
