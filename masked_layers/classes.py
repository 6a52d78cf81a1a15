"""Masked classes of Keras' layers, which users can construct directly.

`classes.pyi` declares them for type checkers and editors, which cannot run `define`.
"""

from keras import layers

from masked_layers import normalization
from masked_layers.layers import define
from masked_layers.maskable import NORMALIZATIONS

MaskedDense = define(layers.Dense, __name__)
MaskedEinsumDense = define(layers.EinsumDense, __name__)
MaskedEmbedding = define(layers.Embedding, __name__)
MaskedReversibleEmbedding = define(layers.ReversibleEmbedding, __name__)
MaskedConv1D = define(layers.Conv1D, __name__)
MaskedConv2D = define(layers.Conv2D, __name__)
MaskedConv3D = define(layers.Conv3D, __name__)
MaskedConv1DTranspose = define(layers.Conv1DTranspose, __name__)
MaskedConv2DTranspose = define(layers.Conv2DTranspose, __name__)
MaskedConv3DTranspose = define(layers.Conv3DTranspose, __name__)
MaskedDepthwiseConv1D = define(layers.DepthwiseConv1D, __name__)
MaskedDepthwiseConv2D = define(layers.DepthwiseConv2D, __name__)
MaskedSeparableConv1D = define(layers.SeparableConv1D, __name__)
MaskedSeparableConv2D = define(layers.SeparableConv2D, __name__)
MaskedSimpleRNNCell = define(layers.SimpleRNNCell, __name__)
MaskedLSTMCell = define(layers.LSTMCell, __name__)
MaskedGRUCell = define(layers.GRUCell, __name__)
MaskedSimpleRNN = define(layers.SimpleRNN, __name__)
MaskedLSTM = define(layers.LSTM, __name__)
MaskedGRU = define(layers.GRU, __name__)
MaskedConvLSTM1D = define(layers.ConvLSTM1D, __name__)
MaskedConvLSTM2D = define(layers.ConvLSTM2D, __name__)
MaskedConvLSTM3D = define(layers.ConvLSTM3D, __name__)
MaskedMultiHeadAttention = define(layers.MultiHeadAttention, __name__)
MaskedGroupedQueryAttention = define(layers.GroupQueryAttention, __name__)
MaskedTimeDistributed = define(layers.TimeDistributed, __name__)
MaskedBidirectional = define(layers.Bidirectional, __name__)

_NORMALIZATION = {
    cls: define(cls, __name__, normalization.ABOUT, call=normalization.masked_call(cls))
    for cls in NORMALIZATIONS
}
MaskedLayerNormalization = _NORMALIZATION[layers.LayerNormalization]
MaskedRMSNormalization = _NORMALIZATION[layers.RMSNormalization]
MaskedGroupNormalization = _NORMALIZATION[layers.GroupNormalization]
