"""Derivatives of functions of tensors, on every backend, and what second ones take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from lottery_ticket_pruner import _keras

Tensor = Any


def gradient(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]], tensors: list[Tensor]
) -> tuple[list[Tensor], Any]:
    """The gradient of a scalar function, on any backend; also inside such a function.

    Args:
        function: Gives the scalar and anything else that is to be handed on.
        tensors: Where to differentiate. Those that the function does not use have gradient 0.

    Returns:
        The gradients, one per tensor, and what the function gave beside the scalar.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            value, rest = function(tensors)
        gradients = tape.gradient(value, tensors, unconnected_gradients="zero")
        # The gradient of a look-up comes as indices and values.
        return [tf.convert_to_tensor(gradient) for gradient in gradients], rest
    if backend == "jax":
        import jax

        return jax.grad(function, has_aux=True)(tensors)
    if backend == "torch":
        import torch

        inner = any(tensor.requires_grad for tensor in tensors)
        if not inner:
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        # The fast kernels of attention have no second derivative.
        kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.enable_grad(), kernels if inner else contextlib.nullcontext():
            value, rest = function(tensors)
            gradients = torch.autograd.grad(
                value, tensors, create_graph=inner, materialize_grads=True
            )
        return list(gradients), rest
    raise NotImplementedError(f"There are no gradients on the backend {backend!r}.")


@contextlib.contextmanager
def twice_differentiable(model: keras.Model) -> Iterator[None]:
    """Lets second derivatives of a model's forward pass be taken, and be right.

    On TensorFlow, `tf.nn.moments`, which Keras' normalizations and `keras.ops.moments` call, stops
    the gradient at the mean from which it takes the variance. The first derivative by that mean is
    zero, but the derivative of that derivative is not. And `tf.nn.softsign` has a kernel for its
    gradient that has none itself, and so have the methods of `tf.image.resize`, but for the
    bilinear one: its gradient counts as a constant, without a word. On torch `hardsigmoid` and
    recurrent layers in cuDNN have none. No option says otherwise: all are replaced meanwhile.
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
def _replaced(module: Any, name: str, function: Callable) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def _moments(
    x: Tensor, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None
) -> tuple[Tensor, Tensor]:
    """Does what `tf.nn.moments` does, with all derivatives."""
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    wide = tf.cast(x, "float32") if x.dtype == "float16" else x
    mean = tf.reduce_mean(wide, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(wide, mean), axes, keepdims=keepdims)
    mean = mean if keepdims else tf.squeeze(mean, axes)
    return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _softsign(features: Tensor, name: str | None = None) -> Tensor:
    """Does what `tf.nn.softsign` does, with all derivatives."""
    import tensorflow as tf

    features = tf.convert_to_tensor(features)
    return features / (1 + tf.abs(features))


def _resize(resize: Callable, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Does what `tf.image.resize` does, with all derivatives: it is linear in the images."""
    import tensorflow as tf

    @tf.custom_gradient
    def resized(images: Tensor) -> tuple[Tensor, Callable]:
        def backward(slopes: Tensor) -> Tensor:
            @tf.custom_gradient
            def transposed(slopes: Tensor) -> tuple[Tensor, Callable]:
                with tf.GradientTape() as tape:
                    tape.watch(images)
                    outputs = resize(images, *args, **kwargs)
                return tape.gradient(outputs, images, slopes), resized

            return transposed(slopes)

        return resize(images, *args, **kwargs), backward

    return resized(tf.convert_to_tensor(images))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 (torch's name)
    """Does what `torch.nn.functional.hardsigmoid` does, with all derivatives."""
    return (input + 3).clamp(0, 6) / 6


def draws_kept() -> contextlib.AbstractContextManager[None]:
    """Gives torch's own random generators their state back at the end; others have none.

    Keras' `Dropout` draws from them on torch where it has no seed, and not from its seed generator.
    """
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)
