"""Masks that change during training: gradual pruning and dynamic sparse training."""

import keras
import numpy as np
import pytest
from keras import ops

import masked_layers as ml
from lottery_ticket_pruner import (
    DynamicSparseTraining,
    GradualPruning,
    LotteryTicketPruner,
    mask_schedules,
    optimizers,
    schedules,
    training,
)
from lottery_ticket_pruner.evidence import gradients

BACKEND = keras.backend.backend()
RAMP = schedules.Polynomial(0.0, 0.9, begin_step=2, end_step=8, frequency=3)


def make_data(examples=60):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 8)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32")


def make_model(optimizer=None, **compile_arguments):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(2)]
    )
    model = ml.convert_to_masked(model)
    model.compile(
        optimizer or keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **compile_arguments,
    )
    return model


def raw(model):
    return {ref.path: ops.convert_to_numpy(ref.variable).copy() for ref in ml.masked_refs(model)}


def zeros(model):
    """Counts the zeros of effective weights, by layer."""
    return [
        int(np.count_nonzero(ops.convert_to_numpy(getattr(ref.layer, ref.name)) == 0))
        for ref in ml.masked_refs(model)
    ]


class Watch(keras.callbacks.Callback):
    """Records the masks before the first batch and at the end of every batch."""

    def on_train_begin(self, logs=None):
        self.zeros, self.masks = [zeros(self.model)], [ml.get_masks(self.model)]

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.zeros.append(zeros(self.model))
        self.masks.append(ml.get_masks(self.model))


def same_masks(one, other):
    return all((one[path] == other[path]).all() for path in one)


@pytest.mark.parametrize("regrowth", [False, True])
def test_zeros_are_exact_at_the_end_of_every_batch(regrowth):
    model, watch = make_model(), Watch()
    pruning = GradualPruning(LotteryTicketPruner(model), RAMP, regrowth=regrowth)
    history = model.fit(
        *make_data(), batch_size=12, epochs=2, verbose=0, callbacks=[pruning, watch]
    )
    sparsities = [RAMP(2 + (step - 2) // 3 * 3) if step >= 2 else 0 for step in range(9)]
    sparsities += [0.9, 0.9]
    expected = [[int(s * size + 1e-6) for size in (128, 32)] for s in sparsities]
    assert watch.zeros == expected
    assert history.history["sparsity"] == pytest.approx(
        [sum(expected[5]) / 160, sum(expected[10]) / 160]
    )
    nothing_came_back = all(
        not (later[path] & ~earlier[path]).any()
        for earlier, later in zip(watch.masks, watch.masks[1:], strict=False)
        for path in later
    )
    assert nothing_came_back or regrowth


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ranking_on_the_device_gives_the_masks_of_update_masks(scope):
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.2)
    start = ml.get_masks(model)
    GradualPruning(pruner, 0.6, scope=scope).advance(0)
    masks = ml.get_masks(model)
    ml.set_masks(model, start)
    pruner.update_masks("smallest_weights", sparsity=0.6, scope=scope)
    assert same_masks(masks, ml.get_masks(model))


def test_only_with_regrowth_do_raw_weights_come_back():
    model = make_model()
    pruner = LotteryTicketPruner(model)
    ref = ml.masked_refs(model)[0]
    weights = np.arange(1, 129, dtype="float32").reshape(8, 16)
    ref.variable.assign(weights)
    pruning = {back: GradualPruning(pruner, 0.5, regrowth=back) for back in (False, True)}
    pruning[False].advance(0)
    expected = weights > 64
    assert (ml.get_masks(model)[ref.path] == expected).all()
    weights[0, 0] = 1000  # as momentum might make it
    ref.variable.assign(weights)
    pruning[False].advance(100)
    assert (ml.get_masks(model)[ref.path] == expected).all()
    pruning[True].advance(100)
    expected[0, 0], expected[4, 0] = True, False  # 65 is the smallest now
    assert (ml.get_masks(model)[ref.path] == expected).all()


def test_no_weight_and_no_mask_goes_through_the_host(monkeypatch):
    model = make_model()
    pruning = GradualPruning(LotteryTicketPruner(model), 0.5)
    read = []
    monkeypatch.setattr(keras.Variable, "numpy", lambda self: pytest.fail(self.path))
    real = ops.convert_to_numpy
    monkeypatch.setattr(
        mask_schedules.ops, "convert_to_numpy", lambda x: read.append(real(x).size) or real(x)
    )
    assert pruning.advance(0)
    monkeypatch.undo()
    assert read == [2]  # only whether all values are finite, one flag per layer
    assert zeros(model) == [64, 16]


def test_a_sparser_model_stays_as_it_is():
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.8)
    before = ml.get_masks(model)
    for strategy in ("smallest_weights", "large_init"):
        GradualPruning(pruner, 0.5, strategy).advance(0)
        assert same_masks(before, ml.get_masks(model))


