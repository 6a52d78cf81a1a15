"""The steps of a search: prunes a model to a density, trains it and measures it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras

import masked_layers as ml
from lottery_ticket_pruner import (
    channels,
    optimizers,
    reconstruction,
    schedules,
    structures,
    tolerances,
    training,
)
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.checks import check_compiled
from lottery_ticket_pruner.compression import allocation, metrics, sensitivity
from lottery_ticket_pruner.compression.clock import Stopwatch
from lottery_ticket_pruner.compression.parts import Parts, sample_of
from lottery_ticket_pruner.compression.plan import Plan
from lottery_ticket_pruner.compression.states import State
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.search_plans import retraining_treatment
from lottery_ticket_pruner.stretches import train_stretch
from lottery_ticket_pruner.tolerances import Metric
from lottery_ticket_pruner.training import ArrayDataset, TrainingPlan
from lottery_ticket_pruner.variables import read, variable_scope
from masked_layers.copying import copy_model
from masked_layers.files import temporary_folder

# Epochs after each step, if they are not given: so many, or more for so many steps of training.
_EPOCHS, _STEPS = 3, 400
# An untrained model is first trained for so many times the epochs of a step.
_DENSE = 3
# Examples that outputs of layers are reconstructed from.
_SAMPLE = 512
# Reports of progress during a training.
_REPORTS = 20
# Stretches of a gradual training, between which it prunes.
_STRETCHES = 20
# Density of channels from which the lowest possible one is sought.
_LOWEST_OF_CHANNELS = 0.02


# Called with the numbers of steps of training so far and of all of them. True ends a training.
Ends: TypeAlias = Callable[[int, int], bool]


def masked_copy(model: keras.Model, coupled: bool) -> keras.Model:
    """Returns a masked copy of a compiled model, plain or masked, on the devices of the model.

    Args:
        model: The model.
        coupled: Whether channels are to be pruned.

    Raises:
        ValueError: If the model is not compiled or cannot be masked.
    """
    check_compiled(model, "prune()")
    with variable_scope(model):
        if any(ref.mask is not None for ref in ml.weight_refs(model)):
            return copy_model(model)
        return ml.convert_to_masked(model, mask_normalization=coupled)


@dataclasses.dataclass
class Workbench:
    """A masked model in the hands of a search.

    Args:
        model: The masked model, compiled, which is changed.
        parts: The data.
        plan: The plan.
        metric: The metric of the tolerance.

    Attributes:
        shares: Shares that the goals leave of what channels cost, by its name.
        scan: Rows of a scan that divide the sparsity among the weights, or None for LAMP.
        steps_trained: Steps of training since this was last set to 0.
        seconds_to_validate: Seconds of the quickest validation so far.
        seconds_to_compile: Seconds of the first validation, which compiles.
    """

    model: keras.Model
    parts: Parts
    plan: Plan
    metric: Metric

    def __post_init__(self) -> None:
        ml.sync(self.model)
        iterations = getattr(self.model.optimizer, "iterations", None)
        self.has_steps = iterations is not None and int(iterations.numpy()) > 0
        # In a model that was trained before, the schedule would be at its end.
        optimizers.rewind_schedule(self.model.optimizer)
        # Before any training, because not all models have channels that can be followed.
        structure = structures.get("channels") if self.prunes_channels else None
        self._graph = channels.follow(self.model, structure)
        self.pruner = LotteryTicketPruner(self.model)
        self.examples = ArrayDataset.of(*self.parts.train)
        self.size = ml.sparsity_report(self.model).size
        self.shares: dict[str, float] = {}
        self.scan: Sequence[Mapping[str, Any]] | None = None
        self.steps_trained = 0
        self.seconds_to_validate = math.inf
        self.seconds_to_compile = 0.0
        optimizer = self.model.optimizer
        self.decays = any(rate is None for _, rate in optimizers.read_clocks(optimizer))

    @property
    def epochs(self) -> int:
        """Epochs of training after each step."""
        if self.plan.epochs is not None:
            return self.plan.epochs
        return max(_EPOCHS, math.ceil(_STEPS / self._steps_of_epoch))

    @property
    def density(self) -> float:
        """Density of the model as it is now. That of channels is 1 at first."""
        return 1.0 if self.prunes_channels else 1 - ml.sparsity_report(self.model).sparsity

    @property
    def examples_counted(self) -> int | None:
        """Number of validation examples if the metric is an accuracy, or None."""
        counted = self.metric.higher_is_better and tolerances.accuracies_of(
            {self.metric.name: None}
        )
        return self.parts.counts()["validation"] if counted else None

    @property
    def lowest(self) -> float:
        """Density with one weight in each masked kernel."""
        return len(ml.masked_refs(self.model)) / self.size

    @property
    def prunes_channels(self) -> bool:
        """True if channels are pruned."""
        return self.plan.stages == ("channels",)

    @property
    def milliseconds(self) -> float | None:
        """Latency of the model as it is now, if its budget is one of latency."""
        measured = self.pruner.measured_latency
        return None if measured is None else measured.milliseconds

    @property
    def load(self) -> float | None:
        """Latency of the model as it is now, in the unit of its budget, if it has one."""
        measured = self.pruner.measured_latency
        return None if measured is None else measured.measured

    def within_latency(self, density: float) -> bool:
        """Returns False if a density low enough for the goal of latency was measured above it."""
        measured = self.pruner.measured_latency
        reached = "latency" in self.shares and density <= self.shares["latency"]
        return not reached or measured is None or measured.met

    def epochs_of(self, stage: str) -> int:
        """Returns the epochs of an attempt of a method."""
        return dense_epochs(self.epochs) if stage == "gradual" else self.epochs

    def macs_left(self) -> float | None:
        """Returns the share of the multiply-adds that the kept channels need, if it is known."""
        return None if self._graph is None else channels.macs_left(self.model, self._graph)

    def cost(self) -> str:
        """Returns what the density of channels is a share of: `"macs"` or `"weights"`."""
        if self.plan.goals.macs is None and self.macs_left() is None:
            return "weights"  # The input shape is not fixed.
        return self.plan.cost

    def train_dense(self, ends: Ends) -> None:
        """Trains the model with all its weights, from the start of its learning rate."""
        self.pruner.rewind()
        self._train("dense", 0, dense_epochs(self.epochs), ends)

    def seconds_to_train(self, ends: Ends) -> float | None:
        """Returns how long a training after a step takes, after training some of its steps.

        The function for training is compiled for them, which those after the steps need as well.
        None if there are too few steps to tell.

        Args:
            ends: Function as of `retrain`.
        """
        reports: list[tuple[int, Stopwatch]] = []

        def timed(done: int, steps: int) -> bool:
            reports.append((done, Stopwatch()))
            return ends(done, steps) or len(reports) == 3

        steps = self.epochs * self._steps_of_epoch
        self._restart()
        self._train_steps(("pace", 0, "prune"), steps, timed)
        if len(reports) < 3:
            return None
        _, (before, watch), (after, _) = reports
        return watch.seconds / (after - before) * steps

    def share_fitted(self) -> float:
        """Returns the share of the weights of all masked kernels that can be fitted."""
        refs = ml.masked_refs(self.model)
        fitted = [ref for ref in refs if reconstruction.product_of(ref.layer) is not None]
        return sum(ref.mask.to_numpy().size for ref in fitted) / self.size

    def prune(self, density: float, *, reconstruct: bool = False) -> None:
        """Prunes the model to a density, by the magnitude of its current weights.

        Args:
            density: Share of the weights to keep or, of channels, of `cost`.
            reconstruct: Whether the kept weights are fitted to the former outputs of their layers.

        Raises:
            ValueError: If so many channels cannot be pruned.
        """
        options = self.plan.options
        share: float | dict[str, float] = 1 - density
        if self.prunes_channels:
            self.pruner.update_masks(
                "smallest_weights",
                budget=self._budget(density),
                structure="channels",
                scope=options.scope,
                seed=options.seed,
            )
            return
        if options.scope != "layer":
            refs = ml.masked_refs(self.model)
            weights = {ref.path: read(ref.variable) for ref in refs}
            masks = {ref.path: ref.mask.to_numpy() for ref in refs}
            if self.scan is None:
                share = allocation.sparsities(weights, masks, density)
            else:
                share = sensitivity.sparsities(self.scan, masks, density)
        self.pruner.update_masks(
            "smallest_weights",
            sparsity=share,
            scope="layer",
            seed=options.seed,
            data=self._sample() if reconstruct else None,
            reconstruct=reconstruct,
            sequential=reconstruct,
        )

    def _budget(self, density: float) -> dict[str, float | Latency]:
        """Returns the budget of channels on the way to the goals: none is below its goal."""
        shares = self.shares or {self.cost(): density}
        budget: dict[str, float | Latency] = {k: max(v, density) for k, v in shares.items()}
        if "latency" in shares:
            goal = Latency.of(self.plan.goals.latency)
            between = Latency(max(shares["latency"], density), batch_size=goal.batch_size)
            budget["latency"] = goal if density <= shares["latency"] else between
        return budget

    def prune_gradually(self, density: float, number: int, ends: Ends) -> None:
        """Prunes the model to a density while it trains, in steps that become smaller.

        The first three quarters of the training prune by the polynomial of Zhu & Gupta, arXiv
        1710.01878; the last one trains what is kept.
        """
        self._restart()
        epochs = dense_epochs(self.epochs)
        steps = -(-epochs * self._steps_of_epoch // _STRETCHES)
        start = self.density
        schedule = schedules.Polynomial(1 - start, 1 - density, 0, _STRETCHES * 3 // 4)
        self._announce(number, _STRETCHES * steps)
        for stretch in range(_STRETCHES):
            self.prune(1 - schedule(stretch + 1))
            self._train_steps((f"gradual-{stretch}", number, "prune"), steps, ends)

    def _sample(self) -> tuple[training.Arrays, ...]:
        """Returns examples to reconstruct outputs of layers from."""
        return sample_of(self.examples.host, _SAMPLE)

    def retrain(self, number: int, ends: Ends) -> None:
        """Trains the model under its masks, as the plan says, for step `number`.

        Args:
            number: Number of the step.
            ends: Function that is called with the number of steps of training so far, 0 at first,
                and of all of them, and ends the training if it returns True.
        """
        self._restart()
        if not ends(0, self.epochs * self._steps_of_epoch):
            self._train("pruned", number, self.epochs, ends)

    @property
    def shows_weights(self) -> bool:
        """True if the weights in the middle of a training are those that it would end with."""
        optimizer = self.model.optimizer
        of_keras = type(optimizer).finalize_variable_values
        own = of_keras is not keras.optimizers.Optimizer.finalize_variable_values
        return not own and not getattr(optimizer, "use_ema", False)

    @property
    def _steps_of_epoch(self) -> int:
        return -(-len(self.examples) // self.plan.options.batch_size)

    def _restart(self) -> None:
        """Resets the optimizer and, by the kind of retraining, the weights."""
        self.pruner.set_pretrained_weights()
        self.pruner.treat(retraining_treatment(self.plan.options.retraining, "rewind"))

    def _train(self, arm: str, number: int, epochs: int, ends: Ends) -> None:
        steps = epochs * self._steps_of_epoch
        self._announce(number, steps)
        self._train_steps((arm, number, "prune"), steps, ends)

    def _announce(self, number: int, steps: int) -> None:
        if self.plan.options.on_training is not None:
            row = {"step": number, "sparsity": ml.sparsity_report(self.model).sparsity}
            self.plan.options.on_training(row, steps)

    def _train_steps(self, stretch: tuple[str, int, str], steps: int, ends: Ends) -> None:
        options = self.plan.options

        def on_progress(done: int) -> None:
            self.steps_trained += done
            if options.on_progress is not None:
                options.on_progress(done)

        plan = TrainingPlan(
            steps=steps,
            batch_size=options.batch_size,
            seed=options.seed,
            eval_every=max(1, steps // _REPORTS),  # Without data to evaluate on, only reports.
        )
        listeners = training.Listeners(on_progress=on_progress, ends=lambda done: ends(done, steps))
        train_stretch(self.model, self.examples, plan, stretch, None, listeners)

    def validate(self) -> float:
        """Returns the metric on the validation data."""
        started = time.perf_counter()
        value = self.metric.of(self.model, self.parts.validation)
        seconds = time.perf_counter() - started
        self.seconds_to_validate = min(self.seconds_to_validate, seconds)
        return value

    def seconds_to_compare(self) -> float:
        """Returns how long the comparison on the test data probably takes, after a validation."""
        counts = self.parts.counts()
        share = max(counts["test"] / counts["validation"], 1.0)
        passes = metrics.seconds_of_comparison(self.metric, self.seconds_to_validate, share)
        return passes + 2 * self.seconds_to_compile

    def reset_optimizer(self) -> None:
        """Resets the optimizer to the beginning of a training.

        Otherwise it would depend on the last attempt, which a resumed search has not made.
        """
        model, optimizer = self.model, self.model.optimizer
        with variable_scope(model):
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            fresh = optimizers.unbuilt_copy(optimizer)
            # Raised for layers that were frozen after `compile`, where nothing was trained.
            with contextlib.suppress(ValueError):
                optimizers.reset_optimizer(optimizer, fresh, model.trainable_variables)

    def finished(self) -> keras.Model:
        """Returns the model as it is now for its user: masked, or without its pruned channels."""
        if not self.prunes_channels:
            return self.model
        smaller, _ = ml.shrink(self.model, return_report=True)
        return smaller

    def served_size(self) -> int:
        """Returns the bytes of the model as it is now as a sparse SavedModel."""
        return served_size(self.finished())

    def lowest_of_channels(self, dense: State) -> float:
        """Returns a density near the lowest one that the channels of the model allow.

        Raises:
            ValueError: If no channels can be pruned.
        """
        density = _LOWEST_OF_CHANNELS
        while True:
            dense.restore(self.model)
            try:
                self.prune(density)
            except ValueError:  # Every family keeps some channels.
                if density * 1.2 >= 1:
                    raise
                density *= 1.2
            else:
                return density

    def size_at(self, density: float, dense: State) -> int:
        """Returns the bytes of the dense model pruned to a density, as a sparse SavedModel."""
        dense.restore(self.model)
        self.prune(density)
        return self.served_size()


def dense_epochs(epochs: int) -> int:
    """Returns the epochs of a model that is not trained, given those of a step."""
    return _DENSE * epochs


def served_size(model: keras.Model) -> int:
    """Returns the bytes of the folder that `export_sparse_saved_model` writes.

    Raises:
        ImportError: If TensorFlow is missing.
    """
    with temporary_folder() as folder:
        return ml.export_sparse_saved_model(model, folder / "served").disk_nbytes
