"""Finds the smallest model that is good enough."""

import importlib.util
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

import masked_layers as ml
from lottery_ticket_pruner import _keras, finite_data, notices, targets, tolerances, training
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.compression import metrics, steps
from lottery_ticket_pruner.compression.attempts import Search
from lottery_ticket_pruner.compression.clock import Clock
from lottery_ticket_pruner.compression.parts import Parts, parts_of
from lottery_ticket_pruner.compression.plan import DEFAULT_DROP, Goals, Options, Plan
from lottery_ticket_pruner.compression.result import PruneResult
from lottery_ticket_pruner.compression.states import Progress
from lottery_ticket_pruner.compression.steps import Workbench
from lottery_ticket_pruner.fingerprints import description, digest, layers


def prune(
    model: keras.Model,
    data: Any,
    max_drop: float | None = None,
    *,
    sparsity: float | None = None,
    size: int | None = None,
    macs: float | None = None,
    latency: float | Latency | None = None,
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

    If `sparsity`, `size`, `macs` or `latency` are given, the search ends with the first model that
    meets all of them, and `max_drop` is a condition only if it is given too. Otherwise it looks for
    the smallest model within `max_drop`.

    The methods:

    - `"one_shot"` prunes by magnitude without any training, and fits the kept weights of each layer
      to the layer's former outputs on 512 training examples.
    - `"iterative"` trains after each step. A trained model keeps its weights, and the learning
      rate starts from the beginning (learning-rate rewinding, Renda et al., arXiv 2003.02389).
    - `"gradual"` prunes the dense model while it trains, for three times the epochs (Zhu & Gupta,
      arXiv 1710.01878). To a sparsity or a size, this is a single training.
    - `"channels"` prunes whole channels, trains after each step, and removes them at the end, which
      also makes the model faster.
    - `"auto"` tries what is cheap first: magnitude alone; a scan of how much each layer may lose,
      which divides the sparsity among the layers if that loses less; `"one_shot"`; and from the
      best of these on `"iterative"`. Without a tolerance it is `"iterative"`, and with `macs` or
      `latency` it is `"channels"`.

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
        latency: Share of the latency of the dense model on this machine that may be left, or a
            `Latency`, such as `Latency(milliseconds=3)`.
        method: One of the methods above.
        metric: Name of a metric, as in the results of `evaluate`. None for the first accuracy, or
            the loss if there is none.
        epochs: Epochs of training after each step, at most: with `max_drop`, a training ends when
            the drop is at most half of it, or does not come near it. None for three, or as many as
            400 steps take.
        minutes: Time to spend on everything. The search ends before a step that would probably
            exceed it, and ends a step that does. Until then, it goes on to finer steps than
            without this argument.
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
        goals=Goals(max_drop=max_drop, sparsity=sparsity, size=size, macs=macs, latency=latency),
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
    started: float | None = None,
    reserve: float = 0.0,
) -> PruneResult:
    """Finds a model like `prune`, with the arguments as a plan.

    Args:
        model: A compiled model.
        parts: The data.
        plan: The plan.
        folder: Folder for the state after each step, or None.
        overwrite: Whether to remove the state of an earlier search in the folder.
        started: Value of `time.perf_counter` from which the time to spend counts. None for now.
        reserve: Seconds of that time that are needed after the search.
    """
    started = time.perf_counter() if started is None else started
    masked = steps.masked_copy(model, coupled=plan.stages == ("channels",))
    targets.check(masked, *parts.train)
    for name in parts.counts():
        part = getattr(parts, name)
        split = ", as it was split off by a permutation," if name in parts.permuted else ""
        described = f"part {name!r} of the data{split}"
        finite_data.check(masked, described, part, trained=name == "train")
    before = time.perf_counter()
    results = training.evaluate(masked, *parts.validation)
    compiling = time.perf_counter() - before
    metric = tolerances.metric_of(results, masked, plan.metric, plan.options.mode)
    tolerances.check_tolerance(metric, results, plan.goals.tolerance)
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
    bench.seconds_to_compile = compiling
    path = None if folder is None else Path(folder)
    with Progress(path, arguments, overwrite=overwrite) as progress:
        notes = _notes_of_metric(plan, metric, results)
        few = metrics.warning_of_few(metric, masked, parts.validation, plan.goals.tolerance)
        if few is not None:
            notices.warn(few)
            notes.append(few)
        return Search(bench, progress, notes, Clock(started, plan.minutes, reserve)).run()


def _notes_of_metric(
    plan: Plan, metric: tolerances.Metric, results: Mapping[str, Any]
) -> list[str]:
    """Returns a note if the metric was chosen among several."""
    several = tolerances.accuracies_of(results)
    if plan.metric is not None or len(several) < 2:
        return []
    return [f"The metric is {metric.name!r}, the first of {', '.join(map(repr, several))}."]
