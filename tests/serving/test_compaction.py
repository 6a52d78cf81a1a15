"""The smaller graph of a SavedModel: what it computes, and what stays in it."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers.serving import export_sparse_saved_model
from masked_layers.serving.function_defs import strip
from served import prune

tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
    ),
    # Keras 3.15 with NumPy 2.4, wherever a variable becomes an array.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


def lenet():
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1), name="x"),
            layers.Flatten(),
            layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"),
            layers.Dense(10),
        ]
    )
    for layer in model.layers[1:]:
        layer.bias.assign(np.random.default_rng(0).standard_normal(layer.bias.shape) / 10)
    return prune(model, 0.95)


def graph_of(folder):
    from tensorflow.core.protobuf import saved_model_pb2

    content = (folder / "saved_model.pb").read_bytes()
    (meta,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    return meta


@pytest.mark.parametrize(("values", "most"), [("float32", 6000), ("codebook", 6200)])
def test_the_graph_of_a_small_model_is_small(values, most, tmp_path):
    report = export_sparse_saved_model(lenet(), tmp_path / "out", values=values)
    assert report.files["saved_model.pb"] <= most
    checkpoint = [size for name, size in report.files.items() if name.startswith("variables/")]
    assert sum(checkpoint) <= 300


@pytest.mark.parametrize(
    "value",
    [
        np.int32([7, 3, 3, 3]), np.int32([-1, 784]), np.int64([[5, 5], [5, 5]]), np.int32(0),
        np.float32([0.0, -0.0]), np.float32([-0.0, -0.0]), np.float32([1, np.nan, np.nan]),
        np.zeros((3, 0), "float32"), np.zeros((2, 3), "float32"), np.arange(6, dtype="float64"),
    ],
)  # fmt: skip
def test_shorter_constants_have_the_same_values(value):
    node = tf.compat.v1.NodeDef(name="constant", op="Const")
    node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    before = node.ByteSize()
    strip(node)
    assert node.ByteSize() <= before
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        tf.graph_util.import_graph_def(tf.compat.v1.GraphDef(node=[node]), name="")
        got = session.run(graph.get_tensor_by_name("constant:0"))
    assert (got.dtype, got.shape) == (value.dtype, value.shape)
    assert got.tobytes() == value.tobytes()


def test_gradients_and_shapes_are_those_of_the_model(tmp_path):
    """A loaded model can be trained on, and called in functions of unknown batch size."""
    model = lenet()
    x = np.random.default_rng(1).standard_normal((5, 28, 28, 1)).astype("float32")
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    signature = loaded.signatures["serving_default"]

    def gradients(call, variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(call(tf.constant(x))))
        return tape.gradient(loss, variables)

    wanted = gradients(model, [variable.value for variable in model.trainable_variables])
    for call in (loaded.serve, lambda x: signature(x=x)["output_0"]):
        for got, want in zip(gradients(call, list(loaded.variables)), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)

        @tf.function(input_signature=[tf.TensorSpec([None, 28, 28, 1])])
        def inside(x, call=call):
            y = call(x)
            assert y.shape.as_list() == [None, 10]
            return y

        np.testing.assert_allclose(inside(tf.constant(x)), model(x), rtol=1e-5, atol=1e-6)
        assert call(tf.constant(x[:0])).shape == (0, 10)


def test_names_of_signatures_stay_and_functions_differ_between_models(tmp_path):
    functions = []
    for seed in (0, 1):
        model = prune(lenet(), 0.5, seed)
        export_sparse_saved_model(model, tmp_path / str(seed))
        meta = graph_of(tmp_path / str(seed))
        for name in ("serve", "serving_default"):
            signature = meta.signature_def[name]
            assert list(signature.inputs) == ["x"]
            assert signature.inputs["x"].name == "serving_default_x:0"
            assert list(signature.outputs) == ["output_0"]
        functions.append({f.signature.name for f in meta.graph_def.library.function})
        assert len(functions[-1]) == 4
    assert not functions[0] & functions[1]


def test_inputs_may_have_the_names_that_compaction_gives(tmp_path):
    names = ["r1", "o0", "A", "r0"]
    inputs = [keras.Input((4,), name=name) for name in names]
    model = keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(inputs)))
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = dict(zip(names, np.eye(4, dtype="float32")[:, None], strict=True))
    got = loaded.signatures["serving_default"](**{name: tf.constant(v) for name, v in x.items()})
    np.testing.assert_allclose(got["output_0"], model([*x.values()]), rtol=1e-5, atol=1e-6)


def test_shapes_with_several_unknown_lengths_are_computed(tmp_path):
    @keras.saving.register_keras_serializable(package="test_compaction")
    class Halves(layers.Layer):
        def call(self, x):
            return tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1] * 2, 4])

        def compute_output_shape(self, shape):
            return (shape[0], None, 4)

    last = layers.Dense(3)
    model = keras.Sequential([keras.Input((None, 6)), layers.Dense(8), Halves(), last])
    prune(model, 0.3)
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    for shape in ((2, 5, 6), (3, 1, 6), (1, 0, 6)):
        data = np.random.default_rng(0).standard_normal(shape).astype("float32")
        got = loaded.serve(data)
        assert got.shape == (shape[0], 2 * shape[1], 3)
        np.testing.assert_allclose(got, model(data), rtol=1e-5, atol=1e-6)


def test_a_shape_that_is_an_output_is_computed(tmp_path):
    @keras.saving.register_keras_serializable(package="test_compaction")
    class Flat(layers.Layer):
        def call(self, x):
            shape = tf.stack([tf.shape(x)[0], 12])
            return tf.reshape(x, shape), shape

        def compute_output_shape(self, shape):
            return (shape[0], 12), (2,)

    x = keras.Input((4, 3))
    y, shape = Flat()(layers.Dense(3)(x))
    model = prune(keras.Model(x, {"y": layers.Dense(5)(y), "shape": shape}), 0.3)
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    assert loaded.serve(np.zeros((7, 4, 3), "float32"))["shape"].numpy().tolist() == [7, 12]


def test_checks_and_loops_are_kept(tmp_path):
    """Operations without outputs that are used, and functions inside functions."""

    @keras.saving.register_keras_serializable(package="test_compaction")
    class Checked(layers.Layer):
        def call(self, x):
            check = tf.debugging.Assert(tf.reduce_all(x < 100), ["too large"])
            with tf.control_dependencies([check]):
                return tf.identity(x)

    model = keras.Sequential(
        [
            keras.Input((None, 4)),
            Checked(),
            layers.LSTM(8, return_sequences=True),
            layers.Bidirectional(layers.GRU(6)),
            layers.Dense(3),
        ]
    )
    prune(model, 0.5)
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.random.default_rng(0).standard_normal((3, 7, 4)).astype("float32")
    wanted = np.array(model(x))
    np.testing.assert_allclose(loaded.serve(x), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
        loaded.serve(x + 100)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        load = tf.compat.v1.saved_model.loader.load
        ends = load(session, ["serve"], str(tmp_path / "out")).signature_def["serve"]
        (source,), (target,) = ends.inputs.values(), ends.outputs.values()
        got = session.run(target.name, {source.name: x})
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
            session.run(target.name, {source.name: x + 100})


@tf.custom_gradient
def bent(x):
    y = tf.exp(x)

    def gradient(upstream):
        return upstream * (2 * y + 3)  # `y` is a value inside the function.

    return y, gradient


def test_custom_gradients_stay(tmp_path):
    """Those of users, of TensorFlow (`silu`), and of values that shapes are computed from."""

    @keras.saving.register_keras_serializable(package="test_compaction")
    class Bent(layers.Layer):
        def call(self, x):
            return bent(tf.reshape(x, [tf.shape(x)[0], 4, 6]))

        def compute_output_shape(self, shape):
            return (shape[0], 4, 6)

    model = keras.Sequential(
        [
            keras.Input((5,), name="x"),
            layers.Dense(24, activation="silu"),
            Bent(),
            layers.LSTM(6),
            layers.Dense(3),
        ]
    )
    prune(model, 0.3)
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 5)), tf.float32)
    export_sparse_saved_model(model, tmp_path / "out")
    registered = graph_of(tmp_path / "out").graph_def.library.registered_gradients
    assert len(registered) == 2
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    found = []
    for call, variables in (
        (model, [variable.value for variable in model.trainable_variables]),
        (loaded.serve, list(loaded.variables)),
        (lambda x: loaded.signatures["serve"](x=x)["output_0"], list(loaded.variables)),
    ):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(call(x)))
        found.append(tape.gradient(loss, variables))
    for gradients in found[1:]:
        for got, want in zip(gradients, found[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_models_with_the_same_weights_share_no_functions_in_one_session(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 20)).astype("float32")
    ends, wanted, got = {}, {}, {}
    for activation in ("relu", "tanh"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((20,), name="x"), layers.Dense(8, activation, name="layer")], name="model"
        )
        export_sparse_saved_model(prune(model, 0.5), tmp_path / activation)
        wanted[activation] = model(x)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        load = tf.compat.v1.saved_model.loader.load
        for name in wanted:
            meta = load(session, ["serve"], str(tmp_path / name), import_scope=name)
            ends[name] = meta.signature_def["serve"]
        for name, end in ends.items():
            feed = {f"{name}/{end.inputs['x'].name}": x}
            got[name] = session.run(f"{name}/{end.outputs['output_0'].name}", feed)
    for name, outputs in wanted.items():
        np.testing.assert_allclose(got[name], outputs, rtol=1e-5, atol=1e-6)


def test_a_loaded_folder_can_be_part_of_other_models(tmp_path):
    """Users add preprocessing to a loaded model, and export layers that call one."""
    model = lenet()
    export_sparse_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.random.default_rng(0).standard_normal((2, 28, 28, 1)).astype("float32")
    outer = tf.Module()
    outer.inner = loaded
    outer.call = tf.function(
        lambda x: loaded.serve(2 * x), input_signature=[tf.TensorSpec([None, 28, 28, 1])]
    )
    tf.saved_model.save(outer, str(tmp_path / "again"))
    again = tf.saved_model.load(str(tmp_path / "again"))
    np.testing.assert_allclose(again.call(x), model(2 * x), rtol=1e-5, atol=1e-6)

    layer = layers.TFSMLayer(str(tmp_path / "out"), call_endpoint="serve")
    wrapping = keras.Sequential([keras.Input((28, 28, 1)), layer, layers.Dense(4)])
    export_sparse_saved_model(wrapping, tmp_path / "wrapping")
    again = tf.saved_model.load(str(tmp_path / "wrapping"))
    np.testing.assert_allclose(again.serve(x), wrapping(x), rtol=1e-5, atol=1e-6)
