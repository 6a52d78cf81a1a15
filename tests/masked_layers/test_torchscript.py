"""TorchScript files: what they compute, with PyTorch alone, and what is refused."""

import dataclasses
import functools
import json
import pickletools
import re
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from common import augmented
from masked_layers import _keras
from winning_kernels import let_win

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.once("torch"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

RNG = np.random.default_rng(0)


def pruned(model, sparsity=0.9):
    """Returns a masked model with random masks, and biases that are not zero."""
    model = ml.convert_to_masked(model)
    masks = {path: RNG.random(m.shape) >= sparsity for path, m in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    for variable in model.trainable_variables:
        if variable.name in ("bias", "beta"):
            variable.assign(RNG.normal(size=variable.shape))
    return model


@pytest.fixture
def sparse_wins(monkeypatch):
    """Lets every sparse kernel win, in either layout, so that files contain all of them."""
    choose = functools.partial(let_win, monkeypatch)
    choose("csr", "sparse")
    return choose


def attention():
    x = keras.Input((5, 16))
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x))
    y = layers.EinsumDense("...a,ab->...b", 12, bias_axes="b")(y)
    return keras.Model(x, layers.EinsumDense("abc,bcd->ad", 3)(y))


def strided():
    return keras.Sequential(
        [
            keras.Input((9, 8, 3)),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(6, 1, strides=2),
            layers.Conv2D(8, (2, 1), dilation_rate=(1, 2), padding="same"),
            layers.Conv2D(8, 2, groups=2),
            layers.DepthwiseConv2D(1),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


def lines():
    return keras.Sequential(
        [
            keras.Input((10, 4)),
            layers.Conv1D(8, 3, padding="causal", dilation_rate=2),
            layers.Conv1DTranspose(6, 3, strides=2),
            layers.Reshape((7, 3, 6, 1)),
            layers.Conv3D(2, (3, 2, 1)),
            layers.GlobalMaxPooling3D(),
        ]
    )


def recurrent():
    return keras.Sequential(
        [
            keras.Input((2, 6)),
            layers.Bidirectional(layers.LSTM(5, return_sequences=True)),
            layers.GRU(4),
        ]
    )


def words():
    words = keras.Input((6,), dtype="int32")
    embedding = layers.ReversibleEmbedding(20, 8)
    return keras.Model(words, embedding(embedding(words), reverse=True))


def several():
    a, b = keras.Input((4,), name="a"), keras.Input((6,), name="b")
    total = layers.Dense(3)(a) + layers.Dense(3)(b)
    return keras.Model({"a": a, "b": b}, {"sum": total, "other": layers.Dense(2)(a)})


def listed():
    a, b = keras.Input((4,)), keras.Input((6,))
    return keras.Model([a, b], [layers.Dense(3)(a) + layers.Dense(3)(b), layers.Dense(2)(a)])


MODELS = (attention, strided, lines, recurrent, words, several, listed)


def tensors(model, rows):
    def draw(spec):
        shape = (rows, *spec.shape[1:])
        if spec.dtype == "int32":
            return torch.from_numpy(RNG.integers(0, 20, shape).astype("int32"))
        return torch.from_numpy(RNG.normal(size=shape).astype("float32"))

    return keras.tree.map_structure(draw, _keras.input_specs(model))


def assert_equal_outputs(served, model, rows):
    inputs = tensors(model, rows)
    found, wanted = served(inputs), model(inputs)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
    pairs = zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True)
    for one, other in pairs:
        other = other.detach().numpy()
        scale = np.abs(other).max()
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("make", "kernel"),
    [*((make, "csr") for make in MODELS), (attention, "csr/32"), (strided, "csr/32")],
)
def test_sparse_kernels_compute_what_the_model_does(make, kernel, sparse_wins, tmp_path):
    model = pruned(make())
    sparse_wins(kernel, "sparse, rows first" if kernel == "csr/32" else "sparse")
    report = ml.export_sparse_torch(model, tmp_path / "model.pt", batch_size=2)
    kernels = {row.kernel for row in report if row.site}
    assert kernels == {kernel}
    assert report.output_error < 1e-5
    served = torch.jit.load(tmp_path / "model.pt")
    modules = [module.original_name for module in served.modules()]
    assert sum(name.startswith("Sparse") for name in modules) == sum(bool(r.site) for r in report)
    for rows in (1, 3, 40):  # In blocks of 32 columns, too.
        assert_equal_outputs(served, model, rows)


