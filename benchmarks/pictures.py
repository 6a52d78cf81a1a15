"""Draws the pictures of docs/idea.md from a ticket that is found on scikit-learn's digits.

python -m benchmarks.pictures docs
"""

import argparse
from pathlib import Path

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import masked_layers
from lottery_ticket_pruner import LotteryTicketPruner, find_ticket

PIXELS, UNITS = 64, 24
SHOWN = (0, 2, 5, 9)  # rounds
STRUCTURES = {"single weights": None, "2:4": "2:4", "4x1 blocks": "4x1", "units": "units"}


def network():
    model = keras.Sequential(
        [
            keras.Input((PIXELS,)),
            keras.layers.Dense(UNITS, "relu", name="hidden"),
            keras.layers.Dense(10, "softmax", name="output"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def show(axes, weights, mask, limit):
    """Draws a kernel; pruned weights are white."""
    colors = matplotlib.colormaps["PuOr"].with_extremes(bad="white")
    shown = np.ma.masked_where(~mask, weights)
    axes.imshow(shown, cmap=colors, vmin=-limit, vmax=limit, interpolation="nearest")
    frame(axes)


def frame(axes):
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_color("0.6")


def draw_mask(folder, weights):
    """Draws raw weights, their mask, and what the layer multiplies with."""
    part = weights[20:28, :8]
    mask = np.abs(part) >= np.median(np.abs(part))
    limit = np.abs(part).max()
    figure, (raw, kept, product) = plt.subplots(1, 3, figsize=(7.2, 2.5))
    show(raw, part, np.ones_like(mask), limit)
    kept.imshow(mask, cmap="gray_r", vmin=-0.2, vmax=1.6, interpolation="nearest")
    frame(kept)
    show(product, part, mask, limit)
    raw.set_title("raw weights")
    kept.set_title("mask (dark: keep)")
    product.set_title("what the layer reads")
    save(figure, folder / "idea-mask.png")


def draw_rounds(folder, result, weights):
    """Draws the first kernel and the pixels that it reads, after some rounds."""
    figure, rows = plt.subplots(2, len(SHOWN), figsize=(7.2, 5.4), height_ratios=(2.2, 1))
    limit = np.abs(weights).max()
    for (kernel, pixels), number in zip(rows.T, SHOWN, strict=True):
        mask = result.masks[number]["hidden/kernel"]
        accuracy = next(
            row["test_accuracy"]
            for row in result.rows
            if row["round"] == number and row["arm"] in ("dense", "ticket")
        )
        kept = sum(m.sum() for m in result.masks[number].values())
        kept /= sum(m.size for m in result.masks[number].values())
        show(kernel, weights, mask, limit)
        kernel.set_title(f"round {number}: {kept:.0%} left\n{accuracy:.1%} correct", size=10)
        counts = mask.sum(axis=1).reshape(8, 8)
        pixels.imshow(counts, cmap="cividis", vmin=0, interpolation="nearest")
        frame(pixels)
    rows[0, 0].set_ylabel("initial weights that are kept\n(64 pixels x 24 units)")
    rows[1, 0].set_ylabel("weights left of\neach pixel (dark:\nnone or fewest)")
    save(figure, folder / "idea-rounds.png")


def draw_structures(folder, weights):
    """Draws half of the same weights pruned singly and in structures."""
    figure, row = plt.subplots(1, len(STRUCTURES), figsize=(7.2, 2.2))
    part = weights[20:28, :8]
    for axes, (title, structure) in zip(row, STRUCTURES.items(), strict=True):
        mask = half_pruned(part, structure)
        show(axes, part, mask, np.abs(part).max())
        axes.set_title(title)
    save(figure, folder / "idea-structures.png")


def half_pruned(kernel, structure):
    layer = keras.layers.Dense(kernel.shape[1], use_bias=False, name="layer")
    masked = masked_layers.convert_to_masked(keras.Sequential([keras.Input((len(kernel),)), layer]))
    masked.set_weights([kernel])
    sparsity = None if structure == "2:4" else 0.5  # N:M has its own
    pruner = LotteryTicketPruner(masked)
    pruner.update_masks("smallest_weights", structure=structure, sparsity=sparsity)
    (mask,) = masked_layers.get_masks(masked).values()
    return mask


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    matplotlib.use("agg")
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype("float32") / 16, y, random_state=0)
    keras.utils.set_random_seed(0)
    model = network()
    result = find_ticket(
        model, x, y, rounds=9, steps=2000, rate=0.35, controls=(), test_data=(x_test, y_test)
    )  # fmt: skip
    weights = keras.ops.convert_to_numpy(model.get_layer("hidden").kernel)
    draw_mask(folder, weights)
    draw_rounds(folder, result, weights)
    draw_structures(folder, weights)


if __name__ == "__main__":
    main()
