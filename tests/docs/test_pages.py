"""Code of README and of all pages, run unchanged; their commands and the API reference, checked."""

import importlib.util
import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest

import lottery_ticket_pruner
import masked_layers as ml
import pages
import processes

PAGES = pages.PAGES
# Tests of their own run these pages, here or in a file named after the page.
TESTED = {
    *("README.md", "serving.md", "extending.md", "migrating-from-tfmot.md", "shrinking.md"),
    *("ticket-files.md", "pruning-to-a-tolerance.md", "from-the-earlier-package.md"),
    *("finding-a-ticket.md", "distribution.md"),
}
# Of these, quicker tests of the same functions notice most faults.
SLOW = {
    *("first-steps.md", "fast-on-a-processor.md", "from-torch.md", "quantizing-and-pruning.md"),
    *("index.md", "sparse-training.md", "strategies.md", "supermasks.md"),
}
RUN = sorted(page for page in PAGES if pages.blocks(page) and page.name not in TESTED)


def commands():
    for page in PAGES:
        for block in re.findall(
            r"^```(?:sh|bash)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and (words[0] == "lottery-ticket" or words[:2] == ["python", "-m"]):
                    words = words[: words.index(">")] if ">" in words else words
                    yield pytest.param(words, id=f"{page.name}: {line.strip()}")


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, "relu"),
            keras.layers.Dense(3, "softmax", name="output"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(160, 8)).astype("float32"), rng.integers(0, 3, 160)
    data = {"x_train": x, "y_train": y, "x_test": x[:64], "y_test": y[:64]}
    return {"model": model, **data, "inputs": x[:2], "data": (x, y)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_is_run_or_says_why_not(page):
    assert not pages.unmarked(page)


@pytest.mark.once
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in SLOW else ())
        for page in RUN
    ],
)
def test_pages_run_from_top_to_bottom(names, page):
    pages.run_all(page, names)


@pytest.mark.once
def test_readme_prunes_and_saves(names):
    pages.run_all(pages.README, names)
    assert sorted(path.name for path in Path("pruned").iterdir()) == ["model.keras", "served"]


@pytest.mark.slow
@pytest.mark.once
def test_the_page_on_pruning_to_a_tolerance_runs_from_top_to_bottom(names):
    pages.run_all("pruning-to-a-tolerance.md", names)
    assert names["result"].sparsity > 0.5


@pytest.mark.slow
@pytest.mark.once
def test_the_page_on_serving_runs_from_top_to_bottom(names):
    if not all(map(importlib.util.find_spec, ("tf2onnx", "onnx"))):
        pytest.skip("the page exports to ONNX, too")
    names["model"] = ml.convert_to_masked(names["model"])
    pages.run_all("serving.md", names)
    expected = names["model"](names["inputs"])
    (outputs,) = names["outputs"].values()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)
    for file in ("model.onnx", "model.tflite"):
        assert Path(file).stat().st_size
    np.testing.assert_array_equal(names["kernel"], np.eye(300))


@pytest.mark.once("tensorflow")
def test_the_page_on_distribution_runs():
    (code,) = (code for code in pages.code_of("distribution.md") if "tf.distribute" in code)
    code += "print(ml.sparsity_report(masked).sparsity)"
    assert float(processes.printed_by_one(code)[-1]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.once
@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_such_as_there_are(words, monkeypatch, tmp_path):
    if words[0] == "python":
        place = pages.README.parent / words[2].replace(".", "/")
        own = words[2].partition(".")[0] == "benchmarks"
        assert not own or place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
        return
    pytest.importorskip("tyro")
    from lottery_ticket_pruner import cli
    from lottery_ticket_pruner.commands import compare, prune, repeat, report, sweep
    from lottery_ticket_pruner.commands.saved_models import ExportConfig, InspectConfig

    class ParsedError(Exception):
        pass

    def parsed(*args):
        raise ParsedError

    monkeypatch.chdir(tmp_path)
    from lottery_ticket_pruner.experiments import workbench

    for owner, name in (
        (workbench, "load_and_resolve"), (prune, "prune"), (sweep, "sweep"),
        (report, "write_report"), (compare, "compare"),
        (repeat.RepeatConfig, "configuration"), (ExportConfig, "execute"),
        (InspectConfig, "execute"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, parsed)
    # What is answered before a command is chosen ends the process.
    with pytest.raises(SystemExit if words[1] == "--print-completion" else ParsedError):
        cli.main(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_dotted_code_exist(page):
    """Finds names such as `masked_layers.shrink` in running text."""
    missing = []
    for name in set(
        re.findall(r"`(masked_layers|lottery_ticket_pruner)((?:\.\w+)+)", page.read_text("utf-8"))
    ):
        module, rest = name
        found = {"masked_layers": ml, "lottery_ticket_pruner": lottery_ticket_pruner}[module]
        for part in rest.strip(".").split("."):
            if not hasattr(found, part) and importlib.util.find_spec(f"{found.__name__}.{part}"):
                importlib.import_module(f"{found.__name__}.{part}")
            if not hasattr(found, part):
                missing.append(module + rest)
                break
            found = getattr(found, part)
    assert not missing


@pytest.mark.slow
@pytest.mark.once
def test_the_page_on_shrinking_runs_from_top_to_bottom(capsys):
    names = pages.run_all("shrinking.md", {})
    assert names["difference"] < 1e-4
    assert names["dense"] > 0.97
    assert names["pruned"] > 0.9
    report = names["report"]
    assert report.macs_after <= 0.35 * report.macs_before
    assert [len(family.layers) for family in names["found"].families] == [3, 1, 1]
    assert "effective sparsity" in capsys.readouterr().out


def test_the_reference_has_every_public_name_once():
    listed = [
        name
        for page in (pages.DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.M)
    ]
    assert len(listed) == len(set(listed))
    for package in (ml, lottery_ticket_pruner):
        public = {f"{package.__name__}.{name}" for name in package.__all__}
        top = {name for name in listed if re.fullmatch(rf"{package.__name__}\.\w+", name)}
        modules = {name for name in top if importlib.util.find_spec(name)}
        assert top - modules == public
