"""Finds the channels of a model that nothing reads, and those that always hold one value.

Every channel of every tensor belongs to a *slot*. Layers that make channels open new slots; layers
that pass channels on keep those of their input; an addition joins the slots of its branches. So a
slot is what can only stay or go as a whole: a filter with its normalization, its place in the
following kernels and in the other branches of a residual addition.

`Flow` collects, in the order of the graph, what the rules in `rules.py` find: slots, constants
and readers. Its `settle` then finds the live slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

VARIES = np.nan  # in an array of constants: this channel has no fixed value


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor: channel i belongs to `slots[i]` and holds `constants[i]`.

    Attributes:
        axis: Positive axis that the channels lie along; None for a tensor that is left whole.
        slots: Int array, one slot per channel. Slot 0 stands for all that is left whole.
        constants: Float64 array: the value of each channel, whatever the input, or `VARIES`.
    """

    axis: int | None
    slots: np.ndarray
    constants: np.ndarray

    def with_constants(self, constants: np.ndarray, axis: int | None = None) -> Channels:
        """Returns the same slots with other constants, and along another axis if one is given."""
        return Channels(self.axis if axis is None else axis, self.slots, constants)


WHOLE = Channels(None, np.zeros(0, int), np.zeros(0))


@dataclass(frozen=True)
class Reader:
    """A layer that mixes channels by a kernel, seen as a matrix (inputs, outputs).

    Attributes:
        source: Channels of the input.
        target: Channels of the output.
        demand: Bool (inputs, outputs): the output is lost without the input.
        gain: (inputs, outputs): response of the output to an input channel of ones.
        fixed: Bool per input: a constant that can move into the bias exactly.
    """

    source: Channels
    target: Channels
    demand: np.ndarray
    gain: np.ndarray
    fixed: np.ndarray


@dataclass(frozen=True)
class Edit:
    """The changes to a layer that follow from those of its channels.

    Attributes:
        slices: Weight -> {axis of the weight: the channels along it}. A weight is named by the
            attributes that lead to it from the layer, as "kernel" or "cell.kernel".
        made: Channels that the layer makes, None where it passes on those of its input.
        widths: Place in the layer's config -> the channels whose number it holds.
        readers: How the layer mixes channels. Constants of the first one's source move into the
            layer's bias.
        positions: Number of multiply-adds of each entry of its kernels for one example; None where
            the shape does not tell.
    """

    slices: dict[str, dict[int, Channels]]
    made: Channels | None = None
    widths: dict[tuple[str | int, ...], Channels] = field(default_factory=dict)
    readers: tuple[Reader, ...] = ()
    positions: int | None = 0

    def kernels(self) -> Iterator[tuple[str, dict[int, Channels]]]:
        """Yields the kernels among the weights: those that take part in multiply-adds."""
        yield from ((name, axes) for name, axes in self.slices.items() if name.endswith("kernel"))


@dataclass(frozen=True)
class Call:
    """One call in the graph.

    Attributes:
        operation: The layer or operation that is called.
        inputs: The tensors among its arguments.
        output: The first tensor it returned.
        args: All of its positional arguments.
    """

    operation: Any
    inputs: list[keras.KerasTensor]
    output: keras.KerasTensor
    args: tuple[Any, ...] = ()

    @property
    def axis(self) -> int:
        """The channel axis that the layer's data format names."""
        return 1 if getattr(self.operation, "data_format", None) == "channels_first" else -1


def positions(tensor: keras.KerasTensor, axis: int | None) -> int | None:
    """Returns the number of places along all but the batch and the channel axis, if known."""
    sizes = [size for i, size in enumerate(tensor.shape) if i not in (0, axis)]
    return None if None in sizes else math.prod(sizes)


class CannotFollow(Exception):  # noqa: N818 (no error: the layer stays whole)
    """Says why a call leaves its inputs and outputs whole."""


