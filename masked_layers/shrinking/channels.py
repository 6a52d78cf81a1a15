"""Finds the channels of a model that no layer reads, and those whose value is constant.

Every channel of every tensor belongs to a *slot*: the channels that can only be removed together.
Layers that make channels, such as `Dense`, open new slots. Layers that pass channels on, such as
`BatchNormalization`, keep the slots of their input. Additions join the slots of their branches. A
slot therefore covers a filter, its normalization, its rows in the kernels that read it, and the
matching filters in the other branches of a residual addition.

`Flow` collects what the rules in `rules.py` find in the order of the graph: slots, constants and
readers. `Flow.settle` then determines which slots are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

VARIES = np.nan  # In an array of constants: the value of this channel depends on the input.


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor: channel i belongs to `slots[i]` and has the value `constants[i]`.

    Attributes:
        axis: The channel axis, counted from the first. None for a tensor that is left whole.
        slots: Int array of shape (channels,). Slot 0 stands for all channels that are left whole.
        constants: Float64 array of shape (channels,). The value of a channel if it is the same for
            all inputs, otherwise `VARIES`.
    """

    axis: int | None
    slots: np.ndarray
    constants: np.ndarray

    def with_constants(self, constants: np.ndarray, axis: int | None = None) -> Channels:
        """Returns these channels with other constants, and along another axis if one is given."""
        return Channels(self.axis if axis is None else axis, self.slots, constants)


WHOLE = Channels(None, np.zeros(0, int), np.zeros(0))


@dataclass(frozen=True)
class Reader:
    """A kernel that mixes channels, viewed as a matrix of shape (inputs, outputs).

    Attributes:
        source: Channels of the input.
        target: Channels of the output.
        demand: Bool array of shape (inputs, outputs), True where the output needs the input.
        gain: Array of shape (inputs, outputs): the response of the output to an input channel of
            ones.
        fixed: Bool array of shape (inputs,), True where the input is a constant that can be moved
            into the bias exactly.
        entry: The channels along the input axis of the kernel if they are not those of `source`,
            but those of the first group of a grouped convolution.
    """

    source: Channels
    target: Channels
    demand: np.ndarray
    gain: np.ndarray
    fixed: np.ndarray
    entry: Channels | None = None


@dataclass(frozen=True)
class Edit:
    """The changes to a layer that removing channels requires.

    Attributes:
        slices: Weight -> {axis of the weight: the channels along it}. Weights are named by their
            attribute path from the layer, such as "kernel" or "cell.kernel".
        made: Channels that the layer makes. None if it passes on the channels of its input.
        inner: Kind -> channels that the layer makes and reads itself, such as the heads of an
            attention layer.
        widths: Key path in the layer's config -> the channels whose number is stored there.
        readers: The kernels with which the layer mixes channels. Constants in the source of the
            first one are moved into the layer's bias.
        products: Name -> {axis: channels}, like `slices`, for products of two tensors that both
            depend on the input. Every entry of such a shape stands for `positions` multiply-adds.
        positions: Number of multiply-adds of each entry of its kernels for one example, or a dict
            with this number for each weight and product that takes part. None if the shape is not
            fully known.
        inside: Attributes that lead to the layer with the bias, if it is inside another one. The
            keys of its config in the config of the outer layer are these and "config".
        equal: Two sets of channels of which the same number must be kept.
        scaled: Weight -> channels. The weight is multiplied by the square root of the share of
            these channels that is kept.
    """

    slices: dict[str, dict[int, Channels]]
    made: Channels | None = None
    inner: dict[str, Channels] = field(default_factory=dict)
    widths: dict[tuple[str | int, ...], Channels] = field(default_factory=dict)
    readers: tuple[Reader, ...] = ()
    positions: int | dict[str, int | None] | None = 0
    products: dict[str, dict[int, Channels]] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    equal: tuple[Channels, ...] = ()
    scaled: dict[str, Channels] = field(default_factory=dict)

    def kernels(self) -> Iterator[tuple[str, dict[int, Channels], int | None]]:
        """Yields (name, slices, positions) of the weights that take part in multiply-adds."""
        for name, axes in self.slices.items():
            places = self.positions
            if name in places if isinstance(places, dict) else name.endswith("kernel"):
                yield name, axes, places[name] if isinstance(places, dict) else places

    def counts(self) -> dict[str, int | None]:
        """Returns the multiply-adds of each entry of a kernel or product, by name."""
        found = {name: count for name, _, count in self.kernels()}
        if isinstance(self.positions, dict):
            found |= {name: self.positions[name] for name in self.products}
        return found

    def makes(self) -> Iterator[tuple[str, Channels]]:
        """Yields (kind, channels) of all that the layer makes; the kind of its outputs is ""."""
        if self.made is not None:
            yield "", self.made
        yield from self.inner.items()

    def followed(self) -> Iterator[tuple[tuple[Any, ...], Channels]]:
        """Yields (place, channels) of all that the layer has channels of."""
        for name, axes in self.slices.items():
            for axis, channels in axes.items():
                yield ("weight", name, axis), channels
        for place, channels in self.widths.items():
            yield ("width", *place), channels
        for kind, channels in self.makes():
            yield ("made", kind), channels

    def reads(self, channels: Channels) -> bool:
        """Returns whether these, and not equal ones, are channels that the layer reads."""
        return any(channels is x for reader in self.readers for x in (reader.source, reader.entry))


