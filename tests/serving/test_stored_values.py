"""Rounded values and codes in a sparse SavedModel: what is restored, measured and refused."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from masked_layers.serving import StorageReport, export_sparse_saved_model, inspect
from masked_layers.serving.encoding import decode
from masked_layers.serving.stored_values import CHOICES
from served import contents, convolutional, dense, prune

tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
    ),
    # Keras 3.15 with NumPy 2.4, wherever a variable becomes an array.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


def served(folder, x):
    loaded = tf.saved_model.load(str(folder))  # Its variables live only as long as it does.
    return loaded.serve(x).numpy()


def wide():
    """A model whose weights have more values than any codebook."""
    return keras.Sequential(
        [keras.Input((64,)), layers.Dense(96, activation="relu"), layers.Dense(8)]
    )


def mixed():
    """A model with a full kernel, equal shapes, a recurrent layer and an embedding."""
    x = keras.Input((6,), dtype="int32", name="x")
    y = layers.Embedding(50, 24)(x)
    y = layers.LSTM(16)(y)
    y = layers.Dense(40, activation="relu", name="a")(y)
    y = layers.Dense(40, activation="relu", name="b")(y)
    y = layers.Dense(40, activation="relu", name="c")(y)
    return keras.Model(x, layers.Dense(30, name="full")(y))


MODELS = {"dense": dense, "convolutional": convolutional, "mixed": mixed}


@pytest.mark.parametrize(
    ("make", "values"),
    [
        *(pytest.param("mixed", v, marks=pytest.mark.slow) for v in ("int8", "codebook-2")),
        # What differs is the kernel alone, so one code each.
        *(("mixed", "codebook-5"), ("dense", "int8"), ("convolutional", "codebook-2")),
    ],
)
def test_codes_are_decoded_at_loading(make, values, tmp_path):
    keras.utils.set_random_seed(0)
    model = prune(MODELS[make](), 0.7)
    if make == "mixed":
        rng = np.random.default_rng(0)
        model.get_layer("full").kernel.assign(rng.random((40, 30)) + 0.1)
        model.get_layer("full").bias.assign(rng.standard_normal(30))
    report = export_sparse_saved_model(model, tmp_path / "out", values=values)
    packed = decode((tmp_path / "out" / "assets" / "weights.mlsp").read_bytes())
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    coded = 0
    for row, variable in zip(report, loaded.variables, strict=True):
        (ref,) = [ref for ref in ml.weight_refs(model) if ref.path == row.path] or [None]
        if row.path in packed:
            np.testing.assert_array_equal(variable, packed[row.path])
        if ref is not None:
            exact = np.array(ref.variable)
            assert not variable.numpy()[exact == 0].any()
            if row.dtype == "bfloat16":
                np.testing.assert_array_equal(
                    variable, tf.cast(tf.cast(exact, row.dtype), "float32")
                )
            elif "float" in row.dtype:
                np.testing.assert_array_equal(variable, exact)
            else:
                coded += 1
                assert (variable.numpy() != exact).any()
                assert np.corrcoef(variable.numpy().ravel(), exact.ravel())[0, 1] > 0.9
    assert coded >= 1
    assert {row.dtype for row in report} <= {"float32", "int8", *CHOICES}
    for row in report:
        if len(row.shape) < 2:  # Other vectors are zeros and ones, or statistics.
            rounded = values != "int8" and row.path == "full/bias"
            assert row.dtype == ("bfloat16" if rounded else "float32"), row.path
    assert inspect(tmp_path / "out") == report


@pytest.mark.parametrize("values", ["bfloat16", "codebook-3"])
def test_the_error_is_measured_on_the_samples_and_said(values, tmp_path):
    model = prune(dense(), 0.5)
    x = np.random.default_rng(5).standard_normal((7, 20)).astype("float32")
    report = export_sparse_saved_model(model, tmp_path / "out", values=values, sample_inputs=x)
    wanted = model.predict_on_batch(x)
    got = served(tmp_path / "out", x)
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert report.output_error == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 0.5
    assert f"values are not exact: rounded with values='{values}'" in str(report)
    assert StorageReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "values",
    [
        "int8",
        "codebook",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("float16", "codebook-4")),
    ],
)
def test_a_tolerance_that_is_exceeded_fails_and_keeps_the_existing_folder(values, tmp_path):
    model = prune(wide(), 0.5)
    for name in ("new", "old"):
        path = tmp_path / name / "out"
        if name == "old":
            export_sparse_saved_model(model, path)
        before = contents(tmp_path)
        with pytest.raises(RuntimeError, match=r"is [\d.e-]+ of the largest output.*tolerance"):
            export_sparse_saved_model(model, path, values=values, tolerance=1e-6)
        assert contents(tmp_path) == before
    report = export_sparse_saved_model(model, tmp_path / "fits", values=values, tolerance=0.2)
    assert report.output_error <= 0.2


def test_bits_are_chosen_for_each_weight_to_meet_the_tolerance(tmp_path):
    keras.utils.set_random_seed(0)
    model = prune(
        keras.Sequential(
            [
                keras.Input((64,)),
                layers.Dense(64, activation="relu", name="first"),
                layers.Dense(64, activation="relu", name="second"),
                layers.Dense(32, name="last"),
            ]
        ),
        0.5,
    )
    x = np.random.default_rng(0).standard_normal((16, 64)).astype("float32")
    sizes, chosen = [], []
    for tolerance in (0.3, 0.006):
        path = tmp_path / str(tolerance)
        report = export_sparse_saved_model(
            model, path, values="codebook", tolerance=tolerance, sample_inputs=x
        )
        assert 0 < report.output_error <= tolerance
        bits = [int(row.dtype.removeprefix("codebook-")) for row in report if len(row.shape) > 1]
        sizes.append(report.nbytes)
        chosen.append(bits)
        # One bit less everywhere is too little, unless there is none.
        if min(bits) > 2:
            fewer = f"codebook-{max(bits) - 1}"
            with pytest.raises(RuntimeError, match="tolerance"):
                export_sparse_saved_model(
                    model, path, values=fewer, tolerance=tolerance, sample_inputs=x
                )
    assert sizes == sorted(sizes)
    assert sum(chosen[0]) < sum(chosen[1])
    # The variables of the traced function got their exact values back.
    assert export_sparse_saved_model(model, tmp_path / "exact", sample_inputs=x).output_error == 0


def test_vectors_stay_exact_where_the_tolerance_needs_it(tmp_path):
    model = keras.Sequential([keras.Input((32,)), layers.Dense(32, name="d")])
    rng = np.random.default_rng(0)
    kernel = rng.choice([0.0, 0.5, -0.25], (32, 32), p=[0.8, 0.1, 0.1])
    model.set_weights([kernel, rng.standard_normal(32)])
    for tolerance, dtype in ((0.05, "bfloat16"), (1e-5, "float32")):
        path = tmp_path / dtype
        report = export_sparse_saved_model(model, path, values="codebook", tolerance=tolerance)
        assert [row.dtype for row in report] == ["codebook-2", dtype]
        assert report.output_error <= tolerance


def test_states_are_the_same_in_every_measurement(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input(batch_shape=(2, 3, 4)), layers.LSTM(24, stateful=True), layers.Dense(16)]
    )
    report = export_sparse_saved_model(
        prune(model, 0.3), tmp_path / "out", values="codebook", tolerance=0.2, include="kernel"
    )
    assert 0 < report.output_error <= 0.2


def test_negative_zeros_of_dense_weights_become_zeros(tmp_path):
    model = keras.Sequential([keras.Input((150,)), layers.Dense(150)])
    kernel = np.random.default_rng(0).standard_normal((150, 150)).astype("float32")
    kernel[3, 4] = -0.0
    model.layers[0].kernel.assign(kernel)
    report = export_sparse_saved_model(model, tmp_path / "out")
    assert report.rows[0].encoding == "dense"
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    assert not np.signbit(loaded.variables[0].numpy()[3, 4])
    np.testing.assert_array_equal(loaded.variables[0], kernel)


def test_include_leaves_weights_exact(tmp_path):
    model = prune(mixed(), 0.5)
    report = export_sparse_saved_model(model, tmp_path / "out", values="int8", include="^[ab]/")
    coded = {row.path for row in report if row.dtype == "int8"}
    assert coded == {"a/kernel", "b/kernel"}


@pytest.mark.parametrize("values", ["int8", "codebook"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_without_codes_are_refused(values, value, tmp_path):
    model = prune(dense(), 0.5)
    kernel = np.array(model.layers[0].kernel)
    kernel[0, 0] = value
    model.layers[0].kernel.assign(kernel)
    with pytest.raises(OverflowError, match="'dense/kernel' has values that are not finite"):
        export_sparse_saved_model(model, tmp_path / "out", values=values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "dtype"), [("int8", "float16"), ("codebook-5", "bfloat16"), ("int8", "float64")]
)
def test_weights_of_other_dtypes_are_coded(values, dtype, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((50,)), layers.Dense(60, dtype=dtype)])
    report = export_sparse_saved_model(prune(model), tmp_path / "out", values=values)
    assert report.rows[0].dtype == values
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    variable = loaded.variables[0]
    assert variable.dtype.name == dtype
    assert report.output_error < 0.2


def test_rounding_beyond_the_range_of_the_weight_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((50,)), layers.Dense(60, dtype="float16")])
    kernel = np.full((50, 60), 3.0)
    kernel[:25] = 65504
    model.layers[0].kernel.assign(kernel)
    with pytest.raises(OverflowError, match="leaves the range of float16"):
        export_sparse_saved_model(model, tmp_path / "out", values="int8")


@pytest.mark.parametrize("tolerance", [0, -1, "x", True, float("nan")])
def test_tolerances_are_numbers_above_zero(tolerance, tmp_path):
    with pytest.raises(ValueError, match="`tolerance` must be a number above 0"):
        export_sparse_saved_model(dense(), tmp_path / "out", tolerance=tolerance)


def test_exports_of_one_model_share_nothing_in_one_session(tmp_path):
    """The v1 loader takes variables of the same name for the same variable."""
    model = prune(dense())
    x = np.random.default_rng(0).standard_normal((2, 20)).astype("float32")
    wanted, got = {}, {}
    for values in ("float32", "bfloat16", "int8", "codebook-2"):
        export_sparse_saved_model(model, tmp_path / values, values=values)
        wanted[values] = served(tmp_path / values, x)
    for tolerance in (0.4, 0.02):
        name = str(tolerance)
        export_sparse_saved_model(
            model, tmp_path / name, values="codebook", tolerance=tolerance, sample_inputs=x
        )
        wanted[name] = served(tmp_path / name, x)
    assert len({outputs.tobytes() for outputs in wanted.values()}) == len(wanted)
    load = tf.compat.v1.saved_model.loader.load
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ends = {
            name: load(session, ["serve"], str(tmp_path / name), import_scope=f"scope{i}")
            for i, name in enumerate(wanted)
        }
        for i, (name, meta) in enumerate(ends.items()):
            signature = meta.signature_def["serve"]
            feed = {f"scope{i}/{signature.inputs['x'].name}": x}
            got[name] = session.run(f"scope{i}/{signature.outputs['output_0'].name}", feed)
    for name, outputs in wanted.items():
        np.testing.assert_allclose(got[name], outputs, rtol=1e-5, atol=1e-6)
