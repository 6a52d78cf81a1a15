"""Trains masked models and checks that pruned weights are exactly zero.

    python -m benchmarks.checks.masks

On every installed backend, a convolutional network with regularizers and half of its weights
pruned is trained for 100 steps with each optimizer. Prints the largest absolute effective value of
a pruned weight, which must be 0.0, and the largest raw value, which may differ from 0.
"""

import importlib.util
import os
import subprocess
import sys

STEPS = 100
BACKENDS = ("tensorflow", "jax", "torch")


def measure():
    """Trains with each optimizer on the current backend and prints one line for each."""
    import keras
    import numpy as np
    from keras import layers

    import masked_layers as ml

    makers = {
        "Adam": lambda: keras.optimizers.Adam(0.01),
        "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        "SGD, momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01),
    }
    rng = np.random.default_rng(0)
    x = rng.normal(size=(320, 12, 12, 1)).astype("float32")
    y = rng.integers(0, 10, 320)
    for name, make in makers.items():
        keras.utils.set_random_seed(0)
        model = ml.convert_to_masked(
            keras.Sequential(
                [
                    keras.Input((12, 12, 1)),
                    layers.Conv2D(8, 3, activation="relu", kernel_regularizer="l2"),
                    layers.BatchNormalization(),
                    layers.Flatten(),
                    layers.Dense(32, "relu", kernel_regularizer="l1"),
                    layers.Dense(10, kernel_constraint="max_norm"),
                ]
            )
        )
        masks = {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(model).items()}
        ml.set_masks(model, masks)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(make(), loss)
        history = model.fit(x, y, batch_size=32, epochs=STEPS // 10, verbose=0)
        steps = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
        effective, raw = [], []
        for ref in ml.masked_refs(model):
            pruned = ~masks[ref.path]
            weight = keras.ops.convert_to_numpy(getattr(ref.layer, ref.name))
            effective.append(np.abs(weight[pruned]).max())
            raw.append(np.abs(keras.ops.convert_to_numpy(ref.variable)[pruned]).max())
        losses = history.history["loss"]
        print(
            f"{keras.backend.backend():12}{name:16}{steps:6}{max(effective):12}{max(raw):12.4f}"
            f"{losses[0]:12.3f} -> {losses[-1]:.3f}"
        )


def main():
    """Runs `measure` in a separate process for every backend."""
    print("backend     optimizer        steps   effective         raw        loss", flush=True)
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is None:
            print(f"{backend:12}not installed", flush=True)
            continue
        environment = {**os.environ, "KERAS_BACKEND": backend}
        code = "from benchmarks.checks.masks import measure; measure()"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)


if __name__ == "__main__":
    main()
