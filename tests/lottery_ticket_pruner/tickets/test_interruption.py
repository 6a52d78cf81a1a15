"""Searches that are resumed from a checkpoint after an interruption."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from lottery_ticket_pruner.tickets import find_ticket
from lottery_ticket_pruner.training import CropAndFlip
from lottery_ticket_pruner.variables import read
from searches import SHORT, assert_equal, make_model


class InterruptionError(Exception):
    pass


def everything(model):
    """Returns all values of a model and its optimizer, including masks and frozen values."""
    return [read(v) for v in (*model.variables, *model.optimizer.variables)]


@pytest.mark.parametrize(
    ("retraining", "pruned", "controls", "rows_before", "known"),
    [
        ("weight_rewinding", "freeze", (), 3, 2),
        pytest.param(
            *("weight_rewinding", "zero", ("random_reinit",), 2, 1),
            marks=[pytest.mark.once, pytest.mark.slow],
        ),
        pytest.param(
            *("learning_rate_rewinding", "zero", ("random_reinit",), 4, 3),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_search_is_resumed_where_it_was_interrupted(
    data, tmp_path, retraining, pruned, controls, rows_before, known
):
    search = {
        "rounds": 2, "steps": 5, "batch_size": 20, "rate": 0.4, "rewind_to": 1,
        "controls": controls, "retraining": retraining, "pruned": pruned,
        "validation_data": data, "test_data": data, "deterministic": True,
    }  # fmt: skip
    told, told_again = [], []
    alone = find_ticket(make_model(), *data, on_evaluation=told.append, **search)
    seen = []

    def interrupt(row):
        seen.append(row)
        if len(seen) == rows_before:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        find_ticket(make_model(), *data, checkpoint=tmp_path, on_result=interrupt, **search)
    again = []
    resumed = find_ticket(
        make_model(), *data, checkpoint=tmp_path, on_result=again.append,
        on_evaluation=told_again.append, **search,
    )  # fmt: skip
    # All rounds before the interrupted one are known and not trained again.
    assert again[:known] == seen[:known]
    untimed = [[{**row, "seconds": 0} for row in found.rows] for found in (alone, resumed)]
    assert untimed[0] == untimed[1]
    assert told == told_again
    assert_equal(alone.initial_weights, resumed.initial_weights)
    assert_equal(everything(alone.ticket), everything(resumed.ticket))
    for masks, others in zip(alone.masks, resumed.masks, strict=True):
        assert_equal(masks.values(), others.values())
    assert {file.name for file in tmp_path.iterdir()} == {
        "state.json", "pruner-02.npz", "model-02.npz",
        "masks-00.npz", "masks-01.npz", "masks-02.npz",
        "trained-00.npz", "trained-01.npz", "trained-02.npz",
    }  # fmt: skip
    finished = find_ticket(make_model(), *data, checkpoint=tmp_path, **search)
    assert finished.rows == resumed.rows
    assert_equal(everything(alone.ticket), everything(finished.ticket))
    with pytest.raises(ValueError, match=r"state of another search.*'rate': \(0.4, 0.3\)"):
        find_ticket(make_model(), *data, checkpoint=tmp_path, **search | {"rate": 0.3})
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="not the state of a search"):
        find_ticket(make_model(), *data, checkpoint=tmp_path, **search)


@pytest.mark.once
def test_numbers_and_ranges_of_other_types_go_into_a_checkpoint(data, tmp_path):
    numbers = {"rounds": np.int64(2), "steps": np.int64(1), "seed": np.int64(3)}
    arguments = {"control_rounds": range(1, 3), "replicate": np.int64(1), "checkpoint": tmp_path}
    found = find_ticket(make_model(), *data, **numbers, **arguments)
    plain = {name: int(number) for name, number in numbers.items()}
    again = find_ticket(make_model(), *data, **plain, **arguments | {"control_rounds": (1, 2)})
    assert again.rows == found.rows
    with pytest.raises(ValueError, match=r"'control_rounds': \(\[1, 2\], \[1\]\)"):
        find_ticket(make_model(), *data, **plain, **arguments | {"control_rounds": range(1, 2)})


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_resumed_from_a_checkpoint(data, tmp_path, dtype):
    def model():
        keras.utils.set_random_seed(0)
        hidden = layers.Dense(6, "relu", dtype=dtype)
        model = keras.Sequential([keras.Input((8,)), hidden, layers.Dense(2, dtype=dtype)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        return model

    search = {"rounds": 2, "rate": 0.4, "controls": (), "pruned": "freeze", "test_data": data}
    search |= SHORT | {"deterministic": True}
    alone = find_ticket(model(), *data, **search)

    def interrupt(row):
        if row["round"] == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        find_ticket(model(), *data, checkpoint=tmp_path, on_result=interrupt, **search)
    resumed = find_ticket(model(), *data, checkpoint=tmp_path, **search)
    assert {v.dtype for v in resumed.ticket.weights} == {dtype}
    assert_equal(everything(alone.ticket), everything(resumed.ticket))
    untimed = [[{**row, "seconds": 0} for row in found.rows] for found in (alone, resumed)]
    assert untimed[0] == untimed[1]


@pytest.mark.once
def test_a_search_of_another_model_or_of_other_data_is_not_resumed(data, tmp_path):
    x, y = data
    arguments = {"rounds": 1, "steps": 1, "controls": (), "checkpoint": tmp_path}
    arguments |= {"validation_data": data, "test_data": data}

    def search(model=None, x=x, y=y, **changed):
        return find_ticket(model or make_model(), x, y, **arguments | changed)

    found = search()
    other_loss = make_model()
    other_loss.compile(
        other_loss.optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    for change, what in [
        ({"model": make_model(seed=1)}, "initial_weights"),
        (
            {"model": make_model(optimizer=keras.optimizers.SGD(0.2, momentum=0.9))},
            "optimizer.learning_rate",
        ),
        ({"model": make_model(optimizer="adam")}, "optimizer"),
        ({"model": other_loss}, "loss"),
        ({"x": x + 1e-6}, "data"),
        ({"y": y.astype("int64")}, "data"),
        ({"y": 1 - y}, "data"),
        ({"validation_data": (x, 1 - y)}, "validation_data"),
        ({"validation_data": None}, "validation_data"),
        ({"test_data": (x, 1 - y)}, "test_data"),
        ({"augment": CropAndFlip(2)}, "augment"),
    ]:
        with pytest.raises(ValueError, match="holds the state of another search") as caught:
            search(**change)
        changed = re.findall(r"'([\w.]+)': \(", str(caught.value))
        assert changed == [what] or {key.partition(".")[0] for key in changed} == {what}
    # The same, created again: names generated by Keras and container types do not matter.
    again = search(x=x.copy(), validation_data=list(data))
    assert again.rows == found.rows
