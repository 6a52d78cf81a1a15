"""Prunes half of the channels of networks, removes them, and measures sizes and speed.

    python -m benchmarks.shrinking [--networks VGG16 lstm] [--batches 1 8] [--rounds 10]

Weights are fresh (seed 0); biases, and shifts, scales and statistics of BatchNormalization, are
drawn as they may be after training. `structure="channels"` prunes half of the channels of each
family by magnitude, and `shrink` removes them. Prints the shares of weights and multiply-adds that
are left, and the largest difference between outputs of the smaller and the masked model, relative
to the largest output. If torch-pruning and torchvision are installed and have the same
architecture, also prints the shares that torch-pruning leaves at the same ratio, and ours divided
by theirs.

With `--batches`, the model before pruning and the smaller model run compiled by the
backend, in turns, so that other load on the machine affects both equally. Transformers require
KerasHub.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner

# Keras' name -> torchvision's; None where it has none.
NETWORKS = {
    "VGG16": "vgg16",
    "ResNet50": "resnet50",
    "MobileNetV2": "mobilenet_v2",
    "EfficientNetB0": "efficientnet_b0",
    "DenseNet121": "densenet121",
    "InceptionV3": "inception_v3",
    "Xception": None,
    "ConvNeXtTiny": "convnext_tiny",
    "ViT-B/16": "vit_b_16",
    "BERT": None,
    "lstm": None,
}
FROM_KERAS_HUB = ("ViT-B/16", "BERT")
SIZES = {"InceptionV3": 299, "Xception": 299}


def network(name):
    """Returns a network with weights like those of a trained one."""
    keras.utils.set_random_seed(0)
    if name == "lstm":  # rows of the digits, one after the other
        inside = [layers.LSTM(64, return_sequences=True), layers.LSTM(64), layers.Dense(10)]
        model = keras.Sequential([keras.Input((8, 8)), *inside])
    elif name == "ViT-B/16":
        model = vision_transformer()
    elif name == "BERT":
        model = bert()
    else:
        size = SIZES.get(name, 224)
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(size, size, 3), classifier_activation=None
        )
    rng = np.random.default_rng(0)
    for variable in model.weights:
        kind = variable.name.rpartition("_")[2]
        value = keras.ops.convert_to_numpy(variable)
        noise = rng.normal(size=value.shape)
        if kind in ("beta", "bias", "mean"):
            variable.assign(value + 0.1 * noise)
        elif kind in ("gamma", "variance"):
            variable.assign(value * np.exp(0.2 * noise))
    return model


def vision_transformer(size=224, patch=16, width=768, blocks=12, heads=12, classes=1000):
    """Returns a vision transformer that pools over all patches. By default: of size ViT-B/16."""
    from keras_hub.layers import PositionEmbedding, TransformerEncoder

    inputs, patches = keras.Input((size, size, 3)), (size // patch) ** 2
    x = layers.Conv2D(width, patch, strides=patch)(inputs)
    x = layers.Reshape((patches, width))(x)
    x = layers.add([x, PositionEmbedding(patches)(x)])
    for _ in range(blocks):
        x = TransformerEncoder(4 * width, heads, activation="gelu", normalize_first=True)(x)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(classes)(x))


def bert():
    """Returns a classifier of two classes on the base size of BERT."""
    from keras_hub.models import BertBackbone

    backbone = BertBackbone(
        vocabulary_size=30522,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
    )
    return keras.Model(backbone.input, layers.Dense(2)(backbone.output["pooled_output"]))


def halved(model):
    """Returns a masked model that has lost half of the channels of each family."""
    masked = ml.convert_to_masked(model, mask_normalization=True)
    LotteryTicketPruner(masked).update_masks("smallest_weights", rate=0.5, structure="channels")
    return masked


def torch_pruning(name, size):
    """Returns the shares of weights and multiply-adds that torch-pruning leaves, None without it.

    Runs in a separate process, so that threads and symbols of other libraries do not interfere.
    """
    needed = ("torch_pruning", "torchvision")
    if name is None or not all(map(importlib.util.find_spec, needed)):
        return None
    command = [sys.executable, "-m", "benchmarks.shrinking", "--peer", name, str(size)]
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_torch_pruning(name, size):
    import torch
    import torch_pruning
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    model = getattr(torchvision.models, name)(weights=None, **options).eval()
    example = torch.zeros(1, 3, size, size)
    macs, weights = torch_pruning.utils.count_ops_and_params(model, example)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()
    if hasattr(model, "hidden_dim"):  # a number that the forward pass of a transformer reads
        model.hidden_dim = model.conv_proj.out_channels
    macs_left, weights_left = torch_pruning.utils.count_ops_and_params(model, example)
    print(json.dumps([weights_left / weights, macs_left / macs]))


def compiled(model, data):
    """Returns a function of such data that runs the model and waits for the result."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        specs = keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), data)
        function = tf.function(lambda x: model(x, training=False)).get_concrete_function(specs)
        return lambda x: function(keras.tree.map_structure(tf.constant, x)).numpy()
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


