"""Learns supermasks: trains the masks of a model over fixed weights."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import finite_data, training, treatments
from lottery_ticket_pruner.checks import check_compiled
from lottery_ticket_pruner.training import ArrayDataset, Augmentation, Listeners, TrainingPlan
from masked_layers import copying, learned, randomness

WEIGHTS = ("initial", "signed_constant")


@dataclasses.dataclass(frozen=True)
class LearnedSupermask:
    """A learned supermask and its results.

    Attributes:
        model: The model with learned masks, as training left it.
        supermask: The same masks as binary masks (`masked_layers.harden`), not sampled. Compiled
            like the given model.
        samples: Test metrics by name, and `sparsity`: arrays with a value for each sampled mask, or
            a single value for deterministic masks. Empty without test data.
        deterministic: Test metrics of `supermask` by name. Empty without test data.
        history: History of the training.
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
    """Learns which weights of a model to keep, while all weights stay fixed.

    This includes weights of layers without masks, such as scales and offsets of normalization.
    Their statistics are updated as in any training.

    For an `EdgePopupMask` of sparsity s, the kernels are first multiplied by 1 / sqrt(1 - s), as in
    the paper (Ramanujan et al., arXiv 1911.13299, section 3).

    Args:
        model: A compiled plain model. It is not changed.
        x: Training inputs in memory: an array, or a list or dict of arrays.
        y: Training targets, in one of the same forms.
        steps: Number of optimizer steps.
        mask: A mask or its name, as for `masked_layers.convert_to_masked`. A mask given by name
            gets the seed of this function.
        weights: `"initial"` for the weights of the model, or `"signed_constant"` for sign(w) times
            the standard deviation of w, per kernel. Ramanujan et al. use Kaiming-normal weights, or
            signed constants of the same deviation; to reproduce this, initialize with `he_normal`.
        optimizer: An optimizer. By default that of the paper: SGD with momentum 0.9, with learning
            rate 100 for Bernoulli masks (Zhou et al., arXiv 1905.01067, section 5), otherwise 0.1
            decayed to 0 by a cosine.
        batch_size: Number of examples per step.
        samples: Number of masks to sample for the test.
        test_data: Data `(x, y)` for the test metrics. None to skip them.
        validation_data: Data `(x, y)` for `history`. None to skip it.
        eval_every: Number of steps between evaluations on the validation data. None to evaluate
            only at the end.
        seed: Seed for the order of the examples, the samples in the test, and a mask given by name.
        augment: Augmentation of the inputs of each batch, as in `training.train`.
        deterministic: Whether the choice between compiled loop and `fit` must not depend on timing.
        on_progress: Function that is called with the number of new steps.

    Raises:
        ValueError: If the model is not compiled or is already masked, or an argument is not valid.
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
    """The training of a supermask: arguments of `learn_supermask`.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or the mask is not learned.
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
            raise ValueError(f"`mask` must be a learned mask. Received: mask={self.mask!r}")

    @functools.cached_property
    def prototype(self) -> ml.LearnedMask:
        """Mask that is copied for each weight."""
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
    """Learns a supermask like `learn_supermask`, with the arguments as a plan.

    Args:
        model: A compiled plain model. It is not changed.
        x: Training inputs.
        y: Training targets.
        plan: The plan.
        test_data: Data `(x, y)` for the test metrics, or None.
        validation_data: Data `(x, y)` for the history, or None.
        listeners: Functions to call during the training.

    Raises:
        ValueError: If the model is not compiled or is already masked, or an argument is not valid.
    """
    check_compiled(model, "learn_supermask()")
    examples = ArrayDataset.of(x, y, None, plan.training.augment)
    validation = training.held_out(model, examples, "validation_data", validation_data)
    training.held_out(model, examples, "test_data", test_data)
    for name, part in (("training", (x, y)), ("validation", validation_data), ("test", test_data)):
        finite_data.check(model, f"{name} data", part, trained=name == "training")
    own_optimizer = model.optimizer
    model = ml.convert_to_masked(model, mask=plan.prototype)
    others = _withhold_weights(model, plan)
    optimizer = plan.optimizer or _optimizer(plan.prototype, plan.training.steps)
    copying.compile_with(model, optimizer)
    history = training.train_by_plan(model, examples, plan.training, validation, listeners)
    supermask, sampled, results = ml.harden(model), {}, {}
    # Weights were frozen only for learning, and the learning rate was for scores.
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
    """Sets masked weights to the values of the plan, and freezes everything except scores.

    Returns:
        The variables that were trainable before.
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
    """Returns metrics of sampled masks over the whole data set: by name, with a value per mask.

    They include `sparsity`, the share of weights that each mask prunes. Of weights whose scores
    never get a gradient, samples keep about a half, while `harden` keeps all.

    The mean of the accuracies is Zhou et al.'s accuracy of a learned supermask. It is neither the
    accuracy of an averaged prediction nor that of a new mask for every batch. The model is left
    unchanged.

    Args:
        model: A compiled model with learned masks.
        x: Inputs.
        y: Targets.
        samples: Number of masks, at least 1.
        seed: Seed of the samples.

    Raises:
        ValueError: If the model has no learned mask, or `samples` is less than 1.
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
