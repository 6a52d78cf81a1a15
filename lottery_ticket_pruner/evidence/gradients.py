"""Gradients of the loss with respect to effective weights, including pruned entries.

Masks stop the gradient of pruned entries. Here, the effective weights themselves are the variables
of the loss: masked layers read them instead of `mask(raw weight)`. A pruned entry is then a zero
like any other, and has the gradient that it would have if it were kept.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import masked_layers as ml
from lottery_ticket_pruner import _keras, targets
from lottery_ticket_pruner.evidence.differentiation import (
    draws_kept,
    gradient,
    twice_differentiable,
)
from lottery_ticket_pruner.overrides import attribute_replaced
from lottery_ticket_pruner.training import ArrayDataset, Arrays, map_arrays
from masked_layers import WeightRef
from masked_layers.compiled import kept_beside
from masked_layers.masks import raw_view
from masked_layers.types import Tensor

_TEMPERATURE = 200.0
# Names of functions and classes.
_SOFTMAX = (
    "categoricalcrossentropy",
    "sparsecategoricalcrossentropy",
    "categoricalfocalcrossentropy",
)
_SIGMOID = ("binarycrossentropy", "binaryfocalcrossentropy")


def loss_gradients(
    model: keras.Model,
    x: Arrays,
    y: Arrays,
    *,
    sample_weight: Arrays | None = None,
    batch_size: int = 256,
) -> dict[str, np.ndarray]:
    """Returns the dense gradient of the loss with respect to the effective masked weights.

    The loss is what `fit` minimizes on the data: the compiled loss and terms that layers add with
    `add_loss`. Penalties on weights (such as `kernel_regularizer`) are excluded, because they do
    not depend on the data.

    The model runs in training mode, like the training steps that the gradient should predict: batch
    normalization uses the statistics of each batch (the moving statistics of a new model are not
    meaningful yet), and dropout draws from the seeds that `fit` would use next. Layers compute in
    the precision of their weights, even under mixed policies, because small gradients are zero in
    float16.

    The result is the mean over the batches, weighted by their size. It equals the gradient over all
    examples at once, for any batch size, if the examples of a batch are independent (unlike in
    batch normalization) and the loss is a mean over them, as Keras losses are by default.

    The model is left unchanged: weights, masks, statistics, seeds, optimizer and metrics. A second
    call with batches of the same shape reuses the compiled function.

    Args:
        model: A compiled model, masked or plain.
        x: Inputs with examples along the first axis: an array, or a list or dict of arrays.
        y: Targets, in one of the same forms.
        sample_weight: One weight per example, or None.
        batch_size: Number of examples per forward pass, which limits the required memory.

    Returns:
        A dict from the path of each masked weight (in a plain model, each maskable weight) to an
        array of the shape of the weight, float64 for float64 weights and otherwise float32.

    Raises:
        ValueError: If the model is not compiled or has nothing to prune, there are no examples, or
            the targets do not fit the loss.
    """
    with targets.explained(model, x, y):
        loss, data = _prepare(model, x, y, sample_weight)
        return loss.named(loss.gradients(data, batch_size))


def hessian_gradients(
    model: keras.Model,
    x: Arrays,
    y: Arrays,
    *,
    sample_weight: Arrays | None = None,
    batch_size: int = 256,
) -> dict[str, np.ndarray]:
    """Returns the product of the Hessian and the gradient of the loss, for the score of GraSP.

    Both derivatives are taken with respect to all effective weights together, so this is half the
    gradient of the squared norm of the gradient. The loss is that of `loss_gradients` with logits
    divided by 200, as in the paper. This applies to the logits that a loss takes
    (`from_logits=True`) or to those that correspond to the probabilities it takes, for the
    categorical and binary cross-entropies of Keras. Other losses are not changed. Gradient and
    Hessian are means over all examples, from two passes over the data with the same noise. Values
    that layers exclude by `stop_gradient` (the corrections of `BatchNormalization(renorm=True)`,
    the directions of `SpectralNormalization`) are treated as constants. Arguments and result are
    the same as in `loss_gradients`.

    Raises:
        ValueError: If `loss_gradients` would raise an error, or an operation of the model has no
            second derivative on this backend. The message names the operation.

    Reference:
        - [Wang et al., arXiv 2002.07376](https://arxiv.org/abs/2002.07376), section 4
    """
    try:
        with targets.explained(model, x, y):
            loss, data = _prepare(model, x, y, sample_weight)
            return loss.named(loss.hessian_gradients(data, batch_size))
    except (LookupError, RuntimeError) as error:
        # "gradient registry has no entry for" on TensorFlow; "derivative for ... is not
        # implemented", "differentiate twice" and "Double backwards is not supported" on torch.
        if not re.search("gradient registry|derivative|differentiate|backward", str(error)):
            raise
        raise ValueError(
            f"The model {model.name!r} has an operation that cannot be differentiated twice on "
            f"{keras.backend.backend()}: {error}. Products with the Hessian, by which GraSP ranks, "
            "require this. Use another layer or backend, or a criterion of first derivatives "
            'such as "snip".'
        ) from error


class _Loss:
    """The loss of a model as a pure function of its effective weights, and its derivatives.

    Obtained from `_loss_of`, which caches it because it holds the compiled functions.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.refs = prunable_refs(model)
        self.signature = _signature(model)
        self._seeds = _keras.seed_variables(model)
        self._others: list[keras.Variable] = []
        if keras.backend.backend() == "jax":
            # On JAX, a compiled function treats variables that are not arguments as constants.
            own = {id(variable) for variable in [ref.variable for ref in self.refs] + self._seeds}
            everything = [*model.variables, *model.metrics_variables]
            self._others = [variable for variable in everything if id(variable) not in own]
        self._gradient = compiled(model, functools.partial(self._trace_gradient, 1.0))
        self._cool_gradient = compiled(model, functools.partial(self._trace_gradient, _TEMPERATURE))
        self._cool_product = compiled(model, self._trace_product)

    def gradients(self, data: ArrayDataset, batch_size: int) -> list[np.ndarray]:
        """Returns the mean gradient over all examples."""
        return self._mean(self._gradient, data, batch_size)

    def hessian_gradients(self, data: ArrayDataset, batch_size: int) -> list[np.ndarray]:
        """Returns the mean Hessian times the mean gradient, both with divided logits."""
        direction = [
            ops.convert_to_tensor(array, dtype=ref.variable.dtype)
            for ref, array in zip(
                self.refs, self._mean(self._cool_gradient, data, batch_size), strict=True
            )
        ]
        return self._mean(functools.partial(self._cool_product, direction), data, batch_size)

    def named(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays by path, in the precision of the weights but at least float32."""
        return {
            ref.path: array.astype(
                "float64" if ref.variable.dtype == "float64" else "float32", copy=False
            )
            for ref, array in zip(self.refs, arrays, strict=True)
        }

    def _mean(
        self, function: Callable[..., Any], data: ArrayDataset, batch_size: int
    ) -> list[np.ndarray]:
        """Returns the mean of `function` over all batches, in float64.

        Every pass draws the same noise, that of the next training step.
        """
        with draws_kept():
            return self._summed(function, data, batch_size)

    def _summed(
        self, function: Callable[..., Any], data: ArrayDataset, batch_size: int
    ) -> list[np.ndarray]:
        weights = [effective_value(ref) for ref in self.refs]
        others = [variable.value for variable in self._others]
        seeds = [ops.copy(variable.value) for variable in self._seeds]
        totals = [np.zeros(ref.variable.shape, "float64") for ref in self.refs]
        for start in range(0, len(data), batch_size):
            batch = data.take(slice(start, start + batch_size))
            share = min(batch_size, len(data) - start) / len(data)
            batch = map_arrays(ops.convert_to_tensor, batch)
            arrays, seeds = function(weights, seeds, others, batch)
            for total, array in zip(totals, arrays, strict=True):
                total += share * ops.convert_to_numpy(array).astype("float64")
        return totals

    def _trace_gradient(
        self,
        temperature: float,
        weights: list[Tensor],
        seeds: list[Tensor],
        others: list[Tensor],
        batch: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        return gradient(functools.partial(self._value, temperature, seeds, others, batch), weights)

    def _trace_product(
        self,
        direction: list[Tensor],
        weights: list[Tensor],
        seeds: list[Tensor],
        others: list[Tensor],
        batch: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        value = functools.partial(self._value, _TEMPERATURE, seeds, others, batch)

        def along(weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            slopes, seeds = gradient(value, weights)
            return sum(ops.sum(a * b) for a, b in zip(slopes, direction, strict=True)), seeds

        with twice_differentiable(self.model):
            return gradient(along, weights)

    def _value(
        self,
        temperature: float,
        seeds: list[Tensor],
        others: list[Tensor],
        batch: Any,
        weights: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss on a batch at these effective weights, and the seeds after it."""
        kernels = [ref.variable for ref in self.refs]
        state = zip(
            [*kernels, *self._seeds, *self._others], [*weights, *seeds, *others], strict=True
        )
        scope = keras.StatelessScope(list(state), collect_losses=True)
        with raw_view(), _without_penalties(self.model), _in_full_precision(self.model), scope:
            adjust = functools.partial(_cooled, self.model, temperature)
            value = _keras.training_loss(self.model, batch, adjust)
            return value, [scope.get_current_value(seed) for seed in self._seeds]


def prunable_refs(model: keras.Model) -> list[WeightRef]:
    """Returns the masked weights of a model, or all maskable weights of a plain model.

    Raises:
        ValueError: If there are no such weights.
    """
    refs = ml.weight_refs(model)
    refs = [ref for ref in refs if ref.mask is not None] or refs
    if not refs:
        raise ValueError(f"The model {model.name!r} has no prunable weight.")
    return refs


def effective_value(ref: WeightRef) -> Tensor:
    """Returns the raw value with which a layer without its mask reads its effective weight."""
    effective = ops.convert_to_tensor(getattr(ref.layer, ref.name))
    with raw_view():
        unmasked = getattr(ref.layer, ref.name)
    if unmasked is ref.variable:
        return effective
    # Low-rank factors (LoRA) are added to the raw weight before the mask.
    return effective - (unmasked - ref.variable.value)


def _prepare(
    model: keras.Model, x: Arrays, y: Arrays, sample_weight: Arrays | None
) -> tuple[_Loss, ArrayDataset]:
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"The model {model.name!r} is not compiled, so it has no loss to differentiate. Call "
            "`model.compile(loss=...)` first."
        )
    data = ArrayDataset.of(x, y, sample_weight)
    ml.sync(model)
    _keras.build_loss(model, data.take(slice(0, 1)))
    return _loss_of(model), data


def _loss_of(model: keras.Model) -> _Loss:
    """Returns the cached loss of a compiled model, or a new one if its graph has changed."""
    kept = kept_beside(model)
    loss = kept.get("loss")
    if loss is None or not _same(loss.signature, _signature(model)):
        loss = kept["loss"] = _Loss(model)
    return loss


def _signature(model: keras.Model) -> list[Any]:
    """Returns the objects that compiled functions depend on. The list keeps them alive."""
    trainable = [layer.trainable for layer in _keras.flatten(model)]
    variables = [*model.variables, *model.metrics_variables]
    return [*_keras.compile_arguments(model), *variables, *trainable]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def compiled(model: keras.Model, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function, unless the backend or the model excludes it."""
    if not model.run_eagerly and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        program = tf.function(function, autograph=False, reduce_retracing=True)
        # TensorFlow tells functions apart by their code. If they were called without this method,
        # it would warn of retracing when several models are measured, though each is traced once.
        return lambda *args: program.get_concrete_function(*args)(*args)
    if not model.run_eagerly and model.jit_compile and keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


def _cooled(model: keras.Model, temperature: float, y_pred: Any) -> Any:
    """Returns outputs with divided logits, where the loss is a cross-entropy."""
    if temperature == 1.0:
        return y_pred
    outputs, losses = keras.tree.flatten(y_pred), targets.losses_of(model, y_pred)
    cooled = [_cool(*pair, temperature) for pair in zip(losses, outputs, strict=True)]
    return keras.tree.pack_sequence_as(y_pred, cooled)


def _cool(loss: Any, output: Tensor, temperature: float) -> Tensor:
    loss, name = keras.losses.get(loss), targets.name_of(loss)
    if name not in (*_SOFTMAX, *_SIGMOID):
        return output
    if getattr(loss, "from_logits", False):
        return output / temperature
    output = ops.clip(output, keras.config.epsilon(), 1 - keras.config.epsilon())
    if name in _SOFTMAX:
        return ops.softmax(ops.log(output) / temperature, axis=getattr(loss, "axis", -1))
    return ops.sigmoid((ops.log(output) - ops.log1p(-output)) / temperature)


def _without_penalties(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Temporarily removes the weight regularizers from the loss."""
    regularized = [v for v in model.trainable_variables if v.regularizer is not None]
    return attribute_replaced("regularizer", [(variable, None) for variable in regularized])


def _in_full_precision(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Temporarily lets the layers of a model compute in the precision of their weights.

    In float16 small gradients vanish, and with divided logits nearly all of them are small.
    """
    policies = [(layer, layer.dtype_policy) for layer in _keras.flatten(model)]
    mixed = [(layer, p) for layer, p in policies if p.name in ("mixed_float16", "mixed_bfloat16")]
    full = [(layer, policy.variable_dtype) for layer, policy in mixed]
    return attribute_replaced("dtype_policy", full)
