"""Records of the weights of a model: read-only copies, comparison with a model, and the file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.variables import read
from masked_layers import paths, workers
from masked_layers.archives import read_npz
from masked_layers.files import FileContentError, replacing

if TYPE_CHECKING:
    from masked_layers import WeightRef

_FORMAT = "lottery-ticket-pruner"
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The paths and shapes of a model's weights, in the order of `model.weights`.

    Attributes:
        paths: Path of each weight, each different.
        shapes: Shape of each weight.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: keras.Model) -> Architecture:
        """Reads the architecture of a built model."""
        shapes = tuple(tuple(variable.shape) for variable in model.weights)
        return cls(tuple(_weight_paths(model)), shapes)

    def check(self, model: keras.Model) -> None:
        """Raises an error if a model has different weights.

        Args:
            model: Model to check.

        Raises:
            ValueError: If the weights differ. The message names the layer and both shapes.
        """
        shapes = [tuple(variable.shape) for variable in model.weights]
        if shapes != list(self.shapes):
            self.compare(_weight_paths(model), shapes, f"The model {model.name!r}")

    def compare(
        self,
        keys: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        what: str,
        error: type[ValueError] = ValueError,
    ) -> None:
        """Raises an error that names the first difference, if any.

        Args:
            keys: Paths of the other weights.
            shapes: Shapes of the other weights.
            what: Description of their owner, for the message.
            error: Type of the error.

        Raises:
            ValueError: Or `error`, if the paths or shapes differ.
        """
        for i in range(max(len(keys), len(self.paths))):
            found = (keys[i], tuple(shapes[i])) if i < len(keys) else None
            expected = (self.paths[i], self.shapes[i]) if i < len(self.paths) else None
            if found is None or expected is None or found[1] != expected[1]:
                raise error(
                    f"{what} does not fit this pruner: it has {_describe(found)} where the pruner "
                    f"has {_describe(expected)}. Both must be of the same architecture."
                )


def _describe(weight: tuple[str, tuple[int, ...]] | None) -> str:
    """Describes a weight in words."""
    if weight is None:
        return "no further weight"
    layer, _, name = weight[0].rpartition("/")
    return f"{name!r} of layer {layer!r} with shape {weight[1]}"


def is_masked(model: keras.Model) -> bool:
    """Returns whether any weight of the model has a mask."""
    return any(ref.mask is not None for ref in ml.weight_refs(model))


def check_binary_masks(model: keras.Model, method: str) -> None:
    """Raises a ValueError if a model has no masks, or learned ones.

    Args:
        model: The model of a pruner.
        method: Name of the pruner's method that needs binary masks.
    """
    workers.check_outside_replicas(method)
    if not is_masked(model):
        raise ValueError(
            f"`{method}` needs a masked model, but {model.name!r} is plain. Create the "
            "pruner for `masked_layers.convert_to_masked(model)` instead, or use "
            "`calc_prune_mask`, `apply_pruning` and `PrunerCallback` with the plain model."
        )
    if any(ref.mask.learned for ref in ml.masked_refs(model)):
        raise ValueError(
            f"`{method}` needs binary masks, but those of {model.name!r} are learned. "
            "Create the pruner for `masked_layers.harden(model)` instead."
        )


def prunables(model: keras.Model) -> dict[int, WeightRef]:
    """Returns the masked weights of a model, or all maskable weights if none is, by position."""
    positions = {id(variable): i for i, variable in enumerate(model.weights)}
    refs = {positions[id(ref.variable)]: ref for ref in ml.weight_refs(model)}
    return {i: ref for i, ref in refs.items() if ref.mask is not None} or refs


def channel_scales(model: keras.Model) -> dict[int, WeightRef]:
    """Returns the scales whose masks leave channels out of a normalization, by position."""
    positions = {id(variable): i for i, variable in enumerate(model.weights)}
    return {positions[id(ref.variable)]: ref for ref in ml.channel_refs(model)}


def _weight_paths(model: keras.Model) -> list[str]:
    """Returns a unique path for each weight of the model, in order."""
    names = {
        id(variable): paths.join(path, variable.name)
        for path, layer in paths.walk(model)
        for variable in _keras.own_variables(layer)
    }
    names |= {id(ref.variable): ref.path for ref in ml.weight_refs(model)}
    keys: dict[str, None] = {}
    for variable in model.weights:
        key = name = names.get(id(variable), variable.path)
        count = 0
        while key in keys:
            count += 1
            key = f"{name}_{count}"
        keys[key] = None
    return list(keys)


def snapshot(model: keras.Model) -> tuple[np.ndarray, ...]:
    """Returns a read-only copy of each weight of the model, in the order of `model.weights`."""
    ml.sync(model)
    return read_only(read(variable) for variable in model.weights)


def read_only(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Makes the arrays read-only, and returns them."""
    arrays = tuple(arrays)
    for array in arrays:
        array.flags.writeable = False
    return arrays


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Saved:
    """The state of a pruner as stored in its file: arrays and JSON, without pickled objects.

    Attributes:
        paths: Path of each weight.
        initial: Initial weights, by position.
        final: Final weights, by position, or None.
        final_is_new: Whether the final weights were recorded after the last update of masks.
        updates: Number of updates since the masks were last reset.
        clocks: Steps and learning rates of the optimizers, recorded with the initial weights.
        masks: Bool masks, by position.
        frozen: Values that pruned weights are frozen at, by position.
        factors: Factors that `apply_dwr` has multiplied weights of a plain model by, by position.
        unscaled: These weights before the multiplication, by position.
    """

    paths: Sequence[str]
    initial: tuple[np.ndarray, ...]
    final: tuple[np.ndarray, ...] | None
    final_is_new: bool
    updates: int
    clocks: Sequence[tuple[int, float | None]]
    masks: Mapping[int, np.ndarray]
    frozen: Mapping[int, np.ndarray]
    factors: Mapping[int, float]
    unscaled: Mapping[int, np.ndarray]

    def write(self, file: str | os.PathLike[str]) -> None:
        """Writes the file. An existing file is replaced completely or not at all."""
        state = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "paths": list(self.paths),
            "masked": list(self.masks),
            "final": self.final is not None,
            "final_is_new": self.final_is_new,
            "updates": self.updates,
            "clocks": list(self.clocks),
            "rescaled": list(self.factors.items()),
        }
        arrays = {"state": np.array(json.dumps(state))}
        arrays |= {f"initial/{i}": array for i, array in enumerate(self.initial)}
        arrays |= {f"final/{i}": array for i, array in enumerate(self.final or ())}
        arrays |= {f"mask/{i}": mask for i, mask in self.masks.items()}
        arrays |= {f"unscaled/{i}": array for i, array in self.unscaled.items()}
        arrays |= {f"frozen/{i}": array for i, array in self.frozen.items()}
        with replacing(file) as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Saved:
        """Reads a file written by `write`.

        Raises:
            FileContentError: If the file was not written by `write`.
        """
        try:
            arrays = read_npz(file)
            state = json.loads(str(arrays.pop("state")))
            if state["format"] != _FORMAT or state["version"] != _FORMAT_VERSION:
                raise ValueError(f"format {state['format']} {state['version']}")
            _check_state(state, arrays)
            return cls._of(state, arrays)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise FileContentError(
                f"{file} was not written by `LotteryTicketPruner.save` of this version: {error}"
            ) from error

    @classmethod
    def _of(cls, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Saved:
        def found(kind: str, numbers: Iterable[int]) -> dict[int, np.ndarray]:
            return {i: arrays[f"{kind}/{i}"] for i in numbers if f"{kind}/{i}" in arrays}

        everywhere, masked = range(len(state["paths"])), state["masked"]
        final = read_only(arrays[f"final/{i}"] for i in everywhere) if state["final"] else None
        return cls(
            paths=state["paths"],
            initial=read_only(arrays[f"initial/{i}"] for i in everywhere),
            final=final,
            final_is_new=state["final_is_new"],
            updates=state["updates"],
            clocks=[tuple(clock) for clock in state["clocks"]],
            masks={i: arrays[f"mask/{i}"] for i in masked},
            frozen=found("frozen", masked),
            factors=dict(state["rescaled"]),
            unscaled=found("unscaled", masked),
        )


def _check_state(state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises an error that names arrays of the wrong type or shape."""
    for number, path in enumerate(state["paths"]):
        there = {"initial weights": arrays[f"initial/{number}"]}
        shape = there["initial weights"].shape
        if state["final"]:
            there["final weights"] = arrays[f"final/{number}"]
        if number in state["masked"]:
            there["mask"] = arrays[f"mask/{number}"]
        if f"frozen/{number}" in arrays:
            there["frozen values"] = arrays[f"frozen/{number}"]
        if f"unscaled/{number}" in arrays:
            there["weights before rescaling"] = arrays[f"unscaled/{number}"]
        for what, array in there.items():
            if array.shape != shape or array.dtype.kind not in ("b" if what == "mask" else "fiub"):
                raise ValueError(
                    f"{what} of {array.dtype}{array.shape} for {path}, which has shape {shape}"
                )
