"""The real TensorFlow Model Optimization: its schedules, its models, its import."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules
from lottery_ticket_pruner.interop.tfmot import from_tfmot, import_tfmot

if importlib.util.find_spec("tensorflow_model_optimization") is None:
    pytest.skip("TensorFlow Model Optimization is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def tfmot():
    return import_tfmot().sparsity.keras


@pytest.fixture(scope="module")
def tk(tfmot):
    import tf_keras

    return tf_keras


IMPORT = """
import os, sys
before = dict(os.environ)
from lottery_ticket_pruner.interop.tfmot import import_tfmot
import lottery_ticket_pruner.schedules
assert not [name for name in sys.modules if name.startswith(("tensorflow_model", "tf_keras"))]
tfmot = import_tfmot()
assert tfmot.sparsity.keras.prune_low_magnitude
import keras, tensorflow as tf
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert tf.keras.layers.Dense is keras.layers.Dense
print("as before")
"""


@pytest.mark.slow
@pytest.mark.once
def test_the_import_leaves_environment_and_tf_keras_as_they_were():
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    environment["KERAS_BACKEND"] = keras.backend.backend()
    result = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.stdout.strip() == "as before", result.stderr[-2000:]


@pytest.mark.once
@pytest.mark.parametrize(
    ("ours", "name", "arguments"),
    [
        (
            schedules.Polynomial(0.1, 0.9, 20, 120, frequency=10),
            "PolynomialDecay",
            {
                "initial_sparsity": 0.1,
                "final_sparsity": 0.9,
                "begin_step": 20,
                "end_step": 120,
                "frequency": 10,
            },
        ),
        (
            schedules.Polynomial(0.0, 0.5, 0, 77, power=1.5, frequency=7),
            "PolynomialDecay",
            {
                "initial_sparsity": 0.0,
                "final_sparsity": 0.5,
                "begin_step": 0,
                "end_step": 77,
                "power": 1.5,
                "frequency": 7,
            },
        ),
        (
            schedules.Constant(0.6, 5, 90, 6),
            "ConstantSparsity",
            {"target_sparsity": 0.6, "begin_step": 5, "end_step": 90, "frequency": 6},
        ),
        (
            schedules.Constant(0.6, 30),
            "ConstantSparsity",
            {"target_sparsity": 0.6, "begin_step": 30},
        ),
    ],
)
def test_our_schedules_have_their_values_and_theirs_are_taken_as_they_are(
    tfmot, ours, name, arguments
):
    theirs = getattr(tfmot, name)(**arguments)
    pairs = [theirs(step) for step in range(140)]
    assert [ours.due(step) for step in range(140)] == [bool(due) for due, _ in pairs]
    np.testing.assert_allclose(
        [ours(step) for step in range(140)], [float(value) for _, value in pairs], atol=1e-6
    )
    for taken in (schedules.get(theirs), schedules.get(theirs.get_config())):
        assert taken.get_config() == ours.get_config()


def test_a_custom_schedule_class_drives_the_pruner(tfmot):
    import tensorflow as tf

    class EveryOther(tfmot.PruningSchedule):
        def __call__(self, step):
            return tf.equal(step % 2, 1), tf.constant(0.9)

        def get_config(self):
            return {}

    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    model = ml.convert_to_masked(model)
    pruning = GradualPruning(LotteryTicketPruner(model), EveryOther())
    assert not pruning.advance(0)
    assert pruning.advance()
    assert ml.sparsity_report(model).alive == 10  # 0.9 of 100, although 0.8999999762 in float32
    with pytest.raises(NotImplementedError, match="EveryOther"):
        pruning.schedule.get_config()


def batch(shape):
    return np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")


def compare(source, target, x, tolerance=2e-5):
    expected = keras.tree.flatten(keras.tree.map_structure(lambda t: t.numpy(), source(x)))
    # JAX would compile every operation separately.
    call = target.predict_on_batch if keras.backend.backend() == "jax" else target
    outputs = keras.tree.flatten(call(x))
    for output, wanted in zip(outputs, expected, strict=True):
        output = keras.ops.convert_to_numpy(output)
        np.testing.assert_allclose(output, wanted, rtol=tolerance, atol=tolerance)
        assert wanted.std() > 1e-3


def scatter(model, seed=0):
    """Sets weights that distinguish all parts of the model, without zeros and ones."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        name = variable.name.rpartition("/")[2]
        if name.startswith("mask"):
            variable.assign(rng.random(variable.shape) < 0.5)
        elif not name.startswith(("threshold", "pruning_step")):
            value = rng.normal(size=variable.shape) * 0.5
            variable.assign(np.abs(value) + 0.5 if "variance" in name else value)
    return model


