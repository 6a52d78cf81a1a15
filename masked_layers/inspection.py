"""Lists, reads, writes and counts the masks of a model."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import keras
import numpy as np

from masked_layers import _keras, workers
from masked_layers.archives import read_npz
from masked_layers.compiled import remake_functions
from masked_layers.files import FileContentError, replacing
from masked_layers.maskable import (
    channel_weights,
    mask_of,
    output_axes,
    overwritten,
    own_weights,
    raw_variable,
    unknown_kernels,
    weights_inside,
    why_unmasked,
)
from masked_layers.masks import Mask
from masked_layers.packing import pack, unpack
from masked_layers.paths import plain_class, walk
from masked_layers.text_tables import aligned

Layer: TypeAlias = keras.layers.Layer

_OTHER_MASKS = 1 << 26  # Maximum size, in bytes, of masks in a file that the model does not have.


@dataclasses.dataclass(frozen=True, eq=False)
class WeightRef:
    """One maskable weight of a model.

    Attributes:
        path: Path of the weight, the same before and after masking, saving and loading.
        layer: Layer of the weight, or the first one if several layers share it.
        name: Name of the weight in that layer, such as `"kernel"`.
        variable: Raw weight.
        mask: Mask of the weight, or None.
        output_axes: Axes that index outputs, as negative numbers; empty for a bias.
    """

    path: str
    layer: Layer
    name: str
    variable: keras.Variable
    mask: Mask | None
    output_axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedRef(WeightRef):
    """One weight of a model that has a mask.

    Attributes:
        mask: Its mask; the others are those of `WeightRef`.
    """

    mask: Mask


def weight_refs(model: Layer, *, mask_bias: bool = False) -> list[WeightRef]:
    """Returns every maskable weight of a plain or masked model, each once, in a fixed order.

    Args:
        model: A model or layer. Layers that are not built have no weights yet.
        mask_bias: Whether to list biases too. Biases with a mask are always listed.
    """
    refs: dict[int, WeightRef] = {}
    for path, layer, name in weights_inside(model, biases=True):
        variable, mask = raw_variable(layer, name), mask_of(layer, name)
        axes = output_axes(layer, name)
        if variable is not None and (axes or mask_bias or mask is not None):
            if mask is None:
                ref = WeightRef(path, layer, name, variable, None, axes)
            else:
                ref = MaskedRef(path, layer, name, variable, mask, axes)
            refs.setdefault(id(variable), ref)
    return list(refs.values())


def masked_refs(model: Layer) -> list[MaskedRef]:
    """Returns the weights of a model that have a mask, in a fixed order.

    Raises:
        ValueError: If the model has no masked weight.
    """
    refs = [ref for ref in weight_refs(model) if isinstance(ref, MaskedRef)]
    if not refs:
        raise ValueError(
            f"'{model.name}' has no masked weight. Call `masked_layers.convert_to_masked(model)` "
            "first and use the model that it returns."
        )
    return refs


def channel_refs(model: Layer) -> list[MaskedRef]:
    """Returns the scales of normalization layers whose masks leave channels out.

    They exist after `convert_to_masked(model, mask_normalization=True)`. `masked_refs` does not
    list them, since they are not weights that are pruned one by one or counted.

    Args:
        model: A model or layer.
    """
    refs: dict[int, MaskedRef] = {}
    for path, layer, name in weights_inside(model, channels=True):
        variable, mask = raw_variable(layer, name), mask_of(layer, name)
        if name in channel_weights(layer) and variable is not None and mask is not None:
            refs.setdefault(id(variable), MaskedRef(path, layer, name, variable, mask, ()))
    return list(refs.values())


def lora_factor(ref: WeightRef) -> keras.Variable | None:
    """Returns the second factor of the product that LoRA adds to a weight, or None."""
    return getattr(ref.layer, f"lora_{ref.name}_b", None)


def check_no_channel_left_out(model: Layer) -> None:
    """Checks that the plain normalization layers would compute what those of a model do.

    Raises:
        ValueError: If one leaves channels out. The message names `shrink`.
    """
    for ref in channel_refs(model):
        if left_out := int(np.count_nonzero(~ref.mask.to_numpy())):
            raise ValueError(
                f"'{ref.path.rpartition('/')[0] or model.name}' leaves out {left_out} of "
                f"{ref.variable.shape[0]} channels, which a plain "
                f"{plain_class(ref.layer).__name__} cannot. Call `masked_layers.shrink(model)`, "
                "which removes them, and use the model that it returns."
            )


def refs_with_masks(model: Layer) -> list[MaskedRef]:
    """Returns all weights that have a mask: `masked_refs`, then `channel_refs`.

    Raises:
        ValueError: If the model has none.
    """
    channels = channel_refs(model)
    weights = [ref for ref in weight_refs(model) if isinstance(ref, MaskedRef)]
    return [*(weights if channels else masked_refs(model)), *channels]


def get_masks(model: Layer) -> dict[str, np.ndarray]:
    """Returns copies of all masks of a masked model, those of normalization layers included.

    Learned masks are returned as the binary masks that `harden` would make of them.

    Args:
        model: A masked model or layer.

    Returns:
        A dict from paths to bool arrays of the weights' shapes, True where a weight is kept.

    Raises:
        ValueError: If the model has no masked weight.
    """
    _keras.sync(model)
    return {ref.path: ref.mask.to_numpy() for ref in refs_with_masks(model)}


def set_masks(model: Layer, masks: Mapping[str, Any]) -> None:
    """Sets masks of a masked model, with immediate effect in functions that are already compiled.

    Args:
        model: A masked model.
        masks: A dict from paths to arrays of the weights' shapes, either bool or with values 0 and
            1. The masks of other weights are not changed.

    Raises:
        TypeError: If the masks are not a dict.
        ValueError: If a path does not name a masked weight, or its mask is learned, or an array has
            another shape or other values than 0 and 1, or several workers of a `tf.distribute`
            strategy are given different masks. No mask is changed then.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            "Expected `masks` to be a dict from paths to arrays, as `get_masks` returns it. "
            f"Received: {type(masks).__name__}"
        )
    refs = {ref.path: ref for ref in refs_with_masks(model)}
    for path in masks:
        if path in refs and refs[path].mask.learned:
            raise ValueError(
                f"The mask of '{path}' is learned: it is computed from its scores and cannot be "
                "set directly. Call `masked_layers.harden(model)` and set the masks of the model "
                "that it returns."
            )
    values = {}
    for path, array in masks.items():
        array = np.asarray(array)
        if path not in refs:
            raise ValueError(
                f"The model has no masked weight at '{path}'. Its masked weights: {list(refs)}"
            )
        shape = tuple(refs[path].variable.shape)
        if array.shape != shape:
            raise ValueError(
                f"The mask of '{path}' must have the shape of the weight, {shape}. "
                f"Received: {array.shape}"
            )
        if array.dtype != bool and not np.isin(array, (0, 1)).all():
            raise ValueError(
                f"The mask of '{path}' must be of dtype bool or contain only 0 and 1. "
                f"Received: dtype {array.dtype}, values from {array.min()} to {array.max()}"
            )
        values[path] = array.astype(bool, copy=False)
    workers.check_outside_replicas("set_masks")
    for path in [*values][:1]:
        workers.check_agreement(refs[path].mask.value, values.values(), "masks")
    _keras.sync(model)
    for path, value in values.items():
        # A copy, one at a time: backends may use the memory of an array that is assigned.
        refs[path].mask.value.assign(np.array(value, dtype=bool))