def constant_shift(constants: np.ndarray, gain: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Returns what the constants of some input channels (bool) add to each output, in float64."""
    return constants[moved] @ gain[moved].astype("float64")


@dataclass
class Flow:
    """The channels of every tensor of one graph, and what its layers do to them.

    Attributes:
        tensors: id of a symbolic tensor -> its channels.
        edits: id of an operation -> (operation, how it follows its channels).
        names: id of an operation -> its name; "nested/name" inside a nested model.
        graphs: id of the model, or of one inside it -> its graph.
        entered: ids of the models inside whose channels were followed.
        not_followed: Operation name -> why its inputs and outputs are left whole.
        pinned: Slot -> why it must stay whatever reads it.
        lost: Slot -> where its constant stopped being one.
        forced: Slots that stay only because a layer without units cannot be.
    """

    tensors: dict[int, Channels] = field(default_factory=dict)
    edits: dict[int, tuple[Any, Edit]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    graphs: dict[int, keras.Model] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    not_followed: dict[str, str] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    forced: set[int] = field(default_factory=set)
    _parents: list[int] = field(default_factory=lambda: [0])  # union-find forest of slots
    _live: np.ndarray = field(default_factory=lambda: np.ones(1, bool))

    def channels(self, call: Call, axis: int, index: int = 0) -> Channels:
        """Returns the channels of an input along `axis`; a whole tensor has them along any.

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
        """Opens slots for the channels that a layer makes."""
        slots = range(len(self._parents), len(self._parents) + count)
        self._parents.extend(slots)
        return np.array(slots)

    def join(self, slots: np.ndarray, others: np.ndarray) -> None:
        """Makes slots stay and go together, pair by pair."""
        for slot, other in zip(slots, others, strict=True):
            first, second = sorted((self.root(slot), self.root(other)))
            self._parents[second] = first  # the smaller one: slot 0 stays a root

    def root(self, slot: int) -> int:
        """Returns the slot that stands for all that `slot` was joined with."""
        slot = int(slot)
        while self._parents[slot] != slot:
            self._parents[slot] = self._parents[self._parents[slot]]
            slot = self._parents[slot]
        return slot

    def pin(self, channels: Channels, reason: str) -> None:
        """Keeps channels, whether anything reads them or not."""
        for slot in channels.slots[channels.slots != 0]:
            self.pinned.setdefault(int(slot), reason)

    def lose(self, slots: np.ndarray, reason: str) -> None:
        """Notes where the constants of some slots can be followed no further."""
        for slot in slots:
            self.lost.setdefault(int(slot), reason)

    def leave_whole(self, operation: Any, inputs: list[keras.KerasTensor], reason: str) -> None:
        """Keeps all channels of the inputs, and notes why where there was something to follow."""
        sources = [self.tensors[id(tensor)] for tensor in inputs]
        for source in sources:
            self.pin(source, f"'{self.names[id(operation)]}', which is left whole, reads it")
        if (
            any(source.axis is not None for source in sources)
            or len(getattr(operation, "weights", ())) > 0
        ):
            self.not_followed[self.names[id(operation)]] = reason

    def edit(self, call: Call, edit: Edit) -> None:
        """Notes how the layer of a call follows its channels."""
        self.edits[id(call.operation)] = (call.operation, edit)

    def settle(self) -> None:
        """Finds the live slots: all that the pinned ones need, and no more.

        Readers are asked from the last to the first, so whatever needs the output of one is known
        when its turn comes. A slot may turn out to be live only after that, through another tensor
        that it is joined with, as early in a residual stream: then nothing reads it where this
        reader writes, and what the reader would need for it can go. Keras has no layer without
        units, so a tensor left empty gets its first channel back. What that one reads can go too:
        nothing reads it, or it is constant.
        """
        self._live = np.zeros(len(self._parents), bool)
        for slot in (0, *self.pinned):
            self._live[self.root(slot)] = True
        for _, edit in reversed(self.edits.values()):
            while self._ask(edit.readers):
                pass  # once more, as units of a recurrent layer read each other
        for channels in self.tensors.values():
            if channels.axis is not None and not self.alive(channels).any():
                first = self.root(channels.slots[0])
                self.forced.add(first)
                self._live[first] = True

    def _ask(self, readers: tuple[Reader, ...]) -> bool:
        """Makes live what readers need for their live outputs; returns whether that was new."""
        before = np.count_nonzero(self._live)
        for reader in readers:
            needed = reader.demand[:, self.alive(reader.target)].any(axis=1)
            self._live[self.roots(reader.source.slots[needed])] = True
        return bool(np.count_nonzero(self._live) > before)

    def alive(self, channels: Channels) -> np.ndarray:
        """Returns which channels stay, as bools."""
        return self._live[self.roots(channels.slots)]

    def roots(self, slots: np.ndarray) -> np.ndarray:
        """Returns `root` of each slot."""
        return np.fromiter(map(self.root, slots), int, len(slots))
