"""Random masks of a structure: the counts of the given masks, tile by tile, and nothing else."""

import numpy as np
import pytest

from channel_graphs import Family
from lottery_ticket_pruner import selection, structures
from lottery_ticket_pruner.structures import Layout

pytestmark = pytest.mark.once


# a makes channels that b reads flattened over two positions.
FAMILY = Family(("a",), 6, {"a": {1: np.arange(6)}, "b": {0: np.tile(np.arange(6), 2)}}, {"a": 1})
LAYOUTS = {"a": Layout((5, 6)), "b": Layout((12, 7))}


def test_the_last_axes_of_a_kernel_are_inputs_and_outputs_if_not_said():
    layout = Layout((2, 3, 4, 5))
    assert (layout.inputs, layout.outputs, layout.sizes) == ((2,), (3,), (6, 4, 5))
    assert Layout((4, 5)).sizes == (1, 4, 5)
    assert Layout((5,)).sizes == (1, 1, 5)


def stream(seed):
    return lambda name: np.random.default_rng([seed, *name.encode()])


def drawn(structure, masks, seed=0, families=(FAMILY,)):
    return selection.shuffled_within(
        structures.get(structure), masks, LAYOUTS, families, stream(seed)
    )


def pruned(structure, rate):
    weights = {
        path: selection.Weights(
            mask=np.ones(layout.shape, bool), current=np.random.default_rng(1).random(layout.shape)
        )
        for path, layout in LAYOUTS.items()
    }
    amount = {} if rate is None else {"rate": rate}
    return selection.update("smallest_weights", weights, structure=structure, **amount)


def test_channels_are_as_many_and_drawn_uniformly():
    masks = {path: np.ones(layout.shape, bool) for path, layout in LAYOUTS.items()}
    masks["a"][:, :2] = False
    masks["b"][[0, 1, 6, 7]] = False
    times = np.zeros(6)
    for seed in range(300):
        new = drawn("channels", masks, seed)
        kept = new["a"].all(axis=0)
        times += kept
        assert kept.sum() == 4
        np.testing.assert_array_equal(new["a"], np.broadcast_to(kept, (5, 6)))
        np.testing.assert_array_equal(new["b"], np.broadcast_to(np.tile(kept, 2)[:, None], (12, 7)))
    # 200 expected of a binomial distribution with a deviation of 8.
    assert np.abs(times - 200).max() < 40


def test_families_of_one_layer_are_drawn_apart():
    """The widths of queries and of values in one attention layer are as many, but not the same."""
    families = [
        Family(("a",), 64, {path: {1: np.arange(64)}}, {path: 1}, kind=kind)
        for path, kind in (("q", "key_dim"), ("v", "value_dim"))
    ]
    masks = {path: np.arange(64) < 32 for path in "qv"}
    masks = {path: np.broadcast_to(mask, (3, 64)) for path, mask in masks.items()}
    new = drawn("channels", masks, families=families)
    assert new["q"].sum() == new["v"].sum() == 96
    assert (new["q"] != new["v"]).any()


@pytest.mark.parametrize("structure", ["4x2", "2x5", "filters"])
def test_tiles_are_as_many_of_each_size(structure):
    masks = pruned(structure, 0.4)
    new = drawn(structure, masks, families=())
    for path, layout in LAYOUTS.items():
        rows, columns = (
            (layout.shape[0], 1) if structure == "filters" else map(int, structure.split("x"))
        )
        counts = []
        for mask in (masks[path], new[path]):
            tiles = [
                mask[i : i + rows, j : j + columns]
                for i in range(0, layout.shape[0], rows)
                for j in range(0, layout.shape[1], columns)
            ]
            assert all(tile.all() or not tile.any() for tile in tiles)
            counts.append(sorted((tile.size, bool(tile.all())) for tile in tiles))
        assert counts[0] == counts[1]
    assert any((new[path] != masks[path]).any() for path in masks)


def test_every_group_of_n_of_m_keeps_its_number():
    masks = pruned("2:4", None)
    new = drawn("2:4", masks)
    for path, mask in new.items():
        for start in range(0, mask.shape[0], 4):
            group = slice(start, start + 4)
            np.testing.assert_array_equal(mask[group].sum(axis=0), masks[path][group].sum(axis=0))
    assert any((new[path] != masks[path]).any() for path in masks)


def test_what_reads_a_filter_goes_with_it():
    masks = pruned("filters", 0.5)
    new = drawn("filters", masks)
    kept = new["a"].any(axis=0)
    assert kept.sum() == 3
    np.testing.assert_array_equal(new["b"].any(axis=1), np.tile(kept, 2))
