"""Fits the kept weights of masked layers to the outputs that the layers had before."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
from keras import layers, ops

from lottery_ticket_pruner.evidence import State, batches, layer_inputs
from lottery_ticket_pruner.reconstruction.least_squares import solve
from lottery_ticket_pruner.reconstruction.products import Product
from lottery_ticket_pruner.training import ArrayDataset
from lottery_ticket_pruner.variables import read, widened
from masked_layers import WeightRef
from masked_layers.maskable import mask_of, raw_variable

# Share of the mean of the Gram matrix's diagonal that is added to the diagonal.
DAMPING = 0.01
# Least number of columns in a block of the Gram matrix. Smaller ones are slow to multiply.
_LEAST_BLOCK = 256

_check: contextvars.ContextVar[Callable[[], object]] = contextvars.ContextVar(
    "check", default=lambda: None
)


@contextlib.contextmanager
def checked(check: Callable[[], object]) -> Iterator[None]:
    """Calls a function between the batches and layers of all fits in a `with` block.

    An error that it raises ends the update. The model is then as it was before.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A layer to fit.

    Attributes:
        path: Path of its kernel.
        layer: The layer.
        kernel: Its masked kernel.
        product: The layer as a product of matrices.
        shapes: Shapes of its inputs in each call of a forward pass.
    """

    path: str
    layer: layers.Layer
    kernel: WeightRef
    product: Product
    shapes: Sequence[tuple[int, ...]]

    @property
    def calls(self) -> int:
        """Number of calls of the layer in one forward pass."""
        return len(self.shapes)

    @property
    def bytes(self) -> int:
        """Size of the statistics that are needed to fit the layer."""
        groups, inputs, outputs = self._matrix_shape
        return 8 * groups * (inputs + 1) * (inputs + 1 + outputs)

    @property
    def outputs(self) -> int:
        """Number of outputs for one example, in all calls."""
        examples = [np.zeros((1, *shape[1:]), "float32") for shape in self.shapes]
        rows = [part.shape[1] for example in examples for part in self.product.rows(example)]
        return sum(rows) * self._matrix_shape[0] * self._matrix_shape[2]

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        return self.product.matrix(np.empty(self.kernel.variable.shape)).shape

    @property
    def fits_bias(self) -> bool:
        """True if the bias is fitted too."""
        return self.product.biased and self.layer.bias is not None

    def weights(self, state: State) -> np.ndarray:
        """Returns the effective weights, with the bias as last row: (groups, inputs, outputs)."""
        with keras.StatelessScope(list(state)):
            matrix = self.product.matrix(_array(getattr(self.layer, self.kernel.name)))
            if not self.fits_bias:
                return matrix
            bias = self.product.bias_matrix(_array(self.layer.bias))
        return np.concatenate([matrix, bias], axis=1)

    def kept(self, state: State) -> np.ndarray:
        """Returns the mask of these weights."""
        with keras.StatelessScope(list(state)):
            matrix = self.product.matrix(self._mask(self.kernel.name))
            if not self.fits_bias:
                return matrix
            bias = self.product.bias_matrix(self._mask("bias"))
        return np.concatenate([matrix, bias], axis=1)

    def rows(self, inputs: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the matrix of the inputs in parts, with ones for the bias as last column."""
        for part in self.product.rows(inputs):
            ones = np.ones((*part.shape[:2], 1))
            yield np.concatenate([part, ones], axis=2) if self.fits_bias else part

    def values(self, change: np.ndarray, state: State) -> list[tuple[keras.Variable, np.ndarray]]:
        """Returns the raw weights after a change of the effective ones."""
        inputs = change.shape[1] - self.fits_bias
        parts = {self.kernel.name: self.product.kernel(change[:, :inputs])}
        if self.fits_bias:
            parts["bias"] = self.product.bias(change[:, inputs:])
        return [(self._variable(n), self._raw(n, c, state)) for n, c in parts.items()]

    def _variable(self, name: str) -> keras.Variable:
        variable = raw_variable(self.layer, name)
        assert variable is not None, name  # The layer is built.
        return variable

    def _mask(self, name: str) -> np.ndarray:
        mask = mask_of(self.layer, name)
        return np.ones(self._variable(name).shape, bool) if mask is None else mask.to_numpy()

    def _raw(self, name: str, change: np.ndarray, state: State) -> np.ndarray:
        variable, mask = self._variable(name), mask_of(self.layer, name)
        with keras.StatelessScope(list(state)):
            kept = self._mask(name)
        if mask is not None and mask.rescale:
            change = change * (kept.sum() / kept.size)
        before = read(variable)
        after = before + change.reshape(before.shape)
        return np.where(kept, after, before).astype(before.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """New raw weights of a layer.

    Attributes:
        path: Path of its kernel.
        values: New values of the kernel and the bias.
        before: Squared error of the layer's outputs with the mask alone, relative to their squares.
        after: The same with the new values.
        mean: Mean of each output, before the activation, with the new values.
        variance: Variance of each output.
    """

    path: str
    values: list[tuple[keras.Variable, np.ndarray]]
    before: float
    after: float
    mean: np.ndarray
    variance: np.ndarray


class _Sums:
    """Sums over examples for one layer: of X, X'X, X'R, R'R and Y'Y.

    X are the inputs of the layer, Y its outputs in the network before the update, and R what the
    masked layer lacks of them.
    """

    def __init__(self, target: Target, state: State) -> None:
        self.target, self.state = target, state
        self.dense, self.masked = target.weights(()), target.weights(state)
        groups, inputs, outputs = self.dense.shape
        self.gram = np.zeros((groups, inputs, inputs))
        self.total = np.zeros((groups, 1, inputs))
        self.moments = np.zeros((groups, inputs, outputs))
        self.count = 0
        self.error = self.size = 0.0

    def add(self, inputs: np.ndarray, outputs: np.ndarray | None = None) -> None:
        """Adds one call.

        Args:
            inputs: Inputs of the layer.
            outputs: Its outputs before the update, or None if `finish` computes the other sums.
        """
        start = 0
        for rows in self.target.rows(inputs):
            turned = rows.transpose(0, 2, 1)
            # In blocks on and above the diagonal: the whole product would be another X'X.
            for block in self._blocks:
                self.gram[:, block, block.start :] += turned[:, block] @ rows[..., block.start :]
            self.total += rows.sum(axis=1, keepdims=True)
            self.count += rows.shape[1]
            if outputs is not None:
                part = outputs[:, start : start + rows.shape[1]]
                lacking = part - rows @ self.masked
                self.moments += turned @ lacking
                self.error += float(np.square(lacking).sum())
                self.size += float(np.square(part, dtype="float64").sum())
                start += rows.shape[1]

    @property
    def _blocks(self) -> Iterator[slice]:
        size = self.gram.shape[1]
        step = max(_LEAST_BLOCK, -(-size // 8))
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    def _mirror(self) -> None:
        """Copies X'X above the diagonal below it."""
        for block in self._blocks:
            self.gram[:, block.stop :, block] = self.gram[:, block, block.stop :].transpose(0, 2, 1)

    def finish(self) -> None:
        """Computes the other sums from X'X, if the inputs are those before the update."""
        self._mirror()
        lacking = self.dense - self.masked
        self.moments = self.gram @ lacking
        self.error = float((lacking * self.moments).sum())
        self.size = float((self.dense * (self.gram @ self.dense)).sum())

    def fit(self) -> Fit:
        """Returns the weights that minimize the error, with a penalty on their changes."""
        self._mirror()
        target = self.target
        change = np.zeros_like(self.moments)
        error = self.error
        kept = target.kept(self.state)
        for gram, moments, mask, out in zip(self.gram, self.moments, kept, change, strict=True):
            # In place, because a copy may be as large as everything else together.
            diagonal = np.einsum("ii->i", gram)
            penalties = self._penalties(diagonal)
            diagonal += penalties
            out[...] = solve(gram, moments, mask)
            diagonal -= penalties
            error += float((out * (gram @ out - 2 * moments)).sum())
        size = self.size or 1.0
        weights = self.masked + change
        mean = self.total @ weights / self.count
        square = (weights * (self.gram @ weights)).sum(axis=1, keepdims=True) / self.count
        return Fit(
            path=target.path,
            values=target.values(change, self.state),
            before=self.error / size,
            after=max(error, 0.0) / size,
            mean=mean.ravel(),
            variance=np.maximum(square - mean**2, 0.0).ravel(),
        )

    def _penalties(self, diagonal: np.ndarray) -> np.ndarray:
        """Returns the penalty on the change of each weight of a column; none on the bias."""
        inputs = len(diagonal) - self.target.fits_bias
        penalty = DAMPING * diagonal[:inputs].mean() or 1.0
        return np.append(np.full(inputs, penalty), np.zeros(len(diagonal) - inputs))


class FormerOutputs:
    """Outputs of layers in the network before the update, before their activations.

    They are computed for several layers in one pass over the examples: for as many as take no more
    memory than half the statistics of the largest layer.

    Args:
        model: The network before the update.
        data: Examples.
        targets: The layers, in the order of their calls, in which they are also asked for.
        batch_size: Number of examples in a forward pass.
    """

    def __init__(
        self, model: keras.Model, data: ArrayDataset, targets: Sequence[Target], batch_size: int
    ) -> None:
        self._model, self._data, self._batch_size = model, data, batch_size
        self._waiting = list(targets)
        self._limit = max((target.bytes for target in targets), default=0) // 2
        self._held: dict[layers.Layer, list[np.ndarray]] = {}

    def of(self, target: Target) -> list[np.ndarray]:
        """Returns and forgets the outputs of a layer: (groups, rows, outputs) for each call."""
        if target.layer not in self._held:
            self._collect()
        return self._held.pop(target.layer)

    def _collect(self) -> None:
        size = 0
        group: dict[layers.Layer, tuple[Target, np.ndarray]] = {}
        while self._waiting:
            target = self._waiting[0]
            size += 4 * len(self._data) * target.outputs
            if group and size > self._limit:
                break
            group[target.layer] = target, target.weights(())
            self._waiting.pop(0)
        self._held |= {layer: [] for layer in group}
        calls = sum(target.calls for target, _ in group.values())
        for batch in batches(self._data, self._batch_size):
            _check.get()()
            for layer, inputs in layer_inputs(self._model, batch, group, calls=calls):
                target, dense = group[layer]
                rows = target.rows(finite(target.path, inputs))
                parts = [(part @ dense).astype("float32") for part in rows]
                self._held[layer].append(np.concatenate(parts, axis=1))


def fit_after(
    model: keras.Model,
    data: ArrayDataset,
    target: Target,
    former: FormerOutputs,
    state: State,
    batch_size: int,
) -> Fit:
    """Fits a layer to its former outputs, on the inputs that it gets from the pruned network.

    Args:
        model: The network before the update.
        data: Examples.
        target: The layer.
        former: The outputs before the update.
        state: The masks and weights of the pruned network that differ from those of the model.
        batch_size: Number of examples in a forward pass.
    """
    sums, outputs = _Sums(target, state), iter(former.of(target))
    for batch in batches(data, batch_size):
        _check.get()()
        seen = layer_inputs(model, batch, [target.layer], state=state, calls=target.calls)
        for _, inputs in seen:
            sums.add(finite(target.path, inputs), next(outputs))
    return sums.fit()


def fit_apart(
    model: keras.Model,
    data: ArrayDataset,
    targets: Sequence[Target],
    state: State,
    batch_size: int,
) -> Iterator[Fit]:
    """Fits layers to their former outputs, on the inputs that they had before the update.

    All arguments are those of `fit_after`. The statistics of as many layers are collected in one
    pass over the examples as take no more memory than those of two of the largest.
    """
    limit = 2 * max((target.bytes for target in targets), default=0)
    waiting = list(targets)
    while waiting:
        size, group = 0, []
        while waiting and size + waiting[0].bytes <= limit:
            size += waiting[0].bytes
            group.append(waiting.pop(0))
        sums = {target.layer: _Sums(target, state) for target in group}
        for batch in batches(data, batch_size):
            _check.get()()
            calls = sum(target.calls for target in group)
            for layer, inputs in layer_inputs(model, batch, sums, calls=calls):
                sums[layer].add(finite(sums[layer].target.path, inputs))
        for each in sums.values():
            each.finish()
            yield each.fit()


def finite(name: str, inputs: object) -> np.ndarray:
    """Returns the inputs of a layer as an array.

    Raises:
        ValueError: If they are not finite. The message has the given name.
    """
    array = widened(ops.convert_to_numpy(inputs))
    if not np.isfinite(array).all():
        raise ValueError(
            f"'{name}' cannot be reconstructed: the inputs that its layer gets from the given "
            "examples are not finite."
        )
    return array


def _array(tensor: object) -> np.ndarray:
    return widened(ops.convert_to_numpy(tensor)).astype("float64")
