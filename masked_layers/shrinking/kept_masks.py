"""Masks of the weights that are left, on a smaller model."""

from __future__ import annotations

import keras
import numpy as np

from masked_layers.inspection import get_masks, masked_refs, set_masks, weight_refs
from masked_layers.layers import mask_weights
from masked_layers.maskable import raw_variable, weights_inside
from masked_layers.shrinking.compilation import Copied


def check_masks(model: keras.Model) -> None:
    """Raises an error if masks of a model do more than leave weights out.

    Raises:
        ValueError: If it has none, pruned weights are frozen at other values than zero, or weights
            are rescaled or quantized.
    """
    if not any(ref.mask is not None for ref in weight_refs(model)):
        raise ValueError(f"`keep_masks=True` needs a masked model. '{model.name}' has no masks.")
    for ref in masked_refs(model):
        mask = ref.mask
        more = {
            "frozen pruned weights": mask.frozen is not None,
            "rescaled weights": mask.rescale,
            # The scale of a channel would change with the largest weight that is removed.
            "quantized weights": mask.quantization is not None,
        }
        if what := next((name for name, found in more.items() if found), None):
            raise ValueError(
                f"`keep_masks=True` needs masks whose pruned weights are 0 and whose kept weights "
                f"are as they are. Received a model with {what}: '{ref.path}'. Leave `keep_masks` "
                "out; the values of the smaller model are then what they are in the forward pass."
            )


def carry_masks(
    masked: keras.Model, plain: keras.Model, smaller: keras.Model, copied: Copied
) -> None:
    """Masks the weights of a smaller model as those that they are left of.

    Args:
        masked: The original model.
        plain: Its copy without masks that the smaller one was made from.
        smaller: The smaller model, which is changed in place.
        copied: The variables of `plain` that were copied.
    """
    originals = _variables(plain)
    paths = {id(variable): path for path, variable in _variables(smaller).items()}
    masks = {}
    for path, mask in get_masks(masked).items():
        variable = copied.variables.get(id(originals.get(path)))
        if variable is None or id(variable) not in paths:
            continue  # A normalization, which leaves out none of the channels that are left.
        for axis, left in copied.cuts.get(id(variable), {}).items():
            mask = np.compress(left, mask, axis)
        masks[paths[id(variable)]] = mask
    mask_weights(smaller, masks)
    set_masks(smaller, masks)


def _variables(model: keras.Model) -> dict[str, keras.Variable]:
    found = {}
    for path, layer, name in weights_inside(model, biases=True):
        variable = raw_variable(layer, name)
        if variable is not None:
            found[path] = variable
    return found
