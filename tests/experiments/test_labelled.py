"""Data that no classifier can be trained on is refused, with its source."""

import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import datasets
from lottery_ticket_pruner.experiments.labelled import checked

COUNT = 240
LABELS = np.arange(COUNT) % 10
IMAGES = np.broadcast_to(LABELS[:, None, None], (COUNT, 28, 28)).astype("uint8")

# A replacement for one of the arrays, and the expected message.
WRONG = {
    "one-hot labels": ("y_train", np.eye(10, dtype="uint8")[LABELS], r"y\.argmax\(-1\)"),
    "one-hot test labels": ("y_test", np.eye(10)[LABELS], r"test.*y\.argmax\(-1\)"),
    "fewer labels": ("y_train", LABELS[:-1], r"one label for each input.*y of int64\(239,\)"),
    "more labels": ("y_test", np.append(LABELS, 1), r"one label for each input.*\(241,\)"),
    "images as labels": ("y_train", IMAGES, r"index of each example's class\. .*28, 28"),
    "no labels": ("y_train", LABELS[:0], "one label for each input"),
    "a single label": ("y_train", np.array(3), "one label for each input"),
    "halves": ("y_train", LABELS + 0.5, r"class indices.*Received: 0\.5, 1\.5"),
    "negative labels": ("y_train", LABELS - 1, "class indices.*Received: -1, 0"),
    "a late negative label": ("y_train", np.r_[LABELS[:-1], -7], "class indices.*Received: -7, "),
    "NaN labels": ("y_train", np.where(LABELS == 3, np.nan, LABELS), "class indices.*nan"),
    "infinite labels": ("y_train", np.where(LABELS == 3, np.inf, LABELS), "class indices.*inf"),
    "huge labels": ("y_train", LABELS + 2**40, "labels"),
    "labels as texts": ("y_train", LABELS.astype(str), r"labels\).*np\.unique.*<U"),
    "classes one too many": ("y_test", LABELS + 1, "labels of 10 classes.*up to 10"),
    "one class": ("y_train", LABELS * 0, "two classes"),
    "another shape": ("x_test", IMAGES[:, :14], "one shape and type"),
    "fewer images": ("x_train", IMAGES[:-1], "one label for each input"),
    "no images": ("x_test", IMAGES[:0], "at least two examples"),
    "images without pixels": ("x_test", IMAGES[:, :0], "at least two examples"),
}
OF_FILES = {
    "flat images": ("x_train", IMAGES.reshape(COUNT, -1), "rows and columns"),
    "shares": ("x_train", IMAGES / 255, "uint8"),
    "wide integers": ("x_test", IMAGES.astype("int64"), "uint8"),
}
OF_FUNCTIONS = {
    "floats against pixels": ("x_train", IMAGES / 255, "one shape and type"),
    "labels as objects": ("y_train", LABELS.astype(object), r"labels\).*object"),
    "inputs as objects": ("x_train", IMAGES.astype(object), "one array of numbers"),
    "ragged inputs": ("x_train", [[1.0], [1.0, 2.0]] * 120, "x cannot be converted to an array"),
    "complex inputs": ("x_train", IMAGES * 1j, "one array of numbers"),
    "many classes": ("y_train", LABELS * 100_000, r"up to 900000 for 240 examples.*np\.unique"),
}


def arrays(name, value):
    return {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS, name: value}


def refused_by_command(capsys, *options):
    assert cli.main(["run", *options]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.partition("lottery-ticket: ")[2]


@pytest.mark.once
@pytest.mark.parametrize("kind", WRONG | OF_FILES)
def test_files_of_named_data_sets_are_checked(tmp_path, capsys, kind):
    name, value, message = (WRONG | OF_FILES)[kind]
    np.savez(tmp_path / "mnist.npz", **arrays(name, value))
    with pytest.raises(ValueError, match=rf"(?s)mnist\.npz.*{message}"):
        datasets.load("mnist", tmp_path)
    shown = refused_by_command(capsys, "--data", "mnist", "--data-dir", str(tmp_path))
    assert "mnist.npz" in shown


@pytest.mark.once
@pytest.mark.parametrize("kind", WRONG | OF_FUNCTIONS)
def test_results_of_functions_are_checked(tmp_path, capsys, monkeypatch, kind):
    name, value, message = (WRONG | OF_FUNCTIONS)[kind]
    given = arrays(name, value)
    (tmp_path / "given.pkl").write_bytes(pickle.dumps(given))
    (tmp_path / "own.py").write_text(
        "import pickle\nfrom pathlib import Path\n\n\ndef load():\n"
        "    d = pickle.loads(Path(__file__).with_name('given.pkl').read_bytes())\n"
        "    return (d['x_train'], d['y_train']), (d['x_test'], d['y_test'])\n"
    )
    if kind == "classes one too many":
        message = "10 classes.*as in the training data"
    monkeypatch.chdir(tmp_path)
    shown = refused_by_command(capsys, "--data", "own.py:load")
    with pytest.raises(ValueError, match=rf"(?s)own\.py:load.*{message}"):
        datasets.load(f"{tmp_path / 'own.py'}:load")
    assert shown.startswith("own.py:load")


@pytest.mark.once
@pytest.mark.parametrize("kind", WRONG)
def test_downloads_are_checked(monkeypatch, kind):
    import keras

    name, value, message = WRONG[kind]
    given = arrays(name, value)
    pairs = [(given[f"x_{part}"], given[f"y_{part}"]) for part in ("train", "test")]
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: pairs)
    with pytest.raises(ValueError, match=rf"(?s)keras\.datasets\.fashion_mnist.*{message}"):
        datasets.load("fashion_mnist")