@pytest.mark.parametrize("regrowth", [False, True])
def test_other_criteria_rank_the_weights_of_the_moment(regrowth):
    model, watch = make_model(), Watch()
    pruner = LotteryTicketPruner(model)
    pruning = GradualPruning(
        pruner, schedules.Constant(0.5, 1, 4, 3), "movement", regrowth=regrowth
    )
    model.fit(*make_data(), batch_size=12, verbose=0, callbacks=[pruning, watch])
    assert watch.zeros == [[0, 0]] + 5 * [[64, 16]]
    path = next(iter(watch.masks[0]))
    moved = np.abs(pruner.final_weights[path] - pruner.initial_weights[path])
    kept = watch.masks[-1][path]
    if regrowth:  # new masks at step 4
        assert moved[kept].min() >= moved[~kept].max()
        assert not same_masks(watch.masks[1], watch.masks[4])
    else:
        assert same_masks(watch.masks[1], watch.masks[4])


@pytest.mark.parametrize("strategy", ["smallest_weights", "large_init"])
def test_a_sparser_layer_is_kept_and_the_others_are_pruned_further(strategy):
    model = make_model()
    pruner = LotteryTicketPruner(model)
    first, second = (ref.path for ref in ml.masked_refs(model))
    pruner.update_masks("random", sparsity={first: 0.25, second: 0.75})
    before = ml.get_masks(model)
    GradualPruning(pruner, 0.5, strategy).advance(0)
    after = ml.get_masks(model)
    assert after[first].sum() == 64
    assert (after[second] == before[second]).all()


def test_a_distribution_shares_the_sparsity_of_the_moment_out():
    model = make_model()
    GradualPruning(LotteryTicketPruner(model), 0.5, distribution="erk").advance(0)
    assert zeros(model) == [80, 0]


def test_a_failed_update_leaves_the_masks():
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.2)
    before = ml.get_masks(model)
    second = ml.masked_refs(model)[1]
    second.variable.assign(np.full((16, 2), np.nan, "float32"))
    prunings = [
        GradualPruning(pruner, 0.5),
        GradualPruning(pruner, 0.5, regrowth=True),
        GradualPruning(pruner, 0.5, "large_final", regrowth=True),
    ]
    for pruning in prunings:
        with pytest.raises(ValueError, match=second.path):
            pruning.advance(0)
        assert same_masks(before, ml.get_masks(model))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on torch")
def test_with_several_steps_per_execution_masks_change_after_the_execution():
    model, watch = make_model(steps_per_execution=4), Watch()
    schedule = schedules.Function(lambda step: step / 20, begin_step=1, frequency=5)
    pruning = GradualPruning(LotteryTicketPruner(model), schedule)
    # Five batches per epoch, in executions of four and of one.
    model.fit(*make_data(), batch_size=12, epochs=2, verbose=0, callbacks=[pruning, watch])
    at = {0: 0, 1: 1, 6: 6}
    expected = [[int(at[s] / 20 * size + 1e-6) for size in (128, 32)] for s in (0, 1, 1, 6, 6)]
    assert watch.zeros == expected
    assert pruning.step == 10


