"""Times networks with half of their filters and units pruned, before and after `shrink`.

    python -m benchmarks.shrinking [--networks conv-6 ResNet50] [--batches 1 32] [--rounds 10]

Weights are fresh (seed 0). In every convolution and hidden dense layer, the half of the filters or
units with the smallest norm is masked, biases included; layers whose outputs are added up lose the
same filters, those with the smallest norm over all of them. Fresh BatchNormalization shifts by
zero, so every pruned filter stays zero up to the next convolution; trained shifts that are not zero
hold filters before zero-padded convolutions, as the report of `shrink` says.

The plain model (masks stripped, zeros inside) and the smaller one run compiled by the backend, in
turns, so that other load on the machine meets both alike. Prints the median of all rounds, the
ratio of the medians and of the fastest rounds, and the largest difference of outputs.
"""

import argparse
import re
import time
from collections import defaultdict

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.experiments import networks

GOAL = 1.8


def network(name):
    """Returns one of the papers' networks on CIFAR-10 images, or one of `keras.applications`."""
    keras.utils.set_random_seed(0)
    if name in networks.NAMES:
        return networks.build(name, (32, 32, 3))
    return getattr(keras.applications, name)(
        weights=None, input_shape=(224, 224, 3), classifier_activation=None
    )


def halved(model):
    """Returns a masked model without the weaker half of its filters and hidden units."""
    masked = ml.convert_to_masked(model, mask_bias=True)
    refs = {ref.path: ref for ref in ml.masked_refs(masked)}
    groups = defaultdict(list)  # layers that lose the same outputs
    for path, ref in refs.items():
        layer = path.rpartition("/")[0]
        if ref.name == "kernel" and ref.layer.name != masked.layers[-1].name:
            # ResNets of Keras: the last convolutions of all blocks of a stage are added up.
            groups[re.sub(r"block\d+_[03]_conv", "sum", layer)].append(layer)
    masks = ml.get_masks(masked)
    for layers in groups.values():
        kernels = [keras.ops.convert_to_numpy(refs[f"{layer}/kernel"].variable) for layer in layers]
        norms = sum((k**2).reshape(-1, k.shape[-1]).sum(axis=0) for k in kernels)
        weak = np.argsort(norms, kind="stable")[: len(norms) // 2]
        for layer in layers:
            masks[f"{layer}/kernel"][..., weak] = False
            if f"{layer}/bias" in masks:
                masks[f"{layer}/bias"][weak] = False
    ml.set_masks(masked, masks)
    return masked


def compiled(model, batch):
    """Returns a function of an array that runs the model and waits for the result."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        function = tf.function(lambda x: model(x, training=False)).get_concrete_function(
            tf.TensorSpec((batch, *model.input_shape[1:]), tf.float32)
        )
        return lambda x: function(tf.constant(x)).numpy()
    if keras.backend.backend() == "jax":
        import jax

        function = jax.jit(lambda x: model(x, training=False))
        return lambda x: np.asarray(function(x))

    import torch

    def run(x):
        with torch.no_grad():
            return keras.ops.convert_to_numpy(model(x, training=False))

    return run


def times(functions, data, rounds):
    """Returns seconds per call, (functions, rounds); the functions take turns."""
    for function in functions:
        function(data)
        function(data)
    seconds = np.zeros((len(functions), rounds))
    for index in range(rounds):
        for number, function in enumerate(functions):
            start = time.perf_counter()
            function(data)
            seconds[number, index] = time.perf_counter() - start
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["conv-6", "ResNet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()

    print(f"keras {keras.__version__}, {keras.backend.backend()}; goal: {GOAL} times faster")
    for name in arguments.networks:
        masked = halved(network(name))
        plain = ml.strip_masks(masked)
        start = time.perf_counter()
        smaller, report = ml.shrink(masked, return_report=True)
        seconds = time.perf_counter() - start
        convolutions = [row for row in report if "Conv" in row.kind]
        print(
            f"{name}: weights {report.weights_before:,} -> {report.weights_after:,}, filters "
            f"{sum(row.before for row in convolutions):,} -> "
            f"{sum(row.after for row in convolutions):,}, shrunk in {seconds:.1f} s"
        )
        for line in str(report).splitlines():
            if "stay" in line or "left whole" in line:
                print(" ", line.strip())
        for batch in arguments.batches:
            shape = (batch, *plain.input_shape[1:])
            data = np.random.default_rng(0).normal(size=shape).astype("float32")
            functions = [compiled(model, batch) for model in (plain, smaller)]
            expected, got = (function(data) for function in functions)
            difference = np.abs(expected - got).max() / np.abs(expected).max()
            before, after = times(functions, data, arguments.rounds)
            print(
                f"  batch {batch:>3}: {1e3 * np.median(before):8.2f} ms -> "
                f"{1e3 * np.median(after):8.2f} ms, {np.median(before) / np.median(after):.2f}x "
                f"(fastest rounds {before.min() / after.min():.2f}x), outputs differ by "
                f"{difference:.1e} relative"
            )


if __name__ == "__main__":
    main()
