"""Finds the smallest model that is good enough."""

import dataclasses
import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

import masked_layers as ml
from lottery_ticket_pruner import _keras, notices, targets, training
from lottery_ticket_pruner.compression import metrics, steps
from lottery_ticket_pruner.compression.ladder import Attempt, Ladder, density_of_size
from lottery_ticket_pruner.compression.parts import Parts, parts_of
from lottery_ticket_pruner.compression.plan import DEFAULT_DROP, Goals, Options, Plan
from lottery_ticket_pruner.compression.result import PruneResult
from lottery_ticket_pruner.compression.states import Progress, State
from lottery_ticket_pruner.compression.steps import Workbench
from lottery_ticket_pruner.compression.training_state import is_trained
from lottery_ticket_pruner.fingerprints import description, digest, layers

_logger = logging.getLogger(__name__)

# Ratio of two densities at which a search ends. Attempts without training are cheap.
_PRECISION = {"one_shot": 1.1}
_PRECISION_OF_TRAINING = 1.2
# Times that a model above the size is pruned a little further.
_TIGHTENED = 4


def prune(
    model: keras.Model,
    data: Any,
    max_drop: float | None = None,
    *,
    sparsity: float | None = None,
    size: int | None = None,
    macs: float | None = None,
    method: str = "auto",
    metric: str | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> PruneResult:
    """Finds the smallest model whose metric drops by at most `max_drop`.

    The search prunes in large steps, each from the last model that was good enough on the
    validation data. After the first model that is not, it tries densities (shares of weights that
    are kept) in the middle between the two. The dense model and the result are compared on the
    test data once, at the end.

    If `sparsity`, `size` or `macs` are given, the search ends with the first model that meets all
    of them, and `max_drop` is a condition only if it is given too. Otherwise it looks for the
    smallest model within `max_drop`.

    The methods:

    - `"one_shot"` prunes by magnitude without any training, and fits the kept weights of each layer
      to the layer's former outputs on 512 training examples, which takes longer than training for
      some models.
    - `"iterative"` trains after each step. A trained model keeps its weights, and the learning
      rate starts anew (learning-rate rewinding, Renda et al., arXiv 2003.02389).
    - `"channels"` prunes whole channels, trains after each step, and removes them at the end, which
      also makes the model faster.
    - `"auto"` prunes without training first, and without fitting, and continues from its best model
      iteratively. With `macs` it prunes channels.

    A model that is not trained is trained first, for three times the epochs of a step.

    Args:
        model: A compiled model, plain or masked, trained or not. It is not changed.
        data: `(x, y)`; `((x_train, y_train), (x_test, y_test))`; three pairs for training,
            validation and test; or one to three data sets of batches instead of pairs. Parts that
            are missing are split off, always in the same way, and the result says so. Several
            inputs are a list or dict of arrays.
        max_drop: How much worse the metric may become on the validation data, in its own unit:
            0.01 is one point of accuracy. This is also the default if no goal is given, except for
            losses and errors, which need a number.
        sparsity: Share of the weights of all masked kernels to prune.
        size: Bytes that a sparse SavedModel of the model may take. Needs TensorFlow.
        macs: Share of the multiply-adds that may be left.
        method: One of the methods above.
        metric: Name of a metric, as in the results of `evaluate`. None for the first accuracy, or
            the loss if there is none.
        epochs: Epochs of training after each step. None for three, or as many as 400 steps take.
        minutes: Time to spend. The search ends before a step that would probably exceed it.
        folder: Folder for the state after each step. A search with the same arguments that was
            interrupted is resumed there, with the same result.
        **options: Further options, see `compression.plan.Options`: `mode`, `rate`, `scope`,
            `retraining`, `batch_size`, `seed`, `trained`, `on_row`, `on_training`, `on_progress`.

    Returns:
        The result. If no model meets the goals, its `conclusion` says what came nearest.

    Warns:
        UserWarning: If the validation data has too few examples for `max_drop` of an accuracy.

    Raises:
        ImportError: If SciPy is missing, or TensorFlow for a goal of `size`.
        TypeError: If an option has another name.
        ValueError: If the model is not compiled or has nothing to prune, an argument is out of
            range or missing, goals contradict each other, the data has another form or does not
            fit the model, or the folder holds another search.
        OSError: If the folder is in use or cannot be written.

    Example:
    ```python
    result = lottery_ticket_pruner.prune(model, ((x_train, y_train), (x_test, y_test)), 0.01)
    print(result)
    result.save("pruned")
    ```
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(
            "`prune` needs SciPy for its confidence intervals: pip install "
            '"lottery-ticket-pruner[cli]"'
        )
    plan = Plan(
        goals=Goals(max_drop=max_drop, sparsity=sparsity, size=size, macs=macs),
        options=Options.of(options),
        method=method,
        metric=metric,
        epochs=epochs,
        minutes=minutes,
    )
    return search(model, parts_of(data), plan, folder)


def search(
    model: keras.Model,
    parts: Parts,
    plan: Plan,
    folder: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> PruneResult:
    """Finds a model like `prune`, with the arguments as a plan.

    Args:
        model: A compiled model.
        parts: The data.
        plan: The plan.
        folder: Folder for the state after each step, or None.
        overwrite: Whether to remove the state of an earlier search in the folder.
    """
    masked = steps.masked_copy(model, coupled=plan.stages == ("channels",))
    targets.check(masked, *parts.train)
    results = training.evaluate(masked, *parts.validation)
    metric = metrics.metric_of(results, masked, plan.metric, plan.options.mode)
    if plan.goals == Goals() and not metric.higher_is_better:
        raise ValueError(
            f"`max_drop` is missing: its default of {DEFAULT_DROP} is one point of accuracy, but "
            f"the metric is {metric.name!r}, whose value is now {results[metric.name]:.4g}. Pass "
            "by how much it may rise, or another goal."
        )
    arguments = plan.arguments() | {
        "optimizer": description(masked.optimizer),
        "loss": description(masked.loss),
        "metrics": description(_keras.compile_arguments(masked)[2:5]),
        "layers": layers(masked),
        "weights": digest(list(masked.get_weights())),
        "masks": digest(ml.get_masks(masked)),
        "data": digest([parts.train, parts.validation, parts.test]),
    }
    bench = Workbench(masked, parts, plan, metric)
    path = None if folder is None else Path(folder)
    with Progress(path, arguments, overwrite=overwrite) as progress:
        notes = _notes_of_metric(plan, metric, results)
        few = metrics.warning_of_few(metric, masked, parts.validation, plan.goals.tolerance)
        if few is not None:
            notices.warn(few)
            notes.append(few)
        return Search(bench, progress, notes).run()


def _notes_of_metric(plan: Plan, metric: metrics.Metric, results: Mapping[str, Any]) -> list[str]:
    """Returns a note if the metric was chosen among several."""
    several = metrics.accuracies_of(results)
    if plan.metric is not None or len(several) < 2:
        return []
    return [f"The metric is {metric.name!r}, the first of {', '.join(map(repr, several))}."]


@dataclasses.dataclass
class Search:
    """A running search.

    Args:
        bench: The model, the data and the plan.
        progress: What was found so far.
        notes: Sentences for the result.
    """

    bench: Workbench
    progress: Progress
    notes: list[str]

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        self._before = sum(row["seconds"] for row in self.progress.rows)
        self._out_of_time = False

    @property
    def _plan(self) -> Plan:
        return self.bench.plan

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return self.progress.rows

    def run(self) -> PruneResult:
        """Executes the search, or the rest of it, and returns the result."""
        for row in self._rows:  # Those of an interrupted search.
            self._tell(row)
        if not self._rows:
            self._begin()
        for stage in self._plan.stages:
            if not self._out_of_time:
                self._climb(stage)
        return self._conclude()

    def _begin(self) -> None:
        """Trains the dense model if necessary, measures it, and finds the density of the goals."""
        started = time.perf_counter()
        bench, options = self.bench, self._plan.options
        trained = options.trained
        if trained is None:
            trained = bench.has_steps or is_trained(bench.model, bench.parts.train)
        if options.retraining == "weight_rewinding" and trained:
            raise ValueError(
                "Weights of a trained model cannot be rewound to their initial values, which are "
                'not known: use retraining="learning_rate_rewinding", or pass the untrained model.'
            )
        if not trained:
            bench.train_dense()
        dense = State.of(bench.model)
        value = bench.validate()
        self.progress.keep("0", dense)
        self.progress.facts |= {
            "trained": trained,
            "target": self._target(dense),
            "dense": "0",
            "best": "0",
        }
        self._record("dense", bench.density, value, started)

    def _target(self, dense: State) -> float | None:
        """Returns the density at which the goals other than the drop are met, or None."""
        goals = self._plan.goals
        found = [] if goals.sparsity is None else [1 - goals.sparsity]
        found += [] if goals.macs is None else [goals.macs]
        if goals.size is not None:
            bench = self.bench
            lowest = bench.lowest_of_channels(dense) if bench.prunes_channels else bench.lowest
            of_size = density_of_size(
                lambda density: bench.size_at(density, dense), goals.size, lowest
            )
            dense.restore(bench.model)
            if of_size is None:
                raise ValueError(
                    f"No sparsity makes the served folder of {bench.model.name} as small as "
                    f"{goals.size:,} bytes: with a density of {lowest:.2g} it takes "
                    f"{bench.size_at(lowest, dense):,}, most of them for the graph."
                )
            found.append(of_size[0])
        return min(found, default=None)

    def _climb(self, stage: str) -> None:
        """Executes the attempts of a method."""
        for _ in range(_TIGHTENED):
            ladder = self._ladder(stage)
            while (density := ladder.following(self._tried(stage))) is not None:
                if self._is_late(stage):
                    self._out_of_time = True
                    return
                self._attempt(stage, density)
            if not self._tighten(ladder.best(self._tried(stage))):
                return

    def _ladder(self, stage: str) -> Ladder:
        stages = self._plan.stages
        earlier = ("dense", *stages[: stages.index(stage)])
        rows = [row for row in self._rows if row["method"] in earlier and row["accepted"]]
        return Ladder(
            rate=self._plan.options.rate,
            precision=_PRECISION.get(stage, _PRECISION_OF_TRAINING),
            target=self.progress.facts["target"],
            lowest=self.bench.lowest,
            start=min(row["density"] for row in rows),
            size=None if self.bench.prunes_channels else self.bench.size,
        )

    def _tried(self, stage: str) -> list[Attempt]:
        return [
            Attempt(row["density"], row["accepted"]) for row in self._rows if row["method"] == stage
        ]

    def _attempt(self, stage: str, density: float) -> None:
        """Prunes the best model so far to a density, trains and measures it."""
        started, number = time.perf_counter(), len(self._rows)
        bench, facts = self.bench, self.progress.facts
        base = facts["dense"] if stage == "one_shot" else facts["best"]
        self.progress.state(base).restore(bench.model)
        try:
            bench.prune(density, reconstruct=self._plan.method == "one_shot")
        except ValueError as error:
            if not bench.prunes_channels:
                raise
            self._record(stage, density, None, started, note=str(error))
            return
        if stage != "one_shot":
            bench.retrain(number)
        value = bench.validate()
        if self._plan.goals.accepts(self._drop(value)):
            self.progress.keep(str(number), State.of(bench.model))
            facts["best"] = str(number)
        self._record(stage, density, value, started)

    def _tighten(self, best: float) -> bool:
        """Lowers the target if a model that reached it is above the size, and says whether."""
        size, target = self._plan.goals.size, self.progress.facts["target"]
        if size is None or target is None or best > target:
            return False
        self.progress.state(self.progress.facts["best"]).restore(self.bench.model)
        served = self.bench.served_size()
        if served <= size:
            return False
        self.progress.facts["target"] = best * size / served * 0.99
        return True

    def _record(
        self, method: str, density: float, value: float | None, started: float, note: str = ""
    ) -> None:
        drop = None
        if value is not None:
            drop = self._drop(value) if self._rows else 0.0
        row = {
            "step": len(self._rows),
            "method": method,
            "density": density,
            "sparsity": ml.sparsity_report(self.bench.model).sparsity,
            "macs": self.bench.macs_left(),
            "validation": value,
            "drop": drop,
            "accepted": drop is not None and (not self._rows or self._plan.goals.accepts(drop)),
            "seconds": time.perf_counter() - started,
            "note": note,
        }
        self._rows.append(row)
        self.progress.write()
        self._tell(row)

    def _drop(self, value: float) -> float:
        return self.bench.metric.drop(self._rows[0]["validation"], value)

    def _tell(self, row: dict[str, Any]) -> None:
        _logger.info("%s", row)
        if self._plan.options.on_row is not None:
            self._plan.options.on_row(row)

    def _is_late(self, stage: str) -> bool:
        """Returns whether the next attempt would probably exceed the time."""
        if self._plan.minutes is None:
            return False
        seconds = [row["seconds"] for row in self._rows if row["method"] == stage]
        spent = self._before + time.perf_counter() - self._started
        return spent + max(seconds, default=0.0) > 60 * self._plan.minutes

    def _conclude(self) -> PruneResult:
        """Compares the best model with the dense one on the test data."""
        bench, facts, rows = self.bench, self.progress.facts, self._rows
        test = bench.parts.test
        self.progress.state(facts["dense"]).restore(bench.model)
        dense = metrics.Outcome.of(bench.metric, bench.model, test)
        self.progress.state(facts["best"]).restore(bench.model)
        model = bench.finished()
        pruned = metrics.Outcome.of(bench.metric, model, test)
        comparison = metrics.compare(bench.metric, dense, pruned, bench.parts.counts()["test"])
        best = rows[int(facts["best"])]
        meets = self._meets(best)
        sentences = [self._conclusion(best, meets)]
        if facts["best"] != facts["dense"]:
            sentences.append(verdict(self._plan.goals, comparison))
        return PruneResult(
            model=model,
            rows=[{k: v for k, v in row.items() if k != "density"} for row in rows],
            test=comparison,
            sparsity=best["sparsity"],
            higher_is_better=bench.metric.higher_is_better,
            tolerance=self._plan.goals.tolerance,
            meets_goals=meets,
            conclusion=" ".join(filter(None, sentences)),
            notes=self._notes(),
        )

    def _meets(self, best: dict[str, Any]) -> bool:
        target = self.progress.facts["target"]
        if target is None:
            return best["method"] != "dense"
        return bool(best["density"] <= self._ladder(self._plan.stages[-1]).rounded(target))

    def _conclusion(self, best: dict[str, Any], meets: bool) -> str:
        goals, metric = self._plan.goals, self.bench.metric.name
        found = f"{best['sparsity']:.2%} of the weights are pruned"
        if best["macs"] is not None:
            found += f", {best['macs']:.2%} of the multiply-adds are left"
        drop = f"a drop of {best['drop']:+.4f} in validation {metric}"
        text = f"{found}, with {drop}."
        if not meets:
            rest = [row for row in self._rows if not row["accepted"] and row["drop"] is not None]
            what = (
                "The nearest" if goals.tolerance is None else f"Within max_drop={goals.tolerance}"
            )
            text = f"No model meets the goals. {what}: {text}"
            if rest:
                near = min(rest, key=lambda row: row["drop"])
                text += (
                    f" The nearest beyond: {near['sparsity']:.2%} pruned, with a drop of "
                    f"{near['drop']:+.4f} ({near['method'].replace('_', ' ')})."
                )
        if self._out_of_time:
            text += f" The search ended early, because of minutes={self._plan.minutes}."
        return text

    def _notes(self) -> tuple[str, ...]:
        bench, plan = self.bench, self._plan
        notes = [*bench.parts.notes, *self.notes]
        if self.progress.facts["trained"]:
            notes.append("The model was trained already, and is compared as it was.")
        else:
            notes.append(
                f"The model was not trained. It was trained for {steps.dense_epochs(bench.epochs)} "
                "epochs first."
            )
        if plan.stages != ("one_shot",):
            how = plan.options.retraining.replace("_", " ")
            notes.append(f"Each step trained for {bench.epochs} epochs ({how}).")
        gain = -min((row["drop"] for row in self._rows if row["drop"] is not None), default=0.0)
        if gain > (plan.goals.tolerance or 0.0) and gain > 0:
            notes.append(
                f"A pruned model was better than the dense one by {gain:.4f} on the validation "
                "data. Unless this is chance, the dense model was not trained to the end, so part "
                "of what pruning costs is hidden by training on."
            )
        return tuple(notes)


def verdict(goals: Goals, test: metrics.Comparison) -> str:
    """Returns what the comparison on the test data says about the tolerance, if there is one."""
    if goals.tolerance is None:
        return ""
    where = "within" if goals.accepts(test.drop) else "above"
    found = f"On the test data the drop is {test.drop:+.4f}, {where} {goals.tolerance}"
    if test.interval is None:
        return f"{found} ({test.method})."
    low, high = test.interval
    if goals.accepts(high) or not goals.accepts(low):
        return f"{found}, and so is its whole 95 % interval."
    return (
        f"{found}, but {test.examples:,} examples leave open whether it really is: the 95 % "
        f"interval is {low:+.4f} to {high:+.4f}."
    )
