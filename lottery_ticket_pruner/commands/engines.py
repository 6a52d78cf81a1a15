"""Clusters that execute jobs: Ray, Slurm (by submitit) and dask, behind one interface."""

import asyncio
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from _lottery_ticket.jobs import Call, Outcome, execute, execute_on_dask
from lottery_ticket_pruner.checks import line_of

# Seconds in which a cluster has to answer.
_ANSWER = 10.0
# How a client begins HTTP/2: its preface and a frame of empty settings, whose type has this byte.
# Servers begin with such a frame, too.
_SETTINGS = b"\x04"
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)


class EngineError(ValueError):
    """A cluster that cannot be reached, refuses jobs, or whose workers cannot execute them."""


class LostError(Exception):
    """A job whose worker died."""


class Engine(Protocol):
    """The interface of a cluster.

    Attributes:
        at_once: Number of jobs that are submitted at a time by default. None for all.
        threads: Number of threads of a job. None if the worker decides.
        description: What and where it is, for messages.
        demand: The same with what a job asks for.
    """

    at_once: int | None
    threads: int | None
    description: str

    @property
    def demand(self) -> str:
        """Description of the cluster and its place, with what a job asks for."""

    def open(self) -> None:
        """Connects to it.

        Raises:
            EngineError: If that is not possible.
        """

    def submit(self, call: Call) -> Any:
        """Submits a job, and returns its handle.

        Raises:
            EngineError: If the cluster refuses it.
        """

    def outcome(self, handle: Any) -> Outcome | None:
        """Returns how a job ended, or None if it has not.

        Raises:
            LostError: If its worker died.
            EngineError: If the worker could not execute it.
        """

    def workers(self) -> int | None:
        """Returns how many workers could execute a job.

        None if that cannot be said: where a queue decides when there are machines, and while
        nobody answers.
        """

    def cancel(self, handle: Any) -> None:
        """Takes a job from the queue. One that is running ends when the marker is removed."""

    def close(self) -> None:
        """Ends the connection."""


def _start_ray(settings: Mapping[str, Any]) -> None:
    """Starts Ray on this machine for the time of this process."""
    import ray

    try:
        ray.init("local", include_dashboard=False, **settings)
    except Exception as error:  # Ray has no class for "the current node timed out".
        raise EngineError(
            f"Ray could not be started on this machine: {line_of(error)} Try again when it is "
            "less busy, or start Ray before (`ray start --head`)."
        ) from error


