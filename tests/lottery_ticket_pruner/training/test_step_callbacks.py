"""Masks that change during `training.fit`: the same in compiled loops as in `fit`."""

import keras
import pytest

import changing_masks
import masked_layers as ml
from changing_masks import make_data, same_masks, zeros
from loops import assert_close, by_xla, everything, needs_loop
from lottery_ticket_pruner import (
    DynamicSparseTraining,
    GradualPruning,
    LotteryTicketPruner,
    schedules,
    training,
)
from lottery_ticket_pruner.training import engine
from masked_layers import randomness

BACKEND = keras.backend.backend()
EVERY_STEP = schedules.Polynomial(0.1, 0.9, begin_step=2, end_step=12, frequency=1)
DATA = make_data()


def make_model(*arguments):
    keras.utils.set_random_seed(0)
    return changing_masks.make_model(*arguments)


def gradual(pruner, **arguments):
    return GradualPruning(pruner, arguments.pop("schedule", EVERY_STEP), **arguments)


def rewiring(pruner, **arguments):
    pruner.update_masks("random", sparsity=0.5)
    return DynamicSparseTraining(pruner, 15, frequency=4, **arguments)


CASES = {
    "each layer": (gradual, {}),
    "global": (gradual, {"scope": "global"}),
    "regrowth": (gradual, {"regrowth": True}),
    "every third": (gradual, {"schedule": schedules.Constant(0.6, 1, None, 3)}),
    "another criterion": (gradual, {"strategy": "movement", "schedule": 0.4}),
    "SET": (rewiring, {"growth": "random"}),
    "RigL": (rewiring, {"growth": "gradient", "data": DATA}),
}


@pytest.fixture
def loop_calls(monkeypatch):
    """The number of steps and the changes of every call of a compiled loop."""
    calls = []

    def watched(loops):
        real = loops.train

        def train(self, data, batches, kind, changes=None):
            first = real(self, data, batches, kind, changes)
            calls.append((len(batches), changes is not None))
            return first

        return train

    for loops in engine.COMPILED_LOOPS.values():
        monkeypatch.setattr(loops, "train", watched(loops))
    return calls


def trained(case, epochs=3):
    model = make_model()
    make, arguments = CASES[case]
    callback = make(LotteryTicketPruner(model), **dict(arguments))
    fit = {"batch_size": 12, "epochs": epochs, "callbacks": [callback], "deterministic": True}
    return model, training.fit(model, *DATA, **fit).history, callback


@pytest.mark.parametrize("case", CASES)
def test_the_engine_changes_masks_as_fit_does(case, loop_calls, monkeypatch):
    ours, history, callback = trained(case)
    changed_in_loop = any(changes for _, changes in loop_calls)
    monkeypatch.setattr(engine.Engine, "has_loops", lambda *args: False)
    calls = len(loop_calls)
    theirs, expected, _ = trained(case)
    assert len(loop_calls) == calls
    assert same_masks(ml.get_masks(ours), ml.get_masks(theirs))
    assert_close(everything(ours), everything(theirs))
    assert history["sparsity"] == expected["sparsity"]
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert callback.step == 15
    if BACKEND != "torch":
        assert sum(steps for steps, _ in loop_calls) == 15
        assert changed_in_loop == (case not in ("another criterion", "SET", "RigL"))


@pytest.mark.skipif(BACKEND != "jax", reason="JAX may have 64 bits by default")
def test_masks_change_in_the_loop_where_jax_has_64_bits(loop_calls):
    import jax
    import jax.experimental

    # Its earlier name, first.
    enable = getattr(jax.experimental, "enable_x64", None) or jax.enable_x64
    with enable(True):
        model, _, _ = trained("each layer")
    assert all(changes for _, changes in loop_calls)
    assert zeros(model) == [int(0.9 * size + 1e-6) for size in (128, 32)]


@needs_loop
def test_masks_change_in_one_call_of_the_loop_for_each_epoch(loop_calls):
    model, _, _ = trained("each layer")
    assert loop_calls == [(1, True), (4, True), (5, True), (5, True)]
    assert zeros(model) == [int(0.9 * size + 1e-6) for size in (128, 32)]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_masks_change_in_loops_compiled_by_xla(monkeypatch, loop_calls):
    expected, _, _ = trained("each layer")
    by_xla(monkeypatch)
    model, _, _ = trained("each layer")
    assert same_masks(ml.get_masks(expected), ml.get_masks(model))
    assert_close(everything(expected), everything(model))
    assert engine.engine_of(model)._refused_changes == set()


