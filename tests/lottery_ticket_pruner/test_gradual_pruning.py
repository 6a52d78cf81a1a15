"""Gradual pruning during training: exact zeros, regrowth, resumed and custom trainings."""

import keras
import numpy as np
import pytest
from keras import ops

import masked_layers as ml
from changing_masks import Watch, make_data, make_model, same_masks, zeros
from lottery_ticket_pruner import (
    GradualPruning,
    LotteryTicketPruner,
    mask_schedules,
    schedules,
    training,
)

BACKEND = keras.backend.backend()
RAMP = schedules.Polynomial(0.0, 0.9, begin_step=2, end_step=8, frequency=3)


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


def test_weights_and_masks_stay_on_the_device(monkeypatch):
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
    model, watch = make_model(keras.optimizers.Adam(0.01)), Watch()
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


@pytest.mark.parametrize(("accumulate", "scaled"), [(None, False), (2, True)])
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
