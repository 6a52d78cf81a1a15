"""The pruner on masked models: records, updates, rewinding, supermasks, files."""

import json
import logging
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria
from lottery_ticket_pruner.variables import read

BACKEND = keras.backend.backend()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)).astype("float32")
    return x, (x[:, 0] > x[:, 1]).astype("int64")


def compiled(model, optimizer=None, **kwargs):
    model.compile(
        optimizer or keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **kwargs,
    )
    return model


def plain_model(seed=0):
    """A kernel, batch normalization, dropout and a head; biases that are not zero."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(10, "relu", bias_initializer="random_normal", name="hidden"),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
            layers.Dense(2, name="head"),
        ]
    )


def masked_model(optimizer=None, seed=0, **kwargs):
    return compiled(ml.convert_to_masked(plain_model(seed)), optimizer, **kwargs)


def everything(model):
    """The value of each variable of the model, its optimizer and its metrics."""
    variables = [*model.weights, *(ref.mask.value for ref in ml.masked_refs(model))]
    variables += [*model.optimizer.variables, *model.variables, *model.metrics_variables]
    return [read(variable) for variable in variables]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def moved():
    """A model that is not compiled and stands elsewhere than it began, as if it was trained."""
    model = ml.convert_to_masked(plain_model())
    pruner = LotteryTicketPruner(model)
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.normal(0, 0.1, w.shape) for w in model.get_weights()])
    pruner.set_pretrained_weights()
    return model, pruner


def trained(data, **kwargs):
    model = masked_model(**kwargs)
    pruner = LotteryTicketPruner(model)
    model.fit(*data, verbose=0)
    pruner.set_pretrained_weights()
    return model, pruner


# --- Records --------------------------------------------------------------------------------------


def test_records_are_read_only_copies_of_every_weight(data):
    model = masked_model()
    pruner = LotteryTicketPruner(model)
    before = model.get_weights()
    assert pruner.final_weights is None
    model.fit(*data, verbose=0)
    pruner.set_pretrained_weights()
    after = model.get_weights()
    model.fit(*data, verbose=0)
    assert_same(list(pruner.initial_weights.values()), before)
    assert_same(list(pruner.final_weights.values()), after)
    assert list(pruner.initial_weights) == [
        "hidden/kernel",
        "hidden/bias",
        "batch_normalization/gamma",
        "batch_normalization/beta",
        "batch_normalization/moving_mean",
        "batch_normalization/moving_variance",
        "head/kernel",
        "head/bias",
    ]
    with pytest.raises(TypeError):
        pruner.initial_weights["hidden/kernel"] = 0
    for array in (*pruner.initial_weights.values(), *pruner.final_weights.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_no_strategy_changes_a_record():
    model, pruner = moved()
    records = [array.copy() for array in pruner.initial_weights.values()]
    records += [array.copy() for array in pruner.final_weights.values()]
    raw = model.get_weights()
    for name in criteria.names():
        if criteria.get(name).evidence:  # see test_evidence
            continue
        pruner.reset_masks()
        with warnings.catch_warnings(action="ignore"):
            pruner.update_masks(name, rate=0.3)
        assert ml.sparsity_report(model).alive == 42 + 14
    with pytest.raises(ValueError, match="read-only"):
        pruner.update_masks(spoil, rate=0.3)
    now = [*pruner.initial_weights.values(), *pruner.final_weights.values()]
    assert_same(now, records)
    assert_same(model.get_weights(), raw)


def spoil(group):
    group.initial[:] = 0
    return group.initial


def test_a_model_with_nothing_to_prune_or_without_weights_is_an_error():
    nothing = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="no weight that can be pruned"):
        LotteryTicketPruner(nothing)
    with pytest.raises(ValueError, match="Build it first"):
        LotteryTicketPruner(keras.Sequential([layers.Dense(2)]))


def test_a_layer_that_cannot_be_pruned_is_left_as_it_is():
    @keras.saving.register_keras_serializable("test_pruner")
    class Shift(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[-1], 3), name="table")

        def call(self, x):
            return x + ops.sum(self.table)

    model = keras.Sequential([keras.Input((6,)), Shift(name="shift"), layers.Dense(2)])
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    assert [key for key, *_ in pruner.iterate_prunables(model)] == ["dense/kernel"]
    assert "shift/table" in pruner.initial_weights


# --- Updates --------------------------------------------------------------------------------------


def test_update_masks_keeps_the_exact_count_of_the_largest():
    model, pruner = moved()
    raw = model.get_weights()
    report = pruner.update_masks("large_final", rate=0.2)
    assert (report.alive, report.size) == (48 + 16, 80)
    report = pruner.update_masks("large_init", sparsity=0.5)
    assert (report.alive, report.size) == (30 + 10, 80)
    assert_same(model.get_weights(), raw)

    pruner.reset_masks()
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", rate=0.5)
    for path, mask in ml.get_masks(model).items():
        final = np.abs(pruner.final_weights[path])
        assert final[mask].min() > final[~mask].max()


def test_rates_by_pattern_scopes_and_functions():
    model, pruner = moved()
    report = pruner.update_masks(rate={"head": 0.1, "default": 0.2})
    assert {row.path: row.alive for row in report} == {"hidden/kernel": 48, "head/kernel": 18}
    pruner.reset_masks()
    pruner.update_masks("smallest_weights_global", rate=0.4)
    masks = ml.get_masks(model)
    weights = {path: np.abs(array) for path, array in pruner.final_weights.items()}
    kept = np.concatenate([weights[path][mask] for path, mask in masks.items()])
    gone = np.concatenate([weights[path][~mask] for path, mask in masks.items()])
    assert len(gone) == 32
    assert kept.min() > gone.max()
    pruner.reset_masks()
    pruner.update_masks(lambda group: -group.initial, rate=0.5)
    for path, mask in ml.get_masks(model).items():
        initial = pruner.initial_weights[path]
        assert initial[mask].max() < initial[~mask].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "large_finale", "rate": 0.2}, "large_final"),
        ({"rate": 1.0}, r"\[0, 1\)"),
        ({"rate": -0.1}, r"\[0, 1\)"),
        ({}, "exactly one"),
        ({"rate": 0.1, "sparsity": 0.1}, "exactly one"),
        ({"rate": {"default": 0.1}, "scope": "global"}, "global"),
        ({"rate": 0.1, "scope": "model"}, "scope"),
        ({"rate": 0.1, "seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_errors_and_change_nothing(arguments, message):
    model, pruner = moved()
    with pytest.raises(ValueError, match=message):
        pruner.update_masks(**arguments)
    assert ml.sparsity_report(model).sparsity == 0


def test_a_missing_record_is_an_error():
    model = masked_model()
    with pytest.raises(ValueError, match="set_pretrained_weights"):
        LotteryTicketPruner(model).update_masks("large_final", rate=0.2)
    assert ml.sparsity_report(model).sparsity == 0


def test_a_rate_of_zero_is_a_no_op():
    model, pruner = moved()
    pruner.update_masks(rate=0.5)
    masks = ml.get_masks(model)
    pruner.set_pretrained_weights()
    pruner.update_masks(rate=0)
    assert_same(list(ml.get_masks(model).values()), list(masks.values()))


def test_update_masks_warns_of_final_weights_older_than_the_last_update():
    _, pruner = moved()
    with warnings.catch_warnings(action="error", category=UserWarning):
        pruner.update_masks(rate=0.2)
        pruner.update_masks("large_init", rate=0.2)
    with pytest.warns(UserWarning, match="set_pretrained_weights"):
        pruner.update_masks(rate=0.2)
    pruner.set_pretrained_weights()
    with warnings.catch_warnings(action="error", category=UserWarning):
        pruner.update_masks(rate=0.2)


def test_seeds_decide_random_scores():
    model = masked_model()
    pruner = LotteryTicketPruner(model)

    def masks(**kwargs):
        pruner.reset_masks()
        pruner.update_masks("random", rate=0.5, **kwargs)
        return np.concatenate([mask.ravel() for mask in ml.get_masks(model).values()])

    assert (masks() == masks()).all()
    assert (masks(seed=3) == masks(seed=3)).all()
    assert (masks(seed=3) != masks(seed=4)).any()


def test_resetting_the_masks_leaves_the_raw_weights():
    model, pruner = moved()
    raw = model.get_weights()
    for _ in range(2):
        pruner.update_masks("large_init", rate=0.9)
        assert ml.sparsity_report(model).alive == 6 + 2
        pruner.reset_masks()
        assert ml.sparsity_report(model).sparsity == 0
    assert_same(model.get_weights(), raw)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(0.01),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    ],
)
def test_effective_weights_under_the_mask_are_zero_after_100_steps(optimizer, data):
    x, y = data
    model = masked_model(optimizer())
    pruner = LotteryTicketPruner(model)
    model.fit(x, y, batch_size=8, verbose=0)
    pruner.set_pretrained_weights()
    pruner.update_masks(rate=0.7)
    model.fit(x, y, batch_size=8, epochs=10, verbose=0)
    largest = 0.0
    for ref in ml.masked_refs(model):
        effective = ops.convert_to_numpy(getattr(ref.layer, ref.name))
        pruned = ~ops.convert_to_numpy(ref.mask.value)
        assert pruned.sum() >= 14
        largest = max(largest, np.abs(effective[pruned]).max())
    assert largest == 0.0


def test_masks_updated_inside_fit_take_effect(data):
    model, pruner = trained(data)
    x, y = data

    class PruneAtBatch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                pruner.set_pretrained_weights()
                pruner.update_masks(rate=0.5)

    model.fit(x, y, batch_size=16, verbose=0, callbacks=[PruneAtBatch()])
    assert ml.sparsity_report(model).alive == 30 + 10
    stripped = ml.strip_masks(model)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), stripped.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


# --- Rewinding ------------------------------------------------------------------------------------


def test_rewinding_brings_everything_back_but_the_masks(data):
    model, pruner = trained(data)
    initial = list(pruner.initial_weights.values())
    pruner.update_masks(rate=0.5)
    masks = list(ml.get_masks(model).values())
    pruner.rewind()
    assert_same(model.get_weights(), initial)
    assert_same(list(ml.get_masks(model).values()), masks)
    model.fit(*data, verbose=0)  # JAX gives the buffers of the weights away here
    pruner.rewind()
    assert_same(model.get_weights(), initial)
    assert_same(list(pruner.initial_weights.values()), initial)


class AverageStart(keras.optimizers.SGD):
    """Slots that start as copies of the weights."""

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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_rewinding_repeats_the_first_training(name, data):
    x, y = data
    model = masked_model(OPTIMIZERS[name]())
    model.layers[2].rate = 0.0  # what dropout drops is not rewound
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
    # One that a later `compile` sets is meant.
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
    predictions = model.predict(x, verbose=0)
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
    np.testing.assert_array_equal(model.predict(x, verbose=0), predictions)
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


def test_evaluate_supermask_refuses_what_makes_no_sense(data):
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
    model.predict(x, verbose=0)
    for rate, factor in ((0.5, 2), (0.5, 4)):
        pruner.update_masks("large_init", rate=rate)
        pruner.apply_dwr(model)
        pruner.apply_dwr(model)
        plain = plain_model()
        values = dict(zip(pruner.initial_weights, raw, strict=True))
        for path, mask in ml.get_masks(model).items():
            values[path] = np.where(mask, factor * values[path], 0)
        plain.set_weights(list(values.values()))
        expected = plain.predict(x, verbose=0)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    assert_same(model.get_weights(), raw)


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [lambda model: model, ml.convert_to_masked])
def test_a_loaded_pruner_continues_like_the_saved_one(convert, tmp_path, data):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    model = compiled(convert(plain_model()), keras.optimizers.SGD(schedule))
    model.fit(*data, batch_size=20, verbose=0)
    pruner = LotteryTicketPruner(model)
    model.fit(*data, verbose=0)
    pruner.set_pretrained_weights()
    pruner.calc_prune_mask(model, 0.5, "large_final")
    pruner.save(tmp_path / "pruner")
    assert [path.name for path in tmp_path.iterdir()] == ["pruner"]

    other = compiled(convert(plain_model(seed=1)), keras.optimizers.SGD(schedule))
    loaded = LotteryTicketPruner.load(tmp_path / "pruner", other)
    for name in ("initial_weights", "final_weights"):
        ours, theirs = getattr(loaded, name), getattr(pruner, name)
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
        assert not any(array.flags.writeable for array in ours.values())
    for each, held in ((pruner, model), (loaded, other)):
        each.calc_prune_mask(held, 0.3, "random")
    rows = zip(pruner.iterate_prunables(model), loaded.iterate_prunables(other), strict=True)
    for ours, theirs in rows:
        np.testing.assert_array_equal(ours[-1], theirs[-1])
    if convert is ml.convert_to_masked:
        with pytest.warns(UserWarning, match="set_pretrained_weights"):
            loaded.update_masks(rate=0.1)
        loaded.rewind()
        assert_same(other.get_weights(), list(pruner.initial_weights.values()))
        assert int(ops.convert_to_numpy(other.optimizer.iterations)) == 4


@pytest.mark.parametrize("pruned", ["freeze", "zero"])
def test_a_loaded_pruner_brings_what_pruned_weights_are_frozen_at(pruned, tmp_path, data):
    model, pruner = moved()
    pruner.update_masks(rate=0.5)
    pruner.treat(pruned=pruned)
    pruner.save(tmp_path / "pruner")
    other, another = moved()
    # What the model froze before does not outlive the loading.
    another.update_masks(rate=0.2)
    another.treat("constant", "freeze")
    other.predict(data[0], verbose=0)
    LotteryTicketPruner.load(tmp_path / "pruner", other)
    other.set_weights(model.get_weights())
    assert [ref.mask.frozen is None for ref in ml.masked_refs(other)] == [pruned == "zero"] * 2
    outputs = model.predict(data[0], verbose=0)
    np.testing.assert_array_equal(other.predict(data[0], verbose=0), outputs)
    if pruned == "freeze":
        kernel = ops.convert_to_numpy(other.get_layer("hidden").kernel)
        np.testing.assert_array_equal(kernel, pruner.initial_weights["hidden/kernel"])


def test_rescaled_weights_are_known_after_loading(tmp_path):
    model = plain_model()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    pruner.apply_dwr(model)
    weights = model.get_weights()
    pruner.save(tmp_path / "pruner")
    LotteryTicketPruner.load(tmp_path / "pruner", model).apply_dwr(model)
    assert_same(model.get_weights(), weights)


def test_loading_checks_before_it_changes_anything(tmp_path):
    model, pruner = moved()
    pruner.update_masks(rate=0.5)
    file = tmp_path / "pruner.npz"
    pruner.save(file)

    wider = keras.Sequential([keras.Input((6,)), layers.Dense(11, name="hidden")])
    with pytest.raises(ValueError, match=r"'hidden' with shape \(6, 10\).*\(6, 11\)"):
        LotteryTicketPruner.load(file, ml.convert_to_masked(wider))
    head = ml.convert_to_masked(plain_model(), include="head")
    with pytest.raises(ValueError, match="head/kernel"):
        LotteryTicketPruner.load(file, head)
    assert ml.sparsity_report(head).sparsity == 0

    (tmp_path / "text").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    np.savez(tmp_path / "newer.npz", state=np.array(json.dumps({"format": "?", "version": 2})))
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-100])
    for name in ("text", "other.npz", "newer.npz", "cut.npz"):
        with pytest.raises(ValueError, match="not a file"):
            LotteryTicketPruner.load(tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        LotteryTicketPruner.load(tmp_path / "nowhere", model)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    pruner = LotteryTicketPruner(plain_model())
    file = tmp_path / "pruner"
    pruner.save(file)
    content = file.read_bytes()

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        pruner.save(file)
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["pruner"]


# --- Around ---------------------------------------------------------------------------------------


def test_records_updates_and_rewinds_are_logged(caplog):
    with caplog.at_level(logging.INFO, "lottery_ticket_pruner"):
        _, pruner = moved()
        pruner.update_masks(rate=0.5)
        pruner.rewind()
        pruner.reset_masks()
    text = caplog.text
    for part in ("initial", "final", "large_final: 40 of 80", "Rewound 8 weights", "Reset"):
        assert part in text


def test_half_precision_weights():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), dtype="bfloat16")
    model = keras.Model(inputs, layers.Dense(4, dtype="bfloat16", name="half")(inputs))
    model = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)
    initial = pruner.initial_weights["half/kernel"]
    assert initial.dtype == "float32"
    model.set_weights([0 * weight for weight in model.get_weights()])
    pruner.update_masks("large_init", rate=0.5)
    pruner.rewind()
    kernel = ml.masked_refs(model)[0].variable
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(kernel, "float32")), initial)


def test_importing_brings_no_other_backend():  # what it costs: see test_packaging
    code = "import sys, lottery_ticket_pruner; print('tensorflow' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )  # in the environment of the tests: the same backend
    assert (run.stdout.strip() == "True") == (BACKEND == "tensorflow")
