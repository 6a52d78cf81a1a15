"""The installed distribution: metadata, markers, imports; the examples that pages begin with."""

import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest

import lottery_ticket_pruner
import pages

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new interpreter, by default with the backend of this test run."""
    environment = {"KERAS_BACKEND": keras.backend.backend(), **environment}
    # Without stored bytecode, every import would compile its modules again.
    environment["PYTHONDONTWRITEBYTECODE"] = ""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("package", ["masked_layers", "lottery_ticket_pruner"])
def test_packages_are_marked_as_typed(package):
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_installed_distribution_declares_its_version_and_command():
    try:
        distribution = importlib.metadata.distribution("lottery-ticket-pruner")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree; every tox environment installs the wheel")
    assert distribution.version == lottery_ticket_pruner.__version__
    assert {e.name: e.value for e in distribution.entry_points} == PYPROJECT["project"]["scripts"]


@pytest.fixture(scope="module")
def fresh():
    """The imports and output of a new interpreter. A single one, because starting it is slow."""
    code = """
import json, sys, time
start = time.process_time()
import keras
before, between = set(sys.modules), time.process_time()
import lottery_ticket_pruner
seconds = [between - start, time.process_time() - between]
import masked_layers
imported = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
# Not converted: Keras itself imports TensorFlow, where it is installed, to serialise a model.
masked = keras.Sequential([keras.Input((4,)), masked_layers.MaskedDense(3)])
lottery_ticket_pruner.LotteryTicketPruner(masked).update_masks("large_init", rate=0.5)
in_use = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"seconds": seconds, "imported": imported, "in use": in_use}))

for name in ("tyro", "matplotlib", "sklearn", "tensorboard"):
    sys.modules[name] = None  # as if it were not installed
sys.argv = ["lottery-ticket", "run"]
from lottery_ticket_pruner.cli import main
sys.exit(main())  # as the console script does
"""
    result = _python(code)
    assert result.stdout, result.stderr
    return {**json.loads(result.stdout), "code": result.returncode, "errors": result.stderr}


def test_import_costs_little_compared_with_keras(fresh):
    code = """
import time
start = time.process_time()
import keras
between = time.process_time()
import lottery_ticket_pruner
print(between - start, time.process_time() - between)
"""

    def little(keras_seconds, seconds):  # on a slow machine both take longer
        return seconds <= max(0.3, keras_seconds / 10)

    # Other load only adds to a measurement, so the smallest of several is the cost.
    measured = [fresh["seconds"]]
    while not little(*measured[-1]) and len(measured) < 5:
        measured.append([float(seconds) for seconds in _python(code).stdout.split()])
    assert little(*measured[-1]), f"seconds of `import keras` and on top of it: {measured}"


def test_import_loads_neither_other_backends_nor_requirements_of_the_command_line(fresh):
    assert {"lottery_ticket_pruner", "masked_layers"} <= set(fresh["imported"])
    foreign = {"tensorflow", "jax", "torch", "matplotlib", "sklearn", "tyro", "tensorboard"}
    assert not set(fresh["imported"]) & (foreign - {keras.backend.backend()})


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="TensorFlow is the backend of this run"
)
def test_tensorflow_stays_out_of_the_other_backends(fresh):
    assert "masked_layers" in fresh["in use"]
    assert "tensorflow" not in fresh["in use"]


@pytest.mark.skipif(
    os.environ.get("TOX_ENV_NAME") not in ("jax", "torch"),
    reason="only these tox environments leave TensorFlow out",
)
def test_environment_without_tensorflow_has_none():
    assert importlib.util.find_spec("tensorflow") is None


def test_the_command_without_its_extra_names_the_package_to_install(fresh):
    assert fresh["code"] != 0
    assert 'pip install "lottery-ticket-pruner[cli]"' in fresh["errors"]
    assert "Traceback" not in fresh["errors"]


def _classifier() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.fixture
def names():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 8)).astype("float32"), rng.integers(0, 3, size=96)
    data = {"x_train": x, "y_train": y, "X": x, "Y": y, "y": y, "x_test": x[:32], "y_test": y[:32]}
    return {"model": _classifier(), **data}


def test_the_loop_on_tickets_prunes_a_model_as_it_says(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block, *rest = pages.code_of("finding-a-ticket.md")
    assert sum(1 for line in block.splitlines() if line.strip()) == 12

    pages.run("finding-a-ticket.md", block, names)

    remaining = re.search(r"(\d+) % of the weights", block)
    share = float(remaining.group(1)) / 100
    report = names["masked_layers"].sparsity_report(names["masked"])
    assert report.sparsity == pytest.approx(1 - share, abs=0.02)
    ticket = keras.models.load_model(tmp_path / "ticket.keras")
    kernels = [layer.kernel for layer in ticket.layers]
    zeros = sum(int((keras.ops.convert_to_numpy(kernel) == 0).sum()) for kernel in kernels)
    assert zeros == report.size - report.alive
    assert "dense" in capsys.readouterr().out

    for block in rest:
        pages.run("finding-a-ticket.md", block, names)
    arms = [row["arm"] for row in names["result"].rows]
    assert arms == ["dense", *["random_reinit", "random_mask", "ticket"] * 2]


def test_the_earlier_interface_runs(names):
    pages.run_all("from-the-earlier-package.md", names)

    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in names["model"].layers]
    assert [int((kernel == 0).sum()) for kernel in kernels] == [k.size // 2 for k in kernels]
    assert np.isfinite([names["untrained_loss"], names["trained_loss"]]).all()


def test_the_page_of_installing_lists_every_extra():
    text = (ROOT / "docs/installing.md").read_text("utf-8")
    extras = re.findall(r"^\| (`.+`) \|", text, flags=re.M)
    listed = [name for row in extras for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(PYPROJECT["project"]["optional-dependencies"])


def test_the_page_of_installing_states_the_lowest_versions():
    text = (ROOT / "docs/installing.md").read_text("utf-8")
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["jax"], *extras["torch"]]
    lowest = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(required), re.M))
    table = dict(re.findall(r"^\| `?([\w-]+)`? \| ([\d.]+) \|$", text, re.M))
    assert table.pop("Python") == project["requires-python"].removeprefix(">=")
    assert table == {
        name: lowest[name] for name in ("keras", "numpy", "tensorflow", "jax", "torch")
    }
    without = set(re.findall(r'"([\w-]+>=[\d.]+)"', text))
    base = set(project["dependencies"]) - {f"tensorflow>={lowest['tensorflow']}"}
    assert without == base | {f"jax>={lowest['jax']}"}


def test_readme_fits_on_a_screen_and_keeps_the_blocks_that_tools_run():
    """Tools clone the repository and run the first block under these headings."""
    text = pages.README.read_text("utf-8")
    assert len(text.splitlines()) <= 90
    assert max(map(len, text.splitlines())) <= 120
    first = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^#).)*?^```sh\n(.*?)^```$", text, re.M | re.S))
    assert first["Quick start"] == 'python -m pip install ".[cli]"\nlottery-ticket run\n'
    assert first["Tests"] == "python -m pip install tox\ntox\n"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_links_in_documents_are_valid(page):
    """`tox -e docs` also checks the headings that links name."""
    links = re.findall(
        r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")
    )
    assert [link for link in links if not (page.parent / link).exists()] == []
