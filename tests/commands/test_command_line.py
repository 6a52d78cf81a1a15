"""The command line before any heavy import: help, version, names, and lines for likely mistakes."""

import json
import logging
import os
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

pytest.importorskip("tyro")

import _lottery_ticket
import lottery_ticket_pruner
from _lottery_ticket import (
    commands,
    experiments,
    hints,
    logs,
    names,
    parser,
    refusals,
    synonyms,
    unknown,
    wording,
)
from lottery_ticket_pruner import cli, criteria, search_plans, structures, supermasks, treatments
from lottery_ticket_pruner.commands import saved_models
from lottery_ticket_pruner.compression import ModelComparison, plan
from lottery_ticket_pruner.experiments import catalogue, datasets, networks
from masked_layers.serving import stored_values
from masked_layers.ticket_files import SUFFIX

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]


def test_names_of_options_are_those_that_there_are():
    downloaded = [name for name, data in datasets.NAMED.items() if data.is_downloaded]
    recorded = [
        name
        for name in criteria.names()
        if criteria.get(name).needs <= {"initial", "final"} and criteria.get(name).scope is None
    ]
    ranked_globally = [name for name in criteria.names() if criteria.get(name).scope == "global"]
    for listed, there in (
        (names.DATASETS, datasets.NAMES),
        (names.DOWNLOADED, downloaded),
        (names.NETWORKS, networks.NAMES),
        ([names.TICKET_FILE], [SUFFIX]),
        (names.OPTIMIZERS, networks.OPTIMIZERS),
        (names.RECORDED, recorded),
        (names.CRITERIA, criteria.names()),
        (names.GLOBAL, ranked_globally),
        (names.CHANNEL_CRITERIA, criteria.channel_names()),
        (names.RETRAINING, search_plans.RETRAINING),
        (names.KEPT, treatments.kept_names()),
        (names.PRUNED, treatments.pruned_names()),
        (names.CONTROLS, search_plans.CONTROLS),
        (names.WEIGHTS, supermasks.WEIGHTS),
    ):
        assert list(listed) == list(there)
    assert parser.commands().keys() == cli._HANDLERS.keys() | catalogue.KINDS.keys()
    for options, name, there in (
        (commands.ExportOptions, "values", stored_values.CHOICES),
        (commands.ExportOptions, "format", saved_models._OPTIONS),
        (commands.PruneOptions, "method", plan.METHODS),
        (commands.PruneOptions, "scope", plan.SCOPES),
        (commands.PruneOptions, "retraining", plan.RETRAINING),
    ):
        assert set(choices(typing.get_type_hints(options)[name])) == set(there)


def choices(type_):
    """Returns the choices of an option, which may be left out."""
    literal, *_ = typing.get_args(type_) if types.NoneType in typing.get_args(type_) else [type_]
    return typing.get_args(literal)