def set_rescale(model: Layer, rescale: bool | Mapping[str, bool]) -> bool:
    """Turns the rescaling of kept weights by `size / ones(mask)` on or off.

    Unlike an assignment to `Mask.rescale`, this also takes effect in functions that are already
    compiled: those of this model, and of every model that contains one of its layers, are compiled
    again. It can be called between two batches of `fit`. On TensorFlow, a warning names each custom
    `tf.function` that must be created again.

    Args:
        model: A masked model.
        rescale: Whether the masks rescale, as a bool for all masks or as a dict from paths of
            masked weights to bools. Other masks are not changed.

    Returns:
        Whether any mask was changed.

    Raises:
        ValueError: If the model has no masked weight, a path does not name a masked weight, or a
            value is not a bool. No mask is changed then.
    """
    masks = {ref.path: ref.mask for ref in masked_refs(model)}
    flags = rescale if isinstance(rescale, Mapping) else dict.fromkeys(masks, rescale)
    for path, flag in flags.items():
        if path not in masks:
            raise ValueError(
                f"The model has no masked weight at '{path}'. Its masked weights: {list(masks)}"
            )
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(
                f"`rescale` must be a bool, or a dict from paths to bools. Received: {flag!r}"
            )
    changed = [path for path, flag in flags.items() if masks[path].rescale != flag]
    for path in changed:
        masks[path].rescale = bool(flags[path])
    if changed:
        remake_functions(model)
    return bool(changed)


