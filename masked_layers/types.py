"""Type aliases that Keras does not provide."""

from typing import TYPE_CHECKING, Any, TypeAlias

import keras

Tensor: TypeAlias = Any
"""A tensor of the backend, or a variable."""

if TYPE_CHECKING:
    LayerMixin: TypeAlias = keras.layers.Layer
else:
    LayerMixin = object
"""Base of mixin classes, whose subclasses also derive from a Keras layer."""
