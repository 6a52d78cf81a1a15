"""Converts every model of `keras.applications` and compares outputs before and after.

    python -m benchmarks.checks.conversion [NAME ...]

Weights are random, drawn so that the outputs are not constant. For each model it prints the number
of masked layers and of other layers with weights, the largest difference of outputs after the
conversion and, with half of the weights pruned, after stripping, and the times of
`convert_to_masked` and `keras.models.clone_model` in the same run.
"""

import argparse
import dataclasses
import inspect
import time

import keras
import numpy as np

import masked_layers as ml

# The smallest side that every family accepts.
SIDE = 96


@dataclasses.dataclass(frozen=True)
class Row:
    """The results for one model."""

    name: str
    weights: int
    masked: int
    left: int
    spread: float
    difference: float
    stripped_difference: float
    convert_seconds: float
    clone_seconds: float


def families():
    """Returns {module of the family: [names of its models]}, from the package itself."""
    found: dict[str, list[str]] = {}
    for name, member in sorted(vars(keras.applications).items()):
        if inspect.isfunction(member):
            found.setdefault(member.__module__.rsplit(".", 1)[1], []).append(name)
    return found


def randomized(name, seed=0):
    """Returns a model whose outputs differ between samples.

    With Keras' initial weights, many families have constant outputs (zero-initialized scales, deep
    stacks of small kernels), and equal constants would prove nothing.
    """
    keras.utils.set_random_seed(seed)
    build = getattr(keras.applications, name)
    model = build(weights=None, input_shape=(SIDE, SIDE, 3), classes=10, classifier_activation=None)
    rng = np.random.default_rng(seed)
    outputs = {id(ref.variable): ref.output_axes for ref in ml.weight_refs(model)}
    adapted = {
        id(variable)
        for layer in model.layers
        if isinstance(layer, keras.layers.Normalization)
        for variable in layer.weights
    }
    for variable in model.weights:
        shape = tuple(variable.shape)
        if id(variable) in outputs:
            fan_in = np.prod(shape) / np.prod([shape[axis] for axis in outputs[id(variable)]])
            value = rng.standard_normal(shape, dtype="float32") * np.sqrt(2 / fan_in)
            variable.assign(value)
        elif id(variable) not in adapted:
            # Scales, offsets and statistics: positive, near one.
            variable.assign(rng.uniform(0.5, 1.5, shape))
    return model


def images():
    """Returns two random images with values from 0 to 255."""
    return np.random.default_rng(1).random((2, SIDE, SIDE, 3), dtype="float32") * 255


def largest_difference(a, b, inputs):
    """Returns the largest absolute difference of two models' outputs and their spread."""
    # Without `predict`, because tracing the deeper models takes longer than running them.
    first, second = (keras.ops.convert_to_numpy(model(inputs, training=False)) for model in (a, b))
    if not np.isfinite(first).all():
        raise FloatingPointError(f"The outputs of {a.name} are not finite: rescale its weights.")
    return float(np.abs(first - second).max()), float(np.ptp(first, axis=0).max())


def check(name):
    """Converts one model; returns its `Row`."""
    plain = randomized(name)
    start = time.perf_counter()
    masked = ml.convert_to_masked(plain)
    convert_seconds = time.perf_counter() - start
    start = time.perf_counter()
    keras.models.clone_model(plain)
    clone_seconds = time.perf_counter() - start
    difference, spread = largest_difference(plain, masked, images())
    rng = np.random.default_rng(2)
    ml.set_masks(masked, {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(masked).items()})
    stripped_difference, _ = largest_difference(masked, ml.strip_masks(masked), images())
    report = ml.sparsity_report(masked)
    return Row(
        name=name,
        weights=plain.count_params(),
        masked=len({id(ref.layer) for ref in ml.masked_refs(masked)}),
        left=len(report.unmasked),
        spread=spread,
        difference=difference,
        stripped_difference=stripped_difference,
        convert_seconds=convert_seconds,
        clone_seconds=clone_seconds,
    )


def main():
    """Prints the table; exits with 1 if any output changed."""
    everything = [name for names in families().values() for name in names]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(everything))
    names = parser.parse_args().names or everything
    if unknown := set(names) - set(everything):
        parser.error(f"unknown models: {sorted(unknown)}; known: {everything}")
    print(f"Keras {keras.version()} on {keras.backend.backend()}")
    heads = ("model", "weights", "masked", "left", "spread", "diff", "stripped", "convert", "clone")
    print(("{:20}" + "{:>12}" * 8 + "{:>8}").format(*heads, "ratio"))
    rows = []
    for name in names:
        row = check(name)
        rows.append(row)
        keras.backend.clear_session()
        print(
            f"{row.name:20}{row.weights:12,}{row.masked:12}{row.left:12}{row.spread:12.3g}"
            f"{row.difference:12.3g}{row.stripped_difference:12.3g}{row.convert_seconds:10.2f} s"
            f"{row.clone_seconds:10.2f} s{row.convert_seconds / row.clone_seconds:8.2f}",
            flush=True,
        )
    ratios = [row.convert_seconds / row.clone_seconds for row in rows]
    print(
        f"{len(rows)} models, {sum(r.masked for r in rows)} layers masked, "
        f"{sum(r.left for r in rows)} layers with weights left; largest difference after "
        f"conversion {max(r.difference for r in rows)}, after stripping "
        f"{max(r.stripped_difference for r in rows)}; convert / clone_model: median "
        f"{np.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
    )
    return int(any(row.difference or row.stripped_difference for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
