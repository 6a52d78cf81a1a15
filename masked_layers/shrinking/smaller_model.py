"""Rebuilds a model without the units and filters that its outputs do not need.

Pruning whole filters leaves channels that no layer reads and channels whose value is constant.
`shrink` follows every channel through the graph with the rules in `rules.py`:

1. *Forward*, it finds the channels with a constant value, and those that can only be removed
   together.
2. *Backward*, it finds the channels that the outputs need. A constant is needed only if it cannot
   be moved into a bias exactly.
3. It rebuilds the model from configs with smaller widths, and slices the weights.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import attrgetter
from typing import Any, Literal, overload

import keras
import numpy as np

from masked_layers import _keras, _keras_configs
from masked_layers.conversion import strip_weight_masks
from masked_layers.copying import as_in_use, copy_assets, in_use_by_name
from masked_layers.inspection import channel_refs
from masked_layers.keras_files import reason_of
from masked_layers.layers import MaskedLayer
from masked_layers.paths import plain_class, walk
from masked_layers.shrinking import _keras_graph
from masked_layers.shrinking.channels import Channels, Edit, Flow, Reader, constant_shift
from masked_layers.shrinking.compilation import Copied, compile_like
from masked_layers.shrinking.following import follow, variable_of
from masked_layers.shrinking.kept_masks import carry_masks, check_masks
from masked_layers.shrinking.rules import array, rule_of


@dataclass(frozen=True)
class ShrinkRow:
    """The numbers of units or filters of one layer, before and after `shrink`.

    Attributes:
        layer: Name of the layer; "nested/name" inside a nested model. The heads and widths inside
            an attention layer have rows of their own: "name heads", "name key_dim" and so on.
        kind: Class name of the layer.
        before: Number of units or filters before.
        after: Number of units or filters after.
        constant: Number removed because their value was constant. It was moved into the biases of
            the layers that read them.
        unread: Number removed because no output depended on them.
        kept: Reason -> number of constant units or filters that could not be removed.
        weights_before: Number of weights of the layer before, biases included.
        weights_after: Number of weights of the layer after.
        macs_before: Multiply-adds of its kernels for one example, and of the products of queries,
            keys and values in attention; None if a shape is not known.
        macs_after: The same number after. In the rows of what is inside an attention layer, these
            four are 0, since the row of its outputs counts all of its weights.
    """

    layer: str
    kind: str
    before: int
    after: int
    constant: int
    unread: int
    kept: Mapping[str, int]
    weights_before: int = 0
    weights_after: int = 0
    macs_before: int | None = 0
    macs_after: int | None = 0


@dataclass(frozen=True)
class ShrinkReport:
    """A report of what `shrink` removed and kept. It prints as a table and iterates over its rows.

    Attributes:
        rows: One `ShrinkRow` per layer that makes channels, in the order of the graph.
        not_followed: Name of a layer whose inputs and outputs were left whole -> the reason.
        unread: Name of a layer whose input was left whole, such as an input of the model -> the
            positions of the input channels that all of its weights ignore.
        weights_before: Number of weights of the original model.
        weights_after: Number of weights of the smaller model.
        macs_before: Multiply-adds of the followed layers of the original model for one example, or
            None if a shape is unknown.
        macs_after: Multiply-adds of the same layers of the smaller model, or None.
    """

    rows: tuple[ShrinkRow, ...]
    not_followed: Mapping[str, str]
    unread: Mapping[str, tuple[int, ...]]
    weights_before: int
    weights_after: int
    macs_before: int | None
    macs_after: int | None

    def __iter__(self) -> Iterator[ShrinkRow]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts, lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([5, *(len(row.layer) for row in self.rows)])
        lines = [f"{'layer':<{width}}  before   after  constant  unread      weights        left"]
        for row in self.rows:
            lines.append(
                f"{row.layer:<{width}}  {row.before:>6}  {row.after:>6}  {row.constant:>8}"
                f"  {row.unread:>6}  {row.weights_before:>11,} {row.weights_after:>11,}"
            )
            lines += [f"  {count} kept: {why}" for why, count in row.kept.items()]
        lines += [f"left whole: {name}: {why}" for name, why in self.not_followed.items()]
        for name, positions in self.unread.items():
            lines.append(f"{name} does not read {len(positions)} of its inputs")
        lines.append(f"weights: {self.weights_before:,} -> {self.weights_after:,}")
        if self.macs_before is not None:
            lines.append(f"multiply-adds: {self.macs_before:,} -> {self.macs_after:,}")
        return "\n".join(lines)


@overload
def shrink(
    model: keras.Model, *, return_report: Literal[False] = False, keep_masks: bool = False
) -> keras.Model: ...
@overload
def shrink(
    model: keras.Model, *, return_report: Literal[True], keep_masks: bool = False
) -> tuple[keras.Model, ShrinkReport]: ...


@_keras.drawn_apart()
def shrink(
    model: keras.Model, *, return_report: bool = False, keep_masks: bool = False
) -> keras.Model | tuple[keras.Model, ShrinkReport]:
    """Returns a smaller plain model with the same outputs, without unread and constant channels.

    For finite inputs in inference mode, outputs agree up to float rounding (1e-5 relative in
    float32). The inputs and outputs of the model keep their shapes. If the model is masked, its
    masks are stripped first. The original model is not changed.

    The smaller model has the same layers under the same names, with the same dtype policies and
    trainable flags, and at least one unit or filter in each. A composite layer, such as a
    transformer block, becomes a Functional model of the layers inside it. If the original model is
    compiled, the smaller one is compiled the same way and keeps the optimizer's state of the
    weights that are left, so that training can continue. Where the width of queries and keys of an
    attention layer is smaller, its query weights are scaled, since Keras divides by that width.

    Channels are followed through Dense, EinsumDense, convolutions (plain, grouped, depthwise,
    separable, transposed), Embedding, SimpleRNN, GRU, LSTM, Bidirectional and TimeDistributed,
    MultiHeadAttention and GroupQueryAttention, BatchNormalization, pooling, element-wise
    activations, dropout and noise, flatten, reshape and permute, zero padding, cropping,
    upsampling, concatenation, additions and other element-wise merges, both as layers and as
    operators on symbolic tensors, and through nested Sequential and Functional models and composite
    layers whose `call` only calls layers and operations. All calls of a layer or nested model keep
    the same channels. The inputs and outputs of all other layers are left whole, and those of
    different layers that share a weight, and of calls in training mode. The report names these
    layers; without `return_report`, a warning does.

    A constant other than zero that enters a zero-padded convolution is not constant at the border.
    Such channels are kept and reported. They are rare if biases are pruned with their filters.

    Args:
        model: A built Sequential or Functional model, plain or masked.
        return_report: Whether to return a `ShrinkReport` too.
        keep_masks: Whether the smaller model of a masked one is masked too, so that weights pruned
            singly, inside the channels that are left, stay pruned in further training.

    Returns:
        The smaller model. If `return_report=True`, a tuple `(model, report)`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model is neither Sequential nor Functional, overrides `call`, is not
            built, or has a layer that cannot be created from its config. If `keep_masks=True` and
            it has no masks, rescaled weights, or pruned weights frozen at other values than 0.

    Warns:
        UserWarning: If the class of the model defines `train_step` or similar methods, which the
            smaller model does not have; if layers are left whole and `return_report=False`; or if
            the smaller model could not be compiled like the original.

    Example:
    ```python
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(1)]
    )
    kernel = model.layers[0].kernel
    kernel.assign(kernel * [1.0, 0.0, 1.0])  # The second unit is always relu(bias).
    small, report = shrink(model, return_report=True)
    small.layers[0].units  # 2
    print(report)
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    masked = model
    if keep_masks:
        check_masks(masked)
    if any(isinstance(layer, MaskedLayer) for _, layer in walk(model)):
        model = strip_weight_masks(model)
    names = in_use_by_name(model)
    with as_in_use(model), _keras_configs.custom_object_scope(names):
        try:
            smaller, report, copied = _shrink(model)
        except Exception as error:
            # JAX's class of the error is not public, and in JAX 0.7 there is none.
            indivisible = type(error).__name__ == "IndivisibleError" or "divisible by" in str(error)
            if not indivisible or keras.distribution.distribution() is None:
                raise
            raise ValueError(
                f"A weight of the smaller '{model.name}' cannot be divided among the devices of "
                f"the current `keras.distribution`: {error}. Call `shrink` without one, after "
                "`keras.distribution.set_distribution(None)`, or keep a multiple of the devices "
                "(`structures.Channels(round_to=...)`)."
            ) from error
    if keep_masks:
        carry_masks(masked, model, smaller, copied)
    if own := _own_steps(model):
        warnings.warn(
            f"The smaller model is a plain Keras model: {', '.join(own)} of {type(model).__name__} "
            f"('{model.name}') are not in it.",
            stacklevel=2,
        )
    if return_report:
        return smaller, report
    if report.not_followed:
        whole = "; ".join(f"{name}: {why}" for name, why in report.not_followed.items())
        warnings.warn(
            f"`shrink` left the layers whole that it cannot follow. {whole}", stacklevel=2
        )
    return smaller


def _own_steps(model: keras.Model) -> list[str]:
    """Returns the methods of training and evaluation that the model's class defines itself."""
    names = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
    return [name for name in names if getattr(type(model), name) is not getattr(keras.Model, name)]


def _shrink(model: keras.Model) -> tuple[keras.Model, ShrinkReport, Copied]:
    flow = follow(model)
    flow.settle()
    _check_left_out(flow, model)
    clones: dict[int, tuple[Any, Any]] = {}
    smaller = _again(flow, model, clones)
    copied = Copied()
    for old, new in clones.values():
        if isinstance(old, keras.Layer) and id(old) not in flow.entered:
            _copy_weights(flow, old, new, copied)
    compile_like(model, smaller, copied)
    counts = (model.count_params(), smaller.count_params(), *_multiply_adds(flow))
    report = ShrinkReport(tuple(_rows(flow)), flow.not_followed, _unread(flow), *counts)
    return smaller, report, copied


def _check_left_out(flow: Flow, model: keras.Model) -> None:
    """Checks that all channels go that normalizations leave out.

    Raises:
        ValueError: If one stays, since a plain layer would take it into its mean and variance.
    """
    left = {id(ref.variable): ref for ref in channel_refs(model)}
    left = {key: ref for key, ref in left.items() if not ref.mask.to_numpy().all()}
    reasons = dict.fromkeys(left, "cannot be followed")
    for operation, edit in flow.edits.values():
        for name, axes in edit.slices.items():
            key = id(variable_of(operation, name))
            if key not in left:
                continue
            reasons.pop(key, None)
            (reader,) = (reader for reader in edit.readers if reader.source is axes[0])
            stays = flow.alive(reader.source) & ~left[key].mask.to_numpy()
            if stays.any() and reader.demand[:, flow.alive(reader.target)].any():
                reasons[key] = "other layers use"
    for key, reason in reasons.items():
        name = left[key].path.rpartition("/")[0]
        raise ValueError(
            f"'{name}' leaves out channels that {reason}, so that no plain layer can replace it. "
            'Prune channels together with all that reads them (`structure="channels"`), or use '
            f"the masked model itself. {flow.not_followed.get(name, '')}".rstrip()
        )


# --- Rebuilding -----------------------------------------------------------------------------------


def _again(flow: Flow, model: keras.Layer, clones: dict[int, tuple[Any, Any]]) -> keras.Model:
    """Returns the model with smaller copies of its layers, added to `clones` by original id.

    A composite layer becomes a Functional model of the layers inside it.
    """
    graph = flow.graphs[id(model)]

    def clone(operation: Any) -> Any:
        if id(operation) not in clones:
            if id(operation) in flow.entered:
                copy = _again(flow, operation, clones)
            else:
                copy = _smaller(flow, operation)
            clones[id(operation)] = (operation, copy)
        return clones[id(operation)][1]

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        models = (copy for key, (_, copy) in clones.items() if key in flow.composites)
        if any(operation is model for model in models) and isinstance(operation, keras.Function):
            # The inputs of a model made from a composite layer are a list of all tensors.
            return operation(_keras_graph.tensors_in((args, kwargs)))
        return operation(*args, **kwargs)

    # `clone_model` would name inputs after their tensors instead of their layers.
    entries = {
        id(layer.output): _smaller_input(flow, layer)
        for layer in graph.layers
        if isinstance(layer, keras.layers.InputLayer)
    }
    if isinstance(model, keras.Sequential):
        smaller = keras.Sequential([*entries.values(), *map(clone, model.layers)], name=model.name)
    else:
        # Clones the graph, not the model, because the clone of a compiled model is compiled.
        smaller = keras.models.clone_model(
            graph,
            clone_function=clone,
            call_function=call,
            input_tensors=keras.tree.map_structure(lambda x: entries[id(x)].output, graph.input),
        )
    if not model.trainable:
        smaller.trainable = False
    return smaller


def _smaller_input(flow: Flow, layer: keras.layers.InputLayer) -> keras.layers.InputLayer:
    """Returns an input layer for the kept channels of a nested model's input."""
    config = layer.get_config()
    channels = flow.tensors[id(layer.output)]
    if channels.axis is not None:
        shape = list(config["batch_shape"])
        shape[channels.axis] = int(flow.alive(channels).sum())
        config["batch_shape"] = tuple(shape)
    return keras.layers.InputLayer.from_config(config)


def _smaller(flow: Flow, operation: Any) -> Any:
    """Returns a copy of an operation for the new model, without its weights."""
    try:
        if isinstance(operation, keras.Layer) and rule_of(operation) is None:
            return _keras_configs.deserialize(_keras_configs.serialize(operation))
        # `_keras_configs.deserialize` would build the layer for the original shapes.
        with _of_plain_classes(operation):
            cls, config = type(operation), operation.get_config()
        if id(operation) in flow.edits:
            _write_widths(flow, flow.edits[id(operation)][1], config)
        return cls.from_config(config)
    except Exception as error:
        raise ValueError(
            f"'{operation.name}' ({type(operation).__name__}) cannot be copied, because Keras "
            f"cannot create it from its config: {reason_of(error)}"
        ) from error


@contextlib.contextmanager
def _of_plain_classes(operation: Any) -> Iterator[None]:
    """Gives masked layers their plain classes in the scope, so that their configs are plain."""
    inside = [x for _, x in walk(operation)] if isinstance(operation, keras.Layer) else []
    masked = [(layer, type(layer)) for layer in inside if isinstance(layer, MaskedLayer)]
    try:
        for layer, _ in masked:
            layer.__class__ = plain_class(layer)
        yield
    finally:
        for layer, cls in masked:
            layer.__class__ = cls


def _write_widths(flow: Flow, edit: Edit, config: dict[str, Any]) -> None:
    for inside in list(_dicts(config)):
        inside.pop("build_config", None)  # It describes the original shapes.
        for key, value in inside.items():
            # An initializer that holds an array has the original shape, and is no longer needed.
            held = value["config"].get("value") if key.endswith("_initializer") and value else 0
            if isinstance(held, (dict, list, np.ndarray)):
                inside[key] = "zeros"
    for (*places, last), channels in edit.widths.items():
        part: Any = config
        for place in places:
            if not isinstance(part[place], dict):
                part[place] = list(part[place])
            part = part[place]
        part[last] = int(flow.alive(channels).sum())
    if edit.readers and _shift(flow, edit.readers[0]).any():
        for attribute in edit.inside:
            config = config[attribute]["config"]
        config["use_bias"] = True


def _dicts(config: Any) -> Iterator[dict[str, Any]]:
    """Yields a config and all dicts in it."""
    if isinstance(config, dict):
        yield config
    if isinstance(config, (dict, list, tuple)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _dicts(value)


def _shift(flow: Flow, reader: Reader) -> np.ndarray:
    """Returns what the removed constants add to the bias of the kept outputs."""
    moved = reader.fixed & ~flow.alive(reader.source)
    shift = constant_shift(reader.source.constants, reader.gain, moved)
    return shift[flow.alive(reader.target)]


def _copy_weights(flow: Flow, old: keras.Layer, new: keras.Layer, copied: Copied) -> None:
    """Copies the weights of a layer to its smaller copy, without those of removed channels.

    Args:
        flow: The channels.
        old: The layer.
        new: Its smaller copy.
        copied: To which the variables are added.
    """
    if id(old) in flow.edits:
        edit = flow.edits[id(old)][1]
        for name, axes in edit.slices.items():
            get = attrgetter(name)
            if get(old) is None:
                continue
            value = array(get(old))
            left = {axis % value.ndim: flow.alive(channels) for axis, channels in axes.items()}
            for axis, flags in left.items():
                value = np.compress(flags, value, axis)
            if name in edit.scaled:
                value = value * math.sqrt(flow.alive(edit.scaled[name]).mean())
            get(new).assign(value)
            copied.cuts[id(get(new))] = left
            _pair(variable_of(old, name), get(new), copied)
        # Seeds, and weights of an activation that is a layer. A new bias has no counterpart.
        done = set(map(id, copied.variables.values()))
        others = {(x.name, x.shape): x for x in new.variables if id(x) not in done}
        for variable in old.variables:
            copy = others.get((variable.name, variable.shape))
            if id(variable) not in copied.variables and copy is not None:
                copy.assign(array(variable))
                _pair(variable, copy, copied)
        known = list(copied.variables.values())
        if edit.readers and (shift := _shift(flow, edit.readers[0])).any():
            before, after = (reduce(getattr, edit.inside, layer) for layer in (old, new))
            bias = array(after.bias).astype("float64") if before.use_bias else 0.0
            after.bias.assign(bias + shift)
            known += [] if before.use_bias else [after.bias]
        _check_copied(old, new, known)
        return
    for (_, part), (_, copy) in zip(walk(old), walk(new), strict=False):
        if part.built and not copy.built:  # As an activation, which is built when it is called.
            copy.build_from_config(part.get_build_config())
    if len(old.variables) != len(new.variables):
        raise ValueError(
            f"'{old.name}' ({type(old).__name__}) has {len(old.variables)} variables, but the copy "
            f"created from its config has {len(new.variables)}: its `get_config()` is incomplete."
        )
    for variable, copy in zip(old.variables, new.variables, strict=True):
        copy.assign(array(variable))
        _pair(variable, copy, copied)
    for (_, part), (_, copy) in zip(walk(old), walk(new), strict=False):
        copy_assets(part, copy)


def _check_copied(old: keras.Layer, new: keras.Layer, known: list[keras.Variable]) -> None:
    """Raises an error if a smaller copy has weights that its layer's rule does not know.

    They would keep their initial values.
    """
    found = set(map(id, known))
    unknown = [variable.path for variable in new.weights if id(variable) not in found]
    if unknown:
        raise ValueError(
            f"'{old.name}' ({type(old).__name__}) has weights that are not known here: {unknown}. "
            f"Keras {keras.__version__} may be newer than this version of masked_layers. Install "
            "other versions, or leave the layer out of the model that is made smaller."
        )


def _pair(variable: keras.Variable, copy: keras.Variable, copied: Copied) -> None:
    """Records the copy of a variable, which is trained as the variable is."""
    if copy.trainable != variable.trainable:
        copy.trainable = variable.trainable
    copied.variables[id(variable)] = copy


# --- Reporting ------------------------------------------------------------------------------------


def _multiply_adds(flow: Flow) -> tuple[int | None, int | None]:
    """Returns the multiply-adds of the followed layers, before and after."""
    sizes = [_sizes(flow, operation, edit) for operation, edit in flow.edits.values()]
    if any(size["macs_before"] is None for size in sizes):
        return None, None
    return sum(size["macs_before"] for size in sizes), sum(size["macs_after"] for size in sizes)


def _sizes(flow: Flow, operation: Any, edit: Edit) -> dict[str, Any]:
    """Returns the numbers of weights and multiply-adds of a layer, as `ShrinkRow` has them."""
    positions = edit.counts()
    known = None not in positions.values()
    total = dict.fromkeys(("weights_before", "weights_after", "macs_before", "macs_after"), 0)
    for name, axes in (edit.slices | edit.products).items():
        if name in edit.products:
            before = math.prod(len(channels.slots) for channels in axes.values())
        elif (variable := attrgetter(name)(operation)) is not None:
            before = math.prod(variable.shape)
        else:
            continue
        after = before
        for channels in axes.values():
            after = after * int(flow.alive(channels).sum()) // len(channels.slots)
        if name in edit.slices:
            total["weights_before"] += before
            total["weights_after"] += after
        total["macs_before"] += before * (positions.get(name) or 0)
        total["macs_after"] += after * (positions.get(name) or 0)
    if edit.readers and not edit.inner and _shift(flow, edit.readers[0]).any():
        layer = reduce(getattr, edit.inside, operation)
        if layer.bias is None:  # It gets one.
            total["weights_after"] += int(flow.alive(edit.readers[0].target).sum())
    return total if known else {**total, "macs_before": None, "macs_after": None}


def _unread(flow: Flow) -> dict[str, tuple[int, ...]]:
    found = {}
    for operation, edit in flow.edits.values():
        sources = {id(reader.source): reader.source for reader in edit.readers}
        for source in sources.values():
            read = np.zeros(len(source.slots), bool)
            for reader in edit.readers:
                if reader.source is source:
                    read |= reader.demand[:, flow.alive(reader.target)].any(axis=1)
            if not read.all() and not source.slots.any():
                found[flow.names[id(operation)]] = tuple(np.flatnonzero(~read).tolist())
    return found


def _rows(flow: Flow) -> list[ShrinkRow]:
    constant = {
        flow.root(slot)
        for channels in flow.tensors.values()
        for slot in channels.slots[~np.isnan(channels.constants)]
    }
    pinned = {flow.root(slot): reason for slot, reason in flow.pinned.items()}
    lost = {flow.root(slot): reason for slot, reason in flow.lost.items()}

    def reason(slot: int) -> str:
        if slot == 0:
            return "joined with channels that are left whole"
        if slot in flow.forced:
            return flow.forced[slot]
        return pinned.get(slot) or lost.get(slot) or "joined with a channel that varies"

    def row(name: str, kind: str, target: Channels, sizes: dict[str, Any]) -> ShrinkRow:
        channels = list(
            zip(map(flow.root, target.slots), target.constants, flow.alive(target), strict=True)
        )
        removed = [slot for slot, _, alive in channels if not alive]
        moved = sum(slot in constant for slot in removed)
        stuck = [
            slot
            for slot, value, alive in channels
            if alive and (not np.isnan(value) or slot in lost or slot in flow.forced)
        ]
        return ShrinkRow(
            layer=name,
            kind=kind,
            before=len(channels),
            after=len(channels) - len(removed),
            constant=moved,
            unread=len(removed) - moved,
            kept=dict(Counter(map(reason, stuck))),
            **sizes,
        )

    return [
        row(
            f"{flow.names[id(operation)]} {kind}".rstrip(),
            type(operation).__name__,
            channels,
            {} if kind else _sizes(flow, operation, edit),
        )
        for operation, edit in flow.edits.values()
        for kind, channels in edit.makes()
    ]
