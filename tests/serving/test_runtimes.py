"""The exported folder runs with TensorFlow alone, without Keras, this library or custom ops."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import masked_layers as ml
from masked_layers.serving import export_sparse_saved_model

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="needs the TensorFlow backend"
)

BLOCKED = """
import sys
for name in ("keras", "tf_keras", "masked_layers", "lottery_ticket_pruner"):
    sys.modules[name] = None  # Makes every import of it raise ImportError.
"""


def masked_model(seed):
    """A masked model with weights of every encoding: sparse, packed and dense."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((24,), name="x"),
            keras.layers.Dense(40, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(512, activation="relu", name="wide"),
            keras.layers.Dense(5, bias_initializer="normal"),
        ],
        name="served",
    )
    model = ml.convert_to_masked(model, exclude="wide")
    rng = np.random.default_rng(seed)
    ml.set_masks(
        model, {path: rng.random(mask.shape) < 0.1 for path, mask in ml.get_masks(model).items()}
    )
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two models that differ only in their weights, exported, with inputs and outputs."""
    folder = tmp_path_factory.mktemp("served")
    x = np.random.default_rng(0).standard_normal((3, 24)).astype("float32")
    np.save(folder / "x.npy", x)
    for name, seed in (("a", 1), ("b", 2)):
        model = masked_model(seed)
        report = export_sparse_saved_model(model, folder / name)
        assert {row.encoding for row in report} == {"sparse", "packed", "dense"}
        np.save(folder / f"{name}.npy", ml.strip_masks(model).predict_on_batch(x))
    return folder


def run(code, folder, blocked=BLOCKED):
    result = subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr


def test_python_loaders_and_the_command_line_tool(served):
    """Runs `tf.saved_model.load`, the v1 loader (also for both models in one session) and
    `saved_model_cli` in one process, because starting TensorFlow takes most of the time."""
    run(
        """
        import os, sys
        import numpy as np
        import tensorflow as tf

        x = np.load("x.npy")
        wanted = {name: np.load(f"{name}.npy") for name in "ab"}
        assert np.abs(wanted["a"] - wanted["b"]).max() > 0.01

        def close(got, name):
            np.testing.assert_allclose(got, wanted[name], rtol=1e-5, atol=1e-6)

        # Both models in one process, loaded before either runs.
        loaded = {name: tf.saved_model.load(name) for name in "ab"}
        for name, model in loaded.items():
            close(model.serve(x), name)
            close(model.signatures["serving_default"](tf.constant(x))["output_0"], name)
            assert model.serve(x[:1]).shape == (1, 5)

        # A folder may be moved: nothing in it names the path it was written at.
        os.rename("a", "moved")
        moved = tf.saved_model.load("moved")
        close(moved.serve(x), "a")
        os.rename("moved", "a")

        # Loading and saving again keeps the outputs.
        tf.saved_model.save(loaded["a"], "again", signatures=loaded["a"].signatures)
        again = tf.saved_model.load("again")
        close(again.signatures["serving_default"](tf.constant(x))["output_0"], "a")

        # TensorFlow Serving's path: the v1 loader with tag "serve".
        load = tf.compat.v1.saved_model.loader.load
        for name in "ab":
            with tf.Graph().as_default(), tf.compat.v1.Session() as session:
                signature = load(session, ["serve"], name).signature_def["serving_default"]
                feed = {signature.inputs["x"].name: x}
                close(session.run(signature.outputs["output_0"].name, feed), name)

        # Both in one session: no variable of one may be a variable of the other.
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            signatures = {
                name: load(session, ["serve"], name, import_scope=name).signature_def
                for name in "ab"
            }
            for name in "ab":
                signature = signatures[name]["serving_default"]
                feed = {f"{name}/" + signature.inputs["x"].name: x}
                close(session.run(f"{name}/" + signature.outputs["output_0"].name, feed), name)

        # No op beyond TensorFlow's own.
        from tensorflow.core.protobuf import saved_model_pb2
        from tensorflow.python.framework import op_def_registry
        proto = saved_model_pb2.SavedModel.FromString(open("a/saved_model.pb", "rb").read())
        graph = proto.meta_graphs[0].graph_def
        functions = {f.signature.name for f in graph.library.function}
        bodies = [graph.node, *(function.node_def for function in graph.library.function)]
        ops = {node.op for body in bodies for node in body}
        missing = [op for op in ops - functions if op_def_registry.get(op) is None]
        assert not missing, missing
        assert not {op for op in ops if "PyFunc" in op}

        from tensorflow.python.tools import saved_model_cli
        sys.argv = ["saved_model_cli", "run", "--dir", "a", "--tag_set", "serve", "--signature_def",
                    "serving_default", "--inputs", "x=x.npy", "--outdir", "cli"]
        try:
            saved_model_cli.main()
        except SystemExit as stop:
            assert not stop.code
        close(np.load("cli/output_0.npy"), "a")
        """,
        served,
    )


def test_c_api(served):
    """Uses the C library inside the wheel, without TensorFlow's Python code."""
    pb2 = pytest.importorskip("tensorflow.core.protobuf.saved_model_pb2")
    proto = pb2.SavedModel.FromString((served / "a" / "saved_model.pb").read_bytes())
    signature = proto.meta_graphs[0].signature_def["serving_default"]
    source, target = (
        end.name.partition(":")[0] for end in (signature.inputs["x"], signature.outputs["output_0"])
    )
    run(
        f"""
        sys.modules["tensorflow.python"] = None
        import ctypes, importlib.machinery, pathlib
        import numpy as np

        spec = importlib.machinery.PathFinder.find_spec("tensorflow")
        wheel = pathlib.Path(spec.submodule_search_locations[0])
        ctypes.CDLL(str(next(wheel.glob("libtensorflow_framework.so*"))), ctypes.RTLD_GLOBAL)
        lib = ctypes.CDLL(str(next(wheel.glob("libtensorflow_cc.so*"))))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for name in ("TF_NewStatus", "TF_NewGraph", "TF_NewSessionOptions", "TF_TensorData",
                     "TF_LoadSessionFromSavedModel", "TF_AllocateTensor",
                     "TF_GraphOperationByName"):
            getattr(lib, name).restype = pointer
        lib.TF_Message.restype = ctypes.c_char_p

        class Output(ctypes.Structure):
            _fields_ = [("operation", pointer), ("index", ctypes.c_int)]

        status, graph = pointer(lib.TF_NewStatus()), pointer(lib.TF_NewGraph())

        def check():
            assert lib.TF_GetCode(status) == 0, lib.TF_Message(status)

        tags = (ctypes.c_char_p * 1)(b"serve")
        session = pointer(lib.TF_LoadSessionFromSavedModel(
            pointer(lib.TF_NewSessionOptions()), None, b"a", tags, 1, graph, None, status))
        check()

        x = np.ascontiguousarray(np.load("x.npy"))
        shape, nbytes = (size * 2)(*x.shape), ctypes.c_size_t(x.nbytes)
        tensor = pointer(lib.TF_AllocateTensor(1, shape, 2, nbytes))
        ctypes.memmove(lib.TF_TensorData(tensor), x.ctypes.data, x.nbytes)
        node = lambda name: Output(lib.TF_GraphOperationByName(graph, name), 0)
        source, target = node({source.encode()!r}), node({target.encode()!r})
        result = pointer()
        lib.TF_SessionRun(session, None, ctypes.byref(source), ctypes.byref(tensor), 1,
                          ctypes.byref(target), ctypes.byref(result), 1, None, 0, None, status)
        check()
        wanted = np.load("a.npy")
        got = np.empty_like(wanted)
        ctypes.memmove(got.ctypes.data, lib.TF_TensorData(result), got.nbytes)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        """,
        served,
    )
