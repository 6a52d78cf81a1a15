"""Exports that are refused or fail: messages, and that nothing is left behind."""

import os
import types

import keras
import numpy as np
import pytest
from keras import layers

from common import HandingOn
from masked_layers.serving import compaction, export_sparse_saved_model, saved_model, verification
from served import contents, dense, prune

tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
    ),
    # Keras 3.15 with NumPy 2.4, wherever a variable becomes an array.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


def test_inputs_that_keras_does_not_know_are_asked_for(tmp_path):
    model = HandingOn()
    x = np.ones((3, 4), "float32")
    expected = model(x)
    with pytest.raises(ValueError, match=r"name the arguments, as in `call.* `input_signature`"):
        export_sparse_saved_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    signature = [tf.TensorSpec((None, 4), "float32")]
    export_sparse_saved_model(model, tmp_path / "out", input_signature=signature)
    served = tf.saved_model.load(str(tmp_path / "out"))
    np.testing.assert_allclose(served.serve(x), expected, rtol=1e-6)


def test_invalid_arguments_leave_no_files(tmp_path):
    model = dense()
    with pytest.raises(ValueError, match="Received: 'int4'"):
        export_sparse_saved_model(model, tmp_path / "out", values="int4")
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
        ValueError, match=r"(?s)Pass `sample_inputs` that it accepts\..*num_oov_indices=0"
    ):
        export_sparse_saved_model(picky, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"(?s)cannot be called on the given `sample_inputs`: .*num_oov_indices=0"
    ):
        export_sparse_saved_model(picky, tmp_path / "made" / "out", sample_inputs=np.ones((1, 2)))
    assert not list(tmp_path.iterdir())  # Including the parent folder created for the last one.


@pytest.mark.parametrize(("bias", "error"), [([1, np.nan, 1, 1], 0.0), ([np.nan] * 4, None)])
def test_outputs_that_are_not_finite_are_warned_of(bias, error, tmp_path):
    model = dense()
    model.layers[-1].bias.assign(bias)
    count = 2 * np.isnan(bias).sum()
    with pytest.warns(UserWarning, match=f"{count} of 8 outputs of the model are NaN"):
        report = export_sparse_saved_model(model, tmp_path / "out")
    assert report.output_error == (error if error is None else pytest.approx(error, abs=1e-6))
    assert ("largest difference" in str(report)) == (error is not None)


def test_values_beyond_float16_are_refused(tmp_path):
    model = prune(dense())
    kernel = model.layers[0].kernel
    kernel.assign(np.where(np.eye(20, 30), 1e5, kernel))
    with pytest.raises(OverflowError, match="'dense/kernel' has values up to 100000"):
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
        with pytest.raises(FileExistsError, match="is not a SavedModel folder"):
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


def test_files_that_appear_at_the_path_during_an_export_are_kept(tmp_path, monkeypatch):
    verify = saved_model.verify

    def slow(*args, **kwargs):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years")
        return verify(*args, **kwargs)

    monkeypatch.setattr(saved_model, "verify", slow)
    with pytest.raises(FileExistsError, match="is not a SavedModel folder"):
        export_sparse_saved_model(dense(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("damage", ["weight", "output"])
def test_a_mismatch_raises_and_keeps_the_existing_folder(damage, old, tmp_path, monkeypatch):
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
        message = "Weight 'dense/kernel' loaded from the SavedModel differs"
    else:
        # A trace that computes something other than the model.
        values = saved_model.EffectiveValues

        def wrong(model, finish):
            return {name: value * 2 for name, value in values(model, finish).items()}

        monkeypatch.setattr(saved_model, "EffectiveValues", wrong)
        message = "Traced outputs differ from the model's by"
    with pytest.raises(RuntimeError, match=message):
        export_sparse_saved_model(model, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_crash_while_writing_keeps_the_existing_folder(tmp_path, monkeypatch):
    model = prune(dense())
    export_sparse_saved_model(model, tmp_path / "out")
    before = contents(tmp_path)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compaction, "compact", crash)
    with pytest.raises(KeyboardInterrupt):
        export_sparse_saved_model(model, tmp_path / "out")
    assert contents(tmp_path) == before


def test_the_folder_can_be_read_by_others(tmp_path):
    export_sparse_saved_model(dense(), tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_operations_of_a_newer_jax_than_tensorflow_knows_are_named():
    def function():
        said = "in bytecode version 6 produced by: StableHLO_v9.1\n"
        said += "error: failed to deserialize portable artifact using StableHLO_v1.2"
        raise tf.errors.InvalidArgumentError(None, None, said)

    with pytest.raises(NotImplementedError, match=r"\(StableHLO_v9.1\).*TensorFlow backend"):
        verification._executed(types.SimpleNamespace(function=function), [])


class Unrolled(keras.layers.Layer):
    """Adds steps one by one, as layers do that need the number of steps when they are traced."""

    def call(self, x):
        return sum(x[:, step] for step in range(keras.ops.shape(x)[1]))

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], x.shape[2]), x.dtype)


def test_sizes_that_a_layer_needs_are_asked_for(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), Unrolled(), keras.layers.Dense(2)])
    with pytest.raises(
        ValueError, match=r"shapes \[\(None, None, 3\)\].*pass an `input_signature`"
    ):
        export_sparse_saved_model(model, tmp_path / "served")
    assert not list(tmp_path.iterdir())
    signature = [keras.InputSpec(shape=(None, 4, 3), dtype="float32")]
    export_sparse_saved_model(model, tmp_path / "served", input_signature=signature)
    x = np.ones((2, 4, 3), "float32")
    loaded = tf.saved_model.load(str(tmp_path / "served"))  # Its functions need it.
    np.testing.assert_allclose(loaded.serve(x), model.predict(x, verbose=0), rtol=1e-6)
