"""Synaptic flow against plain NumPy, and the papers' statements about layers at high sparsity."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.evidence import SynapticFlow


def sequential(*inner, shape=(5,)):
    """Returns a masked model with kernels drawn by NumPy, which is faster than JAX."""
    for layer in inner:
        if hasattr(layer, "kernel_initializer"):
            layer.kernel_initializer = keras.initializers.Zeros()
    model = ml.convert_to_masked(keras.Sequential([keras.Input(shape), *inner]))
    rng = np.random.default_rng(0)
    for ref in ml.masked_refs(model):
        scale = np.sqrt(2 / np.prod(ref.variable.shape[:-1]))
        ref.variable.assign(scale * rng.normal(size=ref.variable.shape))
    return model


def absolute(model):
    return [np.abs(weight).astype("float64") for weight in model.get_weights()]


def flows_of_two_layers(weights, masks):
    """Computes forwards and backwards through relu(x W + b) V + c with everything positive."""
    first, bias, second, _ = weights
    first, second = first * masks[0], second * masks[1]
    hidden = first.sum(0) + bias
    below = np.broadcast_to(second.sum(1), first.shape)
    return [below, np.broadcast_to(hidden[:, None], second.shape)]


def two_layers(*last):
    hidden = layers.Dense(4, activation="relu", name="a")
    model = sequential(hidden, *(last or [layers.Dense(3, name="b")]))
    model.layers[0].bias.assign([0.03, -0.06, 0.09, -0.12])
    return model


OUTPUTS = {
    "logits": lambda: [layers.Dense(3, name="b")],
    "softmax": lambda: [layers.Dense(3, activation="softmax", name="b")],
    "softmax layer": lambda: [layers.Dense(3, name="b"), layers.Softmax()],
    "activation layer": lambda: [layers.Dense(3, name="b"), layers.Activation("sigmoid")],
    "nested": lambda: [
        keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")], name="b")
    ],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_flow_is_that_of_the_positive_network_for_any_last_activation(kind):
    model = two_layers(*OUTPUTS[kind]())
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    rng = np.random.default_rng(0)
    masks = {path: rng.random(mask.shape) < 0.6 for path, mask in ml.get_masks(model).items()}
    found = SynapticFlow(model)(masks)
    expected = flows_of_two_layers(absolute(model), list(masks.values()))
    for array, wanted in zip(found.values(), expected, strict=True):
        assert array.dtype == "float64"
        np.testing.assert_allclose(array, wanted, rtol=1e-12)
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)
    assert keras.config.floatx() == "float32"


def test_every_layer_of_a_convolutional_net_carries_the_same_flow():
    model = sequential(
        layers.Conv2D(4, 3, padding="same", activation="relu"),
        layers.BatchNormalization(epsilon=1e-12),
        layers.MaxPooling2D(),
        layers.Conv2D(6, 3, strides=2, activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3),
        shape=(8, 8, 2),
    )
    masks = ml.get_masks(model)
    weights = {ref.path: np.abs(keras.ops.convert_to_numpy(ref.variable)) for ref in refs(model)}
    totals = [np.sum(weights[path] * flow) for path, flow in SynapticFlow(model)(masks).items()]
    assert len(totals) == 3
    np.testing.assert_allclose(totals, totals[0], rtol=1e-6)


def refs(model):
    return ml.masked_refs(model)


def test_a_hundred_rounds_in_numpy_give_the_same_masks():
    model = two_layers()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("synflow", sparsity=0.75)
    weights = absolute(model)
    masks = [np.ones_like(weights[0], bool), np.ones_like(weights[2], bool)]
    for k in range(1, 101):
        flows = flows_of_two_layers(weights, masks)
        scores = [w * flow for w, flow in zip(weights[::2], flows, strict=True)]
        alive = [
            (s, i, j) for i in (0, 1) for j, s in enumerate(scores[i].ravel()) if masks[i].flat[j]
        ]
        drop = int((1 - 0.25 ** (k / 100)) * 32 + 1e-6) - (32 - len(alive))
        for _, i, j in sorted(alive)[:drop]:
            masks[i].flat[j] = False
    assert sum(mask.sum() for mask in masks) == 8
    for found, expected in zip(ml.get_masks(model).values(), masks, strict=True):
        np.testing.assert_array_equal(found, expected)


def alive_in_each_round(monkeypatch, model, **amount):
    """Records how many weights were kept when each round computed its flows, and at the end."""
    counts = []
    flows = SynapticFlow.__call__

    def counted(self, masks):
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
        return flows(self, masks)

    monkeypatch.setattr(SynapticFlow, "__call__", counted)
    report = LotteryTicketPruner(model).update_masks("synflow", **amount)
    return [*counts, report.alive]


@pytest.mark.once
@pytest.mark.parametrize("amount", [{"sparsity": 0.77}, {"rate": 0.77}])
def test_rounds_follow_the_requested_sparsity_and_not_rounded_counts(amount, monkeypatch):
    # 0.77 of 32 weights are 24: the densities on the way are powers of 0.23, not of 8 / 32.
    counts = alive_in_each_round(monkeypatch, two_layers(), **amount)
    assert counts == [32 - int((1 - 0.23 ** (k / 100)) * 32 + 1e-6) for k in range(101)]


@pytest.mark.once
def test_rounds_continue_from_the_current_density(monkeypatch):
    model = two_layers()
    LotteryTicketPruner(model).update_masks("random", sparsity=0.25, scope="global")
    counts = alive_in_each_round(monkeypatch, model, rate=0.3)
    densities = [0.75 * 0.7 ** (k / 100) for k in range(100)]
    assert counts == [*(32 - int((1 - d) * 32 + 1e-6) for d in densities), 24 - 7]


def test_counts_are_exact_from_masks_that_are_not_ones():
    model = two_layers()
    pruner = LotteryTicketPruner(model)
    assert pruner.update_masks("random", sparsity=0.25, scope="global").alive == 24
    before = ml.get_masks(model)
    assert pruner.update_masks("synflow", rate=0.3).alive == 24 - 7
    for old, new in zip(before.values(), ml.get_masks(model).values(), strict=True):
        assert not (new & ~old).any()
    assert pruner.update_masks("synflow", sparsity=0.8).alive == 32 - 25
    with pytest.raises(ValueError, match=r"sparsity 0\.5, but the model .* already sparser"):
        pruner.update_masks("synflow", sparsity=0.5)
    with pytest.raises(ValueError, match="start from masks of ones"):
        pruner.update_masks("synflow", sparsity=0.9, structure="units")
    pruner.reset_masks()
    report = pruner.update_masks("synflow", sparsity=0.5, structure="units")
    assert report.alive < 32


def test_products_beyond_single_precision_are_kept_apart():
    deep = [layers.Dense(4, use_bias=False) for _ in range(25)]
    model = sequential(*deep, shape=(4,))
    model.set_weights([1000 * weight for weight in model.get_weights()])
    flow = SynapticFlow(model)(ml.get_masks(model))
    assert all(np.isfinite(array).all() for array in flow.values())
    assert min(array.min() for array in flow.values()) > np.finfo("float32").max


@pytest.mark.slow("jax")
def test_only_synflow_keeps_weights_in_every_layer():
    hidden = [layers.Dense(32, activation="relu") for _ in range(8)]
    model = sequential(*hidden, layers.Dense(10), shape=(64,))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 64)).astype("float32"), rng.integers(0, 10, 64)
    pruner = LotteryTicketPruner(model)
    fewest = {}
    for name in ("smallest_weights_global", "snip", "synflow"):
        pruner.reset_masks()
        report = pruner.update_masks(name, sparsity=0.998, data=data)
        assert report.alive == report.size - int(0.998 * report.size)
        fewest[name] = min(row.alive for row in report)
    assert fewest["synflow"] >= 1
    assert fewest["smallest_weights_global"] == fewest["snip"] == 0


class Probable(layers.Layer):
    def call(self, x):
        return keras.ops.softmax(x)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


@pytest.mark.once
def test_models_without_a_flow_are_refused():
    probable = two_layers(layers.Dense(3), Probable())
    with pytest.raises(ValueError, match="add up to 1"):
        SynapticFlow(probable)
    tokens = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 3)])
    with pytest.raises(ValueError, match="integer inputs"):
        SynapticFlow(ml.convert_to_masked(tokens))
    free = sequential(layers.Conv1D(2, 3), layers.GlobalAveragePooling1D(), shape=(None, 2))
    with pytest.raises(ValueError, match=r"fixed shape.*\(None, 2\).*data=x"):
        SynapticFlow(free)
    assert SynapticFlow(free, np.zeros((4, 6, 2), "float32"))(ml.get_masks(free))


def test_a_recurrent_layer_at_the_end_keeps_its_activation():
    plain = keras.Sequential([keras.Input((1, 5)), layers.SimpleRNN(4, name="r")])
    model = ml.convert_to_masked(plain)
    flow = SynapticFlow(model)(ml.get_masks(model))
    kernel = absolute(model)[0]
    slope = 1 - np.tanh(kernel.sum(0)) ** 2
    np.testing.assert_allclose(flow["r/cell/kernel"], np.broadcast_to(slope, (5, 4)))
    np.testing.assert_array_equal(flow["r/cell/recurrent_kernel"], 0)  # of one step


@pytest.mark.once
def test_a_subclassed_model_has_the_input_that_it_was_built_with():
    model = Subclassed()
    model(np.zeros((2, 5), "float32"))
    model = ml.convert_to_masked(model)
    (flow,) = SynapticFlow(model)(ml.get_masks(model)).values()
    np.testing.assert_allclose(flow, 1.0)
