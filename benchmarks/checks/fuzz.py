"""Reads damaged and crafted files of a format for some minutes, and counts wrong outcomes.

    python -m benchmarks.checks.fuzz [--format NAME ...] [--minutes M] [--engine atheris|random]

The default is every format, one after another in a process of its own. The minutes are those of the
processor. Every execution makes a file in one of three ways: bytes of the fuzzer, a good file with
changed, repeated or nested bytes or without its end, or a good file whose content was changed in
this way before its checksums were computed. Only the documented error may be raised. Anything else
is a crash, such as running out of memory, which is limited to 2 GB more than at the start. A silent
acceptance is a changed file, with its old checksums, that is read with other values. The default
engine is atheris if it is installed (`pip install atheris`; it is guided by coverage), otherwise
random bytes; the script says which. Files that were silently accepted, or at which a reader
crashed, are kept in the folder that it prints.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ATHERIS = importlib.util.find_spec("atheris") is not None
INSTRUMENTED = ["masked_layers", "lottery_ticket_pruner", "zipfile"]


@contextlib.contextmanager
def instrumented(engine: str) -> Any:
    """Lets atheris follow the code of modules that are imported in the block."""
    if engine != "atheris":
        yield
        return
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        yield


@dataclasses.dataclass
class Format:
    """A format to fuzz.

    Attributes:
        good: A good file.
        read: Function that reads a file and returns its content in a form that can be compared.
        error: The documented error.
        crafted: Function that changes the content by a function of bytes, with new checksums, or
            None if the format has none.
    """

    good: bytes
    read: Callable[[Path], object]
    error: type[Exception]
    crafted: Callable[[Callable[[bytes], bytes]], bytes] | None = None


def as_bytes(arrays: Any) -> list[Any]:
    """Returns arrays in a form that can be compared."""
    return [(str(name), str(a.dtype), a.shape, a.tobytes()) for name, a in dict(arrays).items()]


def npz_crafted(good: bytes) -> Callable[[Callable[[bytes], bytes]], bytes]:
    """Returns a function that changes the bytes of the members of an `.npz` file."""

    def crafted(change: Callable[[bytes], bytes]) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(made, "w") as new:
            names = old.namelist()
            chosen = change(bytes(len(names)))
            for number, name in enumerate(names):
                content = old.read(name)
                if chosen[number : number + 1] != b"\0":
                    content = change(content)
                new.writestr(name, content)
        return made.getvalue()

    return crafted


def json_crafted(good: bytes, of_json: Callable[[Any], str]) -> Any:
    """Returns a function that changes the text of a JSON file with a checksum."""

    def crafted(change: Callable[[bytes], bytes]) -> bytes:
        content = json.loads(good)
        del content["checksum"]
        changed = change(json.dumps(content).encode())
        try:
            content = json.loads(changed)
            return json.dumps(content | {"checksum": of_json(content)}).encode()
        except (ValueError, TypeError, RecursionError):
            return changed

    return crafted


def formats(engine: str, folder: Path) -> dict[str, Callable[[], Format]]:
    """Returns functions that make the formats, by name."""
    with instrumented(engine):
        import keras

        import masked_layers as ml
        from lottery_ticket_pruner import LotteryTicketPruner, fingerprints
        from lottery_ticket_pruner.checkpoint import Checkpoint
        from lottery_ticket_pruner.commands import prune_folder
        from lottery_ticket_pruner.compression import Comparison, Findings
        from lottery_ticket_pruner.compression.states import Progress, State
        from lottery_ticket_pruner.experiments import checksums, results
        from lottery_ticket_pruner.experiments.reports import pruning, run_folders
        from masked_layers import ticket_format
        from masked_layers.archives import read_npz
        from masked_layers.checksums import SUMS_FILE
        from masked_layers.serving import StorageReport, encoding, inspect
        from masked_layers.torchscript import KernelRow, TorchReport

    plain = keras.Sequential([keras.Input((7,)), keras.layers.Dense(5), keras.layers.Dense(3)])
    plain.compile("sgd", "mse")
    plain.optimizer.build(plain.trainable_variables)
    model = ml.convert_to_masked(plain)
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", rate=0.5)
    file = folder / "good"

    def written(write: Callable[[Path], object]) -> bytes:
        write(file)
        return file.read_bytes()

    def read_masks(path: Path) -> object:
        ml.load_masks(model, path)
        return as_bytes(ml.get_masks(model))

    def read_pruner(path: Path) -> object:
        loaded = LotteryTicketPruner.load(path, model)
        return as_bytes(loaded.initial_weights), as_bytes(ml.get_masks(model))

    def masks() -> Format:
        good = written(lambda path: ml.save_masks(model, path))
        return Format(good, read_masks, ml.FileContentError, npz_crafted(good))

    def of_pruner() -> Format:
        good = written(pruner.save)
        return Format(good, read_pruner, ml.FileContentError, npz_crafted(good))

    def npz() -> Format:
        good = written(lambda path: ml.save_masks(model, path))

        def read(path: Path) -> object:  # Names have no checksum; readers compare them.
            return [each[1:] for each in as_bytes(read_npz(path))]

        return Format(good, read, ml.FileContentError, npz_crafted(good))

    def ticket() -> Format:
        good = written(lambda path: ml.save_ticket(model, path))

        def crafted(change: Callable[[bytes], bytes]) -> bytes:
            import safetensors.numpy

            streams = {n: a.tobytes() for n, a in safetensors.numpy.load(good).items()}
            streams["model"] = zlib.compress(change(zlib.decompress(streams["model"])))
            streams["masks"] = zlib.compress(change(zlib.decompress(streams["masks"])))
            metadata = {
                "format": ticket_format.FORMAT,
                "version": ticket_format.VERSION,
                "kind": "values",
                "crc32": ticket_format._checksum(streams),
            }
            arrays = {name: np.frombuffer(text, np.uint8) for name, text in streams.items()}
            return safetensors.numpy.save(arrays, metadata)

        def read(path: Path) -> object:
            return [w.tobytes() for w in ml.load_ticket(path).get_weights()]

        return Format(good, read, ml.FileContentError, crafted)

    def pack() -> Format:
        good = encoding.encode({"a": np.eye(9, dtype="float32"), "b": np.arange(5, dtype="int8")})

        def crafted(change: Callable[[bytes], bytes]) -> bytes:
            length = int.from_bytes(good[8:12], "little")
            text = zlib.compress(change(zlib.decompress(good[16 : 16 + length])))
            body = text + change(good[16 + length :])
            return (
                good[:8]
                + len(text).to_bytes(4, "little")
                + (zlib.crc32(body).to_bytes(4, "little") + body)
            )

        return Format(
            good, lambda path: as_bytes(encoding.decode(path.read_bytes())), ValueError, crafted
        )

    def report() -> Format:
        place = folder / "served"
        ml.export_sparse_saved_model(model, place)
        stored = place / "assets.extra" / "sparsity.json"
        sums = stored.with_name(SUMS_FILE)
        good, good_sums = stored.read_bytes(), sums.read_bytes()

        def read(path: Path) -> object:
            text, _, checksums_of_it = path.read_bytes().partition(b"\0")
            stored.write_bytes(text)
            sums.write_bytes(checksums_of_it)
            return str(inspect(place))

        def crafted(change: Callable[[bytes], bytes]) -> bytes:
            text = change(good).replace(b"\0", b"")
            old, new = (hashlib.sha256(x).hexdigest().encode() for x in (good, text))
            return text + b"\0" + good_sums.replace(old, new)

        StorageReport.from_json(good)
        return Format(good + b"\0" + good_sums, read, ml.FileContentError, crafted)

    def of_search() -> Format:
        place = folder / "search"
        with Checkpoint(place, {"seed": 0}) as saved:
            saved.save(pruner, 0, [{"round": 0, "arm": "dense", "accuracy": 0.5}], [])
        state = place / "state.json"
        good = state.read_bytes()

        def read(path: Path) -> object:
            state.write_bytes(path.read_bytes())
            _, masks, rows, evaluations = Checkpoint(place, {"seed": 0}).load(model)
            return [as_bytes(mask) for mask in masks], rows, evaluations

        return Format(good, read, ValueError, json_crafted(good, fingerprints.of_json))

    def of_prune() -> Format:
        place = folder / "prune"
        with Progress(place, {"seed": 0}) as progress:
            progress.rows.append({"density": 1.0, "drop": 0.25, "seconds": 1.0})
            progress.facts["best"] = "0"
            progress.write()
        state = place / "state.json"
        good = state.read_bytes()

        def read(path: Path) -> object:
            state.write_bytes(path.read_bytes())
            progress = Progress(place, {"seed": 0})
            progress._read()
            return progress.rows, progress.facts

        return Format(good, read, ValueError, json_crafted(good, fingerprints.of_json))

    def of_state() -> Format:
        progress = Progress(folder, {"seed": 0})
        progress.keep("0", State.of(model))
        stored = folder / "state-0.npz"
        good = stored.read_bytes()

        def read(path: Path) -> object:
            stored.write_bytes(path.read_bytes())
            state = progress.state("0")
            return as_bytes(state.masks), [weight.tobytes() for weight in state.weights]

        return Format(good, read, ml.FileContentError, npz_crafted(good))

    def of_result() -> Format:
        test = Comparison("accuracy", 0.9, 0.8, 0.1, (0.0, 0.2), "exact", 50, (1,), (2,))
        row = {"step": 0, "method": "dense", "sparsity": 0.0, "macs": None, "latency": None}
        row |= {"validation": 0.9, "drop": 0.0, "accepted": True, "steps": 0, "seconds": 1.0}
        findings = Findings(
            rows=[row | {"note": ""}, row | {"method": "iterative", "sparsity": 0.5, "note": ""}],
            scan=[{"path": "a", "density": 0.5, "kept": 3, "value": 0.5, "drop": 0.1, "loss": 0.1}],
            test=test,
            sparsity=0.5,
            higher_is_better=True,
            tolerance=0.01,
            meets_goals=True,
            conclusion="Good.",
            notes=("One.",),
        )
        facts = pruning.Facts(
            "net", "digits", {"train": 9}, {"a": 4}, {"a": 2}, (1, 2), (0.5, 1.0), [0] * 3, {}
        )
        place = folder / "pruned"
        place.mkdir()
        prune_folder.write(findings, facts, place)
        stored = place / prune_folder.RESULT_FILE
        good = stored.read_bytes()

        def read(path: Path) -> object:
            stored.write_bytes(path.read_bytes())
            found = prune_folder.read(place)
            for sheet in pruning.sheets(*found):
                sheet.markdown()
            return found

        return Format(good, read, ml.FileContentError, json_crafted(good, fingerprints.of_json))

    def of_torch() -> Format:
        kernel = KernelRow("a", (3, 4), 6, "a", "csr", {"dense": 1e-6, "csr": 5e-7}, 48)
        good = TorchReport(
            (kernel,), {"dense": 1e-5, "sparse": 9e-6}, "sparse", 1, 1, 48, 99, 0.0, ("One.",)
        ).to_json()

        def read(path: Path) -> object:
            return str(TorchReport.from_json(path.read_bytes())) and None  # It has no checksum.

        return Format(good, read, ValueError)

    table_text = (
        b"round,arm,replicate,sparsity,test_accuracy,test_loss,early_stop_step,seconds\n"
        b"0,dense,0,0.0,0.91,0.4,20,1.5\n1,ticket,0,0.3,0.92,0.41,20,1.25\n"
    )
    config_text = json.dumps({"command": "run", "seeds": [0], "rounds": 1, "controls": []}).encode()

    def of_folder(name: str) -> Format:
        place = folder / name
        place.mkdir()
        (place / "config.json").write_bytes(config_text)
        (place / "results.csv").write_bytes(table_text)
        changed = {"table": "results.csv", "config": "config.json"}[name]

        def read(path: Path) -> object:
            (place / changed).write_bytes(path.read_bytes())
            runs = run_folders.find_runs([place])
            run_folders.groups_of(runs)
            return None  # An unfinished run has no checksums.

        good = table_text if name == "table" else config_text
        assert (place / changed).name in (results.RESULTS_FILE, results.CONFIG_FILE)
        return Format(good, read, ValueError)

    def finished() -> Format:
        place = folder / "finished"
        place.mkdir()
        config = json.loads(config_text) | {"finished": True}
        (place / results.CONFIG_FILE).write_text(json.dumps(config))
        (place / results.RESULTS_FILE).write_bytes(table_text)
        names = (results.CONFIG_FILE, results.RESULTS_FILE)
        checksums.write(place, [place / name for name in names], {})
        whole = [(place / name).read_bytes() for name in (*names, SUMS_FILE)]

        def read(path: Path) -> object:
            first, _, rest = path.read_bytes().partition(b"\0")
            parts = (first, *rest.partition(b"\0")[::2])
            for name, part in zip((*names, SUMS_FILE), parts, strict=True):
                (place / name).write_bytes(part)
            (run,) = run_folders.find_runs([place])
            return run.config, run.rows.to_csv()

        return Format(b"\0".join(whole), read, ValueError)

    return {
        "result": of_result,
        "state": of_state,
        "finished": finished,
        "torch": of_torch,
        "masks": masks,
        "pruner": of_pruner,
        "npz": npz,
        "ticket": ticket,
        "pack": pack,
        "report": report,
        "search": of_search,
        "prune": of_prune,
        "table": lambda: of_folder("table"),
        "config": lambda: of_folder("config"),
    }


class Fuzzer:
    """Executes a format on files made from the bytes of an engine.

    Args:
        tried: The format.
        folder: Folder for the file.
        until: Processor time at which to end.
    """

    def __init__(self, tried: Format, folder: Path, until: float) -> None:
        self._format, self._file, self._until = tried, folder / "file", until
        self._file.write_bytes(tried.good)
        self._content = tried.read(self._file)
        self.executions = self.accepted = self.silent = self.crashes = 0
        self._seen: set[str] = set()

    def changed(self, data: bytes) -> Callable[[bytes], bytes]:
        """Returns a function that changes bytes as the data of the engine says."""

        def change(content: bytes) -> bytes:
            made = bytearray(content)
            for start in range(0, len(data) - 3, 4):
                place = int.from_bytes(data[start : start + 3], "little")
                if data[start + 3] == 255:
                    del made[place % (len(made) + 1) :]
                elif data[start + 3] == 254:  # Deep JSON, long names and numbers.
                    place %= len(made) + 1
                    made[place:place] = bytes(made[place : place + 1]) * 20_000
                elif made:
                    made[place % len(made)] ^= data[start + 3]
            return bytes(made)

        return change

    def __call__(self, data: bytes) -> None:
        """Executes once."""
        if time.process_time() > self._until:
            self.end()
        self.executions += 1
        kind, rest = (data[0] % 4 if data else 0), data[1:]
        if kind == 0:
            content = rest
        elif kind == 1 and self._format.crafted is not None:
            content = self._format.crafted(self.changed(rest[:40]))
        else:
            content = self.changed(rest[:40])(self._format.good)
        self._file.write_bytes(content)
        try:
            found = self._format.read(self._file)
        except self._format.error as error:
            causes = [error.__cause__, error.__context__]
            if not str(error) or any(isinstance(cause, MemoryError) for cause in causes):
                self._crash(error)
        except Exception as error:
            self._crash(error)
        else:
            self.accepted += 1
            if kind > 1 and found != self._content:
                self.silent += 1
                self._file.with_name(f"silent-{self.silent}").write_bytes(content)

    def _crash(self, error: Exception) -> None:
        self.crashes += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {last.filename}:{last.lineno}"
        if place not in self._seen:
            self._seen.add(place)
            self._file.rename(self._file.with_name(f"crash-{len(self._seen)}"))
            print(f"crash: {place}: {error}"[:400], flush=True)

    def end(self) -> None:
        """Prints the counts, and ends the process."""
        print(
            f"{self.executions} executions, {self.accepted} accepted, {self.silent} silent "
            f"acceptances, {self.crashes} crashes at {len(self._seen)} places",
            flush=True,
        )
        os._exit(int(self.silent + self.crashes > 0))


def main(given: Any = None) -> None:
    """Fuzzes a format, and ends with 1 if there was a crash or a silent acceptance."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--engine", choices=["atheris", "random"], default="atheris" if ATHERIS else "random"
    )
    options = parser.parse_args(given)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())  # Not removed: the process may end at any moment.
    made = formats(options.engine, folder)
    chosen = options.format or list(made)
    if unknown := set(chosen) - made.keys():
        parser.error(f"Expected some of {', '.join(made)}. Received: {', '.join(unknown)}")
    if len(chosen) > 1:
        command = [sys.executable, "-m", "benchmarks.checks.fuzz", "--engine", options.engine]
        command += ["--minutes", str(options.minutes), "--format"]
        sys.exit(max([subprocess.run([*command, name], check=False).returncode for name in chosen]))
    fuzz(chosen[0], made[chosen[0]](), folder, options)


def fuzz(name: str, tried: Format, folder: Path, options: argparse.Namespace) -> None:
    """Fuzzes one format, and ends the process."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), resource.RLIM_INFINITY))
    fuzzer = Fuzzer(tried, folder, time.process_time() + 60 * options.minutes)
    print(f"{name}: {len(tried.good)} bytes, {options.engine}, {folder}", flush=True)
    if options.engine == "atheris":
        import atheris

        # Inputs of the fuzzer are short; the good file is in this process.
        atheris.Setup([sys.argv[0], "-max_len=160", "-verbosity=0"], fuzzer)
        atheris.Fuzz()
    rng = np.random.default_rng(0)
    while True:
        fuzzer(rng.bytes(1 + 4 * int(rng.integers(1, 6))))


if __name__ == "__main__":
    main()
