"""Checks of conversions, and small models for them."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from common import half_masks, numpy


def names(model):
    # Sequential creates its input layer itself.
    kinds = (ml.Mask, layers.InputLayer)
    return [layer.name for layer in model._flatten_layers() if not isinstance(layer, kinds)]


def assert_equal_outputs(a, b, inputs):
    for x, y in zip(keras.tree.flatten(a(inputs)), keras.tree.flatten(b(inputs)), strict=True):
        assert np.std(numpy(x)) > 0  # Equality of constant outputs would prove nothing.
        np.testing.assert_array_equal(numpy(x), numpy(y))


def assert_round_trips(plain, inputs, tmp_path, custom_objects=None):
    """Converts, masks, saves, loads and strips: equal outputs at each step, original unchanged."""
    before = plain.get_weights()
    masked = ml.convert_to_masked(plain)
    assert isinstance(masked, type(plain))
    assert masked.name == plain.name
    assert [w.name for w in masked.weights] == [w.name for w in plain.weights]
    assert names(masked) == names(plain)
    assert_equal_outputs(plain, masked, inputs)
    half_masks(masked)
    masked.save(tmp_path / "masked.keras")
    loaded = keras.models.load_model(tmp_path / "masked.keras", custom_objects=custom_objects)
    assert_equal_outputs(masked, loaded, inputs)
    for path, mask in ml.get_masks(masked).items():
        np.testing.assert_array_equal(mask, ml.get_masks(loaded)[path])
    for a, b in zip(masked.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    stripped = ml.strip_masks(loaded)
    assert type(stripped) is type(plain)
    assert_equal_outputs(masked, stripped, inputs)
    with pytest.raises(ValueError, match="convert_to_masked"):
        ml.get_masks(stripped)
    for a, b in zip(before, plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in plain._flatten_layers())
    return masked


def three_layers():
    return keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=n) for n in ("in_proj", "middle", "out_proj"))]
    )