def examples(model, batch):
    """Returns random inputs: pictures, or the words of a text of 128."""
    rng = np.random.default_rng(0)

    def draw(tensor):
        shape = [batch, *(128 if size is None else size for size in tensor.shape[1:])]
        if tensor.dtype == "float32":
            return rng.normal(size=shape).astype("float32")
        return rng.integers(0, 2, shape).astype("int32")  # segments, words and what is padding

    return keras.tree.map_structure(draw, model.input)


def print_row(name, smaller, report, difference):
    shares = [report.weights_after / report.weights_before, None]
    if report.macs_before is not None:
        shares[1] = report.macs_after / report.macs_before
    # The outputs are not pruned: of the last kernel half of the rows are left, not a quarter.
    last = smaller.layers[-1].count_params() / report.weights_before
    theirs = torch_pruning(NETWORKS[name], SIZES.get(name, 224))
    cells = [
        name,
        f"{report.weights_before:,}",
        f"{shares[0]:.3f} ({last:.3f})",
        "" if shares[1] is None else f"{shares[1]:.3f}",
        f"{difference:.1e}",
        *((f"{x:.3f}" for x in theirs) if theirs else ("", "")),
        " / ".join(f"{a / b:.2f}" for a, b in zip(shares, theirs or (), strict=False)),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def print_times(model, smaller, batches, rounds):
    for batch in batches:
        data = examples(smaller, batch)
        functions = [compiled(each, data) for each in (model, smaller)]
        before, after = times(functions, data, rounds)
        print(
            f"  batch {batch:>3}: {1e3 * np.median(before):8.2f} ms -> "
            f"{1e3 * np.median(after):8.2f} ms, {np.median(before) / np.median(after):.2f}x "
            f"(fastest rounds {before.min() / after.min():.2f}x)",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="*", type=int, default=[])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return print_torch_pruning(arguments.peer[0], int(arguments.peer[1]))

    print(f"keras {keras.__version__}, {keras.backend.backend()}: half of the channels pruned")
    print(
        "| network | weights | left (last layer) | multiply-adds left | outputs differ"
        " | torch-pruning: weights | multiply-adds | ours / theirs |"
    )
    print("|---" * 8 + "|")
    for name in arguments.networks:
        if name in FROM_KERAS_HUB and not importlib.util.find_spec("keras_hub"):
            print(f"  {name}: left out, KerasHub is not installed")
            continue
        model = network(name)
        masked = halved(model)
        smaller, report = ml.shrink(masked, return_report=True)
        data = examples(smaller, 1)
        expected, got = (keras.ops.convert_to_numpy(each(data)) for each in (masked, smaller))
        print_row(name, smaller, report, np.abs(expected - got).max() / np.abs(expected).max())
        for reason in sorted(set(report.not_followed.values())):
            layers_whole = [k for k, value in report.not_followed.items() if value == reason]
            print(f"  left whole: {len(layers_whole)} layers, such as {layers_whole[0]}: {reason}")
        print_times(model, smaller, arguments.batches, arguments.rounds)
    return None


if __name__ == "__main__":
    main()
