"""Dynamic sparse training: what is dropped, what grows, and from what it starts."""

import keras
import numpy as np
import pytest
from keras import ops

import masked_layers as ml
from changing_masks import Watch, make_data, make_model, same_masks
from lottery_ticket_pruner import (
    DynamicSparseTraining,
    LotteryTicketPruner,
    optimizers,
    training,
)
from lottery_ticket_pruner.evidence import gradients


def raw(model):
    return {ref.path: ops.convert_to_numpy(ref.variable).copy() for ref in ml.masked_refs(model)}


# Dynamic sparse training.


def sparse_model(optimizer=None, **arguments):
    model = make_model(optimizer, **arguments)
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.75)
    return model, pruner


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_count_of_each_layer_never_changes(growth):
    model, pruner = sparse_model()
    data = make_data() if growth == "gradient" else None
    rewiring = DynamicSparseTraining(pruner, 20, growth, data=data, batch_size=16, frequency=2)
    watch = Watch()
    model.fit(*make_data(), batch_size=12, epochs=4, verbose=0, callbacks=[rewiring, watch])
    counts = [[int(mask.sum()) for mask in masks.values()] for masks in watch.masks]
    assert counts == 21 * [[32, 8]]
    changes = [
        step
        for step, (before, after) in enumerate(zip(watch.masks, watch.masks[1:], strict=False), 1)
        if not same_masks(before, after)
    ]
    assert set(changes) <= set(range(2, 15, 2))  # up to 75 % of the training
    assert {2, 4, 6} <= set(changes)
    assert not same_masks(watch.masks[0], watch.masks[-1])


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True, use_ema=True),
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "LossScale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(0.01)),
}
if hasattr(keras.optimizers, "MultiOptimizer"):
    OPTIMIZERS["Multi"] = lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1), {".*kernel": keras.optimizers.Adam()}
        )
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grown_weights_start_from_zero_and_kept_weights_are_unchanged(name):
    model, pruner = sparse_model(OPTIMIZERS[name]())
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    refs = ml.masked_refs(model)
    slots = {
        ref.path: [
            v
            for v in model.optimizer.variables
            if v.shape == ref.variable.shape and ref.variable.path.replace("/", "_") in v.path
        ]
        for ref in refs
    }
    for variables in slots.values():
        for variable in variables:
            variable.assign(rng.uniform(1, 2, variable.shape))
    rewiring = DynamicSparseTraining(pruner, 100, "random", frequency=10)
    masks, weights = ml.get_masks(model), raw(model)
    before = {path: [ops.convert_to_numpy(v).copy() for v in slots[path]] for path in slots}
    share = rewiring.moving_share(10)
    assert rewiring.advance(10)
    after, new = raw(model), ml.get_masks(model)
    for path, mask in masks.items():
        moved = int(share * mask.sum() + 1e-6)
        assert moved
        kept = mask & (np.abs(weights[path]) >= np.sort(np.abs(weights[path][mask]))[moved])
        assert (new[path] & kept).sum() == kept.sum() == mask.sum() - moved
        assert new[path].sum() == mask.sum()
        grown = new[path] & ~mask
        assert grown.any()
        assert (after[path][grown] == 0).all()
        assert (after[path][~grown] == weights[path][~grown]).all()
        expected = {"Adam": 4, "SGD": 2, "Adagrad": 1, "LossScale": 1, "Multi": 2}[name]
        assert len(slots[path]) == expected
        for slot, old in zip(slots[path], before[path], strict=True):
            value = ops.convert_to_numpy(slot)
            assert (value[grown] == 0).all()
            assert (value[~grown] == old[~grown]).all()