def test_a_training_in_two_parts_continues_the_schedule():
    whole, _, _ = trained("each layer", epochs=2)
    model = make_model()
    pruner = LotteryTicketPruner(model)
    order = [randomness.stream("order of examples", 0, epoch).permutation(60) for epoch in range(2)]
    for rows in order:
        part = {"batch_size": 12, "shuffle": False, "callbacks": [gradual(pruner)]}
        training.fit(model, *(array[rows] for array in DATA), **part)
    assert same_masks(ml.get_masks(whole), ml.get_masks(model))


@needs_loop
def test_a_loop_that_cannot_change_masks_is_left_for_the_changes(monkeypatch, caplog, loop_calls):
    expected, _, _ = trained("global")
    real = engine.COMPILED_LOOPS[BACKEND].train

    def refuse(self, data, batches, kind, changes=None):
        if changes is not None:
            raise NotImplementedError("no such operation")
        return real(self, data, batches, kind)

    monkeypatch.setattr(engine.COMPILED_LOOPS[BACKEND], "train", refuse)
    del loop_calls[:]
    model, _, callback = trained("global")
    assert caplog.text.count("The compiled loop cannot change masks: NotImplementedError") == 1
    assert same_masks(ml.get_masks(expected), ml.get_masks(model))
    assert_close(everything(expected), everything(model))
    assert callback.step == sum(steps for steps, _ in loop_calls) == 15


def test_weights_that_diverge_in_the_loop_are_named():
    model = make_model(keras.optimizers.SGD(1e30))
    pruning = gradual(LotteryTicketPruner(model), schedule=schedules.Constant(0.5, 1, None, 1))
    with pytest.raises(ValueError, match=r"weights of \['dense/kernel'\].*NaN or infinity"):
        training.fit(model, *DATA, batch_size=12, epochs=3, callbacks=[pruning])


def test_weights_that_are_not_finite_at_first_are_not_trained_on_twice(caplog):
    # The optimizer counts only every fourth batch as an iteration.
    model = make_model(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    ref = ml.masked_refs(model)[0]
    ref.variable.assign(float("nan") * keras.ops.convert_to_tensor(ref.variable.value))
    pruning = gradual(LotteryTicketPruner(model), schedule=schedules.Constant(0.5, 1, None, 1))
    with pytest.raises(ValueError, match=r"weights of \['dense/kernel'\].*NaN or infinity"):
        training.fit(model, *DATA, batch_size=12, callbacks=[pruning])
    assert pruning.step == 1
    assert "cannot change masks" not in caplog.text


def test_masks_emptied_in_the_loop_are_named_with_the_step():
    model = make_model()
    ref = ml.masked_refs(model)[1]
    ref.variable.assign(1e-6 * keras.ops.convert_to_tensor(ref.variable.value))
    model.optimizer.learning_rate.assign(0.0)
    pruning = gradual(
        LotteryTicketPruner(model), scope="global", schedule=schedules.Constant(0.5, 3, None, 1)
    )
    with pytest.warns(UserWarning, match=r"Nothing is left.*dense_1/kernel.* at step 3") as caught:
        training.fit(model, *DATA, batch_size=12, epochs=2, callbacks=[pruning])
    assert len([w for w in caught if "Nothing is left" in str(w.message)]) == 1


def test_with_other_callbacks_of_batches_masks_change_in_fit(loop_calls):
    model = make_model()
    nothing = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    callbacks = [gradual(LotteryTicketPruner(model)), nothing]
    training.fit(model, *DATA, batch_size=12, epochs=3, callbacks=callbacks)
    expected, _, _ = trained("each layer")
    assert same_masks(ml.get_masks(expected), ml.get_masks(model))


def test_two_step_callbacks_act_one_after_the_other(loop_calls):
    def both():
        model = make_model()
        pruner = LotteryTicketPruner(model)
        ramp = schedules.Polynomial(0.1, 0.4, begin_step=1, end_step=10, frequency=3)
        move = DynamicSparseTraining(pruner, 15, "random", frequency=4)
        callbacks = [GradualPruning(pruner, ramp), move]
        training.fit(model, *DATA, batch_size=12, epochs=3, callbacks=callbacks)
        return model

    ours = both()
    assert not any(changes for _, changes in loop_calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "has_loops", lambda *args: False)
        theirs = both()
    assert same_masks(ml.get_masks(ours), ml.get_masks(theirs))
