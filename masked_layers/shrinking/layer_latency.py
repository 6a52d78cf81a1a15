"""Times every layer of a model and of its smaller copy, beside sizes and multiply-adds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras

from masked_layers.shrinking._keras_graph import graph_calls, is_tensor
from masked_layers.shrinking.channels import Edit, Flow
from masked_layers.shrinking.following import follow, variable_of
from masked_layers.shrinking.timing import (
    Compiled,
    Timing,
    compare,
    compiled,
    made_up,
    unpruned,
)
from masked_layers.text_tables import aligned


@dataclass(frozen=True)
class LatencyRow:
    """Sizes and times of one layer, in the model and in the smaller one.

    Attributes:
        layer: Name of the layer; "nested/name" inside a nested model.
        kind: Class name of the layer.
        channels: Numbers of units or filters before and after, or None if it makes none.
        weights: Numbers of weights before and after.
        macs: Multiply-adds for one example before and after, or None where they are not known.
        timing: Times of the layer alone, or None if it could not be timed.
    """

    layer: str
    kind: str
    channels: tuple[int, int] | None
    weights: tuple[int, int]
    macs: tuple[int, int] | None
    timing: Timing | None


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a model and of a smaller one, as wholes and by layer. It prints as a table.

    Attributes:
        rows: One `LatencyRow` per layer and operation, in the order of the graph.
        model: Times of the two models as wholes.
        batch_size: Number of examples in a batch.
        not_timed: Name of a layer that could not be timed -> the reason.
    """

    rows: tuple[LatencyRow, ...]
    model: Timing
    batch_size: int
    not_timed: Mapping[str, str]

    def __iter__(self) -> Iterator[LatencyRow]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as plain dicts, lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [["layer", "channels", "", "weights", "", "multiply-adds", "", "ms", "", "ratio"]]
        for row in self.rows:
            timing = row.timing
            times = ["", "", ""]
            if timing is not None:
                before, after = timing.fastest
                times = [f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}"]
            pairs = [row.channels, row.weights, row.macs]
            lines.append([row.layer, *(cell for pair in pairs for cell in _cells(pair)), *times])
        text = aligned(lines, left={0})
        text.append(f"whole model, batch size {self.batch_size}: {self.model}")
        text += [f"not timed: {name}: {why}" for name, why in self.not_timed.items()]
        return "\n".join(text)


def _cells(pair: tuple[int, int] | None) -> tuple[str, str]:
    return ("", "") if pair is None else (f"{pair[0]:,}", f"{pair[1]:,}")


def latency_table(
    model: keras.Model, smaller: keras.Model, *, batch_size: int = 1, seconds: float = 0.1
) -> LatencyTable:
    """Measures the latency of a model and of a smaller one on this machine, also by layer.

    Everything is compiled by the backend as for `predict`, and the two models take turns. Each
    layer is timed alone, on inputs of the shapes that it has in its model. This includes the time
    to start a call, and leaves out what a compiler saves by fusing layers, so the times of all
    layers together may exceed that of the model. The printed times of layers are those of the
    fastest calls, which other load on the machine affects least. A composite layer is timed as a
    whole, and so is a nested model that is called more than once.

    Args:
        model: The original Sequential or Functional model. If it is masked, it is measured without
            masks, in its full size.
        smaller: A model with layers of the same names, as `shrink` returns it.
        batch_size: Number of examples in a batch.
        seconds: Time for measuring each layer, in which there are at least 5 rounds.

    Returns:
        The table. Layers that could not be timed are in `not_timed`.

    Raises:
        TypeError: If one of them is not a Keras model.
        ValueError: If one of the models is neither Sequential nor Functional, or the size of an
            input besides that of the batch is not fixed.

    Example:
    ```python
    smaller = masked_layers.shrink(masked)
    print(masked_layers.latency_table(masked, smaller, batch_size=8))
    ```
    """
    for given in (model, smaller):
        if not isinstance(given, keras.Model):
            raise TypeError(f"Expected a `keras.Model`. Received: {given!r}")
    dense = unpruned(model)
    whole = compare(Compiled(dense, batch_size), Compiled(smaller, batch_size))
    before = _parts(dense, follow(dense), {})
    after = _parts(smaller, follow(smaller), before)
    rows, not_timed = [], {}
    for name in before.keys() & after.keys():
        try:
            runs = [
                part.run(each, batch_size)
                for part, each in ((before[name], dense), (after[name], smaller))
            ]
            timing = compare(*runs, rounds=(5, 1000), seconds=seconds, turn=0.0)
        except Exception as error:  # Layers are called on inputs that they may not accept.
            timing, not_timed[name] = None, f"{type(error).__name__}: {error}".split("\n")[0]
        rows.append(before[name].row(after[name], timing))
    for name in before.keys() ^ after.keys():
        not_timed[name] = "only in one of the models"
    order = list(before)
    rows.sort(key=lambda row: order.index(row.layer))
    return LatencyTable(tuple(rows), whole, batch_size, not_timed)


