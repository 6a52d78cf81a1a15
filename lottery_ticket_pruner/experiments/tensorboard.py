"""TensorBoard logs on every backend: event files written without TensorFlow."""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import keras
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

import masked_layers as ml
from lottery_ticket_pruner.loggers import RunLogger, sparsities
from masked_layers.files import naming


class EventWriter:
    """A TensorBoard run (a folder with one event file), which is flushed after every entry.

    Used as a context manager. `tensorboard --logdir` on the parent folder shows several runs
    together.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = folder / name
        self._records = RecordWriter(self._file.open("wb"))
        self._write(Event(file_version="brain.Event:2"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Logs a number."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(Event(step=step, summary=summary))

    def graph(self, model: keras.Model) -> None:
        """Logs the layers of a model as TensorBoard's graph (see `layer_graph`)."""
        self._write(Event(graph_def=layer_graph(model).SerializeToString()))

    def sparsity(self, model: keras.Model, step: int) -> None:
        """Logs the share of pruned weights for every mask of a masked model, and in total."""
        for name, share in sparsities(model).items():
            self.scalar(name, share, step)

    def text(self, tag: str, text: str) -> None:
        """Logs text in Markdown."""
        self._write(Event(summary=text_pb(tag, text)))

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Logs what the run was started with as hyperparameters, by which runs can be compared."""
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in values.items()
            if value is not None
        }
        self._write(Event(summary=hparams_pb(plain)))

    def close(self) -> None:
        """Closes the event file."""
        with naming(self._file):
            self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self._file):
            self._records.write(event.SerializeToString())
            self._records.flush()


class TensorBoardLogger(RunLogger):
    """A log for TensorBoard, which writes event files itself.

    Args:
        folder: Folder of the TensorBoard run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.writer = EventWriter(folder)

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs what the run was started with, as a table of texts and as hyperparameters."""
        lines = [f"| {name} | {value} |" for name, value in values.items()]
        self.writer.text("params", "\n".join(["| | |", "|---|---|", *lines]))
        self.writer.hparams(values)

    def scalars(self, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        """Logs numbers. TensorBoard's steps have no name."""
        for name, value in values.items():
            self.writer.scalar(name, value, step)

    def finish(self, *, failed: bool = False) -> None:
        """Closes the event file."""
        self.writer.close()


class ArmFolders(RunLogger):
    """The log of a seed of `lottery-ticket run`: a TensorBoard run for each arm and each round.

    The first part of each name is that of the arm. A second part that names a round belongs to the
    curves over the steps of this round's training. They get a run of their own below that of the
    arm, so that the curves of all arms and rounds share a chart.

    Args:
        folder: Folder of the TensorBoard runs.
        replicate: Number of the seed, the end of their names.
        model: The model, whose graph is shown with the ticket.
    """

    def __init__(self, folder: Path, replicate: int, model: keras.Model) -> None:
        self._folder, self._replicate = folder, replicate
        self._writers: dict[str, TensorBoardLogger] = {}
        self._rounds: dict[str, tuple[str, TensorBoardLogger]] = {}
        self._arm("ticket").writer.graph(model)

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs what the run was started with."""
        self._arm("ticket").params(values)

    def scalars(self, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        """Logs numbers, whose names begin with the arm."""
        for name, value in values.items():
            arm, _, rest = name.partition("/")
            round_, _, inner = rest.partition("/")
            if round_.startswith("round_"):
                self._round(arm, round_).scalars({inner: value}, step, axis)
            else:
                self._arm(arm).scalars({rest: value}, step, axis)

    def finish(self, *, failed: bool = False) -> None:
        """Closes the event files."""
        for writer in (*self._writers.values(), *(writer for _, writer in self._rounds.values())):
            writer.finish(failed=failed)

    def _arm(self, arm: str) -> TensorBoardLogger:
        if arm not in self._writers:
            self._writers[arm] = TensorBoardLogger(self._folder / f"{arm}-{self._replicate}")
        return self._writers[arm]

    def _round(self, arm: str, round_: str) -> TensorBoardLogger:
        """Returns the log of a round. That of the arm's previous round is closed."""
        known, writer = self._rounds.get(arm, ("", None))
        if writer is None or known != round_:
            if writer is not None:
                writer.finish()
            writer = TensorBoardLogger(self._folder / f"{arm}-{self._replicate}" / round_)
            self._rounds[arm] = round_, writer
        return writer


def layer_graph(model: keras.Model) -> GraphDef:
    """Returns the layers of a model as a TensorBoard graph with masked weights and masks.

    It is made from the configuration of the model, and therefore the same on every backend. Each
    masked layer is a scope that contains its masked weights and masks, with their shapes.
    """
    graph = keras_model_to_graph_def(json.loads(model.to_json()))
    nodes = {node.name.rpartition("/")[2]: node for node in graph.node}
    for node in graph.node:
        node.op = node.attr["keras_class"].s.decode()
    for ref in ml.masked_refs(model):
        layer = nodes.get(ref.layer.name)
        scope = f"{layer.name}/{ref.name}" if layer is not None else ref.path
        mask = _shaped_node(f"{scope}_mask", "Mask", ref.variable.shape)
        weight = _shaped_node(scope, "Variable", ref.variable.shape)
        if layer is not None:
            layer.input.extend([weight.name, mask.name])
        graph.node.extend([mask, weight])
    return graph


def _shaped_node(name: str, op: str, shape: tuple[int, ...]) -> NodeDef:
    sizes = [TensorShapeProto.Dim(size=size) for size in shape]
    output = AttrValue.ListValue(shape=[TensorShapeProto(dim=sizes)])
    return NodeDef(name=name, op=op, attr={"_output_shapes": AttrValue(list=output)})
