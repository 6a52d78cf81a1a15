"""Treatments of kept and pruned weights: the pure functions, and frozen values in the graph."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import masked_layers as ml
from common import numpy
from lottery_ticket_pruner import LotteryTicketPruner, treatments

W0 = np.array([[0.5, -2.0, 1.0], [-1.0, 3.0, -0.25]], "float32")
WF = np.array([[0.4, -2.5, 1.0], [-0.5, -4.0, -0.1]], "float32")
MASK = np.array([[True, True, False], [False, True, False]])
DRAW = np.array([[9.0, 8.0, -7.0], [6.0, 5.0, 4.0]], "float32")


def kernel(mask=MASK, initial=W0, final=WF, seed=0):
    rng = np.random.default_rng(seed)
    return treatments.Kernel(
        mask=mask, rng=rng, initial=initial, final=final, draw=lambda: DRAW.copy()
    )


STD = float(np.std([0.5, -2.0, 1.0, -1.0, 3.0, -0.25]))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rewind", [0.5, -2.0, 3.0]),
        ("reinit", [9.0, 8.0, 5.0]),
        ("finetune", [0.4, -2.5, -4.0]),
        ("reinit_same_sign", [9.0, -8.0, 5.0]),
        ("constant_same_sign", [STD, -STD, STD]),
    ],
)
def test_kept_weights_by_hand(name, kept):
    values = treatments.treat(kernel(), treatments.get_kept(name), treatments.get_pruned("zero"))
    expected = np.zeros((2, 3))
    expected[MASK] = kept
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert values.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero", [[0.5, -2.0, 0.0], [0.0, 3.0, 0.0]]),
        ("freeze", [[0.5, -2.0, 1.0], [-1.0, 3.0, -0.25]]),
        # abs(wf) < abs(w0) at (0, 0), (1, 0) and (1, 2); equal at (0, 2).
        ("zero_if_shrunk", [[0.5, -2.0, 1.0], [0.0, 3.0, 0.0]]),
        ("zero_if_shrunk_all", [[0.0, -2.0, 1.0], [0.0, 3.0, 0.0]]),
    ],
)
def test_pruned_weights_by_hand(name, expected):
    values = treatments.treat(kernel(), treatments.get_kept("rewind"), treatments.get_pruned(name))
    np.testing.assert_array_equal(values, np.array(expected, "float32"))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_shuffled_and_constant_weights(seed, size):
    rng = np.random.default_rng(seed)
    initial, mask = rng.normal(size=size).astype("float32"), rng.random(size) < 0.6
    k = {name: treatments.get_kept(name) for name in treatments.kept_names()}

    def run(name):
        return k[name](kernel(mask, initial, None, seed))

    shuffled, same_sign = run("reshuffle"), run("reshuffle_same_sign")
    assert sorted(shuffled[mask]) == sorted(initial[mask])
    assert sorted(abs(same_sign[mask])) == sorted(abs(initial[mask]))
    np.testing.assert_array_equal(np.sign(same_sign[mask]), np.sign(initial[mask]))
    np.testing.assert_allclose(abs(run("constant")), np.std(initial), rtol=1e-5)
    np.testing.assert_array_equal(run("constant"), run("constant"))


def test_constant_signs_are_fair_and_not_those_of_w0():
    initial = abs(np.random.default_rng(3).normal(size=2000)).astype("float32")
    positive = (treatments.constant(kernel(np.ones(2000, bool), initial)) > 0).mean()
    assert 0.45 < positive < 0.55


def test_names_configurations_and_functions():
    assert treatments.kept_names() == [
        "rewind", "reinit", "reshuffle", "constant", "finetune",
        "reinit_same_sign", "reshuffle_same_sign", "constant_same_sign",
    ]  # fmt: skip
    assert treatments.pruned_names() == ["zero", "freeze", "zero_if_shrunk", "zero_if_shrunk_all"]
    for get, names in (
        (treatments.get_kept, treatments.kept_names()),
        (treatments.get_pruned, treatments.pruned_names()),
    ):
        for name in names:
            treatment = get(name)
            assert get(treatment.get_config()) is get(treatment) is treatment
            assert get(treatment.function) is treatment
            assert treatment.doc.endswith((".", ")"))
    own = treatments.get_kept(lambda kernel: kernel.initial / 2)
    np.testing.assert_array_equal(own(kernel()), W0 / 2)
    with pytest.raises(ValueError, match=r"Unknown treatment of kept weights 'freeze'.*rewind"):
        treatments.get_kept("freeze")
    with pytest.raises(ValueError, match="taken by"):
        treatments.register_pruned("zero")(lambda kernel, values: values)
    broken = treatments.get_kept(lambda kernel: kernel.initial * np.nan)
    with pytest.raises(ValueError, match=r"finite numbers.*some not finite"):
        treatments.treat(kernel(), broken, treatments.get_pruned("zero"))


# --- In a model -----------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 48)


def trained(**kernel_arguments):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, "relu", name="hidden", **kernel_arguments),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="out"),
        ]
    )
    model = ml.convert_to_masked(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01), loss)
    pruner = LotteryTicketPruner(model)
    fit(model)
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", rate=0.5)
    return model, pruner


def fit(model, epochs=1):
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)


def effective(model, name="hidden"):
    return numpy(model.get_layer(name).kernel)


def test_frozen_values_hold_in_training_saving_stripping_and_thaw(tmp_path):
    model, pruner = trained(kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(9))
    masks = ml.get_masks(model)
    w0 = pruner.initial_weights["hidden/kernel"]
    bias0 = numpy(model.get_layer("hidden").bias)
    variables = len(model.variables)

    pruner.treat(pruned="freeze")
    dead = ~masks["hidden/kernel"]
    np.testing.assert_array_equal(effective(model), w0)
    assert not np.array_equal(numpy(model.get_layer("hidden").bias), bias0)  # rewound
    assert len(model.variables) == variables + 2
    assert [w.shape for w in model.get_weights()] == [
        w.shape for w in pruner.initial_weights.values()
    ]
    fit(model, 2)
    np.testing.assert_array_equal(effective(model)[dead], w0[dead])
    assert (effective(model) != w0)[~dead].all()

    # The penalty of the effective weight, including the frozen part.
    penalty = 0.01 * (effective(model) ** 2).sum()
    assert float(numpy(model.losses[0])) == pytest.approx(penalty, rel=1e-5)
    report = ml.sparsity_report(model)
    assert report.frozen == sum((~mask).sum() for mask in masks.values())
    assert "frozen at values other than 0: 21" in str(report)
    assert report.to_dict()["weights"][0]["frozen"] == dead.sum() == 12
    assert report.rows[0].mask_bytes == 24 + 4 * 24

    outputs = model.predict_on_batch(X)
    plain = ml.strip_masks(model)
    np.testing.assert_array_equal(numpy(plain.get_layer("hidden").kernel), effective(model))
    np.testing.assert_array_equal(plain.predict_on_batch(X), outputs)
    np.testing.assert_allclose(ml.shrink(model).predict_on_batch(X), outputs, rtol=1e-4, atol=1e-5)

    model.save(tmp_path / "frozen.keras")
    loaded = keras.models.load_model(tmp_path / "frozen.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(X), outputs)
    copied = ml.convert_to_masked(model, include="hidden")
    for other in (loaded, copied):
        fit(other)
        np.testing.assert_array_equal(effective(other)[dead], w0[dead])

    pruner.treat()
    assert len(model.variables) == variables
    np.testing.assert_array_equal(effective(model), np.where(dead, 0, w0))
    fit(model)
    assert not effective(model)[dead].any()
    # Saved without frozen values, and loaded into a model that has some.
    pruner.treat(pruned="freeze")
    model.load_weights(tmp_path / "frozen.keras")
    np.testing.assert_array_equal(model.predict_on_batch(X), outputs)
    pruner.reset_masks()
    assert ml.sparsity_report(model).mask_bytes == 24 + 18


def test_rounds_do_not_compound_and_what_shrunk_stays_zero():
    model, pruner = trained()
    pruner.treat("reshuffle", "zero_if_shrunk", seed=1)
    w0, wf = pruner.initial_weights["hidden/kernel"], pruner.final_weights["hidden/kernel"]
    mask = ml.get_masks(model)["hidden/kernel"]
    first = effective(model)
    assert sorted(first[mask]) == sorted(w0[mask])
    shrunk = ~mask & (abs(wf) < abs(w0))
    frozen = ~mask & ~shrunk
    assert shrunk.any()
    assert frozen.any()
    fit(model)
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", rate=0.3)
    pruner.treat("reshuffle", "zero_if_shrunk", seed=1)
    second, fewer = effective(model), ml.get_masks(model)["hidden/kernel"]
    assert sorted(second[fewer]) == sorted(w0[fewer])
    assert not second[shrunk].any()
    np.testing.assert_array_equal(second[frozen], w0[frozen])
    pruner.treat("reshuffle", "zero_if_shrunk", seed=1)
    np.testing.assert_array_equal(effective(model), second)
    pruner.treat("reshuffle", "zero_if_shrunk", seed=2)
    assert not np.array_equal(effective(model), second)


def test_shrunk_weights_stay_zero_if_no_other_weight_was_pruned():
    model = ml.convert_to_masked(keras.Sequential([keras.Input((1,)), layers.Dense(4)]))
    model.set_weights([np.full((1, 4), 2.0), np.zeros(4)])
    pruner = LotteryTicketPruner(model)
    dense = model.layers[0]
    for final, expected in (([1, 3, 4, 5], [0, 2, 2, 2]), ([2, 3, 4, 5], [0, 2, 2, 2])):
        dense.set_weights([np.float32([final]), np.zeros(4)])
        pruner.set_pretrained_weights()
        pruner.update_masks("large_final", sparsity=0.25 if final[0] == 1 else 0.5)
        pruner.treat(pruned="zero_if_shrunk")
        np.testing.assert_array_equal(numpy(dense.kernel), [expected])


def test_fine_tuning_starts_from_all_final_weights_and_reinit_from_the_initializer():
    model, pruner = trained(kernel_initializer=keras.initializers.RandomUniform(2, 3, seed=7))
    mask = ml.get_masks(model)["hidden/kernel"]
    pruner.treat("finetune")
    for (path, final), now in zip(pruner.final_weights.items(), model.get_weights(), strict=True):
        keep = ml.get_masks(model).get(path, np.ones(final.shape, bool))
        np.testing.assert_array_equal(now[keep], final[keep])
    pruner.treat("reinit", seed=5)
    drawn = effective(model)[mask]
    assert ((drawn >= 2) & (drawn <= 3)).all()
    assert not np.isin(drawn, pruner.initial_weights["hidden/kernel"]).any()
    pruner.treat("reinit", seed=5)
    np.testing.assert_array_equal(effective(model)[mask], drawn)


def test_invalid_treatments_change_nothing():
    model = ml.convert_to_masked(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    pruner = LotteryTicketPruner(model)
    model.set_weights([np.ones((4, 3)), np.ones(3)])
    before = model.get_weights()
    with pytest.raises(ValueError, match="'zero_if_shrunk' reads the final weights"):
        pruner.treat(pruned="zero_if_shrunk")
    with pytest.raises(ValueError, match="Unknown treatment"):
        pruner.treat("rewound")
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    with pytest.raises(ValueError, match=r"must have the shape of the weight, \(4, 3\)"):
        ml.masked_refs(model)[0].mask.freeze(np.ones(3))
    plain = LotteryTicketPruner(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    with pytest.raises(ValueError, match="`treat` needs a masked model"):
        plain.treat()
