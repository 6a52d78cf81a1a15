"""Encodings of weights in a sparse SavedModel, and the report of what is on disk."""

import logging

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from masked_layers.serving import StorageReport, export_sparse_saved_model
from served import convolutional, dense, prune, subclassed

tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
    ),
    # Keras 3.15 with NumPy 2.4, wherever a variable becomes an array.
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]


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
        pytest.param("last", marks=pytest.mark.slow),
        ["^last", "nowhere"],
        pytest.param((pattern for pattern in ["^last"]), marks=pytest.mark.slow),
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
    keras.utils.set_random_seed(0)  # Errors grow where outputs cancel.
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


@pytest.mark.parametrize(
    ("assets", "says"), [(100, "2.0 times smaller than"), (500, "1.5 times as large as")]
)
def test_a_folder_larger_than_the_dense_weights_is_not_called_smaller(assets, says):
    report = StorageReport((), 200, {"saved_model.pb": 200, "assets": assets - 100})
    assert f"bytes, {says} one uncompressed copy" in str(report)


def test_level_changes_only_the_number_of_bytes(tmp_path):
    model = prune(dense())
    sizes = [
        export_sparse_saved_model(model, tmp_path / "out", level=level).nbytes for level in (0, 9)
    ]
    assert sizes[0] > sizes[1]


def test_every_dtype_of_weights(tmp_path):
    """Weights that TensorFlow cannot create from bytes stay in the checkpoint."""

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
