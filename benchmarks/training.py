"""Contenders for `benchmarks.plan` that train with Keras: the engine, `fit`, masked and plain.

They use the backend of the process and measure milliseconds per step. All train on the same random
numbers (speed does not depend on the data), with Adam and the accuracy metric.
"""

import time

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from benchmarks.peers import SPARSITY, examples
from benchmarks.timing import peak_bytes, step_milliseconds
from lottery_ticket_pruner import training
from lottery_ticket_pruner.experiments import networks

# Longer than the engine takes to choose its route.
WARM_UP_SECONDS = 6.0

SHAPES = {
    "lenet-300-100": (784,),
    "conv-2": (32, 32, 3),
    "conv-6": (32, 32, 3),
    "resnet-20": (32, 32, 3),
    "resnet-50": (224, 224, 3),
    "transformer": (64, 256),
}


def build(network, shape=None):
    """Returns the compiled network."""
    keras.utils.set_random_seed(0)
    shape = shape or SHAPES[network]
    if network == "resnet-50":
        model = keras.applications.ResNet50(
            weights=None, input_shape=shape, classes=10, classifier_activation=None
        )
    elif network == "transformer":
        model = transformer_block(shape)
    else:
        model = networks.build(network, shape)
    return compiled(model)


def compiled(model, **kwargs):
    model.compile(
        keras.optimizers.Adam(1.2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **kwargs,
    )
    return model


def transformer_block(shape):
    """Returns a block of self-attention with 8 heads and an MLP (0.79 million weights)."""
    width = shape[-1]
    inputs = keras.Input(shape)
    x = layers.LayerNormalization()(inputs)
    x = layers.Add()([inputs, layers.MultiHeadAttention(8, width // 8)(x, x)])
    y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(10)(x), name="transformer_block")


def masked(model):
    """Returns the masked model with 80 % of its weights pruned at random."""
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    masks = {path: rng.random(mask.shape) >= SPARSITY for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


def engine(network, batch_size, steps, masks=False, warm_up=WARM_UP_SECONDS):
    """Trains with `training.train` as users call it, with the route chosen by timing."""
    model = build(network)
    if masks:
        model = masked(model)
    x, y = examples(SHAPES[network], steps * batch_size)

    def train():
        training.train(model, x, y, steps=steps, batch_size=batch_size)

    start = time.perf_counter()
    train()
    while time.perf_counter() < start + warm_up:
        train()
    return {"engine": step_milliseconds(train, steps)}


def fit(network, batch_size, steps, steps_per_execution=1, masks=False):
    """Trains with Keras' `fit`, one epoch per measurement."""
    model = build(network)
    compiled(model, steps_per_execution=steps_per_execution)
    if masks:
        model = masked(model)
    x, y = examples(SHAPES[network], steps * batch_size)

    def epoch():
        model.fit(x, y, batch_size=batch_size, verbose=0)

    epoch()
    return {"fit": step_milliseconds(epoch, steps)}


def masked_and_plain(network, batch_size, steps):
    """Trains the masked and the plain network with the same loop, in one process.

    The loop is deterministic and not chosen by timing, since it must be the same for both.
    """
    x, y = examples(SHAPES[network], steps * batch_size)

    def contender(model):
        def train():
            training.train(model, x, y, steps=steps, batch_size=batch_size, deterministic=True)

        train()
        return step_milliseconds(train, steps)

    plain = build(network)
    return {"masked": contender(masked(plain)), "plain": contender(plain)}


def earlier_callback(steps, batch_size):
    """Trains a plain model with a callback that writes zeros once per epoch, like earlier tools."""
    model = build("lenet-300-100")
    rng = np.random.default_rng(0)
    kept = {
        layer: rng.random(layer.kernel.shape) >= SPARSITY
        for layer in model.layers
        if isinstance(layer, layers.Dense)
    }

    class Prune(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            for layer, mask in kept.items():
                kernel, *others = layer.get_weights()
                layer.set_weights([np.where(mask, kernel, 0.0), *others])

    x, y = examples(SHAPES["lenet-300-100"], steps * batch_size)

    def epoch():
        model.fit(x, y, batch_size=batch_size, callbacks=[Prune()], verbose=0)

    epoch()
    return {"callback": step_milliseconds(epoch, steps)}


def on_device(network, batch_size, steps, shape, masks):
    """Measures steps in mixed bfloat16 and the peak memory of the device in megabytes.

    Without a GPU, the memory is the increase of the process' resident memory.
    """
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = build(network, tuple(shape))
    if masks:
        model = masked(model)
    x, y = examples(shape, 4 * batch_size)

    def train():
        training.train(model, x, y, steps=steps, batch_size=batch_size, deterministic=True)
        # Waits for the device.
        keras.ops.convert_to_numpy(model.trainable_variables[-1])

    grown = peak_bytes(train)
    return {
        "step": step_milliseconds(train, steps),
        "memory": lambda: (_most_bytes() or grown) / 1e6,
    }


def _most_bytes():
    if keras.backend.backend() == "jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return None
