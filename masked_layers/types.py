"""Names for types that Keras lacks."""

from typing import TYPE_CHECKING, Any, TypeAlias

import keras

Tensor: TypeAlias = Any
"""A tensor of the backend, or a variable in its place."""

if TYPE_CHECKING:
    LayerMixin: TypeAlias = keras.layers.Layer
else:
    LayerMixin = object
"""The base of a class whose subclasses have a Keras layer as another base."""
