"""The model of an earlier round of a search, without training again."""

import dataclasses

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import TicketResult, training
from lottery_ticket_pruner.tickets import find_ticket
from lottery_ticket_pruner.variables import read
from masked_layers.files import FileContentError
from searches import SHORT, assert_equal, make_model


def effective(model):
    """Returns what the model computes with: all weights, with the pruned ones as they read."""
    refs = {id(ref.variable): ref for ref in ml.masked_refs(model)}
    return [
        keras.ops.convert_to_numpy(refs[id(v)].mask(v)) if id(v) in refs else read(v)
        for v in model.weights
    ]


@pytest.mark.parametrize(
    ("pruned", "on_disk"),
    [("zero", True), pytest.param("freeze", False, marks=[pytest.mark.once, pytest.mark.slow])],
)
def test_masks_and_trained_weights_of_each_round_are_restored(
    data, masked, tmp_path, pruned, on_disk
):
    seen = {}

    def on_result(row):
        if row["arm"] in ("dense", "ticket"):
            seen[row["round"]] = effective(masked), ml.get_masks(masked)

    result = find_ticket(
        masked, *data, rounds=2, rate=0.5, controls=("random_mask",), pruned=pruned, test_data=data,
        checkpoint=tmp_path if on_disk else None, on_result=on_result, **SHORT,
    )  # fmt: skip
    for number in (1, 0, 2):
        assert result.restore(number) is masked
        weights, masks = seen[number]
        assert_equal(effective(masked), weights)
        assert_equal(ml.get_masks(masked).values(), masks.values())
        row = [row for row in result.rows if row["round"] == number][-1]
        loss = training.evaluate(masked, *data)["loss"]
        assert loss == pytest.approx(row["test_loss"], rel=1e-5)
    assert int(masked.optimizer.iterations) == 0
    momenta = masked.optimizer.variables[2:]
    assert momenta
    assert not any(read(slot).any() for slot in momenta)


@pytest.mark.once
def test_files_of_a_round_that_do_not_belong_to_the_result_are_refused(data, masked, tmp_path):
    search = {"rounds": 1, "rate": 0.5, "controls": (), "checkpoint": tmp_path, **SHORT}
    first = find_ticket(masked, *data, **search)
    file = tmp_path / "trained-00.npz"
    before = effective(masked)
    with pytest.raises(ValueError, match=r"rounds 0 to 1\. Received: 2"):
        first.restore(2)
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="trained in round 0 should be in"):
        first.restore(0)
    file.write_bytes(content[:-30])
    with pytest.raises(FileContentError, match="damaged"):
        first.restore(0)
    for left in tmp_path.iterdir():
        left.unlink()
    second = find_ticket(masked, *data, **search | {"seed": 1})
    with pytest.raises(FileContentError, match="another search"):
        first.restore(0)
    second.restore(1)
    with pytest.raises(FileNotFoundError, match="round 1 were not kept"):
        dataclasses.replace(second, trained=type(second.trained)()).restore(1)
    assert any((a != b).any() for a, b in zip(before, effective(masked), strict=True))


def rows(accuracies, **more):
    arms = ["dense"] + ["ticket"] * (len(accuracies) - 1)
    return [
        {"round": number, "arm": arm, "test_accuracy": accuracy, "test_loss": 1 - accuracy, **more}
        for number, (arm, accuracy) in enumerate(zip(arms, accuracies, strict=True))
    ]


@pytest.mark.once
def test_the_sparsest_round_within_a_drop_is_found():
    masked = make_model()  # Keras does not know its metrics before the first step.
    found = TicketResult(masked, [], [], rows([0.5, 0.75, 0.375, 0.4375, 0.25]))
    assert found.best_round(max_drop=0.0625) == 3  # Not round 1, after which one was worse.
    assert found.best_round(0.0625, "loss") == 3
    assert found.best_round(-0.25) == 1
    assert found.best_round(-0.5) == 0
    assert found.best_round(0.25) == 4
    # Of float32, as metrics are: the difference is 0.01000005.
    close = TicketResult(masked, [], [], rows(np.float32([0.97, 0.96, 0.9599]).tolist()))
    assert close.best_round(0.01) == 1
    controls = [{**row, "arm": "random_mask"} for row in rows([0.5, 1.0, 1.0])[1:]]
    found = TicketResult(masked, [], [], rows([0.5, 0.25]) + controls)
    assert found.best_round(0.1) == 0
    with pytest.raises(ValueError, match=r"For 1 point, give 0\.01"):
        found.best_round(1)
    with pytest.raises(ValueError, match="must be one of"):
        found.best_round(0.1, "auc")
    with pytest.raises(ValueError, match="test accuracy of the dense model is nan"):
        TicketResult(masked, [], [], rows([np.nan, 0.5])).best_round(0.1)
    unmeasured = TicketResult(masked, [], [], [{"round": 0, "arm": "dense", "sparsity": 0.0}])
    with pytest.raises(ValueError, match="with `test_data`"):
        unmeasured.best_round(0.1)
