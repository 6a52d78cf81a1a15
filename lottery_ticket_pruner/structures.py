"""Structures group the weights of a kernel that are pruned together: blocks, filters, N of M.

A structure divides a kernel into tiles. With `Blocks` and `Outputs`, each tile is kept or pruned as
a whole, by the pooled score of its weights. With `NOfM`, each tile keeps its N best weights.
`Channels` groups weights across kernels.

Kernels have axes that index inputs, axes that index outputs, and others (the positions of a
convolution's window). A tile is given as (positions, inputs, outputs). The last tile along an axis
is smaller if the size of the axis is not a multiple of the tile's. To add a structure, write a
function that returns its tile, and register it:

```python
@register("windows")
def windows(layout):
    '''The whole window of each pair of an input and an output.'''
    return layout.sizes[0], 1, 1
```
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
        shape: Shape of the kernel.
        input_axes: Axes that are summed over, without those of the window, outermost first. Empty
            for embeddings (whose rows are looked up), depthwise kernels and biases.
        output_axes: Axes that index output units or filters. Empty for biases.
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
    """Base class of structures: groups of a kernel's weights that are pruned together.

    Attributes:
        kept: Number of weights that each tile keeps. None if tiles are ranked against each other
            and kept or pruned as a whole.
        coupled: Whether the groups span several kernels, which requires the graph of the model.
        whole_outputs: Whether tiles are whole outputs. Weights that read an output are pruned once
            it is pruned in all kernels that make it.
    """

    kept: int | None = None
    coupled: bool = False
    whole_outputs: bool = False

    @property
    def name(self) -> str:
        """The registered name, or else the name of the class."""
        return _REGISTRY.name_of(type(self))

    def applies(self, layout: Layout) -> bool:
        """Returns True if a kernel of this layout has such tiles."""
        raise NotImplementedError

    def tile(self, layout: Layout) -> Tile:
        """Returns the size of a tile: positions, inputs and outputs."""
        raise NotImplementedError

    def pool(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns one score per tile.

        Args:
            scores: Scores of the weights, of shape (tiles, weights in a tile).
            mask: Bool array of the same shape, True where a weight is kept.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Returns the name and the arguments, from which `get` creates the same structure."""
        return {"name": _REGISTRY.checked(_REGISTRY.name_of(type(self)), type(self))} | {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # dataclasses all
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Structure":
        """Creates a structure from a configuration, as `get` does."""
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
    """Registers a structure under a name.

    Args:
        name: Name for `get` and configurations.

    Returns:
        A decorator that returns its argument unchanged. The argument is one of two kinds: a
        function `layout -> (positions, inputs, outputs)` that returns the size of the tiles to be
        kept or pruned as a whole (`Tiles`), or None for kernels without such tiles; or a subclass
        of `Structure` that is a dataclass with its arguments as fields.

    Raises:
        ValueError: If another structure has the name. The same structure defined again (in a
            notebook cell that is run twice) replaces the earlier one.
    """

    def decorate(made: Any) -> Any:
        _REGISTRY.add(name, made)
        return made

    return decorate


def names() -> list[str]:
    """Returns the registered names, in the order of registration."""
    return list(_REGISTRY)


@register("n_of_m")
@dataclasses.dataclass(frozen=True)
class NOfM(Structure):
    """N:M sparsity, such as 2:4: keeps at most N of every M consecutive weights along the inputs.

    Groups are counted from the first input, within each position of the window and each output. In
    a kernel laid out as (outputs, window, inputs), they are M neighbors along the innermost axis,
    as hardware requires. The last group counts as padded with zeros to M weights, and keeps
    min(N, r) of its r weights.

    Args:
        n: Number of weights that are kept in each group, at least 1.
        m: Number of weights in a group.

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
    def kept(self) -> int:  # type: ignore[override]  # Derived from `n`, not set.
        """N, the number of weights that each group keeps."""
        return self.n

    def applies(self, layout: Layout) -> bool:
        """Returns True if the kernel has inputs."""
        return bool(layout.inputs)

    def tile(self, layout: Layout) -> Tile:
        """Returns a tile of M inputs, at one position and for one output."""
        return 1, self.m, 1


class _Whole(Structure):
    """Tiles that are kept or pruned as a whole."""

    pooling: str

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {POOLINGS}. Received: {self.pooling!r}")

    def pool(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns the average or the greatest score of the kept weights in each tile."""
        if self.pooling == "max":
            scores = scores.astype(np.result_type(scores, np.float32), copy=False)
            return np.max(scores, axis=1, where=mask, initial=-np.inf)
        alive = np.maximum(np.count_nonzero(mask, axis=1), 1)
        return np.sum(scores, axis=1, where=mask, dtype=np.float64) / alive


@register("blocks")
@dataclasses.dataclass(frozen=True)
class Blocks(_Whole):
    """Blocks of inputs x outputs that are kept or pruned as a whole, at each window position.

    Blocks at the edges may be smaller, and count like the others.

    Args:
        block_size: (inputs, outputs) of a block: rows and columns of a Dense kernel.
        pooling: Score of a block: the `"average"` or the `"max"` of the scores of its kept weights.
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
        """Returns a tile of the block's inputs and outputs, at one position."""
        return 1, *self.block_size


@register("outputs")
@dataclasses.dataclass(frozen=True)
class Outputs(_Whole):
    """Outputs that are kept or pruned as a whole: units, filters, columns of an embedding.

    With magnitude criteria, `"average"` ranks the filters of a layer by their L1 norm (Li et al.).
    Each kernel is pruned by itself; `Channels` prunes joined layers together. Exclude the last
    layer with a rate of 0 for its path, or the model loses classes. In the kernels of LSTM and GRU,
    an output is a column of one gate, not all columns of a unit.

    Args:
        pooling: Score of an output: the `"average"` or the `"max"` of the scores of its kept
            weights.

    Reference:
        - [Li et al., arXiv 1608.08710](https://arxiv.org/abs/1608.08710)
    """

    pooling: str = "average"
    whole_outputs = True

    def applies(self, layout: Layout) -> bool:
        """Returns True if the kernel has outputs."""
        return bool(layout.outputs)

    def tile(self, layout: Layout) -> Tile:
        """Returns a tile of all weights of one output."""
        positions, inputs, _ = layout.sizes
        return positions, inputs, 1


@register("channels")
@dataclasses.dataclass(frozen=True)
class Channels(Structure):
    """Channels of the whole model that are kept or pruned with all weights that belong to them.

    A channel is a filter or unit, together with its rows in the kernels of all layers that read it.
    If additions or gates join several layers, it includes the filter of each of them. Rates and
    sparsities are shares of channels. `masked_layers.shrink` then removes pruned channels
    from the model, including their biases and normalization. Channels that are outputs of the
    model, or that cannot be followed, are never pruned; `masked_layers.channel_families` returns
    these layers and the reasons.

    With scope `"layer"`, each family of joined layers is ranked on its own. With `"global"`, all
    channels are ranked together by their scores divided by the mean score of their family. With
    `"isomorphic"`, families of the same kinds of layers with equal shapes are ranked together.

    Args:
        pooling: Score of a channel, from the scores of all kept weights that belong to it: their
            `"average"` (with magnitude criteria, the L1 norm of the group), `"norm"` (the root of
            their mean square, L2) or `"max"`.
        at_most: Greatest share of the channels of a family that is pruned, in (0, 1).
        round_to: The number of channels kept in a family is rounded up to a multiple of this.
        attention: What is pruned inside attention layers: `"widths"` (the width of queries and
            keys, and of values, which is the same in all heads), whole `"heads"`, or `"both"`.

    Reference:
        - [Fang et al., arXiv 2301.12900](https://arxiv.org/abs/2301.12900) (dependency graphs)
        - [Fang et al., arXiv 2407.04616](https://arxiv.org/abs/2407.04616) (isomorphic ranking)
    """

    pooling: str = "average"
    at_most: float = 0.9
    round_to: int = 1
    attention: str = "widths"
    coupled = True

    def __post_init__(self) -> None:
        poolings = (*POOLINGS, "norm")
        if self.pooling not in poolings:
            raise ValueError(f"`pooling` must be one of {poolings}. Received: {self.pooling!r}")
        share = self.at_most
        if not isinstance(share, float | int) or not 0 < share < 1:  # No bool is in between.
            raise ValueError(f"`at_most` must be a number in (0, 1). Received: {share!r}")
        if not _is_count(self.round_to):
            raise ValueError(f"`round_to` must be a positive integer. Received: {self.round_to!r}")
        choices = ("widths", "heads", "both")
        if self.attention not in choices:
            raise ValueError(f"`attention` must be one of {choices}. Received: {self.attention!r}")

    def takes(self, kind: str) -> bool:
        """Returns whether families of a kind (see `masked_layers.ChannelFamily`) are pruned."""
        return not kind or self.attention in ("both", "heads" if kind == "heads" else "widths")

    def applies(self, layout: Layout) -> bool:
        """Returns True: the graph of the model determines which kernels a channel belongs to."""
        return True


@dataclasses.dataclass(frozen=True, repr=False)
class Tiles(_Whole):
    """Tiles of a size given by a function, which are kept or pruned as a whole.

    Args:
        function: `function(layout)` returns the tile as (positions, inputs, outputs), or None for
            kernels without such tiles.
        pooling: Score of a tile: the `"average"` or the `"max"` of the scores of its kept weights.
    """

    function: Callable[[Layout], Tile | None]
    pooling: str = "average"

    @property
    def name(self) -> str:
        """The registered name, or else the name of the function."""
        return _REGISTRY.name_of(self.function)

    def __post_init__(self) -> None:
        super().__post_init__()
        _REGISTRY.checked(self.name, self.function)

    def applies(self, layout: Layout) -> bool:
        """Returns True if the function returns a tile."""
        return self.function(layout) is not None

    def tile(self, layout: Layout) -> Tile:
        """Returns the tile that the function returns."""
        tile = self.function(layout)
        if not (isinstance(tile, tuple) and len(tile) == 3 and all(map(_is_count, tile))):
            raise ValueError(
                f"The structure {self.name!r} must return the size of a tile as three positive "
                f"integers (positions, inputs, outputs), or None. Received: {tile!r} for {layout}"
            )
        return tile

    def get_config(self) -> dict[str, Any]:
        """Returns the name and the pooling, from which `get` finds a registered function."""
        return {"name": _REGISTRY.checked(self.name, self.function), "pooling": self.pooling}

    def __repr__(self) -> str:
        return f"Tiles({self.name}, pooling={self.pooling!r})"


def get(identifier: Identifier) -> Structure:
    """Returns the structure for an identifier.

    Args:
        identifier: `"2:4"` or any N:M; `"4x1"` or any inputs x outputs, for blocks; `"filters"` or
            `"units"`, which are the same; the name of a registered structure; a dict from
            `get_config()` or Keras' `serialize_keras_object`; a `Structure`; or a function from a
            `Layout` to a tile, as for `register`.

    Raises:
        ValueError: If the name is unknown, the structure does not accept the arguments, or the
            identifier is of another kind.
    """
    return _REGISTRY.get(identifier)


def cut(array: np.ndarray, layout: Layout, tile: Tile) -> np.ndarray:
    """Returns the tiles of a kernel, of shape (tiles, weights in a tile), padded with zeros."""
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
    """Returns the kernel from which `cut` made these tiles, as a new contiguous array."""
    sizes, (p, i, o) = layout.sizes, tile
    a, b, c = (-(-size // edge) if edge else 0 for size, edge in zip(sizes, tile, strict=True))
    array = tiles.reshape(a, b, c, p, i, o).transpose(0, 3, 1, 4, 2, 5)
    array = array.reshape(a * p, b * i, c * o)[: sizes[0], : sizes[1], : sizes[2]]
    array = array.reshape([layout.shape[axis] for axis in layout.order])
    return np.ascontiguousarray(array.transpose(np.argsort(layout.order)))


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
