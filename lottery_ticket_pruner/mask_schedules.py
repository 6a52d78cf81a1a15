"""Callbacks that change the masks of a masked model while it trains: pruning and rewiring."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import masked_layers as ml
from lottery_ticket_pruner import (
    channels,
    criteria,
    distributions,
    evidence,
    notices,
    optimizers,
    ranking,
    schedules,
    selection,
    structures,
    targets,
    zero_hold,
)
from lottery_ticket_pruner.checks import is_integer
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.records import is_masked
from lottery_ticket_pruner.training import ArrayDataset, LoopChanges, StepCallback
from lottery_ticket_pruner.variables import variable_scope
from masked_layers import randomness, workers
from masked_layers.types import Tensor


class MaskSchedule(StepCallback):
    """Changes the masks of a masked model at certain steps of its training.

    Base class of `GradualPruning` and `DynamicSparseTraining`. Use such an object as a callback of
    `fit`, or, in a custom training loop, call `advance` as training proceeds. It returns True if
    the masks were changed, and raises a `ValueError` if the weights contain NaN or infinity. In
    that case no mask is changed.

    A step is a trained batch. In `fit` the count starts from that of the optimizer, so a training
    that is continued or restored from a file resumes at its step. Elsewhere it starts at 0. The
    count is read when the first batch begins, so the order of this callback and of a callback that
    restores the training, such as `keras.callbacks.BackupAndRestore`, does not matter. With
    `steps_per_execution` above 1, masks change after the execution in which a step was due; choose
    intervals that are multiples of it.

    At the end of every epoch, `fit` logs the sparsity of the model as `"sparsity"`.

    Attributes:
        pruner: The pruner of the masked model.
    """

    def __init__(self, pruner: LotteryTicketPruner) -> None:
        super().__init__()
        if not isinstance(pruner, LotteryTicketPruner):
            raise TypeError(
                f"{type(self).__name__} needs the pruner of a masked model: "
                f"`LotteryTicketPruner(masked)`. Received: {pruner!r}"
            )
        if not is_masked(pruner.model):
            raise ValueError(
                f"{type(self).__name__} changes masks, but {pruner.model.name!r} has none. Create "
                "the pruner for `masked_layers.convert_to_masked(model)` and train that model."
            )
        self.pruner = pruner
        self._data: tuple[Any, Any] | None = None  # inputs and targets that changes need

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that the model is the pruner's, and that its loss accepts the given targets."""
        if self.model is not self.pruner.model:
            raise ValueError(
                f"{type(self).__name__} was created with the pruner of a model other than "
                f"{self.model.name!r}. Create the pruner for the model that is trained."
            )
        if self._data is not None:
            targets.check(self.model, *self._data)
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the sparsity to the logs."""
        if logs is not None:
            refs = ml.masked_refs(self.model)
            size = sum(math.prod(ref.variable.shape) for ref in refs)
            logs["sparsity"] = 1 - sum(ranking.count_alive(refs)) / size

    def _act(self, step: int) -> None:
        ml.sync(self.pruner.model)
        self._change(step)
        self.pruner.note_changed_masks()

    def _change(self, step: int) -> None:
        raise NotImplementedError


class GradualPruning(MaskSchedule):
    """Prunes a masked model gradually while it trains.

    Pruned weights are exactly zero at the end of every batch, because the masks are part of the
    model.

    By default, masks follow from the magnitude of the weights. The ranking is then a compiled
    program on the device, and no weight leaves it. Other criteria, structures and distributions are
    evaluated on the host, as in `LotteryTicketPruner.update_masks`. Criteria of final weights use
    the current weights, which are recorded for this.

    Args:
        pruner: The pruner of the masked model.
        schedule: A schedule, a function `step -> sparsity`, a number, a configuration, or a
            `PruningSchedule` of TensorFlow Model Optimization; see `schedules.get`. Weights that
            are sparser than the schedule requires are left unchanged.
        strategy: A criterion: name, configuration, `criteria.Criterion` or function.
        scope: Weights that are ranked together, `"layer"` or `"global"`. For criteria other than
            the default also `"output"`.
        regrowth: Whether pruned weights may come back. If True, masks are computed from all raw
            weights. A raw weight under a mask has no gradient, but momentum and weight decay of
            the optimizer move it.
        seed: Seed for breaking ties.
        structure: Weights that are pruned together, such as `"filters"`; see `structures.get`. N:M
            patterns are not supported, because they have a fixed sparsity.
        distribution: How the sparsity is divided among layers, such as `"erk"`; see
            `distributions.get`.
        data: Data for criteria of gradients or activations: `(x, y)`, `(x, y, sample_weight)`, `x`
            alone if no targets are needed, or a data set of batches.

    Raises:
        ValueError: If the model has no masks, if the schedule, criterion, scope, structure or
            distribution is unknown, or if the sparsity falls without `regrowth=True`.

    Example:
    ```python
    masked = masked_layers.convert_to_masked(model)
    schedule = schedules.Polynomial(0.5, 0.9, begin_step=1000, end_step=5000)
    pruning = GradualPruning(LotteryTicketPruner(masked), schedule)
    masked.fit(x, y, epochs=10, callbacks=[pruning])

    for batch in batches:  # without `fit`
        train_step(batch)
        pruning.advance()
    ```

    References:
        - [Zhu & Gupta, arXiv 1710.01878](https://arxiv.org/abs/1710.01878)
    """

    def __init__(
        self,
        pruner: LotteryTicketPruner,
        schedule: schedules.Identifier,
        strategy: criteria.Identifier = "smallest_weights",
        *,
        scope: str | None = None,
        regrowth: bool = False,
        seed: int = 0,
        structure: structures.Identifier | None = None,
        distribution: distributions.Identifier | None = None,
        data: Any = None,
    ) -> None:
        super().__init__(pruner)
        _check_seed(seed)
        self.schedule = schedules.get(schedule)
        if self.schedule.falls and not regrowth:
            raise ValueError(
                "The sparsity of the schedule falls, but pruned weights do not come back without "
                f"`regrowth=True`. Received: schedule={self.schedule!r}. Choose a final sparsity "
                "that is not below the initial one, or pass `regrowth=True`."
            )
        structure = None if structure is None else structures.get(structure)
        if structure is not None and structure.kept is not None:
            raise ValueError(
                f"{structure} determines how many weights are kept and cannot follow a schedule. "
                "Prune once: `pruner.update_masks(..., structure=...)`."
            )
        if isinstance(structure, structures.Channels):
            _check_limit(structure, self.schedule)
        self._request = selection.Request.of(
            strategy,
            scope=scope,
            seed=seed,
            structure=structure,
            distribution=distribution,
            keep_sparser=True,
        )
        self.criterion = self._request.criterion
        self.scope = self._request.scope
        self.structure = self._request.structure
        self.distribution = self._request.distribution
        self.regrowth = regrowth
        self.seed = seed
        self.data = data
        if evidence.differentiates(self.criterion) and isinstance(data, tuple) and len(data) > 1:
            self._data = data[:2]
        by_magnitude = self.criterion in map(criteria.get, _MAGNITUDE)
        plain = structure is None and distribution is None
        self._on_device = by_magnitude and self.scope != "output" and plain
        self._told_of_end = False
        self._requested: float | None = None  # the last sparsity that was due
        self._emptied: list[str] = []  # paths whose masks kept nothing at the last change

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Warns once if training ended before the schedule reached its final sparsity.

        If it did, the log names the layers of which a structure of channels pruned fewer.
        """
        if not self._begun or self._told_of_end:  # Without a batch, the step is unknown.
            return
        message = notices.of_schedule_left(self.schedule, self.step)
        if message is not None:
            self._told_of_end = True
            notices.warn(message)
        elif self._requested is not None:
            model = self.pruner.model
            request = dataclasses.replace(self._request, sparsity=self._requested)
            channels.note_end(request, self.pruner.followed.of(model, request), ml.get_masks(model))

    def changes_in_loop(self) -> LoopChanges | None:
        """Returns the rankings for compiled loops, if masks follow from magnitudes."""
        return _RankingsInLoop(self) if self._on_device else None

    def _due(self, step: int) -> bool:
        return self.schedule.due(step)

    def _sparsity(self, step: int) -> float:
        return schedules.check_sparsity(
            f"{self.schedule!r} at step {step}", self.schedule.sparsity(step)
        )

    def _change(self, step: int) -> None:
        self._requested = sparsity = self._sparsity(step)
        if self._on_device:
            self._rank(sparsity, step)
        else:
            self._update(sparsity, step)

    def _rank(self, sparsity: float, step: int) -> None:
        groups = self._groups()
        with variable_scope(self.pruner.model):
            masks, finite = ranking.keep_largest_of(
                groups,
                {ref.path: ref.variable for group in groups for ref in group},
                {ref.path: ref.mask.value for group in groups for ref in group},
                [ranking.integer(count) for count in _kept_counts(groups, sparsity)],
                [ranking.integer(seed) for seed in self._seeds(groups, step)],
                regrowth=self.regrowth,
            )
            parts = [[masks[ref.path] for ref in group] for group in groups]
            emptied = ranking.check_finite(groups, finite, parts)
            workers.check_agreement(groups[0][0].variable, masks.values(), "masks")
            for group in groups:
                for ref in group:
                    ref.mask.value.assign(masks[ref.path])
        self._note_emptied(emptied, step)

    def _groups(self) -> list[list[ml.MaskedRef]]:
        """Returns the weights that are ranked together."""
        refs = ml.masked_refs(self.pruner.model)
        return [refs] if self.scope == "global" else [[ref] for ref in refs]

    def _seeds(self, groups: Sequence[Sequence[ml.MaskedRef]], step: int) -> list[int]:
        return [ranking.seed_of(self.seed, step, group[0].path) for group in groups]

    def _note_emptied(self, paths: list[str], step: int) -> None:
        notices.of_emptied(
            [path for path in paths if path not in self._emptied], f" at step {step}"
        )
        self._emptied = paths

    def _update(self, sparsity: float, step: int) -> None:
        pruner = self.pruner
        before = ml.get_masks(pruner.model)
        if self.regrowth:
            ml.set_masks(pruner.model, {path: np.ones_like(m) for path, m in before.items()})
        elif self.structure is None and all(
            row.sparsity >= sparsity for row in ml.sparsity_report(pruner.model)
        ):
            return
        try:
            if "final" in self.criterion.needs:
                pruner.set_pretrained_weights()
            seed = randomness.integer("mask updates", self.seed, step, bits=32)
            request = dataclasses.replace(self._request, sparsity=sparsity, seed=seed)
            pruner.prune(request, data=self.data)
        except Exception:
            ml.set_masks(pruner.model, before)
            raise


class _RankingsInLoop:
    """Changes of masks by `GradualPruning` inside a compiled loop.

    A row has a flag, which is 1 if a change is due, and for each group its count and its seed. The
    events are: the weights of a group are not finite; a mask keeps nothing.
    """

    def __init__(self, pruning: GradualPruning) -> None:
        self._pruning = pruning
        self._groups = pruning._groups()
        self._refs = [ref for group in self._groups for ref in group]
        self.read: Sequence[keras.Variable] = [ref.variable for ref in self._refs]
        self.written: Sequence[keras.Variable] = [ref.mask.value for ref in self._refs]
        self.events = len(self._groups) + len(self._refs)
        self._key = (pruning.scope, pruning.regrowth, *map(id, (*self.read, *self.written)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RankingsInLoop) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def rows(self, steps: int) -> np.ndarray:
        pruning, groups = self._pruning, self._groups
        table = np.zeros((steps, 1 + 2 * len(groups)), "int32")
        for row, step in zip(table, itertools.count(pruning.step + 1)):
            if pruning._due(step):
                counts = _kept_counts(groups, pruning._sparsity(step))
                row[:] = 1, *counts, *pruning._seeds(groups, step)
        return table

    def compute(
        self, row: Tensor, read: Sequence[Tensor], written: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        paths = [ref.path for ref in self._refs]
        number = len(self._groups)

        def ranked() -> tuple[list[Tensor], Tensor]:
            masks, finite = ranking.keep_largest_of(
                self._groups,
                dict(zip(paths, read, strict=True)),
                dict(zip(paths, written, strict=True)),
                [row[1 + i] for i in range(number)],
                [row[1 + number + i] for i in range(number)],
                regrowth=self._pruning.regrowth,
            )
            every = functools.reduce(ops.logical_and, finite)
            new = [
                ops.where(every, masks[path], mask)
                for path, mask in zip(paths, written, strict=True)
            ]
            kept = [ranking.holds_any(mask) for mask in new]
            return new, ops.logical_not(ops.stack([*finite, *kept]))

        def unchanged() -> tuple[list[Tensor], Tensor]:
            return list(written), ops.zeros((self.events,), "bool")

        return ops.cond(row[0] > 0, ranked, unchanged)

    def note(self, steps: int, first: np.ndarray) -> None:
        pruning = self._pruning
        start = pruning.step + 1
        due = pruning.pass_steps(steps)
        if due is None:
            return
        pruning._requested = pruning._sparsity(due)
        pruning.pruner.note_changed_masks()
        for group, number in zip(self._groups, first, strict=False):
            if number < steps:
                raise ranking.not_finite(group)
        emptied: dict[int, list[str]] = collections.defaultdict(list)
        for ref, number in zip(self._refs, first[len(self._groups) :].tolist(), strict=True):
            if number < steps:
                emptied[start + number].append(ref.path)
        for step in sorted(emptied):
            pruning._note_emptied([*pruning._emptied, *emptied[step]], step)


def _kept_counts(groups: Sequence[Sequence[ml.MaskedRef]], sparsity: float) -> list[int]:
    """Returns the number of weights to keep in each group."""
    sizes = [sum(math.prod(ref.variable.shape) for ref in group) for group in groups]
    return [size - selection.drop_count(size, size, sparsity=sparsity) for size in sizes]


def _check_limit(structure: structures.Channels, schedule: schedules.Schedule) -> None:
    """Raises an error early if a schedule would exceed the limit of the structure."""
    steps = [step for step in (schedule.begin_step, schedule.end_step) if step is not None]
    final = max(schedule.sparsity(step) for step in steps)
    if final > structure.at_most:
        raise ValueError(
            f"The schedule reaches a sparsity of {final:.4g}, and {structure} prunes at most "
            f"{structure.at_most} of the channels of a layer. Lower the final sparsity, or pass "
            f"structure=structures.Channels(at_most={final:.4g})."
        )


class DynamicSparseTraining(MaskSchedule):
    """Moves the kept weights of a sparse model while it trains, at a constant sparsity.

    Every `frequency` steps, each layer prunes its smallest weights and grows the same number of
    pruned weights, which start from zero, as do their optimizer slots. SET grows weights at random,
    RigL those with the largest gradient of the loss. The share of weights that moves decays from
    `fraction` to 0 along half a cosine.

    Start from any masks, such as `pruner.update_masks("random", sparsity=0.9, distribution="erk")`
    as in RigL's paper. The control, static sparse training, is training with these masks without
    this callback. The papers train with SGD and momentum. With Adam, the moving averages of a grown
    weight start from zero without the bias correction that applies when training starts, so its
    updates are several times as large as those of other weights for some hundred steps.

    Weights are ranked on the device. The gradient for RigL is computed there and passes through the
    host once per change.

    Args:
        pruner: The pruner of the masked model.
        steps: Number of steps of the whole training, for the decay of the fraction.
        growth: `"gradient"` (RigL) or `"random"` (SET).
        data: For RigL: arrays of examples, `(x, y)` or `(x, y, sample_weight)`, for example the
            training data. A batch is drawn from them for each change.
        batch_size: Number of examples in this batch.
        fraction: Share of the kept weights that moves at first, in (0, 1).
        until: Share of the training after which masks no longer change, in (0, 1].
        frequency: Number of steps between changes.
        seed: Seed for random growth, ties and the batches drawn from `data`.
        optimizer: Optimizer of a custom loop. By default the optimizer of the model.

    Raises:
        ValueError: If the model has no masks, an argument is out of range, no change would ever be
            due, or the arrays of `data` differ in length.

    References:
        - [Mocanu et al., arXiv 1707.04780](https://arxiv.org/abs/1707.04780) (SET)
        - [Evci et al., arXiv 1911.11134](https://arxiv.org/abs/1911.11134) (RigL)
    """

    def __init__(
        self,
        pruner: LotteryTicketPruner,
        steps: int,
        growth: str = "gradient",
        *,
        data: Sequence[Any] | None = None,
        batch_size: int = 256,
        fraction: float = 0.3,
        until: float = 0.75,
        frequency: int = 100,
        seed: int = 0,
        optimizer: keras.Optimizer | None = None,
    ) -> None:
        super().__init__(pruner)
        if growth not in ("gradient", "random"):
            raise ValueError(
                f'`growth` must be "gradient" or "random". Received: growth={growth!r}'
            )
        if (growth == "gradient") != (data is not None):
            raise ValueError(
                'growth="gradient" needs `data=(x, y)` to compute the gradient, and '
                f'growth="random" takes no data. Received: growth={growth!r}, data of type '
                f"{type(data).__name__}"
            )
        shares = all(isinstance(share, numbers.Real) for share in (fraction, until))
        if not (shares and 0 < fraction < 1 and 0 < until <= 1):
            raise ValueError(
                "`fraction` must be in (0, 1) and `until` in (0, 1]. Received: "
                f"fraction={fraction!r}, until={until!r}"
            )
        counts = (steps, frequency, batch_size)
        if not all(_is_count(count, 1) for count in counts):
            raise ValueError(
                "`steps`, `frequency` and `batch_size` must be integers of at least 1. Received: "
                f"steps={steps}, frequency={frequency}, batch_size={batch_size}"
            )
        _check_seed(seed)
        self.steps = steps
        self.growth = growth
        self._examples = None if data is None else ArrayDataset.of(*data)
        if self._examples is not None:
            self._data = (*self._examples.host, None)[:2]
        if frequency >= until * steps:
            raise ValueError(
                "No weight would ever move: the first change is due after `frequency` steps, but "
                f"masks no longer change from step until * steps = {until * steps:g} on. Received: "
                f"steps={steps}, until={until}, frequency={frequency}. Lower the frequency."
            )
        self.batch_size = batch_size
        self.fraction = fraction
        self.until = until
        self.frequency = frequency
        self.seed = seed
        self.optimizer = optimizer

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Warns if training ended before any weight could move."""
        if self._begun and self.step < self.frequency:
            notices.warn(
                f"DynamicSparseTraining moved nothing: the training ended at step {self.step}, and "
                f"the first change is due at step {self.frequency}. Lower the `frequency`."
            )

    def moving_share(self, step: int) -> float:
        """Returns the share of the kept weights that moves at a step, at most `fraction`."""
        progress = min(step / (self.until * self.steps), 1.0)
        return self.fraction * (1 + math.cos(math.pi * progress)) / 2

    def _begin(self) -> None:
        masks = [ref.mask for ref in ml.masked_refs(self.pruner.model)]
        # A change due at this step has already been made, unless the state was saved just before
        # it, by a callback ahead of this one at the end of that batch.
        if any(mask.moved_at in (None, self.step) for mask in masks):
            self._unseen = self.step + 1
        for mask in masks:
            if mask.moved_at is None:
                mask.moved_at = self.step
        self.advance(0)

    def _due(self, step: int) -> bool:
        return 0 < step < self.until * self.steps and step % self.frequency == 0

    def _change(self, step: int) -> None:
        self._move(step)
        for ref in ml.masked_refs(self.pruner.model):
            ref.mask.moved_at = step

    def _move(self, step: int) -> None:
        model = self.pruner.model
        refs = ml.masked_refs(model)
        share = self.moving_share(step)
        alive = ranking.count_alive(refs)
        if sum(alive) == sum(math.prod(ref.variable.shape) for ref in refs):
            warnings.warn(
                f"DynamicSparseTraining moved nothing at step {step}: {model.name!r} has no pruned "
                "weights. Prune it before training, for example by `pruner.update_masks(...)`.",
                stacklevel=2,
            )
            return
        growth = {} if self._examples is None else self._gradients(step, self._examples)
        with variable_scope(model):
            results = []
            for ref, count in zip(refs, alive, strict=True):
                state = [ranking.joined([ref.variable]), ranking.joined([ref.mask.value])]
                number = ranking.integer(selection.drop_count(count, count, rate=share))
                seed = ranking.integer(ranking.seed_of(self.seed, step, ref.path))
                if self.growth == "gradient":
                    wanted = ranking.joined([growth[ref.path]])
                    results.append(ranking.rewire_by_growth(*state, wanted, number, seed))
                else:
                    results.append(ranking.rewire_at_random(*state, number, seed))
            finite = [fine for _, _, fine in results]
            ranking.check_finite(
                [[ref] for ref in refs], finite, [[mask] for mask, _, _ in results]
            )
            workers.check_agreement(refs[0].variable, [mask for mask, _, _ in results], "masks")
            slots = self._slots()
            for ref, (mask, grown, _) in zip(refs, results, strict=True):
                kept = ops.reshape(ops.logical_not(grown), ref.variable.shape)
                for variable in [ref.variable, *slots.get(id(ref.variable), [])]:
                    variable.assign(zero_hold.zero_pruned(kept, variable))
                ref.mask.value.assign(ops.reshape(mask, ref.variable.shape))

    def _gradients(self, step: int, examples: ArrayDataset) -> dict[str, np.ndarray]:
        size = len(examples)
        draw = randomness.stream("gradient batch", self.seed, step)
        chosen = draw.choice(size, min(self.batch_size, size), replace=False)
        x, y, weights = (*examples.take(chosen), None, None)[:3]
        return evidence.loss_gradients(
            self.pruner.model, x, y, sample_weight=weights, batch_size=len(chosen)
        )

    def _slots(self) -> dict[int, list[keras.Variable]]:
        model = self.pruner.model
        optimizer = self.optimizer or getattr(model, "optimizer", None)
        if optimizer is None:
            return {}
        return optimizers.optimizer_slots(optimizer)


_MAGNITUDE = ("smallest_weights", "smallest_weights_global")


def _is_count(value: object, least: int) -> bool:
    return is_integer(value) and value >= least


def _check_seed(seed: object) -> None:
    if not _is_count(seed, 0):
        raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
