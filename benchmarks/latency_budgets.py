"""Prunes networks to budgets of latency, and measures the smaller models again.

    python -m benchmarks.latency_budgets [--networks ResNet-20 MobileNetV2 ViT] [--batches 1 8]
        [--budgets 0.75 0.5 0.35] [--round-to 8]

Weights are fresh; channels are pruned by magnitude, about the same share of each layer, to
multiples of 8, because libraries compute other numbers of channels more slowly. For each budget,
prints the ratio of latencies with which the search ended, and that of a new measurement in which
the model before pruning and the smaller one take turns for 10 seconds: of elapsed times and of
processor times, beside the shares of multiply-adds and weights. Processor time is steadier on a
machine with other load. The ViT requires KerasHub.
"""

import argparse
import importlib.util
import os
import time

import keras

import masked_layers as ml
from benchmarks.shrinking import network, vision_transformer
from lottery_ticket_pruner import Latency, LotteryTicketPruner
from lottery_ticket_pruner.experiments import networks
from lottery_ticket_pruner.structures import Channels
from masked_layers.shrinking import Compiled, compare

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["ResNet-20", "ViT", "MobileNetV2"]
    parser.add_argument("--networks", nargs="+", choices=known, default=known)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    arguments = parser.parse_args()

    print(f"keras {keras.__version__}, {keras.backend.backend()}, load {os.getloadavg()}")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in arguments.networks:
        if name == "ViT" and not importlib.util.find_spec("keras_hub"):
            print("  ViT: left out, KerasHub is not installed")
            continue
        masked = ml.convert_to_masked(made(name), mask_normalization=True)
        pruner = LotteryTicketPruner(masked)
        for batch in arguments.batches:
            for share in arguments.budgets:
                structure = Channels(round_to=arguments.round_to)
                cells = row(name, pruner, Latency(share, batch_size=batch), structure)
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
