"""Trainings that diverge end with an error that says where and when."""

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import divergence, find_ticket, prune, stretches
from lottery_ticket_pruner.divergence import DivergenceError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def compiled(learning_rate=0.1, **options):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(2)]
    )
    optimizer = keras.optimizers.SGD(learning_rate, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def test_weights_that_count_must_be_finite_and_others_need_not_be():
    model = ml.convert_to_masked(compiled())
    refs = ml.masked_refs(model)
    mask = np.ones(refs[0].variable.shape, bool)
    mask[0, 0] = False
    ml.set_masks(model, {refs[0].path: mask})
    for value in (np.nan, np.inf):
        weights = np.ones(mask.shape, "float32")
        weights[0, 0] = value
        refs[0].variable.assign(weights)
        divergence.check_weights(model, "nowhere")  # It is pruned.
        weights[1, 1] = value
        refs[0].variable.assign(weights)
        with pytest.raises(
            DivergenceError, match=rf"diverged at home: .*infinite: {refs[0].path}\."
        ):
            divergence.check_weights(model, "at home")
    refs[0].variable.assign(np.ones(mask.shape))
    model.layers[-1].bias.assign([np.nan, 0.0])
    with pytest.raises(DivergenceError, match="bias"):
        divergence.check_weights(model, "")
    model.layers[-1].bias.assign([0.0, 0.0])
    divergence.check_loss(model, np.inf, "")
    with pytest.raises(DivergenceError, match="loss is NaN, although all weights are finite"):
        divergence.check_loss(model, np.nan, "")


def test_scores_of_learned_masks_must_be_finite():
    model = ml.convert_to_masked(compiled(), mask=ml.EdgePopupMask(seed=0))
    scores = ml.masked_refs(model)[0].mask.scores
    divergence.check_weights(model, "")
    scores.assign(np.full(scores.shape, np.nan))
    with pytest.raises(DivergenceError, match="scores"):
        divergence.check_weights(model, "")


def test_half_precision_is_checked_without_overflow():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="float16")])
    model.layers[0].kernel.assign(np.full((4, 3), 6e4))
    divergence.check_weights(model, "")
    model.layers[0].bias.assign([np.inf, 0, 0])
    with pytest.raises(DivergenceError):
        divergence.check_weights(model, "")


def test_a_search_ends_where_its_training_diverges(tmp_path):
    rows = []
    with pytest.raises(DivergenceError, match=r"in round 0 \(dense, seed 3\), after 2 of 8 steps"):
        find_ticket(
            compiled(1e20),
            X,
            Y,
            validation_data=(X, Y),
            rounds=1,
            rate=0.5,
            steps=8,
            batch_size=12,
            eval_every=2,
            seed=3,
            controls=(),
            on_result=rows.append,
        )
    assert not rows


def test_pruning_to_a_tolerance_ends_where_its_training_diverges():
    with pytest.raises(DivergenceError, match=r"\(dense, seed 0\), after \d+ of 3 steps"):
        prune(compiled(1e20), (X, Y), max_drop=0.5, epochs=1, batch_size=36)


def test_a_later_round_is_named(monkeypatch):
    train = stretches.training.train_by_plan

    def poisoned(model, examples, plan, validation, listeners):
        if ml.sparsity_report(model).sparsity:
            ml.masked_refs(model)[0].variable.assign(np.full((4, 5), np.nan))
        return train(model, examples, plan, validation, listeners)

    monkeypatch.setattr(stretches.training, "train_by_plan", poisoned)
    with pytest.raises(DivergenceError, match=r"in round 1 \(ticket, seed 0\), after 2 of 2 steps"):
        find_ticket(compiled(), X, Y, rounds=1, rate=0.5, steps=2, batch_size=12, controls=())


def test_seeds_that_diverge_are_named_at_the_end():
    failures = divergence.SeedFailures()
    failures.check()
    done = []
    for seed in (5, 6, 7):
        with failures.seed(seed):
            if seed == 6:
                raise DivergenceError("It diverged.")
            done.append(seed)
    assert done == [5, 7]
    with pytest.raises(DivergenceError, match=r"^Seed 6: It diverged\. The results of all other"):
        failures.check()
    with pytest.raises(ValueError, match="else"), failures.seed(8):
        raise ValueError("else")