def save_masks(model: Layer, path: str | os.PathLike[str]) -> None:
    """Saves the masks of a model to one file with one bit per weight (NumPy's `.npz` format).

    An existing file is replaced only when the new one is complete.

    Args:
        model: A masked model.
        path: Path of the file.

    Raises:
        ValueError: If the model has no masked weight.
    """
    arrays = {}
    for name, mask in get_masks(model).items():
        arrays[f"bits/{name}"] = pack(mask)
        arrays[f"shape/{name}"] = np.array(mask.shape, dtype=np.int64)
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_masks(model: Layer, path: str | os.PathLike[str]) -> None:
    """Loads masks saved by `save_masks` into a masked model of the same architecture.

    Args:
        model: A masked model.
        path: Path of the file.

    Raises:
        OSError: If the file is missing or cannot be read.
        FileContentError: If the file was not written by `save_masks`, a mask in it has the wrong
            number of bits, or its paths and shapes do not match the model's masked weights. No mask
            is changed then.
    """
    masks = {}
    refs = refs_with_masks(model)
    # Leaves room for the masks of a larger model, which the error below names, but not for a file
    # of malicious size.
    limit = _OTHER_MASKS + sum(math.prod(ref.variable.shape) for ref in refs)
    try:
        arrays = read_npz(path, limit=limit)
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            if kind == "shape":
                shape = tuple(map(operator.index, array))
                try:
                    masks[name] = unpack(arrays[f"bits/{name}"], shape)
                except ValueError as error:
                    raise ValueError(f"of '{name}', {error}") from error
    except OSError:
        raise
    except Exception as error:
        raise FileContentError(f"'{path}' was not written by `save_masks`: {error}") from error
    if not masks:
        raise FileContentError(f"'{path}' was not written by `save_masks`: it contains no mask.")
    missing = [ref.path for ref in refs if ref.path not in masks]
    if missing:
        raise FileContentError(
            f"'{path}' has no mask for these weights of the model: {missing}. It contains masks "
            f"for: {list(masks)}"
        )
    try:
        set_masks(model, masks)
    except ValueError as error:
        raise FileContentError(f"'{path}' does not fit the model: {error}") from error


