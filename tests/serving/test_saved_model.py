"""Exporting a sparse SavedModel: signatures, exactness, encodings, errors, atomicity."""

import logging
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from masked_layers.serving import StorageReport, export_sparse_saved_model, saved_model

tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
    ),
    # Keras 3.15 with NumPy 2.4, wherever a variable becomes an array.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


def prune(model, share=0.8, seed=0):
    """Sets random weights of a plain model to zero, kernels and the like."""
    rng = np.random.default_rng(seed)
    for ref in ml.weight_refs(model):
        value = keras.ops.convert_to_numpy(ref.variable)
        # Scaled, lest what is left of a deep model is next to nothing.
        ref.variable.assign(np.where(rng.random(value.shape) < share, 0, 4 * value))
    return model


def dense():
    return keras.Sequential(
        [
            keras.Input((20,), name="x"),
            layers.Dense(30, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.SeparableConv2D(6, 3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )


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


@keras.saving.register_keras_serializable(package="test_serving")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(32, activation="relu")
        self.last = layers.Dense(3)

    def call(self, inputs, training=False):
        return {"logits": self.last(self.inner(inputs))}


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 10), "float32"))
    return model


MODELS = [dense, convolutional, recurrent, attention, several, listed, subclassed]


def ends(loaded):
    """Names, shapes and dtypes of the inputs and outputs of every signature."""
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
    """How many ops choose between values, as a mask does."""
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
    """One signature, and equal bits: masked or plain, exported by this library or by Keras."""
    model = ml.convert_to_masked(make())
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) < 0.2 for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    for ref in ml.masked_refs(model):  # Lest what is left of a deep model is next to nothing.
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
    # No mask is left: neither its variable nor its selection.
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