# By input shape: all layers that `prune_low_magnitude` supports and Keras 3 has.
IMAGES = """
Conv2D(6, 3, activation="relu", kernel_regularizer="l2", padding="same")
Conv2D(6, 3, groups=2, dilation_rate=2, padding="same", use_bias=False)
BatchNormalization() DepthwiseConv2D(3, depth_multiplier=2) SeparableConv2D(4, 2)
Conv2DTranspose(5, 3, strides=2, padding="same") LeakyReLU(alpha=0.2) ELU() Cropping2D(1)
ZeroPadding2D(1) UpSampling2D(2) MaxPooling2D(2) AveragePooling2D(2) SpatialDropout2D(0.3)
ReLU(6.0, negative_slope=0.1) GaussianNoise(0.1) GaussianDropout(0.1) AlphaDropout(0.1)
LayerNormalization() Activation("tanh") ActivityRegularization(0.1) Permute((2, 1, 3)) Flatten()
Dense(4, activation="softmax")
"""
SEQUENCES = """
Conv1D(6, 2, padding="causal") SeparableConv1D(6, 2) SpatialDropout1D(0.1) Masking()
LSTM(5, return_sequences=True) GRU(4, return_sequences=True) GRU(4, True, reset_after=False)
SimpleRNN(4, return_sequences=True) Cropping1D(1) ZeroPadding1D(1) UpSampling1D(2)
MaxPooling1D(2) AveragePooling1D(2) GlobalAveragePooling1D() Dropout(0.1) RepeatVector(3)
RNN([LSTMCell(3), GRUCell(2)]) Reshape((1, 2)) GlobalMaxPooling1D() Softmax()
"""
VOLUMES = """
Conv3D(3, 2) Conv3DTranspose(2, 2) UpSampling3D(2) Cropping3D(1) ZeroPadding3D(1) MaxPooling3D(2)
AveragePooling3D(2) SpatialDropout3D(0.1) GlobalAveragePooling3D(keepdims=True)
GlobalMaxPooling3D()
"""


def layers_of(tk, text):
    """Creates the layers of a text with `tf_keras`."""
    made, depth, start = [], 0, 0
    for end, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == ")" and depth == 0:
            made.append(eval(text[start : end + 1].strip(), vars(tk.layers) | {"True": True}))
            start = end + 1
    # Initial values are overwritten, and drawing them takes JAX seconds.
    for layer in made:
        cell = getattr(layer, "cell", layer)
        for drawing in getattr(cell, "cells", [cell]):
            for kind in ("kernel", "recurrent", "depthwise", "pointwise"):
                if hasattr(drawing, name := f"{kind}_initializer"):
                    setattr(drawing, name, tk.initializers.Zeros())
    return made


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        pytest.param(IMAGES, (10, 10, 4), id="images"),
        pytest.param(SEQUENCES, (9, 4), id="sequences", marks=pytest.mark.slow),
        pytest.param(VOLUMES, (6, 6, 6, 2), id="volumes"),
    ],
)
def test_every_layer_that_both_know_is_converted(tk, tfmot, text, shape):
    layers = [
        layer if type(layer).__name__ == "RNN" else tfmot.prune_low_magnitude(layer)
        for layer in layers_of(tk, text.replace("GRU(4, True,", "GRU(4, return_sequences=True,"))
    ]
    source = scatter(tk.Sequential([tk.layers.Input(shape), *layers]))
    target = from_tfmot(source)
    compare(source, target, batch(shape))
    masks = ml.get_masks(target)
    theirs = [
        mask.numpy().astype(bool)
        for layer in source.layers
        if hasattr(layer, "pruning_vars")
        for _, mask, _ in layer.pruning_vars
    ]
    ours = [mask for mask in masks.values() if not mask.all()]
    assert len(ours) == len(theirs) > 0
    assert all(any(np.array_equal(mask, other) for other in ours) for mask in theirs)


def test_a_graph_is_converted(tk, tfmot):
    L, wrap = tk.layers, tfmot.prune_low_magnitude
    words, features = L.Input((6,), dtype="int32", name="words"), L.Input((8,), name="features")
    shared = L.Dense(8, activation="gelu", name="shared")
    block = tk.Sequential(
        [L.Dense(8), L.BatchNormalization(), wrap(L.Dense(8, name="last"))], name="block"
    )
    embedded = wrap(L.Embedding(20, 8, input_length=6, name="words_in"))(words)
    attended = L.MultiHeadAttention(2, 3, name="attention")(embedded, embedded)
    attended = L.Bidirectional(L.LSTM(4, return_sequences=True))(L.Add()([embedded, attended]))
    attended = L.TimeDistributed(block)(attended)
    pooled = L.Lambda(lambda x, factor: x[:, 0] * factor, arguments={"factor": 0.5})(attended)
    merged = [
        layer()([pooled, features])
        for layer in (L.Multiply, L.Average, L.Maximum, L.Minimum, L.Subtract)
    ]
    both = L.Concatenate()([shared(pooled), shared(features), *merged])
    ends = [wrap(L.Dense(3, name="logits"))(both), L.Dot(axes=1)([pooled, features])]
    source = scatter(tk.Model([words, features], ends))
    source.get_layer("shared").trainable = False
    target = from_tfmot(source)
    words = np.random.default_rng(1).integers(0, 20, (3, 6))
    compare(source, target, [words, batch((8,))])
    assert sorted(ml.get_masks(target)) == [
        "logits/kernel",
        "time_distributed/layer/last/kernel",
        "words_in/embeddings",
    ]
    assert [layer.name for layer in target.layers if not layer.trainable] == ["shared"]
    assert all(isinstance(layer, keras.layers.Layer) for layer in target.layers)


