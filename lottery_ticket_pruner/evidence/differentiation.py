"""First and second derivatives of functions of tensors, on every backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from lottery_ticket_pruner import _keras
from masked_layers.types import Tensor


def gradient(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]], tensors: list[Tensor]
) -> tuple[list[Tensor], Any]:
    """Computes the gradient of a scalar function on any backend. May be nested.

    Args:
        function: A function of the tensors that returns the scalar and an auxiliary output.
        tensors: Point of the gradient. Tensors that the function does not use have gradient 0.

    Returns:
        The gradients, one per tensor, and the auxiliary output.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            value, rest = function(tensors)
        gradients = tape.gradient(value, tensors, unconnected_gradients="zero")
        # The gradient of a look-up consists of indices and values.
        return [tf.convert_to_tensor(gradient) for gradient in gradients], rest
    if backend == "jax":
        import jax

        return jax.grad(function, has_aux=True)(tensors)
    if backend == "torch":
        import torch

        inner = any(tensor.requires_grad for tensor in tensors)
        if not inner:
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        # The fast attention kernels have no second derivative.
        kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.enable_grad(), kernels if inner else contextlib.nullcontext():
            value, rest = function(tensors)
            gradients = torch.autograd.grad(
                value, tensors, create_graph=inner, materialize_grads=True
            )
        return list(gradients), rest
    raise NotImplementedError(f"Gradients are not implemented on the backend {backend!r}.")


@contextlib.contextmanager
def twice_differentiable(model: keras.Model) -> Iterator[None]:
    """Temporarily replaces functions whose second derivatives are missing or wrong.

    On TensorFlow, `tf.nn.moments` (used by the normalizations of Keras and by `keras.ops.moments`)
    stops the gradient at the mean when it computes the variance. The first derivative with respect
    to this mean is zero, but the second is not. The gradients of `tf.nn.softsign` and of
    `tf.image.resize`, except for the bilinear method, are kernels without a gradient of their own
    and silently count as constants. On torch, `hardsigmoid` and recurrent layers in cuDNN have no
    second derivative. None of this can be changed by an option.
    """
    backend = keras.backend.backend()
    with contextlib.ExitStack() as stack:
        if backend == "tensorflow":
            import tensorflow as tf

            stack.enter_context(_replaced(tf.nn, "moments", _moments))
            stack.enter_context(_replaced(tf.nn, "softsign", _softsign))
            resize = functools.partial(_resize, tf.image.resize)
            stack.enter_context(_replaced(tf.image, "resize", resize))
        if backend == "torch":
            import torch

            stack.enter_context(_replaced(torch.nn.functional, "hardsigmoid", _hardsigmoid))
            if any(isinstance(layer, keras.layers.RNN) for layer in _keras.flatten(model)):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def _moments(
    x: Tensor, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `tf.nn.moments` with all derivatives."""
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    wide = tf.cast(x, "float32") if x.dtype == "float16" else x
    mean = tf.reduce_mean(wide, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(wide, mean), axes, keepdims=keepdims)
    mean = mean if keepdims else tf.squeeze(mean, axes)
    return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _softsign(features: Tensor, name: str | None = None) -> Tensor:
    """Computes `tf.nn.softsign` with all derivatives."""
    import tensorflow as tf

    features = tf.convert_to_tensor(features)
    return features / (1 + tf.abs(features))


def _resize(resize: Callable[..., Tensor], images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Computes `tf.image.resize`, which is linear in the images, with all derivatives."""
    import tensorflow as tf

    @tf.custom_gradient
    def resized(images: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        def backward(slopes: Tensor) -> Tensor:
            @tf.custom_gradient
            def transposed(slopes: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
                with tf.GradientTape() as tape:
                    tape.watch(images)
                    outputs = resize(images, *args, **kwargs)
                return tape.gradient(outputs, images, slopes), resized

            return transposed(slopes)

        return resize(images, *args, **kwargs), backward

    return resized(tf.convert_to_tensor(images))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 (torch's name)
    """Computes `torch.nn.functional.hardsigmoid` with all derivatives."""
    return (input + 3).clamp(0, 6) / 6


def draws_kept() -> contextlib.AbstractContextManager[None]:
    """Restores the state of torch's random generators on exit. No effect on other backends.

    On torch, `Dropout` without a seed draws from these instead of its seed generator.
    """
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)
