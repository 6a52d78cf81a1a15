"""Paths, reading and setting masks, files of masks, the sparsity report."""

import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers

import masked_layers as ml


def net():
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(2, 3, name="stem"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(5),
            layers.Dense(3),
        ]
    )


def masked_net():
    return ml.convert_to_masked(net())


PATHS = ["stem/kernel", "dense/kernel", "dense_1/kernel"]


@pytest.mark.once
def test_paths_do_not_depend_on_what_was_built_before():
    layers.Dense(1), layers.Dense(1)
    first, second = net(), net()
    assert [ref.path for ref in ml.weight_refs(first)] == PATHS
    assert [ref.path for ref in ml.weight_refs(second)] == PATHS
    assert [ref.path for ref in ml.weight_refs(ml.convert_to_masked(second))] == PATHS


@pytest.mark.once
def test_refs_of_plain_and_masked_models():
    plain = net()
    refs = ml.weight_refs(plain)
    assert [ref.mask for ref in refs] == [None] * 3
    assert refs[0].variable is plain.layers[0]._kernel
    assert [ref.path for ref in ml.weight_refs(plain, mask_bias=True)] == [
        "stem/kernel",
        "stem/bias",
        "dense/kernel",
        "dense/bias",
        "dense_1/kernel",
        "dense_1/bias",
    ]
    with pytest.raises(ValueError, match="convert_to_masked"):
        ml.masked_refs(plain)
    with pytest.raises(TypeError, match=r"Expected a `keras.Model` or a layer\. Received: 'a'"):
        ml.sparsity_report("a")


@pytest.mark.once
@pytest.mark.parametrize(
    ("layer", "shape", "name", "axes"),
    [
        (layers.Dense(3), (None, 4), "kernel", (3,)),
        (layers.Conv2D(3, 2), (None, 5, 5, 4), "kernel", (3,)),
        (layers.Conv2DTranspose(3, 2), (None, 5, 5, 4), "kernel", (3,)),
        (layers.DepthwiseConv2D(2, depth_multiplier=3), (None, 5, 5, 4), "kernel", (4, 3)),
        (layers.EinsumDense("abc,cde->abde", (None, 2, 6)), (None, 5, 4), "kernel", (2, 6)),
        (layers.EinsumDense("abde,dec->abc", (None, 4)), (None, 5, 2, 6), "kernel", (4,)),
    ],
)
def test_output_axes(layer, shape, name, axes):
    layer.build(shape)
    ref = next(ref for ref in ml.weight_refs(layer) if ref.name == name)
    assert tuple(ref.variable.shape[axis] for axis in ref.output_axes) == axes


def test_get_masks_returns_copies():
    model = masked_net()
    for mask in ml.get_masks(model).values():
        mask[...] = False
    assert all(mask.all() for mask in ml.get_masks(model).values())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"dense/kernel": np.ones((3, 3))}, r"'dense/kernel' must have the shape.*\(8, 5\)"),
        ({"nowhere/kernel": np.ones((3, 3))}, "no masked weight at 'nowhere/kernel'"),
        ({"stem/kernel": np.full((3, 3, 1, 2), 0.5)}, "only 0 and 1"),
        ({"stem/kernel": np.full((3, 3, 1, 2), np.nan)}, "only 0 and 1"),
    ],
)
def test_set_masks_writes_all_or_nothing(masks, message):
    model = masked_net()
    with pytest.raises(ValueError, match=message):
        ml.set_masks(model, {"dense_1/kernel": np.zeros((5, 3)), **masks})
    with pytest.raises(TypeError, match="a dict from paths to arrays"):
        ml.set_masks(model, [np.zeros((5, 3))])
    assert all(mask.all() for mask in ml.get_masks(model).values())


@settings(max_examples=20)
@given(hnp.arrays(bool, (8, 5)), st.booleans())
def test_masks_survive_their_file(tmp_path_factory, mask, as_numbers):
    model = masked_net_once()
    path = tmp_path_factory.mktemp("masks") / "masks.npz"
    ml.set_masks(model, {"dense/kernel": mask.astype("int8") if as_numbers else mask})
    ml.save_masks(model, path)
    ml.set_masks(model, {"dense/kernel": ~mask})
    ml.load_masks(model, path)
    np.testing.assert_array_equal(ml.get_masks(model)["dense/kernel"], mask)
    assert [p.name for p in path.parent.iterdir()] == ["masks.npz"]


_once = []


def masked_net_once():
    if not _once:
        _once.append(masked_net())
    return _once[0]


@pytest.mark.once
def test_mask_files_are_a_bit_per_weight(tmp_path):
    model = ml.convert_to_masked(keras.Sequential([keras.Input((256,)), layers.Dense(256)]))
    mask = np.random.default_rng(0).random((256, 256)) < 0.5
    ml.set_masks(model, {"dense/kernel": mask})
    ml.save_masks(model, tmp_path / "m.npz")
    assert (tmp_path / "m.npz").stat().st_size < 256 * 256 / 8 + 2000


