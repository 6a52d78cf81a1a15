"""Structures group the weights of a kernel that are pruned together: blocks, filters, N of M.

A structure cuts a kernel into tiles. Of `Blocks` and `Outputs` a tile is kept or dropped as a
whole, by the pooled score of its weights. Of `NOfM` each tile keeps its N best weights.

Kernels have axes that index inputs, axes that index outputs, and others (the positions of a
convolution's window). A tile is given as (positions, inputs, outputs), and the last tile along an
axis is smaller where the axis is not a multiple of it. Adding a structure takes a function that
gives its tile and one registration:

>>> @register("windows")
... def windows(layout):
...     '''The whole window of each pair of an input and an output.'''
...     return layout.sizes[0], 1, 1
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lottery_ticket_pruner.registry import Registry

POOLINGS = ("average", "max")

Tile = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The meaning of a kernel's axes.

    Args:
        shape: the kernel's shape.
        input_axes: the axes that are summed over besides those of the window, outermost first;
            none for an embedding (its rows are looked up), a depthwise kernel and a bias.
        output_axes: the axes that index output units or filters; none for a bias.
    """

    shape: tuple[int, ...]
    input_axes: tuple[int, ...] = (-2,)
    output_axes: tuple[int, ...] = (-1,)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The input axes that the kernel has, counted from the first."""
        return self._found(self.input_axes)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output axes that the kernel has, counted from the first."""
        return self._found(self.output_axes)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes: positions, inputs, outputs."""
        last = self.inputs + self.outputs
        return tuple(axis for axis in range(len(self.shape)) if axis not in last) + last

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of positions, inputs and outputs."""
        inputs = math.prod(self.shape[axis] for axis in self.inputs)
        outputs = math.prod(self.shape[axis] for axis in self.outputs)
        last = self.inputs + self.outputs
        others = (size for axis, size in enumerate(self.shape) if axis not in last)
        return math.prod(others), inputs, outputs

    def _found(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        rank = len(self.shape)
        return tuple(axis % rank for axis in axes if -rank <= axis < rank)


class Structure:
    """Base class of all structures: groups of a kernel's weights that are pruned together.

    Attributes:
        kept: how many weights each tile keeps, whatever their number; None where tiles compete
            with each other and are kept or dropped as a whole.
        coupled: whether it groups weights of several kernels, which takes the graph of the model.
        whole_outputs: whether its tiles are whole outputs. What reads one that is pruned in all
            kernels that make it is then pruned, too.
    """

    kept: int | None = None
    coupled: bool = False
    whole_outputs: bool = False

    def applies(self, layout: Layout) -> bool:
        """Returns True if a kernel of this layout has such tiles."""
        raise NotImplementedError

    def tile(self, layout: Layout) -> Tile:
        """The size of a tile: positions, inputs and outputs."""
        raise NotImplementedError

    def pool(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """One score per tile, of `scores` and `mask` of shape (tiles, weights in a tile)."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The name and the arguments, from which `get` makes the same structure."""
        return {"name": _REGISTRY.checked(_REGISTRY.name_of(type(self)), type(self))} | {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # dataclasses all
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Structure":
        """Resolves a configuration by `get`; one of an unregistered class makes this class."""
        name = config.get("name")
        if name == cls.__name__ and name not in _REGISTRY:
            return cls(**{key: value for key, value in config.items() if key != "name"})
        return get(config)


Identifier = str | Mapping[str, Any] | Structure | Callable[[Layout], Tile | None]


_NAMES = {"filters": "outputs", "units": "outputs"}


def _shorthand(text: str) -> tuple[str, dict[str, Any]] | None:
    """Returns name and arguments for a shorthand such as `"2:4"` or `"4x1"`, or None."""
    numbers = re.fullmatch(r"(\d+)([:x])(\d+)", text)
    if not numbers:
        return (_NAMES[text], {}) if text in _NAMES else None
    first, second = int(numbers[1]), int(numbers[3])
    if numbers[2] == ":":
        return "n_of_m", {"n": first, "m": second}
    return "blocks", {"block_size": (first, second)}


def _made(known: Any, arguments: dict[str, Any]) -> Structure:
    return known(**arguments) if isinstance(known, type) else Tiles(known, **arguments)


_REGISTRY = Registry(
    "structure",
    Structure,
    register="structures.register",
    wrap=lambda function: Tiles(function),
    make=_made,
    takes="a `Layout`",
    shorthand=_shorthand,
    examples=f"N:M such as '2:4', blocks such as '4x1', {', '.join(_NAMES)}",
)


def register(name: str) -> Callable[[Any], Any]:
    """Makes a structure known by name; decorates it and hands it back.

    Args:
        name: the name for `get` and configurations.

    Returns:
        A decorator of a function `layout -> (positions, inputs, outputs)`, which gives the tile
        that is kept or dropped as a whole (`Tiles`), or None for kernels without such tiles; or of
        a subclass of `Structure`, a dataclass of its arguments.

    Raises:
        ValueError: another structure has the name. The same one defined again (a notebook cell run
            twice) replaces the earlier one.
    """

    def decorate(made: Any) -> Any:
        _REGISTRY.add(name, made)
        return made

    return decorate


def names() -> list[str]:
    """The known names, in the order of registration."""
    return list(_REGISTRY)


@register("n_of_m")
@dataclasses.dataclass(frozen=True)
class NOfM(Structure):
    """At most N of every M consecutive weights along the inputs are kept: N:M sparsity, as 2:4.

    Groups are counted within each position of the window and each output, from the first input.
    That is how hardware wants them: M neighbors along the innermost axis of the reduction, once the
    kernel lies as (outputs, window, inputs). Padded with zeros to a multiple of M, the last group
    is one like the others, so of its r weights it keeps min(N, r).

    Args:
        n: how many are kept, at least 1.
        m: of how many.

    Reference:
        - [Mishra et al., arXiv 2104.08378](https://arxiv.org/abs/2104.08378)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (_is_count(self.n) and _is_count(self.m) and self.n < self.m):
            raise ValueError(
                f"N:M keeps N of every M weights, with 1 <= N < M. Received: {self.n}:{self.m}"
            )

    @property
    def kept(self) -> int:  # type: ignore[override]  # Follows N, and is not set.
        """N."""
        return self.n

    def applies(self, layout: Layout) -> bool:
        """Returns True if the kernel has inputs."""
        return bool(layout.inputs)

    def tile(self, layout: Layout) -> Tile:
        """M inputs."""
        return 1, self.m, 1


class _Whole(Structure):
    """Tiles that are kept or dropped as a whole."""

    pooling: str

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {POOLINGS}. Received: {self.pooling!r}")

    def pool(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The average or the greatest score of those alive in each tile."""
        if self.pooling == "max":
            scores = scores.astype(np.result_type(scores, np.float32), copy=False)
            return np.max(scores, axis=1, where=mask, initial=-np.inf)
        alive = np.maximum(np.count_nonzero(mask, axis=1), 1)
        return np.sum(scores, axis=1, where=mask, dtype=np.float64) / alive


@register("blocks")
@dataclasses.dataclass(frozen=True)
class Blocks(_Whole):
    """Blocks of inputs x outputs are kept or dropped as a whole, at each position of the window.

    Blocks at the edges are as large as what is left there, and count like the others.

    Args:
        block_size: (inputs, outputs) of a block: rows and columns of a Dense kernel.
        pooling: what a block scores: `"average"` or `"max"` of its weights that are alive.
    """

    block_size: tuple[int, int]
    pooling: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.block_size
        if isinstance(size, str) or len(size) != 2 or not all(map(_is_count, size)):
            raise ValueError(f"`block_size` must be two positive integers. Received: {size!r}")
        object.__setattr__(self, "block_size", tuple(size))

    def applies(self, layout: Layout) -> bool:
        """Returns True if the kernel has inputs and outputs."""
        return bool(layout.inputs and layout.outputs)

    def tile(self, layout: Layout) -> Tile:
        """The block, at one position."""
        return 1, *self.block_size


@register("outputs")
@dataclasses.dataclass(frozen=True)
class Outputs(_Whole):
    """Whole outputs are kept or dropped: units, filters, columns of an embedding.

    With criteria of magnitude, `"average"` ranks the filters of a layer by their L1 norm (Li et
    al.). `masked_layers.shrink` then makes the model smaller. Keep the last layer out of it (a rate
    of 0 for its path), or the model loses classes. In the kernels of LSTM and GRU an output is a
    column of one gate, not all columns of a unit.

    Args:
        pooling: what an output scores: `"average"` or `"max"` of its weights that are alive.

    Reference:
        - [Li et al., arXiv 1608.08710](https://arxiv.org/abs/1608.08710)
    """

    pooling: str = "average"
    whole_outputs = True

    def applies(self, layout: Layout) -> bool:
        """Returns True if the kernel has outputs."""
        return bool(layout.outputs)

    def tile(self, layout: Layout) -> Tile:
        """All that one output has."""
        positions, inputs, _ = layout.sizes
        return positions, inputs, 1


@register("channels")
@dataclasses.dataclass(frozen=True)
class Channels(Structure):
    """Channels of the whole model are kept or dropped, with all weights that belong to them.

    A channel is a filter or unit with its rows in the kernels of all layers that read it, and where
    additions or gates join layers, the filter of each of them. Rates, sparsities and counts are
    those of channels. `masked_layers.shrink` then removes them altogether, biases and
    normalization included. Outputs of the model are never pruned, nor is what cannot be followed
    (`masked_layers.channel_families` says which layers and why).

    With scope `"layer"`, each family of joined layers is ranked alone. With `"global"`, all
    channels are ranked together by their scores over the mean score of their family.

    Args:
        pooling: Score of a channel, of the scores of all kept weights that belong to it:
            `"average"` (with criteria of magnitude, an L1 norm over the group), `"norm"` (the root
            of the mean square: L2) or `"max"`.
        at_most: Share of the channels of a family that is pruned at most, in (0, 1).
        round_to: The number of channels kept in a family is rounded up to a multiple of this.

    Reference:
        - [Fang et al., arXiv 2301.12900](https://arxiv.org/abs/2301.12900) (dependency graphs)
    """

    pooling: str = "average"
    at_most: float = 0.9
    round_to: int = 1
    coupled = True

    def __post_init__(self) -> None:
        poolings = (*POOLINGS, "norm")
        if self.pooling not in poolings:
            raise ValueError(f"`pooling` must be one of {poolings}. Received: {self.pooling!r}")
        share = self.at_most
        if isinstance(share, bool) or not isinstance(share, float | int) or not 0 < share < 1:
            raise ValueError(f"`at_most` must be a number in (0, 1). Received: {share!r}")
        if not _is_count(self.round_to):
            raise ValueError(f"`round_to` must be a positive integer. Received: {self.round_to!r}")

    def applies(self, layout: Layout) -> bool:
        """Returns True: which kernels belong to a channel is for the graph of the model to say."""
        return True


@dataclasses.dataclass(frozen=True, repr=False)
class Tiles(_Whole):
    """Tiles of the size that a function gives are kept or dropped as a whole.

    Args:
        function: `function(layout)` gives a tile as (positions, inputs, outputs), or None for
            kernels that have none.
        pooling: what a tile scores: `"average"` or `"max"` of its weights that are alive.
    """

    function: Callable[[Layout], Tile | None]
    pooling: str = "average"

    @property
    def name(self) -> str:
        """The name it was registered under, else that of the function."""
        return _REGISTRY.name_of(self.function)

    def __post_init__(self) -> None:
        super().__post_init__()
        _REGISTRY.checked(self.name, self.function)

    def applies(self, layout: Layout) -> bool:
        """Returns True if the function gives a tile."""
        return self.function(layout) is not None

    def tile(self, layout: Layout) -> Tile:
        """Returns what the function gives."""
        tile = self.function(layout)
        if not (isinstance(tile, tuple) and len(tile) == 3 and all(map(_is_count, tile))):
            raise ValueError(
                f"The structure {self.name!r} must give the size of a tile as (positions, inputs, "
                f"outputs), three positive integers, or None. Received: {tile!r} for {layout}"
            )
        return tile

    def get_config(self) -> dict[str, Any]:
        """The name and the pooling; `get` finds the function again if it is registered."""
        return {"name": _REGISTRY.checked(self.name, self.function), "pooling": self.pooling}

    def __repr__(self) -> str:
        return f"Tiles({self.name}, pooling={self.pooling!r})"


def get(identifier: Identifier) -> Structure:
    """Turns whatever names a structure into a `Structure`.

    Args:
        identifier: `"2:4"` or any N:M; `"4x1"` or any inputs x outputs, for blocks; `"filters"` or
            `"units"`, which are the same; the name of a registered structure; a dict from
            `get_config()` or Keras' `serialize_keras_object`; a `Structure`; a function from a
            `Layout` to a tile, as `register` takes it.

    Raises:
        ValueError: an unknown name, arguments that the structure does not take, or something that
            is none of these.
    """
    return _REGISTRY.get(identifier)


def cut(array: np.ndarray, layout: Layout, tile: Tile) -> np.ndarray:
    """The tiles of a kernel, shape (tiles, weights in a tile); 0 or False where they stick out."""
    sizes = layout.sizes
    counts = [-(-size // edge) if edge else 0 for size, edge in zip(sizes, tile, strict=True)]
    array = array.transpose(layout.order).reshape(sizes)
    beyond = [(0, n * edge - size) for n, edge, size in zip(counts, tile, sizes, strict=True)]
    if any(after for _, after in beyond):
        array = np.pad(array, beyond)
    (a, b, c), (p, i, o) = counts, tile
    array = array.reshape(a, p, b, i, c, o).transpose(0, 2, 4, 1, 3, 5)
    return array.reshape(a * b * c, p * i * o)


def paste(tiles: np.ndarray, layout: Layout, tile: Tile) -> np.ndarray:
    """The kernel that `cut` made these tiles of: a new contiguous array of its shape."""
    sizes, (p, i, o) = layout.sizes, tile
    a, b, c = (-(-size // edge) if edge else 0 for size, edge in zip(sizes, tile, strict=True))
    array = tiles.reshape(a, b, c, p, i, o).transpose(0, 3, 1, 4, 2, 5)
    array = array.reshape(a * p, b * i, c * o)[: sizes[0], : sizes[1], : sizes[2]]
    array = array.reshape([layout.shape[axis] for axis in layout.order])
    return np.ascontiguousarray(array.transpose(np.argsort(layout.order)))


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
