"""Stretches of training in a search: their random numbers, and an error if they diverge."""

import dataclasses
from typing import Any

import keras

from lottery_ticket_pruner import arms, divergence, training
from lottery_ticket_pruner.checks import is_integer
from lottery_ticket_pruner.training import ArrayDataset, TrainingPlan
from masked_layers import randomness


def train_stretch(
    model: keras.Model,
    examples: ArrayDataset,
    plan: TrainingPlan,
    stretch: tuple[str, int, str],
    validation: ArrayDataset | None,
    listeners: training.Listeners | None,
) -> training.History:
    """Trains a stretch of a search, which is identified by its arm, its round and its stage.

    It ends with an error as soon as an evaluation or the end of a part finds that it diverged.

    All random numbers in it depend only on these and on the plan's seed.

    Args:
        model: A compiled model.
        examples: Examples to train on.
        plan: The training plan. Its seed is an integer.
        stretch: Arm, round and stage.
        validation: Examples to evaluate on, or None.
        listeners: Functions to call during the training, or None.

    Raises:
        DivergenceError: If weights or the validation loss become NaN or infinite.
        ValueError: If the seed is not an integer.
    """
    if not is_integer(plan.seed):
        raise ValueError(f"The seed of a search must be an integer. Received: {plan.seed!r}")
    parts = (plan.seed, *stretch)
    arms.restart_randomness(model, parts)
    watched = _watched(model, plan, stretch, listeners or training.Listeners())
    plan = dataclasses.replace(plan, seed=randomness.words(*parts))
    return training.train_by_plan(model, examples, plan, validation, watched)


def _watched(
    model: keras.Model,
    plan: TrainingPlan,
    stretch: tuple[str, int, str],
    listeners: training.Listeners,
) -> training.Listeners:
    """Returns listeners that also raise an error when the training has diverged."""
    arm, number, _ = stretch
    done = 0

    def where(steps: int) -> str:
        return f"in round {number} ({arm}, seed {plan.seed}), after {steps} of {plan.steps} steps"

    def on_progress(steps: int) -> None:
        nonlocal done
        done += steps
        divergence.check_weights(model, where(done))
        if listeners.on_progress is not None:
            listeners.on_progress(steps)

    def on_evaluation(step: int, results: dict[str, Any]) -> None:
        divergence.check_loss(model, results["loss"], where(step))
        if listeners.on_evaluation is not None:
            listeners.on_evaluation(step, results)

    return dataclasses.replace(listeners, on_progress=on_progress, on_evaluation=on_evaluation)
