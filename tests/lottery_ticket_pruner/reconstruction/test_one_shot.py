"""Reconstruction of whole models, against least squares on the inputs of each layer."""

import logging

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria
from lottery_ticket_pruner.reconstruction import fitting

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sums products of all but the smallest layers in several blocks."""
    monkeypatch.setattr(fitting, "_LEAST_BLOCK", 3)


def masked(inputs, outputs, **kwargs):
    model = ml.convert_to_masked(keras.Model(inputs, outputs), **kwargs)
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape, scale=0.5) for w in model.get_weights()])
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_variance.assign(np.ones(layer.moving_variance.shape) * 1.5)
    return model


def array(tensor):
    return ops.convert_to_numpy(tensor)


def output(model, name, x):
    """Returns the output of a layer of a functional model."""
    part = keras.Model(model.inputs[0], model.get_layer(name).output)
    return array(part(x)).astype("float64")


def two_dense():
    inputs = keras.Input((8,))
    x = layers.Dense(10, activation="relu", name="a")(inputs)
    return masked(inputs, layers.Dense(6, name="b")(x))


def dense_fit(x, y, mask, start, bias, damping):
    """Returns kernel and bias by `lstsq` on rows that also hold the penalty on changes."""
    kernel, found_bias = start * mask, np.array(bias)
    penalty = np.sqrt(damping * np.square(x).sum(0).mean())
    for column in range(mask.shape[1]):
        rows = mask[:, column]
        count = rows.sum()
        system = np.block(
            [[x[:, rows], np.ones((len(x), 1))], [penalty * np.eye(count), np.zeros((count, 1))]]
        )
        goal = np.concatenate([y[:, column], penalty * start[rows, column]])
        found = np.linalg.lstsq(system, goal, rcond=None)[0]
        kernel[rows, column], found_bias[column] = found[:-1], found[-1]
    return kernel, found_bias


@pytest.mark.parametrize("sequential", [True, False])
def test_dense_layers_are_fitted_to_their_dense_outputs(sequential):
    model = two_dense()
    x = RNG.normal(size=(70, 8)).astype("float32")
    pruner = LotteryTicketPruner(model)
    weights = {v.path: array(v) for v in model.weights}
    hidden, logits = output(model, "a", x), output(model, "b", x)
    (a, a_bias), (b, b_bias) = (layer.get_weights() for layer in model.layers[1:])
    pruner.update_masks(
        "smallest_weights", sparsity=0.5, reconstruct=True, sequential=sequential, data=x
    )
    masks = ml.get_masks(model)
    before = x.astype("float64") @ a + a_bias
    kernel, bias = dense_fit(x, before, masks["a/kernel"], a, a_bias, fitting.DAMPING)
    np.testing.assert_allclose(array(model.layers[1].kernel), kernel, atol=1e-5)
    np.testing.assert_allclose(array(model.layers[1].bias), bias, atol=1e-5)
    inputs = np.maximum(x @ kernel + bias, 0) if sequential else hidden
    kernel, bias = dense_fit(inputs, logits, masks["b/kernel"], b, b_bias, fitting.DAMPING)
    np.testing.assert_allclose(array(model.layers[2].kernel), kernel, atol=1e-5)
    np.testing.assert_allclose(array(model.layers[2].bias), bias, atol=1e-5)
    # Pruned weights keep their raw values, and records are not changed.
    for ref in ml.masked_refs(model):
        pruned = ~masks[ref.path]
        np.testing.assert_array_equal(
            array(ref.variable)[pruned], weights[ref.variable.path][pruned]
        )
        np.testing.assert_array_equal(pruner.initial_weights[ref.path], weights[ref.variable.path])


def test_a_convolution_is_fitted_over_patches():
    inputs = keras.Input((6, 6, 2))
    conv = layers.Conv2D(3, 3, padding="same", use_bias=False, name="c")
    model = masked(inputs, conv(inputs))
    x = RNG.normal(size=(40, 6, 6, 2)).astype("float32")
    dense, (start,) = output(model, "c", x), model.get_weights()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", sparsity=0.6, reconstruct=True, data=x)
    mask = ml.get_masks(model)["c/kernel"]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype("float64")
    patches = [padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    patches = np.stack(patches, axis=3).reshape(-1, 18)
    penalty = np.sqrt(fitting.DAMPING * np.square(patches).sum(0).mean())
    for column in range(3):
        rows = mask[..., column].ravel()
        system = np.concatenate([patches[:, rows], penalty * np.eye(rows.sum())])
        old = start[..., column].ravel()[rows]
        goal = np.concatenate([dense[..., column].ravel(), penalty * old])
        best = np.linalg.lstsq(system, goal, rcond=None)[0]
        found = array(model.get_layer("c").kernel)[..., column].ravel()
        np.testing.assert_allclose(found[rows], best, atol=1e-4)
        assert not found[~rows].any()


def sparse_gpt(x, kernel, mask, damping):
    """Prunes as SparseGPT does (arXiv 2301.00774, algorithm 1), with a given mask.

    Weights are removed column by column of W, and the later ones take over their part.
    """
    hessian = x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weights = kernel.T.copy()
    for column in range(len(hessian)):
        error = np.where(mask.T[:, column], 0, weights[:, column] / upper[column, column])
        weights[:, column:] -= error[:, None] * upper[column, column:]
        weights[:, column] = np.where(mask.T[:, column], weights[:, column], 0)
    return weights.T


@pytest.mark.once
def test_the_error_is_at_most_that_of_sparse_gpt_and_of_the_mask_alone():
    inputs = keras.Input((16,))
    model = masked(inputs, layers.Dense(9, use_bias=False, name="d")(inputs))
    mixing = RNG.normal(size=(16, 16))
    x = (RNG.normal(size=(100, 16)) @ mixing).astype("float32")
    kernel = model.get_weights()[0].astype("float64")
    pruner = LotteryTicketPruner(model)
    for structure, amount in [(None, {"sparsity": 0.5}), ("2:4", {}), ("4x1", {"sparsity": 0.5})]:
        pruner.reset_masks()
        model.set_weights([kernel])
        pruner.update_masks(
            "smallest_weights", structure=structure, **amount, reconstruct=True, data=x
        )
        mask = ml.get_masks(model)["d/kernel"]
        found = array(model.get_layer("d").kernel)
        assert not found[~mask].any()
        rivals = [kernel * mask, sparse_gpt(x.astype("float64"), kernel, mask, fitting.DAMPING)]
        errors = [np.square(x @ (w - kernel)).sum() for w in [found, *rivals]]
        assert errors[0] < errors[2] < errors[1]


def network():
    """Convolutions, normalization, attention, groups, a layer used twice and one left out."""
    inputs = keras.Input((8, 6))
    x = layers.Conv1D(8, 3, padding="same", groups=2, use_bias=False, name="c")(inputs)
    x = layers.BatchNormalization(name="n")(x)
    x = layers.ReLU()(x)
    shared = layers.Dense(8, activation="tanh", name="shared")
    x = shared(shared(x))
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Conv1DTranspose(5, 2, name="t")(x)
    return masked(inputs, layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("sequential", [True, False])
def test_the_layers_of_a_network_are_fitted_in_order_and_deterministically(sequential, caplog):
    model = network()
    x = RNG.normal(size=(60, 8, 6)).astype("float32")
    weights = model.get_weights()
    pruner = LotteryTicketPruner(model)
    caplog.set_level(logging.INFO)
    with pytest.warns(UserWarning, match=r"not reconstructed: t/kernel: Conv1DTranspose"):
        pruner.update_masks(
            "smallest_weights", sparsity=0.6, reconstruct=True, sequential=sequential, data=x
        )
    fits = [record.args for record in caplog.records if "Reconstructed" in record.msg]
    paths = [fit[0] for fit in fits]
    assert [path.split("/")[0] for path in paths] == ["c", "shared", *["attention"] * 4, "head"]
    assert all(after < before for _, after, before in fits)
    # The same again gives the same numbers.
    again = model.get_weights()
    pruner.reset_masks()
    model.set_weights(weights)
    with pytest.warns(UserWarning, match="not reconstructed"):
        pruner.update_masks(
            "smallest_weights", sparsity=0.6, reconstruct=True, sequential=sequential, data=x
        )
    for one, other in zip(again, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_statistics_are_those_of_the_pruned_network():
    inputs = keras.Input((6, 5))
    x = layers.BatchNormalization(name="first")(inputs)
    x = layers.Dense(7, use_bias=False, name="d")(x)
    x = layers.BatchNormalization(axis=-1, name="second")(x)
    x = layers.Dense(4, name="e")(layers.ReLU()(x))
    model = masked(inputs, layers.BatchNormalization(axis=1, name="third")(x))
    x = RNG.normal(size=(50, 6, 5)).astype("float32")
    first = [array(v) for v in model.get_layer("first").weights]
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", sparsity=0.5, reconstruct=True, data=x)
    for name, before, axes in [("second", "d", (0, 1)), ("third", "e", (0, 2))]:
        found, layer = output(model, before, x), model.get_layer(name)
        np.testing.assert_allclose(array(layer.moving_mean), found.mean(axes), atol=1e-5)
        np.testing.assert_allclose(array(layer.moving_variance), found.var(axes), rtol=1e-4)
    for variable, value in zip(model.get_layer("first").weights, first, strict=True):
        np.testing.assert_array_equal(array(variable), value)  # Nothing before it was pruned.


@pytest.mark.once
def test_rounded_weights_are_not_reconstructed():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, name="a"), layers.Dense(2)])
    model = ml.convert_to_masked(ml.convert_to_masked(model), include="a", quantize="int8")
    before = model.get_weights()
    with pytest.warns(UserWarning, match="not reconstructed: a/kernel: its weights are rounded"):
        LotteryTicketPruner(model).update_masks(
            "smallest_weights", sparsity=0.5, reconstruct=True, data=RNG.normal(size=(50, 6))
        )
    changed = [not np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True)]
    assert changed == [False, False, True, True]


def test_statistics_after_a_recurrent_layer_whose_cell_a_backend_may_not_call():
    inputs = keras.Input((6, 5))
    x = layers.LSTM(4, name="lstm")(inputs)
    model = masked(inputs, layers.BatchNormalization(name="n")(x))
    x = RNG.normal(size=(50, 6, 5)).astype("float32")
    with pytest.warns(UserWarning, match="not reconstructed: lstm/cell/kernel: LSTMCell is not a"):
        LotteryTicketPruner(model).update_masks(
            "smallest_weights", sparsity=0.5, reconstruct=True, data=x
        )
    layer, found = model.get_layer("n"), output(model, "lstm", x)
    np.testing.assert_allclose(array(layer.moving_mean), found.mean(0), atol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), found.var(0), rtol=1e-4)


@pytest.mark.once
def test_wanda_names_all_weights_whose_inputs_are_not_known():
    inputs = keras.Input((6, 5))
    x = layers.GRU(3)(layers.LSTM(4, return_sequences=True)(layers.Dense(4)(inputs)))
    pruner = LotteryTicketPruner(masked(inputs, x))
    x = RNG.normal(size=(5, 6, 5)).astype("float32")
    with pytest.raises(ValueError, match=r"lstm/cell/kernel .*, gru/cell/recurrent_kernel "):
        pruner.update_masks("wanda", sparsity=0.5, data=x)


@pytest.mark.parametrize("reconstruct", [True, False])
def test_wanda_measures_inputs_after_the_layers_before_have_been_pruned(reconstruct):
    x = RNG.normal(size=(70, 8)).astype("float32")
    found = {}
    for sequential in (True, False):
        model = two_dense()
        dense = output(model, "a", x)
        kernel = array(ml.masked_refs(model)[1].variable)
        LotteryTicketPruner(model).update_masks(
            "wanda",
            sparsity={"a/": 0.8, "b/": 0.5},
            data=x,
            sequential=sequential,
            reconstruct=reconstruct,
        )
        hidden = output(model, "a", x) if sequential else dense
        scores = np.abs(kernel) * np.linalg.norm(hidden, axis=0)[:, None]
        found[sequential] = mask = ml.get_masks(model)["b/kernel"]
        for column in range(6):
            best = np.argsort(scores[:, column])[5:]
            assert sorted(best) == np.flatnonzero(mask[:, column]).tolist()
    assert reconstruct or (found[True] != found[False]).any()


def test_amounts_of_every_form_are_the_same_layer_by_layer():
    x = RNG.normal(size=(20, 8)).astype("float32")
    for arguments in (
        {"sparsity": {"a/": 0.25, "default": 0.5}},
        {"rate": 0.3},
        {"structure": "2:4"},
    ):
        counts = []
        for sequential in (True, False):
            model = two_dense()
            pruner = LotteryTicketPruner(model)
            pruner.update_masks("wanda", **arguments, data=x, sequential=sequential)
            counts.append([row.alive for row in ml.sparsity_report(model).rows])
        assert counts[0] == counts[1], arguments


@pytest.mark.once
def test_inputs_are_not_measured_layer_by_layer_if_weights_are_ranked_across_layers(caplog):
    wanda = criteria.get("wanda")
    ranked = criteria.Criterion("ranked", wanda.function, wanda.needs, scope="global")
    x = RNG.normal(size=(20, 8)).astype("float32")
    found = []
    for sequential in (True, False):
        model = two_dense()
        LotteryTicketPruner(model).update_masks(
            ranked, sparsity=0.5, scope="global", data=x, sequential=sequential
        )
        found.append(ml.get_masks(model))
    for path, mask in found[0].items():
        np.testing.assert_array_equal(mask, found[1][path])
    ours = (r for r in caplog.records if r.name == "lottery_ticket_pruner.one_shot")
    (message,) = (record.getMessage() for record in ours)
    assert "not layer by layer, because the scope 'global' ranks weights of several" in message


def test_channels_and_frozen_and_rescaled_weights():
    x = RNG.normal(size=(60, 8)).astype("float32")
    for case in ("channels", "frozen", "rescaled"):
        model = two_dense()
        pruner = LotteryTicketPruner(model)
        dense = array(model(x))
        structure = "channels" if case == "channels" else None
        if case == "rescaled":
            ml.set_rescale(model, True)
        if case == "frozen":
            for ref in ml.masked_refs(model):
                ref.mask.freeze(np.full(ref.variable.shape, 0.1, "float32"))
        errors, weights = [], model.get_weights()
        for reconstruct in (False, True):
            model.set_weights(weights)
            ml.set_masks(model, {p: np.ones_like(m) for p, m in ml.get_masks(model).items()})
            pruner.update_masks(
                "smallest_weights",
                sparsity=0.4,
                structure=structure,
                reconstruct=reconstruct,
                data=x,
            )
            errors.append(np.square(array(model(x)) - dense).mean())
        assert errors[1] < 0.5 * errors[0], case


def test_a_second_update_starts_from_what_is_there():
    model = two_dense()
    x = RNG.normal(size=(60, 8)).astype("float32")
    pruner = LotteryTicketPruner(model)
    for sparsity in (0.25, 0.5):
        report = pruner.update_masks(
            "smallest_weights", sparsity=sparsity, reconstruct=True, data=x
        )
    assert report.sparsity == 0.5


def test_errors_leave_the_model_as_it_is():
    model = two_dense()
    pruner = LotteryTicketPruner(model)
    before = model.get_weights()
    x = RNG.normal(size=(20, 8)).astype("float32")
    with pytest.raises(ValueError, match="needs inputs"):
        pruner.update_masks("smallest_weights", sparsity=0.5, reconstruct=True)
    x[3, 2] = np.inf
    with pytest.raises(ValueError, match=r"'a/kernel' cannot be reconstructed.*not finite"):
        pruner.update_masks("smallest_weights", sparsity=0.5, reconstruct=True, data=x)
    assert ml.sparsity_report(model).sparsity == 0
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.once
def test_statistics_of_inputs_that_are_not_finite_are_an_error():
    inputs = keras.Input((6, 5))
    x = layers.Conv1DTranspose(4, 2, name="t")(inputs)
    model = masked(inputs, layers.BatchNormalization(name="n")(x))
    x = np.full((5, 6, 5), np.nan, "float32")
    with pytest.raises(ValueError, match=r"'n/moving_mean' cannot be reconstructed.*not finite"):
        LotteryTicketPruner(model).update_masks(
            "smallest_weights", sparsity=0.5, reconstruct=True, data=x
        )
    assert np.isfinite(array(model.get_layer("n").moving_mean)).all()