@dataclass(frozen=True)
class _Part:
    """A layer or operation with its calls and sizes."""

    name: str
    operation: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    channels: int | None
    macs: int | None

    def run(self, model: keras.Model, batch_size: int) -> Callable[[], None]:
        """Returns a function that runs all calls of the layer, compiled as in the model."""
        parameters = inspect.signature(self.operation.call).parameters
        inference = {"training": False} if "training" in parameters else {}

        def call(*tensors: Any) -> list[Any]:
            found = iter(tensors)

            def fill(value: Any) -> Any:
                return next(found) if is_tensor(value) else value

            results = []
            for args, kwargs in self.calls:
                args, kwargs = keras.tree.map_structure(fill, (args, kwargs))
                results.append(self.operation(*args, **{**kwargs, **inference}))
            return results

        inputs = [x for x in keras.tree.flatten(self.calls) if is_tensor(x)]
        tensors = tuple(made_up(x, batch_size) for x in inputs)
        return compiled(call, tensors, model, self.operation)

    def row(self, after: _Part, timing: Timing | None) -> LatencyRow:
        """Returns the row of the layer and its smaller copy."""
        weights = [
            sum(math.prod(x.shape) for x in getattr(part.operation, "weights", ()))
            for part in (self, after)
        ]
        channels, macs = None, None
        if self.channels is not None and after.channels is not None:
            channels = self.channels, after.channels
        if self.macs is not None and after.macs is not None:
            macs = self.macs, after.macs
        kind = type(self.operation).__name__
        return LatencyRow(self.name, kind, channels, (weights[0], weights[1]), macs, timing)


def _parts(model: keras.Model, flow: Flow, known: Mapping[str, _Part]) -> dict[str, _Part]:
    """Returns the layers and operations of a model by name, in the order of its graph.

    Args:
        model: The model or a nested one.
        flow: Its channels.
        known: Parts that are not taken apart.
    """
    calls: dict[int, tuple[Any, list[Any]]] = {}
    for operation, args, kwargs, _ in graph_calls(flow.graphs[id(model)]):
        calls.setdefault(id(operation), (operation, []))[1].append((args, kwargs))
    found: dict[str, _Part] = {}
    for key, (operation, each) in calls.items():
        name = flow.names[key]
        nested = key in flow.graphs and key not in flow.composites
        if nested and len(each) == 1 and name not in known:
            found |= _parts(operation, flow, known)
            continue
        edits = [
            (part, edit)
            for other, (part, edit) in flow.edits.items()
            if other == key or flow.names[other].startswith(f"{name}/")
        ]
        made = flow.edits[key][1].made if key in flow.edits else None
        macs = [count for part, edit in edits for count in _multiply_adds(part, edit)]
        counted = [count for count in macs if count is not None]
        total = sum(counted) if macs and len(counted) == len(macs) else None
        found[name] = _Part(name, operation, each, None if made is None else len(made.slots), total)
    return found


def _multiply_adds(operation: Any, edit: Edit) -> Iterator[int | None]:
    """Yields the multiply-adds of each kernel and product of a layer, or None if unknown."""
    for name, count in edit.counts().items():
        if name in edit.products:
            size = math.prod(len(channels.slots) for channels in edit.products[name].values())
        elif (variable := variable_of(operation, name)) is not None:
            size = math.prod(variable.shape)
        else:
            continue
        yield None if count is None else size * count
