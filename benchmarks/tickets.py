"""Prints sizes of ticket files, and what the files of a run folder take.

    python -m benchmarks.tickets sizes
    python -m benchmarks.tickets folders RUN [RUN ...]

`sizes` compares ticket files with the packed weights of sparse SavedModels, and tickets of signs
with the number of weights. The weights (seed 0) are Keras' initial weights, of which those with the
smallest magnitudes are pruned in every kernel.

`folders` reads folders of `lottery-ticket run`. The last column is what earlier versions wrote:
`.keras` files of the compiled tickets with the state of the optimizer, which are written again to
measure them, and uncompressed initial weights.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import masked_layers as ml
from benchmarks.serving import pruned, verdict
from lottery_ticket_pruner.compression import save_model
from lottery_ticket_pruner.experiments import networks, saved_tickets
from lottery_ticket_pruner.experiments.results import read_json
from masked_layers.serving import export_sparse_saved_model
from masked_layers.ticket_files import load_saved

CASES = (("lenet-300-100", 0.95), ("lenet-300-100", 0.988), ("ResNet50", 0.95))
PAYLOAD_GOAL, SIGNS_GOAL, SIGNS_SPARSITY = 1.1, 0.02, 0.988


def sizes() -> None:
    """Prints a line for each network."""
    print("network        sparsity     ticket    payload   ratio      signs  bytes per weight")
    for name, sparsity in CASES:
        model = pruned(name, "fresh", sparsity)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            ml.save_ticket(model, place / "ticket")
            ml.save_ticket(model, place / "signs", signs_only=True)
            ticket, signs = ((place / file).stat().st_size for file in ("ticket", "signs"))
            export_sparse_saved_model(model, place / "served")
            payload = (place / "served" / "assets" / "weights.mlsp").stat().st_size
        ratio, each = ticket / payload, signs / ml.sparsity_report(model).size
        goals = [f"ticket: {verdict(ratio, PAYLOAD_GOAL)}"]
        if sparsity == SIGNS_SPARSITY:
            goals.append(f"signs: {verdict(each, SIGNS_GOAL)}")
        print(
            f"{name:13}  {sparsity:8.3f}  {ticket:9,}  {payload:9,}  {ratio:6.3f}  {signs:9,}  "
            f"{each:16.4f}   {'; '.join(goals)}",
            flush=True,
        )


def folders(runs: list[Path]) -> None:
    """Prints what the files of each run take, by kind."""
    for run in runs:
        kinds: dict[str, list[int]] = {}
        tickets = saved_tickets.tickets_in(run)
        config = read_json(run / "config.json") or {}
        for file in filter(Path.is_file, run.rglob("*")):
            now = before = file.stat().st_size
            name = file.relative_to(run)
            kind = "others"
            if file in tickets:
                kind, before = f"{len(tickets)} tickets", earlier(file, config)
            elif name.parts[0] in ("rounds", "served", "logs"):
                kind = name.parts[0]
                if file.name == "initial.npz":
                    kind, before = "initial weights", uncompressed(file)
                elif kind == "rounds":
                    kind = "masks of all rounds"
            total = kinds.setdefault(kind, [0, 0])
            kinds[kind] = [total[0] + now, total[1] + before]
        kinds["all"] = [sum(column) for column in zip(*kinds.values(), strict=True)]
        print(f"{run}\n{'':20} {'bytes':>12} {'earlier':>12}   ratio")
        for kind, (now, before) in kinds.items():
            print(f"{kind:20} {now:12,} {before:12,}  {before / now:6.1f}", flush=True)


def earlier(ticket: Path, config: dict[str, Any]) -> int:
    """Returns the bytes of a ticket as a `.keras` file with the state of its optimizer."""
    model = load_saved(ticket)
    optimizer = networks.optimizer(config["optimizer"], config["learning_rate"], config["steps"])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    return written(ticket, lambda file: save_model(model, file))


def uncompressed(file: Path) -> int:
    """Returns the bytes of an `.npz` file without compression."""
    with np.load(file) as arrays:
        return written(file, lambda copy: np.savez(copy, **arrays))


def written(file: Path, write: Callable[[Path], None]) -> int:
    """Returns the bytes of what a function writes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, f"{file.stem}{'.keras' if file.suffix != '.npz' else '.npz'}")
        write(copy)
        return copy.stat().st_size


def main() -> None:
    """Prints what the arguments say."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tickets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sizes")
    commands.add_parser("folders").add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "sizes":
        sizes()
    else:
        folders(arguments.runs)


if __name__ == "__main__":
    main()
