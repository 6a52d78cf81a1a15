"""`sweep --search optuna`: which combinations are run, resuming, and what is printed."""

import json
import re

import pytest

pytest.importorskip("tyro")
pytest.importorskip("optuna")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import processes
from lottery_ticket_pruner.commands.processes import Failure
from lottery_ticket_pruner.commands.sweep import SweepConfig, plan, sweep
from lottery_ticket_pruner.experiments import results

pytestmark = pytest.mark.once

HEAD = (
    "round,arm,replicate,sparsity,test_accuracy,test_loss,early_stop_step,seconds,validation_loss"
)
OVER = ("rate=0.1,0.2,0.3,0.4,0.5", "kept=rewind,reinit,finetune")


@pytest.fixture
def runs(monkeypatch):
    """Stands in for the runs: the loss is least at a rate of 0.3, and 0.5 fails."""
    done = []

    def run(pool):
        failures = []
        for child in pool._todo:
            rate = child.config.rate
            done.append((rate, child.config.kept, *child.config.seeds))
            if rate == 0.5:
                failures.append(Failure(child, "diverged", child.folder / "output.log"))
                continue
            child.folder.mkdir(parents=True)
            loss = abs(rate - 0.3) + len(child.config.kept) / 100 + child.config.seeds[0] / 1000
            facts = {"command": "run", "finished": True}
            config = child.config.to_dict() | facts
            (child.folder / "config.json").write_text(json.dumps(config))
            rows = [f"0,dense,0,0,0.9,0.1,4,1,{loss}", f"1,ticket,0,{rate},0.9,0.1,4,1,{loss}"]
            (child.folder / "results.csv").write_text("\n".join([HEAD, *rows, ""]))
        return failures

    monkeypatch.setattr(processes.Pool, "run", run)
    return done


def search(folder, trials, capsys, **options):
    config = SweepConfig(
        over=OVER, search="optuna", trials=trials, rounds=1, controls=(), out=folder, **options
    )
    failures = sweep(config)
    return failures, capsys.readouterr().out


def test_the_best_combinations_are_found_without_running_all(runs, tmp_path, capsys):
    _, printed = search(tmp_path / "one", 9, capsys, seeds=(0, 1))
    tried = {(rate, kept) for rate, kept, _ in runs}
    assert len(tried) == 9  # Of fifteen.
    assert {(*pair, seed) for pair in tried for seed in (0, 1)} == set(runs)
    assert len(runs) == 18
    assert "Best of 9 of 15 combinations" in printed
    # The front, by brute force: the mean over both seeds of what the stand-in writes.
    losses = {
        (rate, kept): abs(rate - 0.3) + len(kept) / 100 + 0.0005
        for rate, kept in tried
        if rate != 0.5
    }
    front = {
        (rate, kept)
        for (rate, kept), loss in losses.items()
        if not any(
            other[0] >= rate and least <= loss and (other[0], least) != (rate, loss)
            for other, least in losses.items()
        )
    }
    for rate, kept in losses:
        shown = f"{rate}" in printed and f"{losses[rate, kept]:.4f}" in printed
        assert shown or (rate, kept) not in front
    table = results.read_table(tmp_path / "one" / "results.csv")
    assert len(table) == 2 * 2 * len(losses)


def test_a_search_goes_on_as_if_it_had_not_been_interrupted(runs, tmp_path, capsys):
    search(tmp_path / "whole", 8, capsys, seeds=(0,))
    whole = list(runs)
    runs.clear()
    search(tmp_path / "parts", 3, capsys, seeds=(0,))
    assert len(runs) == 3
    failed = [run for run in runs if run[0] == 0.5]
    with (tmp_path / "parts" / "optuna.log").open("ab") as journal:
        journal.write(b'{"op_code": 4, "wor')  # As a full disk leaves it.
    search(tmp_path / "parts", 8, capsys, seeds=(0,))
    if not failed:  # Otherwise these are tried again.
        assert runs == whole
    known = {run for run in runs if run[0] != 0.5}
    runs.clear()
    search(tmp_path / "parts", 8, capsys, seeds=(0,))
    assert not known & set(runs)  # Finished runs are not repeated.


def test_losses_that_are_not_finite_are_named_and_failed_trials(
    runs, tmp_path, capsys, monkeypatch
):
    run = processes.Pool.run

    def without_bounds(pool):
        failures = run(pool)
        for child in pool._todo:
            file = child.folder / "results.csv"
            if child.config.rate == 0.2 and child.config.kept == "rewind":
                file.write_text(re.sub(r"[^,]+$", "inf\n", file.read_text()))
        return failures

    monkeypatch.setattr(processes.Pool, "run", without_bounds)
    for _ in range(2):  # Also when the finished search is shown again.
        with pytest.warns(UserWarning, match=r"loss of rate 0\.2, kept rewind is inf"):
            _, printed = search(tmp_path / "one", 15, capsys, seeds=(0,))
        assert "loss is not finite: rate 0.2, kept rewind." in " ".join(printed.split())
    count = len([one for one in runs if one[:2] == (0.2, "rewind")])
    assert count == 1
    assert {"rate": "0.2", "kept": "rewind"} in failed_trials(tmp_path / "one")


def failed_trials(folder):
    import optuna

    journal = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))
    storage = optuna.storages.JournalStorage(journal)
    (study,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=study.study_name, storage=storage)
    failed = study.get_trials(states=[optuna.trial.TrialState.FAIL])
    return [trial.params for trial in failed]


def test_a_trial_that_was_interrupted_is_run_to_its_end(runs, tmp_path, capsys, monkeypatch):
    """Otherwise, Optuna would suggest others from there on."""
    search(tmp_path / "whole", 8, capsys, seeds=(0,))
    whole = list(runs)
    before = [rate for rate, *_ in whole].index(0.5)  # Those that failed would be tried again.
    runs.clear()
    uninterrupted = processes.Pool.run

    def interrupted(pool):
        if len(runs) == before:
            raise KeyboardInterrupt
        return uninterrupted(pool)

    with monkeypatch.context() as patch:
        patch.setattr(processes.Pool, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "parts", 8, capsys, seeds=(0,))
    assert len(runs) == before
    search(tmp_path / "parts", 8, capsys, seeds=(0,))
    assert runs == whole


def test_a_budget_above_the_grid_runs_all_of_it(runs, tmp_path, capsys):
    failures, printed = search(tmp_path, 99, capsys, seeds=(0,))
    assert len(set(runs)) == len(runs) == 15
    assert len(failures) == 3
    assert "Best of 15 of 15" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": ("rate=0.1,0.2",), "trials": 3}, "--trials needs --search optuna"),
        ({"search": "optuna"}, "needs options to choose: --over"),
        ({"search": "optuna", "over": OVER, "trials": 0}, "--trials must be positive"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        plan(SweepConfig(out=tmp_path, **options))


def test_values_that_mean_the_same_are_refused(runs, tmp_path):
    config = SweepConfig(over=("rate=0.2,0.20",), search="optuna", out=tmp_path)
    with pytest.raises(ValueError, match="lead to the same runs"):
        sweep(config)
    assert not runs


def test_without_optuna_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("lottery_ticket_pruner.checks.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("_lottery_ticket.parser._EXTRA", ())
    assert cli.main(["sweep", "--over", "rate=0.1,0.2", "--search", "optuna"]) == 2
    assert 'pip install "lottery-ticket-pruner[optuna]"' in capsys.readouterr().err
