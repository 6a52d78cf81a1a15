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