@pytest.mark.once
def test_mask_files_are_checked_by_path_and_shape(tmp_path):
    model, path = masked_net(), tmp_path / "masks.npz"
    ml.save_masks(model, path)
    other = ml.convert_to_masked(keras.Sequential([keras.Input((3,)), layers.Dense(5)]))
    with pytest.raises(ValueError, match="stem/kernel"):
        ml.load_masks(other, path)
    fewer = ml.convert_to_masked(net(), include="stem")
    ml.save_masks(fewer, path)
    with pytest.raises(ValueError, match=r"no mask for these weights.*dense/kernel"):
        ml.load_masks(model, path)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(ValueError, match="was not written by `save_masks`"):
        ml.load_masks(model, tmp_path / "junk.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="was not written by `save_masks`"):
        ml.load_masks(model, tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        ml.load_masks(model, tmp_path / "missing.npz")


@pytest.mark.once
@pytest.mark.parametrize(
    ("bits", "received"),
    [
        (np.zeros(1, "uint8"), r"uint8 of shape \(1,\)"),  # cut off: once read as pruned
        (np.zeros(3, "uint8"), r"uint8 of shape \(3,\)"),
        (np.zeros((2, 1), "uint8"), r"uint8 of shape \(2, 1\)"),
        (np.zeros(2, "int64"), r"int64 of shape \(2,\)"),
        (np.array([0, 1], "uint8"), "0b00000001"),  # a 16th bit for 15 entries
    ],
)
def test_bits_of_a_mask_file_are_counted(tmp_path, bits, received):
    model, path = masked_net(), tmp_path / "masks.npz"
    before = ml.get_masks(model)
    assert before["dense_1/kernel"].shape == (5, 3)
    ml.save_masks(model, path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "bits/dense_1/kernel": bits})
    with pytest.raises(ValueError, match=rf"masks.npz.*dense_1/kernel.*\(5, 3\).*{received}"):
        ml.load_masks(model, path)
    for name, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, before[name])


@pytest.mark.once
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = masked_net(), tmp_path / "masks.npz"
    ml.save_masks(model, path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        ml.save_masks(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["masks.npz"]


@pytest.mark.once
def test_sparsity_report():
    model = masked_net()
    keep = np.zeros((8, 5), bool)
    keep[:3] = True
    ml.set_masks(model, {"dense/kernel": keep})
    report = ml.sparsity_report(model)
    assert [(row.path, row.size, row.alive, row.mask_bytes) for row in report] == [
        ("stem/kernel", 18, 18, 18),
        ("dense/kernel", 40, 15, 40),
        ("dense_1/kernel", 15, 15, 15),
    ]
    assert len(report) == 3
    assert (report.size, report.alive, report.mask_bytes) == (73, 48, 73)
    assert report.sparsity == pytest.approx(25 / 73)
    assert report.rows[1].sparsity == pytest.approx(0.625)
    assert report.unmasked == (("batch_normalization", "BatchNormalization", 8),)
    as_dict = json.loads(json.dumps(report.to_dict()))
    assert as_dict["total"] == {
        "size": 73,
        "alive": 48,
        "sparsity": pytest.approx(25 / 73),
        "frozen": 0,
        "mask_bytes": 73,
    }
    assert as_dict["weights"][1]["shape"] == [8, 5]
    lines = str(report).splitlines()
    assert lines[2].split() == ["dense/kernel", "(8,", "5)", "40", "15", "62.50%", "40"]
    assert lines[4].split() == ["total", "73", "48", "34.25%", "73"]


@pytest.mark.once
def test_report_of_a_plain_model_names_the_conversion():
    with pytest.raises(ValueError, match="convert_to_masked"):
        ml.sparsity_report(net())


@pytest.mark.once
def test_the_report_says_why_a_layer_has_no_mask():
    class Experts(layers.Layer):
        """Two raw kernels with three axes, as in a mixture of experts."""

        def build(self, shape):
            self._up = self.add_weight(name="up", shape=(2, shape[-1], 4))
            self._down = self.add_weight(name="down", shape=(2, 4, shape[-1]))

        def call(self, x):
            hidden = keras.ops.relu(keras.ops.einsum("bd,edf->ebf", x, self._up))
            return keras.ops.sum(keras.ops.einsum("ebf,efd->ebd", hidden, self._down), 0)

    def model():
        chain = [layers.Dense(3, name="head"), layers.BatchNormalization(name="bn"), Experts()]
        spectral = layers.SpectralNormalization(layers.Dense(3), name="spectral")
        return keras.Sequential([keras.Input((3,)), *chain, spectral, layers.Dense(1, name="tail")])

    report = ml.sparsity_report(ml.convert_to_masked(model(), exclude="tail"))
    hint = "masked_layers.register(Experts, ['_up', '_down'])"
    assert report.reasons == {
        "bn": "no trainable weight of two or more dimensions",
        "experts": f"to mask its weights: {hint}",
        "spectral": "spectral normalization overwrites its weights",
        "spectral/layer": "spectral normalization overwrites its weights",
        "tail": "left out of the conversion",
    }
    assert [row["reason"] for row in report.to_dict()["unmasked"]] == [*report.reasons.values()]
    assert f"{hint}: experts (Experts)" in str(report)

    ml.register(Experts, ["_up"])
    partly = ml.sparsity_report(ml.convert_to_masked(model()))
    assert ("experts", "Experts", 2 * 4 * 3) in partly.unmasked
    assert "['_down']" in partly.reasons["experts"]
    ml.register(Experts, ["_up", "_down"])
    masked = ml.convert_to_masked(plain := model())
    assert "experts" not in ml.sparsity_report(masked).reasons
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(masked.predict_on_batch(x), plain.predict_on_batch(x))
