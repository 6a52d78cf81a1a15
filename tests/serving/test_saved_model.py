"""Exports of a sparse SavedModel: signatures, and outputs equal to those of the model."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from common import augmented
from masked_layers.serving import export_sparse_saved_model
from served import convolutional, dense, prune, subclassed

tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
    ),
    # Keras 3.15 with NumPy 2.4, wherever a variable becomes an array.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


def recurrent():
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(50, 16, mask_zero=True),
            layers.Bidirectional(layers.SimpleRNN(8)),
            layers.Dense(4),
        ]
    )


def attention():
    x = keras.Input((6, 16))
    y = layers.MultiHeadAttention(2, 8)(x, x)
    y = layers.LayerNormalization()(layers.add([x, y]))
    return keras.Model(x, layers.EinsumDense("abc,cd->ad", 5)(y))


def several():
    """Two inputs by name, nested outputs by name, one branch used twice."""
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    shared = layers.Dense(16, activation="tanh")
    joined = layers.concatenate([shared(a), shared(b)])
    outputs = {"first": layers.Dense(3)(joined), "second": layers.Dense(2)(joined)}
    return keras.Model({"left": a, "right": b}, outputs)


def listed():
    a, b = keras.Input((8,), name="a"), keras.Input((5,), name="b")
    joined = layers.concatenate([a, b])
    return keras.Model([a, b], [layers.Dense(3)(joined), layers.Dense(2)(joined)])


MODELS = [
    *(dense, convolutional, attention, several, listed, subclassed),
    pytest.param(recurrent, marks=pytest.mark.slow),
]


def ends(loaded):
    """Returns names, shapes and dtypes of the inputs and outputs of every signature."""
    found = {}
    for name, function in loaded.signatures.items():
        _, inputs = function.structured_input_signature
        found[name] = (
            {key: (spec.shape.as_list(), spec.dtype) for key, spec in inputs.items()},
            {
                key: (spec.shape.as_list(), spec.dtype)
                for key, spec in function.structured_outputs.items()
            },
        )
    return found


def selections(loaded):
    """Counts the ops that select between values, as masks do."""
    graph = loaded.signatures["serve"].graph.as_graph_def()
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    return sum(node.op in ("Select", "SelectV2") for body in bodies for node in body)


def inputs_of(loaded, batch):
    _, specs = loaded.signatures["serve"].structured_input_signature
    rng = np.random.default_rng(3)
    return {
        name: tf.cast(
            rng.integers(1, 50, [batch, *(n or 7 for n in spec.shape[1:])])
            if spec.dtype.is_integer
            else rng.standard_normal([batch, *spec.shape[1:]]),
            spec.dtype,
        )
        for name, spec in specs.items()
    }


@pytest.mark.parametrize("make", MODELS)
def test_masked_and_stripped_models_serve_what_keras_exports(make, tmp_path):
    """Checks that there is one signature and that outputs have the same bits."""
    model = ml.convert_to_masked(make())
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) < 0.2 for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    for ref in ml.masked_refs(model):  # So that the outputs of deep models do not vanish.
        ref.variable.assign(4 * keras.ops.convert_to_numpy(ref.variable))
    before = [np.array(variable) for variable in model.variables]
    reports = {"masked": export_sparse_saved_model(model, tmp_path / "masked")}
    assert all(
        (np.array(variable) == value).all()
        for variable, value in zip(model.variables, before, strict=True)
    )
    plain = ml.strip_masks(model)
    reports["plain"] = export_sparse_saved_model(plain, tmp_path / "plain")
    plain.export(tmp_path / "keras", verbose=False)
    masked, stripped, keras_own = (
        tf.saved_model.load(str(tmp_path / kind)) for kind in ("masked", "plain", "keras")
    )
    for ours, report in ((masked, reports["masked"]), (stripped, reports["plain"])):
        assert ends(ours) == ends(keras_own)
        for batch in (1, 5):
            inputs = inputs_of(keras_own, batch)
            for signature in ("serve", "serving_default"):
                got = ours.signatures[signature](**inputs)
                wanted = keras_own.signatures[signature](**inputs)
                assert got.keys() == wanted.keys()
                for key in wanted:
                    assert np.abs(wanted[key]).max() > 1e-3
                    np.testing.assert_array_equal(got[key], wanted[key])
        assert report.output_error == 0.0
        assert report.sparsity > 0.4
        rows = {row.path: row for row in report}
        for path, mask in masks.items():
            assert rows[path].alive == np.count_nonzero(mask)
    # No mask is left, neither its variable nor its selection.
    assert len(masked.variables) == len(stripped.variables)
    assert selections(masked) == selections(keras_own)


def test_a_rescaled_mask_is_folded_into_the_weights(tmp_path):
    model = ml.convert_to_masked(dense())
    for ref in ml.masked_refs(model):
        ref.mask.value.assign(np.random.default_rng(0).random(ref.mask.value.shape) < 0.5)
        ref.mask.rescale = True
    export_sparse_saved_model(model, tmp_path / "out")
    x = np.random.default_rng(0).standard_normal((4, 20)).astype("float32")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-5, atol=1e-6)


def test_mixed_precision_computes_in_it(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = prune(dense())
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.random.default_rng(0).standard_normal((4, 20)).astype("float32")
    assert loaded.serve(x).dtype == tf.bfloat16
    assert {variable.dtype for variable in loaded.variables} == {tf.float32}
    np.testing.assert_allclose(
        tf.cast(loaded.serve(x), "float32"), tf.cast(model(x), "float32"), rtol=0.02, atol=0.02
    )


def test_layers_of_a_lower_precision_inside_a_model_explain_differences(tmp_path):
    inner = [layers.Dense(32, "relu", dtype="mixed_bfloat16") for _ in range(2)]
    model = keras.Sequential([keras.Input((20,)), *inner, layers.Dense(3)])
    report = export_sparse_saved_model(prune(model), tmp_path / "out")
    assert report.output_error < 0.02


def test_the_product_of_lora_is_masked_in_the_file_too(tmp_path):
    words = layers.Embedding(9, 8)
    model = keras.Sequential([keras.Input((5,)), words, layers.Dense(6), layers.Dense(3)])
    for layer in model.layers[:2]:
        layer.enable_lora(2)
        factor = getattr(layer, "lora_kernel_b" if layer is not words else "lora_embeddings_b")
        factor.assign(np.ones(factor.shape))
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(model).items()})
    export_sparse_saved_model(model, tmp_path / "out")
    x = np.arange(10).reshape(2, 5) % 9
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    found = loaded.serve(x.astype("float32"))
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)
    stripped = ml.strip_masks(model)
    np.testing.assert_allclose(found, stripped(x), rtol=1e-5, atol=1e-6)


def test_an_input_signature_fixes_names_and_shapes(tmp_path):
    model = prune(dense())
    signature = [keras.InputSpec(shape=(3, 20), dtype="float32", name="features")]
    export_sparse_saved_model(model, tmp_path / "out", input_signature=signature)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    inputs, _ = ends(loaded)["serving_default"]
    assert inputs == {"features": ([3, 20], tf.float32)}


def test_nested_structures_are_called_as_the_model_is(tmp_path):
    model = prune(several())
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = {name: np.ones((2, 8), "float32") * i for i, name in enumerate(("left", "right"), 1)}
    for key, wanted in model(x).items():
        np.testing.assert_allclose(loaded.serve(x)[key], wanted, rtol=1e-5, atol=1e-6)


def test_it_loads_into_keras_again(tmp_path):
    model = prune(dense())
    export_sparse_saved_model(model, tmp_path / "out")
    layer = layers.TFSMLayer(str(tmp_path / "out"), call_endpoint="serve")
    x = np.ones((2, 20), "float32")
    np.testing.assert_allclose(layer(x), model(x), rtol=1e-5, atol=1e-6)


def test_lookup_tables_and_strings_travel_along(tmp_path):
    x = keras.Input((3,), dtype="string")
    y = layers.Embedding(6, 16)(layers.StringLookup(vocabulary=["a", "b", "c"])(x))
    model = prune(keras.Model(x, layers.Dense(2)(y)), 0.5)
    words = np.array([["a", "c", "unknown"], ["b", "b", "a"]])
    export_sparse_saved_model(model, tmp_path / "out", sample_inputs=words)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    np.testing.assert_allclose(loaded.serve(words), model(tf.constant(words)), rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable(package="test_serving")
class Counting(keras.layers.Layer):
    """Counts its calls and adds the count to its input."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 20))
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x @ self.kernel + keras.ops.cast(self.calls, "float32")