class RayEngine:
    """Tasks of Ray.

    Args:
        address: Address of the cluster. None for the one that `RAY_ADDRESS` or Ray on this machine
            names, or else for one that is started on this machine and ends with the sweep.
        options: Options of `ray.remote`, such as `num_cpus`.
    """

    at_once: int | None = None

    def __init__(self, address: str | None, options: Mapping[str, Any]) -> None:
        self._address = address
        self._options = {"num_cpus": 1, **options}
        self.threads: int | None = _cores(self._options, "num_cpus")
        self.description = "Ray"

    @property
    def demand(self) -> str:
        """Description of the cluster and its place, with what a job asks for."""
        return f"{self.description}. A job asks for {_listed(self._options)}"

    def open(self) -> None:
        """Connects to the cluster, or starts one."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Nothing is sent unless asked for.
        import ray

        try:
            # Without Ray's own retries, which nobody would hear of.
            self._task = ray.remote(execute).options(max_retries=0, **self._options)
        except (TypeError, ValueError) as error:
            raise EngineError(f"--executor-option: {line_of(error)}") from error
        settings = {"log_to_driver": False, "logging_level": "ERROR"}
        address = self._address or os.environ.get("RAY_ADDRESS")
        if address is None:
            try:
                _check_that_ray_may_answer(_last_cluster_of_ray())
                ray.init("auto", **settings)
            except OSError:  # Also if that cluster was killed: Ray would wait for minutes.
                _start_ray(settings)
                self.description = "Ray, started on this machine"
                return
        else:
            try:
                _check_that_ray_may_answer(address)
                ray.init(address, **settings)
            except (OSError, RuntimeError, ValueError) as error:
                raise EngineError(
                    f"There is no Ray cluster at '{address}': {line_of(error)}"
                ) from error
        self.description = f"Ray at {ray.get_runtime_context().gcs_address}"

    def submit(self, call: Call) -> Any:
        """Submits a job, and returns its handle."""
        return self._task.remote(call)

    def outcome(self, handle: Any) -> Outcome | None:
        """Returns how a job ended, or None if it has not."""
        import ray

        done, _ = ray.wait([handle], timeout=0)
        if not done:
            return None
        lost = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.LocalRayletDiedError,
        )
        try:
            return ray.get(handle)
        except lost as error:
            raise LostError(line_of(error).partition(". ")[0]) from error
        except ray.exceptions.RayError as error:
            raise _not_executed(self, error) from error

    def workers(self) -> int | None:
        """Returns how many nodes have what a job asks for."""
        import ray

        asked = {"CPU": self._options["num_cpus"], "GPU": self._options.get("num_gpus") or 0}
        asked |= self._options.get("resources") or {}
        try:
            nodes = ray.nodes()
        except Exception:  # Of several kinds. If the head is gone, Ray ends this process.
            return None
        return sum(_covers(node["Resources"], asked) for node in nodes if node["Alive"])

    def cancel(self, handle: Any) -> None:
        """Takes a job from the queue."""
        import ray

        ray.cancel(handle)

    def close(self) -> None:
        """Ends the connection."""
        import ray

        ray.shutdown()


class SlurmEngine:
    """Jobs of Slurm, by submitit.

    Args:
        folder: Folder for the files by which submitit and its jobs communicate.
        options: Options of submitit's `AutoExecutor`, such as `slurm_partition`, and its `cluster`.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._options = {"cpus_per_task": 1, "timeout_min": 24 * 60, **options}
        self._cluster = self._options.pop("cluster", "slurm")
        self.threads: int | None = _cores(self._options, "cpus_per_task")
        is_local = self._cluster != "slurm"
        self.at_once: int | None = (os.cpu_count() or 1) if is_local else None
        self.description = f"submitit's {self._cluster} executor" if is_local else "Slurm"

    @property
    def demand(self) -> str:
        """Description of the cluster and its place, with what a job asks for."""
        return f"{self.description}. A job asks for {_listed(self._options)}"

    def open(self) -> None:
        """Finds Slurm."""
        import submitit

        if self._cluster == "slurm" and not shutil.which("sbatch"):
            raise EngineError(
                "There is no Slurm on this machine: sbatch is not found. Start the command on a "
                "login node. --executor-option cluster=local tries it without Slurm."
            )
        try:
            self._executor = submitit.AutoExecutor(self._folder, cluster=self._cluster)
            self._executor.update_parameters(**self._options)
        except (NameError, TypeError, ValueError) as error:
            raise EngineError(f"--executor-option: {line_of(error)}") from error

    def submit(self, call: Call) -> Any:
        """Submits a job, and returns its handle."""
        import submitit

        try:
            return self._executor.submit(execute, call)
        except (submitit.core.utils.FailedJobError, OSError, RuntimeError) as error:
            raise EngineError(f"{self.description} refuses a job: {line_of(error)}") from error

    def outcome(self, handle: Any) -> Outcome | None:
        """Returns how a job ended, or None if it has not."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not handle.done():
            return None
        try:
            return handle.result()
        except FailedJobError as error:
            raise _not_executed(self, error) from error
        except UncompletedJobError as error:
            said = [line for line in (handle.stderr() or "").splitlines() if line.strip()]
            last = f": {said[-1]}" if said else ""
            raise LostError(f"job {handle.job_id} is {handle.state}{last}") from error

    def workers(self) -> int | None:
        """Returns None: Slurm queues jobs until there are machines."""
        return None

    def cancel(self, handle: Any) -> None:
        """Takes a job from the queue."""
        handle.cancel()

    def close(self) -> None:
        """Removes the files of jobs that have ended."""
        shutil.rmtree(self._folder, ignore_errors=True)


class DaskEngine:
    """Tasks of dask's distributed scheduler.

    Args:
        address: Address of the scheduler. None for the one that dask's configuration names
            (`DASK_SCHEDULER_ADDRESS`), or else for a worker in this process with a thread per core.
        options: Amounts of the workers' resources that a job needs, such as `GPU=1`.
    """

    at_once: int | None = None
    threads: int | None = None

    def __init__(self, address: str | None, options: Mapping[str, Any]) -> None:
        self._address = address
        self._resources = {name: _number(options, name) for name in options}
        self.description = "dask"

    @property
    def demand(self) -> str:
        """Description of the cluster and its place, with what a job asks for."""
        needs = f". A job asks for {_listed(self._resources)}" if self._resources else ""
        return f"{self.description}{needs}"

    def open(self) -> None:
        """Connects to the scheduler, or starts one."""
        import dask
        import distributed

        address = self._address or dask.config.get("scheduler-address", None)
        if address is None:
            # Threads of this process: jobs are processes of their own.
            self._cluster = distributed.LocalCluster(
                n_workers=1,
                threads_per_worker=os.cpu_count() or 1,
                processes=False,
                dashboard_address=":0",
            )
            self._client = distributed.Client(self._cluster)
            self.description = "dask, started on this machine"
            return
        self._cluster = None
        try:
            asyncio.run(_check_that_a_scheduler_answers(address))
            self._client = distributed.Client(address, timeout=f"{_ANSWER} s")
        except Exception as error:  # Of any kind: another program there may answer anything.
            silent = f"nothing answers as one within {_ANSWER:.0f} s"
            why = silent if isinstance(error, TimeoutError) else line_of(error)
            raise EngineError(f"There is no dask scheduler at '{address}': {why}") from error
        self.description = f"dask at {address}"

    def submit(self, call: Call) -> Any:
        """Submits a job, and returns its handle."""
        try:
            return self._client.submit(
                execute_on_dask, call, pure=False, resources=self._resources or None, retries=0
            )
        except Exception as error:  # Of several kinds if the scheduler is gone.
            raise EngineError(f"{self.description} takes no jobs: {line_of(error)}") from error

    def outcome(self, handle: Any) -> Outcome | None:
        """Returns how a job ended, or None if it has not."""
        import distributed

        if handle.status in ("cancelled", "lost"):
            raise LostError("the scheduler has lost it")
        if not handle.done():
            return None
        try:
            return handle.result(timeout=30)
        except distributed.scheduler.KilledWorker as error:
            raise LostError(line_of(error).partition(". ")[0]) from error
        except Exception as error:  # Of any kind: that of the worker.
            raise _not_executed(self, error) from error

    def workers(self) -> int | None:
        """Returns how many workers offer what a job asks for."""
        # `scheduler_info` would wait for a busy scheduler without end, while no job sees that the
        # sweep is alive, and returns one without workers if there is no answer.
        identity = self._client.scheduler.identity
        try:
            found = self._client.sync(identity, callback_timeout=f"{_ANSWER} s")["workers"]
        except Exception:  # Of several kinds. If the scheduler is gone, its jobs are lost.
            return None
        return sum(_covers(worker["resources"], self._resources) for worker in found.values())

    def cancel(self, handle: Any) -> None:
        """Takes a job from the queue."""
        handle.cancel()

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _last_cluster_of_ray() -> str:
    """Returns the address that Ray has noted on this machine, where a cluster may no longer be."""
    place = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    try:
        return Path(place, "ray", "ray_current_cluster").read_text()
    except OSError:
        return ""


def _check_that_ray_may_answer(address: str) -> None:
    """Begins to talk HTTP/2 with an address, as Ray does, because Ray itself tries for minutes.

    Raises:
        OSError: If nothing answers, or another program does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    with socket.create_connection((host, int(port)), timeout=_ANSWER) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(_HTTP2)
        if connection.recv(4)[3:] != _SETTINGS:
            raise ConnectionError("another program answers at this port")


