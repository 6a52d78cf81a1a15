"""Contenders that train LeNet-300-100 with masks but without Keras 3, for `benchmarks.plan`.

Each runs in a separate process, trains for an epoch of `steps` batches in random order with Adam,
and measures milliseconds per step.
"""

import itertools

import numpy as np

from benchmarks.timing import step_milliseconds

WIDTHS = (784, 300, 100, 10)
INPUTS = WIDTHS[0]
SPARSITY = 0.8


def examples(shape, count):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, *shape), dtype=np.float32)
    return x, rng.integers(0, 10, count, dtype=np.int32)


def hand_written(steps, batch_size):
    """Trains LeNet-300-100 with a hand-written Adam on TensorFlow, one XLA program per epoch."""
    import tensorflow as tf

    host_x, host_y = examples((INPUTS,), steps * batch_size)
    x, y = tf.constant(host_x), tf.constant(host_y)
    rng = np.random.default_rng(0)
    weights = []
    for before, after in itertools.pairwise(WIDTHS):
        kernel = rng.normal(scale=np.sqrt(2 / (before + after)), size=(before, after))
        weights += [tf.Variable(kernel, dtype="float32"), tf.Variable(tf.zeros(after))]
    first = [tf.Variable(tf.zeros_like(weight)) for weight in weights]
    second = [tf.Variable(tf.zeros_like(weight)) for weight in weights]
    time_step = tf.Variable(0.0)

    @tf.function(jit_compile=True)
    def epoch(x, y, order):
        w1, b1, w2, b2, w3, b3 = weights
        for batch in tf.range(steps):
            batch_x, batch_y = tf.gather(x, order[batch]), tf.gather(y, order[batch])
            with tf.GradientTape() as tape:
                hidden = tf.nn.relu(batch_x @ w1 + b1)
                hidden = tf.nn.relu(hidden @ w2 + b2)
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(batch_y, hidden @ w3 + b3)
                )
            gradients = tape.gradient(loss, weights)
            time_step.assign_add(1.0)
            rate = 1.2e-3 * tf.sqrt(1 - 0.999**time_step) / (1 - 0.9**time_step)
            for weight, m, v, gradient in zip(weights, first, second, gradients, strict=True):
                m.assign(0.9 * m + 0.1 * gradient)
                v.assign(0.999 * v + 0.001 * gradient * gradient)
                weight.assign_sub(rate * m / (tf.sqrt(v) + 1e-7))

    def run():
        order = rng.permutation(len(host_x)).astype("int32").reshape(steps, batch_size)
        epoch(x, y, tf.constant(order))

    run()
    return {"hand": step_milliseconds(run, steps)}


def torch_prune(steps, batch_size):
    """Trains LeNet-300-100 in a plain torch loop with the masks of `torch.nn.utils.prune`."""
    import torch
    from torch.nn.utils import prune

    torch.manual_seed(0)
    host_x, host_y = examples((INPUTS,), steps * batch_size)
    x, y = torch.from_numpy(host_x), torch.from_numpy(host_y).long()
    modules = []
    for before, after in itertools.pairwise(WIDTHS):
        modules += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    model = torch.nn.Sequential(*modules[:-1])
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            prune.random_unstructured(layer, "weight", SPARSITY)
    loss_function = torch.nn.CrossEntropyLoss()

    def contender(**kwargs):
        optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3, eps=1e-7, **kwargs)

        def epoch():
            for batch in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                loss_function(model(x[batch]), y[batch]).backward()
                optimizer.step()

        epoch()
        return step_milliseconds(epoch, steps)

    return {"torch": contender(), "torch, fused": contender(fused=True)}


def tfmot(steps, batch_size, frequency):
    """Trains with `prune_low_magnitude` on `tf_keras`, with new masks every `frequency` steps."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    sparsity = tfmot.sparsity.keras
    tf_keras.utils.set_random_seed(0)
    model = sparsity.prune_low_magnitude(
        tf_keras.Sequential(
            [
                tf_keras.layers.InputLayer((784,)),
                tf_keras.layers.Dense(300, "relu"),
                tf_keras.layers.Dense(100, "relu"),
                tf_keras.layers.Dense(10),
            ]
        ),
        sparsity.ConstantSparsity(SPARSITY, begin_step=0, frequency=frequency),
    )
    model.compile(
        tf_keras.optimizers.Adam(1.2e-3),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    x, y = examples((INPUTS,), steps * batch_size)

    def epoch():
        model.fit(x, y, batch_size=batch_size, callbacks=[sparsity.UpdatePruningStep()], verbose=0)

    epoch()
    return {"tfmot": step_milliseconds(epoch, steps)}
