"""Flips bits in files that are served, and counts who notices.

    python -m benchmarks.checks.flips [--flips N] [--seed N] [--formats NAME ...]

The files are those of a sparse SavedModel, and the ONNX, TorchScript and LiteRT files of
`lottery-ticket export --format all`. Each flip changes one bit of one file. The model is then
loaded and called by its runtime (TensorFlow, ONNX Runtime, PyTorch, LiteRT's interpreter), in a
process of its own, because damage may end it, and its folder is checked by what `lottery-ticket
inspect` calls. The script prints for each file how many flips the runtime refused (an error or the
end of the process), served with the right outputs, and served with other ones or another signature,
and how many `inspect` noticed. It returns 1 if `inspect` missed one.
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
from lottery_ticket_pruner.commands import all_formats
from masked_layers import FileContentError, serving

Outputs = list[tuple[str, tuple[int, ...], bytes]]
KINDS = ("refused", "served right", "served wrong")


def of_saved_model(folder: Path, x: np.ndarray) -> Outputs:
    """Returns the outputs of the signature of a SavedModel."""
    import tensorflow as tf

    signature = tf.saved_model.load(str(folder)).signatures["serving_default"]
    ((name, spec),) = signature.structured_input_signature[1].items()
    assert spec.shape.as_list() == [None, x.shape[1]]
    found = signature(**{name: tf.constant(x, spec.dtype)})
    return sorted((name, tuple(y.shape), y.numpy().tobytes()) for name, y in found.items())


def of_onnx(file: Path, x: np.ndarray) -> Outputs:
    """Returns the outputs of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    names = [target.name for target in session.get_outputs()]
    found = session.run(names, {source.name: x})
    return [(name, y.shape, y.tobytes()) for name, y in zip(names, found, strict=True)]


def of_torch(file: Path, x: np.ndarray) -> Outputs:
    """Returns the outputs of a TorchScript file."""
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        y = torch.jit.load(str(file))(torch.from_numpy(x)).numpy()
    return [("", y.shape, y.tobytes())]


def of_litert(file: Path, x: np.ndarray) -> Outputs:
    """Returns the outputs of a LiteRT file."""
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(str(file), num_threads=1)
    (source,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(source["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], x)
    interpreter.invoke()
    targets = interpreter.get_output_details()
    found = [(target["name"], interpreter.get_tensor(target["index"])) for target in targets]
    return [(name, y.shape, y.tobytes()) for name, y in found]


RUNTIMES = {".onnx": of_onnx, ".pt": of_torch, ".tflite": of_litert, "": of_saved_model}


def told(path: Path, x: np.ndarray, log: Path) -> bytes:
    """Returns the outputs of a model as bytes, or nothing if its runtime does not serve it."""
    answer = log.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    run = RUNTIMES[path.suffix]
    # Damage can also make it wait.
    kills.in_a_fork(lambda: answer.write_bytes(pickle.dumps(run(path, x))), log, kill_after=60)
    return answer.read_bytes() if answer.exists() else b""


def notices(folder: Path) -> bool:
    """Returns whether `inspect` refuses a folder."""
    try:
        if (folder / all_formats.REPORT).exists():
            all_formats.inspect_all(folder)
        else:
            serving.inspect(folder)
    except FileContentError:
        return True
    return False


def export_all(folder: Path, x: np.ndarray) -> None:
    """Writes every format of the model of the check."""
    options = all_formats.Options(None, 6, None, x, batch_size=len(x), threads=1)
    all_formats.export_all(kills.model(), folder, options, overwrite=False)


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


def reference(model: Path, x: np.ndarray, log: Path) -> bytes:
    """Returns the outputs of a model that was not changed, as bytes."""
    found = told(model, x, log)
    if not found:
        raise RuntimeError(f"{model} is not served: {log.read_text()[-500:]}")
    return found


def main(arguments: Any = None) -> int:
    """Flips bits; returns 1 if `inspect` missed one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.flips",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flips", type=int, default=100, help="number of flips in each file")
    parser.add_argument("--seed", type=int, default=0, help="seed of their places")
    names = ["saved_model", *(suffix[1:] for suffix in RUNTIMES if suffix)]
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    x = rng.normal(size=(5, 64)).astype("float32")
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        place, log = Path(temporary), Path(temporary, "log")
        served, formats = place / "served", place / "formats"
        # This process must not start the threads of TensorFlow, which forks lack.
        todo: list[tuple[Path, Path, Path]] = []  # File, what is served, and what is inspected.
        if "saved_model" in options.formats:
            if failed := kills.in_a_fork(lambda: kills.export(place), log):
                raise RuntimeError(failed)
            files = [file for file in sorted(served.rglob("*")) if file.is_file()]
            todo += [(file, served, served) for file in files]
        if suffixes := {f".{name}" for name in options.formats} & RUNTIMES.keys():
            # Once, in place of in every fork.
            import onnxruntime  # noqa: F401
            import torch  # noqa: F401

            if failed := kills.in_a_fork(lambda: export_all(formats, x), log):
                raise RuntimeError(failed)
            files = [file for file in sorted(formats.iterdir()) if file.suffix in suffixes]
            todo += [(file, file, formats) for file in files]
        print(f"{'file':32} bytes  flips  {'  '.join(KINDS)}  noticed by inspect", flush=True)
        wanted = {model: reference(model, x, log) for model in {model for _, model, _ in todo}}
        for file, model, folder in todo:
            counts: collections.Counter[str] = collections.Counter()
            noticed, size = 0, file.stat().st_size
            for bit in rng.choice(8 * size, size=min(options.flips, 8 * size), replace=False):
                with flipped(file, int(bit)):
                    found = told(model, x, log)
                    noticed += notices(folder)
                right = "served right" if found == wanted[model] else "served wrong"
                counts[right if found else "refused"] += 1
            total = sum(counts.values())
            missed += total - noticed
            cells = "  ".join(f"{counts[kind]:{len(kind)}}" for kind in KINDS)
            name = file.relative_to(folder).as_posix()
            print(f"{name:32} {size:5}  {total:5}  {cells}  {noticed:18}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
