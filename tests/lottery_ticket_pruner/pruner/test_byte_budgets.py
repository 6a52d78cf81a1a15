"""Budgets of bytes: what is stored fits, closely, and as few weights as possible are pruned."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, selection
from lottery_ticket_pruner.selection.byte_search import within_bytes

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def plain():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((60,)), layers.Dense(80, activation="relu"), layers.Dense(40)]
    )


@pytest.fixture
def pruner(plain):
    return LotteryTicketPruner(ml.convert_to_masked(plain))


@pytest.mark.parametrize(
    "arguments",
    [{"scope": "global"}, {}, {"distribution": "erk"}, {"structure": "4x1"}],
    ids=["global", "layer", "erk", "blocks"],
)
def test_bytes_are_those_of_the_saved_model(arguments, pruner, tmp_path):
    dense = sum(4 * weight.size for weight in pruner.model.get_weights())
    pruner.update_masks("smallest_weights", budget={"bytes": 0.2}, **arguments)
    assert 0.98 * 0.2 * dense < pruner.stored_bytes <= 0.2 * dense
    if keras.backend.backend() == "tensorflow":
        report = ml.export_sparse_saved_model(pruner.model, tmp_path / "served")
        stored = report.files["assets/weights.mlsp"]
        stored += sum(row.nbytes for row in report if row.encoding == "dense")
        assert stored == pytest.approx(pruner.stored_bytes, rel=0.01)


def test_a_number_of_bytes_and_a_second_update(pruner):
    pruner.update_masks("smallest_weights", budget={"bytes": 12_000}, scope="global")
    assert 11_900 < pruner.stored_bytes <= 12_000
    masks = ml.get_masks(pruner.model)
    # The smallest weights of the whole network are pruned, and no others.
    kernels = {ref.path: np.abs(ref.variable.numpy()) for ref in ml.masked_refs(pruner.model)}
    kept = min(kernels[path][mask].min() for path, mask in masks.items())
    assert max(kernels[path][~mask].max() for path, mask in masks.items()) <= kept
    # A budget that is met already prunes nothing.
    pruner.update_masks("smallest_weights", budget={"bytes": 12_100}, scope="global")
    for path, mask in ml.get_masks(pruner.model).items():
        np.testing.assert_array_equal(mask, masks[path])
    pruner.update_masks("smallest_weights", budget={"bytes": 6_000}, scope="global")
    assert pruner.stored_bytes <= 6_000
    assert all((masks[p] >= mask).all() for p, mask in ml.get_masks(pruner.model).items())
    pruner.update_masks("smallest_weights", rate=0.1)
    assert pruner.stored_bytes is None


def test_what_cannot_be_met_or_means_nothing_is_an_error(pruner):
    with pytest.raises(ValueError, match=r"budget of 100 bytes cannot be met.* bytes are stored"):
        pruner.update_masks("smallest_weights", budget={"bytes": 100})
    for budget, arguments, message in (
        ({"bytes": 1.5}, {}, r"\(0, 1\], or an integer number of bytes.*bytes=1.5"),
        ({"bytes": 0}, {}, "bytes=0"),
        ({"bytes": 0.5, "weights": 0.5}, {}, "holds one of"),
        ({"bytes": 0.5}, {"structure": "channels"}, "counts what is stored of single weights"),
        ({"bytes": 0.5}, {"structure": "2:4"}, "leave the budget out"),
        ({"bytes": 0.5}, {"sparsity": 0.5}, "says how much is pruned"),
        ({"bytes": 0.5}, {"reconstruct": True, "data": np.ones((2, 60))}, "replaces them"),
        ({"latency": 0.5}, {"structure": "4x1"}, "single weights or for structure"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.update_masks("smallest_weights", budget=budget, **arguments)
    assert all(mask.all() for mask in ml.get_masks(pruner.model).values())
    kernel = selection.Weights(mask=np.ones((2, 2), bool), current=np.eye(2))
    request = selection.Request.of("smallest_weights", budget={"bytes": 0.5})
    with pytest.raises(ValueError, match=r"LotteryTicketPruner\.update_masks"):
        selection.select(request, {"k": kernel})


@pytest.mark.parametrize("power", [1, 0.2, 6])
def test_the_search_is_close_for_any_curve(power):
    tried = []

    def masks_at(sparsity):
        tried.append(sparsity)
        return {"k": np.asarray([sparsity])}

    size = selection.StoredSize(10**6, lambda masks: 10 + int(1e6 * (1 - masks["k"][0]) ** power))
    for limit in (0.9, 0.3, 250_000):
        tried.clear()
        found = size.of(within_bytes(limit, size, 0.9999, masks_at))
        wanted = limit if limit > 1 else limit * 1e6
        assert 0.99 * wanted <= found <= wanted
        assert len(tried) <= 22
