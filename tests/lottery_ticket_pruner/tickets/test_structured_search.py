"""Searches with a structure: exact counts, controls of the same structure, smaller tickets."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import find_ticket, structures
from searches import assert_equal

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6, 6, 2)).astype("float32")
Y = (X[:, 0, 0, 0] > 0).astype("int32")
SEARCH = {"rounds": 2, "steps": 2, "batch_size": 20, "rate": 0.5, "structure": "channels"}
ALL = ("random_reinit", "reinit_same_sign", "random_mask", "reshuffled_mask")


def net():
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 6, 2))
    y = stream = layers.Conv2D(8, 3, padding="same", name="stem")(x)
    y = layers.Conv2D(6, 3, padding="same", activation="relu", name="inside")(layers.ReLU()(y))
    y = layers.add([stream, layers.Conv2D(8, 3, padding="same", name="outside")(y)])
    y = layers.GlobalAveragePooling2D()(layers.ReLU()(y))
    model = keras.Model(x, layers.Dense(2, name="output")(y))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    return model


@pytest.fixture(scope="module")
def once():
    """A masked model whose functions are compiled once, and its weights."""
    model = ml.convert_to_masked(net())
    return model, model.get_weights()


@pytest.fixture
def model(once):
    """The same model with its first weights; a search starts with masks of ones."""
    once[0].set_weights(once[1])
    return once[0]


def counts(masks):
    """Numbers of channels of the two families, and the share of weights left."""
    kept = [masks["stem/kernel"].any((0, 1, 2)), masks["inside/kernel"].any((0, 1, 2))]
    np.testing.assert_array_equal(kept[0], masks["outside/kernel"].any((0, 1, 2)))
    np.testing.assert_array_equal(kept[0], masks["output/kernel"].any(1))
    np.testing.assert_array_equal(kept[1], masks["outside/kernel"].any((0, 1, 3)))
    return [int(flags.sum()) for flags in kept]


@pytest.mark.slow("jax")
def test_a_search_by_channels_has_exact_counts_and_its_ticket_becomes_smaller(starts):
    result = find_ticket(net(), X, Y, test_data=(X, Y), controls=ALL, **SEARCH)
    assert [counts(masks) for masks in result.masks] == [[8, 6], [4, 3], [2, 2]]
    shares = [row["channels"] for row in result.rows]
    assert shares == pytest.approx([1.0] + [7 / 14] * 5 + [4 / 14] * 5)
    sizes = [sum(int(mask.sum()) for mask in masks.values()) for masks in result.masks]
    by_round = [1 - size / sizes[0] for size in sizes]
    assert [row["sparsity"] for row in result.rows] == pytest.approx(
        [by_round[row["round"]] for row in result.rows]
    )
    drawn = {2: [], 1: []}
    for (weights, masks, _), row in zip(starts[1:], result.rows, strict=True):
        wanted = result.masks[row["round"]]
        assert counts(masks) == counts(wanted)
        assert [int(mask.sum()) for mask in masks.values()] == [
            int(mask.sum()) for mask in wanted.values()
        ]
        if row["arm"] == "ticket":
            assert_equal(weights, result.initial_weights)
            assert_equal(masks.values(), wanted.values())
        elif "mask" in row["arm"]:
            drawn[row["round"]].append(masks["stem/kernel"].any((0, 1, 2)))
    assert any((a != b).any() for a, b in drawn.values())

    smaller, report = ml.shrink(result.ticket, return_report=True)
    assert {row.layer: row.after for row in report} == {
        "stem": 2, "inside": 2, "outside": 2, "output": 2,
    }  # fmt: skip
    assert smaller.count_params() < result.ticket.count_params() / 5
    expected = result.ticket.predict_on_batch(X)
    np.testing.assert_allclose(
        smaller.predict_on_batch(X), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.slow
@pytest.mark.once
def test_an_interrupted_search_by_channels_is_resumed_and_told_from_others(model, tmp_path):
    initial = model.get_weights()

    def find(**arguments):
        model.set_weights(initial)
        return find_ticket(model, X, Y, **search | arguments)

    search = SEARCH | {"controls": ("random_mask",), "deterministic": True, "test_data": (X, Y)}
    alone = find()
    weights = alone.ticket.get_weights()
    seen = []

    def interrupt(row):
        seen.append(row)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(checkpoint=tmp_path, on_result=interrupt)
    resumed = find(checkpoint=tmp_path)
    untimed = [[{**row, "seconds": 0} for row in found.rows] for found in (alone, resumed)]
    assert untimed[0] == untimed[1]
    assert_equal(weights, resumed.ticket.get_weights())
    for other in (None, "filters", structures.Channels(round_to=2)):
        with pytest.raises(ValueError, match=r"state of another search.*structure"):
            find(checkpoint=tmp_path, structure=other)
    same = find(checkpoint=tmp_path, structure=structures.Channels())
    assert same.rows == resumed.rows


@pytest.mark.once
def test_states_without_a_structure_are_those_of_searches_without(model, tmp_path):
    search, initial = SEARCH | {"controls": (), "structure": None}, model.get_weights()
    first = find_ticket(model, X, Y, checkpoint=tmp_path, **search)
    assert "structure" not in json.loads((tmp_path / "state.json").read_text())["arguments"]
    model.set_weights(initial)
    assert find_ticket(model, X, Y, checkpoint=tmp_path, **search).rows == first.rows
    model.set_weights(initial)
    with pytest.raises(ValueError, match=r"state of another search.*'structure"):
        find_ticket(model, X, Y, checkpoint=tmp_path, **search | {"structure": "channels"})


@pytest.mark.once
@pytest.mark.parametrize(
    "structure", ["filters", "4x1", "1:2", {"name": "blocks", "block_size": (2, 2)}]
)
def test_other_structures_are_those_of_every_round(model, structure):
    amount = {"rounds": 1, "rate": None} if structure == "1:2" else {}
    search = SEARCH | {"structure": structure, "test_data": (X, Y), **amount}
    result = find_ticket(model, X, Y, controls=("random_mask",), **search)
    last = result.masks[-1]
    if structure == "filters":
        for path, mask in last.items():
            whole = mask.any((0, 1, 2)) if mask.ndim == 4 else mask.any(0)
            assert whole.sum() == {"stem": 2, "inside": 2, "outside": 2, "output": 1}[path[:-7]]
        assert result.rows[-1]["channels"] == pytest.approx(7 / 24)
    else:
        assert "channels" not in result.rows[-1]
        rows = [row for row in result.rows if row["round"]]
        assert len({row["sparsity"] for row in rows}) == len({row["round"] for row in rows})
    if structure == "1:2":
        assert result.rows[-1]["sparsity"] == 0.5


@pytest.mark.once
def test_what_a_structure_contradicts_is_refused_before_anything_is_trained(model):
    for changed, message in (
        ({"structure": "1:2", "rate": None}, "sets the sparsity in the first round.*rounds=2"),
        ({"structure": "1:2", "rounds": 1}, "determines how many weights are kept"),
        ({"structure": "chanels"}, "channels"),
        ({"scope": "output"}, "contradicts"),
    ):
        with pytest.raises(ValueError, match=message):
            find_ticket(model, X, Y, controls=(), **SEARCH | changed)


@pytest.mark.once
def test_normalization_leaves_the_channels_of_a_plain_model_out():
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    y = layers.LayerNormalization(name="norm")(layers.Dense(8, name="before")(x))
    model = keras.Model(x, layers.Dense(2, name="output")(y))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    inputs = X.reshape(40, -1)[:, :6]
    search = SEARCH | {"controls": (), "test_data": (inputs, Y)}
    result = find_ticket(model, inputs, Y, **search)
    assert [row["channels"] for row in result.rows] == [1, 0.5, 0.25]
    smaller = ml.shrink(result.ticket)
    assert [w.shape for w in smaller.get_layer("norm").weights] == [(2,), (2,)]
    expected = result.ticket.predict_on_batch(inputs)
    np.testing.assert_allclose(
        smaller.predict_on_batch(inputs), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
