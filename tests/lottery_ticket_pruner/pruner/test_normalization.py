"""Pruning of models whose normalization layers can leave channels out."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, find_ticket, schedules
from shrunk import inputs_of, numpy, randomize

# Parts that are combined here are each tested on JAX, too.
pytestmark = [pytest.mark.usefixtures("nothing_drawn"), pytest.mark.slow("jax")]


def network():
    x = keras.Input((6,))
    stream = layers.Dense(8, name="stem")(x)
    y = layers.Dense(12, "relu", name="wide")(layers.LayerNormalization(name="first")(stream))
    stream = layers.add([stream, layers.Dense(8, name="narrow")(y)])
    return randomize(
        keras.Model(x, layers.Dense(3, name="out")(layers.RMSNormalization(name="last")(stream)))
    )


def masked_network():
    model = network()
    model.compile("adam", "mse")
    return ml.convert_to_masked(model, mask_normalization=True)


def left_out(masked):
    return {ref.path: ref.mask.to_numpy() for ref in ml.channel_refs(masked)}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_pruned_channel_is_left_out_of_the_normalization_too(scope):
    masked = masked_network()
    pruner = LotteryTicketPruner(masked)
    for rate in (0.25, 0.5):
        pruner.update_masks("smallest_weights", rate=rate, structure="channels", scope=scope)
        masks = ml.get_masks(masked)
        stream = masks["stem/kernel"].any(axis=0)
        assert 0 < stream.sum() < 8
        for mask in left_out(masked).values():
            np.testing.assert_array_equal(mask, stream)
        np.testing.assert_array_equal(masks["wide/kernel"].any(axis=1), stream)


def test_filters_pruned_in_all_layers_of_a_stream_are_left_out():
    masked = masked_network()
    pruner = LotteryTicketPruner(masked)
    for name in ("stem", "narrow"):
        layer = masked.get_layer(name)
        layer.kernel.assign(numpy(layer.kernel) * np.where(np.arange(8) < 2, 1e-3, 1))
    pruner.set_pretrained_weights()
    pruner.update_masks("smallest_weights", rate=0.25, structure="filters")
    for mask in left_out(masked).values():
        np.testing.assert_array_equal(mask, np.arange(8) >= 2)


@pytest.mark.parametrize("strategy", ["smallest_weights", "smallest_weights_global", "random"])
def test_strategies_for_weights_leave_normalization_alone(strategy):
    masks = []
    for normalization in (False, True):
        masked = ml.convert_to_masked(network(), mask_normalization=normalization)
        report = LotteryTicketPruner(masked).update_masks(strategy, sparsity=0.37)
        size = 6 * 8 + 8 * 12 + 12 * 8 + 8 * 3
        assert report.size == size
        masks.append({ref.path: ref.mask.to_numpy() for ref in ml.masked_refs(masked)})
    assert all(mask.all() for mask in left_out(masked).values())
    for path, mask in masks[0].items():
        np.testing.assert_array_equal(mask, masks[1][path])


@pytest.mark.once
def test_channels_left_out_by_hand_do_not_come_back():
    masked = masked_network()
    ml.set_masks(masked, {"first/gamma": np.arange(8) != 3})
    LotteryTicketPruner(masked).update_masks("smallest_weights", rate=0.25, structure="channels")
    assert not ml.get_masks(masked)["first/gamma"][3]


def test_reset_save_and_load(tmp_path):
    masked = masked_network()
    pruner = LotteryTicketPruner(masked)
    pruner.update_masks("smallest_weights", rate=0.5, structure="channels")
    before = ml.get_masks(masked)
    pruner.save(tmp_path / "pruner.npz")
    pruner.reset_masks()
    assert all(mask.all() for mask in ml.get_masks(masked).values())
    LotteryTicketPruner.load(tmp_path / "pruner.npz", masked)
    for path, mask in ml.get_masks(masked).items():
        np.testing.assert_array_equal(mask, before[path])
    with pytest.raises(ValueError, match="Convert the model the same way"):
        LotteryTicketPruner.load(tmp_path / "pruner.npz", ml.convert_to_masked(network()))


def test_gradual_pruning_changes_normalization_while_it_trains():
    masked = masked_network()
    schedule = schedules.Polynomial(0.0, 0.5, begin_step=0, end_step=6, frequency=2)
    pruning = GradualPruning(LotteryTicketPruner(masked), schedule, structure="channels")
    x = inputs_of(masked, batch=32)
    masked.fit(x, x[:, :3], batch_size=4, epochs=1, verbose=0, callbacks=[pruning])
    stream = ml.get_masks(masked)["stem/kernel"].any(axis=0)
    assert stream.sum() == 4
    for mask in left_out(masked).values():
        np.testing.assert_array_equal(mask, stream)
    got, expected = masked.predict_on_batch(x), numpy(masked(x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    smaller = ml.shrink(masked)
    np.testing.assert_allclose(numpy(smaller(x)), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.once
def test_criteria_of_gradients_measure_with_pruned_channels_left_out():
    masked = masked_network()
    x = inputs_of(masked, batch=32)
    pruner = LotteryTicketPruner(masked)
    pruner.update_masks("snip", rate=0.5, structure="channels", data=(x, x[:, :3]))
    stream = ml.get_masks(masked)["stem/kernel"].any(axis=0)
    assert not stream.all()
    for mask in left_out(masked).values():
        np.testing.assert_array_equal(mask, stream)


@pytest.mark.once
@pytest.mark.parametrize("structure", ["channels", None])
def test_random_masks_of_a_search_leave_out_the_channels_that_they_prune(structure, monkeypatch):
    masked = masked_network()
    x = inputs_of(masked, batch=20)
    seen = []
    set_masks = ml.set_masks

    def noting(model, masks):
        set_masks(model, masks)
        seen.append(ml.get_masks(model))

    monkeypatch.setattr(ml, "set_masks", noting)
    find_ticket(
        masked,
        x,
        x[:, :3],
        rounds=1,
        steps=2,
        batch_size=10,
        rate=0.5,
        structure=structure,
        controls=["random_mask"],
    )
    assert len({masks["stem/kernel"].tobytes() for masks in seen}) > 2  # Also shuffled ones.
    for masks in seen[-2:]:
        for name in ("first/gamma", "last/scale"):
            kept = masks["stem/kernel"].any(axis=0) if structure else np.ones(8, bool)
            np.testing.assert_array_equal(masks[name], kept)
