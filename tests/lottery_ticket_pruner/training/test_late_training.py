"""Trainings of sparse models with the weights that are left, compared with those of all weights."""

import functools
import random
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import numpy
from lottery_ticket_pruner import LotteryTicketPruner, find_ticket, training
from lottery_ticket_pruner.training import kept_layers, kept_products, kept_weights, late_training
from searches import assert_equal

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4, 3)).astype("float32")
Y = (X[:, 0, 0] > X[:, 1, 1]).astype("int32")
PLAN = {"steps": 6, "batch_size": 16, "eval_every": 3, "validation_data": (X, Y)}


@pytest.fixture(autouse=True)
def _smaller_models_for_short_trainings(monkeypatch):
    monkeypatch.setattr(training.settings, "least_savings", 0)
    monkeypatch.setattr(late_training, "cost", lambda kept, products: kept.size)


def make(optimizer="sgd", hidden=(), **kwargs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            layers.Flatten(),
            layers.Dense(10, "tanh", name="first", **kwargs),
            *hidden,
            layers.Dense(8, name="second"),
            layers.LeakyReLU(),
            layers.Dense(2, name="last"),
        ]
    )
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() == "jax",
    )
    return prune(ml.convert_to_masked(model))


def prune(model):
    """Prunes at random, and leaves units without inputs, without outputs, and without both."""
    masks = {path: RNG.random(mask.shape) < 0.5 for path, mask in ml.get_masks(model).items()}
    first, second, last = masks.values()
    first[:, [0, 9]] = False
    second[[9, 2]] = False
    second[:, 3] = False
    last[4] = False
    first[5] = False  # an input that nobody reads
    ml.set_masks(model, masks)
    return model


def state(model):
    return [numpy(variable) for variable in (*model.variables, *model.optimizer.variables)]


def with_all_weights(function, *args, **kwargs):
    settings = training.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "least_savings", float("inf"))
        return function(*args, **kwargs)


def assert_same(model, other, tolerance=1e-5):
    for ours, theirs in zip(state(model), state(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def trained_smaller(model):
    smaller = late_training.kept_beside(model).get("smaller")
    return None if smaller is None else smaller.model


def losses(history):
    return [result["loss"] for result in history.validation]


@pytest.mark.parametrize(
    "single", [True, pytest.param(False, marks=pytest.mark.slow("tensorflow"))]
)
def test_it_is_the_same_training(single, monkeypatch):
    def optimizer():
        if single:
            return keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5)
        rate = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.9)
        return keras.optimizers.Adam(rate, amsgrad=True)

    on_torch = keras.backend.backend() == "torch"
    products = (kept_products.Sparse if on_torch else kept_products.Gathered)()
    monkeypatch.setattr(type(products), "faster", lambda self, kept: True)
    monkeypatch.setattr(late_training, "products_for", lambda *_: products if single else None)
    if on_torch:
        # It has a Python loop over the values there, and takes longer than all weights.
        monkeypatch.setattr(ops, "scatter", pytest.fail)
    ours, theirs = make(optimizer()), make(optimizer())
    ml.set_masks(theirs, ml.get_masks(ours))
    # The second call continues from the state after the first.
    for seed in (0, 1):
        histories = (
            training.train(ours, X, Y, seed=seed, **PLAN),
            with_all_weights(training.train, theirs, X, Y, seed=seed, **PLAN),
        )
        np.testing.assert_allclose(*map(losses, histories), rtol=1e-5)
        assert_same(ours, theirs)
    kinds = [type(layer) for layer in trained_smaller(ours).layers]
    assert kinds.count(kept_layers.KeptDense) == 3
    assert trained_smaller(theirs) is None


@pytest.mark.once
def test_epochs_report_the_same_and_show_callbacks_the_trained_model(capsys):
    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.1 / (1 + epoch)

        def on_epoch_end(self, epoch, logs=None):
            seen.append(float(self.model.loss(Y, self.model(X))))
            last = self.model.layers[-1]
            last.bias.assign(last.bias + 0.1)

    ours, theirs = make("adam"), make("adam")
    ml.set_masks(theirs, ml.get_masks(ours))
    seen: list[float] = []
    options = {"epochs": 2, "batch_size": 32, "validation_data": (X, Y), "callbacks": [Look()]}
    history = training.fit(ours, X, Y, verbose=2, **options).history
    printed = capsys.readouterr().out
    assert printed.count(" of 236 weights: the others have no gradients.\n") == 1
    np.testing.assert_allclose(seen, history["val_loss"], rtol=1e-5)
    expected = with_all_weights(training.fit, theirs, X, Y, **options).history
    assert history.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5)
    assert_same(ours, theirs)
    assert trained_smaller(ours) is not None


