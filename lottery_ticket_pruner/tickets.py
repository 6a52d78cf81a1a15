"""Iterative pruning with rewinding: finds lottery tickets, and trains controls for comparison."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import (
    _keras,
    arms,
    channels,
    finite_data,
    notices,
    optimizers,
    selection,
    targets,
    training,
)
from lottery_ticket_pruner.checkpoint import Checkpoint
from lottery_ticket_pruner.checks import check_compiled
from lottery_ticket_pruner.fingerprints import description, digest, layers
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.search_plans import (
    CONTROLS,
    RETRAINING,
    ControlPlan,
    Listeners,
    PruningPlan,
    SearchPlan,
    Share,
)
from lottery_ticket_pruner.stretches import train_stretch
from lottery_ticket_pruner.ticket_results import TicketResult
from lottery_ticket_pruner.trained_rounds import TrainedRounds
from lottery_ticket_pruner.training import ArrayDataset, Augmentation, TrainingPlan
from masked_layers import randomness
from masked_layers.notices import warn_outside

__all__ = [
    "CONTROLS",
    "RETRAINING",
    "TicketResult",
    "TicketSearch",
    "find_ticket",
    "search",
    "train_stretch",
    "train_to_rewinding_point",
]

_logger = logging.getLogger(__name__)


def find_ticket(
    model: keras.Model,
    x: Any,
    y: training.Arrays | None = None,
    *,
    rounds: int,
    steps: int,
    batch_size: int = 60,
    rate: Share | None = None,
    sparsity: Share | None = None,
    strategy: Any = "large_final",
    scope: str | None = None,
    structure: Any = None,
    rewind_to: int = 0,
    retraining: str = "weight_rewinding",
    kept: Any = "rewind",
    pruned: Any = "zero",
    controls: Sequence[str] = ("random_reinit", "random_mask"),
    control_rounds: Sequence[int] | None = None,
    validation_data: Any = None,
    test_data: Any = None,
    eval_every: int | None = None,
    seed: int = 0,
    replicate: int = 0,
    augment: Augmentation | None = None,
    deterministic: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    on_result: Callable[[dict[str, Any]], object] | None = None,
    on_evaluation: Callable[[dict[str, Any]], object] | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> TicketResult:
    """Trains, prunes and rewinds a model for a number of rounds, and trains controls.

    The dense model is trained for `steps` steps. Its weights after `rewind_to` steps are the
    rewinding point. Every round then updates the masks by the weights trained last, resets all
    weights and the optimizer to the rewinding point, and trains the remaining `steps - rewind_to`
    steps under the masks (Frankle & Carbin, arXiv 1803.03635; for rewinding later than step 0:
    Frankle et al., arXiv 1912.05671). `retraining` offers two alternatives (Renda et al., arXiv
    2003.02389): with `"learning_rate_rewinding"`, the trained weights are kept and only the
    optimizer is reset; with `"fine_tuning"`, they are kept and trained at the last learning rate.

    Controls have the same sparsity and number of steps, and start from the rewinding point:

    - `"random_reinit"` keeps the ticket's masks and draws new weights from each layer's own
      initializer (all other weights start from step 0). `"reinit_same_sign"` also gives them the
      signs of step 0.
    - `"random_mask"` keeps the weights and draws a random mask, with the same number of weights in
      each layer, or in the whole model with global scope. `"reshuffled_mask"` always keeps the
      number in each layer. With a structure, both keep the number of tiles of each layer, or of
      channels of each family of layers.

    The order of the examples and the random numbers of dropout depend only on `seed`, arm and
    round, so the results of an arm do not depend on the other arms. (On torch, give dropout layers
    a seed: without one, Keras draws from torch's global generator.) All arms share one model, whose
    values are reassigned, so nothing is compiled twice.

    Args:
        model: A compiled model. If it is plain, it is not changed, and a masked copy is trained. If
            it is masked, it is trained itself, starting with dense masks, so that several calls can
            share its compiled functions. In both cases the optimizer is reset, and a learning-rate
            schedule starts at step 0.
        x: Training inputs in memory: an array, or a list or dict of arrays. Or inputs and targets
            together as a finite `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch
            `DataLoader` of batches, which is read into memory once (see `training.to_arrays`).
        y: Training targets as arrays. None for such a data set, or if the model adds its loss
            itself.
        rounds: Number of pruning rounds after the dense run, at least 1.
        steps: Number of optimizer steps of a full run.
        batch_size: Number of examples per step.
        rate: Share of the kept weights that each round prunes, or a mapping from patterns to
            shares, as in `LotteryTicketPruner.update_masks`. Default 0.2, unless `sparsity` is
            given.
        sparsity: Share of pruned weights after the last round, reached in rounds of equal rates.
            Replaces `rate`, and may also be a mapping.
        strategy: The pruning criterion. Criteria of gradients or activations use all of `x` and
            `y`, with the weights trained last. Criteria for pruning at initialization (`snip`,
            `grasp`, `synflow`) rank the weights of the rewinding point under the masks of the
            previous round; with one round, this is pruning at initialization.
        scope: Weights that are ranked together. With `"layer"`, every layer loses the same share;
            with `"global"`, the weights with the lowest scores of the whole model are pruned,
            wherever they are. None for the default of the criterion (see `update_masks`).
        structure: Weights that are pruned together, as in `LotteryTicketPruner.update_masks`, such
            as `"channels"`. Rates and sparsities are then shares of these. N:M needs one round.
            For channels, a plain model is masked with `mask_normalization=True`.
        rewind_to: The step to rewind to, 0 <= rewind_to < steps.
        retraining: One of `RETRAINING`: what the ticket is trained from after pruning.
        kept: Treatment of the ticket's kept weights (see `treatments`), which replaces rewinding
            them.
        pruned: Treatment of the ticket's pruned weights.
        controls: Names from `CONTROLS` of the controls to train.
        control_rounds: Rounds in which controls are trained. None for all rounds.
        validation_data: Data `(x, y)` or a data set for the early-stop step. None to skip it.
        test_data: Data `(x, y)` or a data set for the test metrics. None to skip them.
        eval_every: Number of steps between evaluations on the validation data. None to evaluate
            only at the end and at the rewinding point.
        seed: Seed of everything random, except for the initial weights of the model.
        replicate: Value of the `replicate` column of the rows.
        augment: Augmentation of the inputs of each batch, as in `training.train`.
        deterministic: Whether the choice between compiled loop and `fit` must not depend on timing.
        checkpoint: Folder for the state after every round. If it contains the state of an earlier
            call with the same arguments, initial weights, data, optimizer and loss, the search is
            resumed, with the same results as without the interruption. Known results are passed to
            the callbacks again. The masks of each round stay there as `masks-<round>.npz` (see
            `masked_layers.load_masks`), and the kept weights that were trained under them as
            `trained-<round>.npz`, for `TicketResult.restore`. Without a folder, the result has
            these weights in memory. Other processes cannot use the folder in the meantime.
        on_result: Function that is called with each row as soon as it is known.
        on_evaluation: Function that is called after each evaluation on the validation data during
            training, with a dict: `round`, `arm`, `replicate`, `step`, `validation_<metric>` and
            `training_<metric>` for the loss and each compiled metric, and `learning_rate`.
            Training metrics are those of the steps since the last evaluation, as `fit` logs them.
            They are left out for models with a custom training step in compiled loops, which do not
            return its results.
        on_progress: Function that is called with the number of new steps.

    Returns:
        The ticket of the last round, and how it was found. `restore` changes it to that of an
        earlier round without training, and `best_round` finds the sparsest one that is good enough.

    Raises:
        ValueError: If the model is not compiled, a number is out of range, both `rate` and
            `sparsity` are given, a control is unknown, a weight to be reinitialized has no
            initializer, the checkpoint belongs to another search, the targets do not fit the loss,
            the validation or test data does not fit the model, data makes the loss NaN or
            infinite because it has such values, or `update_masks` or
            `training.to_arrays` refuses an argument. In that case no step is trained.
        OSError: If the folder of the checkpoint is in use by another process (a
            `FolderInUseError`), is removed in the meantime, or cannot be written.
    """
    return search(
        model,
        SearchData((x, y), validation_data, test_data),
        SearchPlan(
            training=TrainingPlan(
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                eval_every=eval_every,
                augment=augment,
                deterministic=deterministic,
            ),
            pruning=PruningPlan(
                rounds=rounds,
                strategy=strategy,
                scope=scope,
                structure=structure,
                rate=rate,
                sparsity=sparsity,
                rewind_to=rewind_to,
                retraining=retraining,
                kept=kept,
                pruned=pruned,
            ),
            control=ControlPlan(controls=controls, control_rounds=control_rounds),
            replicate=replicate,
        ),
        Listeners(on_result=on_result, on_evaluation=on_evaluation, on_progress=on_progress),
        checkpoint,
    )


@dataclasses.dataclass(frozen=True)
class SearchData:
    """The data of a search, in any form that `find_ticket` accepts.

    Attributes:
        train: Training inputs and targets.
        validation: Inputs and targets for the early-stop step, or None.
        test: Inputs and targets for the test metrics, or None.
    """

    train: tuple[Any, Any]
    validation: Any = None
    test: Any = None

    def in_memory(self, model: keras.Model) -> "SearchData":
        """Returns the same data as arrays.

        Raises:
            ValueError: If the data cannot be read, or targets that the loss needs are missing.
        """
        x, y = self.train
        pairs = map(training.pair_of, (self.validation, self.test))
        data = SearchData(training.to_arrays(x, y), *pairs)
        if data.train[1] is None and model.loss is not None:
            raise ValueError(
                f"The loss of {model.name} needs targets: pass `y`, or as `x` a tf.data.Dataset, "
                "a keras.utils.PyDataset or a torch DataLoader of batches (inputs, targets). "
                f"Received: x of type {type(x).__name__}, y={y}."
            )
        return data


def search(
    model: keras.Model,
    data: SearchData,
    plan: SearchPlan,
    listeners: Listeners | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_rounds: bool = True,
) -> TicketResult:
    """Finds a ticket like `find_ticket`, with the arguments as plans.

    Args:
        model: A compiled model, plain or masked.
        data: Data for training, validation and test.
        plan: The plan.
        listeners: Functions to call during the search.
        checkpoint: Folder for the state after every round, or None.
        keep_rounds: Whether to keep the trained weights of each round for the result.

    Raises:
        ValueError: If an argument is not valid, as in `find_ticket`.
        OSError: If the folder of the checkpoint is in use or cannot be written.
    """
    check_compiled(model, "find_ticket()")
    data = data.in_memory(model)
    if all(ref.mask is None for ref in ml.weight_refs(model)):
        structure = plan.pruning.found_structure
        coupled = structure is not None and structure.coupled
        model = ml.convert_to_masked(model, mask_normalization=coupled)
    examples = ArrayDataset.of(*data.train, None, plan.training.augment)
    targets.check(model, *data.train)
    validation = training.held_out(model, examples, "validation_data", data.validation)
    training.held_out(model, examples, "test_data", data.test)
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    for name, part in parts.items():
        finite_data.check(model, f"{name} data", part, trained=name == "training")
    under_way = TicketSearch(model, data, examples, validation, plan, listeners or Listeners())
    with notices.said_once():
        return _carry_out(under_way, checkpoint, keep_rounds)


def _carry_out(
    under_way: "TicketSearch", checkpoint: str | os.PathLike[str] | None, keep_rounds: bool
) -> TicketResult:
    under_way.rehearse()
    saved = None if checkpoint is None else Checkpoint(Path(checkpoint), under_way.arguments())
    if saved is not None and saved.unidentified and not saved.exists():
        warn_outside(
            f"The search cannot be resumed from the checkpoint in {checkpoint}. "
            + " ".join(saved.unidentified),
            "lottery_ticket_pruner",
        )
    if keep_rounds:
        files = (saved.folder.absolute(), saved.identity) if saved is not None else ()
        under_way.trained = TrainedRounds(*files)
    with contextlib.nullcontext() if saved is None else saved:
        under_way.run(saved)
    return under_way.result()


def train_to_rewinding_point(
    model: keras.Model,
    examples: ArrayDataset,
    plan: TrainingPlan,
    validation: ArrayDataset | None = None,
    listeners: training.Listeners | None = None,
) -> training.History:
    """Trains a dense model to the rewinding point of all searches with the plan's seed.

    Args:
        model: A compiled model with the initial weights and a fresh optimizer.
        examples: Examples to train on.
        plan: Training plan up to the rewinding point, with the seed of the search.
        validation: Examples to evaluate on, or None.
        listeners: Functions to call during the training.
    """
    stretch = ("dense", 0, "to the rewinding point")
    return train_stretch(model, examples, plan, stretch, validation, listeners)


@dataclasses.dataclass
class TicketSearch:
    """A running search: its plan and data, and its results so far.

    Args:
        model: The masked model that is trained.
        data: The data in memory.
        examples: Examples to train on.
        validation: Examples to evaluate on, or None.
        plan: The plan.
        listeners: Functions to call during the search.
    """

    model: keras.Model
    data: SearchData
    examples: ArrayDataset
    validation: ArrayDataset | None
    plan: SearchPlan
    listeners: Listeners

    def __post_init__(self) -> None:
        # In a model that was trained before, the schedule would be at its end.
        ml.sync(self.model)
        optimizers.rewind_schedule(self.model.optimizer)
        # Also for a later process that resumes the search, and has a listener.
        self.is_logged = self.listeners.on_evaluation is not None
        self.pruner = LotteryTicketPruner(self.model)
        self.weights_at_0 = self.model.get_weights()
        self.masks: list[dict[str, np.ndarray]] = []
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.trained: TrainedRounds | None = None

    @property
    def round(self) -> int:
        """The current round, or the last one that is complete."""
        return len(self.masks) - 1

    def rehearse(self) -> None:
        """Raises the errors of pruning and reinitializing before anything is trained."""
        self.pruner.reset_masks()
        self.pruner.set_pretrained_weights()
        with notices.rehearsal():
            self._update_masks(1)
        self.pruner.reset_masks()
        if {"random_reinit", "reinit_same_sign"} & set(self.plan.control.controls):
            arms.draw_again(self.model, (self.seed,))
        self.pruner.rewind()

    def arguments(self) -> dict[str, Any]:
        """Returns everything that determines the results of the search, as JSON data."""
        return self.plan.arguments() | {
            "optimizer": description(self.model.optimizer),
            "loss": description(self.model.loss),
            "metrics": description(_keras.compile_arguments(self.model)[2:5]),
            "layers": layers(self.model),
            "initial_weights": digest(self.weights_at_0),
            "data": digest(self.data.train),
            "validation_data": digest(self.data.validation or ()),
            "test_data": digest(self.data.test or ()),
        }

    def resume(self, saved: Checkpoint) -> None:
        """Restores the state after the last saved round, and reports its results."""
        self.pruner, self.masks, rows, evaluations = saved.load(self.model)
        self._progress(self.plan.pruning.rewind_to)
        for row in rows:
            for evaluation in evaluations:
                if (evaluation["round"], evaluation["arm"]) == (row["round"], row["arm"]):
                    self._report_evaluation(evaluation)
            ml.set_masks(self.model, self.masks[row["round"]])
            self._report_row(row)
            self._progress(self.plan.steps_after_rewinding)
        _logger.info("Resuming after round %d.", self.round)

    def save(self, saved: Checkpoint | None) -> None:
        """Records the trained weights, and writes the state after this round."""
        self.pruner.set_pretrained_weights()
        if saved is not None:
            saved.prepare()
        if self.trained is not None:
            self.trained.keep(self.model, self.round, self.masks[-1])
        if saved is not None:
            saved.save(self.pruner, self.round, self.rows, self.evaluations)

    def dense(self) -> None:
        """Trains the dense model, and records the rewinding point on the way."""
        self.masks.append(ml.get_masks(self.model))
        point = self.plan.pruning.rewind_to
        before = train_to_rewinding_point(
            self.model,
            self.examples,
            dataclasses.replace(self.plan.training, steps=point),
            self.validation,
            self._listeners("dense"),
        )
        if point:
            self.pruner.set_initial_weights()
        self._measure("dense", before)

    def run(self, saved: Checkpoint | None) -> None:
        """Executes all rounds, or those after the last saved one."""
        self.is_logged = self.is_logged or saved is not None
        if saved is not None and saved.exists():
            self.resume(saved)
        else:
            self.dense()
            self.save(saved)
        while self.round < self.plan.pruning.rounds:
            self.prune()
            for arm in self.plan.control.of_round(self.round):
                self.control(arm)
            self.ticket()
            self.save(saved)

    def prune(self) -> None:
        """Starts a round: computes new masks from the weights trained last, or initial ones."""
        if self.plan.pruning.criterion.at_initialization:
            self.pruner.rewind(optimizer=False)
        number = self.round + 1
        self._update_masks(number, randomness.integer(arms.PURPOSE, self.seed, "masks", number))
        self.masks.append(ml.get_masks(self.model))

    def control(self, arm: str) -> None:
        """Trains a control of this round, and restores the masks of the round afterwards."""
        self.pruner.treat()
        parts = (self.seed, arm, self.round)
        if arm in ("random_reinit", "reinit_same_sign"):
            self.model.set_weights(self.weights_at_0)
            arms.draw_again(self.model, parts, keep_signs=arm == "reinit_same_sign")
        else:
            ml.set_masks(self.model, self._shuffled(arm, parts))
        self._measure(arm)
        ml.set_masks(self.model, self.masks[-1])

    def _shuffled(self, arm: str, parts: arms.Parts) -> dict[str, np.ndarray]:
        pruning = self.plan.pruning
        masks = {ref.path: self.masks[-1][ref.path] for ref in ml.masked_refs(self.model)}
        if pruning.found_structure is not None:
            masks = arms.shuffled_within(
                pruning.found_structure, self.model, masks, parts, self._graph
            )
            return {**masks, **channels.left_out(self._graph, masks)}
        scope = selection.resolve_scope(pruning.criterion, pruning.scope)
        together = scope == "global" and arm == "random_mask"
        return arms.shuffled(masks, parts, together=together)

    @functools.cached_property
    def _graph(self) -> ml.ChannelFamilies | None:
        return channels.follow(self.model, self.plan.pruning.found_structure)

    def ticket(self) -> None:
        """Trains the ticket of this round, as the last arm, so that the model ends with it."""
        pruning = self.plan.pruning
        seed = randomness.integer(arms.PURPOSE, self.seed, "treatment", self.round)
        self.pruner.treat(pruning.kept_treatment, pruning.pruned_treatment, seed=seed)
        if pruning.retraining == "fine_tuning":
            optimizers.advance_schedule(self.model.optimizer, self.plan.steps_after_rewinding)
        self._measure("ticket")

    def result(self) -> TicketResult:
        """Returns the result of `find_ticket`."""
        initial_weights = [np.array(array) for array in self.pruner.initial_weights.values()]
        trained = self.trained or TrainedRounds()
        return TicketResult(self.model, initial_weights, self.masks, self.rows, trained)

    def _measure(self, arm: str, before: training.History | None = None) -> None:
        """Trains an arm of this round from the rewinding point on, and reports its results.

        Its validation history begins with the results in `before`.
        """
        point = self.plan.pruning.rewind_to
        history = train_stretch(
            self.model,
            self.examples,
            dataclasses.replace(self.plan.training, steps=self.plan.steps_after_rewinding),
            (arm, self.round, "train"),
            self.validation,
            self._listeners(arm, after=point),
        )
        history.steps = [point + step for step in history.steps]
        if before is not None:
            history.steps = before.steps + history.steps
            history.validation = before.validation + history.validation
            history.seconds += before.seconds
        row: dict[str, Any] = self._place(arm)
        row["sparsity"] = ml.sparsity_report(self.model).sparsity
        share = channels.share_left(self.model, self.plan.pruning.found_structure, self._graph)
        if share is not None:
            row["channels"] = share
        if self.data.test is not None:
            results = training.evaluate(self.model, *self.data.test)
            row |= _named("test", results)
        if history.early_stop is not None:
            row["validation_loss"] = history.validation[history.early_stop]["loss"]
            row["early_stop_step"] = history.steps[history.early_stop]
        row["seconds"] = history.seconds
        self._report_row(row)

    @property
    def seed(self) -> int:
        """Seed of everything random in the search."""
        return self.plan.seed

    def _place(self, arm: str) -> dict[str, Any]:
        return {"round": self.round, "arm": arm, "replicate": self.plan.replicate}

    def _update_masks(self, number: int, seed: int | None = None) -> None:
        pruning = self.plan.pruning
        self.pruner.update_masks(
            pruning.criterion,
            scope=pruning.scope,
            structure=pruning.structure,
            seed=seed,
            data=self.data.train,
            **pruning.amount(number),
        )

    def _listeners(self, arm: str, after: int = 0) -> training.Listeners:
        """Returns the listeners of a stretch of training that begins after `after` steps."""
        place, trained = self._place(arm), dict[str, Any]()

        def on_training(step: int, logs: dict[str, Any]) -> None:
            trained.update(_named("training", logs))
            trained["learning_rate"] = optimizers.learning_rate(self.model.optimizer)

        def on_evaluation(step: int, results: dict[str, Any]) -> None:
            validated = _named("validation", results)
            self._report_evaluation({**place, "step": after + step, **validated, **trained})

        return training.Listeners(
            on_progress=self._progress,
            on_evaluation=on_evaluation,
            on_training=on_training if self.is_logged else None,
        )

    def _progress(self, done: int) -> None:
        if self.listeners.on_progress is not None:
            self.listeners.on_progress(done)

    def _report_evaluation(self, evaluation: dict[str, Any]) -> None:
        self.evaluations.append(evaluation)
        if self.listeners.on_evaluation is not None:
            self.listeners.on_evaluation(evaluation)

    def _report_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.listeners.on_result is not None:
            self.listeners.on_result(row)


def _named(data: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns results on some data as numbers or lists of numbers, for a row."""
    return {f"{data}_{name}": np.asarray(value).tolist() for name, value in results.items()}
