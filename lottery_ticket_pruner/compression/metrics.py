"""Two models compared by a metric at the end of a search, and whether examples suffice for it."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import training
from lottery_ticket_pruner.tolerances import Metric, is_within, metric_of
from lottery_ticket_pruner.training import Arrays, map_arrays
from lottery_ticket_pruner.wording import DropText, points
from masked_layers import randomness

# Groups of examples whose results are compared if a metric has no result for each example.
_GROUPS = 200
# Fewer groups are too few for a bootstrap.
FEWEST_GROUPS = 20
# Seconds that the evaluation of a group takes at most, besides its share of all examples.
_SMALL = 0.02
_ACCURACIES = ("accuracy", "acc", "categorical_accuracy", "sparse_categorical_accuracy")
_BINARY = (*_ACCURACIES[:2], "binary_accuracy")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The metric of the dense and of the pruned model on the test data.

    Attributes:
        metric: Name of the metric.
        dense: Its value for the dense model.
        pruned: Its value for the pruned model.
        drop: How much worse the pruned model is; negative if it is better.
        interval: The 95 % confidence interval of the drop over samples of test examples, or None.
        method: How the interval was computed, or why there is none.
        examples: Number of test examples.
        worse: Indices of the test examples that only the dense model gets right. Empty if the
            metric does not count examples.
        better: Indices of those that only the pruned model gets right.
    """

    metric: str
    dense: float
    pruned: float
    drop: float
    interval: tuple[float, float] | None
    method: str
    examples: int
    worse: tuple[int, ...] = ()
    better: tuple[int, ...] = ()

    def __str__(self) -> str:
        told = self.told
        text = f"{self.metric} {self.dense:.4f} -> {self.pruned:.4f}, drop {told.text(self.drop)}"
        if self.interval is None:
            return f"{text} ({self.method})"
        interval = told.interval(*self.interval)
        return f"{text} (95 % interval {interval}, {self.examples} examples)"

    @property
    def told(self) -> DropText:
        """The form in which drops are printed."""
        return DropText.of(self.metric, self.dense)


def warning_of_few(
    metric: Metric, model: keras.Model, pair: tuple[Arrays, Arrays], tolerance: float | None
) -> str | None:
    """Returns a warning if chance alone can hide a drop of an accuracy above the tolerance.

    If the accuracy drops by d, at least a share d of the examples becomes wrong. The standard error
    of the measured drop of n examples is thus at least `sqrt(d * (1 - d) / n)`. There is a warning
    if a tolerance is below two of these.

    Args:
        metric: The metric of the tolerance.
        model: A model that it is measured of.
        pair: The inputs and targets that decide.
        tolerance: The acceptable drop, or None.
    """
    examples = _length(pair)
    if tolerance is None or not 0 < tolerance < 1 or is_correct(metric, model, pair) is None:
        return None
    least = math.ceil(4 * (1 - tolerance) / tolerance)
    if examples >= least:
        return None
    error = math.sqrt(tolerance * (1 - tolerance) / examples)
    several = examples > 1
    what = f"One of the {examples:,} validation examples" if several else "The validation example"
    return (
        f"{what} is worth {points(1 / examples, '.2g')} of "
        f"{metric.name}. A drop of {points(tolerance)} that is measured on them has a standard "
        f"error of {points(error, '.2g')} or more, so the model that is accepted may really be "
        f"worse. Hold out at least {least:,} examples for this tolerance, and judge by the test "
        "data."
    )


def warning_of_constant(metric: Metric, dense: float, y: Arrays, tolerance: float) -> str | None:
    """Returns a warning if a tolerance accepts a model that ignores its inputs.

    Args:
        metric: The metric of the tolerance.
        dense: Its value for the dense model.
        y: The targets that decide.
        tolerance: The acceptable drop.
    """
    classes = _classes(y) if metric.name in (*_ACCURACIES, *_BINARY) else None
    if classes is None or not metric.higher_is_better:
        return None
    share = float(np.unique(classes, return_counts=True)[1].max() / len(classes))
    if not is_within(dense - share, tolerance, dense):
        return None
    limit = DropText.of(metric.name, dense).limit(tolerance)
    return (
        f"Always predicting the most frequent class has a validation {metric.name} of {share:.4g}. "
        f"The dense model has {dense:.4g}, so a drop of {limit} accepts a model that ignores its "
        "inputs. Train the dense model longer, look for a mistake in the data or the labels, or "
        "allow a smaller drop."
    )


