"""Removes the channels that pruning has emptied: a smaller plain model with the same outputs."""

from masked_layers.shrinking.dead_ends import effective_masks, effective_sparsity
from masked_layers.shrinking.families import ChannelFamilies, ChannelFamily, channel_families
from masked_layers.shrinking.smaller_model import ShrinkReport, ShrinkRow, shrink

__all__ = [
    "ChannelFamilies",
    "ChannelFamily",
    "ShrinkReport",
    "ShrinkRow",
    "channel_families",
    "effective_masks",
    "effective_sparsity",
    "shrink",
]
