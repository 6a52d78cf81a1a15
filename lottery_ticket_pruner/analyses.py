"""Analyses of weights, masks and solutions, and plots of their results.

Each analysis is a function of models or arrays, followed by a `plot_` function that draws its
result (with matplotlib, from the `cli` extra). None of them changes the models it receives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import divergence, optimizers, pictures, training
from lottery_ticket_pruner.checks import check_compiled
from lottery_ticket_pruner.training import ArrayDataset, Augmentation, Listeners, TrainingPlan
from lottery_ticket_pruner.variables import read, variable_scope, widened
from masked_layers import copying

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Masks: TypeAlias = Mapping[str, np.ndarray]
# A model, or the result of its `get_weights()`.
Solution: TypeAlias = keras.Model | Sequence[np.ndarray]


# --- Between two solutions ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Interpolation:
    """Metrics along the line between two solutions.

    Attributes:
        shares: Positions on the line: 0 is the first solution, 1 the second.
        metrics: Values at these positions, as arrays by name, including the loss.
        metric: Name of the metric that `errors` and `barrier` are computed from.
    """

    shares: np.ndarray
    metrics: dict[str, np.ndarray]
    metric: str

    @property
    def errors(self) -> np.ndarray:
        """1 - accuracy, or the loss itself."""
        values = self.metrics[self.metric]
        return values if self.metric == "loss" else 1 - values

    @property
    def barrier(self) -> float:
        """Error barrier: the largest error on the line minus the mean of the errors at its ends."""
        return float(self.errors.max() - (self.errors[0] + self.errors[-1]) / 2)


def interpolate(
    model: keras.Model,
    first: Solution,
    second: Solution,
    x: training.Arrays,
    y: training.Arrays,
    *,
    points: int = 30,
    metric: str | None = None,
) -> Interpolation:
    """Evaluates a model at points on the line between two solutions, ends included.

    The weights are interpolated as the forward pass reads them: pruned weights of a masked model
    are zero (or their frozen values), and statistics count as weights. Integers are taken from the
    first solution.

    Args:
        model: A compiled model, plain or masked. A plain copy of it is evaluated.
        first: A model of the same architecture with masks of its own, or a list of weights, to
            which the masks of `model` apply.
        second: The second solution, in one of the same forms.
        x: Inputs.
        y: Targets.
        points: Number of points, at least 2.
        metric: `"loss"`, or the name of a compiled metric whose best value is 1. The default is the
            first metric with "accuracy" in its name, or the loss if there is none.

    Raises:
        ValueError: If the model is not compiled, a solution does not fit it, or an argument is
            wrong.

    Reference:
        - [Frankle et al., arXiv 1912.05671](https://arxiv.org/abs/1912.05671), section 2
    """
    _check_points(points)
    check_compiled(model, "interpolate()")
    ends = [_effective(model, solution) for solution in (first, second)]
    plain = _plain(model)
    shares = np.linspace(0.0, 1.0, points)
    rows = []
    for share in shares:
        plain.set_weights([_between(a, b, share) for a, b in zip(*ends, strict=True)])
        rows.append(training.evaluate(plain, x, y))
        _check_metric(metric, rows[0])
    metrics = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if metric is None:
        metric = next((name for name in metrics if "accuracy" in name), "loss")
    return Interpolation(shares, metrics, metric)


def plot_interpolation(lines: Interpolation | Mapping[str, Interpolation]) -> Figure:
    """Draws the error along one or several lines, with their barriers in the legend."""
    if isinstance(lines, Interpolation):
        lines = {"": lines}
    figure, axes = pictures.new_figure(5.6, 3.6)
    for number, (label, line) in enumerate(lines.items()):
        text = f"{label}, barrier {line.barrier:.3f}".removeprefix(", ")
        color, _ = pictures.look(number)
        axes.plot(line.shares, line.errors, color=color, marker=".", label=text)
    kind = "loss" if all(line.metric == "loss" for line in lines.values()) else "error"
    axes.set(xlabel="share of the second solution", ylabel=kind, ylim=(0, None))
    axes.legend(frameon=False)
    pictures.open_up(axes)
    return pictures.show_literally(figure)


def _check_metric(metric: str | None, known: Mapping[str, Any]) -> None:
    if metric is not None and metric not in known:
        raise ValueError(f"`metric` must be one of {list(known)}. Received: metric={metric!r}")


def instability(
    model: keras.Model,
    x: training.Arrays,
    y: training.Arrays,
    *,
    steps: int,
    batch_size: int,
    test_data: tuple[training.Arrays, training.Arrays],
    points: int = 30,
    metric: str | None = None,
    seed: int = 0,
    augment: Augmentation | None = None,
    deterministic: bool = False,
    on_progress: Callable[[int], object] | None = None,
) -> Interpolation:
    """Trains two copies of a model on different data orders, and measures the barrier between them.

    Both trainings start from the weights of the model, under its masks if it has any, with a fresh
    optimizer state. Learning-rate schedules continue from the optimizer's step. The `barrier` of
    the result is the instability of the model at this point. In the paper, a model is stable if it
    is below 0.02 of the error.

    Args:
        model: A compiled model, plain or masked.
        x: Training inputs in memory: an array, or a list or dict of arrays.
        y: Training targets, in one of the same forms.
        steps: Number of optimizer steps of each training.
        batch_size: Number of examples per step.
        test_data: Data `(x, y)` on which the line is evaluated.
        points: Number of points of the line to evaluate, as in `interpolate`.
        metric: The metric that the error is measured by, as in `interpolate`.
        seed: Seed of the two data orders.
        augment: Augmentation of the inputs of each batch, as in `training.train`.
        deterministic: Whether the choice between compiled loop and `fit` must not depend on timing.
        on_progress: Function that is called with the number of new steps.

    Raises:
        DivergenceError: If weights become NaN or infinite in a training, or the loss NaN.
        ValueError: If the model is not compiled, or an argument is wrong.

    Reference:
        - [Frankle et al., arXiv 1912.05671](https://arxiv.org/abs/1912.05671), section 2
    """
    _check_points(points)
    check_compiled(model, "instability()")
    plan = TrainingPlan(
        steps=steps, batch_size=batch_size, augment=augment, deterministic=deterministic
    )
    examples = ArrayDataset.of(x, y, None, augment)
    training.held_out(model, examples, "test_data", test_data)
    if metric is not None:
        _check_metric(metric, training.evaluate(model, *test_data))
    ml.sync(model)
    optimizer = model.optimizer
    if not optimizer.built:
        with variable_scope(model):
            optimizer.build(model.trainable_variables)
    steps_done, rates = zip(*optimizers.read_clocks(optimizer), strict=True)
    start = model.get_weights()
    variables = [*model.variables, *optimizer.variables]
    before = [read(variable) for variable in variables]
    ends = []
    try:
        for number in range(2):
            model.set_weights(start)
            fresh = optimizers.unbuilt_copy(optimizer)
            parameters = model.trainable_variables
            optimizers.reset_optimizer(optimizer, fresh, parameters, steps_done, rates)
            training.train_by_plan(
                model,
                examples,
                dataclasses.replace(plan, seed=[seed, number]),
                listeners=Listeners(on_progress=on_progress),
            )
            divergence.check_weights(model, _where(number, seed, steps))
            ends.append(model.get_weights())
        first, second = ends
        x_test, y_test = test_data
        line = interpolate(model, first, second, x_test, y_test, points=points, metric=metric)
        losses = line.metrics.get("loss", np.zeros(points))  # A custom `test_step` may have none.
        for number, share in enumerate((0, -1)):
            divergence.check_loss(model, losses[share], _where(number, seed, steps))
        return line
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _where(number: int, seed: int, steps: int) -> str:
    order = ("first", "second")[number]
    return f"with the {order} order of the data (seed {seed}), {steps} steps after the common start"


def plot_instability(lines: Mapping[int, Sequence[Interpolation]]) -> Figure:
    """Plots the instability against the step of the common start, and the errors along the lines.

    Args:
        lines: Interpolations of all replicates, by step. Each replicate is a dot, and curves
            connect the means.
    """
    from matplotlib.ticker import PercentFormatter

    figure, (above, below) = pictures.new_figure(4.8, 6.4, rows=2)
    steps = sorted(lines)
    barriers = [[line.barrier for line in lines[step]] for step in steps]
    is_loss = lines[steps[0]][0].metric == "loss"
    colors = pictures.shades(len(steps))
    above.plot(steps, [np.mean(values) for values in barriers], color="0.6", zorder=1)
    for step, values, color in zip(steps, barriers, colors, strict=True):
        above.scatter([step] * len(values), values, color=color, s=20)
        for value in values:
            shown = f"{value:.4f}" if is_loss else f"{value:.2%}"
            pictures.add_target(above, step, value, f"{step} steps: {shown}")
        errors = np.mean([line.errors for line in lines[step]], axis=0)
        below.plot(lines[step][0].shares, errors, color=color, label=f"{step} steps")
    if not is_loss:
        above.axhline(0.02, color="0.6", linewidth=1, linestyle="--", label="stable below")
        above.legend(frameon=False)
    if steps[-1]:
        first = min(step for step in steps if step)
        above.set_xscale("symlog", linthresh=first)
        above.set_xlim(-first / 4, 1.5 * steps[-1])
        above.set_xticks(steps, [str(step) for step in steps], rotation=30)
        above.set_xticks([], minor=True)
    kind = "loss" if is_loss else "error"
    above.set(xlabel="steps that both have in common", ylabel=f"instability ({kind})")
    below.set(xlabel="share of the second solution", ylabel=kind, ylim=(0, None))
    below.legend(frameon=False)
    for axes in (above, below):
        pictures.open_up(axes)
        if not is_loss:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


# --- Signs ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SignAgreement:
    """Shares of weights that ended with the sign they started with.

    Weights with a `w0` or `wf` of zero count as unchanged. Shares of an empty set are NaN.

    Attributes:
        kept: Share of the kept weights.
        pruned: Share of the pruned weights.
        all: Share of all weights.
    """

    kept: float
    pruned: float
    all: float


def sign_agreement(
    initial: Mapping[str, np.ndarray],
    final: Mapping[str, np.ndarray],
    masks: keras.Model | Masks,
) -> dict[str, SignAgreement]:
    """Compares the signs of initial and final weights, separately for kept and pruned weights.

    Args:
        initial: Initial weights by path, such as `pruner.initial_weights`. May include weights
            without masks.
        final: Final weights by path, such as `pruner.final_weights`.
        masks: A masked model, or masks by path.

    Returns:
        A dict from the path of each mask to its shares, with `"total"` for all masks together.

    Raises:
        TypeError: If the weights are not by path.
        ValueError: If the weights of a mask are missing or do not have its shape.
    """
    for name, weights in (("initial", initial), ("final", final)):
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"`{name}` must be weights by path, such as `pruner.{name}_weights`. Received: "
                f"{type(weights).__name__}"
            )
    same, kept = {}, {}
    for path, mask in _masks(masks).items():
        for name, weights in (("initial", initial), ("final", final)):
            if path not in weights or np.shape(weights[path]) != np.shape(mask):
                raise ValueError(
                    f"`{name}` has no weights of shape {np.shape(mask)} for the mask of {path!r}."
                )
        same[path] = (np.sign(initial[path]) * np.sign(final[path]) >= 0).ravel()
        kept[path] = np.asarray(mask, bool).ravel()
    same["total"] = np.concatenate(list(same.values()))
    kept["total"] = np.concatenate(list(kept.values()))
    return {
        path: SignAgreement(_mean(agrees[kept[path]]), _mean(agrees[~kept[path]]), _mean(agrees))
        for path, agrees in same.items()
    }


def plot_sign_agreement(rows: Mapping[str, SignAgreement]) -> Figure:
    """Plots the share of unchanged signs per weight, for kept, pruned and all weights."""
    columns = {
        f"{kind} weights": [getattr(row, kind) for row in rows.values()]
        for kind in ("kept", "pruned", "all")
    }
    return pictures.dots(list(rows), columns, "share with the sign they started with")


# --- Masks ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Overlap:
    """The overlap of all pairs of masks.

    Attributes:
        names: Names of the masks.
        jaccard: Jaccard index (weights kept by both, divided by weights kept by either), of shape
            (masks, masks). NaN if neither mask keeps a weight.
        expected: Jaccard index of random masks that keep the same number of weights in each layer.
            If a and b of n weights are kept, a b / n are expected to be kept by both.
    """

    names: tuple[str, ...]
    jaccard: np.ndarray
    expected: np.ndarray


def mask_overlap(masks: Mapping[str, keras.Model | Masks]) -> Overlap:
    """Compares the masks of several runs, seeds or criteria over all layers.

    Args:
        masks: Masked models or masks by path, by name.

    Raises:
        ValueError: If the masks do not have the same paths and shapes.
    """
    masks = {name: _masks(of) for name, of in masks.items()}
    names = tuple(masks)
    shapes = [{path: np.shape(mask) for path, mask in masks[name].items()} for name in names]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"The masks of {names[0]!r} and {name!r} do not belong to the same weights: "
                f"{shapes[0]} and {shape}."
            )
    both, union, chance = (np.zeros((len(names), len(names))) for _ in range(3))
    for path in masks[names[0]] if names else ():
        kept = np.stack([np.ravel(masks[name][path]) for name in names]).astype("float64")
        counts = kept.sum(1)
        both += kept @ kept.T
        union += counts[:, None] + counts
        chance += np.outer(counts, counts) / kept.shape[1]
    with np.errstate(invalid="ignore"):
        return Overlap(names, both / (union - both), chance / (union - chance))


def plot_overlap(overlap: Overlap) -> Figure:
    """Plots the Jaccard index of every pair of masks, and that of random masks.

    The masks are below the diagonal, and random masks that keep as many weights are above it.
    Columns have the numbers of the rows.
    """
    count = len(overlap.names)
    below = np.tri(count, k=-1, dtype=bool)
    values = np.where(below, overlap.jaccard, np.where(below.T, overlap.expected, np.nan))
    texts = np.array([["-" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values])
    np.fill_diagonal(texts, "")
    names = [f"{number}: {name}" for number, name in enumerate(overlap.names, 1)]
    numbers = [str(number) for number in range(1, count + 1)]
    figure, axes = pictures.matrix(values, names, numbers, texts)
    axes.set_title("above the diagonal:\nrandom masks", fontsize=9)
    return figure


def layer_sparsity(masks: keras.Model | Masks) -> dict[str, float]:
    """Returns the share of pruned weights of each mask, by path.

    Args:
        masks: A masked model, or masks by path.
    """
    return {path: 1 - _mean(np.asarray(mask, bool)) for path, mask in _masks(masks).items()}


def plot_layer_sparsity(
    sparsities: Mapping[str, float] | Mapping[str, Mapping[str, float]],
) -> Figure:
    """Plots the results of `layer_sparsity` for one model, or for several models by name."""
    one = {path: rows for path, rows in sparsities.items() if not isinstance(rows, Mapping)}
    several = {name: rows for name, rows in sparsities.items() if isinstance(rows, Mapping)}
    return plot_by_layer({"": one} if one else several, "share of pruned weights")


def plot_by_layer(shares: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """Plots a share for each weight by path. Several names are drawn side by side."""
    paths = list(dict.fromkeys(path for rows in shares.values() for path in rows))
    columns = {name: [rows.get(path, np.nan) for path in paths] for name, rows in shares.items()}
    return pictures.dots(paths, columns, label)


# --- Predictions ----------------------------------------------------------------------------------


def confusion_matrix(
    model: keras.Model,
    x: training.Arrays,
    labels: np.ndarray,
    *,
    weights: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Returns the confusion matrix of a classifier.

    With the initial weights under the masks of a trained model, it shows the predictions of an
    untrained masked model: `weights=list(pruner.initial_weights.values())`.

    Args:
        model: A classifier with one score per class on the last axis of its output.
        x: Inputs.
        labels: True classes, 1-D integers from 0.
        weights: Weights in the order of `get_weights`, to which the masks of `model` apply. None
            for the weights of the model.

    Returns:
        An integer array of shape (classes, classes): rows are true classes, columns are predicted
        classes.

    Raises:
        ImportError: If scikit-learn, of the `cli` extra, is not installed.
        ValueError: If the weights do not fit the model, or the labels are not one class for each
            example.
    """
    from sklearn import metrics

    labels = np.asarray(labels)
    if labels.ndim != 1 and labels.shape[1:] != (1,):
        raise ValueError(
            f"`labels` must be one class for each example. Received: shape {labels.shape}. For "
            "one-hot labels, pass `labels.argmax(-1)`."
        )
    plain = _plain(model)
    plain.set_weights(_effective(model, model if weights is None else weights))
    scores = plain.predict(x, batch_size=1000, verbose=0)
    classes = np.arange(scores.shape[-1])
    return metrics.confusion_matrix(np.ravel(labels), scores.argmax(-1), labels=classes)


def plot_confusion(counts: np.ndarray, names: Sequence[str] | None = None) -> Figure:
    """Plots a confusion matrix. Colors show shares of each true class, numbers show counts."""
    names = [str(i) for i in range(len(counts))] if names is None else names
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = pictures.matrix(shares, names, names, counts)
    axes.tick_params(axis="x", rotation=30 if max(map(len, names), default=0) > 4 else 0)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


# --- Inside ---------------------------------------------------------------------------------------


def _check_points(points: int) -> None:
    if points < 2:
        raise ValueError(f"`points` must be at least 2. Received: points={points}")


def _masks(of: keras.Model | Masks) -> Masks:
    if not isinstance(of, keras.Model):
        return of
    masks = ml.get_masks(of)
    return {ref.path: masks[ref.path] for ref in ml.masked_refs(of)}


def _plain(model: keras.Model) -> keras.Model:
    """Returns a plain copy without masks, which uses the weights it is given."""
    masked = any(ref.mask is not None for ref in ml.weight_refs(model))
    return ml.strip_masks(model) if masked else copying.copy_model(model)


def _effective(model: keras.Model, solution: Solution) -> list[np.ndarray]:
    """Returns the weights of a solution as the forward pass reads them, like `get_weights`."""
    source = solution if isinstance(solution, keras.Model) else model
    ml.sync(source)
    values = [read(variable) for variable in source.weights]
    if source is not solution:
        values = [widened(np.asarray(array)) for array in solution]
    shapes = [tuple(variable.shape) for variable in model.weights]
    if [value.shape for value in values] != shapes:
        raise ValueError(
            f"The solution does not fit {model.name!r}: its weights have the shapes "
            f"{[value.shape for value in values]}, those of the model {shapes}."
        )
    positions = {id(variable): i for i, variable in enumerate(source.weights)}
    for ref in ml.weight_refs(source):
        if ref.mask is not None:
            i = positions[id(ref.variable)]
            raw = keras.ops.cast(values[i], ref.variable.dtype)
            effective = keras.ops.convert_to_numpy(ref.mask.apply(raw))
            values[i] = np.array(effective).astype(values[i].dtype)
    return values


def _between(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    if not np.issubdtype(first.dtype, np.floating):
        return first
    return ((1 - share) * first + share * second).astype(first.dtype)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else float("nan")
