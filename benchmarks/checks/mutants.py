"""Changes the code at one place at a time, and lists the changes that no test notices.

    python -m benchmarks.checks.mutants [--modules NAME ...] [--sample N] [--seed N]

cosmic-ray (`pip install cosmic-ray`) makes the changes, called mutants: another operator or number,
a negated condition, a loop that is skipped, a decorator that is missing. Places are drawn with a
seed, and no place is drawn twice before all others were. A mutant is noticed if a test fails, of
those that execute the changed function, or of all if an import executes what is changed. Mutants
that cannot be imported are not counted, nor are changes of annotations.

A mutant is written into a copy of the source tree, so child processes of the tests read it as well.
Each has a process of its own, a fork of one that has imported Keras, and none of the packages under
test, which is verified before the tests; that the process ran the mutant is verified after them.
All tests have to pass without a mutant, before the first and after the last.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("_lottery_ticket", "lottery_ticket_pruner", "masked_layers")
# Exit status of a process in which the mutant was not imported; others are those of pytest.
REFUSED, MISSED = 90, 91
# What a status says about a mutant; any other status is printed, and does not count as noticed.
NOTICED = {int(pytest.ExitCode.TESTS_FAILED), int(pytest.ExitCode.INTERRUPTED)}
MOST_BYTES = 8 << 30
# What tests import, and what takes time: imported once, if installed.
IMPORTED = ("keras", "hypothesis.extra.numpy", "ml_dtypes", "scipy.stats", "sklearn.cluster")
ARGUMENTS = ("-x", "-q", "-p", "no:cacheprovider", "--randomly-dont-reorganize", "-rN")


@dataclasses.dataclass(frozen=True)
class Tested:
    """Files of the source, and the files of the tests that have to notice their mutants."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


_PRUNER = "tests/lottery_ticket_pruner"
MODULES = {
    "selection": Tested(
        ("lottery_ticket_pruner/selection/[!_]*.py",),
        (
            f"{_PRUNER}/selection",
            f"{_PRUNER}/test_structures.py",
            f"{_PRUNER}/reconstruction/test_one_shot.py",
            *(
                f"{_PRUNER}/pruner/test_{name}.py"
                for name in ("byte_budgets", "channel_rankings", "channels", "latency_budgets")
            ),
        ),
    ),
    "criteria": Tested(
        ("lottery_ticket_pruner/criteria.py",),
        (
            f"{_PRUNER}/test_criteria.py",
            f"{_PRUNER}/selection/test_channel_rankings.py",
            f"{_PRUNER}/selection/test_update.py",
        ),
    ),
    "encoding": Tested(
        ("masked_layers/serving/codes.py", "masked_layers/serving/encoding.py"),
        tuple(f"tests/serving/test_{name}.py" for name in ("codes", "encoding", "damaged_packs")),
    ),
    "structures": Tested(
        ("lottery_ticket_pruner/structures.py",),
        (
            f"{_PRUNER}/test_structures.py",
            f"{_PRUNER}/test_registry.py",
            f"{_PRUNER}/selection/test_channels.py",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """What can be changed: a file, an operator of cosmic-ray, and which of its occurrences."""

    path: str
    operator: str
    number: int
    start: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.path}:{self.start[0]} {self.operator.removeprefix('core/')} {self.number}"

    def mutant(self, source: str) -> str | None:
        """Returns the changed source, or None if it is the same program or none at all."""
        changed = mutate_code(source, get_operator(self.operator)(), self.number)
        try:
            same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
        except SyntaxError:
            return None
        return None if same else changed


def places(path: str, source: str) -> Iterator[Place]:
    """Yields what can be changed in a file, without its annotations."""
    nodes, annotations = list(ast_nodes(get_ast(source))), _annotations(source)
    for name in operator_names():
        operator: Any = get_operator(name)
        if operator.arguments():  # It replaces a variable that has to be named.
            continue
        positions = [place for node in nodes for place in operator().mutation_positions(node)]
        for number, (start, _) in enumerate(positions):
            if not any(first <= start < last for first, last in annotations):
                yield Place(path, name, number, start)


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    parts = [
        part
        for node in ast.walk(ast.parse(source))
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
    ]
    return [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts]


def shuffled(found: list[Place], seed: int) -> list[Place]:
    """Returns all changes in a random order in which no place recurs before all others."""
    turns: dict[tuple[str, tuple[int, int]], int] = collections.Counter()
    ordered: list[list[Place]] = []
    for place in random.Random(seed).sample(found, len(found)):
        turn = turns[place.path, place.start]
        if turn == len(ordered):
            ordered.append([])
        ordered[turn].append(place)
        turns[place.path, place.start] += 1
    return [place for turn in ordered for place in turn]


class _Recorder:
    """A plugin of pytest that records what each test executes, and how long it takes."""

    def __init__(self, sources: list[str]) -> None:
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=sources)
        self._coverage.start()
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        started = time.process_time()
        result = yield
        self._seconds[item.nodeid] = time.process_time() - started
        return result

    def write(self, file: Path) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        lines = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
        file.write_text(json.dumps([self._seconds, lines]))


class _Chosen:
    """A plugin of pytest that leaves some of the collected tests, in their order."""

    def __init__(self, tests: list[str]) -> None:
        self._places = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid in self._places]
        items[:] = sorted(kept, key=lambda item: self._places[item.nodeid])


