"""Jobs on a cluster, with threads in place of a library (test_cluster_libraries.py has these)."""

import concurrent.futures
import dataclasses
import functools
import io
import itertools
import time
import types

import keras
import pytest

pytest.importorskip("tyro")

from rich.console import Console

from _lottery_ticket import jobs as worker
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import clusters, engines
from lottery_ticket_pruner.commands.clusters import ClusterExecutor, NotSharedError
from stand_in_jobs import (
    SCRIPT,
    interrupt_this_process,
    is_running,
    jobs_of,
    looks,
    wait_until,
    when,
)

pytestmark = pytest.mark.once


class Threads:
    """An engine whose workers are threads, which lose a job as often as its folder says."""

    at_once, threads = None, 3
    description = demand = "threads"

    def __init__(self):
        self.pool = concurrent.futures.ThreadPoolExecutor(8)
        self.lost, self.cancelled = {}, []
        self.workers = lambda: 8
        self.seen = lambda call: call

    def open(self):
        pass

    def close(self):
        self.pool.shutdown()

    def submit(self, call):
        call = self.seen(call)
        name = call.folder.rpartition("/")[2]
        if self.lost.get(name, 0):
            self.lost[name] -= 1
            return name
        return self.pool.submit(worker.execute, call)

    def outcome(self, handle):
        if isinstance(handle, str):
            raise engines.LostError("its node went down")
        return handle.result() if handle.done() else None

    def cancel(self, handle):
        self.cancelled.append(handle)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Returns an engine, and a function that executes stand-ins on it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(clusters, "COMMAND", (str(tmp_path / "script.py"),))
    monkeypatch.setattr(clusters, "_POLL", 0.05)
    monkeypatch.setattr(clusters, "_LEFTOVERS", 0.5)
    monkeypatch.setattr(clusters, "_CANCELLING", 300.0)
    monkeypatch.setattr(worker, "_POLL", 0.1)
    engine = Threads()
    folder = tmp_path / "sweep"
    folder.mkdir()

    def execute(*what, jobs=None, output=None):
        todo = jobs_of(folder, *what)
        console = Console(file=output or io.StringIO(), width=120)
        with ClusterExecutor(engine, folder, jobs, console) as executor:
            failures = executor.run(todo)
        return todo, failures, console.file.getvalue()

    return engine, execute


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


def test_jobs_end_in_their_folders_and_one_that_fails_is_not_repeated(cluster, tmp_path):
    _, execute = cluster
    todo, failures, printed = execute("a", "fail", "b", jobs=2)
    assert [job.is_done for job in todo] == [True, False, True]
    (failure,) = failures
    assert (failure.child, failure.message) == (todo[1], "this one is bad")
    assert failure.log.read_text() == (
        "this is fail tensorflow 3\nlottery-ticket: this one is bad\n"
    )
    assert "3 of 3" in printed
    assert "1: fail: failed" in printed
    assert [len(job.starts) for job in todo] == [1, 1, 1]
    assert not hidden(tmp_path)


def test_a_job_whose_worker_dies_is_started_again_twice(cluster, tmp_path):
    engine, execute = cluster
    engine.lost = {"job-0": 2, "job-1": 3}
    todo, failures, printed = execute("a", "b", "c")
    assert [job.is_done for job in todo] == [True, False, True]
    (failure,) = failures
    assert failure.message == "its worker died 3 times: its node went down"
    assert failure.log.is_file()
    assert printed.count("0: a: lost with its worker, and submitted again") == 2
    assert not hidden(tmp_path)


def test_a_lost_job_that_waits_again_does_not_count_as_running(cluster, tmp_path, monkeypatch):
    engine, execute = cluster
    really, submitted, said = worker.execute, [], io.StringIO()
    silence = "No job has started for 0 s on threads"

    def lost_after_its_start(call):
        submitted.append(call)
        if len(submitted) == 1:
            facts = {"marker": call.marker.rpartition("/")[2], "count": 1, "host": "elsewhere"}
            worker._write_starts(tmp_path / "sweep" / "job-0", facts)
            engine.lost = {"job-0": 1}
        return call

    def late(call):
        wait_until(lambda: silence in said.getvalue())
        return really(call)

    engine.seen = lost_after_its_start
    monkeypatch.setattr(clusters, "_SILENCE", 0.2)
    monkeypatch.setattr(worker, "execute", late)
    (job,), failures, _ = execute("a", output=said)
    assert job.is_done
    assert not failures


def test_a_cluster_without_workers_is_said_and_ends_the_sweep(cluster, tmp_path, monkeypatch):
    """Some, such as dask, start a job again on the next worker by themselves."""
    engine, execute = cluster
    (job,) = jobs_of(tmp_path / "sweep", "wait")
    passed = 0.0

    def counts():
        yield from (0, 1)  # At first none, then some.
        while not job.starts:
            yield 1
        yield from (0, 0, 0, 0, None, 1)
        yield from itertools.repeat(0)

    number = counts()

    def workers():
        nonlocal passed
        passed += 30.0
        return next(number)

    engine.workers = workers
    now = time.monotonic
    clock = types.SimpleNamespace(monotonic=lambda: now() + passed, sleep=time.sleep)
    monkeypatch.setattr(clusters, "time", clock)
    said = io.StringIO()
    with pytest.raises(engines.EngineError, match=r"back for 15 minutes on threads\..*again"):
        execute("wait", output=said)
    assert said.getvalue().count("No worker is left on threads. If none comes back") == 2
    assert said.getvalue().count("There are workers again on threads.") == 1
    assert not is_running(job.starts[0][0])
    assert not hidden(tmp_path)


