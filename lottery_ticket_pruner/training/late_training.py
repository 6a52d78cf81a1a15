"""Training of sparse models at the cost of the weights that are left.

A smaller model with only these weights is trained in place of the given one, and its weights and
optimizer state are written back before anyone looks. The steps are the same except for rounding.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import _keras, optimizers
from lottery_ticket_pruner.training.dataset import ArrayDataset
from lottery_ticket_pruner.training.devices import why_distributed
from lottery_ticket_pruner.training.engine import Engine, engine_of, warn_once
from lottery_ticket_pruner.training.engine_settings import settings
from lottery_ticket_pruner.training.kept_layers import KeptDense, KeptInputs
from lottery_ticket_pruner.training.kept_products import Products, cost, products_for
from lottery_ticket_pruner.training.kept_weights import (
    KeptKernel,
    NotReducibleError,
    chain,
    dense_layers,
    kept_kernels,
    kernel_masks,
)
from lottery_ticket_pruner.variables import read
from masked_layers.compiled import forget_functions, kept_beside

_logger = logging.getLogger(__name__)


class Trainee:
    """The model that is trained: the given one, or a smaller one in its place.

    Args:
        model: A compiled model.
        steps: Number of steps of the whole training. 0 to train the given model.
        batch_size: Number of examples per step.
        verbose: Whether to print that a smaller model is trained.

    Attributes:
        notes: Messages about how many weights are trained, or why all of them, each once.
    """

    def __init__(
        self, model: keras.Model, steps: int, batch_size: int, *, verbose: bool = False
    ) -> None:
        self._model = model
        self._steps = steps
        self._batch_size = batch_size
        self._verbose = verbose
        self.notes: list[str] = []
        self._smaller: _SmallerModel | None = None
        self._ahead = False
        self.read()

    @property
    def is_smaller(self) -> bool:
        """True if a smaller model is trained."""
        return self._smaller is not None

    @property
    def evaluator(self) -> Engine:
        """The engine of the model that is trained, for calls that do not change it."""
        return engine_of(self._model if self._smaller is None else self._smaller.model)

    def train(
        self, data: ArrayDataset, rows: np.ndarray, *args: Any, deterministic: bool, **kwargs: Any
    ) -> dict[str, Any]:
        """Trains like `Engine.train`."""
        if self._smaller is not None:
            if not self._ahead:
                # The given model has the same metrics.
                _keras.symbolic_build(self._model, data.take(rows[:1, 0]))
            # A comparison with `fit` would have to be repeated for each smaller model.
            deterministic = True
        self._ahead = True
        return self.evaluator.train(data, rows, *args, deterministic=deterministic, **kwargs)

    def write(self) -> None:
        """Writes what was trained into the given model."""
        if self._smaller is not None and self._ahead:
            self._smaller.write()
        self._ahead = False

    def read(self) -> None:
        """Continues from the state of the given model."""
        self._smaller, self._ahead = None, False
        try:
            smaller = _smaller_model(self._model, self._steps, self._batch_size)
            if smaller is None:
                return
            smaller.read()
        except NotReducibleError as error:
            self._note(f"{self._model.name} is trained with all weights: {error}.")
        else:
            self._smaller = smaller
            left, whole = (
                sum(math.prod(v.shape) for v in model.trainable_variables)
                for model in (smaller.model, self._model)
            )
            self._note(
                f"{self._model.name} is trained with {left:,} of {whole:,} weights: the others "
                "have no gradients."
            )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            _logger.info(text)
            if self._verbose and self.is_smaller:
                sys.stdout.write(f"{text}\n")


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """A variable of the given model, the one of the smaller model, and the entries that it has."""

    whole: keras.Variable
    part: keras.Variable
    index: Any = None
    slot: bool = False


class _SmallerModel:
    """A model with only the weights that a training can change.

    Args:
        model: The compiled model.
        layers: Its layers, in order.
        masks: Masks of its kernels.
        kernels: The kept weights of its Dense layers.
        products: How products of single kept weights may be computed, or None.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: list[keras.layers.Layer],
        masks: list[np.ndarray],
        kernels: list[KeptKernel],
        products: Products | None,
    ) -> None:
        self.masks = masks
        self.products = products
        self.engine = engine_of(model)
        self.optimizer = model.optimizer
        self._whole = model
        self.model = _built(model, layers, kernels, products)
        self._pairs = _pairs(model, self.model, kernels)

    def read(self) -> None:
        """Takes the values of the given model.

        Raises:
            NotReducibleError: If the optimizer is still going to change a pruned weight.
        """
        for pair in self._pairs:
            whole = read(pair.whole)
            part = whole if pair.index is None else whole[pair.index]
            if pair.slot and np.count_nonzero(whole) != np.count_nonzero(part):
                raise NotReducibleError("the optimizer has momenta of pruned weights")
            pair.part.assign(part)

    def write(self) -> None:
        """Writes its values into the given model, and those of its metrics."""
        # An error may have come before the smaller model had all metrics.
        metrics = self._whole.metrics_variables, self.model.metrics_variables
        for whole, part in zip(*metrics, strict=False):
            whole.assign(read(part))
        for pair in self._pairs:
            part = read(pair.part)
            if pair.index is None:
                pair.whole.assign(part)
            else:
                whole = read(pair.whole)
                whole[pair.index] = part
                pair.whole.assign(whole)