def _classes(y: Arrays) -> np.ndarray | None:
    """Returns the class of each example, or None if targets are not one class for each."""
    if not isinstance(y, np.ndarray):
        return None
    if y.size == len(y):
        return y.reshape(-1)
    return y.argmax(-1) if y.ndim == 2 and np.all(y.sum(-1) == 1) else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a model on test data.

    Attributes:
        value: The metric over all examples.
        correct: Whether each example is correct, if the metric is the share of these, or None.
        groups: The metric of each group of examples. Empty unless `correct` is None.
    """

    value: float
    correct: np.ndarray | None
    groups: np.ndarray

    @classmethod
    def of(cls, metric: Metric, model: keras.Model, pair: tuple[Arrays, Arrays]) -> "Outcome":
        """Measures a model on data."""
        value = metric.of(model, pair)
        correct = is_correct(metric, model, pair)
        # Custom metrics may have the name of another one.
        if correct is not None and abs(float(correct.mean()) - value) < 1e-5:
            return cls(value, correct, np.zeros(0))
        groups = _groups(_length(pair))
        data = training.ArrayDataset.of(*_taken(pair, np.concatenate(groups)))
        results = training.engine_of(model).evaluate_groups(data, len(groups[0]))
        return cls(value, None, np.array([float(result[metric.name]) for result in results]))


def seconds_of_comparison(metric: Metric, seconds: float, share: float) -> float:
    """Returns how long two outcomes on test data probably take, without compilation.

    Args:
        metric: The metric.
        seconds: Seconds of an evaluation of the validation data.
        share: Number of test examples, divided by that of the validation data.
    """
    groups = 0 if metric.name in _ACCURACIES else _GROUPS
    # An evaluation, a prediction and, at worst, another one in groups, none of which takes longer.
    return 2 * (3 * share * seconds + groups * min(seconds, _SMALL))


def compare(metric: Metric, dense: Outcome, pruned: Outcome, examples: int) -> Comparison:
    """Compares the outcomes of two models, with a confidence interval of the difference.

    An accuracy is compared example by example, another mean over examples by a bootstrap over at
    most 200 groups of examples. For metrics that are not means, such as AUC, there is no interval,
    nor for fewer than 20 groups, or if all differ alike.
    """
    from lottery_ticket_pruner.compression import intervals  # Needs SciPy.

    drop = metric.drop(dense.value, pruned.value)
    interval: tuple[float, float] | None = None
    worse: tuple[int, ...] = ()
    better: tuple[int, ...] = ()
    if dense.correct is not None and pruned.correct is not None:
        interval = intervals.of_paired_shares(dense.correct, pruned.correct)
        method = "Newcombe's interval of paired shares"
        worse = tuple(np.flatnonzero(dense.correct & ~pruned.correct).tolist())
        better = tuple(np.flatnonzero(~dense.correct & pruned.correct).tolist())
    elif _is_mean(dense) and _is_mean(pruned):
        pairs = zip(dense.groups, pruned.groups, strict=True)
        differences = np.array([metric.drop(*pair) for pair in pairs])
        if len(differences) < FEWEST_GROUPS:
            method = f"no interval: {len(differences)} groups of examples are too few"
        elif is_within(float(np.ptp(differences)), 0.0, dense.value):
            # A bootstrap would claim to know it exactly.
            method = f"no interval: the drop is the same in all {len(differences)} groups"
        else:
            interval = intervals.of_mean(differences)
            method = f"bootstrap over {len(differences)} groups of examples"
    else:
        method = f"no interval: {metric.name} is not a mean over examples"
    values = dense.value, pruned.value
    return Comparison(metric.name, *values, drop, interval, method, examples, worse, better)


def compare_models(
    dense: keras.Model,
    pruned: keras.Model,
    pair: tuple[Arrays, Arrays],
    metric: str | None = None,
    mode: str = "auto",
) -> Comparison:
    """Compares two compiled models by a metric of the first one.

    Args:
        dense: A compiled model.
        pruned: Another one, compiled alike.
        pair: Inputs and targets that neither has seen.
        metric: Its name, as for `prune`.
        mode: Its direction, as for `prune`.
    """
    of_dense = metric_of(training.evaluate(dense, *pair), dense, metric, mode)
    first, second = (Outcome.of(of_dense, model, pair) for model in (dense, pruned))
    return compare(of_dense, first, second, _length(pair))


def _is_mean(outcome: Outcome) -> bool:
    groups = outcome.groups
    return len(groups) > 0 and bool(np.isclose(groups.mean(), outcome.value, rtol=0.02, atol=1e-6))


def is_correct(
    metric: Metric, model: keras.Model, pair: tuple[Arrays, Arrays]
) -> np.ndarray | None:
    """Returns which examples a classifier gets right, or None if the metric does not say so."""
    if not metric.higher_is_better or not isinstance(pair[1], np.ndarray):
        return None
    if metric.name not in (*_ACCURACIES, *_BINARY):
        return None
    outputs = np.asarray(model.predict(pair[0], verbose=0, batch_size=256))
    labels = pair[1].reshape(-1) if pair[1].size == len(pair[1]) else pair[1]
    if outputs.ndim == 2 and outputs.shape[1] > 1 and metric.name in _ACCURACIES:
        if labels.ndim == 1:
            return outputs.argmax(-1) == labels
        return outputs.argmax(-1) == labels.argmax(-1) if labels.ndim == 2 else None
    if outputs.size == len(labels) == labels.size and metric.name in _BINARY:
        return (outputs.reshape(-1) > 0.5) == (labels > 0.5)
    return None


def _groups(examples: int) -> list[np.ndarray]:
    """Returns the examples of groups of equal size, leaving out fewer than one group."""
    size = -(-examples // _GROUPS)
    order = randomness.stream("groups of test examples", 0).permutation(examples)
    return np.split(order[: examples // size * size], examples // size)


def _taken(arrays: Any, indices: np.ndarray) -> Any:
    return map_arrays(lambda array: array[indices], arrays)


def _length(pair: tuple[Arrays, Arrays]) -> int:
    return len(keras.tree.flatten(pair[0])[0])
