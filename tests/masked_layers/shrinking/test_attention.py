"""Attention: its heads and widths are followed, pruned and removed."""

import keras
import numpy as np
import pytest
from keras import layers

from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.structures import Channels
from masked_layers import channel_families, convert_to_masked, shrink
from shrunk import assert_same_outputs, checked, numpy, randomize, row

# The graph of layers is the same on every backend; other files shrink models on JAX, too.
pytestmark = [pytest.mark.usefixtures("nothing_drawn"), pytest.mark.slow("jax")]


def self_attention(value_dim=2, dropout=0.5, use_gate=False, **kwargs):
    # With dropout, Keras computes attention in steps. JAX has no other way for these two widths.
    x = keras.Input((6, 5))
    y = layers.Dense(8, name="stream")(x)
    attention = layers.MultiHeadAttention(
        4, 6, value_dim, dropout=dropout, use_gate=use_gate, name="mha"
    )
    y = layers.add([y, attention(y, y, **kwargs)])
    return keras.Model(x, layers.Dense(3, name="out")(y[:, 0]))


def cross_attention():
    queries, values = keras.Input((4, 5)), keras.Input((7, 3))
    q = layers.Dense(8, "relu", name="queries")(queries)
    v = layers.Dense(6, "tanh", name="values")(values)
    k = layers.Dense(10, "tanh", name="keys")(values)
    mask = keras.ops.ones((1, 4, 7), "bool")
    attention = layers.MultiHeadAttention(2, 4, output_shape=10, use_bias=False, name="mha")
    y = attention(q, v, key=k, attention_mask=mask)
    return keras.Model([queries, values], layers.Dense(3, name="out")(layers.Flatten()(y)))


def grouped_query(use_gate=False):
    x = keras.Input((6, 5))
    y = layers.Dense(8, name="stream")(x)
    attention = layers.GroupQueryAttention(4, 6, 2, use_gate=use_gate, name="gqa")
    y += attention(y, y, use_causal_mask=True)
    return keras.Model(x, layers.Dense(3, name="out")(layers.GlobalAveragePooling1D()(y)))


MODELS = {
    "self": self_attention,
    "causal": lambda: self_attention(6, 0.0, use_causal_mask=True),
    "cross": cross_attention,
    "grouped query": grouped_query,
    "gated": lambda: self_attention(use_gate=True),
    "gated query": lambda: grouped_query(use_gate=True),
}


