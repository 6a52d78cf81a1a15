"""Kills a run twice in the middle of a training, resumes it, and compares it with a whole run.

    python -m benchmarks.checks.resume [OPTION ...] [--out FOLDER]

Options are those of `lottery-ticket run` (default: three rounds on the digits with all controls).
The run is a separate process. It is killed with SIGKILL after a third of its lines of results, plus
half the time of the last line, and therefore in the middle of a training. The same command is then
started again, killed after two thirds of the lines, and started a last time. For comparison, the
command also runs once without interruption. Both runs are deterministic. The script compares all
numbers of results.csv except the seconds, the masks of every round, and every array of the saved
tickets (weights, masks, statistics) byte for byte. It prints what it compared and what differs.
"""

import argparse
import csv
import io
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

# fmt: off
OPTIONS = [
    "--rounds", "3", "--rate", "0.6", "--steps", "400", "--rewind-to", "20it", "--seeds", "0", "1",
    "--controls", "random_reinit", "reinit_same_sign", "random_mask", "reshuffled_mask",
]
# fmt: on
COMMAND = (sys.executable, "-m", "lottery_ticket_pruner.cli", "run")


def lines_of(folder):
    """Returns the complete lines of results on disk."""
    try:
        text = (folder / "results.csv").read_text()
    except FileNotFoundError:
        return []
    # The last line may be incomplete.
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def run(options, folder, kill_after=None):
    """Runs the command to its end, or kills it in the training after `kill_after` lines."""
    command = [*COMMAND, *options, "--deterministic", "--quiet", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if kill_after is None:
        errors = process.communicate()[1].decode(errors="replace")
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors}")
        return
    try:
        while len(lines := lines_of(folder)) < kill_after and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            time.sleep(float(lines[-1]["seconds"]) / 2)
        if process.poll() is not None:
            errors = process.stderr.read().decode(errors="replace") if process.stderr else ""
            raise RuntimeError(f"The run ended before it was killed; use more --steps. {errors}")
    finally:
        process.kill()
        process.communicate()


def contents(folder):
    """Returns everything that must be equal, as bytes or text by name."""
    found: dict[str, Any] = {}
    for number, line in enumerate(lines_of(folder)):
        line.pop("seconds")
        found |= {f"results.csv, line {number + 1}, {name}": text for name, text in line.items()}
    for file in sorted(folder.glob("rounds/*/masks-*.npz")):
        with np.load(file) as arrays:
            for name in arrays.files:
                found[f"{file.relative_to(folder)}: {name}"] = arrays[name].tobytes()
    for file in [
        *sorted(folder.glob("ticket*.keras")),
        *sorted(folder.glob("ticket*.safetensors")),
    ]:
        found |= {f"{file.name}: {name}": value for name, value in arrays_of(file)}
    return found


def arrays_of(ticket):
    """Returns the name and the bytes of every array in a ticket file or a `.keras` file."""
    if ticket.suffix == ".safetensors":
        from masked_layers import ticket_format

        # Not the config, in which Keras numbers layers without a name.
        entries = ticket_format.unpack(ticket.read_bytes()).entries
        parts = ("kept", "values", "frozen")
        arrays = [(f"{e.path}, {part}", getattr(e, part)) for e in entries for part in parts]
        return [(name, array.tobytes()) for name, array in arrays if array is not None]
    import h5py

    found = []

    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            found.append((name, str(item.dtype).encode() + item[()].tobytes()))

    with zipfile.ZipFile(ticket) as archive:
        stored = archive.read("model.weights.h5")
    with h5py.File(io.BytesIO(stored)) as weights:
        weights.visititems(collect)
    return found


def compare(one, other):
    """Returns the names at which two folders differ or that only one of them has."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def main(arguments=None):
    """Runs the comparison; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder for both runs (default: a temporary one)")
    parser.add_argument(
        "--kill-after", type=int, nargs="+", metavar="LINES", help="numbers of lines, ascending"
    )
    options, given = parser.parse_known_args(arguments)
    given = given or OPTIONS
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        whole, killed = out / "whole", out / "killed"
        started = time.perf_counter()
        run(given, whole)
        print(f"whole run: {time.perf_counter() - started:.0f} s, {len(lines_of(whole))} lines")
        count = len(lines_of(whole))
        for kill_after in options.kill_after or (count // 3, 2 * count // 3):
            run(given, killed, kill_after)
            last = lines_of(killed)[-1]
            print(
                f"killed after line {len(lines_of(killed))}: {last['arm']} of round "
                f"{last['round']}, replicate {last['replicate']}"
            )
        run(given, killed)
        found = [contents(folder) for folder in (whole, killed)]
    differences = compare(*found)
    kinds = {
        "numbers of results.csv": "results.csv",
        "arrays of masks": "rounds/",
        "arrays of tickets": "ticket",
    }
    for kind, start in kinds.items():
        compared = sum(name.startswith(start) for name in found[0])
        differ = sum(name.startswith(start) for name in differences)
        print(f"{kind}: {compared} compared, {differ} differ")
    for name in differences[:20]:
        print(f"  differs: {name}")
    return int(bool(differences) or not found[0])


if __name__ == "__main__":
    sys.exit(main())
