"""Other formats through Keras' own exporters, and the inspection of files and folders."""

import ast
import dataclasses
import hashlib
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
import masked_layers.serving
from masked_layers.serving import StorageReport, export_sparse_saved_model, inspect

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def masked_model(density=0.05):
    model = keras.Sequential(
        [
            keras.Input((784,), name="x"),
            layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"),
            layers.Dense(10),
        ]
    )
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    masks = {path: rng.random(mask.shape) < density for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


X = np.random.default_rng(1).standard_normal((4, 784)).astype("float32")


@tensorflow_only
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    model = masked_model()
    wanted = model.predict(X, verbose=0)
    # From the documentation: one line.
    ml.strip_masks(model).export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (source,) = session.get_inputs()
    (got,) = session.run(None, {source.name: X})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@tensorflow_only
def test_litert_with_its_sparse_encoding(tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = masked_model()
    plain = ml.strip_masks(model)
    plain.export(tmp_path / "dense.tflite", format="litert", verbose=False)
    # From the documentation: one line.
    plain.export(
        tmp_path / "sparse.tflite",
        format="litert",
        optimizations=[tf.lite.Optimize.EXPERIMENTAL_SPARSITY],
        verbose=False,
    )
    sizes = [(tmp_path / f"{name}.tflite").stat().st_size for name in ("sparse", "dense")]
    assert sizes[0] < sizes[1] / 8
    _, got = run_litert(tmp_path / "sparse.tflite")
    np.testing.assert_allclose(got, model.predict(X, verbose=0), rtol=1e-4, atol=1e-5)


def run_litert(path):
    tf = pytest.importorskip("tensorflow")
    interpreter = tf.lite.Interpreter(str(path))
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(source["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], X)
    interpreter.invoke()
    return interpreter, interpreter.get_tensor(target["index"])


@tensorflow_only
def test_litert_with_int8_kernels_keeps_zeros(tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = masked_model()
    # From the documentation: one line.
    ml.strip_masks(model).export(
        tmp_path / "int8.tflite",
        format="litert",
        optimizations=[tf.lite.Optimize.DEFAULT],
        verbose=False,
    )
    interpreter, got = run_litert(tmp_path / "int8.tflite")
    wanted = model.predict(X, verbose=0)
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    details = {tuple(one["shape"]): one for one in interpreter.get_tensor_details()}
    masks = ml.get_masks(model)
    for path in list(masks)[:2]:  # The last kernel is small, and stays as it is.
        mask = masks[path].T
        kernel = interpreter.get_tensor(details[mask.shape]["index"])
        assert kernel.dtype == np.int8
        assert not kernel[~mask].any()
        assert kernel[mask].any()


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_a_keras_file(tmp_path):
    model = masked_model()
    for name, saved in (("masked", model), ("plain", ml.strip_masks(model))):
        path = tmp_path / f"{name}.keras"
        saved.save(path)
        report = inspect(path)
        masks = ml.get_masks(model)
        alive = {row.path: row.alive for row in report if len(row.shape) > 1}
        assert alive == {path: np.count_nonzero(mask) for path, mask in masks.items()}
        assert report.disk_nbytes == path.stat().st_size
        assert report.dense_nbytes == report.nbytes == 4 * model.count_params()
        assert {row.encoding for row in report} == {"dense"}
        assert str(report).splitlines()[-1] == f"on disk: {report.disk_nbytes:,} bytes"


@tensorflow_only
def test_inspect_a_sparse_saved_model(tmp_path):
    report = export_sparse_saved_model(masked_model(), tmp_path / "out")
    assert inspect(tmp_path / "out") == report
    (tmp_path / "out" / "assets.extra" / "note.txt").write_text("added later")
    assert inspect(tmp_path / "out").disk_nbytes == report.disk_nbytes + 11


@tensorflow_only
def test_inspect_another_saved_model(tmp_path):
    model = ml.strip_masks(masked_model())
    model.export(tmp_path / "out", verbose=False)
    report = inspect(tmp_path / "out")
    assert isinstance(report, StorageReport)
    shapes = {row.shape for row in report}
    assert {(784, 300), (300, 100), (100, 10)} <= shapes
    kernel = next(row for row in report if row.shape == (784, 300))
    assert kernel.alive == np.count_nonzero(model.layers[0].kernel)


@tensorflow_only
def test_inspect_counts_what_keras_exports_twice_once(tmp_path):
    """Even if several weights are equal, like new biases, and in a hand-made archive."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4),
            keras.layers.Dense(4),
        ]
    )
    model.export(tmp_path / "out", verbose=False)
    report = inspect(tmp_path / "out")
    assert sorted(row.shape for row in report) == sorted(tuple(v.shape) for v in model.variables)
    assert report.dense_nbytes == 4 * model.count_params()
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", model.call, [keras.InputSpec(shape=(None, 6), dtype="float32")])
    archive.write_out(tmp_path / "archive", verbose=False)
    assert inspect(tmp_path / "archive").dense_nbytes == 4 * model.count_params()


def test_inspect_names_the_formats_it_accepts(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no"):
        inspect(tmp_path / "missing")
    (tmp_path / "file.txt").write_text("text")
    for path in (tmp_path, tmp_path / "file.txt"):
        with pytest.raises(
            ValueError, match=r"neither a '\.keras' file, a ticket .* nor a SavedModel"
        ):
            inspect(path)


def test_inspect_names_what_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as file:
        file.writestr("note.txt", "text")
    with pytest.raises(ValueError, match=r"other\.keras' was not written by Keras"):
        inspect(tmp_path / "other.keras")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a sparse folder and its report."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    return folder, export_sparse_saved_model(masked_model(), folder)


@pytest.fixture
def sparse(exported, tmp_path):
    """Copies the sparse folder to `out`, and returns it and its report."""
    shutil.copytree(exported[0], tmp_path / "out")
    return tmp_path / "out", exported[1]


@tensorflow_only
def test_inspect_names_the_file_of_a_sparse_folder_that_is_not_as_it_was_written(sparse, tmp_path):
    weights = tmp_path / "out" / "assets" / "weights.mlsp"
    report = tmp_path / "out" / "assets.extra" / "sparsity.json"
    packed = weights.read_bytes()
    weights.write_bytes(packed[:-100])
    with pytest.raises(ValueError, match=rf"weights\.mlsp' has {len(packed) - 100} bytes; "):
        inspect(tmp_path / "out")
    weights.write_bytes(packed[:-1] + bytes([packed[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights\.mlsp' does not have the checksum"):
        inspect(tmp_path / "out")
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights\.mlsp' is missing; "):
        inspect(tmp_path / "out")
    weights.write_bytes(packed)
    inspect(tmp_path / "out")
    report.write_bytes(report.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"sparsity\.json' is damaged: Not a storage report"):
        inspect(tmp_path / "out")
    report.unlink()
    with pytest.raises(ValueError, match=r"The report '.*sparsity\.json' is missing"):
        inspect(tmp_path / "out")


@tensorflow_only
def test_inspect_notices_a_flipped_bit_in_any_file_of_a_sparse_folder(sparse):
    folder, written = sparse
    sums = (folder / "assets.extra" / "SHA256SUMS").read_text().splitlines()
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in written.files
    }
    del found["assets.extra/SHA256SUMS"]
    assert sums == [f"{found[name]}  {name}" for name in sorted(found)]
    assert {"saved_model.pb", "variables/variables.index", "assets/weights.mlsp"} < found.keys()
    for name in written.files:
        content = (folder / name).read_bytes()
        for place in np.linspace(0, len(content) - 1, 12, dtype=int):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 7  # Such that JSON remains text.
            (folder / name).write_bytes(flipped)
            with pytest.raises(ml.FileContentError):
                inspect(folder)
        (folder / name).write_bytes(content)
    assert inspect(folder) == written


@tensorflow_only
def test_inspect_reads_sparse_folders_of_earlier_versions(sparse):
    folder, written = sparse
    extra = folder / "assets.extra"
    (extra / "SHA256SUMS").unlink()
    files = {name: size for name, size in written.files.items() if not name.endswith("SUMS")}
    earlier = dataclasses.replace(written, files=files).with_own_size()
    (extra / "sparsity.json").write_bytes(earlier.to_json())
    assert inspect(folder) == earlier
    weights = folder / "assets" / "weights.mlsp"
    packed = weights.read_bytes()
    weights.write_bytes(packed[:-1] + bytes([packed[-1] ^ 1]))
    with pytest.raises(ml.FileContentError, match=r"weights\.mlsp' is damaged: .*checksum"):
        inspect(folder)


@tensorflow_only
def test_inspect_names_damaged_variables(tmp_path):
    folder = tmp_path / "out"
    (folder / "variables").mkdir(parents=True)
    for file in ("saved_model.pb", "variables/variables.index"):
        (folder / file).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"The variables in '.*out' are damaged"):
        inspect(folder)


@tensorflow_only
def test_inspect_takes_no_damage_to_variables_for_others(tmp_path):
    ml.strip_masks(masked_model()).export(tmp_path / "out", verbose=False)
    whole = {row.path: row.alive for row in inspect(tmp_path / "out")}
    index = tmp_path / "out" / "variables" / "variables.index"
    content = index.read_bytes()
    for position in range(0, len(content), 17):
        for damaged in (
            content[:position],
            content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :],
        ):
            index.write_bytes(damaged)
            try:
                found = {row.path: row.alive for row in inspect(tmp_path / "out")}
            except ValueError as error:
                assert "are damaged" in str(error)  # noqa: PT017
            else:
                assert found == whole


def test_the_package_does_not_import_tensorflow():
    """Its modules import everywhere; TensorFlow is only required when it is used."""
    folder = Path(masked_layers.serving.__file__).parent
    for file in (*folder.glob("*.py"), folder.parent / "_tensorflow.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module)
            assert not any(name.partition(".")[0] == "tensorflow" for name in names), file