@pytest.mark.parametrize(("accumulate", "scaled"), [(None, False), (2, False), (2, True)])
def test_a_resumed_training_continues_with_the_schedule(accumulate, scaled):
    optimizer = keras.optimizers.SGD(0.01, gradient_accumulation_steps=accumulate)
    model = make_model(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)
    pruner = LotteryTicketPruner(model)
    for epochs, zero in ((1, 38), (2, 76)):  # 5 batches each
        schedule = schedules.Function(lambda step: 0.06 * step, frequency=5)
        pruning = GradualPruning(pruner, schedule)
        model.fit(*make_data(), batch_size=12, verbose=0, callbacks=[pruning])
        assert pruning.step == 5 * epochs
        assert zeros(model)[0] == zero


def test_a_custom_loop_advances_explicitly():
    model = make_model()
    pruning = GradualPruning(LotteryTicketPruner(model), RAMP)
    x, y = make_data(12)
    changed = []
    for _ in range(9):
        model.train_on_batch(x, y)
        changed.append(pruning.advance())
    assert [step for step, change in enumerate(changed, 1) if change] == [2, 5, 8]
    assert zeros(model) == [115, 28]
    assert not pruning.advance(0)
    pruning.step = 4
    assert pruning.advance()
    with pytest.raises(ValueError, match="steps=-1"):
        pruning.advance(-1)


def test_exact_step_training_advances_after_each_stretch():
    model = make_model()
    pruning = GradualPruning(LotteryTicketPruner(model), RAMP)
    seen = []

    def advance(steps):
        pruning.advance(steps)
        seen.append((pruning.step, zeros(model)[0]))

    training.train(model, *make_data(), steps=10, batch_size=12, eval_every=3, on_progress=advance)
    assert seen == [(3, 0), (6, int(128 * RAMP(5))), (9, 115), (10, 115)]


@pytest.mark.once
def test_pruners_that_cannot_change_masks_are_refused():
    plain = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="convert_to_masked"):
        GradualPruning(LotteryTicketPruner(plain), 0.5)
    with pytest.raises(TypeError, match=r"LotteryTicketPruner\(masked\)`. Received: <Sequential"):
        GradualPruning(make_model(), 0.5)
    pruner = LotteryTicketPruner(make_model())
    with pytest.raises(ValueError, match="pruner of a model other than"):
        make_model().fit(*make_data(), verbose=0, callbacks=[GradualPruning(pruner, 0.5)])
    with pytest.raises(ValueError, match=r"NOfM.*cannot follow a schedule"):
        GradualPruning(pruner, 0.5, structure="2:4")
    with pytest.raises(TypeError, match="structur"):
        GradualPruning(pruner, 0.5, structur="4x1")
    with pytest.raises(ValueError, match="scope"):
        GradualPruning(pruner, 0.5, "smallest_weights_global", scope="layer")


@pytest.mark.once
def test_older_final_weights_are_known_to_be_older():
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    GradualPruning(pruner, 0.5).advance(0)
    with pytest.warns(UserWarning, match="final weights were recorded before the last"):
        pruner.update_masks("large_final", sparsity=0.6)


# Dynamic sparse training.