def test_help_version_and_refusals_import_nothing_heavy_and_fit_the_page():
    script = """
import json, sys
from _lottery_ticket import parser, refusals, unknown
lines = [["--help"], ["--version"], *([name, "--help"] for name in parser.commands())]
for line in lines:
    try:
        parser.parse(line)
    except SystemExit as end:
        assert not end.code
for command, examples in parser.EXAMPLES.items():
    for example in examples:
        unknown.check(parser.parse([command, *example.split()]))
for line in ([], ["fly"], ["run", "--stratgy", "x"], ["run", "--steps", "many"]):
    try:
        parser.parse(line)
    except refusals.UsageError:
        continue
    raise AssertionError(line)
heavy = {"keras", "tensorflow", "numpy", "pandas", "matplotlib", "rich", "lottery_ticket_pruner"}
for line, said in (
    ("run --network lenet", "Unknown network 'lenet'. Did you mean 'lenet-300-100'?"),
    ("run --strategy large_finall", "--strategy: Unknown criterion 'large_finall'. Did you mean"),
    ("sweep --kept rewnd", "--kept: Unknown treatment of kept weights 'rewnd'. Did you mean 'rew"),
    ("supermask --criteria random snp", "--criteria: Unknown criterion 'snp'. Did you mean 'snip'"),
    ("prune --data mnst", "Unknown data set 'mnst'. Did you mean 'mnist'?"),
    ("prune conv2", "Expected as MODEL a .keras or .h5 file,"),
):
    try:
        unknown.check(parser.parse(line.split()))
    except ValueError as error:
        assert said in str(error), error
        continue
    raise AssertionError(line)
for line in (
    "run --strategy mine --data own.py:load",  # The module may register it.
    "run --strategy own.py:mine --network net.keras",
    "run --strategy scale --structure channels --data cifar10",
    "prune own.py:model",
    "prune model.h5 --data own:load",
    "compare a.keras b",
    "inspect served",
):
    unknown.check(parser.parse(line.split()))
print(json.dumps([len(lines), sorted(heavy & sys.modules.keys())]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    *printed, last = done.stdout.splitlines()
    assert json.loads(last) == [13, []]
    assert max(map(len, printed)) <= 80
    assert not any(character in done.stdout for character in "│╭\x1b")
    text = " ".join(" ".join(printed).split())
    assert text.count("exit status: 0 all is done") == 12
    assert text.count("-h, --help Show this help.") == 12
    assert text.count("examples: lottery-ticket ") == 11
    usages = [line for line in done.stdout.splitlines() if line.startswith("usage: ")]
    assert usages.pop() == "usage: lottery-ticket inspect [-h] [OPTIONS] PATH"
    assert f"lottery-ticket-pruner {lottery_ticket_pruner.__version__} Python 3." in text
    for absent in ("(default: )", "(default: None)", "None,"):
        assert absent not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Name a command: prune, compare, run"),
        ("rnu", "Unknown command 'rnu'. Did you mean 'run'?"),
        ("--versoin", "Unknown option '--versoin'. Did you mean '--version'?"),
        ("run --stratgy snip", "`lottery-ticket run` has no option --stratgy. Did you mean '--str"),
        ("run --json", "`lottery-ticket run` has no option --json. See lottery-ticket run --help."),
        ("run --steps many", "--steps expects a whole number. Received: 'many'."),
        ("run --seeds 0,1", "--seeds expects a whole number. Received: '0,1'. Separate several by"),
        (
            "run --scope Globl",
            "--scope expects one of layer, global, isomorphic. Received: 'Globl'",
        ),
        ("run --controls random-mask", "Did you mean 'random_mask'?"),
        ("run --retraining lr_rewinding", "Did you mean 'learning_rate_rewinding'?"),
        ("run --lr 0.1", "Did you mean '--learning-rate'?"),
        ("prune --method magnitude", "Did you mean 'iterative', 'gradual' or 'one_shot'?"),
        ("prune --method structured", "Did you mean 'channels'?"),
        ("prune --size 500 kB --epochs 1", "--size expects no space before the unit: 500kB. Rec"),
        ("prune --latency=3 ms", "--latency expects no space before the unit: 3ms. Received: 3 ms"),
        ("prune --max-drop 1 %", "--max-drop expects a share: 0.01. Received: 1 %."),
        ("run --rewind-to 5 epochs", "--rewind-to expects no space before the unit: 5ep. Rec"),
        ("run --rewind-to 5 %", "--rewind-to expects a number without a unit. Received: 5 %."),
        ("sweep --jobs 2 min", "--jobs expects a number without a unit. Received: 2 min."),
        ("run --network", "--network expects a value."),
        ("run --rewind-to=", None),
        ("run lenet-300-100", "Unexpected: lenet-300-100. Did you mean --network lenet-300-100?"),
        (
            "run my.keras",
            "--network my.keras, or, of a trained model, lottery-ticket prune my.keras?",
        ),
        ("prune --max-drop 1%", "--max-drop expects a number. Received: '1%'. Give a share: 0.01."),
        ("run --rounds 3%", "--rounds expects a whole number. Received: '3%'. See"),
        ("export model.keras", "Expected MODEL OUT."),
        ("export model.keras out --values int9", "Received: 'int9'. Did you mean 'int8'?"),
        ("repeat", "Expected FOLDER."),
        ("compare", "Name at least one model to compare."),
        ("report --quiet", "Name at least one folder to report."),
        ("export a.keras --out served/1", "alone, as in lottery-ticket export MODEL OUT."),
        (
            "prune --model a.keras",
            "--model is not an option: give the value alone, as in lottery-tick",
        ),
        ("run --rate 0.2 --steps 9 --rate conv=0.1", "all values at once (--rate 0.2 conv=0.1)."),
        ("sweep --over rate=0.1,0.2 --over steps=1,2", None),
        (
            "sweep --over rate=0.1,0.2 steps=1,2",
            "Unexpected: steps=1,2. Did you mean --over steps=1",
        ),
        ("compare --model a.keras", "--model is not an option: give the value alone, as in lott"),
        ("run --version", "has no option --version. Did you mean lottery-ticket --version?"),
        ("run --quiet yes", "--quiet takes no value: give --quiet or --no-quiet alone."),
        (
            "prune --overwrite=True",
            "--overwrite takes no value: give --overwrite or --no-overwrite a",
        ),
        ("sweep --jobs two", "--jobs expects a whole number. Received: 'two'."),
        ("prune --size -3", None),
        ("compare --batch-size 8 model.keras", None),
        ("supermask --dwr True --quiet", None),
        ("inspect --json 1", None),
        ("run --learning-rate -1", None),
        ("--print-completion fish", "--print-completion takes bash or zsh."),
    ],
)
def test_likely_mistakes_are_answered_in_one_line(line, message, capsys):
    if message is None:  # Read as they stand, and judged by the command.
        assert parser.parse(line.split()) is not None
        return
    with pytest.raises(refusals.UsageError) as caught:
        parser.parse(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.npz", "give --data own.py:load. Received: the file 'data.npz'."),
        ("./folder", "give --data own.py:load. Received: the folder 'folder'."),
        ("x/mnist.npz", "Of the published files, name the folder: --data mnist --data-dir x."),
        ("own.py", "Name its function, too: own.py:FUNCTION."),
    ],
)
def test_own_data_is_named_by_a_function(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="function that loads") as caught:
        unknown.check_data(name)
    assert str(caught.value).endswith(message)


def test_names_of_elsewhere_mean_some_of_here():
    here = {*parser.commands(), *structures.names(), *structures._NAMES}
    here |= {name for listed in vars(names).values() if type(listed) is tuple for name in listed}
    for kind in parser.commands().values():
        for name, type_ in typing.get_type_hints(kind).items():
            here |= {refusals.option(name), *refusals.choices_of(type_)}
    assert {name for meant in synonyms.MEANT.values() for name in meant} <= here
    assert synonyms.MEANT.keys() == {hints._plain(name) for name in synonyms.MEANT}


def test_close_names_ignore_case_and_hyphens():
    known = ("large_final", "mnist", "lenet-300-100")
    assert [hints.closest(name, known) for name in ("large-final", "MNIST", "lenet", "x")] == [
        "large_final",
        "mnist",
        "lenet-300-100",
        None,
    ]


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (commands.PruneOptions, 'needs method="channels".', "needs --method channels."),
        (commands.PruneOptions, "more than minutes=0.5.", "more than --minutes 0.5."),
        (commands.PruneOptions, "size=1,500 bytes (`size`)", "--size 1,500 bytes (--size)."),
        (commands.PruneOptions, "Received: -1.0", "Received: -1.0."),
        (commands.PruneOptions, "of `Plan(rate=0.5)` or f(rate=1)", None),
        (commands.PruneOptions, "a `model` at runs/rate=0.5", None),
        (commands.PruneOptions, "There is no 'runs/my rate=0.5/x'", None),
        (experiments.RunOptions, "or structure=structures.Channels(at_most=0.9)", None),
        (commands.PruneOptions, 'not: pip install "x[cli]"', 'not: pip install "x[cli]"'),
        (experiments.RunOptions, "structure=None and scope='output'", "no --structure and scope="),
        (experiments.RunOptions, "Pass deterministic=False", "Pass --no-deterministic."),
        (experiments.SweepOptions, "as in --over rate=0.2,0.4?", "as in --over rate=0.2,0.4?"),
    ],
)
def test_messages_name_options_and_are_sentences(kind, text, said):
    found = wording.sentence(wording.of_options(text, kind))
    assert found.startswith(f"{text}." if said is None else said)
    assert wording.sentence(wording.of_options(found, kind)) == found


def test_folders_that_were_probably_meant_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-lenet").mkdir(parents=True)
    (tmp_path / "runs" / "digits-lenet" / "model.keras").touch()
    for given, meant in (("run", "runs"), ("digits", "runs/digits-lenet")):
        assert hints.folder_question(Path(given)) == f" Did you mean '{meant}'?"
    for check in (unknown.check_model, unknown.check_network):
        with pytest.raises(ValueError, match=r"Did you mean 'runs/digits-lenet/model.keras'\?$"):
            check("runs/digits-lenet")


def test_the_ending_of_a_file_does_not_make_its_name_alike(tmp_path):
    (tmp_path / "model.keras").touch()
    assert "model.keras'?" in hints.file_question(tmp_path / "modle.keras", (".keras",))
    assert hints.file_question(tmp_path / "net.keras", (".keras",)) == ""


def test_the_log_of_tensorflow_is_held_back_and_nothing_else(capfd, monkeypatch):
    noise = b"I0000 00:00:1795969938.140852   11048 port.cc:153] oneDNN custom operations are on.\n"
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    with logs.silenced():
        assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
        os.write(2, noise + b"Something else.\n")
    assert capfd.readouterr().err == "Something else.\n"
    logger = logging.getLogger("tensorflow")
    text = "5 out of the last 5 calls to predict triggered tf.function retracing"
    for message, handled in ((text, False), ("Something else", True)):
        record = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None)
        assert bool(logger.filter(record)) is handled
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    with logs.silenced():
        os.write(2, noise)
    assert capfd.readouterr().err == noise.decode()


def test_nothing_is_said_when_the_reader_of_the_output_has_gone(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # Its handlers stay as they are.
    monkeypatch.setattr(sys, "argv", ["lottery-ticket", "--help"])
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert _lottery_ticket.main() == 1
    assert capfd.readouterr() == ("", "")


def test_numbers_that_are_not_finite_are_null_in_json():
    row = {"model": "a", "value": float("nan"), "milliseconds": float("inf")}
    document = json.loads(cli._document(ModelComparison("accuracy", [row], 9, ("A note.",))))
    assert document["rows"] == [{"model": "a", "value": None, "milliseconds": None}]
    assert document["notes"] == ["A note."]


@pytest.mark.parametrize(("shell", "says"), [("bash", "complete -F"), ("zsh", "#compdef")])
def test_a_completion_knows_commands_options_and_choices(shell, says, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse(["--print-completion", shell])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert says in text
    for part in ("sweep-supermask", "--final-sparsity", "learning_rate_rewinding"):
        assert part in text