def test_starts_are_counted_on_clusters_that_repeat_jobs_by_themselves(cluster, tmp_path):
    """Dask and Slurm do so; nothing but the job's folder tells how often."""
    engine, execute = cluster
    folder = tmp_path / "sweep" / "job-0"
    (tmp_path / "sweep").mkdir(exist_ok=True)

    def repeated(call):
        for _ in range(3):  # Workers that died after the start.
            worker._write_starts(
                folder,
                {
                    "marker": call.marker.rpartition("/")[2],
                    "count": worker.starts(folder, clusters.Path(call.marker)) + 1,
                    "host": "elsewhere",
                },
            )
        return call

    engine.seen = repeated
    (job,), (failure,), printed = execute("a")
    assert failure.message == "its worker died 3 times"
    assert "0: a: its worker died; start 3 of 3, on elsewhere" in printed
    assert "Jobs started again because their workers died: 2" in printed
    assert not job.starts


@pytest.mark.parametrize("what", ["folder", "marker", "directory"])
def test_a_worker_that_does_not_see_the_folder_ends_the_sweep(cluster, tmp_path, what):
    engine, execute = cluster
    engine.seen = lambda call: dataclasses.replace(call, **{what: f"/nowhere/{what}"})
    with pytest.raises(NotSharedError, match=rf"does not see '/nowhere/{what}'.*--out"):
        execute("a", "b")
    assert not list(tmp_path.glob("sweep/*/starts"))
    assert not hidden(tmp_path)


def test_a_worker_that_cannot_write_ends_the_sweep(cluster, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "_write_starts", full)
    with pytest.raises(NotSharedError, match=r"cannot write in '.*job-0': .*No space left"):
        cluster[1]("a")


def test_other_versions_of_a_worker_are_said_once(cluster, monkeypatch):
    _, execute = cluster
    own = worker.versions()
    assert own["keras"] == keras.__version__
    monkeypatch.setattr(worker, "versions", lambda: own | {"keras": "3.0.1", "another": "1"})
    _, failures, printed = execute("a", "b")
    assert not failures
    said = f"has other versions, with which results may differ: keras 3.0.1 (here {own['keras']})"
    assert " ".join(printed.split()).count(said) == 1


def test_an_interruption_ends_the_jobs_and_takes_back_the_others(cluster, tmp_path, monkeypatch):
    engine, execute = cluster
    (job, _) = jobs_of(tmp_path / "sweep", "wait", "a")
    looked, said = looks(monkeypatch), io.StringIO()
    when(lambda: looked and job.starts, interrupt_this_process)
    with pytest.raises(KeyboardInterrupt):
        execute("wait", "a", jobs=1, output=said)
    assert "Cancelled 1 jobs on threads." in said.getvalue()  # All have confirmed it.
    ((process, _),) = job.starts
    assert not is_running(process)
    assert len(engine.cancelled) == 1
    assert not (tmp_path / "sweep" / "job-1").exists()
    assert not hidden(tmp_path)


def test_jobs_of_a_sweep_that_was_killed_end(cluster, tmp_path, monkeypatch):
    """By the next sweep in the folder, or because the marker no longer changes."""
    engine, execute = cluster
    call = worker.Call(
        clusters.COMMAND,
        ("wait", str(tmp_path)),
        str(tmp_path),
        str(tmp_path / "sweep" / f"{clusters.MARKER}0"),
        str(tmp_path),
        {"KERAS_BACKEND": "tensorflow"},
        starts=5,
    )
    clusters.Path(call.marker).write_text("1\n")
    left = engine.pool.submit(worker.execute, call)
    wait_until((tmp_path / "starts").exists)
    _, _, printed = execute("a")
    assert "Ending the jobs of an earlier sweep" in printed
    assert left.result(300).status is None
    monkeypatch.setattr(worker, "PATIENCE", 0.5)
    clusters.Path(call.marker).write_text("1\n")
    assert worker.execute(call).status is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--executor-option", "num_gpus=1"), "--executor-option needs --executor ray, slurm or"),
        (("--executor", "local", "--address", "auto"), "--address needs --executor ray or dask"),
        (("--executor", "rey"), "one of local, ray, slurm, dask. Received: 'rey'. Did you mean"),
        (("--executor", "local", "--executor-option", "gpus"), "NAME=VALUE.*Received: 'gpus'"),
        (("--executor", "local", "--jobs", "0"), "--jobs must be positive. Received: 0"),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_wrong_options_are_refused(command, arguments, message, tmp_path, capsys):
    import re

    assert cli.main([command, *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) or (command == "run" and "needs --executor" in said)
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_library_is_named_with_its_extra(name, package, monkeypatch, tmp_path, capsys):
    find = "lottery_ticket_pruner.checks.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    monkeypatch.setattr("_lottery_ticket.parser._EXTRA", ())
    assert cli.main(["sweep", "--executor", name, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"the package {package}, which is not installed" in said
    assert f'pip install "lottery-ticket-pruner[{name}]"' in said


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (functools.partial(engines.RayEngine, None), {"num_cpus": None}),
        (functools.partial(engines.SlurmEngine, clusters.Path()), {"cpus_per_task": "two"}),
        (functools.partial(engines.DaskEngine, None), {"GPU": float("nan")}),
    ],
)
def test_what_a_job_asks_for_is_a_number(engine, options):
    ((name, value),) = options.items()
    message = f"--executor-option {name}= expects a number. Received: {value!r}"
    with pytest.raises(engines.EngineError, match=message):
        engine(options)


def test_prune_has_no_jobs(capsys):
    assert cli.main(["prune", "--executor", "ray"]) == 2
    assert "each step follows from the one before" in capsys.readouterr().err