def sparse_model(optimizer=None, **arguments):
    model = make_model(optimizer, **arguments)
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.75)
    return model, pruner


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_count_of_each_layer_never_changes(growth):
    model, pruner = sparse_model()
    data = make_data() if growth == "gradient" else None
    rewiring = DynamicSparseTraining(pruner, 20, growth, data=data, batch_size=16, frequency=2)
    watch = Watch()
    model.fit(*make_data(), batch_size=12, epochs=4, verbose=0, callbacks=[rewiring, watch])
    counts = [[int(mask.sum()) for mask in masks.values()] for masks in watch.masks]
    assert counts == 21 * [[32, 8]]
    changes = [
        step
        for step, (before, after) in enumerate(zip(watch.masks, watch.masks[1:], strict=False), 1)
        if not same_masks(before, after)
    ]
    assert set(changes) <= set(range(2, 15, 2))  # up to 75 % of the training
    assert {2, 4, 6} <= set(changes)
    assert not same_masks(watch.masks[0], watch.masks[-1])


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True, use_ema=True),
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "LossScale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(0.01)),
}
if hasattr(keras.optimizers, "MultiOptimizer"):
    OPTIMIZERS["Multi"] = lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1), {".*kernel": keras.optimizers.Adam()}
        )
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_grows_starts_from_zero_and_what_stays_stays(name):
    model, pruner = sparse_model(OPTIMIZERS[name]())
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    refs = ml.masked_refs(model)
    slots = {
        ref.path: [
            v
            for v in model.optimizer.variables
            if v.shape == ref.variable.shape and ref.variable.path.replace("/", "_") in v.path
        ]
        for ref in refs
    }
    for variables in slots.values():
        for variable in variables:
            variable.assign(rng.uniform(1, 2, variable.shape))
    rewiring = DynamicSparseTraining(pruner, 100, "random", frequency=10)
    masks, weights = ml.get_masks(model), raw(model)
    before = {path: [ops.convert_to_numpy(v).copy() for v in slots[path]] for path in slots}
    share = rewiring.moving_share(10)
    assert rewiring.advance(10)
    after, new = raw(model), ml.get_masks(model)
    for path, mask in masks.items():
        moved = int(share * mask.sum() + 1e-6)
        assert moved
        kept = mask & (np.abs(weights[path]) >= np.sort(np.abs(weights[path][mask]))[moved])
        assert (new[path] & kept).sum() == kept.sum() == mask.sum() - moved
        assert new[path].sum() == mask.sum()
        grown = new[path] & ~mask
        assert grown.any()
        assert (after[path][grown] == 0).all()
        assert (after[path][~grown] == weights[path][~grown]).all()
        expected = {"Adam": 4, "SGD": 2, "Adagrad": 1, "LossScale": 1, "Multi": 2}[name]
        assert len(slots[path]) == expected
        for slot, old in zip(slots[path], before[path], strict=True):
            value = ops.convert_to_numpy(slot)
            assert (value[grown] == 0).all()
            assert (value[~grown] == old[~grown]).all()


def test_slots_are_found_for_any_order_of_the_variables():
    variables = make_model().trainable_variables[::-1]
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(variables)
    found = optimizers.optimizer_slots(optimizer)
    for variable in variables:
        (slot,) = found[id(variable)]
        assert variable.path.replace("/", "_") in slot.path


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_a_kernel_without_pruned_weights_stays_as_it_is(growth):
    model = make_model()
    pruner = LotteryTicketPruner(model)
    sparse, dense = (ref.path for ref in ml.masked_refs(model))
    pruner.update_masks("random", sparsity={sparse: 0.75, dense: 0.0})
    before, masks = raw(model), ml.get_masks(model)
    data = make_data() if growth == "gradient" else None
    DynamicSparseTraining(pruner, 100, growth, data=data, frequency=10).advance(10)
    after, new = raw(model), ml.get_masks(model)
    assert new[dense].all()
    assert (after[dense] == before[dense]).all()
    assert (new[sparse] != masks[sparse]).any()


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model, pruner = sparse_model()
    x, y = make_data()
    masks, weights = ml.get_masks(model), raw(model)
    dense = gradients.loss_gradients(model, x, y)
    rewiring = DynamicSparseTraining(pruner, 100, data=(x, y), frequency=10, seed=1)
    rewiring.advance(10)
    new = ml.get_masks(model)
    for path, mask in masks.items():
        moved = int(rewiring.moving_share(10) * mask.sum() + 1e-6)
        kept = mask & (np.abs(weights[path]) >= np.sort(np.abs(weights[path][mask]))[moved])
        grown, size = new[path] & ~kept, np.abs(dense[path])
        assert grown.sum() == moved
        assert size[grown].min() >= size[~new[path]].max() * (1 - 1e-5)

    def again(seed):
        ml.set_masks(model, masks)
        model.set_weights([pruner.initial_weights[path] for path in pruner.initial_weights])
        part = DynamicSparseTraining(
            pruner, 100, data=(x, y), batch_size=16, frequency=10, seed=seed
        )
        part.advance(10)
        return ml.get_masks(model)

    one = again(1)
    assert same_masks(one, again(1))
    assert not same_masks(one, again(2))