def test_every_layer_with_a_sparse_form_has_a_row(monkeypatch, tmp_path):
    from masked_layers.torchscript import timing

    monkeypatch.setattr(timing, "fastest", lambda seconds, gain=1.0: "dense")
    monkeypatch.setitem(timing._LIMITS, "rounds", (1, 1))
    sites = {}
    for make in (attention, strided, lines, recurrent, words):
        report = ml.export_sparse_torch(pruned(make()), tmp_path / "model.pt")
        for row in report:
            sites.setdefault(make, []).append(row.site.rpartition(":")[2])
    assert sites[attention].count("einsum") == 6
    assert sites[strided].count("conv2d") == 3  # Not those with groups.
    assert {"conv1d", "conv3d"} <= set(sites[lines])
    assert sites[recurrent].count("matmul") == 6
    assert sorted(sites[words]) == ["", "matmul"]  # The gathered rows are dense.


def test_a_dense_file_is_stored_without_zeros(monkeypatch, tmp_path):
    from masked_layers.torchscript import timing

    monkeypatch.setattr(timing, "fastest", lambda seconds, gain=1.0: "dense")
    model = keras.Sequential([keras.Input((64,)), layers.Dense(256), layers.Dense(256)])
    model = pruned(model, 0.95)
    report = ml.export_sparse_torch(model, tmp_path / "model.pt", batch_size=np.int64(2))
    assert {row.kernel for row in report} == {"dense"}
    assert report.dense_nbytes > 9 * sum(row.nbytes for row in report if row.site)
    assert_equal_outputs(torch.jit.load(tmp_path / "model.pt"), model, 3)


def test_a_file_at_95_percent_takes_a_ninth(sparse_wins, tmp_path):
    model = keras.Sequential([keras.Input((512,)), layers.Dense(512), layers.Dense(512)])
    report = ml.export_sparse_torch(pruned(model, 0.95), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size == report.file_nbytes < report.dense_nbytes / 9


ALONE = """
import sys
import zipfile
for name in ("keras", "numpy", "masked_layers", "tensorflow"):
    sys.modules[name] = None
import torch
served = torch.jit.load("model.pt")
torch.jit.save(served, "again.pt")
inputs, wanted = torch.load("case.pt")
for name in ("model.pt", "again.pt"):
    found = torch.jit.load(name)(inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
"""


def test_pytorch_alone_runs_a_file_and_saves_it_again(sparse_wins, tmp_path):
    model = pruned(strided(), 0.8)
    ml.export_sparse_torch(model, tmp_path / "model.pt")
    inputs = tensors(model, 3)
    torch.save((inputs, model(inputs).detach()), tmp_path / "case.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def program_in(path):
    """Returns the code and data of a TorchScript file, without the numbers of its classes."""

    def plain(text):
        return re.sub(r"[./]___torch_mangle_\d+", "", text) if isinstance(text, str) else text

    entries = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith(".pkl"):
                parts = [(op.name, plain(value)) for op, value, _ in pickletools.genops(data)]
                entries[plain(name)] = parts
            elif name.endswith(".py"):
                entries[plain(name)] = plain(data.decode())
            elif not name.endswith((".debug_pkl", "serialization_id")):
                entries[plain(name)] = data
    return entries


def test_kernels_are_measured_and_exports_can_be_repeated(tmp_path):
    from masked_layers.torchscript.report import TorchReport

    model = pruned(keras.Sequential([keras.Input((512,)), layers.Dense(512)]), 0.99)
    path = tmp_path / "deep" / "model.pt"
    first = ml.export_sparse_torch(model, path, batch_size=16, threads=1)
    (row,) = (row for row in first if row.site)
    assert set(row.seconds) == {"dense", "csr", "csr/32"}
    assert min(row.seconds.values()) > 0
    if first.program != "dense":
        assert first.gain > 1
        assert set(first.programs) == {"dense", "sparse", "sparse, rows first"}
    beside = path.with_name("model.pt.json")
    assert TorchReport.from_json(beside.read_bytes()) == first
    other = dataclasses.replace(row, kernel="csr/64")
    for wrong in ({"rows": (other,)}, {"programs": {"dense": 1.0}, "program": "sparse"}):
        with pytest.raises(ValueError, match=r"lacks times|times of only"):
            TorchReport.from_json(dataclasses.replace(first, **wrong).to_json())
    content = program_in(path)
    second = ml.export_sparse_torch(model, path, batch_size=16, threads=1, timings=beside)
    # TorchScript numbers its classes within the process, and a number may have another digit.
    assert second.file_nbytes == path.stat().st_size
    assert dataclasses.replace(second, file_nbytes=first.file_nbytes) == first
    assert program_in(path) == content
    for text in ("batch size 16, threads: 1", "dense/kernel:matmul", "98.9"):
        assert text in str(first)


def test_what_fails_leaves_the_file_unchanged(monkeypatch, tmp_path):
    model = pruned(keras.Sequential([keras.Input((8,)), layers.Dense(8)]))
    path = tmp_path / "model.pt"
    path.write_bytes(b"mine")
    other = tmp_path / "other.json"
    ml.export_sparse_torch(model, tmp_path / "other.pt")
    (tmp_path / "other.pt.json").rename(other)
    wider = pruned(keras.Sequential([keras.Input((8,)), layers.Dense(8, name="wide")]))
    with pytest.raises(ValueError, match=r"no times of \['wide/kernel:matmul'\]"):
        ml.export_sparse_torch(wider, path, timings=other)
    other.write_text(json.dumps({"rows": 3}))
    with pytest.raises(ValueError, match=r"other.json.*Not a report"):
        ml.export_sparse_torch(model, path, timings=other)
    other.write_bytes(b"PK" + bytes(range(256)) * 1000)
    with pytest.raises(ValueError, match=r"Not a report.*UnicodeDecodeError") as caught:
        ml.export_sparse_torch(model, path, timings=other)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ValueError, match=r"`batch_size` must be a positive integer.*0"):
        ml.export_sparse_torch(model, path, batch_size=0)
    with pytest.raises(ValueError, match="does not fit"):
        ml.export_sparse_torch(model, path, sample_inputs=np.zeros((2, 9)))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        ml.export_sparse_torch(model, tmp_path)
    with pytest.raises(TypeError, match=r"keras\.Model"):
        ml.export_sparse_torch(layers.Dense(1), path)
    from masked_layers.torchscript import program

    monkeypatch.setattr(program, "relative_difference", lambda one, other: 0.5)
    with pytest.raises(RuntimeError, match="Outputs of the file differ"):
        ml.export_sparse_torch(model, path)
    assert path.read_bytes() == b"mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.pt",
        "other.json",
        "other.pt",
    ]


