"""Times models and layers, compiled as `predict` compiles them, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from masked_layers.conversion import strip_masks
from masked_layers.copying import copy_model
from masked_layers.devices import computes_on_cpu
from masked_layers.inspection import refs_with_masks
from masked_layers.layers import MaskedLayer
from masked_layers.paths import walk
from masked_layers.turns import seconds_per_call

# Elapsed times are noisy if the middle half of their ratios spans more than this share of it.
_NOISY = 0.15


@dataclass(frozen=True)
class Timing:
    """Times of two models or layers that were called in turns.

    Attributes:
        before: Median milliseconds of a call of the first one.
        after: Median milliseconds of a call of the second one.
        fastest: Milliseconds of the fastest call of each.
        elapsed: Median over all rounds of the second elapsed time divided by the first.
        spread: The first and the third quartile of these ratios.
        processor: The same median for the processor time of all threads of this process. Other
            processes hardly affect it, but it does not tell whether the threads worked at once.
            None if the models do not run on the processor.
        rounds: Number of rounds.
    """

    before: float
    after: float
    fastest: tuple[float, float]
    elapsed: float
    spread: tuple[float, float]
    processor: float | None
    rounds: int

    @classmethod
    def of(cls, before: Sequence[Any], after: Sequence[Any]) -> Timing:
        """Summarizes the seconds of each round: pairs of elapsed time and processor time."""
        first, second = np.array(before), np.array(after)
        elapsed = second[:, 0] / first[:, 0]
        # Very short calls may take none of the ticks of the processor's clock.
        shares = second[:, 1] / np.maximum(first[:, 1], 1e-9)
        low, high = np.quantile(elapsed, (0.25, 0.75)).tolist()
        return cls(
            before=1e3 * float(np.median(first[:, 0])),
            after=1e3 * float(np.median(second[:, 0])),
            fastest=(1e3 * float(first[:, 0].min()), 1e3 * float(second[:, 0].min())),
            elapsed=float(np.median(elapsed)),
            spread=(low, high),
            processor=float(np.median(shares)) if computes_on_cpu() else None,
            rounds=len(elapsed),
        )

    @property
    def noisy(self) -> bool:
        """True if elapsed times vary so much that the machine must have had other load."""
        return self.spread[1] - self.spread[0] > _NOISY * self.elapsed

    @property
    def ratio(self) -> float:
        """The share of the time that is left: that of elapsed time, or of processor time if noisy.

        On an accelerator it is always that of elapsed time.
        """
        return self.processor if self.noisy and self.processor is not None else self.elapsed

    def __str__(self) -> str:
        low, high = self.spread
        elapsed = f"{self.elapsed:.3f} ({low:.3f} to {high:.3f} in half of {self.rounds} rounds)"
        text = f"{self.before:.3g} ms -> {self.after:.3g} ms, ratio of elapsed times {elapsed}"
        if self.processor is not None:
            text += f", of processor times {self.processor:.3f}"
        if self.noisy:
            text += "; other load on the machine makes elapsed times vary"
        return text


class Compiled:
    """A model on made-up inputs, compiled by the backend in the first call.

    A call runs the model in inference mode, and returns when its outputs are computed.

    Args:
        model: A model whose input sizes are fixed, except for the batch.
        batch_size: Number of examples in a batch.

    Raises:
        ValueError: If a size of an input is not known, or its dtype is not of numbers.
    """

    def __init__(self, model: keras.Model, batch_size: int) -> None:
        self.model = model
        graph = model if isinstance(model, keras.Function) else None
        tensors = model.inputs if graph is None else graph.input
        if graph is None and len(tensors) == 1:
            tensors = tensors[0]
        inputs = keras.tree.map_structure(lambda x: made_up(x, batch_size), tensors)
        self._run = compiled(lambda x: model(x, training=False), (inputs,), model)

    def __call__(self) -> None:
        """Runs the model and waits for its outputs."""
        self._run()


def compare(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    rounds: tuple[int, int] = (9, 41),
    seconds: float = 3.0,
    turn: float = 0.005,
) -> Timing:
    """Times two functions in turns, after three calls of each that are not counted.

    Args:
        before: The first function, such as a `Compiled`.
        after: The second function.
        rounds: The least and the greatest number of rounds.
        seconds: Time after which no further round begins, once there are enough.
        turn: Seconds of a turn at least, in which short calls are repeated.
    """
    functions = {"before": before, "after": after}
    limits: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "turn": turn}
    found = seconds_per_call(functions, clock=_clocks, warm=1, **limits)
    return Timing.of(**found)


def _clocks() -> np.ndarray:
    return np.array((time.perf_counter(), time.process_time()))


def unpruned(model: keras.Model) -> keras.Model:
    """Returns a plain model of the full size of a masked one, or the model itself if it is plain.

    Pruned weights have their raw values, which take the same time as zeros.
    """
    if not any(isinstance(layer, MaskedLayer) for _, layer in walk(model)):
        return model
    copy = copy_model(model)
    for ref in refs_with_masks(copy):
        if not ref.mask.learned:  # Otherwise it cannot be stripped, and an error says so.
            ref.mask.value.assign(np.ones(ref.variable.shape, bool))
    return strip_masks(copy, inplace=True)


def made_up(tensor: keras.KerasTensor, batch_size: int) -> Any:
    """Returns a tensor for a symbolic one: normally distributed numbers, or zeros for integers.

    Raises:
        ValueError: If a size besides that of the batch is not known, or the dtype is not of
            numbers.
    """
    shape = [batch_size if tensor.shape[0] is None else tensor.shape[0], *tensor.shape[1:]]
    if None in shape:
        raise ValueError(
            f"The size of '{tensor.name}' is not fixed: {tuple(tensor.shape)}. Latency is measured "
            "on inputs of one size: create the model with a fixed one, such as "
            "`keras.Input((128,))`."
        )
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "string":
        raise ValueError(f"'{tensor.name}' takes strings, for which no example can be made up.")
    if "float" in dtype:
        value = np.random.default_rng(0).normal(size=shape).astype("float32")
    else:
        value = np.zeros(shape, "int32")
    return keras.ops.cast(keras.ops.convert_to_tensor(value), dtype)


def compiled(
    call: Callable[..., Any], arguments: tuple[Any, ...], model: keras.Model, owner: Any = None
) -> Callable[[], None]:
    """Returns a function that calls `call(*arguments)` and waits for the result.

    Args:
        call: Function of tensors.
        arguments: Its arguments, nested in any way.
        model: The model, whose `jit_compile` and `run_eagerly` apply as in `predict`.
        owner: The layer whose weights are read. By default the model.
    """
    backend = keras.backend.backend()
    jit, eager = bool(model.jit_compile), bool(model.run_eagerly)
    if backend == "tensorflow":
        return _in_tensorflow(call, arguments, jit, eager)
    if backend == "jax":
        return _in_jax(call, arguments, model if owner is None else owner, jit and not eager)
    if backend == "torch":
        return _in_torch(call, arguments, jit and not eager)
    raise ValueError(f"Latency can be measured on TensorFlow, JAX and torch. Received: {backend!r}")


def _in_tensorflow(
    call: Callable[..., Any], arguments: tuple[Any, ...], jit: bool, eager: bool
) -> Callable[[], None]:
    import tensorflow as tf

    function = call if eager else tf.function(call, jit_compile=jit or None)
    on_gpu = not computes_on_cpu()

    def run() -> None:
        function(*arguments)
        if on_gpu:
            tf.test.experimental.sync_devices()

    return run


def _in_jax(
    call: Callable[..., Any], arguments: tuple[Any, ...], owner: Any, jit: bool
) -> Callable[[], None]:
    import jax

    # As in `predict`, weights are arguments. As constants, they would be folded into others.
    variables = list(getattr(owner, "variables", ()))

    def pure(values: list[Any], tensors: tuple[Any, ...]) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return call(*tensors)

    function = jax.jit(pure) if jit else pure
    values = [variable.value for variable in variables]

    def run() -> None:
        jax.block_until_ready(function(values, arguments))

    return run


def _in_torch(
    call: Callable[..., Any], arguments: tuple[Any, ...], jit: bool
) -> Callable[[], None]:
    import torch

    function = torch.compile(call) if jit else call
    on_gpu = torch.cuda.is_available()

    def run() -> None:
        with torch.no_grad():
            function(*arguments)
        if on_gpu:
            torch.cuda.synchronize()

    return run
