"""Contenders for `benchmarks.plan`: a grid of untrained masks, and only its matrix products."""

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml
from _lottery_ticket.experiments import CRITERIA
from benchmarks.timing import seconds
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.supermasks import evaluate_grid


def grid(examples, criteria, sparsities):
    """Times LeNet-300-100 under all these masks, and as many repetitions of its products."""
    keras.utils.set_random_seed(0)
    shape = [keras.Input((784,)), layers.Dense(300, "relu"), layers.Dense(100, "relu")]
    model = ml.convert_to_masked(keras.Sequential([*shape, layers.Dense(10)]))
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    pruner = LotteryTicketPruner(model)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(rng.standard_normal(variable.shape, dtype="float32") / 30)
    pruner.set_pretrained_weights()
    x = rng.random((examples, 784), dtype=np.float32)
    y = rng.integers(0, 10, examples)
    options = {
        "criteria": CRITERIA[:criteria],
        "sparsities": np.linspace(0, 1, sparsities + 1)[:-1].tolist(),
        "weights": ("initial",),
        "dwr": (False,),
    }
    cells = criteria * sparsities
    factors = [
        ops.convert_to_tensor(rng.random(shape, dtype=np.float32))
        for shape in ((examples, 784), (784, 300), (examples, 300), (300, 100), (examples, 100))
    ]
    factors.append(ops.convert_to_tensor(rng.random((100, 10), dtype=np.float32)))

    def products():
        for _ in range(cells):
            for left, right in zip(factors[::2], factors[1::2], strict=True):
                product = ops.matmul(left, right)
        # Asynchronous backends have finished when the last product is available.
        ops.convert_to_numpy(product)

    def masks():
        assert len(evaluate_grid(pruner, x, y, **options)) == cells

    masks()
    products()
    return {"grid": seconds(masks), "products": seconds(products)}
