"""Objects of another kind than a model or a pruner are named."""

import keras
import pytest

import lottery_ticket_pruner as ltp
import masked_layers as ml

pytestmark = pytest.mark.once


def test_they_are_named():
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`\. Received: 'model'"):
        ltp.LotteryTicketPruner("model")
    with pytest.raises(TypeError, match=r"Expected a `LotteryTicketPruner`\. Received: 'pruner'"):
        ltp.PrunerCallback("pruner")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    for models in ((model, "smaller"), ("model", model)):
        with pytest.raises(TypeError, match=r"Expected a `keras\.Model`\. Received: '"):
            ml.latency_table(*models)