class Tree:
    """A copy of the source tree, in which one file at a time may be another.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
        self.root = folder / "tree"
        for name in (*PACKAGES, "benchmarks", "tests"):
            shutil.copytree(ROOT / name, self.root / name, ignore=left_out)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, self.root)
        self.log, self._recorded = folder / "log", folder / "recorded.json"
        # Python would compare only seconds and sizes of files with those of compiled ones.
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.root), *filter(None, paths)])
        sys.path[:] = [str(self.root), *(path for path in sys.path if Path(path) != ROOT)]
        os.chdir(self.root)

    def record(self, sources: list[str], tests: tuple[str, ...]) -> "Record":
        """Runs tests without a mutant, and returns what each of them executes.

        Raises:
            RuntimeError: If one of them fails.
        """

        def work() -> int:
            recorder = _Recorder([str(self.root / path) for path in sources])
            status = pytest.main([*ARGUMENTS, *tests], plugins=[recorder])
            recorder.write(self._recorded)
            return int(status)

        if status := self._in_a_fork(work, None):
            said = self.log.read_text()[-2000:]
            raise RuntimeError(f"Status {status} without a mutant:\n{said}")
        seconds, lines = json.loads(self._recorded.read_text())
        return Record(
            {path: (self.root / path).read_text("utf-8") for path in sources},
            seconds,
            {Path(path).relative_to(self.root).as_posix(): found for path, found in lines.items()},
        )

    def status(self, path: str, source: str, tests: list[str], seconds: float) -> int:
        """Runs tests with another source of a file.

        Args:
            path: The file.
            source: What it contains meanwhile.
            tests: Tests, in the order in which they run.
            seconds: Seconds of processor time after which the tests are stopped. If they wait for
                something for ever, they are killed much later.

        Returns:
            The status of pytest, `REFUSED` if the file cannot be imported, `MISSED` if the process
            did not import it, or a signal as a negative number: SIGXCPU if they were stopped,
            SIGKILL if they were killed.
        """
        file, mark = self.root / path, f"mutant {random.random()}"
        name = path.removesuffix(".py").replace("/", ".")
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))

        def work() -> int:
            try:
                importlib.import_module(name)
            except BaseException:
                return REFUSED
            arguments = [*ARGUMENTS, "--hypothesis-profile=mutants", *files]
            status = int(pytest.main(arguments, plugins=[_Chosen(tests)]))
            ran = getattr(sys.modules.get(name), "__mutant__", None) == mark
            return status if ran else MISSED

        before = file.read_text("utf-8")
        file.write_text(f"{source}\n__mutant__ = {mark!r}\n", "utf-8")
        try:
            return self._in_a_fork(work, int(seconds))
        finally:
            file.write_text(before, "utf-8")

    def _in_a_fork(self, work: Callable[[], int], seconds: int | None) -> int:
        """Returns the status of a function in a process with a limit of processor time."""
        pid = os.fork()
        if pid:
            return _waited(pid, None if seconds is None else 600 + 20 * seconds)
        status = int(pytest.ExitCode.INTERNAL_ERROR)
        try:
            os.setpgid(0, 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            loaded = any(name.split(".")[0] in PACKAGES for name in sys.modules)
            status = MISSED if loaded else work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _waited(pid: int, seconds: float | None) -> int:
    """Waits for a process, and ends it and its child processes after some time."""
    started = time.monotonic()
    ended = 0
    try:
        while seconds is None or time.monotonic() < started + seconds:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return -signal.SIGKILL
    finally:
        if not ended:  # An interruption does not reach it.
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Record:
    """What the tests of some files execute without a mutant.

    Args:
        sources: Contents of the files.
        seconds: Processor time that each test takes.
        lines: For each file and line, the tests that execute it, "" among them if it is executed
            when the file is imported.
    """

    def __init__(
        self,
        sources: dict[str, str],
        seconds: dict[str, float],
        lines: dict[str, dict[str, list[str]]],
    ) -> None:
        self.sources, self.seconds, self._lines = sources, seconds, lines
        self._bodies = {
            path: [
                range(node.body[0].lineno, (node.end_lineno or 0) + 1)
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef)
            ]
            for path, source in sources.items()
        }

    def reaching(self, path: str, line: int) -> list[str]:
        """Returns the tests that execute the function of a line, quick ones first.

        All tests, if the line belongs to no function, or to one that an import calls.
        """
        bodies = [body for body in self._bodies[path] if line in body]
        lines, tests = self._lines.get(path, {}), set(self.seconds)
        reached = {
            test for at in min(bodies, key=len, default=()) for test in lines.get(str(at), ())
        }
        if bodies and "" not in reached:
            tests &= reached
        # Tests of a file stay together, because the end of a file takes time.
        total: dict[str, float] = collections.defaultdict(float)
        for test in tests:
            total[test.partition("::")[0]] += self.seconds[test]

        def order(test: str) -> tuple[float, str, float]:
            file = test.partition("::")[0]
            return total[file], file, self.seconds[test]

        return sorted(tests, key=order)


class Checked:
    """The mutants of some modules.

    Args:
        tree: A copy of the source tree.
        name: Name of the modules in `MODULES`.

    Attributes:
        counts: Numbers of mutants by what became of them.
        survivors: What no test noticed.
    """

    def __init__(self, tree: Tree, name: str) -> None:
        self._tree, self._name = tree, name
        self.counts: dict[str, int] = collections.Counter()
        self.survivors: list[str] = []

    def run(self, sample: int, seed: int) -> None:
        """Tries mutants until there are as many as wanted, or no more.

        Raises:
            RuntimeError: If a test fails without a mutant.
        """
        record = self._recorded()
        found = [each for path, text in record.sources.items() for each in places(path, text)]
        tried = 0
        for place in shuffled(found, seed):
            if tried == sample:
                break
            tried += self.try_one(record, place)
        self.counts["places"] = len(found)
        self._recorded()

    def _recorded(self) -> Record:
        tested = MODULES[self._name]
        root = self._tree.root
        found = [path for pattern in tested.sources for path in sorted(root.glob(pattern))]
        sources = [path.relative_to(root).as_posix() for path in found]
        record = self._tree.record(sources, tested.tests)
        said = self._tree.log.read_text().strip().splitlines()[-1]
        print(f"{self._name}: {said} without a mutant", flush=True)
        return record

    def try_one(self, record: Record, place: Place) -> bool:
        """Runs the tests with a change, unless it is none; returns whether it counts as one."""
        source = record.sources[place.path]
        changed = place.mutant(source)
        if changed is None:
            return False
        tests = record.reaching(place.path, place.start[0])
        outcome = "survived (not executed)"
        if tests:
            # Failing tests take longer: pytest explains them.
            limit = 20 + 3 * sum(record.seconds[test] for test in tests)
            outcome = _meaning(self._tree.status(place.path, changed, tests, limit))
        self.counts[outcome] += 1
        print(f"{self._name}: {place}: {outcome}", flush=True)
        if outcome.startswith("survived"):
            lines = source.splitlines(), changed.splitlines()
            diff = list(difflib.unified_diff(*lines, lineterm="", n=2))[2:]
            self.survivors.append("\n".join([f"{place}: {outcome}", *diff]))
        return outcome != "refused"


def _meaning(status: int) -> str:
    if status == MISSED:
        raise RuntimeError("The tests did not run with the mutant.")
    if status == REFUSED:
        return "refused"
    if status == -signal.SIGXCPU:
        return "out of time"
    # A crash ends the tests of a person as well. On a busy machine, a kill may mean nothing.
    crashed = status < 0 and status != -signal.SIGKILL
    if status in NOTICED or crashed:
        return "noticed"
    return f"survived (status {status})" if status else "survived"


def main(arguments: Any = None) -> int:
    """Tries mutants; returns 1 if one survived."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--modules", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--sample", type=int, default=60, help="mutants of each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places")
    options = parser.parse_args(arguments)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # Nobody reads the examples.
    profile = hypothesis.settings(deadline=None, derandomize=True, phases=phases, database=None)
    hypothesis.settings.register_profile("mutants", profile)
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # No process looks at the objects of Keras again.
    with tempfile.TemporaryDirectory() as temporary:
        tree, checked = Tree(Path(temporary)), {}
        for name in options.modules:
            checked[name] = Checked(tree, name)
            checked[name].run(options.sample, options.seed)
    print(f"{'':11} mutants  noticed  out of time  survived  refused  places")
    for name, each in checked.items():
        counts = each.counts
        tried = sum(counts.values()) - counts["places"] - counts["refused"]
        print(
            f"{name:11} {tried:7}  {counts['noticed']:7}  {counts['out of time']:11}  "
            f"{len(each.survivors):8}  {counts['refused']:7}  {counts['places']:6}"
        )
    survivors = [text for each in checked.values() for text in each.survivors]
    print("\n\n".join(survivors))
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