@pytest.mark.once
def test_the_share_that_moves_falls_by_half_a_cosine():
    _, pruner = sparse_model()
    rewiring = DynamicSparseTraining(pruner, 400, "random", fraction=0.4)
    assert [rewiring.moving_share(s) for s in (0, 100, 150, 300, 400)] == pytest.approx(
        [0.4, 0.3, 0.2, 0, 0]
    )
    assert [s for s in range(401) if rewiring._due(s)] == [100, 200]


def test_a_resumed_training_does_not_rewire_twice_at_one_step():
    model, pruner = sparse_model()
    before, watch = ml.get_masks(model), Watch()
    for _ in range(2):  # 5 batches each
        rewiring = DynamicSparseTraining(pruner, 20, "random", frequency=5)
        model.fit(*make_data(), batch_size=12, verbose=0, callbacks=[rewiring, watch])
        changes = [not same_masks(one, before) for one in (watch.masks[0], watch.masks[-1])]
        assert changes == [False, True]
        before = watch.masks[-1]


def test_rewiring_in_exact_step_training():
    model, pruner = sparse_model()
    before = ml.get_masks(model)
    rewiring = DynamicSparseTraining(pruner, 20, "random", frequency=5)
    training.train(
        model,
        *make_data(),
        steps=20,
        batch_size=12,
        eval_every=5,
        on_progress=rewiring.advance,
    )
    after = ml.get_masks(model)
    assert rewiring.step == 20
    assert not same_masks(before, after)
    assert [mask.sum() for mask in after.values()] == [32, 8]


def test_weights_that_diverged_are_named():
    model, pruner = sparse_model()
    before = ml.get_masks(model)
    second = ml.masked_refs(model)[1]
    second.variable.assign(np.full((16, 2), np.inf, "float32"))
    with pytest.raises(ValueError, match=second.path):
        DynamicSparseTraining(pruner, 20, "random", frequency=5).advance(5)
    assert same_masks(before, ml.get_masks(model))


@pytest.mark.once
def test_a_dense_model_gets_a_warning_that_nothing_moves():
    model, pruner = sparse_model()
    ml.set_masks(model, {path: np.ones_like(mask) for path, mask in ml.get_masks(model).items()})
    with pytest.warns(UserWarning, match="moved nothing at step 5: .*no pruned weights"):
        DynamicSparseTraining(pruner, 20, "random", frequency=5).advance(5)
    assert all(mask.all() for mask in ml.get_masks(model).values())


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"growth": "magnitude"}, "`growth` must be"),
        ({}, "needs `data="),
        ({"growth": "random", "data": (1, 2)}, "takes no data"),
        ({"data": (np.zeros((3, 8)), np.zeros(2))}, "arrays of lengths"),
        ({"growth": "random", "fraction": 1.0}, "`fraction` must be"),
        ({"growth": "random", "until": 0}, "until=0"),
        ({"growth": "random", "frequency": 0}, "frequency=0"),
        ({"growth": "random", "frequency": 2.5}, "integers.*frequency=2.5"),
    ],
)
def test_wrong_arguments_of_rewiring_are_named(arguments, message):
    _, pruner = sparse_model()
    with pytest.raises(ValueError, match=message):
        DynamicSparseTraining(pruner, 100, **arguments)
