"""Counts the kept weights of each layer at a high sparsity, for criteria at initialization.

    python -m benchmarks.studies.collapse

An untrained network of `--depth` 3 x 3 convolutions is pruned to `--sparsity` with all layers
ranked together. A layer without weights passes nothing on ("collapsed"). SynFlow is designed to
avoid this until there are fewer weights than layers (Tanaka et al., arXiv 2006.05467, figure 1).
Images and labels are random, since the data of the gradients has little influence here.
"""

import argparse

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner

CRITERIA = {
    "random": "random",
    "magnitude": "smallest_weights_global",
    "snip": "snip",
    "grasp": "grasp",
    "synflow": "synflow",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.999)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    keras.utils.set_random_seed(arguments.seed)
    inner = []
    for number in range(arguments.depth):
        # As in VGG, the number of filters doubles after each of three poolings.
        stage = 4 * number // arguments.depth
        if number and stage != 4 * (number - 1) // arguments.depth:
            inner.append(keras.layers.MaxPooling2D())
        inner.append(
            keras.layers.Conv2D(
                16 * 2**stage,
                3,
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                name=f"conv_{number + 1}",
            )
        )
    inner += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, name="output")]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((32, 32, 3)), *inner]))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(arguments.seed)
    x, y = rng.normal(size=(100, 32, 32, 3)).astype("float32"), rng.integers(0, 10, 100)

    pruner = LotteryTicketPruner(model)
    reports = {}
    for title, name in CRITERIA.items():
        pruner.reset_masks()
        scope = "global" if name == "random" else None
        reports[title] = pruner.update_masks(
            name, sparsity=arguments.sparsity, scope=scope, data=(x, y)
        )
    print(f"weights left at a sparsity of {arguments.sparsity:.2%}")
    print(f"{'layer':12}{'weights':>9}" + "".join(f"{title:>10}" for title in CRITERIA))
    for rows in zip(*reports.values(), strict=True):
        cells = "".join(f"{row.alive:>10,}" for row in rows)
        print(f"{rows[0].path.split('/')[0]:12}{rows[0].size:>9,}{cells}")
    total = next(iter(reports.values()))
    print(f"{'total':12}{total.size:>9,}" + "".join(f"{r.alive:>10,}" for r in reports.values()))
    collapsed = [sum(row.alive == 0 for row in report) for report in reports.values()]
    print(f"{'collapsed':12}{'':9}" + "".join(f"{count:>10}" for count in collapsed))


if __name__ == "__main__":
    main()
