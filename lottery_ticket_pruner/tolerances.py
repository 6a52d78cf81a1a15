"""The metric that decides what is good enough: its name, its direction, and a drop of it."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import Arrays
from lottery_ticket_pruner.wording import is_accuracy, is_share

# Relative rounding error of metrics, which are computed in float32: there, 0.97 - 0.96 is
# 0.01000005.
_ROUNDING = 4 * float(np.finfo("float32").eps)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a compiled model.

    Attributes:
        name: Its name among the results of `evaluate`.
        higher_is_better: Its direction.
    """

    name: str
    higher_is_better: bool

    def of(self, model: keras.Model, pair: tuple[Arrays, Arrays]) -> float:
        """Returns its value over a whole data set."""
        return float(training.evaluate(model, *pair)[self.name])

    def drop(self, dense: float, pruned: float) -> float:
        """Returns how much worse the pruned model is; negative if it is better."""
        return dense - pruned if self.higher_is_better else pruned - dense


def is_within(drop: float, tolerance: float, dense: float) -> bool:
    """Returns whether a drop is at most the tolerance, except for rounding. NaN is not.

    Args:
        drop: How much worse a model is.
        tolerance: How much worse it may be.
        dense: The value that it is worse than.
    """
    return drop <= tolerance + _ROUNDING * (abs(dense) + abs(tolerance))


def metric_of(
    results: Mapping[str, Any], model: keras.Model, name: str | None, mode: str
) -> Metric:
    """Returns a metric by name, or by default the first accuracy, or else the loss.

    Args:
        results: Results of an evaluation of the model.
        model: The compiled model.
        name: Name of the metric, or None.
        mode: `"max"`, `"min"`, or `"auto"` for the direction that Keras' callbacks would choose.

    Raises:
        ValueError: If there is no such metric, its value is not one number, or its direction is
            unknown.
    """
    if name is None:
        name = next(iter(accuracies_of(results)), "loss")
    if name not in results:
        raise ValueError(
            f"`metric` must be one of {list(results)}, as `{model.name}` is compiled. "
            f"Received: {name!r}"
        )
    if np.ndim(results[name]):
        raise ValueError(f"`metric` must be one number, but {name!r} has several: {results[name]}.")
    return Metric(name, _is_maximized(model, name, mode))


def accuracies_of(results: Mapping[str, Any]) -> list[str]:
    """Returns the names of accuracies among the results of an evaluation."""
    return list(filter(is_accuracy, results))


def check_tolerance(metric: Metric, results: Mapping[str, Any], tolerance: float | None) -> None:
    """Raises a ValueError for a drop of an accuracy that accepts any model, however good.

    Args:
        metric: The metric of the tolerance.
        results: Results of an evaluation of the dense model.
        tolerance: The acceptable drop, or None.
    """
    if tolerance is None or tolerance < 1 or not _is_good_share(metric, results[metric.name]):
        return
    unit = "point" if tolerance == 1 else "points"
    points = f" For {tolerance:g} {unit}, give {tolerance / 100:g}." if tolerance < 100 else ""
    raise ValueError(
        f"`max_drop` of an accuracy must be below 1, because any model would be accepted. "
        f"Received: {tolerance!r}.{points}"
    )


def check_dense(metric: Metric, value: float, part: str, tolerance: float) -> None:
    """Raises a ValueError if the drop from the dense model says nothing about another model.

    Args:
        metric: The metric of the tolerance.
        value: Its value for the dense model.
        part: The data that it was measured on, such as `"test"`.
        tolerance: The acceptable drop.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"The {part} {metric.name} of the dense model is {value}, so no drop from it can be "
            f"measured. Choose another `metric`, or look for unsuitable values in the {part} data "
            "and in the weights."
        )
    if _is_good_share(metric, value) and is_within(value, tolerance, value):
        raise ValueError(
            f"The {part} {metric.name} of the dense model is {value:.4g}, and `max_drop` is "
            f"{tolerance:g}, so any model would be accepted. Train the dense model longer, look "
            "for a mistake in the data or the labels, or lower `max_drop`."
        )


def _is_good_share(metric: Metric, value: float) -> bool:
    """Returns whether a metric is an accuracy between 0, the worst value, and 1."""
    return is_share(metric.name, value) and metric.higher_is_better


def _is_maximized(model: keras.Model, name: str, mode: str) -> bool:
    """Returns whether a higher value of a metric is better, as Keras' callbacks know it."""
    if mode not in ("auto", "max", "min"):
        raise ValueError(f'`mode` must be "auto", "max" or "min". Received: {mode!r}')
    # Of several outputs, results have the name of the output in front, which callbacks do not know.
    outputs = [f"{output}_" for output in getattr(model, "output_names", None) or ()]
    names = [name, *(name.removeprefix(output) for output in outputs if name.startswith(output))]
    for known in names:
        with contextlib.suppress(ValueError):
            return _is_higher_better(model, known, mode)
    if accuracies_of({name: None}):  # Keras knows metrics only after the first step.
        return True
    raise ValueError(
        f"It is not known whether a higher {name!r} is better or worse: pass "
        f'mode="max" or mode="min".'
    )


def _is_higher_better(model: keras.Model, name: str, mode: str) -> bool:
    """Asks Keras' own callback for the better of two values."""
    monitor = f"val_{name}"
    callback = keras.callbacks.EarlyStopping(monitor, mode=mode)
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate((1.0, 2.0)):
        callback.on_epoch_end(epoch, {monitor: value})
    return bool(callback.best == 2.0)
