"""Every place that knows experiments knows all of them, and none that is not listed."""

import json

import pytest

pytest.importorskip("tyro")

from _lottery_ticket import parser
from lottery_ticket_pruner.commands import repeat, sweep
from lottery_ticket_pruner.experiments import catalogue, results, written
from lottery_ticket_pruner.experiments.config import Experiment
from lottery_ticket_pruner.experiments.reports import contents, run_folders
from made_up_runs import CONFIG, write_run

pytestmark = pytest.mark.once


@pytest.mark.parametrize("command", catalogue.KINDS)
def test_each_experiment_has_a_command_a_report_and_repetitions(command):
    kind = catalogue.kind_of(command)
    assert issubclass(kind.config, Experiment)
    assert issubclass(kind.config, parser.commands()[command])
    assert type(repeat.read({"command": command})) is kind.config
    config = json.loads(json.dumps(kind.config().resolve(600).to_dict()))
    assert results.rows_per_seed(config | {"command": command}) > 0
    assert isinstance(kind.subject(config), str)
    if kind.sign:  # Nobody can tell the command of such a folder in another way.
        assert catalogue.command_of(config) == command


def test_the_parts_of_reports_are_those_of_the_experiments():
    assert list(contents.VIEWS) == list(catalogue.KINDS)


def test_the_experiments_that_say_so_can_be_swept():
    swept = {command for command, kind in catalogue.KINDS.items() if kind.swept}
    assert {kind.name for kind in sweep._KINDS} == swept


def test_the_command_that_a_folder_names_decides_whatever_its_options_are(tmp_path):
    named = write_run(tmp_path / "a", [{"replicate": 0, "sparsity": 0.5, "criterion": "random",
                                        "test_accuracy": 0.5}], command="supermask")  # fmt: skip
    assert "rounds" in CONFIG  # An option of another command.
    assert run_folders.read_run(named).kind.command == "supermask"
    assert run_folders.read_run(write_run(tmp_path / "b")).kind.command == "run"


def test_what_belongs_to_no_experiment_is_refused_and_named(tmp_path):
    folder = write_run(tmp_path / "later", command="later")
    with pytest.raises(ValueError, match="later' was written by `lottery-ticket later`, which is"):
        run_folders.read_run(folder)
    with pytest.raises(ValueError, match=r"one of run, .* Received: 'later'"):
        results.rows_per_seed({"command": "later"})
    with pytest.raises(ValueError, match="Received: 'later'"):
        written.results_in(folder, "later")
    # Nothing there is known to belong to the command.
    assert {path.name for path in written.others_in(folder, "later")} == {"results.csv"}
    row = [{"replicate": 0, "sparsity": 0.5, "test_accuracy": 0.5}]
    with pytest.raises(ValueError, match="lacks the columns of the results of any experiment"):
        run_folders.groups_of(run_folders.find_runs([write_run(tmp_path / "unknown", row)]))
    with pytest.raises(ValueError, match="of the results of `lottery-ticket run`"):
        run_folders.read_run(write_run(tmp_path / "run", row, command="run")).kind  # noqa: B018
