"""Saves masked models as tickets: one file with a config, masks and kept weights or signs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from masked_layers import _keras, _keras_configs, ticket_format
from masked_layers.files import FileContentError, check_target, replacing, temporary_folder
from masked_layers.inspection import channel_refs, refs_with_masks
from masked_layers.keras_files import load_model, reason_of
from masked_layers.masks import Mask, raw_view
from masked_layers.model_state import State, state_variables
from masked_layers.packing import MaskState
from masked_layers.paths import plain_class, walk
from masked_layers.streams import dtype_of
from masked_layers.ticket_format import Entry, Ticket

SUFFIX = ".safetensors"


class UnsuitableModelError(ValueError):
    """An error for models that a ticket file cannot describe.

    Attributes:
        reason: Why, without advice.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason = reason


def save_ticket(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    signs_only: bool = False,
    weights: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Saves a masked model as a ticket: its config, its masks and the weights that they keep.

    The file has the safetensors format and contains no code. It is about as large as the weights in
    a sparse SavedModel or, with `signs_only`, as the masks and one bit per kept weight. The raw
    values of pruned weights and the state of the optimizer are not saved. An existing file is
    replaced only when the new one is complete.

    Args:
        model: A masked model.
        path: Path of the file.
        signs_only: Whether to save only the masks and the signs of the weights that they keep, and
            nothing of other weights.
        weights: Values to save in place of the current ones, by path, such as the
            `initial_weights` of a `LotteryTicketPruner`. Default: the values of the model.

    Raises:
        OSError: If the file cannot be written, because its folder is missing, for example.
        TypeError: If `model` is not a Keras model, or `weights` is not a mapping.
        ValueError: If the model has no masked weight, a mask is learned, `weights` names an unknown
            weight or has another shape, Keras cannot make the model from its config, pruned weights
            are frozen at values that `signs_only` leaves out, or a layer has other state than
            variables, such as an adapted vocabulary.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    if not isinstance(weights or {}, Mapping):
        raise TypeError(
            "`weights` must be a dict from paths to arrays, such as the `initial_weights` of a "
            f"`LotteryTicketPruner`. Received: {type(weights).__name__}"
        )
    check_target(path)
    _check_state(model)
    entries = _entries(model, weights or {}, signs_only)
    config = _keras_configs.serialize(model)
    config.pop("compile_config", None)
    try:
        with _keras.drawn_apart():
            _make(config, entries, every=not signs_only, keep=False)
    except Exception as error:  # Layers may raise any error.
        raise UnsuitableModelError(
            f"'{model.name}' cannot be saved as a ticket, because Keras cannot make the same model "
            f"from its config: {_reason(error)}",
            "Save it with `model.save('NAME.keras')`.",
        ) from error
    data = ticket_format.pack(Ticket(config, entries, signs_only))
    with replacing(path) as file:
        file.write(data)


def load_ticket(path: str | os.PathLike[str]) -> keras.Model:
    """Makes the masked model of a ticket file. It is not compiled.

    The outputs are those of the saved model, and raw values of pruned weights are 0. If the file
    contains only signs, weights are newly drawn by the initializers of their layers, and kept ones
    get the signs of the ticket. `keras.utils.set_random_seed` makes them repeatable.

    Custom layers must be imported, or registered with `keras.saving.register_keras_serializable`,
    as for `keras.models.load_model`. `Lambda` layers, which contain code, are refused as there.

    Args:
        path: Path of the file.

    Returns:
        The model.

    Raises:
        OSError: If the file is missing or cannot be read.
        FileContentError: If it is not a ticket, is cut short or damaged, or Keras cannot make its
            model. No more memory is allocated than the length of the file can justify.
    """
    return _model_of(_read(path), path)


def load_with_values(path: str | os.PathLike[str]) -> keras.Model:
    """Makes the masked model of a ticket file that contains its weights, as `load_ticket` does.

    Raises:
        OSError: If the file is missing or cannot be read.
        FileContentError: If `load_ticket` raises it, or the file contains only signs.
    """
    ticket = _read(path)
    if ticket.signs_only:
        raise FileContentError(
            f"'{path}' contains only the signs of weights. Load it with "
            "`masked_layers.load_ticket`, train the model and save that."
        )
    return _model_of(ticket, path)


def load_saved(path: Path) -> keras.Model:
    """Makes the model of a ticket file with values (`.safetensors`), or of a `.keras` file.

    It is not compiled.

    Raises:
        OSError: If the file is missing or cannot be read.
        FileContentError: If it is damaged, or Keras cannot make its model.
    """
    return load_with_values(path) if path.suffix == SUFFIX else load_model(path)


def _read(path: str | os.PathLike[str]) -> Ticket:
    data = Path(path).read_bytes()
    try:
        return ticket_format.unpack(data)
    # JSON, NumPy and safetensors raise many kinds of errors for wrong bytes.
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise FileContentError(
            f"'{path}' is not a ticket file, or is cut short or damaged: {reason}. Restore it from "
            "a copy, or save the ticket again."
        ) from error


def _model_of(ticket: Ticket, path: str | os.PathLike[str]) -> keras.Model:
    # With signs only, the weights are those that the layers draw.
    apart = contextlib.nullcontext() if ticket.signs_only else _keras.drawn_apart()
    try:
        with apart:
            model, state = _make(ticket.config, ticket.entries, every=not ticket.signs_only)
    except Exception as error:  # Layers may raise any error.
        raise FileContentError(
            f"The model in '{path}' cannot be made from its config: {_reason(error)} Custom "
            "layers must be imported first."
        ) from error
    for entry in ticket.entries:
        _fill(*state[entry.path], entry, ticket.signs_only)
    _derive_state(model)
    return model


def _reason(error: Exception) -> str:
    if "in a stateless scope" in str(error):
        return "a layer makes a variable from a value, and not by `add_weight`."
    return reason_of(error)


def _check_state(model: keras.Model) -> None:
    """Checks that the variables of a model are all its state besides its config.

    Raises:
        ValueError: If a layer has more.
    """
    for path, layer in walk(model):
        kind = plain_class(layer).__name__
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            reason = "is stateful, and Keras makes the variables of its states from values"
        elif _saves_more(layer):
            reason = "saves more than its variables, such as an adapted vocabulary"
        else:
            continue
        raise UnsuitableModelError(
            f"'{path}' ({kind}) cannot be saved in a ticket: it {reason}.",
            "Save the model with `model.save('NAME.keras')`; a vocabulary can be passed to the "
            "layer's constructor too.",
        )


def _saves_more(layer: keras.layers.Layer) -> bool:
    """Returns whether Keras saves anything of a layer besides its variables and its config."""
    save = plain_class(layer).save_own_variables
    if save is not keras.layers.Layer.save_own_variables:
        store: dict[str, Any] = {}
        with raw_view():
            save(layer, store)
        if len(store) > len(_keras.own_variables(layer)):
            return True
    if not hasattr(layer, "save_assets"):
        return False
    with temporary_folder() as folder:
        layer.save_assets(str(folder))
        return any(file.is_file() for file in folder.rglob("*"))


def _derive_state(model: keras.Model) -> None:
    """Lets layers compute what they derive from their variables when these are loaded.

    `Normalization` does, for example.
    """
    for _, layer in walk(model):
        loads = next(c for c in plain_class(layer).__mro__ if "load_own_variables" in vars(c))
        # Keras' layers with kernels derive nothing, and would merge LoRA's factors into them.
        if loads is not keras.layers.Layer and "enable_lora" not in vars(loads):
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            layer.load_own_variables(
                {name: np.array(keras.ops.convert_to_numpy(value)) for name, value in store.items()}
            )


def _state(model: keras.Model) -> State:
    """Returns (variable, mask or None) by path for all state of a model, without its masks."""
    leaving = {id(ref.variable): ref.mask for ref in channel_refs(model)}
    return {
        path: (variable, leaving.get(id(variable), mask))
        for path, (variable, mask) in state_variables(model).items()
    }


def _entries(
    model: keras.Model, weights: Mapping[str, np.ndarray], signs_only: bool
) -> list[Entry]:
    """Returns the weights to save, beginning with masked ones."""
    _keras.sync(model)
    for ref in refs_with_masks(model):
        if ref.mask.learned:
            raise ValueError(
                f"The mask of '{ref.path}' is learned. Call `masked_layers.harden(model)` first "
                "and save the model that it returns."
            )
        if signs_only and ref.mask.frozen is not None:
            raise ValueError(
                f"Pruned weights of '{ref.path}' are frozen at values, which a ticket of signs "
                "does not contain. Save it without `signs_only`."
            )
    state = _state(model)
    if unknown := sorted(weights.keys() - state.keys()):
        raise ValueError(
            f"`weights` names weights that the model does not have: {unknown}. Its weights: "
            f"{list(state)}"
        )
    entries = []
    for path, (variable, mask) in state.items():
        array = np.array(keras.ops.convert_to_numpy(variable))
        if path in weights:
            given = np.asarray(weights[path])
            if given.shape != array.shape:
                raise ValueError(
                    f"`weights` of '{path}' must have the shape {array.shape}. Received: "
                    f"{given.shape}"
                )
            array = given.astype(array.dtype)
        if mask is not None or not signs_only:
            entries.append(_entry(path, array, mask, signs_only))
    return sorted(entries, key=lambda entry: entry.kept is None)


def _entry(path: str, array: np.ndarray, mask: Mask | None, signs_only: bool) -> Entry:
    dtype_of(array.dtype.name)
    state = None if mask is None else mask.state
    values = array.ravel() if state is None else array[state.kept]
    return Entry(
        path=path,
        shape=array.shape,
        dtype=array.dtype.name,
        kept=None if state is None else state.kept,
        values=np.signbit(values) if signs_only else values,
        rescale=state is not None and state.rescale,
        frozen=None if state is None or state.frozen is None else state.frozen[~state.kept],
        quantization=None if state is None else state.quantization,
    )


def _make(
    config: dict[str, Any], entries: Sequence[Entry], *, every: bool, keep: bool = True
) -> tuple[keras.Model, State]:
    """Makes a model from its config, after checking that it has the weights of a ticket.

    Args:
        config: Config of the model.
        entries: Weights that it should have.
        every: Whether it should have no others.
        keep: Whether the model is used. If not, no memory is allocated for its weights.
    """
    with _keras_configs.variables_made_last(keep=keep):
        # A copy, as Keras empties configs, and through JSON, as in the file.
        copy = json.loads(json.dumps(config))
        model = _keras_configs.deserialize(copy, safe_mode=True)
        if not isinstance(model, keras.Model):
            raise ValueError(f"it describes a {type(model).__name__}.")
        state = _state(model)
        for entry in entries:
            if entry.path not in state:
                raise ValueError(f"it has no weight '{entry.path}'.")
            variable, mask = state[entry.path]
            if tuple(variable.shape) != entry.shape:
                raise ValueError(
                    f"its weight '{entry.path}' has the shape {tuple(variable.shape)}, not "
                    f"{entry.shape}."
                )
            if (mask is None) != (entry.kept is None):
                raise ValueError(f"its weight '{entry.path}' should be masked, or should not.")
            dtype = keras.backend.standardize_dtype(variable.dtype)
            # States of random numbers have another integer type on torch.
            both_int = "int" in dtype and "int" in entry.dtype
            if not both_int and not np.can_cast(dtype_of(entry.dtype), dtype_of(dtype)):
                raise ValueError(f"its weight '{entry.path}' is {dtype}, not {entry.dtype}.")
        if every and (more := sorted(state.keys() - {entry.path for entry in entries})):
            raise ValueError(f"it has further weights: {more}.")
    return model, state


def _fill(variable: keras.Variable, mask: Mask | None, entry: Entry, signs_only: bool) -> None:
    """Sets a weight of a new model, and its mask, to those of a ticket."""
    kept = np.ones(entry.shape, bool) if entry.kept is None else entry.kept
    values = entry.values
    if signs_only:
        drawn = np.abs(keras.ops.convert_to_numpy(variable)[kept])
        values = np.where(values, -drawn, drawn)
    array = np.zeros(entry.shape, variable.dtype if signs_only else entry.values.dtype)
    array[kept] = values
    variable.assign(array)
    if mask is not None and entry.kept is not None:
        frozen = None
        if entry.frozen is not None:
            frozen = np.zeros(entry.shape, entry.frozen.dtype)
            frozen[~kept] = entry.frozen
        mask.restore(MaskState(entry.kept, entry.rescale, frozen, entry.quantization))
