"""Warnings about pruning: layers without any weights left, and arguments without effect."""

import logging
import warnings

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import (
    DynamicSparseTraining,
    GradualPruning,
    LotteryTicketPruner,
    find_ticket,
    schedules,
    structures,
    supermasks,
)

# What they use of the backend is tested on JAX, too.
pytestmark = pytest.mark.slow("jax")

X = np.random.default_rng(0).normal(size=(24, 8)).astype("float32")
Y = np.arange(24) % 4


def make_model(masked=True):
    """Returns a model in which every weight of "mid" is smaller than all others."""
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="a"),
            keras.layers.Dense(8, name="mid"),
            keras.layers.Dense(4, name="b"),
        ]
    )
    rng = np.random.default_rng(1)
    for layer in model.layers:
        scale = 0.001 if layer.name == "mid" else 1.0
        layer.kernel.assign(scale * rng.uniform(1, 2, layer.kernel.shape))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)  # weights stay
    return ml.convert_to_masked(model) if masked else model


def said(action):
    """Returns the messages of our own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if w.category is UserWarning]


def fit(model, callbacks, epochs=1):
    model.fit(X, Y, batch_size=6, epochs=epochs, verbose=0, callbacks=callbacks)  # 4 steps each


def test_an_update_that_empties_a_layer_warns_once():
    model = make_model()
    pruner = LotteryTicketPruner(model)
    with pytest.warns(UserWarning, match=r"Nothing is left of 'mid/kernel': .*scope=\"layer\""):
        pruner.update_masks("large_init", sparsity=0.5, scope="global")
    assert not ml.get_masks(model)["mid/kernel"].any()
    assert "nothing is left of: mid/kernel" in str(ml.sparsity_report(model))
    assert not said(lambda: pruner.update_masks("large_init", rate=0.1, scope="global"))
    pruner.reset_masks()
    assert "nothing is left" not in str(ml.sparsity_report(model))
    assert not said(lambda: pruner.update_masks("large_init", sparsity=0.9))
    pruner.reset_masks()
    with pytest.warns(UserWarning, match="Nothing is left of 'mid/kernel'") as caught:
        pruner.update_masks("large_init", sparsity=0.5, scope="global")
    assert [w.filename for w in caught if w.category is UserWarning] == [__file__]


@pytest.mark.once
def test_the_earlier_interface_warns_too():
    model = make_model(masked=False)
    pruner = LotteryTicketPruner(model)
    with pytest.warns(UserWarning, match="Nothing is left of 'mid/kernel'"):
        pruner.calc_prune_mask(model, 0.5, "smallest_weights_global")


@pytest.mark.once
@pytest.mark.parametrize("strategy", ["smallest_weights", "large_init"])
def test_gradual_pruning_warns_once_with_the_step(strategy):
    model = make_model()
    schedule = schedules.Function(lambda step: 0.2 * step, frequency=1)
    pruning = GradualPruning(LotteryTicketPruner(model), schedule, strategy, scope="global")
    messages = said(lambda: fit(model, [pruning]))
    assert len(messages) == 1
    assert "Nothing is left of 'mid/kernel'" in messages[0]
    if strategy == "smallest_weights":
        assert " at step 2: " in messages[0]  # 0.4 of 160 weights are the 64 of that kernel


@pytest.mark.once
def test_masks_of_many_sparsities_say_it_once_and_a_grid_logs_it(caplog):
    model = make_model()
    pruner = LotteryTicketPruner(model)
    arguments = {"sparsities": [0.1, 0.5, 0.6], "scope": "global"}
    (message,) = said(lambda: list(pruner.masks_at("large_init", **arguments)))
    assert "'mid/kernel' at a sparsity of 0.5" in message
    with caplog.at_level(logging.WARNING):
        grid = {"criteria": ["large_init"], **arguments}
        assert not said(lambda: supermasks.evaluate_grid(pruner, X, Y, **grid))
    (text,) = [r.getMessage() for r in caplog.records if r.name == supermasks.__name__]
    assert "'mid/kernel' in the masks of large_init at 0.5, large_init at 0.6" in text


@pytest.mark.once
def test_a_search_says_it_once():
    model = make_model(masked=False)
    (message,) = said(
        lambda: find_ticket(
            model, X, Y, rounds=2, steps=2, batch_size=6, sparsity=0.6, scope="global"
        )
    )
    assert "Nothing is left of 'mid/kernel'" in message
    arguments = {"rounds": 2, "steps": 2, "batch_size": 6, "rate": 1e-4, "controls": ()}
    (message,) = said(lambda: find_ticket(model, X, Y, **arguments))
    assert "Nothing was pruned: a share of 0.0001" in message


@pytest.mark.once
def test_the_report_of_an_export_names_what_is_all_zero(tmp_path):
    from masked_layers import serving

    model = make_model()
    masks = ml.get_masks(model)
    for count, expected in ((1, False), (0, True)):
        masks["mid/kernel"][:] = False
        masks["mid/kernel"].flat[:count] = True
        ml.set_masks(model, masks)
        report = serving.export_sparse_saved_model(model, tmp_path / str(count))
        assert ("nothing but zeros: mid/kernel" in str(report)) == expected


def test_an_update_that_prunes_nothing_warns():
    pruner = LotteryTicketPruner(make_model())
    shares = (0.01, {"mid": 0.0, ".*": 0.01})
    for amount in ({name: share} for name in ("rate", "sparsity") for share in shares):
        with pytest.warns(UserWarning, match="Nothing was pruned: a share of 0.01 is less than"):
            pruner.update_masks("large_init", **amount)
    with pytest.warns(UserWarning, match=r"less than one tile of Blocks\(block_size=\(8, 8\)"):
        pruner.update_masks("large_init", rate=0.4, structure="8x8")
    pruner.update_masks("large_init", sparsity=0.5)
    assert not said(lambda: pruner.update_masks("large_init", sparsity=0.5))


@pytest.mark.once
def test_tiles_larger_than_a_kernel_are_named(caplog):
    pruner = LotteryTicketPruner(make_model())
    with caplog.at_level(logging.WARNING):
        pruner.update_masks("large_init", rate=0.5, structure="4x8")
        assert "larger than ['b/kernel']" in caplog.text
        caplog.clear()
        pruner.update_masks("large_init", structure=structures.NOfM(2, 16))
        assert "larger than ['a/kernel', 'mid/kernel', 'b/kernel']" in caplog.text
        caplog.clear()
        pruner.update_masks("large_init", rate=0.5, structure="filters")
    assert not caplog.records


@pytest.mark.once
@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"exclude": "no_such_layer"}, "exclude='no_such_layer' matches no layer"),
        ({"exclude": ["mid", "typo"]}, "exclude='typo' matches no layer"),
        ({"include": iter(["a", "typo"])}, r"include='typo' .* 'a', 'b', 'mid'"),
        ({"exclude": "mdi"}, r"exclude='mdi' .* Did you mean 'mid'\?"),
        ({"exclude": lambda layer: False}, "exclude=<function"),
    ],
)
def test_filters_that_match_nothing_are_named(filters, message):
    with pytest.warns(UserWarning, match=message) as caught:
        ml.convert_to_masked(make_model(masked=False), **filters)
    assert [w.filename for w in caught if w.category is UserWarning] == [__file__]


@pytest.mark.once
def test_filters_that_leave_nothing_get_an_error_with_the_names_of_layers():
    inputs = keras.Input((4,))
    outputs = inputs
    for number in range(30):
        outputs = keras.layers.Dense(4, name=f"dense_of_block_{number:02}")(outputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(outputs))
    with pytest.raises(ValueError, match="leave no maskable layer") as caught:
        ml.convert_to_masked(model, include=["dense_of_blok_07", "nothing like it"])
    message = str(caught.value)
    assert "'dense_of_block_00', " in message
    assert " and 10 more. Did you mean 'dense_of_block_07' or " in message
    assert "norm" not in message  # it has nothing to mask
    with pytest.raises(ValueError, match=r"leave no maskable layer.* that contain them: 'dense_of"):
        ml.convert_to_masked(model, exclude=lambda layer: True)


@pytest.mark.once
def test_filters_that_match_are_taken_without_a_word():
    filters = {"include": ["a", "mid"], "exclude": lambda layer: layer.name == "mid"}
    assert not said(lambda: ml.convert_to_masked(make_model(masked=False), **filters))


@pytest.mark.once
def test_patterns_that_others_keep_from_any_path_are_refused():
    pruner = LotteryTicketPruner(make_model())
    rates = {"kernel": 0.5, "mid": 0.1}
    with pytest.raises(
        ValueError, match=r"\['mid'\] of `rate` would have no effect.* Put them first"
    ):
        pruner.update_masks("large_init", rate=rates)
    pruner.update_masks("large_init", rate=dict(reversed(rates.items())))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            schedules.Polynomial(0, 0.5, 10, 20),
            r"^Nothing was pruned: .* ended at step 4, .* begins at step 10\. Train longer, or .*"
            "`begin_step`",
        ),
        (
            schedules.Polynomial(0, 0.5, 0, 8, 1, 2),
            r"sparsity of 0\.5: .* at step 4, to 0\.25, .* ended at step 4 of the 8 .*"
            r"\. Train longer, or set `end_step=4`",
        ),
        (
            schedules.Geometric(0, 0.75, 0, 4, 3),
            r"of 0\.75: .* at step 3, to 0\.6464, .* 3 steps later, .* `end_step` of 4\. "
            "Set `end_step=3`, or a `frequency` that divides the 4 steps",
        ),
        (schedules.Polynomial(0, 0.5, 0, 4, frequency=2), None),
        (schedules.Constant(0.5, 1, 9, 4), None),
        (schedules.Constant(0.5), None),
    ],
)
def test_a_training_that_ends_before_its_schedule_warns_with_its_step(schedule, message):
    model = make_model()
    pruning = GradualPruning(LotteryTicketPruner(model), schedule)
    if message is None:
        assert not said(lambda: fit(model, [pruning]))
    else:
        with pytest.warns(UserWarning, match=message):
            fit(model, [pruning])
        assert not said(lambda: fit(model, [pruning], epochs=0))


@pytest.mark.once
def test_the_remedies_of_an_unfinished_schedule_lead_to_its_final_sparsity():
    for schedule in (
        schedules.Polynomial(0, 0.5, 0, 4, 1, 2),  # `end_step=4`
        schedules.Geometric(0, 0.75, 0, 3, 3),  # `end_step=3`
        schedules.Geometric(0, 0.75, 0, 4, 2),  # a frequency that divides 4
    ):
        model = make_model()
        pruning = GradualPruning(LotteryTicketPruner(model), schedule)
        assert not said(lambda model=model, pruning=pruning: fit(model, [pruning]))


@pytest.mark.once
@pytest.mark.parametrize("cls", [schedules.Polynomial, schedules.Geometric])
def test_a_falling_sparsity_needs_regrowth(cls):
    falling = cls(0.7, 0.5, 0, 4, frequency=2)
    model = make_model()
    with pytest.raises(ValueError, match=r"falls, .*initial_sparsity=0\.7, .* `regrowth=True`"):
        GradualPruning(LotteryTicketPruner(model), falling)
    pruning = GradualPruning(LotteryTicketPruner(model), falling, regrowth=True)
    assert not said(lambda: fit(model, [pruning]))
    report = ml.sparsity_report(model)
    assert report.sparsity == pytest.approx(0.5, abs=3 / report.size)
    falling = cls(0.7, 0.5, 0, 8, frequency=2)
    pruning = GradualPruning(LotteryTicketPruner(model := make_model()), falling, regrowth=True)
    with pytest.warns(UserWarning, match=r"final sparsity of 0\.5.*set `end_step=4`"):
        fit(model, [pruning])


def test_rewiring_that_never_happens_is_refused_or_reported():
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.5)
    with pytest.raises(ValueError, match=r"No weight would ever move.*steps=10, until=0.75"):
        DynamicSparseTraining(pruner, 10, "random")
    rewiring = DynamicSparseTraining(pruner, 100, "random", frequency=50)
    with pytest.warns(UserWarning, match="moved nothing: .* ended at step 4, .* at step 50"):
        fit(model, [rewiring])


def test_a_fit_without_a_batch_does_not_warn():
    # Like a training that was restored at its end.
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.5)
    rewiring = DynamicSparseTraining(pruner, 100, "random", frequency=50)
    pruning = GradualPruning(pruner, schedules.Polynomial(0, 0.5, 10, 20))
    assert not said(lambda: fit(model, [rewiring, pruning], epochs=0))


@pytest.mark.once
@pytest.mark.parametrize("seed", [-1, 1.5, True, "1", float("nan")])
def test_seeds_are_looked_at_before_training(seed):
    pruner = LotteryTicketPruner(make_model())
    with pytest.raises(ValueError, match="`seed` must be a non-negative integer"):
        GradualPruning(pruner, 0.5, seed=seed)
    with pytest.raises(ValueError, match="`seed` must be a non-negative integer"):
        DynamicSparseTraining(pruner, 1000, "random", seed=seed)


@pytest.mark.once
@pytest.mark.parametrize("value", [-0.5, 1.0, float("nan"), None, True, "0.5"])
def test_a_function_that_gives_no_sparsity_is_named(value):
    model = make_model()
    for strategy in ("smallest_weights", "large_init"):
        pruning = GradualPruning(LotteryTicketPruner(model), lambda step: value, strategy)
        with pytest.raises(ValueError, match=r"Function\(.* at step 0` must be a number in"):
            pruning.advance(0)
    assert all(mask.all() for mask in ml.get_masks(model).values())


@pytest.mark.once
def test_booleans_do_not_count_as_numbers():
    pruner = LotteryTicketPruner(make_model())
    for name in ("rate", "sparsity"):
        with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
            pruner.update_masks("large_init", **{name: False})
    for name in ("frequency", "batch_size", "steps"):
        with pytest.raises(ValueError, match=f"{name}=True"):
            DynamicSparseTraining(pruner, **({"steps": 1000, "growth": "random"} | {name: True}))
    with pytest.raises(ValueError, match="steps=True"):
        GradualPruning(pruner, 0.5).advance(True)


@pytest.mark.once
@pytest.mark.parametrize("name", ["criteria", "sparsities", "weights", "dwr"])
def test_an_empty_grid_is_refused(name):
    grid = {"criteria": ["large_init"], "sparsities": [0.5]} | {name: []}
    with pytest.raises(ValueError, match="nothing to evaluate"):
        supermasks.evaluate_grid(LotteryTicketPruner(make_model()), X, Y, **grid)