@pytest.mark.once
def test_floats_are_checked_as_the_network_sees_them():
    x = np.linspace(-1, 1, COUNT * 3).reshape(COUNT, 3)
    for value, message in (
        (1e300, r"range of float32.*1e\+300"),
        (np.nan, r"finite numbers.*has 1 entry that is NaN or infinite, the first at \[17, 1\]"),
        (np.inf, "fin"),
    ):
        wrong = x.copy()
        wrong[17, 1] = value
        with pytest.raises(ValueError, match=message):
            checked("here", (x, LABELS, wrong, LABELS))
    largest = x * np.finfo("float32").max
    for fine in (largest, x.astype("float16"), x > 0, (x * 1e18).astype("int64")):
        checked("here", (fine, LABELS, fine, LABELS))


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "uint64", "float16", "float64"])
def test_labels_of_every_type_of_numbers_are_taken(dtype):
    labels = (np.arange(40) % 2).astype(dtype)
    x = np.ones((40, 2), "float32")
    for y in (labels, labels[:, None]):
        arrays = checked("here", (x, y, x, y))
        assert all(a is b for a, b in zip(arrays, (x, y, x, y), strict=True))


@pytest.mark.once
def test_too_few_images_to_hold_any_out_are_refused(tmp_path):
    x, y = np.zeros((100, 32, 32, 3), "uint8"), np.arange(100) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match=r"cifar10\.npz.* leaves 100 examples .*5000 are held"):
        datasets.load("cifar10", tmp_path)
    np.savez(tmp_path / "cifar10.npz", x_train=x[:50], y_train=y[:50], x_test=x, y_test=y)
    with pytest.raises(ValueError, match=r"leaves 0 examples for cifar10_reduced_10x"):
        datasets.load("cifar10_reduced_10x", tmp_path)


# --- Exceptions of the user's own code ------------------------------------------------------------

FAULTS = {
    "import": ("import numpyy\n", "ModuleNotFoundError: No module named 'numpyy'", 1),
    "syntax": ("def load():\n    return (\n", "SyntaxError", 2),
    "key": ("def load():\n    return {}['a']\n", "KeyError: 'a'", 2),
    "value": ("def load():\n    return int('b')\n", "ValueError: invalid literal", 2),
    "in a library": ("import numpy as np\ndef load():\n    np.load(__file__)\n", "Error", 3),
    "exit": ("import sys\nsys.exit(0)\n", "SystemExit: 0", 2),
    "beside": ("from beside_own import fail\ndef load():\n    fail()\n", "ZeroDivisionError", 2),
    "batches": (
        "import keras\n\n\nclass Batches(keras.utils.PyDataset):\n    num_batches = 2\n\n"
        "    def __getitem__(self, number):\n        return self.nothing\n\n\n"
        "def load():\n    return Batches(), Batches()\n",
        "AttributeError",
        8,
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_an_exception_of_the_users_function_is_named(tmp_path, capsys, monkeypatch, fault):
    code, error, line = FAULTS[fault]
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "beside_own.py").write_text("def fail():\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--data", "own.py:load"]) == 2
    sys.modules.pop("beside_own", None)  # Other tests use different files of this name.
    first, _, rest = capsys.readouterr().err.partition("lottery-ticket: ")[2].partition("\n")
    file = "beside_own.py" if fault == "beside" else "own.py"
    assert first.startswith("own.py:load raised ")
    assert error in first
    assert f"{file}', line {line}" in first
    # Only the user's part of the traceback, without its callers.
    assert "own.py" in rest
    assert "experiments" not in rest


@pytest.mark.once
def test_a_module_that_failed_is_imported_again(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(datasets.UserCodeError, match="not yet"):
        datasets.load(f"{file}:load")
    assert "_own_of_data" not in sys.modules
    for name in (":load", f"{file}:"):
        with pytest.raises(ValueError, match=r"Expected module:function.*Received"):
            datasets.load(name)
    with pytest.raises(ValueError, match=r"Name its function, too: own\.py:FUNCTION"):
        datasets.load("own.py")
