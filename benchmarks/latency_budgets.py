"""Prunes networks to budgets of latency, and measures the smaller models again.

    python -m benchmarks.latency_budgets [--networks ResNet-20 MobileNetV2 ViT] [--batches 1 8]
        [--budgets 0.75 0.5 0.35] [--round-to 8]

Weights are fresh; channels are pruned by magnitude, about the same share of each layer, to
multiples of 8, because libraries compute other numbers of channels more slowly. For each budget,
prints the ratio of latencies with which the search ended, and that of a new measurement in which
the model before pruning and the smaller one take turns for 10 seconds: of elapsed times and of
processor times, beside the shares of multiply-adds and weights. Processor time is steadier on a
machine with other load. The ViT requires KerasHub.

    KERAS_BACKEND=torch python -m benchmarks.latency_budgets --single-weights
        [--networks MLP encoder MobileNetV2] [--batches 32 1] [--budgets 2 1 0.5]

prunes single weights by magnitude instead (the same share of every kernel that becomes faster), for
the TorchScript program with sparse kernels. A budget above 1 is given in milliseconds, as that
multiple of the dense program's. Prints what was predicted at first and at the end, what the search
measured, and what `export_sparse_torch` measures in a new comparison with the dense program.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from unittest import mock

import keras

import masked_layers as ml
from benchmarks.shrinking import network, vision_transformer
from lottery_ticket_pruner import Latency, LotteryTicketPruner
from lottery_ticket_pruner.experiments import networks
from lottery_ticket_pruner.served_latencies import ServedProbes
from lottery_ticket_pruner.structures import Channels
from masked_layers.shrinking import Compiled, compare
from masked_layers.torchscript import program_costs

COLUMNS = (
    "network",
    "batch size",
    "budget",
    "at the end of the search",
    "measured again: elapsed (middle half)",
    "processor",
    "budget missed by",
    "multiply-adds",
    "weights",
    "models tried",
    "seconds",
)


def made(name):
    if name == "MobileNetV2":
        return network(name)
    keras.utils.set_random_seed(0)
    if name == "ResNet-20":
        return networks.build("resnet-20", (32, 32, 3), 10)
    return vision_transformer(size=32, patch=4, width=192, blocks=6, heads=3, classes=10)


def row(name, pruner, budget, structure):
    """Prunes to a budget, and returns the cells of its row."""
    start = time.perf_counter()
    pruner.reset_masks()
    try:
        pruner.update_masks("smallest_weights", budget={"latency": budget}, structure=structure)
    except ValueError as error:
        return [name, str(budget.batch_size), str(budget.share), str(error).partition(". ")[0]]
    took = time.perf_counter() - start
    found = pruner.measured_latency
    smaller, report = ml.shrink(pruner.model, return_report=True)
    dense = Compiled(ml.shrinking.unpruned(pruner.model), budget.batch_size)
    again = compare(dense, Compiled(smaller, budget.batch_size), seconds=10, rounds=(15, 400))
    low, high = again.spread
    return [
        name,
        f"{budget.batch_size}",
        f"{budget.share}",
        f"{found.measured:.3f}",
        f"{again.elapsed:.3f} ({low:.3f} to {high:.3f})",
        f"{again.processor:.3f}",
        f"{100 * (again.ratio / budget.share - 1):+.0f} %",
        f"{(report.macs_after or 0) / (report.macs_before or 1):.3f}",
        f"{report.weights_after / report.weights_before:.3f}",
        f"{found.trials}",
        f"{took:.0f}",
    ]


WEIGHT_COLUMNS = (
    "network",
    "batch size",
    "budget",
    "first prediction",
    "measured then",
    "prediction at the end",
    "measured",
    "off by",
    "measured again",
    "weights left",
    "programs tried",
    "seconds",
)
BATCHES = {"MLP": 32, "encoder": 1, "MobileNetV2": 1}


def shown(latency):
    """Returns a latency as text, which is empty if there is none."""
    return "" if latency is None else f"{latency:.3f}"


def weight_row(name, pruner, budget, batch):
    """Prunes single weights to a budget, and returns the cells of its row."""
    pruner.reset_masks()
    start, tried = time.perf_counter(), []
    latency = Latency(min(budget, 1), batch_size=batch)
    if budget > 1:
        dense = program_costs(ml.strip_masks(pruner.model), (), batch_size=batch).seconds
        latency = Latency(milliseconds=1e3 * budget * dense, batch_size=batch)
    unit = 1 if latency.share else latency.limit / budget  # What is 1 in the table.
    call = ServedProbes.__call__

    def noted(self, masks, *, predicted):
        load = call(self, masks, predicted=predicted)
        expected = None if predicted is None else predicted * latency.limit / unit
        tried.append((shown(expected), shown(load * latency.limit / unit)))
        return load

    with mock.patch.object(ServedProbes, "__call__", noted):
        try:
            pruner.update_masks("smallest_weights", budget={"latency": latency})
        except ValueError as error:
            return [name, f"{batch}", f"{budget}", *tried[0], str(error).partition(". Pass")[0]]
    took = time.perf_counter() - start
    found = pruner.measured_latency
    with tempfile.TemporaryDirectory() as folder:
        report = ml.export_sparse_torch(pruner.model, f"{folder}/model.pt", batch_size=batch)
    expected = None if found.predicted is None else found.predicted / unit
    off = "" if expected is None else f"{100 * (found.measured / unit / expected - 1):+.0f} %"
    left = 1 - ml.sparsity_report(pruner.model).sparsity
    return [
        name,
        f"{batch}",
        f"{budget}",
        *tried[0],
        shown(expected),
        f"{found.measured / unit:.3f}",
        off,
        f"{1 / report.gain:.3f}",
        f"{left:.3f}",
        f"{found.trials}",
        f"{took:.0f}",
    ]


def weight_network(name):
    if name == "MobileNetV2":
        return network(name)
    from benchmarks import sparse_speed

    keras.utils.set_random_seed(0)
    return {"MLP": sparse_speed.mlp, "encoder": sparse_speed.encoder}[name]()


def single_weights(names, batches, budgets):
    print(f"| {' | '.join(WEIGHT_COLUMNS)} |\n{'|---' * len(WEIGHT_COLUMNS)}|")
    for name in names:
        pruner = LotteryTicketPruner(ml.convert_to_masked(weight_network(name)))
        for batch in batches or [BATCHES[name]]:
            for budget in budgets:
                cells = weight_row(name, pruner, budget, batch)
                print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["ResNet-20", "ViT", "MobileNetV2"]
    parser.add_argument("--networks", nargs="+", choices=[*known, *BATCHES])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--budgets", nargs="+", type=float)
    parser.add_argument("--single-weights", action="store_true")
    arguments = parser.parse_args()

    print(f"keras {keras.__version__}, {keras.backend.backend()}, load {os.getloadavg()}")
    if arguments.single_weights:
        budgets = arguments.budgets or [2, 1, 0.5]
        single_weights(arguments.networks or list(BATCHES), arguments.batches, budgets)
        print(f"load {os.getloadavg()}")
        return
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in arguments.networks or known:
        if name == "ViT" and not importlib.util.find_spec("keras_hub"):
            print("  ViT: left out, KerasHub is not installed")
            continue
        masked = ml.convert_to_masked(made(name), mask_normalization=True)
        pruner = LotteryTicketPruner(masked)
        for batch in arguments.batches or [1, 8]:
            for share in arguments.budgets or [0.75, 0.5, 0.35]:
                structure = Channels(round_to=arguments.round_to)
                cells = row(name, pruner, Latency(share, batch_size=batch), structure)
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
