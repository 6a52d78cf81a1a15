"""Jobs on Ray, submitit's local executor and dask, with workers that die: `tox -e cluster`."""

import importlib.util
import io
import os
import socket
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("tyro")

from rich.console import Console

import _lottery_ticket
from lottery_ticket_pruner.commands import clusters, engines
from lottery_ticket_pruner.commands.clusters import NotSharedError
from lottery_ticket_pruner.commands.engines import EngineError
from lottery_ticket_pruner.commands.executors import executor_of
from lottery_ticket_pruner.commands.sweep import SweepConfig
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

PACKAGES = {"ray": "ray", "slurm": "submitit", "dask": "distributed"}
# Before anything of a test or its fixtures is executed.
NEEDS = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed (tox -e cluster)",
    )
    for name, package in PACKAGES.items()
}
EACH = [pytest.param(name, marks=mark) for name, mark in NEEDS.items()]
OPTIONS = {"ray": ("num_cpus=0.5",), "slurm": ("cluster=local",), "dask": ()}


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Returns a function that executes stand-ins on the cluster of a library."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(clusters, "COMMAND", (str(tmp_path / "script.py"),))
    monkeypatch.setattr(clusters, "_CANCELLING", 300.0)
    # Workers import the package as this process does.
    source = str(Path(_lottery_ticket.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))

    def run(name, *what, output=None, **options):
        options = {"executor_option": OPTIONS[name], "jobs": 4} | options
        config = SweepConfig(executor=name, **options)
        console = Console(file=output or io.StringIO(), width=120)
        folder = tmp_path / "sweep"
        folder.mkdir(exist_ok=True)
        todo = jobs_of(folder, *what)
        with executor_of(config, folder, console) as executor:
            failures = executor.run(todo)
        return todo, failures, console.file.getvalue()

    return run


@pytest.fixture
def dask_cluster():
    """The address of a scheduler with a worker in a process of its own."""
    import distributed

    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=":0"
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("name", EACH)
def test_a_worker_is_killed_and_a_job_fails(execute, name, tmp_path, request):
    address = request.getfixturevalue("dask_cluster") if name == "dask" else None
    todo, (failure,), printed = execute(name, "kill worker", "fail", "a", jobs=1, address=address)
    assert [job.is_done for job in todo] == [True, False, True]
    assert (failure.child, failure.message) == (todo[1], "this one is bad")
    assert [len(job.starts) for job in todo] == [2, 1, 1]
    assert "0: kill worker: its worker died; start 2 of 3" in printed
    assert "workers died: 1" in printed
    processes = [process for job in todo for process, _ in job.starts]
    wait_until(lambda: not any(map(is_running, processes)))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", EACH)
def test_an_interruption_leaves_no_job_on_the_cluster(execute, name, tmp_path, monkeypatch):
    (job, _) = jobs_of(tmp_path / "sweep", "wait", "a")
    looked, said = looks(monkeypatch), io.StringIO()
    when(lambda: looked and job.starts, interrupt_this_process)
    with pytest.raises(KeyboardInterrupt):
        execute(name, "wait", "a", jobs=1, output=said)
    assert "Cancelled 1 jobs" in said.getvalue()
    assert "not confirmed" not in said.getvalue()
    ((process, _),) = job.starts
    wait_until(lambda: not is_running(process))
    assert not list(tmp_path.glob("sweep/job-1/starts"))
    assert not list(tmp_path.rglob(".cluster*"))


@NEEDS["ray"]
def test_ray_that_does_not_start_is_said(execute, tmp_path, monkeypatch):
    import ray

    def fail(address, **_):
        tried.append(address)
        raise ConnectionError("none") if address == "auto" else Exception("It timed out. More.")

    tried = []
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(EngineError, match=r"Ray could not be started .*It timed out\."):
        execute("ray", "a")
    # What Ray leaves when it is killed, and then tries to reach for minutes.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    with pytest.raises(EngineError, match=r"Ray could not be started .*It timed out\."):
        execute("ray", "a")
    assert tried == ["auto", "local", "local"]


@NEEDS["ray"]
def test_jobs_for_which_there_is_no_room_are_taken_back(execute, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "_SILENCE", 0.1)
    when((tmp_path / "sweep" / "job-1").exists, interrupt_this_process)
    with pytest.raises(KeyboardInterrupt):
        execute("ray", "a", "b", executor_option=("num_cpus=1000",))
    assert not list(tmp_path.glob("sweep/*/starts"))