@dataclass(frozen=True)
class Call:
    """A call in the graph.

    Attributes:
        operation: The layer or operation that is called.
        inputs: The tensors among its arguments.
        output: The first tensor that it returns.
        args: All positional arguments.
        kwargs: All keyword arguments.
    """

    operation: Any
    inputs: list[keras.KerasTensor]
    output: keras.KerasTensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axis(self) -> int:
        """The channel axis according to the layer's data format."""
        return 1 if getattr(self.operation, "data_format", None) == "channels_first" else -1


def positions(tensor: keras.KerasTensor, axis: int | None) -> int | None:
    """Returns the product of all sizes except batch and channels, or None if one is unknown."""
    sizes = [size for i, size in enumerate(tensor.shape) if i not in (0, axis)]
    return None if None in sizes else math.prod(sizes)


_Positions = int | dict[str, int | None] | None


def _total(first: _Positions, second: _Positions) -> _Positions:
    """Returns the multiply-adds of two calls of a layer, as `Edit.positions` has them."""

    def add(one: int | None, other: int | None) -> int | None:
        return None if one is None or other is None else one + other

    if isinstance(first, dict) and isinstance(second, dict):
        return {name: add(count, second[name]) for name, count in first.items()}
    assert not isinstance(first, dict)  # Calls of one layer have the same form.
    assert not isinstance(second, dict)
    return add(first, second)


class CannotFollow(Exception):  # noqa: N818 (not an error: the layer stays whole)
    """Raised by a rule, with the reason, if the channels of a call cannot be followed."""


