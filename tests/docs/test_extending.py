"""The page on extending: its code, run from top to bottom, with a check of each part."""

import csv
import json
import types

import keras
import numpy as np
import pytest

import masked_layers as ml
import pages
from lottery_ticket_pruner import criteria, distributions, schedules, structures, treatments
from masked_layers import maskable

pytestmark = pytest.mark.once

PAGE = "extending.md"
BLOCKS = [code for _, code in pages.blocks(PAGE)]


def block(text):
    """Returns the only block that contains a text."""
    (found,) = [code for code in BLOCKS if text in code]
    return found


EXPORT, COMMAND = block("export_sparse_saved_model"), block("main(")
REGISTRIES = [
    (criteria, "_REGISTRY"),
    (structures, "_REGISTRY"),
    (schedules, "_REGISTRY"),
    (distributions, "_RULES"),
    (treatments, "_KEPT"),
    (treatments, "_PRUNED"),
    (maskable, "_registry"),
]


@pytest.fixture(scope="module")
def page():
    """Returns the namespace after each block that writes no files, by a text of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in REGISTRIES:
            patch.setattr(module, name, getattr(module, name).copy())
        keras.utils.set_random_seed(0)
        names, after = {}, {}
        for code in BLOCKS:
            if code not in (EXPORT, COMMAND):
                pages.run(PAGE, code, names)
                model, pruner = names["masked"], names["pruner"]
                after[code] = types.SimpleNamespace(
                    names=dict(names),
                    weights=model.get_weights(),
                    kernels=[effective(ref) for ref in ml.masked_refs(model)],
                    masks=list(ml.get_masks(model).values()),
                    initial=[pruner.initial_weights[path] for path in ml.get_masks(model)],
                    final=[pruner.final_weights[path] for path in ml.get_masks(model)],
                )
        yield lambda text: after[block(text)]


def effective(ref):
    return keras.ops.convert_to_numpy(getattr(ref.layer, ref.name)).copy()


def loss_changes(after):
    """Returns -g w of both kernels, computed forwards and backwards in NumPy."""
    first, bias, second, last_bias = after.weights
    x, y = after.names["x"], after.names["y"]
    hidden = np.maximum(x @ first + bias, 0)
    error = np.exp(hidden @ second + last_bias)
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    below = (error @ second.T) * (hidden > 0)
    return [-first * (x.T @ below), -second * (hidden.T @ error)]


def test_the_criterion_keeps_weights_with_the_largest_relative_growth(page):
    after = page("supermask = ")
    for mask, w0, wf, share in zip(
        after.masks, after.initial, after.final, (0.5, 0.1), strict=True
    ):
        growth = np.abs(wf) / (np.abs(w0) + 0.01)
        assert (~mask).sum() == int(share * mask.size)
        assert growth[mask].min() >= growth[~mask].max()
        assert (wf != w0).any()
    assert [row.alive for row in after.names["report"]] == [mask.sum() for mask in after.masks]
    assert set(after.names["supermask"]) == {"accuracy", "loss"}
    for kernel, mask, w0 in zip(after.kernels, after.masks, after.initial, strict=True):
        np.testing.assert_array_equal(kernel, np.where(mask, w0, 0))


def test_tickets_are_found_by_its_name(page):
    result = page("find_ticket(").names["result"]
    assert [(row["round"], row["arm"]) for row in result.rows] == [
        (0, "dense"),
        *((number, arm) for number in (1, 2) for arm in ("random_mask", "ticket")),
    ]
    assert result.rows[-1]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_a_criterion_of_gradients_gets_them(page):
    after = page("def loss_change")
    scores = np.concatenate([score.ravel() for score in loss_changes(after)])
    mask = np.concatenate([mask.ravel() for mask in after.masks])
    assert (~mask).sum() == int(0.6 * mask.size)
    assert scores[mask].min() >= scores[~mask].max() - 1e-7


def test_the_criterion_for_channels_keeps_the_largest_filters(page):
    score = page("def largest_filter").names["largest_filter"]
    kernels = [np.diag([3.0, 0, -1]), np.diag([1.0, 2, -4])]
    np.testing.assert_array_equal(score(types.SimpleNamespace(kernels=kernels)), [3, 2, 4])


def test_the_structure_drops_whole_inputs(page):
    after = page("def my_rows")
    for mask, score in zip(after.masks, loss_changes(after), strict=True):
        kept = mask.any(axis=1)
        assert (mask == kept[:, None]).all()
        assert (~kept).sum() == len(kept) // 4
        rows = score.mean(axis=1)
        assert rows[kept].min() >= rows[~kept].max() - 1e-7


def test_one_of_each_axis_prune_together_while_the_model_trains(page):
    after = page("def staircase")
    batches = -(-len(after.names["x"]) // 32)
    sizes = [mask.shape for mask in after.masks]

    def sparsity(step):
        rows = [int(step // 20 / 10 * inputs + 1e-6) for inputs, _ in sizes]
        zeros = sum(count * outputs for count, (_, outputs) in zip(rows, sizes, strict=True))
        return zeros / sum(np.prod(size) for size in sizes)

    expected = [sparsity(batches), sparsity(2 * batches)]
    assert after.names["history"]["sparsity"] == pytest.approx(expected)
    assert all((mask.all(axis=1) == mask.any(axis=1)).all() for mask in after.masks)


def test_the_distribution_gives_every_output_as_many_weights(page):
    masks = page("def fan_in").masks
    assert sum((~mask).sum() for mask in masks) == int(0.7 * sum(mask.size for mask in masks))
    first, second = (mask.sum() / mask.shape[1] for mask in masks)
    assert first == pytest.approx(second, abs=0.1)


def test_treatments_set_kept_and_pruned_weights(page):
    after = page("def halved")
    for kernel, mask, w0 in zip(after.kernels, after.masks, after.initial, strict=True):
        np.testing.assert_array_equal(kernel, np.where(mask, w0 / 2, w0 / 10))
        assert 0 < mask.mean() < 1


def test_the_custom_layer_is_masked_and_its_masks_are_saved(page, tmp_path):
    names = page("class LowRank").names
    model, x = names["thin_masked"], names["x"][:5]
    down, up = (np.array(weights) for weights in names["thin"].get_weights())
    kept = [np.abs(w) >= np.sort(np.abs(w), axis=None)[w.size // 2] for w in (down, up)]
    masks = ml.get_masks(model)
    np.testing.assert_equal(masks, dict(zip(("thin/down", "thin/up"), kept, strict=True)))
    expected = x @ (down * kept[0]) @ (up * kept[1])
    model.save(tmp_path / "thin.keras")
    for each in (model, keras.models.load_model(tmp_path / "thin.keras")):
        outputs = keras.ops.convert_to_numpy(each(x))
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_the_command_takes_locations(tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(block("def growth"))
    assert pages.run(PAGE, COMMAND, {})["status"] == 0
    assert "growth python3" in json.loads((tmp_path / "run/config.json").read_text())["code"]
    with (tmp_path / "run/results.csv").open(newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["dense", "random_mask", "ticket"]


def test_the_ticket_is_exported(page, tmp_path, monkeypatch):
    import tensorflow as tf

    names = page("def halved").names
    monkeypatch.chdir(tmp_path)
    pages.run(PAGE, EXPORT, dict(names))
    served = tf.saved_model.load("served/1")
    outputs = served.serve(names["x"][:5])
    expected = keras.ops.convert_to_numpy(names["masked"](names["x"][:5]))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