@NEEDS["ray"]
def test_a_node_of_ray_dies(execute, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        (job,) = jobs_of(tmp_path / "sweep", "wait first")

        def kill_its_node():
            node = psutil.Process(job.starts[0][1]).parent()
            assert node.name() == "raylet"
            node.kill()
            node.wait(300)  # As long as it is a zombie, Ray's workers take it for alive.

        when(lambda: job.starts, kill_its_node)
        options = {"address": cluster.address, "executor_option": ()}
        (job,), failures, printed = execute("ray", "wait first", **options)
        assert not failures
        assert job.is_done
        assert len(job.starts) == 2
        assert "lost with its worker, and submitted again" in printed
        wait_until(lambda: not is_running(job.starts[0][0]))
    finally:
        cluster.shutdown()


@NEEDS["dask"]
def test_a_worker_of_dask_that_does_not_see_the_folder(execute, dask_cluster, monkeypatch):
    (job,), failures, _ = execute("dask", "a", address=dask_cluster)
    assert job.is_done
    assert not failures
    monkeypatch.setattr(clusters.os, "getcwd", lambda: "/nowhere")
    with pytest.raises(NotSharedError, match=f"dask at {dask_cluster}, does not see '/nowhere'"):
        execute("dask", "b", address=dask_cluster)


@NEEDS["dask"]
def test_the_last_worker_of_dask_leaves(execute, tmp_path, monkeypatch):
    import distributed

    monkeypatch.setattr(clusters, "_LOOK", 0.2)
    monkeypatch.setattr(clusters, "_DESERTED", 1.0)
    (job,) = jobs_of(tmp_path / "sweep", "wait")
    looked = looks(monkeypatch)
    with distributed.LocalCluster(n_workers=1, dashboard_address=":0") as cluster:
        when(lambda: looked and job.starts, lambda: cluster.scale(0))
        message = f"No worker has come back .* on dask at {cluster.scheduler_address}. Finished"
        with pytest.raises(EngineError, match=message):
            execute("dask", "wait", address=cluster.scheduler_address)
    wait_until(lambda: not is_running(job.starts[0][0]))


@NEEDS["dask"]
def test_a_scheduler_of_dask_that_is_gone_is_said(execute, tmp_path, monkeypatch):
    import distributed

    (job,) = jobs_of(tmp_path / "sweep", "wait")
    looked = looks(monkeypatch)

    def close():
        monkeypatch.setattr(engines, "_ANSWER", 2.0)  # Not before: it has to answer at first.
        cluster.close()

    with distributed.LocalCluster(n_workers=1, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        when(lambda: looked and job.starts, close)
        with pytest.raises(EngineError, match=rf"dask at {address} takes no jobs: .*closed"):
            execute("dask", "wait", address=address)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ray", {"address": "127.0.0.1:9"}, "no Ray cluster at '127.0.0.1:9'"),
        ("dask", {"address": "tcp://127.0.0.1:9"}, "no dask scheduler at 'tcp://127.0.0.1:9'"),
        ("slurm", {"executor_option": ()}, "sbatch is not found.*cluster=local"),
        ("slurm", {"executor_option": ("cluster=slrm",)}, "--executor-option: .*slrm"),
        ("slurm", {"executor_option": ("cluster=local", "gpus=1")}, "--executor-option: .*gpus"),
        ("ray", {"executor_option": ("gpus=1",)}, "--executor-option: .*gpus"),
    ],
)
def test_what_cannot_be_reached_is_said(execute, name, options, message, monkeypatch):
    pytest.importorskip(PACKAGES[name])
    if name == "slurm":
        monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(EngineError, match=message):
        execute(name, "a", **options)


@pytest.mark.parametrize("name", [param for param in EACH if param.values != ("slurm",)])
def test_another_program_at_the_address_is_not_waited_for(execute, name, monkeypatch):
    """Such as a dashboard, whose port is easily mistaken for that of the scheduler."""
    monkeypatch.setattr(engines, "_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"There is no .* at '{address}': .*(answers|timed)"):
            execute(name, "a", address=address)


@NEEDS["dask"]
def test_jobs_on_dask_share_the_cores_of_their_machine(tmp_path, monkeypatch):
    """Also those of other workers there."""
    import distributed
    from dask import system

    from _lottery_ticket import jobs

    monkeypatch.setattr(jobs, "execute", lambda call: call.threads)
    monkeypatch.setattr(system, "CPU_COUNT", 12)
    call = jobs.Call((), (), "", "", "", {}, starts=1)
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert client.submit(jobs.execute_on_dask, call).result(300) == 2