@pytest.mark.once
@pytest.mark.parametrize("attention", ["widths", "heads", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_channels_is_removed(name, attention):
    model = randomize(MODELS[name]())
    masked = convert_to_masked(model)
    structure = Channels(attention=attention)
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure=structure)
    smaller, report = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert report.not_followed == {}
    assert report.weights_after == smaller.count_params()
    for line in report:
        inner = line.layer.partition(" ")[2]
        pruned = line.layer != "out" and (not inner or structure.takes(inner))
        assert line.after == line.before // 2 if pruned else line.before, line


def test_sizes_of_the_smaller_layers():
    masked = convert_to_masked(randomize(self_attention()))
    LotteryTicketPruner(masked).update_masks(
        "smallest_weights", sparsity=0.5, structure=Channels(attention="both")
    )
    attention = shrink(masked).get_layer("mha")
    assert type(attention) is layers.MultiHeadAttention
    assert (attention.num_heads, attention.key_dim, attention.value_dim) == (2, 3, 1)
    assert attention.query_dense.kernel.shape == (4, 2, 3)
    assert attention.output_dense.kernel.shape == (2, 1, 4)


@pytest.mark.once
def test_families_of_a_grouped_query_attention():
    families = channel_families(grouped_query()).families
    found = {(family.kind, family.size): family for family in families}
    assert set(found) == {("", 8), ("heads", 2), ("head_dim", 4)}
    # A head of keys has three of queries.
    heads = found["heads", 2].weights
    np.testing.assert_array_equal(heads["gqa/_query_dense/kernel"][1], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(heads["gqa/_output_dense/kernel"][0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(heads["gqa/_value_dense/kernel"][1], [0, 1])
    width = found["head_dim", 4].weights
    assert {path.split("/")[1]: list(axes) for path, axes in width.items()} == {
        "_query_dense": [2],
        "_key_dense": [2],
        "_value_dense": [2],
        "_output_dense": [1],
    }


@pytest.mark.once
@pytest.mark.parametrize("name", MODELS)
def test_outputs_do_not_depend_on_what_a_removed_channel_has_left(name):
    """Whatever the biases of pruned channels are trained to, nothing reads them."""
    masked = convert_to_masked(randomize(MODELS[name]()))
    LotteryTicketPruner(masked).update_masks(
        "random", sparsity=0.5, structure=Channels(attention="both")
    )
    layer = next(x for x in masked.layers if "Attention" in type(x).__name__)
    smaller = shrink(masked)
    for dense in ("_query_dense", "_key_dense"):
        inner = getattr(layer, dense)
        if inner.bias is None:
            continue
        bias = numpy(inner.bias)
        bias[~numpy(inner.kernel).any(axis=0)] += 1.5  # those of pruned heads and widths
        inner.bias.assign(bias)
    assert_same_outputs(masked, smaller)


@pytest.mark.once
def test_a_key_that_is_a_constant_is_removed_and_a_query_that_is_one_stays():
    """What a softmax notices: a constant query weighs a key that varies."""
    model = randomize(self_attention())
    attention = model.get_layer("mha")
    for dense, place in ((attention.key_dense, 1), (attention.query_dense, 2)):
        kernel = numpy(dense.kernel)
        kernel[:, :, place] = 0
        dense.kernel.assign(kernel)
    smaller, _ = checked(model)
    assert smaller.get_layer("mha").key_dim == 5
    bias = numpy(attention.query_dense.bias)
    bias[:, 2] = 0
    attention.query_dense.bias.assign(bias)
    smaller, report = checked(model)
    assert smaller.get_layer("mha").key_dim == 4
    assert row(report, "mha key_dim").unread == 2


@pytest.mark.once
def test_a_gate_reads_the_inputs_of_queries():
    x = keras.Input((6, 5))
    y = layers.Dense(8, name="stream")(x)
    y = layers.MultiHeadAttention(4, 6, 2, output_shape=7, use_gate=True, name="mha")(y, x)
    model = randomize(keras.Model(x, layers.Dense(3, name="out")(y)))
    attention = model.get_layer("mha")
    kernel = numpy(attention.query_dense.kernel)
    kernel[2:] = 0
    attention.query_dense.kernel.assign(kernel)
    kernel = numpy(attention._gate_dense.kernel)
    kernel[:3] = 0
    kernel[:, 0] = 0  # The gate of the first head is a constant that differs from zero.
    attention._gate_dense.kernel.assign(kernel)
    smaller, _ = checked(model)
    assert smaller.get_layer("stream").units == 7  # One is read by neither.


def test_keys_and_values_keep_equal_widths_where_the_backend_demands_it():
    model = randomize(self_attention(6, 0.0))
    kernel = numpy(model.get_layer("mha").output_dense.kernel)
    kernel[:, :3] = 0  # half of the width of values is not read
    model.get_layer("mha").output_dense.kernel.assign(kernel)
    smaller, report = checked(model)
    attention = smaller.get_layer("mha")
    jax = keras.backend.backend() == "jax"
    assert (attention.key_dim, attention.value_dim) == (6, 6 if jax else 3)
    assert row(report, "mha value_dim").unread == (0 if jax else 3)
    why = "the widths of keys and of values have to be equal"
    assert row(report, "mha value_dim").kept == ({why: 3} if jax else {})


@pytest.mark.once
def test_heads_without_a_reader_are_removed_with_their_inputs():
    model = randomize(self_attention())
    attention = model.get_layer("mha")
    kernel = numpy(attention.output_dense.kernel)
    kernel[[0, 3]] = 0
    attention.output_dense.kernel.assign(kernel)
    smaller, report = checked(model)
    assert smaller.get_layer("mha").num_heads == 2
    assert row(report, "mha heads").unread == 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("why", "make", "call"),
    [
        ("it returns the scores of its heads", {}, {"return_attention_scores": True}),
        ("called in training mode", {}, {"training": True}),
        ("its outputs have several axes", {"output_shape": (2, 4)}, {}),
    ],
)
def test_what_is_not_followed(why, make, call):
    x = keras.Input((6, 5))
    y = layers.Dense(8, name="stream")(x)
    y = layers.MultiHeadAttention(4, 6, name="mha", **make)(y, y, **call)
    y = layers.Flatten()(y[0] if isinstance(y, (list, tuple)) else y)
    model = randomize(keras.Model(x, layers.Dense(3)(y)))
    _, report = shrink(model, return_report=True)
    assert report.not_followed == {"mha": why}


def test_a_mask_for_each_head_leaves_attention_whole():
    x, mask = keras.Input((6, 5)), keras.Input((4, 6, 6), dtype="bool")
    y = layers.Dense(8, name="stream")(x)
    y = layers.MultiHeadAttention(4, 6, name="mha")(y, y, attention_mask=mask)
    model = keras.Model([x, mask], layers.Dense(3)(layers.Flatten()(y)))
    assert channel_families(model).not_followed == {
        "mha": "its attention mask has an axis of heads"
    }


@pytest.mark.once
def test_multiply_adds_of_kernels_and_of_attention():
    masked = convert_to_masked(randomize(cross_attention()))
    _, report = shrink(masked, return_report=True)
    projections = 4 * 8 * 2 * 4 + 7 * 10 * 2 * 4 + 7 * 6 * 2 * 4 + 4 * 2 * 4 * 10
    products = 2 * (4 * 7) * 2 * 4  # Queries with keys, and their scores with values.
    assert report.macs_before == 4 * 5 * 8 + 7 * 3 * (6 + 10) + projections + products + 40 * 3


def test_a_budget_counts_the_products_of_attention():
    masked = convert_to_masked(randomize(cross_attention()))
    pruner = LotteryTicketPruner(masked)
    pruner.update_masks("random", structure="channels", budget={"macs": 0.5})
    _, report = shrink(masked, return_report=True)
    assert 0.35 * report.macs_before < report.macs_after <= 0.5 * report.macs_before
    found = channel_families(masked)
    assert found.products == {"mha/scores": (2, 4), "mha/mixture": (2, 4)}


@pytest.mark.once
def test_an_attention_of_another_choice_is_refused():
    with pytest.raises(ValueError, match=r"`attention` must be one of .*Received: 'all'"):
        Channels(attention="all")


@pytest.mark.parametrize("mask", ["attention_mask", "query_mask", "value_mask"])
@pytest.mark.parametrize("layer", ["mha", "gqa"])
def test_the_layer_that_makes_a_mask_is_kept(layer, mask):
    """A mask that a layer computes is no operand: its entries are positions, not channels."""
    x = keras.Input((6, 8))
    y = layers.Dense(8, name="stream")(x)
    made = layers.Dense(6, "relu", name="mask")(x if mask == "attention_mask" else x[:, 0])
    attention = layers.MultiHeadAttention(2, 4) if layer == "mha" else None
    attention = attention or layers.GroupQueryAttention(4, 2, 1)
    y = attention(y, y, **{mask: made})
    masked = convert_to_masked(randomize(keras.Model(x, layers.Dense(3, name="out")(y))))
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, _ = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert smaller.get_layer("mask").units == 6
    assert smaller.get_layer("stream").units == 4


def test_frozen_inner_layers_stay_frozen():
    model = randomize(self_attention())
    model.get_layer("mha").query_dense.trainable = False
    model.get_layer("stream").bias.trainable = False
    masked = convert_to_masked(model)
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    frozen = [w.path for w in masked.weights if not w.trainable]
    assert len(frozen) == 3
    assert [w.path for w in shrink(masked).weights if not w.trainable] == frozen
