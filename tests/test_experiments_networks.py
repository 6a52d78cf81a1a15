"""The papers' networks: their weight counts, their initialisation, their errors."""

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner.experiments import networks


@pytest.mark.parametrize(
    ("name", "shape", "weights"),
    [
        ("lenet-300-100", (28, 28, 1), 266_200),
        ("conv-2", (32, 32, 3), 4_300_992),
        ("conv-4", (32, 32, 3), 2_425_024),
        ("conv-6", (32, 32, 3), 2_261_184),
        ("lenet-300-100", (8, 8, 1), 50_200),
    ],
)
def test_weight_counts(name, shape, weights):
    model = networks.build(name, shape)
    refs = ml.weight_refs(model)
    assert sum(int(np.prod(ref.variable.shape)) for ref in refs) == weights
    assert model.output_shape == (None, 10)
    prefixes = {ref.path.split("/")[0].rstrip("0123456789") for ref in refs}
    assert prefixes == ({"fc_", "output"} | ({"conv_"} if "conv" in name else set()))


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


def test_outputs_are_logits():
    model = networks.build("conv-2", (8, 8, 1), classes=3)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    outputs = keras.ops.convert_to_numpy(model(x))
    assert outputs.shape == (4, 3)
    assert (outputs < 0).any()


def test_the_global_seed_decides_the_weights():
    def build(seed):
        keras.utils.set_random_seed(seed)
        return networks.build("lenet-300-100", (8, 8, 1)).get_weights()[0]

    np.testing.assert_array_equal(build(1), build(1))
    assert (build(1) != build(2)).any()


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"'vgg'.*lenet-300-100, conv-2, conv-4, conv-6"):
        networks.build("vgg", (32, 32, 3))
    with pytest.raises(ValueError, match=r"conv-6 needs images.*\(784,\)"):
        networks.build("conv-6", (784,))
