"""Saved pruners: a loaded pruner continues like the saved one."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from pruned import assert_same, compiled, moved, plain_model


@pytest.mark.parametrize("convert", [lambda model: model, ml.convert_to_masked])
def test_a_loaded_pruner_continues_like_the_saved_one(convert, tmp_path, data):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    model = compiled(convert(plain_model()), keras.optimizers.SGD(schedule))
    model.fit(*data, batch_size=20, verbose=0)
    pruner = LotteryTicketPruner(model)
    model.fit(*data, verbose=0)
    pruner.set_pretrained_weights()
    pruner.calc_prune_mask(model, 0.5, "large_final")
    pruner.save(tmp_path / "pruner")
    assert [path.name for path in tmp_path.iterdir()] == ["pruner"]

    other = compiled(convert(plain_model(seed=1)), keras.optimizers.SGD(schedule))
    loaded = LotteryTicketPruner.load(tmp_path / "pruner", other)
    for name in ("initial_weights", "final_weights"):
        ours, theirs = getattr(loaded, name), getattr(pruner, name)
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
        assert not any(array.flags.writeable for array in ours.values())
    for each, held in ((pruner, model), (loaded, other)):
        each.calc_prune_mask(held, 0.3, "random")
    rows = zip(pruner.iterate_prunables(model), loaded.iterate_prunables(other), strict=True)
    for ours, theirs in rows:
        np.testing.assert_array_equal(ours[-1], theirs[-1])
    if convert is ml.convert_to_masked:
        with pytest.warns(UserWarning, match="set_pretrained_weights"):
            loaded.update_masks(rate=0.1)
        loaded.rewind()
        assert_same(other.get_weights(), list(pruner.initial_weights.values()))
        assert int(ops.convert_to_numpy(other.optimizer.iterations)) == 4


@pytest.mark.parametrize("pruned", ["freeze", "zero"])
def test_a_loaded_pruner_restores_frozen_values_of_pruned_weights(pruned, tmp_path, data):
    model, pruner = moved()
    pruner.update_masks(rate=0.5)
    pruner.treat(pruned=pruned)
    pruner.save(tmp_path / "pruner")
    other, another = moved()
    # Values frozen in the model before are removed by loading.
    another.update_masks(rate=0.2)
    another.treat("constant", "freeze")
    other.predict_on_batch(data[0])
    LotteryTicketPruner.load(tmp_path / "pruner", other)
    other.set_weights(model.get_weights())
    assert [ref.mask.frozen is None for ref in ml.masked_refs(other)] == [pruned == "zero"] * 2
    outputs = model.predict_on_batch(data[0])
    np.testing.assert_array_equal(other.predict_on_batch(data[0]), outputs)
    if pruned == "freeze":
        kernel = ops.convert_to_numpy(other.get_layer("hidden").kernel)
        np.testing.assert_array_equal(kernel, pruner.initial_weights["hidden/kernel"])


def test_rescaled_weights_are_known_after_loading(tmp_path):
    model = plain_model()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    pruner.apply_dwr(model)
    weights = model.get_weights()
    pruner.save(tmp_path / "pruner")
    LotteryTicketPruner.load(tmp_path / "pruner", model).apply_dwr(model)
    assert_same(model.get_weights(), weights)


@pytest.mark.once
def test_loading_checks_before_it_changes_anything(tmp_path):
    model, pruner = moved()
    pruner.update_masks(rate=0.5)
    file = tmp_path / "pruner.npz"
    pruner.save(file)

    wider = keras.Sequential([keras.Input((6,)), layers.Dense(11, name="hidden")])
    with pytest.raises(ValueError, match=r"'hidden' with shape \(6, 10\).*\(6, 11\)"):
        LotteryTicketPruner.load(file, ml.convert_to_masked(wider))
    head = ml.convert_to_masked(plain_model(), include="head")
    with pytest.raises(ValueError, match="head/kernel"):
        LotteryTicketPruner.load(file, head)
    assert ml.sparsity_report(head).sparsity == 0

    (tmp_path / "text").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    np.savez(tmp_path / "newer.npz", state=np.array(json.dumps({"format": "?", "version": 2})))
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-100])
    for name in ("text", "other.npz", "newer.npz", "cut.npz"):
        with pytest.raises(ValueError, match="not written by"):
            LotteryTicketPruner.load(tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        LotteryTicketPruner.load(tmp_path / "nowhere", model)


@pytest.mark.once
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    pruner = LotteryTicketPruner(plain_model())
    file = tmp_path / "pruner"
    pruner.save(file)
    content = file.read_bytes()

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        pruner.save(file)
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["pruner"]