@pytest.mark.once
def test_masks_that_others_change_between_stretches_are_followed():
    def change(model):
        def halve(steps):
            masks = ml.get_masks(model)
            masks["first/kernel"][:, 6:] = False
            ml.set_masks(model, masks)

        return halve

    ours, theirs = make(), make()
    ml.set_masks(theirs, ml.get_masks(ours))
    plan = {"steps": 2, "batch_size": 64, "eval_every": 1}
    training.train(ours, X, Y, on_progress=change(ours), **plan)
    with_all_weights(training.train, theirs, X, Y, on_progress=change(theirs), **plan)
    assert_same(ours, theirs)


@pytest.mark.once
def test_the_model_has_what_was_trained_before_an_error(monkeypatch):
    def fail(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(late_training.Engine, "evaluate", fail)
    ours, theirs = make(), make()
    ml.set_masks(theirs, ml.get_masks(ours))
    before = state(ours)
    for train, model in ((training.train, ours), (with_all_weights, theirs)):
        arguments = (model, X, Y) if model is ours else (training.train, model, X, Y)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments, **PLAN)
    assert_same(ours, theirs)
    assert any((a != b).any() for a, b in zip(before, state(ours), strict=True))


@pytest.mark.once
@pytest.mark.slow
def test_a_search_finds_the_same_ticket_also_after_an_interruption(tmp_path):
    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    def search(**kwargs):
        model = make("adam")
        ml.set_masks(model, {p: np.ones(m.shape, bool) for p, m in ml.get_masks(model).items()})
        options = {"rounds": 1, "controls": (), "steps": 4, "batch_size": 16, "rate": 0.8}
        return find_ticket(model, X, Y, validation_data=(X, Y), seed=1, **options, **kwargs)

    dense = with_all_weights(search)
    with pytest.raises(KeyboardInterrupt):
        search(checkpoint=tmp_path, on_result=stop)
    resumed = search(checkpoint=tmp_path)
    for ours, theirs in zip(resumed.rows, dense.rows, strict=True):
        assert ours["sparsity"] == theirs["sparsity"]
        np.testing.assert_allclose(ours["validation_loss"], theirs["validation_loss"], rtol=1e-5)
    for ours, theirs in zip(resumed.masks, dense.masks, strict=True):
        assert_equal(ours.values(), theirs.values())
    assert_same(resumed.ticket, dense.ticket)
    assert trained_smaller(resumed.ticket) is not None


REFUSED = {
    "weight decay": lambda: make(keras.optimizers.AdamW()),
    "not known to leave pruned weights": lambda: make("ftrl"),
    r"moving averages \(use_ema\)": lambda: make(keras.optimizers.SGD(use_ema=True)),
    "gradients are accumulated": lambda: make(keras.optimizers.SGD(gradient_accumulation_steps=2)),
    "'dropout.*' .Dropout. is not known": lambda: make(hidden=[layers.Dropout(0.5)]),
    "BatchNormalization. is not known": lambda: make(hidden=[layers.BatchNormalization()]),
    "regularizer or constraint": lambda: make(kernel_regularizer="l2"),
    "no kept weight": lambda: without("second/kernel"),
    "'first' does not compute in float32": lambda: make(dtype="mixed_float16"),
    "rounded weights": lambda: rounded(make()),
    "rescaled mask": lambda: rescaled(make()),
    "pruned weights that are not zero": lambda: frozen(make()),
    "frozen variables": lambda: frozen_layer(make()),
    "inputs of 3 axes": lambda: compiled(keras.Sequential([keras.Input((4, 3)), layers.Dense(2)])),
    "not a chain": lambda: compiled(with_skip()),
    "not a chain.": lambda: compiled(with_named_output()),
    "compiled with loss_of_weights, which is not part of Keras": lambda: with_own_loss(),
    "compiled with partial, which": lambda: with_own_loss(functools.partial),
    "'sequential.*' has its own train_step": lambda: changed(make(), "train_step"),
    "compiled with <lambda>, which": lambda: changed(
        make(), "apply", lambda model: model.optimizer
    ),
    "not a function of Keras": lambda: compiled(
        keras.Sequential([keras.Input((4,)), layers.Dense(2, lambda x: ops.max(x) - x)])
    ),
    "epsilon=0": lambda: make(keras.optimizers.Adam(epsilon=0)),
    "run_eagerly": lambda: eager(make()),
    "no Dense layer with a mask": lambda: ml.strip_masks(make()),
}


