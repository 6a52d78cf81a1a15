"""Pictures of tickets, against counts by hand."""

import keras
import numpy as np
import pytest

pytest.importorskip("matplotlib")

import masked_layers as ml
from lottery_ticket_pruner.experiments.reports import portraits

pytestmark = pytest.mark.once


def test_pixels_are_counted_by_the_units_that_read_them():
    model = keras.Sequential(
        [keras.Input((2, 3, 2)), keras.layers.Flatten(), keras.layers.Dense(4, name="first")]
    )
    masked = ml.convert_to_masked(model)
    mask = np.zeros((12, 4), bool)
    mask[0, 0] = mask[1, 0] = True  # Both channels of the first pixel, by one unit.
    mask[11, 1] = mask[10, 2] = True  # The channels of the last pixel, by two.
    ml.set_masks(masked, {"first/kernel": mask})
    portrait = portraits.portrait_of(masked, ml.get_masks(masked))
    assert portrait.readers.tolist() == [[1, 0, 0], [0, 0, 2]]
    caption = portraits.describe_pixels(portrait)
    assert "(4 of 6 pixels)" in caption
    assert "by 2 of the 4 units" in caption
    assert portrait.kernels is None
    (image,) = portraits.pixels_figure(portrait).axes[0].images
    assert (image.get_array()[..., 3] > 0).tolist() == (portrait.readers > 0).tolist()


def test_kernels_are_empty_where_all_their_weights_are_pruned():
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), keras.layers.Conv2D(3, 2, name="conv"), keras.layers.Flatten(),
         keras.layers.Dense(60, name="out")]
    )  # fmt: skip
    masked = ml.convert_to_masked(model)
    mask = np.ones((2, 2, 2, 3), bool)
    mask[0, 0, :, 1] = False
    mask[1, 1, 0, 2] = False
    ml.set_masks(masked, {"conv/kernel": mask})
    portrait = portraits.portrait_of(masked, ml.get_masks(masked))
    kernel = model.get_layer("conv").kernel.numpy()
    assert np.isnan(portrait.kernels).sum() == 1
    assert np.isnan(portrait.kernels[1, 0, 0])
    assert portrait.kernels[2, 1, 1] == pytest.approx(kernel[1, 1, 1, 2])
    assert portrait.kernels[0, 0, 1] == pytest.approx(kernel[0, 1, :, 0].sum(), abs=1e-6)
    assert portrait.readers is None
    assert portrait.masks["out/kernel"].shape == (48, 48)
    assert portrait.masks["conv/kernel"].tolist() == mask.reshape(8, 3).astype(float).tolist()
    assert portraits.kernels_figure(portrait).axes[0].images
