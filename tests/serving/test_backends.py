"""Exports from other backends: models that Keras can trace are exported, others are refused."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from masked_layers.serving import export_sparse_saved_model


def installed(*names):
    return all(importlib.util.find_spec(name) is not None for name in names)


def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


JAX = """
import keras, numpy as np, masked_layers as ml
from masked_layers.serving import export_sparse_saved_model

assert keras.backend.backend() == "jax"
a, b = keras.Input((None, 12), name="a"), keras.Input((8,), name="b")
x = keras.layers.LSTM(48)(a)
x = keras.layers.Dropout(0.5)(keras.layers.concatenate([x, keras.layers.Dense(24)(b)]))
model = keras.Model({"a": a, "b": b}, {"y": keras.layers.Dense(5)(x)})
model = ml.convert_to_masked(model)
rng = np.random.default_rng(0)
ml.set_masks(model, {path: rng.random(m.shape) < 0.1 for path, m in ml.get_masks(model).items()})
report = export_sparse_saved_model(model, "out")
assert report.sparsity > 0.8 and report.output_error == 0.0, report
coded = export_sparse_saved_model(model, "codebook", values="codebook", tolerance=0.1)
assert 0 < coded.output_error < 0.1 and coded.nbytes < report.nbytes, coded
wanted = {}
for batch in (1, 4):
    inputs = {
        "a": rng.standard_normal((batch, 5 + batch, 12)).astype("float32"),
        "b": rng.standard_normal((batch, 8)).astype("float32"),
    }
    y = keras.ops.convert_to_numpy(model(inputs)["y"])
    np.savez(f"{batch}.npz", wanted=y, **inputs)
"""


@pytest.mark.once  # It starts its own process.
@pytest.mark.skipif(not installed("jax", "tensorflow"), reason="needs JAX and TensorFlow")
def test_jax_exports_what_tensorflow_runs(tmp_path):
    """That TensorFlow alone is enough, without Keras and JAX, is tested with its own exports."""
    import tensorflow as tf

    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", JAX],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    for batch in (1, 4):
        data = dict(np.load(tmp_path / f"{batch}.npz"))
        wanted = data.pop("wanted")
        np.testing.assert_allclose(loaded.serve(data)["y"], wanted, rtol=1e-5, atol=1e-6)
        got = loaded.signatures["serving_default"](**{k: tf.constant(v) for k, v in data.items()})
        np.testing.assert_allclose(got["y"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="is about the torch backend")
def test_errors_on_torch_say_what_to_do(tmp_path):
    with pytest.raises(NotImplementedError, match=r"strip_masks.*KERAS_BACKEND=tensorflow"):
        export_sparse_saved_model(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="is about the JAX backend")
def test_a_missing_tensorflow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="pip install tensorflow"):
        export_sparse_saved_model(model(), tmp_path / "out")
