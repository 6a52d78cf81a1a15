"""Folders as left by runs of the command, without the training."""

import json

import pandas as pd


def row(number, arm, replicate, accuracy, sparsity):
    return {
        "round": number, "arm": arm, "replicate": replicate, "sparsity": sparsity,
        "test_accuracy": accuracy, "test_loss": 0.1, "early_stop_step": 10 * replicate,
        "seconds": 1.0, "validation_loss": 0.2,
    }  # fmt: skip


ROWS = [
    row(0, "dense", 0, 0.9, 0.0),
    row(1, "random_mask", 0, 0.5, 0.5),
    row(1, "ticket", 0, 0.8, 0.5),
    row(0, "dense", 1, 0.92, 0.0),
    row(1, "random_mask", 1, 0.7, 0.5),
    row(1, "ticket", 1, 1.0, 0.5),
]
CONFIG = {
    "data": "digits", "network": "lenet-300-100", "strategy": "large_final", "rounds": 1,
    "rate": 0.2, "output_rate": 0.1, "controls": ["random_mask"], "seeds": [7, 8],
    "steps": 50, "out": None, "data_dir": None,
}  # fmt: skip


def write_run(folder, rows=ROWS, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"out": str(folder)} | changes))
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    return folder