def constant_shift(constants: np.ndarray, gain: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Returns what the constant inputs flagged in `moved` add to each output, in float64."""
    return constants[moved] @ gain[moved].astype("float64")


@dataclass
class Flow:
    """The channels of every tensor of a model, and what its layers do with them.

    Attributes:
        tensors: id of a symbolic tensor -> its channels.
        edits: id of an operation -> (operation, the changes that its channels require).
        readings: The readers of every call, in the order of the graph.
        names: id of an operation -> its name; "nested/name" inside a nested model.
        graphs: id of the model, of a nested model or of a composite layer -> its graph.
        composites: id of a composite layer in `graphs` -> the kinds of arguments of its calls.
        opaque: id of a composite layer without a graph -> the reason.
        called: ids of the operations that a rule has followed.
        entered: ids of the nested models and composite layers whose channels were followed.
        not_followed: Operation name -> why its inputs and outputs are left whole.
        pinned: Slot -> why it is kept even if no layer reads it.
        lost: Slot -> where its value stops being constant.
        forced: Slot -> why it is kept although no output depends on it.
    """

    tensors: dict[int, Channels] = field(default_factory=dict)
    edits: dict[int, tuple[Any, Edit]] = field(default_factory=dict)
    readings: list[tuple[Reader, ...]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    graphs: dict[int, keras.Model] = field(default_factory=dict)
    composites: dict[int, str] = field(default_factory=dict)
    opaque: dict[int, str] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    entered: set[int] = field(default_factory=set)
    not_followed: dict[str, str] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    forced: dict[int, str] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=lambda: [0])  # union-find forest of slots
    _live: np.ndarray = field(default_factory=lambda: np.ones(1, bool))

    def channels(self, call: Call, axis: int, index: int = 0) -> Channels:
        """Returns the channels of an input along `axis`.

        A tensor that is left whole has channels of slot 0 along any axis.

        Args:
            call: The call.
            axis: The axis, which may be negative.
            index: Position of the input among the tensors of the call.

        Raises:
            CannotFollow: If the channels lie along another axis, or their number is unknown.
        """
        tensor = call.inputs[index]
        axis %= len(tensor.shape)
        known = self.tensors[id(tensor)]
        if known.axis == axis:
            return known
        if known.axis is not None:
            raise CannotFollow(f"works along axis {axis}, the channels lie along {known.axis}")
        if tensor.shape[axis] is None:
            raise CannotFollow("the number of its input channels is unknown")
        size = tensor.shape[axis]
        return Channels(axis, np.zeros(size, int), np.full(size, VARIES))

    def new_slots(self, count: int) -> np.ndarray:
        """Returns `count` new slots, for the channels that a layer makes."""
        slots = range(len(self._parents), len(self._parents) + count)
        self._parents.extend(slots)
        return np.array(slots)

    def join(self, slots: np.ndarray, others: np.ndarray) -> None:
        """Joins slots pair by pair, so that both are kept or both are removed."""
        for slot, other in zip(slots, others, strict=True):
            first, second = sorted((self.root(slot), self.root(other)))
            self._parents[second] = first  # The smaller one, so that slot 0 stays a root.

    def root(self, slot: int) -> int:
        """Returns the slot that represents all slots joined with `slot`."""
        slot = int(slot)
        while self._parents[slot] != slot:
            self._parents[slot] = self._parents[self._parents[slot]]
            slot = self._parents[slot]
        return slot

    def pin(self, channels: Channels, reason: str) -> None:
        """Keeps channels even if no layer reads them."""
        for slot in channels.slots[channels.slots != 0]:
            self.pinned.setdefault(int(slot), reason)

    def lose(self, slots: np.ndarray, reason: str) -> None:
        """Records why the values of some slots stop being constant."""
        for slot in slots:
            self.lost.setdefault(int(slot), reason)

    def leave_whole(self, operation: Any, inputs: list[keras.KerasTensor], reason: str) -> None:
        """Keeps all channels of the inputs, and records why if the operation has any to follow."""
        sources = [self.tensors[id(tensor)] for tensor in inputs]
        for source in sources:
            self.pin(source, f"'{self.names[id(operation)]}', which is left whole, reads it")
        if id(operation) in self.edits:  # Another call was followed.
            self.keep(self.edits[id(operation)][1], reason)
        if (
            any(source.axis is not None for source in sources)
            or len(getattr(operation, "weights", ())) > 0
        ):
            self.not_followed[self.names[id(operation)]] = reason

    def keep(self, edit: Edit, reason: str) -> None:
        """Keeps all channels of a layer."""
        for _, channels in edit.followed():
            self.pin(channels, reason)

    def edit(self, call: Call, edit: Edit) -> None:
        """Records the changes to the layer of a call."""
        self.edits[id(call.operation)] = (call.operation, edit)
        self.readings.append(edit.readers)

    def edit_again(self, operation: Any, first: Edit, edit: Edit) -> None:
        """Joins the channels of another call of a layer with those of the calls before.

        Args:
            operation: The layer.
            first: The changes that the calls before require.
            edit: The changes that this call alone requires.
        """
        again = f"'{self.names[id(operation)]}' is called again with other channels"
        known, found = dict(first.followed()), dict(edit.followed())
        for place in known.keys() & found.keys():
            self.join(known[place].slots, found[place].slots)
        for place in known.keys() ^ found.keys():
            self.pin((known | found)[place], again)
        readers = []
        for before, now in zip(first.readers, edit.readers, strict=True):
            fixed = before.fixed & now.fixed
            # One bias cannot contain two constants, nor one that only some of the calls have.
            first_value, value = (
                np.where(each.fixed, each.source.constants, 0.0) for each in (before, now)
            )
            other = (first_value != value) & now.gain.any(axis=1)
            self.pin(replace(now.source, slots=now.source.slots[other]), again)
            readers.append(replace(before, fixed=fixed))
        total = _total(first.positions, edit.positions)
        merged = replace(first, readers=tuple(readers), positions=total)
        self.edits[id(operation)] = (operation, merged)

    def settle(self) -> None:
        """Determines the slots that are kept: those that the pinned slots depend on.

        Readers are visited from the last to the first, so that the demand on the outputs of a
        reader is known when it is visited. A slot may become needed after that, through another
        tensor that it is joined with, for example early in a residual stream. Then no layer reads
        the outputs that this reader writes to the slot, and their inputs need not be kept.

        Keras has no layer without units, so a tensor without any kept channel gets its first one
        back. The inputs of that channel need not be kept: no layer reads it, or it is constant.
        """
        self._live = np.zeros(len(self._parents), bool)
        for slot in (0, *self.pinned):
            self._live[self.root(slot)] = True
        for readers in reversed(self.readings):
            while self._ask(readers):
                pass  # Repeated, because units of a recurrent layer read each other.
        for channels in self.tensors.values():
            if channels.axis is not None and not self.alive(channels).any():
                self._force(channels.slots[:1], "a layer has at least one")
        for _, edit in self.edits.values():
            for channels in edit.inner.values():
                if not self.alive(channels).any():
                    self._force(channels.slots[:1], "a layer has at least one")
            left = max([0, *(int(self.alive(channels).sum()) for channels in edit.equal)])
            for channels in edit.equal:
                alive = self.alive(channels)
                spare = channels.slots[~alive][: left - int(alive.sum())]
                self._force(spare, "the widths of keys and of values have to be equal")

    def _force(self, slots: np.ndarray, reason: str) -> None:
        """Keeps slots that no output needs, and records why."""
        for root in self.roots(slots).tolist():
            self.forced[root] = reason
            self._live[root] = True

    def _ask(self, readers: tuple[Reader, ...]) -> bool:
        """Keeps what readers need for their kept outputs, and returns whether any of it was new."""
        before = np.count_nonzero(self._live)
        for reader in readers:
            needed = reader.demand[:, self.alive(reader.target)].any(axis=1)
            self._live[self.roots(reader.source.slots[needed])] = True
        return bool(np.count_nonzero(self._live) > before)

    def alive(self, channels: Channels) -> np.ndarray:
        """Returns which channels are kept, as a bool array."""
        return self._live[self.roots(channels.slots)]

    def roots(self, slots: np.ndarray) -> np.ndarray:
        """Returns the root of each slot, as an int array."""
        return np.fromiter(map(self.root, slots), int, len(slots))