# --- Report ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SparsityRow:
    """Counts of one masked weight.

    Attributes:
        path: Path of the weight.
        shape: Shape of the weight.
        alive: Number of kept entries.
        mask_bytes: Size of the mask in memory, including frozen values.
        frozen: Number of pruned entries that are frozen at values other than 0.
        effective: Number of kept entries on a path from an input to an output of the model, if
            `effective_sparsity` has counted them, or None.
    """

    path: str
    shape: tuple[int, ...]
    alive: int
    mask_bytes: int
    frozen: int = 0
    effective: int | None = None

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def sparsity(self) -> float:
        """Share of pruned entries."""
        return 1.0 - self.alive / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """Sparsity of each masked weight of a model; iterates over rows and prints as a table.

    Attributes:
        rows: One row per masked weight.
        unmasked: (path, class, number of weights) for every layer with weights but without masks,
            either because it cannot be masked, like normalization, or because it was left out of
            the conversion. A layer with masks is also listed if it has weights of two or more
            dimensions that are not registered.
        reasons: The reason for each entry of `unmasked`, by path.
    """

    rows: tuple[SparsityRow, ...]
    unmasked: tuple[tuple[str, str, int], ...]
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of masked weights, kept and pruned."""
        return sum(row.size for row in self.rows)

    @property
    def alive(self) -> int:
        """Number of kept weights."""
        return sum(row.alive for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of pruned weights among all masked weights."""
        return 1.0 - self.alive / self.size if self.size else 0.0

    @property
    def effective(self) -> int | None:
        """Number of kept weights on paths from inputs to outputs; None if not counted."""
        counts = [row.effective for row in self.rows if row.effective is not None]
        return sum(counts) if len(counts) == len(self.rows) else None

    @property
    def effective_sparsity(self) -> float | None:
        """Share of masked weights that are pruned or have no effect; None if not counted."""
        if self.effective is None:
            return None
        return 1.0 - self.effective / self.size if self.size else 0.0

    @property
    def frozen(self) -> int:
        """Number of pruned weights that are frozen at values other than 0."""
        return sum(row.frozen for row in self.rows)

    @property
    def mask_bytes(self) -> int:
        """Size of all masks in memory in bytes, including frozen values."""
        return sum(row.mask_bytes for row in self.rows)

    def __iter__(self) -> Iterator[SparsityRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-serializable numbers, strings, lists and dicts."""
        total = {"size": self.size, "alive": self.alive, "sparsity": self.sparsity}
        total |= {"frozen": self.frozen, "mask_bytes": self.mask_bytes}
        return {
            "total": total | _counted(self.effective),
            "weights": [
                {
                    "path": row.path,
                    "shape": list(row.shape),
                    "size": row.size,
                    "alive": row.alive,
                    "sparsity": row.sparsity,
                    "frozen": row.frozen,
                    "mask_bytes": row.mask_bytes,
                }
                | _counted(row.effective)
                for row in self.rows
            ],
            "unmasked": [
                {
                    "path": path,
                    "layer": layer,
                    "weights": count,
                    "reason": self.reasons.get(path, ""),
                }
                for path, layer, count in self.unmasked
            ],
        }

    def __str__(self) -> str:
        total = SparsityRow(
            "total", (self.size,), self.alive, self.mask_bytes, effective=self.effective
        )
        names = ["masked weight", "shape", "weights", "kept", "sparsity", "mask bytes"]
        lines = [names + ["effective"] * (self.effective is not None)]
        for row in (*self.rows, total):
            shape = "" if row is total else str(row.shape)
            numbers = (f"{row.size:,}", f"{row.alive:,}", f"{row.sparsity:.2%}")
            line = [row.path, shape, *numbers, f"{row.mask_bytes:,}"]
            lines.append(line if self.effective is None else [*line, f"{row.effective:,}"])
        text = aligned(lines, left=range(2))
        if (effective := self.effective) is not None:
            text.append(
                f"kept weights not on a path from an input to an output: "
                f"{self.alive - effective:,}; effective sparsity {self.effective_sparsity:.2%}"
            )
        if emptied := [row.path for row in self.rows if row.size and not row.alive]:
            text.append(f"nothing is left of: {', '.join(emptied)}")
        if self.frozen:
            text.append(
                f"pruned weights frozen at values other than 0: {self.frozen:,}; without them "
                f"{(self.size - self.alive - self.frozen) / self.size:.2%} are zero"
            )
        if self.unmasked:
            count = sum(count for *_, count in self.unmasked)
            text.append(f"layers without masks ({count:,} weights):")
            by_reason: dict[str, list[str]] = {}
            for path, layer, _ in self.unmasked:
                by_reason.setdefault(self.reasons.get(path, ""), []).append(f"{path} ({layer})")
            text += [f"  {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
        return "\n".join(text)


def _counted(effective: int | None) -> dict[str, int]:
    return {} if effective is None else {"effective": effective}


def sparsity_report(model: Layer) -> SparsityReport:
    """Counts the kept and pruned weights of a masked model.

    Args:
        model: A masked model or layer.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: If it is neither.
        ValueError: If the model has no masked weight.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"Expected a `keras.Model` or a layer. Received: {model!r}")
    _keras.sync(model)
    rows = tuple(_row(ref) for ref in masked_refs(model))
    unmasked, reasons, hidden = [], {}, overwritten(model)
    for path, layer in walk(model):
        variables = _keras.own_variables(layer)
        if any(mask_of(layer, name) for name in own_weights(layer, biases=True)):
            variables = unknown_kernels(layer)
        if count := sum(int(np.prod(variable.shape)) for variable in variables):
            path = path or model.name
            unmasked.append((path, plain_class(layer).__name__, count))
            reasons[path] = why_unmasked(layer, id(layer) in hidden)
    return SparsityReport(rows, tuple(unmasked), reasons)


def _row(ref: MaskedRef) -> SparsityRow:
    mask, frozen = ref.mask.to_numpy(), 0
    if ref.mask.frozen is not None:
        frozen = int(np.count_nonzero(keras.ops.convert_to_numpy(ref.mask.frozen)[~mask]))
    nbytes = sum(
        math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
        for variable in _keras.own_variables(ref.mask)
    )
    return SparsityRow(ref.path, mask.shape, int(np.count_nonzero(mask)), nbytes, frozen)
