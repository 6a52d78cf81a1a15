"""ONNX files with sparse kernels."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from common import augmented
from masked_layers import onnx_files
from masked_layers.onnx_files import _steps

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.once
INSTALLED = importlib.util.find_spec("jax2onnx") is not None


def pruned(model, sparsity):
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    ml.set_masks(
        model, {p: rng.random(m.shape) >= sparsity for p, m in ml.get_masks(model).items()}
    )
    return model


def run(path, *inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [source.name for source in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def test_an_mlp_is_over_eleven_times_smaller_with_the_same_outputs(tmp_path):
    pytest.importorskip("tf2onnx")
    model = pruned(
        keras.Sequential(
            [keras.Input((784,)), layers.Dense(300, "relu"), layers.Dense(100), layers.Dense(10)]
        ),
        0.95,
    )
    x = np.random.default_rng(1).normal(size=(5, 784)).astype("float32")
    expected = model.predict_on_batch(x)
    report = ml.export_sparse_onnx(model, tmp_path / "sparse.onnx")
    ml.strip_masks(model).export(tmp_path / "dense.onnx", format="onnx", verbose=False)
    size, dense = ((tmp_path / f"{n}.onnx").stat().st_size for n in ("sparse", "dense"))
    assert size < dense / 11
    assert report.disk_nbytes == size
    kept = sum(int(mask.sum()) for mask in ml.get_masks(model).values())
    assert sum(row.alive for row in report if len(row.shape) == 2) == kept
    outputs = run(tmp_path / "sparse.onnx", x)
    assert outputs.tobytes() == run(tmp_path / "dense.onnx", x).tobytes()
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_convolutions_and_several_inputs(tmp_path):
    pytest.importorskip("tf2onnx")
    image, vector = keras.Input((12, 12, 3)), keras.Input((4,))
    x = layers.BatchNormalization()(layers.Conv2D(32, 3, activation="relu")(image))
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.Dense(64)(vector)])
    model = pruned(keras.Model([image, vector], layers.Dense(5)(x)), 0.9)
    report = ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    assert {len(row.shape) for row in report if row.encoding == "sparse"} >= {4}
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(3, *x.shape[1:])).astype("float32") for x in model.inputs]
    expected = model.predict_on_batch(inputs)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", *inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.once("tensorflow", "torch")  # On JAX, Keras' exporter does this itself.
def test_layers_that_train_by_default_are_exported_in_inference(tmp_path):
    if keras.backend.backend() == "tensorflow":
        pytest.importorskip("tf2onnx")
    model = augmented()
    ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    x = np.random.default_rng(0).random((2, 8, 8, 3), "float32")
    expected = model.predict_on_batch(x)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), expected, rtol=1e-4, atol=1e-5)


def test_int8_keeps_weights_that_were_trained_for_it_and_rounds_others(tmp_path, monkeypatch):
    pytest.importorskip("tf2onnx")
    image = keras.Input((8, 8, 8))
    features = layers.Flatten()(layers.Conv2D(32, 3)(image))
    model = keras.Model(image, layers.Dense(10)(features))
    model = pruned(ml.convert_to_masked(model, quantize="int8"), 0.8)
    x = np.random.default_rng(1).normal(size=(5, 8, 8, 8)).astype("float32")
    expected = model.predict_on_batch(x)
    report = ml.export_sparse_onnx(model, tmp_path / "int8.onnx", values="int8", sample_inputs=x)
    assert report.disk_nbytes == (tmp_path / "int8.onnx").stat().st_size
    assert report.disk_nbytes < report.dense_nbytes * 0.2
    assert report.output_error < 1e-5
    np.testing.assert_allclose(run(tmp_path / "int8.onnx", x), expected, rtol=1e-4, atol=1e-5)
    kept = [np.count_nonzero(w) for w in ml.strip_masks(model).get_weights() if w.ndim > 1]
    rows = [row for row in report if row.dtype == "int8"]
    assert sorted(row.alive for row in rows) == sorted(kept)
    plain = ml.strip_masks(model)
    noise = np.random.default_rng(2).normal(size=(32 * 36, 10)) * 0.01
    plain.layers[-1].kernel.assign_add(noise)
    out = tmp_path / "rounded.onnx"
    dense = onnx_files._dense_file(plain)  # Which takes most of the time.
    monkeypatch.setattr(onnx_files, "_dense_file", lambda model: dense)
    with pytest.raises(RuntimeError, match=r"values='int8'.* but `tolerance` is 1e-07"):
        ml.export_sparse_onnx(plain, out, values="int8", tolerance=1e-7)
    assert not out.exists()
    report = ml.export_sparse_onnx(plain, out, values="int8", tolerance=0.1, sample_inputs=x)
    wanted = plain.predict_on_batch(x)
    error = np.abs(run(out, x) - wanted).max() / np.abs(wanted).max()
    assert 0 < report.output_error < 0.1
    np.testing.assert_allclose(error, report.output_error, rtol=0.2)
    for wrong in ({"values": "codebook"}, {"tolerance": -1}):
        with pytest.raises(ValueError, match="must be"):
            ml.export_sparse_onnx(plain, out, **wrong)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_codes_are_found_whichever_axis_an_exporter_gives_their_scales(axis):
    from onnx import numpy_helper

    rng = np.random.default_rng(3)
    codes = rng.integers(-7, 8, (20, 30, 40)).astype("float32")
    codes[0, 0] = 7
    array = np.moveaxis(codes * rng.uniform(0.5, 2, 40).astype("float32"), -1, axis)
    stored = onnx_files._stored(numpy_helper.from_array(array, "kernel"), "int8")
    assert stored.content.dtype == np.int8
    np.testing.assert_array_equal(stored.values, array)


def test_errors_leave_the_file_as_it_is(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"earlier")
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        ml.export_sparse_onnx("model", tmp_path / "m.onnx")
    model = ml.convert_to_masked(
        keras.Sequential([keras.Input((4,)), layers.Dense(3)]), mask="bernoulli"
    )
    with pytest.raises(ValueError, match="learned"):
        ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    model = ml.harden(model)
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "missing" / "m.onnx", FileNotFoundError),
    ):
        with pytest.raises(error, match=r"Expected the path of a file|Create it first"):
            ml.export_sparse_onnx(model, path)
    assert (tmp_path / "m.onnx").read_bytes() == b"earlier"


def test_what_onnx_cannot_do_is_refused(tmp_path):
    pytest.importorskip("tf2onnx")
    inputs = keras.Input((5, 6), batch_size=2)
    stateful = keras.Model(inputs, layers.LSTM(4, stateful=True)(inputs))
    words = layers.TextVectorization(5, output_sequence_length=3, vocabulary=["red", "green"])
    texts = keras.Sequential(
        [keras.Input((), dtype="string"), words, layers.Embedding(5, 4), layers.Flatten()]
    )
    for model, message in (
        (stateful, "changes 2 of its variables.*export_sparse_saved_model"),
        (texts, "Keras on tensorflow cannot export.*RegexReplace.*Another backend may"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_of_keras_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("tf2onnx")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model(np.zeros((1, 4)))  # Keras exports only models that were called.
    model.export(tmp_path / "other.onnx", format="onnx", verbose=False)
    other = (tmp_path / "other.onnx").read_bytes()
    model.layers[0].kernel.assign(2 * model.layers[0].kernel)
    monkeypatch.setattr(keras.Model, "export", lambda self, file, **kwargs: file.write_bytes(other))
    with pytest.raises(RuntimeError, match=r"Keras on tensorflow exports differ .* by 0\.5 of"):
        ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.once("torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_lengths_that_keras_on_torch_fixes_are_noticed(tmp_path):
    x = np.random.default_rng(1).normal(size=(3, 5, 6)).astype("float32")
    for length, fixed in ((5, True), (None, False)):
        model = pruned(keras.Sequential([keras.Input((length, 6)), layers.GRU(16)]), 0.8)
        if fixed:
            ml.export_sparse_onnx(model, tmp_path / "m.onnx")
            expected = keras.ops.convert_to_numpy(model(x))
            np.testing.assert_allclose(run(tmp_path / "m.onnx", x), expected, atol=1e-5)
            continue
        with pytest.raises(RuntimeError, match="fixed a length that the model leaves free"):
            ml.export_sparse_onnx(model, tmp_path / "m.onnx", sample_inputs=x)


@pytest.mark.once("jax")
def test_models_on_jax(tmp_path):
    pytest.importorskip("jax2onnx")
    image, vector = keras.Input((8, 8, 3), name="image"), keras.Input((40,), name="vector")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(32, 3, activation="relu")(image))
    x = layers.Concatenate()([x, layers.Dense(40)(vector)])
    model = pruned(keras.Model({"image": image, "vector": vector}, layers.Dense(5)(x)), 0.9)
    report = ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    assert {len(row.shape) for row in report if row.encoding == "sparse"} == {2, 4}
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(3, *x.shape[1:])).astype("float32") for x in (image, vector)]
    expected = model.predict_on_batch(dict(zip(("image", "vector"), inputs, strict=True)))
    np.testing.assert_allclose(run(tmp_path / "m.onnx", *inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.once("jax")
@pytest.mark.skipif(INSTALLED, reason="requires that jax2onnx is missing")
def test_without_the_exporter_the_error_says_what_to_install(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    with pytest.raises(ImportError, match=r"jax2onnx.*pip install"):
        ml.export_sparse_onnx(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("gaps", [[0], [254, 255, 256, 0], [509, 510, 511, 1020], []])
def test_steps_against_one_by_one_decoding(gaps):
    positions = np.cumsum(np.array(gaps, int) + 1) - 1
    flat = np.zeros(5000, "float32")
    flat[positions] = np.arange(1, len(gaps) + 1)
    steps, values = _steps(flat, positions)
    decoded, at = np.zeros(5000, "float32"), -1
    for step, value in zip(steps.tolist(), values, strict=True):
        at += step
        decoded[at] = value
    np.testing.assert_array_equal(decoded, flat)
