"""ONNX files with sparse kernels."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from masked_layers.onnx_files import _steps

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.once


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
    expected = model.predict(x, verbose=0)
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
    expected = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", *inputs), expected, rtol=1e-4, atol=1e-5)


def test_errors_leave_the_file_as_it_is(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"earlier")
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        ml.export_sparse_onnx("model", tmp_path / "m.onnx")
    model = ml.convert_to_masked(
        keras.Sequential([keras.Input((4,)), layers.Dense(3)]), mask="bernoulli"
    )
    with pytest.raises(ValueError, match="learned"):
        ml.export_sparse_onnx(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"earlier"


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