def test_state_that_a_call_changes_keeps_changing(tmp_path):
    model = keras.Sequential([keras.Input((20,)), Counting()])
    export_sparse_saved_model(model, tmp_path / "out")
    assert int(model.layers[0].calls) == 0
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.zeros((1, 20), "float32")
    assert [float(loaded.serve(x)[0, 0]) for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_fixed_batch_is_kept_and_state_continues(tmp_path):
    model = keras.Sequential(
        [keras.Input(batch_shape=(3, 5, 4)), layers.LSTM(8, stateful=True), layers.Dense(2)]
    )
    export_sparse_saved_model(prune(model, 0.5), tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype("float32")
    outputs = [loaded.serve(x).numpy() for _ in range(2)]
    for got in outputs:
        np.testing.assert_allclose(got, model(x), rtol=1e-5, atol=1e-6)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_images_of_any_size_are_compared_at_a_size_that_leaves_something(tmp_path):
    convolutions = [layers.Conv2D(4, 3) for _ in range(5)]
    model = keras.Sequential([keras.Input((None, None, 3)), *convolutions, layers.MaxPooling2D(4)])
    assert export_sparse_saved_model(prune(model, 0.5), tmp_path / "out").output_error == 0.0


@keras.saving.register_keras_serializable(package="test_serving")
class Noise(keras.layers.Layer):
    def __init__(self, seeded, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0) if seeded else None

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


def test_noise_is_new_with_every_call_or_refused(tmp_path):
    export_sparse_saved_model(keras.Sequential([keras.Input((20,)), Noise(True)]), tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.zeros((1, 20), "float32")
    assert np.abs(loaded.serve(x) - loaded.serve(x)).min() > 0
    with pytest.raises(NotImplementedError, match=r"Give the layer a `keras.random.SeedGenerator`"):
        export_sparse_saved_model(
            keras.Sequential([keras.Input((20,)), Noise(False)]), tmp_path / "unseeded"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_that_train_by_default_are_exported_in_inference(tmp_path):
    model = augmented()
    export_sparse_saved_model(model, tmp_path / "served")
    x = np.random.default_rng(0).random((2, 8, 8, 3), "float32")
    loaded = tf.saved_model.load(str(tmp_path / "served"))  # Its functions need it.
    np.testing.assert_allclose(loaded.serve(x), model.predict(x, verbose=0), atol=1e-6)
