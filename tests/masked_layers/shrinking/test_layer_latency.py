"""Tables of the latency of layers, with real but very short measurements."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers.shrinking import Compiled, compare, timing, unpruned


def rows_of(table):
    return {row.layer: row for row in table}


def halved(model, **options):
    masked = ml.convert_to_masked(model, **options)
    LotteryTicketPruner(masked).update_masks("smallest_weights", rate=0.5, structure="channels")
    return masked


def network():
    nested = keras.Sequential([keras.Input((8,)), layers.Dense(6, name="inner")], name="nested")
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(8, 3, padding="same", name="stem")(x)
    y = layers.BatchNormalization(name="norm")(y) * 2.0
    y = layers.add([y, layers.Conv2D(8, 3, padding="same", name="branch")(y)], name="sum")
    y = nested(layers.GlobalAveragePooling2D(name="pool")(y))
    model = keras.Model(x, layers.Dense(4, name="head")(y))
    model.compile("adam", "mse")
    return model


@pytest.mark.slow("jax")
@pytest.mark.parametrize("masked_too", [True, False])
def test_rows_have_the_sizes_of_layers_and_both_times(masked_too):
    model = network()
    masked = halved(model)
    smaller, report = ml.shrink(masked, return_report=True)
    nodes = [len(layer._inbound_nodes) for each in (model, smaller) for layer in each.layers]
    table = ml.latency_table(masked if masked_too else model, smaller, batch_size=2, seconds=0.0)
    assert nodes == [
        len(layer._inbound_nodes) for each in (model, smaller) for layer in each.layers
    ]
    rows = rows_of(table)
    assert [name.partition("_")[0] for name in rows][:3] == ["stem", "norm", "multiply"]
    assert {"sum", "pool", "nested/inner", "head"} < set(rows)
    assert not table.not_timed
    for expected in report:
        row = rows[expected.layer]
        assert row.channels == (expected.before, expected.after)
        assert row.weights == (expected.weights_before, expected.weights_after)
        assert row.macs == (expected.macs_before, expected.macs_after)
    assert rows["norm"].weights == (32, 16)
    assert rows["norm"].channels is rows["norm"].macs is None
    for each in (table.model, *(row.timing for row in table)):
        assert all(milliseconds > 0 for milliseconds in each.fastest)
        assert each.rounds >= 5
    assert sum(row.weights[1] for row in table) == smaller.count_params()


class OfAnyLength(layers.Layer):
    """Outputs whose length is not known from the graph."""

    def call(self, x):
        return x

    def compute_output_shape(self, shape):
        return (shape[0], None, shape[2])


@pytest.mark.once
def test_the_table_is_aligned_and_names_what_was_not_timed():
    x = keras.Input((5, 4), name="x")
    y = OfAnyLength(name="any")(layers.Dense(8, name="first")(x))
    model = keras.Model(x, layers.Dense(3, name="last")(y))
    table = ml.latency_table(model, ml.shrink(model, return_report=True)[0], seconds=0.0)
    ((name, reason),) = table.not_timed.items()
    assert name == "last"
    assert "is not fixed: (None, None, 8)" in reason
    text = str(table).splitlines()
    assert text[0].split() == ["layer", "channels", "weights", "multiply-adds", "ms", "ratio"]
    assert len(set(map(len, text[:2]))) == 1
    assert text[-1].startswith("not timed: last: ")
    assert text[-2].startswith("whole model, batch size 1: ")
    timed = {row["layer"]: row["timing"] is not None for row in table.to_dict()["rows"]}
    assert timed == {"first": True, "any": True, "last": False}


class Block(layers.Layer):
    def build(self, shape):
        self.wide = layers.Dense(16, "relu", name="wide")
        self.narrow = layers.Dense(8, name="narrow")
        self.wide.build(shape)
        self.narrow.build((*shape[:-1], 16))
        self.built = True

    def call(self, x):
        return x + self.narrow(self.wide(x))


@pytest.mark.once
def test_composite_layers_and_models_called_twice_are_timed_as_wholes():
    twice = keras.Sequential([keras.Input((4, 8)), layers.Dense(8, name="d")], name="twice")
    x = keras.Input((4, 8))
    y = Block(name="block")(twice(twice(x)))
    model = keras.Model(x, layers.Dense(3, name="head")(y))
    masked = halved(model, mask_normalization=True)
    smaller = ml.shrink(masked, return_report=True)[0]
    table = ml.latency_table(masked, smaller, seconds=0.0)
    rows = rows_of(table)
    assert list(rows) == ["twice", "block", "head"]
    assert not table.not_timed
    assert rows["block"].macs == (4 * 2 * 8 * 16, 4 * 2 * 8 * 8)
    assert rows["block"].weights == (2 * 8 * 16 + 16 + 8, 2 * 8 * 8 + 8 + 8)


class NormalizedBlock(Block):
    """A block whose normalization is made first, and leaves channels out inside a composite."""

    def build(self, shape):
        self.norm = layers.LayerNormalization(name="norm")
        self.norm.build(shape)
        super().build(shape)

    def call(self, x):
        return super().call(self.norm(x))


def test_masked_models_are_timed_in_their_full_size():
    x = keras.Input((4, 6))
    y = NormalizedBlock(name="block")(layers.Dense(8, name="first")(x))
    y = layers.LayerNormalization()(y)
    model = keras.Model(x, layers.Dense(3)(y))
    masked = halved(model, mask_normalization=True)
    before = ml.get_masks(masked)
    plain = unpruned(masked)
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in plain.layers)
    assert [x.shape for x in plain.weights] == [x.shape for x in model.weights]
    assert unpruned(model) is model
    assert all(np.array_equal(before[path], mask) for path, mask in ml.get_masks(masked).items())


def test_inputs_are_made_up_for_every_kind_of_number():
    words = keras.Input((4,), dtype="int32", name="words")
    flags = keras.Input((4,), dtype="bool", name="flags")
    half = keras.Input((4,), dtype="float16", name="half")
    y = layers.GlobalAveragePooling1D()(layers.Embedding(5, 4)(words))
    y = y + keras.ops.cast(flags, "float32") + keras.ops.cast(half, "float32")
    model = keras.Model({"words": words, "flags": flags, "half": half}, layers.Dense(2)(y))
    found = compare(Compiled(model, 3), Compiled(model, 3), rounds=(2, 2), seconds=0)
    assert found.rounds == 2


@pytest.mark.once
def test_inputs_that_cannot_be_made_up_are_named():
    model = keras.Sequential([keras.Input((None, 3), name="open"), layers.GRU(2)])
    with pytest.raises(ValueError, match=r"'open.*' is not fixed: \(None, None, 3\)"):
        Compiled(model, 1)
    with pytest.raises(ValueError, match="takes strings"):
        timing.made_up(keras.KerasTensor((None, 1), "string", name="text"), 1)


@pytest.mark.once
def test_processor_time_decides_only_if_elapsed_times_vary():
    steady = np.array([[1.0, 2.0]] * 8)
    found = ml.Timing.of(steady, steady * [0.5, 0.25])
    assert (found.elapsed, found.processor, found.ratio, found.noisy) == (0.5, 0.25, 0.5, False)
    varying = steady * [[k, 1] for k in (1, 2, 3, 4, 1, 2, 3, 4)]
    found = ml.Timing.of(steady, varying)
    assert found.noisy
    assert found.spread == (1.75, 3.25)
    assert (found.elapsed, found.processor, found.ratio) == (2.5, 1.0, 1.0)
    assert "makes elapsed times vary" in str(found)
    assert found.fastest == (1000, 1000)
