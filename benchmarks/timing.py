"""Measures contenders in turns, in separate processes.

Backends and peers have thread pools, memory and global settings, which separate processes keep
apart. Because contenders take turns, other load on the machine affects all of them equally.
"""

import contextlib
import dataclasses
import gc
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_OURS = ("benchmarks", "lottery_ticket_pruner", "masked_layers")


class MissingError(Exception):
    """Raised if a module that a contender needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One measurable function.

    Attributes:
        setup: `"module:function"`. It is called in the worker with `arguments` and returns
            functions by name; each call of such a function returns one measurement, a number.
        name: Name of the function to measure.
        arguments: Keyword arguments of `setup`.
        environment: Environment variables of the worker, set before anything is imported.
    """

    setup: str
    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def worker(self) -> tuple[Any, ...]:
        """Key of the worker; contenders with the same setup share a process."""
        return self.setup, *sorted(self.arguments.items()), *sorted(self.environment.items())


class Worker:
    """A process that sets up contenders and measures one at a time, on request.

    Raises:
        MissingError: If a module that the setup imports is not installed. The message is its name.
        RuntimeError: If the setup failed. The message contains the traceback.
    """

    def __init__(self, contender: Contender) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 (removed with this object)
        self._process = context.Process(
            target=_serve, args=(theirs, self._log.name, contender), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self, name: str) -> Any:
        self._pipe.send(name)
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            said = Path(self._log.name).read_text(errors="replace")[-2_000:]
            raise RuntimeError(
                f"The worker ended with code {self._process.exitcode}. Its last output: {said}"
            ) from None
        if kind == "value":
            return value
        self.close()
        raise (MissingError if kind == "missing" else RuntimeError)(value)


def _serve(pipe: Any, log: str, contender: Contender) -> None:
    # Libraries write to the standard streams while they are imported and used.
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(contender.environment)
    try:
        module, _, function = contender.setup.partition(":")
        functions = getattr(importlib.import_module(module), function)(**contender.arguments)
        pipe.send(("value", None))
        while True:
            name = pipe.recv()
            gc.collect()
            pipe.send(("value", functions[name]()))
    except EOFError:
        pass
    except ModuleNotFoundError as error:
        root = (error.name or "").partition(".")[0]
        own = root in _OURS or not root
        pipe.send(("failed", traceback.format_exc()) if own else ("missing", root))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def measure(
    contenders: Mapping[str, Contender], repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measures contenders in turns, in reverse order every other round.

    Returns:
        Two dicts by key: the measurements, one per round, and the reasons for missing ones.
    """
    workers: dict[tuple[Any, ...], Worker] = {}
    reasons: dict[tuple[Any, ...], str] = {}
    with contextlib.ExitStack() as stack:
        for contender in contenders.values():
            if contender.worker not in workers.keys() | reasons.keys():
                try:
                    workers[contender.worker] = stack.enter_context(
                        contextlib.closing(Worker(contender))
                    )
                except MissingError as error:
                    reasons[contender.worker] = f"{error} is not installed"
        turns = [key for key, contender in contenders.items() if contender.worker in workers]
        found: dict[str, list[float]] = {key: [] for key in turns}
        for number in range(repeats):
            for key in turns[:: 1 if number % 2 == 0 else -1]:
                worker = workers[contenders[key].worker]
                found[key].append(worker.measure(contenders[key].name))
    missing = {
        key: reasons[contender.worker]
        for key, contender in contenders.items()
        if contender.worker in reasons
    }
    return found, missing


def seconds(
    function: Callable[[], Any],
    per: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:
    """Returns a function that measures the seconds of a call of `function`, divided by `per`.

    With the clock `time.process_time`, they are those of all threads of the process, which other
    processes hardly affect.
    """

    def timed() -> float:
        start = clock()
        function()
        return (clock() - start) / per

    return timed


def step_milliseconds(function: Callable[[], Any], steps: int) -> Callable[[], float]:
    """Returns a function that measures the milliseconds per step of a call of `function`.

    It calls `function` twice and measures the second call. While a process waits for its turn,
    other processes and the system evict its data from caches and memory, and the first call brings
    them back.
    """
    timed = seconds(function, per=steps / 1e3)

    def warmed() -> float:
        function()
        return timed()

    return warmed


def peak_bytes(function: Callable[[], Any]) -> int:
    """Returns the peak increase of the process' resident memory during a call, in bytes.

    This includes memory that libraries allocate outside Python. Only Linux can reset the peak.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    function()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
