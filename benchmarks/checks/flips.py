"""Flips bits in the files of a sparse SavedModel, and counts who notices.

    python -m benchmarks.checks.flips [--flips N] [--seed N]

Each flip changes one bit of one file. The folder is then loaded and called by TensorFlow, in a
process of its own, because damage may end it, and checked by `masked_layers.serving.inspect`.
The script prints for each file how many flips TensorFlow refused (an error or the end of the
process), served with the right outputs, and served with other ones or another signature, and how
many `inspect` noticed. It returns 1 if `inspect` missed one.
"""

import argparse
import collections
import contextlib
import pickle
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checks import kills
from masked_layers import FileContentError, serving

KINDS = ("refused", "served right", "served wrong")


def served(folder: Path, x: np.ndarray) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Returns the outputs of the signature of a folder."""
    import tensorflow as tf

    signature = tf.saved_model.load(str(folder)).signatures["serving_default"]
    ((name, spec),) = signature.structured_input_signature[1].items()
    assert spec.shape.as_list() == [None, x.shape[1]]
    found = signature(**{name: tf.constant(x, spec.dtype)})
    return sorted((name, tuple(y.shape), y.numpy().tobytes()) for name, y in found.items())


def told(folder: Path, x: np.ndarray, log: Path) -> bytes:
    """Returns the outputs of a folder as bytes, or nothing if TensorFlow does not serve it."""
    answer = log.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    # Damage can also make it wait.
    kills.in_a_fork(lambda: answer.write_bytes(pickle.dumps(served(folder, x))), log, kill_after=60)
    return answer.read_bytes() if answer.exists() else b""


def notices(folder: Path) -> bool:
    """Returns whether `inspect` refuses a folder."""
    try:
        serving.inspect(folder)
    except FileContentError:
        return True
    return False


@contextlib.contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """Changes a bit of a file in the block."""
    content = file.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(content)


def main(arguments: Any = None) -> int:
    """Flips bits; returns 1 if `inspect` missed one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.flips",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flips", type=int, default=100, help="number of flips in each file")
    parser.add_argument("--seed", type=int, default=0, help="seed of their places")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    x = rng.normal(size=(5, 64)).astype("float32")
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary, "served"), Path(temporary, "log")
        # This process must not start the threads of TensorFlow, which forks lack.
        if failed := kills.in_a_fork(lambda: kills.export(folder.parent), log):
            raise RuntimeError(failed)
        wanted = told(folder, x, log)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        print(f"{'file':32} bytes  flips  {'  '.join(KINDS)}  noticed by inspect", flush=True)
        for file in files:
            counts: collections.Counter[str] = collections.Counter()
            noticed = 0
            bits = 8 * file.stat().st_size
            for bit in rng.choice(bits, size=min(options.flips, bits), replace=False):
                with flipped(file, int(bit)):
                    found = told(folder, x, log)
                    noticed += notices(folder)
                right = "served right" if found == wanted else "served wrong"
                counts[right if found else "refused"] += 1
            total = sum(counts.values())
            missed += total - noticed
            cells = "  ".join(f"{counts[kind]:{len(kind)}}" for kind in KINDS)
            name = file.relative_to(folder).as_posix()
            print(f"{name:32} {bits // 8:5}  {total:5}  {cells}  {noticed:18}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
