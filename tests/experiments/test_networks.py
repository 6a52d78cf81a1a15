"""Networks of the papers: their weight counts, their initialization, their errors."""

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner.experiments import networks

pytestmark = pytest.mark.once("tensorflow", "torch")


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    ("name", "shape", "weights"),
    [
        ("lenet-300-100", (28, 28, 1), 266_200),
        ("conv-2", (32, 32, 3), 4_300_992),
        ("conv-4", (32, 32, 3), 2_425_024),
        ("conv-6", (32, 32, 3), 2_261_184),
        ("lenet-300-100", (8, 8, 1), 50_200),
        # 432, 6 x 2304, 4608 + 5 x 9216, 18 432 + 5 x 36 864, projections 512 and 2048, 640
        ("resnet-20", (32, 32, 3), 270_896),
    ],
)
def test_weight_counts(name, shape, weights):
    model = networks.build(name, shape)
    refs = ml.weight_refs(model)
    assert sum(int(np.prod(ref.variable.shape)) for ref in refs) == weights
    assert model.output_shape == (None, 10)
    prefixes = {ref.path.split("/")[0].rstrip("0123456789") for ref in refs}
    expected = {"output"}
    expected |= {"conv_"} if networks.has_convolutions(name) else set()
    expected |= set() if name == "resnet-20" else {"fc_"}
    assert prefixes == expected


def test_kernels_are_glorot_normal_and_biases_zero():
    model = networks.build("lenet-300-100", (28, 28, 1))
    for layer in model.layers[1:]:
        kernel, bias = layer.get_weights()
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / sum(kernel.shape)), rel=0.1)
        # A truncated normal: nothing beyond two deviations of the untruncated one. Keras on torch
        # draws four times at most and lets one in 200 000 through.
        beyond = np.abs(kernel) > 2.3 * np.sqrt(2 / sum(kernel.shape))
        assert beyond.mean() < (1e-4 if keras.backend.backend() == "torch" else 1e-9)
        assert not bias.any()


def test_resnet_normalizes_decays_and_keeps_its_input_unaugmented():
    model = networks.build("resnet-20", (8, 8, 2), mean=(0.5, 0.25), variance=(0.04, 0.01))
    x = np.random.default_rng(0).random((3, 8, 8, 2)).astype("float32")
    normalized = keras.ops.convert_to_numpy(model.get_layer("normalize")(x))
    np.testing.assert_allclose(normalized, (x - [0.5, 0.25]) / [0.2, 0.1], rtol=1e-4, atol=1e-5)
    kernels = [ref.variable for ref in ml.weight_refs(model)]
    squares = sum(float(keras.ops.sum(keras.ops.square(kernel))) for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(0.5e-4 * squares, rel=1e-4)
    kernel = keras.ops.convert_to_numpy(model.get_layer("conv_12").kernel)
    assert kernel.std() == pytest.approx(np.sqrt(2 / np.prod(kernel.shape[:3])), rel=0.1)
    assert networks.augmentation("resnet-20") is not None
    assert networks.augmentation("conv-2") is None


def test_sgd_falls_to_a_tenth_twice():
    optimizer = networks.optimizer("sgd", 0.1, 100)
    rates = []
    for step in (0, 50, 51, 75, 76):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    assert optimizer.momentum == 0.9
    assert float(networks.optimizer("adam", 0.3, 100).learning_rate) == pytest.approx(0.3)


def test_outputs_are_logits():
    model = networks.build("conv-2", (8, 8, 1), classes=3)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    before = keras.ops.convert_to_numpy(model(x))
    assert before.shape == (4, 3)
    bias = np.array([-10, 0, 10])
    model.layers[-1].bias.assign(bias)
    after = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(after, before + bias, rtol=1e-5, atol=1e-5)


def test_the_global_seed_decides_the_weights():
    def build(seed):
        keras.utils.set_random_seed(seed)
        return networks.build("lenet-300-100", (8, 8, 1)).get_weights()[0]

    np.testing.assert_array_equal(build(1), build(1))
    assert (build(1) != build(2)).any()


def test_networks_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match=r"'vgg'.*lenet-300-100, conv-2, conv-4, conv-6"):
        networks.build("vgg", (32, 32, 3))
    with pytest.raises(ValueError, match=r"conv-6 needs images.*\(784,\)"):
        networks.build("conv-6", (784,))
