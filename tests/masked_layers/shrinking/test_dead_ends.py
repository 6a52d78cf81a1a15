"""Kept weights without effect, compared with a search for paths in the masks."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import (
    convert_to_masked,
    effective_masks,
    effective_sparsity,
    get_masks,
    set_masks,
    shrink,
    sparsity_report,
)


def on_a_path(masks):
    """Returns which weights of a chain of kernels (inputs, outputs) lie on a path, by loops."""
    reached = [np.ones(masks[0].shape[0], bool)]
    for mask in masks:
        reached.append(np.array([any(reached[-1][mask[:, j]]) for j in range(mask.shape[1])]))
    leads = [np.ones(masks[-1].shape[1], bool)]
    for mask in reversed(masks):
        leads.insert(0, np.array([any(leads[0][row]) for row in mask]))
    return [
        mask & from_[:, None] & to[None]
        for mask, from_, to in zip(masks, reached[:-1], leads[1:], strict=True)
    ]


def lenet(share, seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(300, "relu", bias_initializer="random_normal", name="a"),
            layers.Dense(100, "relu", bias_initializer="random_normal", name="b"),
            layers.Dense(10, name="c"),
        ]
    )
    model = convert_to_masked(model)
    rng = np.random.default_rng(seed)
    set_masks(model, {p: rng.random(m.shape) < share for p, m in get_masks(model).items()})
    return model


@pytest.mark.once
@pytest.mark.parametrize("seed", range(3))
def test_dead_ends_of_a_sparse_lenet_are_found_and_removed(seed):
    model = lenet(0.012, seed)
    masks = get_masks(model)
    expected = on_a_path(list(masks.values()))
    report = effective_sparsity(model)
    for (path, mask), known, row in zip(
        effective_masks(model).items(), expected, report, strict=True
    ):
        np.testing.assert_array_equal(mask, known)
        assert row.effective == known.sum()
        assert row.alive == masks[path].sum()
    total = sum(known.sum() for known in expected)
    assert report.effective == total < report.alive
    assert report.effective_sparsity == 1 - total / report.size
    assert f"effective sparsity {report.effective_sparsity:.2%}" in str(report)
    assert report.to_dict()["total"]["effective"] == total
    for path, mask in get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[path])  # The masks of the model are not changed.

    smaller, shrunk = shrink(model, return_report=True)
    units = [known.any(axis=0).sum() for known in expected[:2]]
    assert [smaller.get_layer(name).units for name in "ab"] == units
    kernels = [keras.ops.convert_to_numpy(smaller.get_layer(name).kernel) for name in "abc"]
    assert [np.count_nonzero(kernel) for kernel in kernels] == [k.sum() for k in expected]
    unread = np.flatnonzero(~expected[0].any(axis=1))
    np.testing.assert_array_equal(shrunk.unread["a"], unread)
    assert f"a does not read {len(unread)} of its inputs" in str(shrunk)
    x = np.random.default_rng(0).normal(size=(8, 28, 28, 1)).astype("float32")
    before = keras.ops.convert_to_numpy(model(x))
    after = keras.ops.convert_to_numpy(smaller(x))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    x.reshape(8, -1)[:, unread] = 1e6
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(smaller(x)), after)


@pytest.mark.once
def test_channels_of_convolutions_pass_through_normalization_and_pooling():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(6, 3, name="a")(x)
    y = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(y)))
    y = layers.Conv2D(5, 2, name="b")(y)
    y = layers.Dense(2, name="c")(layers.GlobalAveragePooling2D()(y))
    model = convert_to_masked(keras.Model(x, y))
    rng = np.random.default_rng(0)
    set_masks(model, {p: rng.random(m.shape) < 0.15 for p, m in get_masks(model).items()})
    masks = get_masks(model)
    flat = [mask.any(axis=tuple(range(mask.ndim - 2))) for mask in masks.values()]
    expected = [mask & known for mask, known in zip(masks.values(), on_a_path(flat), strict=True)]
    assert sum(known.sum() for known in expected) < sum(mask.sum() for mask in masks.values())
    for mask, known in zip(effective_masks(model).values(), expected, strict=True):
        np.testing.assert_array_equal(mask, known)


@pytest.mark.once
def test_a_dense_model_has_no_dead_ends_and_a_plain_report_does_not_count_them():
    model = lenet(1.0, 0)
    report = effective_sparsity(model)
    assert report.effective_sparsity == report.sparsity == 0
    plain = sparsity_report(model)
    assert plain.effective is plain.effective_sparsity is None
    assert "effective" not in str(plain)
    assert "effective" not in plain.to_dict()["total"]


@pytest.mark.once
def test_no_weight_is_effective_if_a_layer_is_fully_pruned():
    model = lenet(0.5, 0)
    set_masks(model, {"b/kernel": np.zeros((300, 100), bool)})
    report = effective_sparsity(model)
    assert report.effective == 0
    assert report.effective_sparsity == 1