async def _check_that_a_scheduler_answers(address: str) -> None:
    """Connects to an address for a moment, because dask waits for the first answer without end."""
    import distributed
    from distributed.comm import connect

    settings = distributed.Security().get_connection_args("client")
    # The limit of `connect` is that of connecting, without the answer.
    comm = await asyncio.wait_for(connect(address, timeout=_ANSWER, **settings), _ANSWER + 1)
    await comm.close()


def _cores(options: Mapping[str, Any], name: str) -> int:
    return max(1, int(_number(options, name)))


def _number(options: Mapping[str, Any], name: str) -> int | float:
    """Returns the value of an option of a cluster that is a number, because some take any.

    Raises:
        EngineError: If it is not a number, or not finite.
    """
    value = options[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise EngineError(f"--executor-option {name}= expects a number. Received: {value!r}.")


def _covers(offered: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    return all(offered.get(name, 0) >= amount for name, amount in asked.items())


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _not_executed(engine: Engine, error: Exception) -> EngineError:
    """Returns the error for an exception on a worker, where jobs raise none of their own."""
    # Ray and submitit put the traceback of the worker in front.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1] if lines else type(error).__name__
    return EngineError(
        f"A worker of {engine.description} cannot execute jobs: {said} All workers need the same "
        "Python environment, with lottery-ticket-pruner in it."
    )
