"""Learned supermasks: train the masks over weights that stay as they were drawn."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import training, treatments
from lottery_ticket_pruner.training import Augmentation, Examples, Listeners, TrainingPlan
from masked_layers import copying, learned, randomness

WEIGHTS = ("initial", "signed_constant")


@dataclasses.dataclass(frozen=True)
class LearnedSupermask:
    """A learned supermask and what it knows.

    Attributes:
        model: the model with learned masks, as training left it.
        supermask: the same masks as binary ones (`masked_layers.harden`), not sampled; compiled as
            the model that was given.
        samples: test metrics by name, and `sparsity`: an array with a value for each sampled mask;
            for masks without chance one value. Empty without test data.
        deterministic: test metrics of `supermask` by name. Empty without test data.
        history: what the training saw.
    """

    model: keras.Model
    supermask: keras.Model
    samples: dict[str, np.ndarray]
    deterministic: dict[str, float]
    history: training.History


def learn_supermask(
    model: keras.Model,
    x: training.Arrays,
    y: training.Arrays,
    *,
    steps: int,
    mask: Any = "bernoulli",
    weights: str = "initial",
    optimizer: keras.Optimizer | None = None,
    batch_size: int = 250,
    samples: int = 10,
    test_data: tuple[training.Arrays, training.Arrays] | None = None,
    validation_data: tuple[training.Arrays, training.Arrays] | None = None,
    eval_every: int | None = None,
    seed: int = 0,
    augment: Augmentation | None = None,
    deterministic: bool = False,
    on_progress: Callable[[int], object] | None = None,
) -> LearnedSupermask:
    """Learns which of a model's weights to keep; all weights stay as they are.

    Those of layers without masks, too, such as the scales and offsets of normalization; their
    statistics follow the data as in any training.

    Under an `EdgePopupMask` of sparsity s the kernels are multiplied by 1 / sqrt(1 - s) first, as
    Ramanujan et al. scale theirs (arXiv 1911.13299, section 3).

    Args:
        model: compiled and plain; left untouched.
        x: training inputs in memory: an array, or a list or dict of them.
        y: training targets, likewise.
        steps: optimiser steps.
        mask: what `masked_layers.convert_to_masked` takes; a name stands for a mask with this
            function's seed.
        weights: `"initial"`, those that the model has; or `"signed_constant"`: sign(w) times the
            standard deviation of w, per kernel. Ramanujan et al.'s are Kaiming-normal, or signed
            constants of that deviation: for theirs, initialize with `he_normal`.
        optimizer: by default the papers': SGD with momentum 0.9, for Bernoulli masks with learning
            rate 100 (Zhou et al., arXiv 1905.01067, section 5), otherwise 0.1, decayed to 0 by a
            cosine.
        batch_size: examples per step.
        samples: how many masks to sample for the test.
        test_data: `(x, y)` for the metrics, None: not measured.
        validation_data: `(x, y)` for `history`, None: not measured.
        eval_every: steps between evaluations on the validation data; None: at the end only.
        seed: of the order of the examples and of the samples in the test; of a mask given by name.
        augment: as for `training.train`.
        deterministic: as for `training.train`.
        on_progress: called with the number of new steps done.

    Raises:
        ValueError: the model is not compiled or is masked already, or an argument is wrong.
    """
    plan = LearningPlan(
        training=TrainingPlan(
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            eval_every=eval_every,
            augment=augment,
            deterministic=deterministic,
        ),
        mask=mask,
        weights=weights,
        optimizer=optimizer,
        samples=samples,
    )
    listeners = Listeners(on_progress=on_progress)
    return learn_by_plan(model, x, y, plan, test_data, validation_data, listeners)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningPlan:
    """How to learn a supermask: arguments of `learn_supermask`.

    Raises:
        ValueError: If a name is unknown, a number out of its range, or the mask is not learned.
    """

    training: TrainingPlan
    mask: Any = "bernoulli"
    weights: str = "initial"
    optimizer: keras.Optimizer | None = None
    samples: int = 10

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(
                f"`weights` must be one of {WEIGHTS}. Received: weights={self.weights!r}"
            )
        _check_samples(self.samples)
        if not self.prototype.learned:
            raise ValueError(f"`mask` must be a learned one. Received: mask={self.mask!r}")

    @functools.cached_property
    def prototype(self) -> ml.LearnedMask:
        """The mask that those of all weights are made after."""
        prototype = learned.get(self.mask)
        if isinstance(self.mask, str):
            prototype.seed = self.training.seed
        return prototype


def learn_by_plan(
    model: keras.Model,
    x: training.Arrays,
    y: training.Arrays,
    plan: LearningPlan,
    test_data: tuple[training.Arrays, training.Arrays] | None = None,
    validation_data: tuple[training.Arrays, training.Arrays] | None = None,
    listeners: Listeners | None = None,
) -> LearnedSupermask:
    """Does what `learn_supermask` does, with its arguments as a plan.

    Args:
        model: As in `learn_supermask`.
        x: As in `learn_supermask`.
        y: As in `learn_supermask`.
        plan: How.
        test_data: As in `learn_supermask`.
        validation_data: As in `learn_supermask`.
        listeners: Who is told of the training.

    Raises:
        ValueError: As in `learn_supermask`.
    """
    if not getattr(model, "compiled", False):
        raise ValueError(f"{model.name} is not compiled: call compile() before learn_supermask().")
    examples = Examples.of(x, y, None, plan.training.augment)
    validation = training.held_out(model, examples, "validation_data", validation_data)
    training.held_out(model, examples, "test_data", test_data)
    own_optimizer = model.optimizer
    model = ml.convert_to_masked(model, mask=plan.prototype)
    others = _withhold_weights(model, plan)
    optimizer = plan.optimizer or _optimizer(plan.prototype, plan.training.steps)
    copying.compile_with(model, optimizer)
    history = training.train_by_plan(model, examples, plan.training, validation, listeners)
    supermask, sampled, results = ml.harden(model), {}, {}
    # Only learning froze them, and its rate is for scores.
    paths = {variable.path for variable in others}
    _set_trainable([v for v in supermask.variables if v.path in paths], True)
    copying.compile_with(supermask, own_optimizer)
    if test_data is not None:
        results = training.evaluate(supermask, *test_data)
        if isinstance(plan.prototype, ml.BernoulliMask):
            seed = cast(int, plan.training.seed)
            sampled = evaluate_sampled(model, *test_data, samples=plan.samples, seed=seed)
        else:
            measured = results | {"sparsity": ml.sparsity_report(supermask).sparsity}
            sampled = {name: np.array([value]) for name, value in measured.items()}
    return LearnedSupermask(model, supermask, sampled, results, history)


def _withhold_weights(model: keras.Model, plan: LearningPlan) -> list[keras.Variable]:
    """Gives masked weights the values of the plan, and leaves scores alone to be trained.

    Returns:
        The variables that were trainable until now.
    """
    scale = 1.0
    if isinstance(plan.prototype, ml.EdgePopupMask):
        scale = 1 / math.sqrt(1 - plan.prototype.sparsity)
    refs = ml.masked_refs(model)
    for ref in refs:
        values = keras.ops.convert_to_numpy(ref.variable)
        if plan.weights == "signed_constant":
            values = treatments.signed_constant(values)
        ref.variable.assign(values * np.asarray(scale, values.dtype))
    scores = {id(ref.mask.scores) for ref in refs}
    others = [variable for variable in model.trainable_variables if id(variable) not in scores]
    _set_trainable(others, False)
    return others


def _set_trainable(variables: Sequence[keras.Variable], trainable: bool) -> None:
    for variable in variables:
        variable.trainable = trainable


def evaluate_sampled(
    model: keras.Model,
    x: training.Arrays,
    y: training.Arrays,
    *,
    samples: int = 10,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Metrics of sampled masks, each over the whole data set: by name, a value for each mask.

    With them, as `sparsity`, the share of weights that each mask prunes. Of weights whose scores
    never get a gradient the samples keep about a half, while `harden` keeps all.

    The mean of the accuracies is Zhou et al.'s accuracy of a learned supermask; it is not the
    accuracy of an averaged prediction, nor that of a new mask for every batch. The model is left as
    it was.

    Args:
        model: compiled, with learned masks.
        x: inputs.
        y: targets.
        samples: how many masks, at least 1.
        seed: of the samples.

    Raises:
        ValueError: the model has no learned mask, or `samples` is less than 1.
    """
    _check_samples(samples)
    hardened = ml.harden(model)
    results = []
    for number in range(samples):
        drawn = randomness.integer("test samples", seed, number)
        ml.set_masks(hardened, ml.sample_masks(model, drawn))
        sparsity = ml.sparsity_report(hardened).sparsity
        results.append(training.evaluate(hardened, x, y) | {"sparsity": sparsity})
    return {name: np.array([result[name] for result in results]) for name in results[0]}


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1. Received: samples={samples}")


def _optimizer(mask: ml.LearnedMask, steps: int) -> keras.Optimizer:
    if isinstance(mask, ml.BernoulliMask):
        return keras.optimizers.SGD(100.0, momentum=0.9)
    rate = keras.optimizers.schedules.CosineDecay(0.1, max(steps, 1))
    return keras.optimizers.SGD(rate, momentum=0.9)