def test_a_stripped_model_is_converted_with_its_zeros(tk, tfmot):
    source = tk.Sequential(
        [tk.layers.Input((8,)), tk.layers.Dense(6, activation="relu"), tk.layers.Dense(2)]
    )
    source = tfmot.prune_low_magnitude(
        source, tfmot.ConstantSparsity(0.5, 0, frequency=1), block_size=(2, 1)
    )
    source.compile("adam", "mse")
    source.fit(
        batch((8,)), np.ones((3, 2)), verbose=0, callbacks=[tfmot.UpdatePruningStep()], epochs=3
    )
    stripped = tfmot.strip_pruning(source)
    for model in (source, stripped):
        target = from_tfmot(model)
        compare(model, target, batch((8,)))
        kernels = [layer.get_weights()[0] for layer in stripped.layers]
        masks = list(ml.get_masks(target).values())
        for kernel, mask in zip(kernels, masks, strict=True):
            assert ((kernel != 0) == mask).all()
        assert 0.45 < ml.sparsity_report(target).sparsity <= 0.5


def test_mixed_precision_is_converted(tk, tfmot):
    layer = tk.layers.Dense(4, dtype="mixed_bfloat16")
    source = scatter(tk.Sequential([tk.layers.Input((8,)), tfmot.prune_low_magnitude(layer)]))
    target = from_tfmot(source)
    assert target.layers[0].dtype_policy.name == "mixed_bfloat16"
    assert not ml.get_masks(target)["dense/kernel"].all()
    kernel = source.layers[0].layer.kernel.numpy()
    assert (keras.ops.convert_to_numpy(ml.masked_refs(target)[0].variable) == kernel).all()


def test_custom_classes_are_converted_by_name(tk, tfmot):
    class Scale(tk.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(name="scale", shape=shape[-1:])

        def call(self, x):
            return x * self.scale

    source = scatter(tk.Sequential([tk.layers.Input((8,)), Scale(), tk.layers.Dense(2)]))
    with pytest.raises(ValueError, match=r"scale \(Scale\): Keras 3 does not have this layer"):
        from_tfmot(source)

    class Scale3(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(name="scale", shape=shape[-1:])

        def call(self, x):
            return x * self.scale

    compare(source, from_tfmot(source, {"Scale": Scale3}), batch((8,)))


@pytest.mark.once
def test_custom_cells_among_stacked_cells_are_converted_by_name(tk):
    class Cell(tk.layers.SimpleRNNCell):
        pass

    class Cell3(keras.layers.SimpleRNNCell):
        pass

    cells = [Cell(3, name="first"), tk.layers.SimpleRNNCell(2)]
    source = scatter(tk.Sequential([tk.layers.Input((2, 4)), tk.layers.RNN(cells)]))
    with pytest.raises(ValueError, match=r"first \(Cell\): Keras 3 does not have this layer"):
        from_tfmot(source)
    target = from_tfmot(source, {"Cell": Cell3})
    assert isinstance(target.layers[0].cell.cells[0], Cell3)
    compare(source, target, batch((2, 4)))


def test_everything_that_keras_3_lacks_is_named_at_once(tk, tfmot):
    L = tk.layers
    inputs = L.Input((6, 4))
    x = L.ThresholdedReLU(name="threshold")(inputs)
    x = L.LocallyConnected1D(4, 2, name="local")(x) + 1.0
    x = tfmot.prune_low_magnitude(L.LSTM(3, time_major=True, name="major"))(x)
    with pytest.raises(ValueError, match="cannot be converted to a Keras 3 model") as error:
        from_tfmot(tk.Model(inputs, x, name="old"))
    for part in (
        "'old'",
        "threshold (ThresholdedReLU)",
        "local (LocallyConnected1D)",
        "(TFOpLambda)",
        "major (LSTM): Keras 3 has no argument time_major=True",
    ):
        assert part in str(error.value)


def test_everything_but_built_models_of_keras_2_is_refused(tk):
    class Own(tk.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="subclassed"):
        from_tfmot(Own())
    with pytest.raises(ValueError, match="not built"):
        from_tfmot(tk.Sequential([tk.layers.Dense(2)]))
    with pytest.raises(TypeError, match="needs no conversion"):
        from_tfmot(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
