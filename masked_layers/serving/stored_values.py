"""The values that are stored for each weight: all, rounded ones, or codes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from masked_layers.serving import encoding
from masked_layers.serving.codes import Coded, clustered, scaled

logger = logging.getLogger(__name__)

FLOATS = ("float32", "float16", "bfloat16")
CODEBOOKS = {f"codebook-{bits}": bits for bits in range(2, 9)}
CHOICES = (*FLOATS, "int8", "codebook", *CODEBOOKS)
"""The values of the argument `values`."""

_DEFAULT_BITS = 5

_MARGIN = 0.99
"""Share of the tolerance that a choice of bits may use. The outputs of the written folder, which
are compared last, may differ from those in the last bits."""

Encoding = Literal["sparse", "packed", "dense"]


@dataclass(frozen=True, eq=False)
class Stored:
    """The values stored for a weight.

    Attributes:
        array: The exact values.
        encoding: `"sparse"`, `"packed"` or `"dense"`, as in `StorageRow`.
        content: Values or codes in the packed file; None for a dense weight, which is in the
            checkpoint.
        trainable: Whether training changes it by gradients, unlike statistics of a normalization.
    """

    array: np.ndarray
    encoding: Encoding
    content: np.ndarray | Coded | None
    trainable: bool = False

    @property
    def values(self) -> np.ndarray:
        """The values that the model will have, with its dtype."""
        if self.content is None:
            return self.array
        values = self.content.values() if isinstance(self.content, Coded) else self.content
        with np.errstate(over="ignore"):
            return values.astype(self.array.dtype)

    @property
    def dtype(self) -> str:
        """Name of the dtype or the codes."""
        if isinstance(self.content, Coded):
            return self.content.label
        if (
            self.content is not None
            and self.content is not self.array
            and (self.content.dtype == self.array.dtype)
        ):
            return "bfloat16"  # Stored with zeros for the other bits.
        return (self.array if self.content is None else self.content).dtype.name


def stored(name: str, exact: Stored, values: str) -> Stored:
    """Returns what is stored for a weight with a value of `CHOICES`.

    Floats are rounded where the weight is sparse. Codes are used for floating-point weights with
    two or more axes, if they take less space than the exact values. With codebooks, which are less
    precise anyway, trainable vectors are rounded to bfloat16.

    Args:
        name: Path of the weight, for messages.
        exact: The weight with its exact values.
        values: One of `CHOICES`.

    Raises:
        OverflowError: If a value is outside the range of `values`, or not finite where codes are
            asked for.
    """
    if values not in FLOATS:
        return _placed(_coded(name, exact, values))
    if values == "float32" or exact.encoding != "sparse":
        return exact
    return dataclasses.replace(exact, content=_rounded(name, exact.array, values))


def _coded(name: str, exact: Stored, values: str) -> Stored:
    array = exact.array
    if array.ndim < 2 and values != "int8":
        return _rounded_vector(name, exact)
    if array.ndim < 2 or array.dtype.kind in "iub" or array.dtype.itemsize == 1:
        return exact
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise OverflowError(
            f"'{name}' has values that are not finite float32 numbers, for which there are no "
            "codes. Use values='float32', or leave the weight out with `include`."
        )
    if values == "int8":
        coded = scaled(array)
    else:
        coded = clustered(array, CODEBOOKS.get(values, _DEFAULT_BITS))
    count = np.count_nonzero(array) if exact.encoding == "sparse" else array.size
    if count + coded.table.nbytes >= count * array.dtype.itemsize:
        return exact
    found = dataclasses.replace(exact, content=coded)
    if not np.isfinite(found.values).all():
        raise OverflowError(
            f"Rounding '{name}' leaves the range of {array.dtype}. Use values='float32', or leave "
            "the weight out with `include`."
        )
    return found


def _rounded_vector(name: str, exact: Stored) -> Stored:
    import ml_dtypes

    array = exact.array
    if array.dtype != np.float32 or not exact.trainable or exact.content is None:
        return exact
    with np.errstate(over="ignore"):
        rounded = encoding.canonical(name, array.astype(ml_dtypes.bfloat16).astype(np.float32))
    finite = np.array_equal(np.isfinite(rounded), np.isfinite(array))
    if not finite or np.array_equal(rounded, array):
        return exact
    return dataclasses.replace(exact, content=rounded)


def _placed(weight: Stored) -> Stored:
    """Chooses the encoding of codes, which may differ from that of the exact values."""
    if not isinstance(weight.content, Coded):
        return weight
    sparse = encoding.choose(weight.content.codes) == "sparse"
    return dataclasses.replace(weight, encoding="sparse" if sparse else "packed")


def fewest_bits(
    weights: Mapping[str, Stored],
    allowed: set[str],
    error: Callable[[Mapping[str, np.ndarray]], float | None],
    tolerance: float,
) -> dict[str, Stored]:
    """Chooses the bits of each codebook, so that the outputs stay within a tolerance.

    The fewest bits with which all codebooks of one size meet the tolerance are found first; if even
    8 bits do not, vectors stay exact. Then the bits of single weights are lowered, beginning with
    the weight that has the most values, as long as the measured error allows. The result is
    therefore not the smallest possible one.

    Args:
        weights: Weights with exact values, by path.
        allowed: Paths of the weights that may be coded.
        error: Function that returns the error of the outputs for other values of some weights;
            None if no output is finite.
        tolerance: Largest error allowed.

    Raises:
        RuntimeError: If even 8 bits and exact vectors do not meet it.
    """

    def coded(name: str, bits: int, rounded: bool) -> Stored:
        if weights[name].array.ndim < 2 and not rounded:
            return weights[name]
        return _coded(name, weights[name], f"codebook-{bits}")

    def fits(found: Mapping[str, Stored]) -> bool:
        measured = error({name: weight.values for name, weight in found.items()})
        logger.debug("%s: %s", {name: weight.dtype for name, weight in found.items()}, measured)
        return measured is not None and measured <= tolerance * _MARGIN

    for bits, rounded in [*((bits, True) for bits in CODEBOOKS.values()), (8, False)]:
        found = {name: coded(name, bits, rounded) for name in weights if name in allowed}
        if fits(found):
            break
    else:
        measured = error({name: weight.values for name, weight in found.items()})
        raise RuntimeError(too_large(measured, tolerance, "codebook-8"))
    sizes = {name: np.count_nonzero(weights[name].array) for name in found}
    for name in sorted(found, key=lambda name: -sizes[name]):
        for fewer in reversed(range(2, bits)):
            tried = {**found, name: coded(name, fewer, rounded)}
            if not isinstance(tried[name].content, Coded) or not fits(tried):
                break
            found = tried
    return {name: _placed(found.get(name, weight)) for name, weight in weights.items()}


def too_large(error: float | None, tolerance: float, values: str) -> str:
    """Returns the message that an error of the outputs exceeds the tolerance."""
    measured = "cannot be measured" if error is None else f"is {error:.3g} of the largest output"
    return (
        f"With values='{values}', the largest difference of an output {measured} on the sample "
        f"inputs, but `tolerance` is {tolerance}. Nothing was changed at the target path. Use "
        "more precise values, leave weights out with `include`, or allow a larger tolerance."
    )


def _rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype.kind in "iu" or array.dtype.itemsize <= 2:
        return array
    import ml_dtypes

    with np.errstate(over="ignore"):
        rounded = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if (np.isfinite(array) & ~np.isfinite(rounded)).any():
        raise OverflowError(
            f"'{name}' has values up to {np.nanmax(np.abs(array))}, beyond the range of {dtype}. "
            "Use values='bfloat16' or 'float32', or leave the weight out with `include`."
        )
    return encoding.canonical(name, rounded)  # Tiny values may have been rounded to -0.0.
