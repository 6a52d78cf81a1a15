"""Tables of words that are looked up more than once, or that also score words."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from shrunk import numpy, randomize, row, widths

# The graph of layers is the same on every backend; other files shrink models on JAX, too.
pytestmark = [pytest.mark.usefixtures("nothing_drawn"), pytest.mark.slow("jax")]


def language_model(tie=True, steps=5, masks=False, **kwargs):
    words = keras.Input((steps,), dtype="int32")
    table = layers.ReversibleEmbedding(9, 8, tie_weights=tie, mask_zero=masks, name="table")
    stream = table(words)
    y = layers.Dense(12, "relu", name="wide")(stream)
    stream = layers.add([stream, layers.Dense(8, name="narrow")(y)])
    return randomize(keras.Model(words, table(stream, reverse=True, **kwargs)))


def two_streams():
    """As an encoder and a decoder with one table."""
    words, others = (keras.Input((5,), dtype="int32") for _ in range(2))
    table = layers.Embedding(9, 8, name="table")
    first = layers.Dense(8, name="encoded")(table(words))
    second = layers.Dense(6, "relu", name="decoded")(layers.add([first, table(others)]))
    return randomize(keras.Model([words, others], layers.Dense(3, name="out")(second)))


MODELS = {
    "tied": language_model,
    "untied": lambda: language_model(tie=False),
    "masks": lambda: language_model(masks=True),
    "any length": lambda: language_model(steps=None),
    "two streams": two_streams,
}


def words_of(model, steps=5):
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 9, (4, steps)) for _ in model.inputs]
    return data if len(data) > 1 else data[0]


def checked(model):
    data = words_of(model)
    smaller, report = ml.shrink(model, return_report=True)
    expected, got = numpy(model(data)), numpy(smaller(data))
    assert expected.shape == got.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert report.weights_after == smaller.count_params()
    return smaller, report


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_channels_of_a_table_is_removed(name):
    masked = ml.convert_to_masked(MODELS[name]())
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = checked(masked)
    assert report.not_followed == {}
    table = smaller.get_layer("table")
    assert table.output_dim == 4
    shapes = [w.shape for w in table.weights]
    assert shapes == ([(9, 4), (4, 9)] if name == "untied" else [(9, 4)])
    if name != "two streams":
        assert widths(smaller) == {"wide": 6, "narrow": 4}
        assert numpy(smaller(words_of(smaller))).shape == (4, 5, 9)


@pytest.mark.once
def test_family_and_costs_of_a_tied_table():
    masked = ml.convert_to_masked(language_model())
    found = ml.channel_families(masked)
    assert (found.whole, found.not_followed, found.uncounted) == ({}, {}, ())
    stream = next(family for family in found.families if family.size == 8)
    assert set(stream.layers) == {"table", "narrow"}
    assert stream.made == {"table/embeddings": 1, "narrow/kernel": 1}
    assert list(stream.weights["table/embeddings"]) == [1]
    # Scores of 9 words for each of 5 steps; a lookup multiplies nothing.
    assert found.positions["table/embeddings"] == 5
    _, report = ml.shrink(masked, return_report=True)
    assert report.macs_before == 5 * (2 * 8 * 12 + 8 * 9)
    assert row(report, "table").macs_before == 5 * 8 * 9


@pytest.mark.once
def test_costs_of_an_untied_table():
    found = ml.channel_families(ml.convert_to_masked(language_model(tie=False)))
    assert found.positions["table/reverse_embeddings"] == 5
    assert "table/embeddings" not in found.positions
    stream = next(family for family in found.families if family.size == 8)
    assert list(stream.weights["table/reverse_embeddings"]) == [0]
    assert "table/reverse_embeddings" not in stream.made


@pytest.mark.once
def test_channels_that_only_the_scores_of_words_read_stay():
    model = language_model()
    for name, axis in (("wide", 0), ("narrow", 1)):  # The units beside the table see nothing.
        kernel = numpy(model.get_layer(name).kernel)
        np.moveaxis(kernel, axis, 0)[:4] = 0
        model.get_layer(name).kernel.assign(kernel)
    smaller, _ = checked(model)
    assert smaller.get_layer("table").output_dim == 8
    table = numpy(model.get_layer("table").embeddings)
    table[:, [1, 6]] = 0  # Neither looked up nor read, whatever the other layer adds.
    model.get_layer("table").embeddings.assign(table)
    smaller, _ = checked(model)
    assert smaller.get_layer("table").output_dim == 6


@pytest.mark.once
@pytest.mark.parametrize("first", [True, False])
def test_a_table_with_a_call_that_is_not_followed_stays_whole(first):
    x, words = keras.Input((5, 3)), keras.Input((5,), dtype="int32")
    table = layers.Embedding(9, 8, name="table")
    computed = layers.Flatten()(layers.Dense(1, "sigmoid", name="computed")(x))
    parts = [table(tensor) for tensor in ([computed, words] if first else [words, computed])]
    y = layers.concatenate([layers.Dense(4)(part) for part in parts])
    model = randomize(keras.Model([x, words], layers.Dense(3, name="out")(y)))
    values = numpy(table.embeddings)
    values[:, :3] = 0
    table.embeddings.assign(values)
    smaller, report = ml.shrink(model, return_report=True)
    assert report.not_followed == {"table": "it looks up values that another layer computes"}
    assert smaller.get_layer("table").output_dim == 8
    data = [np.random.default_rng(0).normal(size=(2, 5, 3)), np.arange(10).reshape(2, 5) % 9]
    np.testing.assert_allclose(numpy(smaller(data)), numpy(model(data)), rtol=1e-5, atol=1e-6)


def test_training_of_a_tied_table_goes_on():
    masked = ml.convert_to_masked(language_model())
    masked.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller = ml.shrink(masked)
    words = words_of(masked)
    for model in (masked, smaller):
        model.fit(words, words, epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(numpy(smaller(words)), numpy(masked(words)), rtol=0, atol=1e-4)
