"""Removes the channels that pruning has emptied: a smaller plain model with the same outputs."""

from masked_layers.shrinking.dead_ends import effective_masks, effective_sparsity
from masked_layers.shrinking.families import ChannelFamilies, ChannelFamily, channel_families
from masked_layers.shrinking.layer_latency import LatencyRow, LatencyTable, latency_table
from masked_layers.shrinking.smaller_model import ShrinkReport, ShrinkRow, shrink
from masked_layers.shrinking.timing import Compiled, Timing, compare, unpruned

__all__ = [
    "ChannelFamilies",
    "ChannelFamily",
    "Compiled",
    "LatencyRow",
    "LatencyTable",
    "ShrinkReport",
    "ShrinkRow",
    "Timing",
    "channel_families",
    "compare",
    "effective_masks",
    "effective_sparsity",
    "latency_table",
    "shrink",
    "unpruned",
]