def test_slots_are_found_for_any_order_of_the_variables():
    variables = make_model().trainable_variables[::-1]
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(variables)
    found = optimizers.optimizer_slots(optimizer)
    for variable in variables:
        (slot,) = found[id(variable)]
        assert variable.path.replace("/", "_") in slot.path


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_a_kernel_without_pruned_weights_stays_as_it_is(growth):
    model = make_model()
    pruner = LotteryTicketPruner(model)
    sparse, dense = (ref.path for ref in ml.masked_refs(model))
    pruner.update_masks("random", sparsity={sparse: 0.75, dense: 0.0})
    before, masks = raw(model), ml.get_masks(model)
    data = make_data() if growth == "gradient" else None
    DynamicSparseTraining(pruner, 100, growth, data=data, frequency=10).advance(10)
    after, new = raw(model), ml.get_masks(model)
    assert new[dense].all()
    assert (after[dense] == before[dense]).all()
    assert (new[sparse] != masks[sparse]).any()


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model, pruner = sparse_model()
    x, y = make_data()
    masks, weights = ml.get_masks(model), raw(model)
    dense = gradients.loss_gradients(model, x, y)
    rewiring = DynamicSparseTraining(pruner, 100, data=(x, y), frequency=10, seed=1)
    rewiring.advance(10)
    new = ml.get_masks(model)
    for path, mask in masks.items():
        moved = int(rewiring.moving_share(10) * mask.sum() + 1e-6)
        kept = mask & (np.abs(weights[path]) >= np.sort(np.abs(weights[path][mask]))[moved])
        grown, size = new[path] & ~kept, np.abs(dense[path])
        assert grown.sum() == moved
        assert size[grown].min() >= size[~new[path]].max() * (1 - 1e-5)

    def again(seed):
        ml.set_masks(model, masks)
        model.set_weights([pruner.initial_weights[path] for path in pruner.initial_weights])
        part = DynamicSparseTraining(
            pruner, 100, data=(x, y), batch_size=16, frequency=10, seed=seed
        )
        part.advance(10)
        return ml.get_masks(model)

    one = again(1)
    assert same_masks(one, again(1))
    assert not same_masks(one, again(2))


@pytest.mark.once
def test_the_share_that_moves_falls_by_half_a_cosine():
    _, pruner = sparse_model()
    rewiring = DynamicSparseTraining(pruner, 400, "random", fraction=0.4)
    assert [rewiring.moving_share(s) for s in (0, 100, 150, 300, 400)] == pytest.approx(
        [0.4, 0.3, 0.2, 0, 0]
    )
    assert [s for s in range(401) if rewiring._due(s)] == [100, 200]


def test_a_resumed_training_does_not_rewire_twice_at_one_step():
    model, pruner = sparse_model()
    before, watch = ml.get_masks(model), Watch()
    for _ in range(2):  # 5 batches each
        rewiring = DynamicSparseTraining(pruner, 20, "random", frequency=5)
        model.fit(*make_data(), batch_size=12, verbose=0, callbacks=[rewiring, watch])
        changes = [not same_masks(one, before) for one in (watch.masks[0], watch.masks[-1])]
        assert changes == [False, True]
        before = watch.masks[-1]


def test_rewiring_in_exact_step_training():
    model, pruner = sparse_model()
    before = ml.get_masks(model)
    rewiring = DynamicSparseTraining(pruner, 20, "random", frequency=5)
    training.train(
        model,
        *make_data(),
        steps=20,
        batch_size=12,
        eval_every=5,
        on_progress=rewiring.advance,
    )
    after = ml.get_masks(model)
    assert rewiring.step == 20
    assert not same_masks(before, after)
    assert [mask.sum() for mask in after.values()] == [32, 8]


def test_weights_that_diverged_are_named():
    model, pruner = sparse_model()
    before = ml.get_masks(model)
    second = ml.masked_refs(model)[1]
    second.variable.assign(np.full((16, 2), np.inf, "float32"))
    with pytest.raises(ValueError, match=second.path):
        DynamicSparseTraining(pruner, 20, "random", frequency=5).advance(5)
    assert same_masks(before, ml.get_masks(model))


@pytest.mark.once
def test_a_dense_model_gets_a_warning_that_nothing_moves():
    model, pruner = sparse_model()
    ml.set_masks(model, {path: np.ones_like(mask) for path, mask in ml.get_masks(model).items()})
    with pytest.warns(UserWarning, match="moved nothing at step 5: .*no pruned weights"):
        DynamicSparseTraining(pruner, 20, "random", frequency=5).advance(5)
    assert all(mask.all() for mask in ml.get_masks(model).values())


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"growth": "magnitude"}, "`growth` must be"),
        ({}, "needs `data="),
        ({"growth": "random", "data": (1, 2)}, "takes no data"),
        ({"data": (np.zeros((3, 8)), np.zeros(2))}, "arrays of lengths"),
        ({"growth": "random", "fraction": 1.0}, "`fraction` must be"),
        ({"growth": "random", "until": 0}, "until=0"),
        ({"growth": "random", "frequency": 0}, "frequency=0"),
        ({"growth": "random", "frequency": 2.5}, "integers.*frequency=2.5"),
    ],
)
def test_wrong_arguments_of_rewiring_are_named(arguments, message):
    _, pruner = sparse_model()
    with pytest.raises(ValueError, match=message):
        DynamicSparseTraining(pruner, 100, **arguments)