def test_models_that_change_their_variables_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((3, 4), batch_size=2), layers.GRU(4, stateful=True)])
    with pytest.raises(NotImplementedError, match="changes 1 of its variables"):
        ml.export_sparse_torch(model, tmp_path / "model.pt")


def test_outputs_that_torchscript_cannot_hold_are_refused(tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, {"a": [layers.Dense(2)(x), layers.Dense(2)(x)], "b": layers.Dense(1)(x)})
    with pytest.raises(NotImplementedError, match="PyTorch cannot record"):
        ml.export_sparse_torch(model, tmp_path / "model.pt")


def test_layers_that_train_by_default_are_exported_in_inference(tmp_path):
    model = augmented()
    ml.export_sparse_torch(model, tmp_path / "model.pt")
    x = np.random.default_rng(0).random((2, 8, 8, 3), "float32")
    got = torch.jit.load(tmp_path / "model.pt")(torch.from_numpy(x))
    np.testing.assert_allclose(got.numpy(), model.predict(x, verbose=0), atol=1e-6)


@pytest.mark.parametrize("function", ["broadcast_to", "repeat"])
def test_a_weight_that_is_repeated_for_each_row_keeps_the_batch_free(function, tmp_path):
    class Token(layers.Layer):
        def build(self, shape):
            self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="ones")

        def call(self, x):
            batch = keras.ops.shape(x)[0]
            if function == "repeat":
                token = keras.ops.repeat(self.token, batch, axis=0)
            else:
                token = keras.ops.broadcast_to(self.token, (batch, 1, x.shape[-1]))
            return keras.ops.concatenate([token, x], 1)

    model = keras.Sequential([keras.Input((3, 4)), Token(), layers.Dense(2)])
    ml.export_sparse_torch(model, tmp_path / "model.pt")
    assert_equal_outputs(torch.jit.load(tmp_path / "model.pt"), model, 5)


def test_fixed_lengths_are_said_and_others_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((None, 4)), layers.LSTM(3)])
    with pytest.warns(UserWarning, match=r"only inputs of the shapes \[\(7, 4\)\]"):
        ml.export_sparse_torch(model, tmp_path / "model.pt", sample_inputs=np.ones((2, 7, 4)))
    loaded = torch.jit.load(tmp_path / "model.pt")
    x = RNG.normal(size=(3, 7, 4)).astype("float32")
    wanted = model.predict(x, verbose=0)
    np.testing.assert_allclose(loaded(torch.from_numpy(x)).numpy(), wanted, atol=1e-5)
    for steps in (6, 8):
        with pytest.raises(torch.jit.Error, match=rf"shape \[7, 4\].*Received: \[{steps}, 4\]"):
            loaded(torch.ones(3, steps, 4))


def test_channels_are_removed_first_if_asked(tmp_path):
    model = ml.convert_to_masked(
        keras.Sequential([keras.Input((8,)), layers.Dense(64), layers.Dense(64), layers.Dense(4)])
    )
    masks = ml.get_masks(model)
    masks["dense/kernel"][:, 16:] = False
    ml.set_masks(model, masks)
    report = ml.export_sparse_torch(model, tmp_path / "model.pt", shrink=True)
    assert {row.path: row.shape for row in report if row.site == ""}["dense/kernel"] == (8, 16)
    assert_equal_outputs(torch.jit.load(tmp_path / "model.pt"), model, 3)