def test_state_that_a_call_changes_goes_on_changing(tmp_path):
    model = keras.Sequential([keras.Input((20,)), Counting()])
    export_sparse_saved_model(model, tmp_path / "out")
    assert int(model.layers[0].calls) == 0
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = np.zeros((1, 20), "float32")
    assert [float(loaded.serve(x)[0, 0]) for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_fixed_batch_is_kept_and_state_goes_on(tmp_path):
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


def test_an_exact_and_a_rounded_export_share_nothing_in_one_session(tmp_path):
    model = prune(dense())
    x = np.random.default_rng(0).standard_normal((2, 20)).astype("float32")
    wanted, got = {}, {}
    for values in ("float32", "bfloat16"):
        export_sparse_saved_model(model, tmp_path / values, values=values)
        loaded = tf.saved_model.load(str(tmp_path / values))
        wanted[values] = loaded.serve(x).numpy()
    assert np.abs(wanted["float32"] - wanted["bfloat16"]).max() > 1e-3
    load = tf.compat.v1.saved_model.loader.load
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ends = {
            values: load(session, ["serve"], str(tmp_path / values), import_scope=values)
            for values in wanted
        }
        for values, meta in ends.items():
            signature = meta.signature_def["serve"]
            feed = {f"{values}/{signature.inputs['x'].name}": x}
            got[values] = session.run(f"{values}/{signature.outputs['output_0'].name}", feed)
    for values, outputs in wanted.items():
        np.testing.assert_allclose(got[values], outputs, rtol=1e-5, atol=1e-6)


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


# --- Encodings and the report ---------------------------------------------------------------------


def test_each_weight_gets_the_encoding_that_pays(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((100,)),
            layers.Dense(200, name="pruned"),
            layers.Dense(200, name="full"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(20, name="small"),
        ]
    )
    kernel = model.get_layer("pruned").kernel
    kernel.assign(np.where(np.random.default_rng(0).random(kernel.shape) < 0.9, 0, kernel))
    for variable in model.get_layer("norm").variables:
        variable.assign(np.random.default_rng(0).random(variable.shape))
    report = export_sparse_saved_model(model, tmp_path / "out")
    encodings = {row.path: row.encoding for row in report}
    assert encodings["pruned/kernel"] == "sparse"
    assert encodings["full/kernel"] == "dense"
    assert encodings["norm/moving_mean"] == "packed"
    assert encodings["small/kernel"] == "packed"
    reader = tf.train.load_checkpoint(str(tmp_path / "out" / "variables" / "variables"))
    shapes = [shape for shape in reader.get_variable_to_shape_map().values() if shape]
    assert shapes == [[200, 200]]
    everything_dense = export_sparse_saved_model(model, tmp_path / "dense", include=lambda _: False)
    assert {row.encoding for row in everything_dense} == {"packed", "dense"}
    assert everything_dense.disk_nbytes > report.disk_nbytes


@pytest.mark.parametrize(
    "include",
    [
        "last",
        ["^last", "nowhere"],
        (pattern for pattern in ["^last"]),
        lambda path: path.startswith("last/"),
    ],
)
def test_include_names_the_weights_that_may_be_sparse(include, tmp_path):
    model = prune(subclassed())
    report = export_sparse_saved_model(model, tmp_path / "out", include=include)
    assert [row.path for row in report if row.encoding == "sparse"] == ["last/kernel", "last/bias"]


def test_the_report_counts_what_is_on_disk(tmp_path, caplog):
    model = prune(dense(), 0.9)
    with caplog.at_level(logging.INFO):
        report = export_sparse_saved_model(model, tmp_path / "out")
    files = {
        file.relative_to(tmp_path / "out").as_posix(): file.stat().st_size
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    assert report.files == files
    assert report.disk_nbytes == sum(files.values())
    assert str(report.disk_nbytes) in caplog.text
    rows = {row.path: row for row in report}
    for ref in ml.weight_refs(model):
        assert rows[ref.path].alive == np.count_nonzero(ref.variable)
    assert report.size == model.count_params() == sum(row.size for row in report)
    assert report.dense_nbytes == 4 * model.count_params()
    p = report.rows[0].sparsity
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * 600 / 8
    assert report.rows[0].entropy_nbytes == pytest.approx(entropy)
    assert report.reference_nbytes == pytest.approx(
        sum(row.entropy_nbytes for row in report) + 4 * report.alive
    )
    saved = (tmp_path / "out" / "assets.extra" / "sparsity.json").read_bytes()
    assert StorageReport.from_json(saved) == report
    text = str(report)
    assert "dense/kernel" in text
    assert f"{report.disk_nbytes:,}" in text
    with pytest.raises(ValueError, match="Not a storage report"):
        StorageReport.from_json(b"[1]")


@pytest.mark.parametrize(("values", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_rounded_values_are_smaller_and_the_error_is_reported(values, bits, tmp_path):
    keras.utils.set_random_seed(0)  # The error grows where outputs cancel out.
    model = prune(convolutional())
    exact = export_sparse_saved_model(model, tmp_path / "exact")
    report = export_sparse_saved_model(model, tmp_path / "rounded", values=values)
    assert report.nbytes < exact.nbytes
    assert 0 < report.output_error < 4 * 2.0**-bits
    loaded = tf.saved_model.load(str(tmp_path / "rounded"))
    for row, variable in zip(report, loaded.variables, strict=True):
        assert variable.dtype == tf.float32
        if row.encoding == "sparse" and row.alive:
            assert row.dtype == values
            np.testing.assert_array_equal(tf.cast(tf.cast(variable, values), "float32"), variable)


def test_a_value_too_small_for_float16_becomes_zero(tmp_path):
    model = prune(dense())
    kernel = np.array(model.layers[0].kernel)
    kernel[0, :2] = [-1e-9, 1e-9]
    model.layers[0].kernel.assign(kernel)
    report = export_sparse_saved_model(model, tmp_path / "out", values="float16")
    kernel[0, :2] = 0
    assert report.rows[0].alive == np.count_nonzero(kernel)
    stored = tf.saved_model.load(str(tmp_path / "out")).variables[0].numpy()
    assert not np.signbit(stored[stored == 0]).any()


def test_level_changes_bytes_and_nothing_else(tmp_path):
    model = prune(dense())
    sizes = [
        export_sparse_saved_model(model, tmp_path / "out", level=level).nbytes for level in (0, 9)
    ]
    assert sizes[0] > sizes[1]


def test_every_dtype_of_weights(tmp_path):
    """Weights that TensorFlow cannot make from bytes stay in the checkpoint."""

    class Typed(keras.layers.Layer):
        def build(self, shape):
            rng = np.random.default_rng(0)
            for dtype in ("float16", "bfloat16", "float32", "float64", "int8", "int64", "bool"):
                value = rng.integers(-2, 3, (30, 30)) * (rng.random((30, 30)) < 0.1)

                def initial(shape, dtype=None, value=value):
                    return keras.ops.convert_to_tensor(value.astype("float32"), dtype)

                setattr(
                    self,
                    dtype,
                    self.add_weight(
                        shape=(30, 30), dtype=dtype, initializer=initial, trainable=False
                    ),
                )

        def call(self, x):
            weights = [keras.ops.cast(weight, "float32") for weight in self.weights]
            return x @ sum(weights)

    model = keras.Sequential([keras.Input((30,)), Typed()])
    report = export_sparse_saved_model(model, tmp_path / "out")
    encodings = {row.dtype: row.encoding for row in report}
    assert encodings.pop("bool") == "dense"
    assert set(encodings.values()) == {"sparse"}
    assert len(encodings) == 6


# --- Errors and atomicity -------------------------------------------------------------------------


def contents(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_wrong_arguments_leave_nothing_behind(tmp_path):
    model = dense()
    with pytest.raises(ValueError, match="Received: 'int8'"):
        export_sparse_saved_model(model, tmp_path / "out", values="int8")
    with pytest.raises(ValueError, match="Received: 11"):
        export_sparse_saved_model(model, tmp_path / "out", level=11)
    with pytest.raises(TypeError, match="`include` must be a regular expression"):
        export_sparse_saved_model(model, tmp_path / "out", include=[1])
    with pytest.raises(TypeError, match="Received: 1"):
        export_sparse_saved_model(model, tmp_path / "out", include=1)
    with pytest.raises(ValueError, match=r"'\[', which is not a regular expression"):
        export_sparse_saved_model(model, tmp_path / "out", include=["dense", "["])
    with pytest.raises(ValueError, match=r"include=\['nothing_here'\] matches no weight"):
        export_sparse_saved_model(model, tmp_path / "out", include=["nothing_here"])
    words = np.full((1, 20), "a")
    for sample_inputs in (["a", "b"], words, np.zeros((2, 7)), np.zeros(20), np.zeros((0, 20))):
        with pytest.raises(ValueError, match="`sample_inputs` does not fit the model's inputs"):
            export_sparse_saved_model(model, tmp_path / "out", sample_inputs=sample_inputs)
    for wrong in ("ticket.keras", None):
        with pytest.raises(TypeError, match=f"Expected a `keras.Model`. Received: {wrong!r}"):
            export_sparse_saved_model(wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="has not yet been built"):
        export_sparse_saved_model(keras.Sequential([layers.Dense(2)]), tmp_path / "out")
    x = keras.Input((2,), dtype="int64")
    lookup = layers.IntegerLookup(vocabulary=[5, 6], num_oov_indices=0)
    picky = keras.Model(x, layers.Embedding(4, 8)(lookup(x)))
    with pytest.raises(
        ValueError, match=r"(?s)Give `sample_inputs` that it takes\..*num_oov_indices=0"
    ):
        export_sparse_saved_model(picky, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"(?s)cannot be called on the `sample_inputs` given: .*num_oov_indices=0"
    ):
        export_sparse_saved_model(picky, tmp_path / "made" / "out", sample_inputs=np.ones((1, 2)))
    assert not list(tmp_path.iterdir())  # Nor the folder above, which the last one needed.


@pytest.mark.parametrize(("bias", "error"), [([1, np.nan, 1, 1], 0.0), ([np.nan] * 4, None)])
def test_outputs_that_are_not_finite_are_warned_of(bias, error, tmp_path):
    model = dense()
    model.layers[-1].bias.assign(bias)
    count = 2 * np.isnan(bias).sum()
    with pytest.warns(UserWarning, match=f"{count} of 8 outputs of the model itself are NaN"):
        report = export_sparse_saved_model(model, tmp_path / "out")
    assert report.output_error == (error if error is None else pytest.approx(error, abs=1e-6))
    assert ("largest difference" in str(report)) == (error is not None)


def test_values_beyond_float16_are_refused(tmp_path):
    model = prune(dense())
    kernel = model.layers[0].kernel
    kernel.assign(np.where(np.eye(20, 30), 1e5, kernel))
    with pytest.raises(OverflowError, match="'dense/kernel' holds values up to 100000"):
        export_sparse_saved_model(model, tmp_path / "out", values="float16")
    export_sparse_saved_model(model, tmp_path / "out", values="bfloat16")


def test_an_older_export_is_replaced_and_other_folders_are_not(tmp_path):
    model = prune(dense())
    out = tmp_path / "served" / "1"
    export_sparse_saved_model(model, out)
    model.layers[0].bias.assign_add(keras.ops.ones(30))
    export_sparse_saved_model(model, out)
    x = np.ones((2, 20), "float32")
    loaded = tf.saved_model.load(str(out))
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-5, atol=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["1"]

    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    for path in (precious, precious / "thesis.txt"):
        with pytest.raises(FileExistsError, match="is no SavedModel folder"):
            export_sparse_saved_model(model, path)
    assert (precious / "thesis.txt").read_text() == "years"


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    for unit in (0.0, 1.0):
        model = dense()
        model.layers[-1].bias.assign([unit] * 4)
        export_sparse_saved_model(model, tmp_path / "link")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
        loaded = tf.saved_model.load(str(tmp_path / "real"))
        np.testing.assert_array_equal(loaded.serve(np.zeros((1, 20), "float32")), [[unit] * 4])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_sparse_saved_model(model, ".")
    assert (tmp_path / "here" / "saved_model.pb").is_file()


def test_what_appears_at_the_path_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    verify = saved_model.verify

    def slow(*args, **kwargs):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years")
        return verify(*args, **kwargs)

    monkeypatch.setattr(saved_model, "verify", slow)
    with pytest.raises(FileExistsError, match="is no SavedModel folder"):
        export_sparse_saved_model(dense(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("damage", ["weight", "output"])
def test_a_mismatch_raises_and_leaves_what_was_there(damage, old, tmp_path, monkeypatch):
    model = prune(dense())
    if old:
        export_sparse_saved_model(model, tmp_path / "out")
    before = contents(tmp_path)
    if damage == "weight":
        # An encoder that loses one value.
        encode = saved_model.encoding.encode

        def lossy(arrays, **kwargs):
            arrays = {name: np.array(array) for name, array in arrays.items()}
            arrays["dense/kernel"].ravel()[np.flatnonzero(arrays["dense/kernel"])[0]] = 0
            return encode(arrays, **kwargs)

        monkeypatch.setattr(saved_model.encoding, "encode", lossy)
        message = "Weight 'dense/kernel' does not come back"
    else:
        # A trace that computes something else than the model.
        values = saved_model.effective_values

        def wrong(model):
            return {name: value * 2 for name, value in values(model).items()}

        monkeypatch.setattr(saved_model, "effective_values", wrong)
        message = "Traced outputs differ from the model's by"
    with pytest.raises(RuntimeError, match=message):
        export_sparse_saved_model(model, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_crash_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    model = prune(dense())
    export_sparse_saved_model(model, tmp_path / "out")
    before = contents(tmp_path)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_model, "_compact", crash)
    with pytest.raises(KeyboardInterrupt):
        export_sparse_saved_model(model, tmp_path / "out")
    assert contents(tmp_path) == before


def test_the_folder_can_be_read_by_others(tmp_path):
    export_sparse_saved_model(dense(), tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
