"""Rules for layers of KerasHub. They are registered by name, so it need not be installed."""

from __future__ import annotations

import numpy as np

from masked_layers.shrinking.channels import VARIES, Call, Channels, Edit, Flow
from masked_layers.shrinking.rules import foreign_rule


@foreign_rule("keras_hub.PositionEmbedding")
def _position_embedding(flow: Flow, call: Call) -> Channels:
    # It reads only the shape of its input, and makes as many channels as the input has.
    source = flow.channels(call, -1)
    flow.edit(call, Edit({"position_embeddings": {1: source}}))
    return source.with_constants(np.full(len(source.slots), VARIES))


@foreign_rule("keras_hub.ViTPatchingAndEmbedding")
def _patches(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    source = flow.channels(call, 1 if layer.data_format == "channels_first" else -1)
    flow.pin(source, f"'{flow.names[id(layer)]}' reads it")
    target = Channels(2, flow.new_slots(layer.hidden_dim), np.full(layer.hidden_dim, VARIES))
    weights = {
        "patch_embedding.kernel": {3: target},
        "patch_embedding.bias": {0: target},
        "position_embedding.embeddings": {1: target},
    }
    if layer.use_class_token:
        weights["class_token"] = {2: target}
    edit = Edit(weights, target, widths={("hidden_dim",): target}, positions=layer.num_patches)
    flow.edit(call, edit)
    return target