def with_named_output():
    inputs = keras.Input((4,))
    return keras.Model(inputs, {"named": layers.Dense(2)(inputs)})


def with_own_loss(wrapper=lambda loss: loss):
    model = make()

    def loss_of_weights(y_true, y_pred):
        penalty = ops.sum(ops.square(model.get_layer("first").kernel))
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred) + penalty

    model.compile("sgd", wrapper(loss_of_weights))
    return model


def changed(model, name, owner=lambda model: model):
    method = getattr(owner(model), name)
    setattr(owner(model), name, lambda *args, **kwargs: method(*args, **kwargs))
    return model


def eager(model):
    model.run_eagerly = True
    return model


def compiled(model, **kwargs):
    model = ml.convert_to_masked(model, **kwargs)
    masks = {path: RNG.random(mask.shape) < 0.5 for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    model.compile("sgd", "mse", jit_compile=keras.backend.backend() == "jax")
    return model


def with_skip():
    inputs = keras.Input((4,))
    hidden = layers.Dense(4)(layers.Dense(4)(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.Add()([inputs, hidden])))


def without(path):
    model = make()
    ml.set_masks(model, {path: np.zeros((10, 8), bool)})
    return model


def rescaled(model):
    ml.set_rescale(model, True)
    return model


def rounded(model):
    return ml.convert_to_masked(model, quantize="int8")


def frozen(model):
    pruner = LotteryTicketPruner(model)
    pruner.treat(pruned="freeze")
    return model


def frozen_layer(model):
    model.get_layer("first").trainable = False
    model.compile("sgd", model.loss)
    return model


@pytest.mark.once
@pytest.mark.parametrize("reason", REFUSED)
def test_other_trainings_keep_all_weights_and_say_why(reason, caplog):
    model = REFUSED[reason]()
    caplog.set_level("INFO", "lottery_ticket_pruner")
    trainee = late_training.Trainee(model, 10, 10)
    assert not trainee.is_smaller
    (message,) = (record.getMessage() for record in caplog.records if "all" in record.message)
    assert re.search(reason, message)


@pytest.mark.once
def test_momenta_of_pruned_weights_are_not_lost():
    """Weights that are pruned while momenta move them go on moving."""
    model = make(keras.optimizers.SGD(0.1, momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    assert late_training.Trainee(model, 10, 10).is_smaller
    momentum = model.optimizer.variables[2]  # Of the first kernel.
    momentum.assign(np.ones(momentum.shape))
    trainee = late_training.Trainee(model, 10, 10)
    assert not trainee.is_smaller
    assert "momenta of pruned weights" in trainee.notes[0]


@pytest.mark.once
def test_short_trainings_keep_all_weights(monkeypatch):
    model = make()
    monkeypatch.setattr(training.settings, "least_savings", 5e10)
    assert not late_training.Trainee(model, 100, 100).is_smaller


def trained_alike(ours, theirs, x=X):
    ml.set_masks(theirs, ml.get_masks(ours))
    history = training.train(ours, x, Y, steps=2, batch_size=64)
    with_all_weights(training.train, theirs, x, Y, steps=2, batch_size=64)
    assert_same(ours, theirs)
    return history


@pytest.mark.once
def test_an_optimizer_that_was_changed_after_compiling_is_used_as_it_is():
    ours, theirs = make(), make()
    for model in (ours, theirs):
        model.optimizer.clipnorm = 0.01
    state_of_random = random.getstate()
    history = trained_alike(ours, theirs)
    # Layers made later would otherwise draw other seeds.
    assert random.getstate() == state_of_random
    (note,) = history.notes
    assert re.fullmatch(r"sequential.* is trained with \d+ of 236 weights: .*", note)
    for a, b in zip(ours.metrics_variables, theirs.metrics_variables, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-5)


@pytest.mark.once
def test_examples_with_nan_in_an_input_that_nothing_reads_still_make_the_loss_nan():
    x = X.copy()
    x[7, 1, 2] = np.nan  # The sixth input.
    model = make()
    assert np.isnan(numpy(model(x))[7]).all()
    training.train(model, x, Y, steps=1, batch_size=64)
    assert trained_smaller(model) is not None
    assert np.isnan(numpy(model.get_layer("last").bias)).all()


@pytest.mark.once
def test_integers_are_inputs():
    def model():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,), dtype="uint8")
        return compiled(keras.Model(inputs, layers.Dense(1)(inputs)))

    ours, theirs = model(), model()
    trained_alike(ours, theirs, np.arange(256, dtype="uint8").reshape(64, 4))
    assert trained_smaller(ours) is not None


@pytest.mark.once
def test_evaluations_store_no_table_of_products():
    model = make()
    layer = kept_weights.kept_kernels(model.layers, list(ml.get_masks(model).values()))[1]
    kept = kept_layers.KeptDense(layer, kept_products.Gathered())
    x = ops.ones((3, len(layer.inputs)))
    kept(x, training=False)  # Builds it.
    kept.kernel.assign(np.arange(layer.size))
    expected = np.zeros(layer.mask.shape)
    expected.T[layer.mask.T] = np.arange(layer.size)
    kept._product = pytest.fail
    outputs = kept(x, training=False)
    np.testing.assert_allclose(numpy(outputs), numpy(x) @ expected, rtol=1e-6)


@pytest.mark.once
def test_listeners_that_end_a_training_see_the_model_once_after_each_stretch(monkeypatch):
    calls = []
    for name in ("read", "write"):
        method = getattr(late_training._SmallerModel, name)

        def counted(self, name=name, method=method):
            calls.append(name)
            method(self)

        monkeypatch.setattr(late_training._SmallerModel, name, counted)
    ours, theirs = make("adam"), make("adam")
    ml.set_masks(theirs, ml.get_masks(ours))
    data = training.ArrayDataset.of(X, Y)
    plan = training.TrainingPlan(steps=4, batch_size=64, eval_every=1)
    done: list[int] = []
    listeners = training.Listeners(on_progress=done.append, ends=lambda steps: steps == 2)
    training.train_by_plan(ours, data, plan, listeners=listeners)
    assert done == [1, 1]
    assert calls == ["read", "write", "read", "write"]
    with_all_weights(training.train_by_plan, theirs, data, plan, listeners=listeners)
    assert_same(ours, theirs)


@pytest.mark.once
def test_an_unexpected_error_is_a_warning_and_leaves_a_training_with_all_weights(
    monkeypatch, caplog
):
    def fail(*args):
        raise KeyError("a fault")

    monkeypatch.setattr(late_training, "_pairs", fail)
    ours, theirs = make(), make()
    trained_alike(ours, theirs)
    # TensorFlow warns of other tests' traces.
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    wanted = "all weights: a smaller model cannot be made: KeyError: 'a fault'"
    assert sum(wanted in warning for warning in warnings) == 1, warnings


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="products of PyTorch")
@pytest.mark.parametrize("batch", [1, 5])
def test_sparse_products_and_their_derivatives_are_those_of_a_matrix(batch):
    import torch

    mask = RNG.random((7, 6)) < 0.4
    mask[[0, 6]] = mask[:, [0, 3]] = False  # Inputs and units without kept weights.
    mask[2, 1] = True
    kept = kept_weights.KeptKernel(
        layers.Dense(6), inputs=np.arange(7), units=np.arange(6), mask=mask, first=False
    )
    values, upstream = (RNG.normal(size=(batch, size)).astype("float32") for size in (7, 6))
    matrix = np.where(mask, RNG.normal(size=mask.shape), 0).astype("float32")
    weights = torch.tensor(matrix[kept.index], requires_grad=True)
    normal = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        product = kept_products.Sparse().of(kept)
    finally:
        torch.set_default_dtype(normal)
    for needed in (True, False):
        x, weights.grad = torch.tensor(values, requires_grad=needed), None
        y = product(x, weights)
        y.backward(torch.tensor(upstream))
        np.testing.assert_allclose(numpy(y), values @ matrix, rtol=1e-5, atol=1e-6)
        expected = (values.T @ upstream)[kept.index]
        np.testing.assert_allclose(weights.grad.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert (x.grad is not None) == needed
        if needed:
            np.testing.assert_allclose(x.grad.numpy(), upstream @ matrix.T, rtol=1e-5, atol=1e-6)


@pytest.mark.once("jax")
def test_products_are_gathered_only_within_compiled_programs():
    model = make()
    assert kept_products.products_for(model, 1) is not None
    model.jit_compile = False
    assert kept_products.products_for(model, 1) is None
