"""The weights that were trained in each round of a search, in memory or in files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.fingerprints import digest
from lottery_ticket_pruner.overrides import assign, freeze
from lottery_ticket_pruner.variables import viewed
from masked_layers.archives import read_npz
from masked_layers.files import FileContentError, replacing

Masks = Mapping[str, np.ndarray]


class TrainedRounds:
    """The trained weights of each round. Of masked weights, only the kept ones are stored.

    With masks of one byte per weight, which a result has anyway, nothing else is needed to compute
    what the model computed after the round.

    Args:
        folder: Folder for a file of each round. None to keep the weights in memory.
        identity: A hash of everything that determines the results, so that files of another search
            that was started in the same folder are noticed.
    """

    def __init__(self, folder: Path | None = None, identity: str = "") -> None:
        self._folder, self._identity = folder, identity
        self._in_memory: dict[int, dict[str, np.ndarray]] = {}

    def keep(self, model: keras.Model, number: int, masks: Masks) -> None:
        """Keeps the current weights of a masked model as those of a round.

        Args:
            model: The model, with the masks of the round.
            number: Number of the round.
            masks: The masks.
        """
        arrays = dict(_arrays(model, masks))
        if self._folder is None:
            self._in_memory[number] = arrays
            return
        arrays["search"] = np.array(self._belongs_to(number, masks))
        with replacing(self._file(number)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def restore(self, model: keras.Model, number: int, masks: Masks) -> None:
        """Sets the masks and weights of a round in the model. Raw values of pruned weights are 0.

        Raises:
            FileNotFoundError: If they are not kept, or their file is missing.
            FileContentError: If the file is damaged, or belongs to another search.
            ValueError: If the model has other weights. In all cases, nothing is changed.
        """
        arrays = self._read(number, masks)
        refs = {id(ref.variable): ref for ref in ml.masked_refs(model)}
        values, frozen = [], {}
        for position, variable in enumerate(model.weights):
            value, ref = arrays.get(f"weight/{position}"), refs.get(id(variable))
            shape = tuple(variable.shape)
            there = shape if ref is None else (int(masks[ref.path].sum()),)
            if value is None or value.shape != there:
                raise ValueError(
                    f"The weights of round {number} do not fit the model {model.name!r}: there are "
                    f"{None if value is None else value.shape} values for {variable.path}, which "
                    f"needs {there}."
                )
            if ref is not None:
                whole = np.zeros(shape, value.dtype)
                whole[masks[ref.path]] = value
                value, frozen[ref.mask] = whole, arrays.get(f"frozen/{position}")
            values.append(value)
        ml.set_masks(model, masks)
        assign(model.weights, values)
        freeze(model, frozen)

    def _read(self, number: int, masks: Masks) -> dict[str, np.ndarray]:
        if self._folder is None:
            if number not in self._in_memory:
                raise FileNotFoundError(
                    f"The weights that were trained in round {number} were not kept."
                )
            return self._in_memory[number]
        file = self._file(number)
        if not file.is_file():
            raise FileNotFoundError(
                f"The weights that were trained in round {number} should be in '{file}', but there "
                "is no such file. It was removed, or the round was trained by an earlier version, "
                "which kept only the last one. Search again in another folder to have them."
            )
        arrays = read_npz(file)
        if str(arrays.pop("search", None)) != self._belongs_to(number, masks):
            raise FileContentError(
                f"'{file}' belongs to another search, which was started in the same folder later, "
                f"so the weights of round {number} are lost."
            )
        return arrays

    def _belongs_to(self, number: int, masks: Masks) -> str:
        return f"{self._identity} {number} {digest(dict(masks))}"

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"trained-{number:02}.npz"


def _arrays(model: keras.Model, masks: Masks) -> Iterator[tuple[str, np.ndarray]]:
    """Yields copies of the kept weights, of frozen values, and of all other weights."""
    ml.sync(model)
    refs = {id(ref.variable): ref for ref in ml.masked_refs(model)}
    for position, variable in enumerate(model.weights):
        ref = refs.get(id(variable))
        if ref is None:
            yield f"weight/{position}", np.array(viewed(variable))
            continue
        yield f"weight/{position}", viewed(variable)[masks[ref.path]]
        if ref.mask.frozen is not None:
            yield f"frozen/{position}", np.array(viewed(ref.mask.frozen))
