"""Rewinding and supermasks: the original model with the current masks."""

import keras
import numpy as np
import pytest
from keras import ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.variables import read
from pruned import assert_same, compiled, masked_model, plain_model, trained

BACKEND = keras.backend.backend()


def everything(model):
    """Returns the values of all variables of the model, its optimizer and its metrics."""
    variables = [*model.weights, *(ref.mask.value for ref in ml.masked_refs(model))]
    variables += [*model.optimizer.variables, *model.variables, *model.metrics_variables]
    return [read(variable) for variable in variables]


# --- Rewinding ------------------------------------------------------------------------------------


def test_rewinding_brings_everything_back_but_the_masks(data):
    model, pruner = trained(data)
    initial = list(pruner.initial_weights.values())
    pruner.update_masks(rate=0.5)
    masks = list(ml.get_masks(model).values())
    pruner.rewind()
    assert_same(model.get_weights(), initial)
    assert_same(list(ml.get_masks(model).values()), masks)
    model.fit(*data, verbose=0)  # JAX donates the buffers of the weights here
    pruner.rewind()
    assert_same(model.get_weights(), initial)
    assert_same(list(pruner.initial_weights.values()), initial)


class AverageStart(keras.optimizers.SGD):
    """Initializes slots with copies of the weights."""

    def build(self, variables):
        super().build(variables)
        self.start = [
            self.add_variable(shape=v.shape, initializer=lambda shape, dtype, v=v: ops.copy(v))
            for v in variables
        ]


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05, initial_accumulator_value=0.3),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), dynamic_growth_steps=2
    ),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    ),
    "weights in slots": lambda: AverageStart(0.05),
}
LIKE_OTHERS = ("ftrl", "nadam", "adagrad")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.once, pytest.mark.slow] * (name in LIKE_OTHERS))
        for name in OPTIMIZERS
    ],
)
def test_training_after_rewinding_repeats_the_first_training(name, data):
    x, y = data
    model = masked_model(OPTIMIZERS[name]())
    model.layers[2].rate = 0.0  # the random state of dropout is not rewound
    model.optimizer.build(model.trainable_variables)
    fresh = [read(variable) for variable in model.optimizer.variables]
    pruner = LotteryTicketPruner(model)
    runs = []
    for _ in range(2):
        for i in range(0, 80, 16):
            model.train_on_batch(x[i : i + 16], y[i : i + 16])
        runs.append(model.get_weights())
        function = model.train_function
        pruner.rewind()
        assert model.train_function is function
        now = [read(variable) for variable in model.optimizer.variables]
        assert_same(now, fresh)
    assert_same(*runs)


def test_rewinding_without_the_optimizer_leaves_it(data):
    model, pruner = trained(data)
    before = [read(variable) for variable in model.optimizer.variables]
    pruner.rewind(optimizer=False)
    assert_same([read(variable) for variable in model.optimizer.variables], before)
    assert_same(model.get_weights(), list(pruner.initial_weights.values()))


def learning_rate(model):
    return float(ops.convert_to_numpy(model.optimizer.learning_rate))


def test_rewinding_brings_a_changed_learning_rate_back(data):
    model, pruner = trained(data)
    model.optimizer.learning_rate = 1e-5
    pruner.rewind()
    assert learning_rate(model) == pytest.approx(0.01)
    # A rate set by a later `compile` is kept.
    compiled(model, keras.optimizers.SGD(0.3))
    model.fit(*data, verbose=0)
    pruner.rewind()
    assert learning_rate(model) == pytest.approx(0.3)


def test_rewinding_to_step_k_brings_schedules_to_step_k(data):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5, staircase=True)
    for rate, steps in ((schedule, 5), (0.01, 0)):
        model = masked_model(keras.optimizers.SGD(rate))
        pruner = LotteryTicketPruner(model)
        model.fit(*data, batch_size=16, verbose=0)
        weights = model.get_weights()
        pruner.set_initial_weights()
        model.fit(*data, batch_size=16, verbose=0)
        pruner.rewind()
        assert_same(model.get_weights(), weights)
        assert int(ops.convert_to_numpy(model.optimizer.iterations)) == steps


def test_rewinding_where_the_trainable_weights_changed_is_an_error_and_changes_nothing(data):
    model, pruner = trained(data)
    model.get_layer("hidden").trainable = False
    before = everything(model)
    with pytest.raises(ValueError, match="Compile the model again"):
        pruner.rewind()
    assert_same(everything(model), before)
    pruner.rewind(optimizer=False)
    assert_same(model.get_weights(), list(pruner.initial_weights.values()))