def _smaller_model(model: keras.Model, steps: int, batch_size: int) -> _SmallerModel | None:
    """Returns the smaller model for the present masks, or None if it saves too little.

    Raises:
        NotReducibleError: If the training needs all weights.
    """
    examples = steps * batch_size
    size = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    if size * examples <= settings.least_savings:
        return None
    if reason := why_distributed(model):
        raise NotReducibleError(reason)
    if model.run_eagerly:
        raise NotReducibleError("it is compiled with run_eagerly=True")
    layers = chain(model)
    products = products_for(model, steps)
    masks = kernel_masks(layers)
    known = kept_beside(model).get("smaller")
    if known is not None:
        same = known.engine is engine_of(model) and known.optimizer is model.optimizer
        if same and known.products is products and all(map(np.array_equal, masks, known.masks)):
            return known
    kernels = kept_kernels(layers, masks)
    saved = sum(mask.size for mask in masks) - sum(cost(kernel, products) for kernel in kernels)
    if saved * examples <= settings.least_savings:
        return None
    if known is not None:
        forget_functions(known.model)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    try:
        smaller = _SmallerModel(model, layers, masks, kernels, products)
    except NotReducibleError:
        raise
    except Exception as error:  # Layers, losses and metrics raise errors of many types.
        reason = f"a smaller model cannot be made: {type(error).__name__}: {error}"
        # All known reasons are found before, so this is a fault of this package or of Keras.
        warn_once(f"{model.name} is trained with all weights: {reason}.")
        raise NotReducibleError(reason) from error
    kept_beside(model)["smaller"] = smaller
    return smaller


@_keras.drawn_apart()
def _built(
    model: keras.Model,
    layers: list[keras.layers.Layer],
    kernels: list[KeptKernel],
    products: Products | None,
) -> keras.Model:
    """Returns the smaller model, compiled like the given one.

    Raises:
        NotReducibleError: If a Dense layer has inputs of several axes.
    """
    tensor = model.inputs[0]
    inputs = x = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name="kept")
    left = list(kernels)
    for layer in layers:
        if not dense_layers([layer]):
            x = type(layer).from_config(layer.get_config())(x)
            continue
        if len(x.shape) != 2:
            raise NotReducibleError(f"'{layer.name}' has inputs of {len(x.shape)} axes")
        kept = left.pop(0)
        if kept is kernels[0] and len(kept.inputs) < x.shape[-1]:
            x = KeptInputs(kept.inputs)(x)
        faster = products is not None and products.faster(kept)
        x = KeptDense(kept, products if faster else None)(x)
    smaller = keras.Model(inputs, x, name=model.name)
    config = model.get_compile_config()
    # The one that was passed may be a name, and its attributes may have changed since.
    config["optimizer"] = keras.saving.serialize_keras_object(model.optimizer)
    smaller.compile_from_config(config)
    if not smaller.optimizer.built:
        smaller.optimizer.build(smaller.trainable_variables)
    return smaller


def _pairs(model: keras.Model, smaller: keras.Model, kernels: list[KeptKernel]) -> list[_Pair]:
    """Returns the pairs of all variables: weights, slots, and the rest of the optimizer."""
    indices: dict[int, Any] = {}
    for kept in kernels:
        kernel, *bias = kept.layer.trainable_variables
        indices[id(kernel)] = kept.index
        indices.update({id(variable): kept.units for variable in bias})
    pairs = [
        _Pair(whole, part, indices[id(whole)])
        for whole, part in zip(model.trainable_variables, smaller.trainable_variables, strict=True)
    ]
    owners = {
        id(slot): owner
        for owner, slots in optimizers.optimizer_slots(model.optimizer).items()
        for slot in slots
    }
    for whole, part in zip(model.optimizer.variables, smaller.optimizer.variables, strict=True):
        owner = owners.get(id(whole))
        index = None if owner is None else indices[owner]
        pairs.append(_Pair(whole, part, index, slot=owner is not None))
    return pairs
