"""Learned supermasks: train the masks over weights that stay as they were drawn."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import training, treatments
from lottery_ticket_pruner.training import Augmentation, Examples
from masked_layers import copying, learned

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
    if not getattr(model, "compiled", False):
        raise ValueError(f"{model.name} is not compiled: call compile() before learn_supermask().")
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` must be one of {WEIGHTS}. Received: weights={weights!r}")
    _check_samples(samples)
    prototype = learned.get(mask)
    if not prototype.learned:
        raise ValueError(f"`mask` must be a learned one. Received: mask={mask!r}")
    if isinstance(mask, str):
        prototype.seed = seed
    to_train_on = Examples.of(x, y)
    for name, held_out in (("validation_data", validation_data), ("test_data", test_data)):
        training.held_out(model, to_train_on, name, held_out)
    own_optimizer = model.optimizer
    model = ml.convert_to_masked(model, mask=prototype)
    scale = 1.0
    if isinstance(prototype, ml.EdgePopupMask):
        scale = 1 / math.sqrt(1 - prototype.sparsity)
    for ref in ml.masked_refs(model):
        values = keras.ops.convert_to_numpy(ref.variable)
        if weights == "signed_constant":
            values = treatments.signed_constant(values)
        ref.variable.assign(values * np.asarray(scale, values.dtype))
    scores = {id(ref.mask.scores) for ref in ml.masked_refs(model)}
    others = [variable for variable in model.trainable_variables if id(variable) not in scores]
    _set_trainable(others, False)
    copying.compile_with(model, optimizer or _optimizer(prototype, steps))
    history = training.train(
        model,
        x,
        y,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        eval_every=eval_every,
        validation_data=validation_data,
        on_progress=on_progress,
        augment=augment,
        deterministic=deterministic,
    )
    supermask, sampled, results = ml.harden(model), {}, {}
    # Only learning froze them, and its rate is for scores.
    paths = {variable.path for variable in others}
    _set_trainable([v for v in supermask.variables if v.path in paths], True)
    copying.compile_with(supermask, own_optimizer)
    if test_data is not None:
        results = training.evaluate(supermask, *test_data)
        if isinstance(prototype, ml.BernoulliMask):
            sampled = evaluate_sampled(model, *test_data, samples=samples, seed=seed)
        else:
            measured = results | {"sparsity": ml.sparsity_report(supermask).sparsity}
            sampled = {name: np.array([value]) for name, value in measured.items()}
    return LearnedSupermask(model, supermask, sampled, results, history)


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
        drawn = np.random.SeedSequence([seed, number]).generate_state(1)[0]
        ml.set_masks(hardened, ml.sample_masks(model, int(drawn)))
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
