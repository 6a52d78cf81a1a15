"""Ranking on the device, for masks that change during training.

Weights never leave the device. Counts are exact, and ties are broken in an order that depends on a
seed and is the same on every backend. The threshold is found in about nine passes over memory: the
search starts at a quantile of a sample, and then interpolates between counts. From the 17th pass on
it bisects. In compiled programs, sorting a million weights takes more than twenty times as long.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from masked_layers import randomness
from masked_layers.devices import computes_on_cpu
from masked_layers.types import Tensor

if TYPE_CHECKING:
    from masked_layers import MaskedRef

# Number of bits of random keys, chosen so that they are below every threshold for 0 of them.
_RANDOM_BITS = 30
MAX_SIZE = 2**_RANDOM_BITS
_INFINITY = 0x7F800000  # the bits of a float32; NaN is above it
_HIGHEST = 0x7FFFFFFF
# Number of keys in a sample, and the length of the first step away from its quantile, in bits. A
# larger sample hardly saves passes, and all its pairs are compared.
_SAMPLE = 64
_STRIDE = 18
# Number of passes after which all further ones halve the interval, of 31 bits.
_INTERPOLATED = 16
# Number of flags that one row of a matrix product counts.
_ROW = 1024


def magnitude(weight: Tensor) -> Tensor:
    """Returns keys in the order of the absolute values of floats: int32, 1-D, at least 0."""
    # A column, because Keras needs the size of the last axis, which may be unknown when traced.
    column = ops.view(ops.cast(ops.reshape(weight, (-1, 1)), "float32"), "int32")
    return ops.bitwise_and(ops.reshape(column, (-1,)), 0x7FFFFFFF)


def _all_finite(keys: Tensor, ranked: Tensor) -> Tensor:
    """Returns whether the values of keys from `magnitude` are finite where they are ranked."""
    return ops.logical_not(holds_any(ops.logical_and(keys >= _INFINITY, ranked)))


def tie_keys(keys: Tensor, seed: Tensor) -> Tensor:
    """Returns distinct keys in an order that depends on the seed: int32, at least 0.

    Args:
        keys: 1-D tensor of at most `MAX_SIZE` entries, of which only the length is used.
        seed: Int32 scalar.
    """
    low = MAX_SIZE - 1
    number = ops.arange(ops.shape(keys)[0], dtype="int32")
    # Every step permutes the 30-bit integers, so the numbers stay distinct.
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (14, 0x3B5D5C4B)):
        number = ops.bitwise_xor(number, ops.bitwise_and(seed, low))
        number = ops.bitwise_xor(number, ops.right_shift(number, shift))
        number = ops.bitwise_and(number * factor, low)
        seed = seed * 0x2545F491 + 0x1B873593
    return ops.bitwise_xor(number, ops.right_shift(number, 15))


def keep_highest(keys: Tensor, candidates: Tensor, count: Tensor, seed: Tensor) -> Tensor:
    """Returns flags of exactly `count` candidates, those with the highest keys.

    Args:
        keys: 1-D int32 tensor of at most `MAX_SIZE` entries, all at least 0.
        candidates: Bool tensor of the shape of `keys`.
        count: Int32 scalar, from 0 to the number of candidates.
        seed: Int32 scalar for breaking ties at the threshold.
    """
    keys = ops.where(candidates, keys, -1)
    threshold, reaching, beyond = _threshold(keys, count)

    def draw() -> Tensor:
        drawn = ops.where(keys == threshold, tie_keys(keys, seed), -1)
        lot = _threshold(drawn, count - beyond)[0]
        return ops.logical_or(keys > threshold, drawn >= lot)

    return ops.cond(reaching > count, draw, lambda: keys >= threshold)


def _threshold(keys: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an integer from 0 on that at least `count` keys reach, and as few more as possible.

    Exactly `count` keys reach it, unless several keys are equal to it.

    Returns:
        The integer, the number of keys that reach it, and, if these are more than `count`, the
        number of keys above it.
    """
    guess = _sample_quantile(keys, count)
    reaching = _count(keys >= 0)

    def unfinished(low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor, _: Tensor) -> Tensor:
        return ops.logical_and(at_low != count, high - low > 1)

    def narrow(low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor, number: Tensor) -> Any:
        bounded = ops.logical_and(low > 0, high < _HIGHEST)
        share = _float(at_low - count) / _float(at_low - at_high)
        between = low + ops.cast(_float(high - low) * share, "int32")
        # Keys may be distributed in any way, or equal.
        halves = ops.logical_or(number % 8 == 7, number >= _INTERPOLATED)
        between = ops.where(halves, low + (high - low) // 2, between)
        # In steps of four times the length away from the guess, until it lies between two counts.
        stride = ops.left_shift(ops.ones((), "int32"), ops.minimum(_STRIDE + 2 * number, 29))
        beside = ops.where(low > 0, low + ops.minimum(stride, high - low - 1), high - stride)
        tried = ops.where(bounded, between, ops.where(number == 0, guess, beside))
        tried = ops.clip(tried, low + 1, high - 1)
        found = _count(keys >= tried)
        enough = found >= count
        return (
            ops.where(enough, tried, low),
            ops.where(enough, high, tried),
            ops.where(enough, found, at_low),
            ops.where(enough, at_high, found),
            number + 1,
        )

    zero = ops.zeros((), "int32")
    start = (zero, zero + _HIGHEST, reaching, zero, zero)
    low, _, at_low, at_high, _ = ops.while_loop(unfinished, narrow, start)
    return low, at_low, at_high


def _sample_quantile(keys: Tensor, count: Tensor) -> Tensor:
    """Returns a key that about `count` keys reach, from a sample of them."""
    size = ops.shape(keys)[0]  # A tensor in a program for all lengths.
    apart = -(-size // _SAMPLE)
    apart = max(apart, 1) if isinstance(size, int) else ops.maximum(apart, 1)
    sample = ops.reshape(keys[::apart], (-1,))  # TensorFlow does not know the rank of a slice.
    # Each is compared with all, because programs of XLA sort as many in thirty times as long.
    reached = ops.sum(_float(sample[:, None] <= sample), axis=1)
    wanted = _float(count) * (_float(ops.shape(sample)[0]) / (_float(size) + 1))
    # One more, because there may be none.
    return ops.max(ops.append(ops.where(reached >= wanted, sample, 0), 0))


def _float(value: Tensor) -> Tensor:
    return ops.cast(value, "float32")


def _count(flags: Tensor) -> Tensor:
    """Returns the number of True among 1-D flags, as an int32 scalar."""
    size = flags.shape[0]
    if size is None or size < 2 * _ROW or not _compiled_for_cpu():
        # Cast once more, because JAX sums to 64 bits where these are enabled.
        return ops.cast(ops.sum(ops.cast(flags, "int32")), "int32")
    # XLA adds integers one by one on a CPU, which takes five times as long as a product with ones.
    # Counts of a row are exact in float32.
    head = size // _ROW * _ROW
    rows = _float(ops.reshape(flags[:head], (-1, _ROW)))
    counts = ops.cast(ops.matmul(rows, ops.ones((_ROW,), "float32")), "int32")
    rest = ops.cast(flags[head:], "int32")
    return ops.cast(ops.sum(counts) + ops.sum(rest), "int32")


def holds_any(flags: Tensor) -> Tensor:
    """Returns whether any of the flags is True, as a bool scalar."""
    return _count(ops.reshape(flags, (-1,))) > 0


@functools.cache
def _compiled_for_cpu() -> bool:
    """Returns whether compiled programs run on a CPU."""
    return keras.backend.backend() != "torch" and computes_on_cpu()


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles a function of tensors into one program of the backend, when it is first called."""

    @functools.cache
    def program() -> Callable[..., Tensor]:
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            # One program for all lengths, while XLA compiles one per length. XLA is needed on a
            # GPU, because TensorFlow would do int32 arithmetic on the host there.
            on_gpu = bool(tf.config.list_logical_devices("GPU"))
            return tf.function(
                function, autograph=False, reduce_retracing=True, jit_compile=on_gpu or None
            )
        if backend == "jax":
            import jax

            return jax.jit(function)
        return function

    @functools.wraps(function)
    def call(*args: Tensor) -> Tensor:
        # A part of another program knows the lengths, while one for all lengths does not.
        return (function if _is_traced() else program())(*args)

    return call


def _is_traced() -> bool:
    """Returns whether a graph of TensorFlow is being traced."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return bool(tf.inside_function())


@compiled
def keep_largest(
    weight: Tensor, candidates: Tensor, most: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns flags of the largest candidates, at most `most` of them.

    Args:
        weight: 1-D tensor of floats.
        candidates: Bool tensor of the shape of `weight`: weights that may be kept.
        most: Int32 scalar. If there are fewer candidates, all of them are kept.
        seed: Int32 scalar for breaking ties.

    Returns:
        The bool mask, and a bool scalar: whether every candidate is finite. If not, the mask is
        not valid.
    """
    keys = magnitude(weight)
    mask = keep_highest(keys, candidates, ops.minimum(most, _count(candidates)), seed)
    return mask, _all_finite(keys, candidates)


@compiled
def rewire_at_random(
    weight: Tensor, mask: Tensor, count: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes the smallest weights and grows the same number of others, drawn at random.

    A weight that was just pruned may be drawn. It then stays, and does not count as grown.

    Args:
        weight: 1-D tensor of floats.
        mask: Bool tensor of the shape of `weight`.
        count: Int32 scalar: number of kept weights to prune.
        seed: Int32 scalar.

    Returns:
        The bool mask, a bool tensor of grown weights, and a bool scalar: whether all ranked weights
        are finite.
    """
    return _rewire(weight, mask, tie_keys(mask, seed + 1), count, seed)


@compiled
def rewire_by_growth(
    weight: Tensor, mask: Tensor, growth: Tensor, count: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes the smallest weights and grows those with the largest absolute values in `growth`.

    Args:
        weight: 1-D tensor of floats.
        mask: Bool tensor of the shape of `weight`.
        growth: Tensor of floats of the shape of `weight`.
        count: Int32 scalar: number of kept weights to prune.
        seed: Int32 scalar.

    Returns:
        The bool mask, a bool tensor of grown weights, and a bool scalar: whether all ranked values
        are finite.
    """
    wanted = magnitude(growth)
    new, grown, finite = _rewire(weight, mask, wanted, count, seed)
    return new, grown, ops.logical_and(finite, ops.logical_not(holds_any(wanted >= _INFINITY)))


def _rewire(
    weight: Tensor, mask: Tensor, wanted: Tensor, count: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    keys = magnitude(weight)
    kept = keep_highest(keys, mask, _count(mask) - count, seed)
    new = ops.logical_or(kept, keep_highest(wanted, ops.logical_not(kept), count, seed + 2))
    return new, ops.logical_and(new, ops.logical_not(mask)), _all_finite(keys, mask)


def count_alive(refs: Sequence[MaskedRef]) -> list[int]:
    """Counts the kept weights of each mask on the device, and reads all counts at once."""
    masks = [ops.convert_to_tensor(ref.mask.value) for ref in refs]
    counts = ops.stack([ops.sum(ops.cast(mask, "int32")) for mask in masks])
    return ops.convert_to_numpy(counts).tolist()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Returns all elements of the tensors as a 1-D tensor."""
    return ops.concatenate([ops.reshape(ops.convert_to_tensor(t), (-1,)) for t in tensors])


def parted(mask: Tensor, group: Sequence[MaskedRef]) -> list[Tensor]:
    """Splits a joined mask into masks with the shapes of the weights."""
    *ends, size = np.cumsum([math.prod(ref.variable.shape) for ref in group]).tolist()
    mask = ops.reshape(mask, (size,))  # The length may be unknown when traced.
    parts = ops.split(mask, ends) if ends else [mask]
    return [ops.reshape(part, ref.variable.shape) for part, ref in zip(parts, group, strict=True)]


def integer(value: int) -> Tensor:
    """Returns the value as an int32 tensor, for compiled functions."""
    return ops.convert_to_tensor(value, "int32")


def seed_of(seed: int, step: int, path: str) -> int:
    """Returns the seed of a weight at a step, of 30 bits."""
    return randomness.integer("rewiring", seed, step, path, bits=30)


def keep_largest_of(
    groups: Sequence[Sequence[MaskedRef]],
    weights: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    counts: Sequence[Tensor],
    seeds: Sequence[Tensor],
    *,
    regrowth: bool,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Returns masks of the largest weights of each group, by path.

    Args:
        groups: Weights that are ranked together.
        weights: The weights by path.
        alive: Their masks by path.
        counts: Number of weights to keep in each group.
        seeds: A seed for each group, for breaking ties.
        regrowth: Whether pruned weights may come back.

    Returns:
        The masks, and whether all ranked weights of each group are finite.
    """
    masks: dict[str, Tensor] = {}
    finite = []
    for group, count, seed in zip(groups, counts, seeds, strict=True):
        candidates = joined([alive[ref.path] for ref in group])
        candidates = ops.ones_like(candidates) if regrowth else candidates
        joint = joined([weights[ref.path] for ref in group])
        mask, fine = keep_largest(joint, candidates, count, seed)
        masks |= {ref.path: part for ref, part in zip(group, parted(mask, group), strict=True)}
        finite.append(fine)
    return masks, finite


def check_finite(
    groups: Sequence[Sequence[MaskedRef]],
    finite: Sequence[Tensor],
    masks: Sequence[Sequence[Tensor]],
) -> list[str]:
    """Checks that all ranked values are finite, with a single read from the device.

    Args:
        groups: Weights that were ranked together.
        finite: For each group, whether all ranked values are finite.
        masks: For each group, the new masks of its weights.

    Returns:
        The paths of masks that keep nothing.

    Raises:
        ValueError: If a ranked value is not finite. The message names the weights.
    """
    codes = [
        ops.cast(fine, "int32") + 2 * ops.cast(ops.any(mask), "int32")
        for fine, parts in zip(finite, masks, strict=True)
        for mask in parts
    ]
    codes = iter(ops.convert_to_numpy(ops.stack(codes)).tolist())
    emptied = []
    for group in groups:
        for ref in group:
            code = next(codes)
            if not code & 1:
                raise not_finite(group)
            if not code & 2:
                emptied.append(ref.path)
    return emptied


def not_finite(group: Sequence[MaskedRef]) -> ValueError:
    """Returns the error for weights that cannot be ranked."""
    return ValueError(
        f"The weights of {[ref.path for ref in group]} or their gradients contain NaN or infinity "
        "and cannot be ranked. Did the training diverge?"
    )
