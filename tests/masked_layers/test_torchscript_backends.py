"""TorchScript files from other backends, for which a new process is started."""

import importlib.util
import sys

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml

pytestmark = pytest.mark.once
RNG = np.random.default_rng(0)
INSTALLED = importlib.util.find_spec("torch") is not None


def model(dtype=None):
    a, b = keras.Input((4,), name="a"), keras.Input((6, 6, 2), name="b")
    x = layers.Conv2D(5, 3, activation="relu")(b)
    y = layers.concatenate([layers.Dense(8, dtype=dtype)(a), layers.GlobalAveragePooling2D()(x)])
    found = ml.convert_to_masked(
        keras.Model({"a": a, "b": b}, {"y": layers.Dense(3, dtype=dtype)(y)})
    )
    masks = {path: RNG.random(mask.shape) < 0.3 for path, mask in ml.get_masks(found).items()}
    ml.set_masks(found, masks)
    return found


@pytest.mark.skipif(not INSTALLED, reason="requires PyTorch")
def test_a_model_is_moved_to_torch(tmp_path):
    # Also outputs of a dtype that NumPy lacks.
    report = ml.export_sparse_torch(model("mixed_bfloat16"), tmp_path / "model.pt")
    assert report.output_error < 0.02
    report = ml.export_sparse_torch(model(), tmp_path / "model.pt", threads=1)
    assert report.output_error < 1e-5
    assert {row.site for row in report} >= {"dense/kernel:matmul", "conv2d/kernel:conv2d"}
    assert (tmp_path / "model.pt").stat().st_size == report.file_nbytes
    assert (tmp_path / "model.pt.json").read_bytes() == report.to_json()


@pytest.mark.skipif(not INSTALLED, reason="requires PyTorch")
def test_errors_of_the_other_process_are_raised(tmp_path):
    first = ml.TorchReport((), {}, "dense", 1, 1, 0, 0, 0.0)
    with pytest.raises(ValueError, match=r"no times of \['conv2d/kernel:conv2d', 'dense/kernel"):
        ml.export_sparse_torch(model(), tmp_path / "model.pt", timings=first)
    assert not list(tmp_path.iterdir())


def test_without_torch_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lottery-ticket-pruner\[torch\]"):
        ml.export_sparse_torch(model(), tmp_path / "model.pt")