@pytest.mark.once
def test_rewinding_an_uncompiled_model():
    model = ml.convert_to_masked(plain_model())
    pruner = LotteryTicketPruner(model)
    initial = model.get_weights()
    model.set_weights([weight + 1 for weight in initial])
    pruner.rewind()
    assert_same(model.get_weights(), initial)


# --- Supermasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dwr", [False, True])
@pytest.mark.parametrize("weights", ["initial", "signed_constant"])
def test_evaluate_supermask_against_a_model_made_by_hand(weights, dwr, data):
    x, y = data
    model, pruner = trained(data, jit_compile=BACKEND == "jax")
    pruner.update_masks(rate={"head": 0.25, "default": 0.5})
    model.evaluate(x, y, verbose=0)  # a test function compiled without the factor
    metrics = pruner.evaluate_supermask(x, y, weights=weights, dwr=dwr, verbose=0)
    model.evaluate(x, y, verbose=0)

    by_hand = compiled(plain_model())
    values = dict(pruner.initial_weights)
    for path, mask in ml.get_masks(model).items():
        if weights == "signed_constant":
            values[path] = np.sign(values[path]) * np.std(values[path])
        values[path] = np.where(mask, values[path], 0) * (mask.size / mask.sum() if dwr else 1)
    by_hand.set_weights(list(values.values()))
    expected = by_hand.evaluate(x, y, return_dict=True, verbose=0)
    assert metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dwr", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_evaluate_supermask_leaves_the_model_as_it_was(fails, dwr, data):
    class Fail(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            if fails and batch == 1:
                raise RuntimeError("stop")

    x, y = data
    model, pruner = trained(data)
    pruner.update_masks(rate=0.5)
    loss = model.evaluate(x, y, verbose=0)
    predictions = model.predict_on_batch(x)
    before = everything(model)
    functions = model.train_function, model.test_function, model.predict_function
    optimizer = model.optimizer
    arguments = {"weights": "signed_constant", "dwr": dwr, "batch_size": 16, "verbose": 0}
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            pruner.evaluate_supermask(x, y, **arguments, callbacks=[Fail()])
    else:
        pruner.evaluate_supermask(x, y, **arguments)
    assert_same(everything(model), before)
    assert (model.train_function, model.test_function, model.predict_function) == functions
    assert model.optimizer is optimizer
    assert not any(ref.mask.rescale for ref in ml.masked_refs(model))
    assert model.evaluate(x, y, verbose=0) == loss
    np.testing.assert_array_equal(model.predict_on_batch(x), predictions)
    model.fit(x, y, verbose=0)


def test_evaluate_supermask_of_a_model_that_was_never_trained(data):
    model = masked_model(AverageStart(0.1))
    pruner = LotteryTicketPruner(model)
    before = everything(model)
    pruner.evaluate_supermask(*data, weights="signed_constant", verbose=0)
    assert_same(everything(model)[: len(before)], before)
    assert not model.optimizer.built
    model.fit(*data, verbose=0)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(model.optimizer.start[0]), pruner.initial_weights["hidden/kernel"]
    )


@pytest.mark.once
def test_evaluate_supermask_refuses_invalid_arguments(data):
    model = ml.convert_to_masked(plain_model())
    pruner = LotteryTicketPruner(model)
    with pytest.raises(ValueError, match="not compiled"):
        pruner.evaluate_supermask(*data)
    with pytest.raises(ValueError, match="signed_constant"):
        pruner.evaluate_supermask(*data, weights="constant")


def test_apply_dwr_on_a_masked_model_follows_the_masks(data):
    x, _ = data
    model, pruner = trained(data, jit_compile=BACKEND == "jax")
    raw = model.get_weights()
    model.predict_on_batch(x)
    for rate, factor in ((0.5, 2), (0.5, 4)):
        pruner.update_masks("large_init", rate=rate)
        pruner.apply_dwr(model)
        pruner.apply_dwr(model)
        plain = plain_model()
        values = dict(zip(pruner.initial_weights, raw, strict=True))
        for path, mask in ml.get_masks(model).items():
            values[path] = np.where(mask, factor * values[path], 0)
        plain.set_weights(list(values.values()))
        expected = plain.predict_on_batch(x)
        np.testing.assert_allclose(model.predict_on_batch(x), expected, rtol=1e-4, atol=1e-5)
    assert_same(model.get_weights(), raw)
