"""Contenders measured in turns, each set in a process of its own.

Backends and peers keep pools of threads, memory and global settings: one process for each keeps
them out of each other's way, and turns let other load on the machine meet all of them alike.
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
    """What the contender needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """What to measure.

    Attributes:
        setup: `"module:function"`. Called in the worker with `arguments`, it returns functions by
            name; each call of one is a measurement, a number.
        name: Which of them.
        arguments: Keyword arguments of `setup`.
        environment: Environment variables of the worker, set before anything is imported.
    """

    setup: str
    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def worker(self) -> tuple[Any, ...]:
        """Contenders with the same setup share a process."""
        return self.setup, *sorted(self.arguments.items()), *sorted(self.environment.items())


class Worker:
    """A process that has set up contenders and measures one at a time, when asked.

    Raises:
        MissingError: A module that the setup imports is not installed; the message is its name.
        RuntimeError: The setup failed; the message has the traceback.
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

    def measure(self, name: str) -> float:
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
                f"The worker ended with code {self._process.exitcode}. Its last words: {said}"
            ) from None
        if kind == "value":
            return value
        self.close()
        raise (MissingError if kind == "missing" else RuntimeError)(value)


def _serve(pipe: Any, log: str, contender: Contender) -> None:
    # Libraries talk while they are imported and while they work.
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
    """Measures contenders in turns, the last first in every other round.

    Returns:
        The measurements by key, one of each round; and why there are none, by key.
    """
    workers: dict[tuple, Worker] = {}
    reasons: dict[tuple, str] = {}
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


def seconds(function: Callable[[], Any], per: float = 1.0) -> Callable[[], float]:
    """Returns a function that says how long a call of `function` takes, divided by `per`."""

    def timed() -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) / per

    return timed


def step_milliseconds(function: Callable[[], Any], steps: int) -> Callable[[], float]:
    """Returns a function that says how long each of the `steps` of a call of `function` takes.

    It calls it twice and takes the second time: to a process that waited for its turn the first
    call brings back what others and the system have driven out of caches and memory.
    """
    timed = seconds(function, per=steps / 1e3)

    def warmed() -> float:
        function()
        return timed()

    return warmed


def peak_bytes(function: Callable[[], Any]) -> int:
    """Returns by how much the process' resident memory rose at most during a call.

    Counts what libraries allocate outside Python, too. Only Linux can reset its peak.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    function()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
