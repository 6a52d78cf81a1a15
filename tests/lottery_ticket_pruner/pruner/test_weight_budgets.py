"""Budgets of multiply-adds and latency for single weights, in models."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import Latency, LotteryTicketPruner
from lottery_ticket_pruner.served_latencies import ServedProbes
from masked_layers import torchscript


def network():
    keras.utils.set_random_seed(1)
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(8, 3, name="conv")(x)
    y = layers.DepthwiseConv2D(3, name="depthwise")(y)
    return ml.convert_to_masked(keras.Model(x, layers.Dense(5, name="head")(layers.Flatten()(y))))


@pytest.mark.once
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_multiply_adds_are_those_of_kept_weights(scope):
    model = network()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", budget={"macs": 0.3}, scope=scope)
    masks = ml.get_masks(model)
    uses = {"conv/kernel": 16, "depthwise/kernel": 4, "head/kernel": 1}
    left = sum(uses[path] * int(mask.sum()) for path, mask in masks.items())
    dense = ml.shrink(ml.strip_masks(network()), return_report=True)[1].macs_before
    assert dense == sum(uses[path] * mask.size for path, mask in masks.items())
    assert pruner.multiply_adds == left <= 0.3 * dense
    assert left + sum(uses.values()) > 0.3 * dense
    pruner.update_masks("smallest_weights", rate=0.1)
    assert pruner.multiply_adds is None


@pytest.mark.once
def test_weights_without_multiply_adds_are_kept(caplog):
    x = keras.Input((4,), dtype="int32")
    y = layers.Flatten()(layers.Embedding(10, 6, name="words")(x))
    model = ml.convert_to_masked(keras.Model(x, layers.Dense(20, name="head")(y)))
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", budget={"macs": 0.25})
    assert "the budget keeps them and does not count any: words/embeddings" in caplog.text
    assert ml.get_masks(model)["words/embeddings"].all()
    assert pruner.multiply_adds == 0.25 * 24 * 20


@pytest.fixture
def made_up(monkeypatch):
    """Replaces measurements: the dense kernels take 8, 2 and 1 ms, sparse ones a share of that."""
    milliseconds = {"conv/kernel": 8.0, "head/kernel": 2.0}
    calls = []

    def costs(model, sparsities, *, batch_size):
        calls.append(batch_size)
        assert all((np.abs(w) > 0).all() for w in model.get_weights() if w.ndim > 1)
        products = tuple(
            torchscript.ProductCosts(
                (p,), t / 1e3, tuple(2 * (1 - s) * t / 1e3 for s in sparsities)
            )
            for p, t in milliseconds.items()
        )
        return torchscript.ProgramCosts(tuple(sparsities), products, 11e-3, 1)

    def report(model, *, batch_size):
        left = 1.0
        for path, t in milliseconds.items():
            kernel = model.get_layer(path.split("/")[0]).get_weights()[0]
            left += min(1, 2.2 * np.count_nonzero(kernel) / kernel.size) * t
        programs = {"dense": 11e-3, "sparse": left / 1e3}
        return ml.TorchReport((), programs, "sparse", batch_size, 1, 0, 0, 0.0)

    monkeypatch.setattr(torchscript, "program_costs", costs)
    monkeypatch.setattr(torchscript, "program_report", report)
    return calls


@pytest.mark.once
@pytest.mark.parametrize("scope", ["layer", "output", "global"])
@pytest.mark.parametrize("budget", [0.4, Latency(milliseconds=4.4, batch_size=8)])
def test_the_served_program_meets_the_budget(made_up, caplog, scope, budget):
    model = network()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", budget={"latency": budget}, scope=scope)
    found = pruner.measured_latency
    assert found.met
    assert 0.85 < found.measured / found.budget.limit <= 1
    assert found.predicted == pytest.approx(found.measured, rel=0.15)
    assert found.milliseconds <= 0.4 * found.dense_milliseconds == pytest.approx(4.4)
    assert f"batch size {found.budget.batch_size}" in str(found)
    assert set(made_up) == {found.budget.batch_size}
    masks = ml.get_masks(model)
    assert masks["depthwise/kernel"].all()  # It has no sparse kernel.
    assert "so the budget of latency keeps them: depthwise/kernel" in caplog.text
    assert not masks["conv/kernel"].all()
    for path, mask in masks.items():  # In each layer, or output, the smallest weights are pruned.
        kernel = np.abs(next(r for r in ml.masked_refs(model) if r.path == path).variable.numpy())
        if scope != "output" and not mask.all():
            assert kernel[mask].min() >= kernel[~mask].max()


@pytest.mark.once
def test_a_budget_that_cannot_be_reached_changes_nothing(made_up):
    model = network()
    pruner = LotteryTicketPruner(model)
    with pytest.raises(ValueError, match=r"0\.05 of the latency .* is the smallest"):
        pruner.update_masks("smallest_weights", budget={"latency": 0.05})
    assert all(mask.all() for mask in ml.get_masks(model).values())
    assert pruner.measured_latency is None


@pytest.mark.once("torch")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_real_programs_are_measured():
    """Any latency meets the budget, so that noise cannot change the result."""
    model = network()
    costs = torchscript.program_costs(model, (0.5, 0.9), batch_size=2)
    assert {each.paths for each in costs.products} == {("conv/kernel",), ("head/kernel",)}
    assert all(each.dense > 0 and min(each.sparse) > 0 for each in costs.products)
    assert torchscript.ProgramCosts.from_json(costs.to_json()) == costs
    pruner = LotteryTicketPruner(model)
    budget = {"latency": Latency(milliseconds=1e6, batch_size=4)}
    pruner.update_masks("smallest_weights", budget=budget)
    found = pruner.measured_latency
    assert found.trials == 1
    assert 0 < found.measured == found.milliseconds < 1e6
    assert all(mask.all() for mask in ml.get_masks(model).values())
    pruner.update_masks("smallest_weights", sparsity=0.9)
    pruner.update_masks("smallest_weights", budget=budget)
    assert {row.site for row in pruner.measured_latency.report if row.seconds} >= {
        "conv/kernel:conv2d"
    }


@pytest.mark.once("torch")
def test_times_are_shared_by_layers_with_equal_inputs_and_measured_without_zeros(monkeypatch):
    """All of a layer's inputs count, and zeros of weights are not left out of kernels."""
    from masked_layers.torchscript import timing

    entries, kernel = [], timing.kernel

    def counted(site, name, *, weight):
        entries.append(np.count_nonzero(weight))
        return kernel(site, name, weight=weight)

    monkeypatch.setattr(timing, "kernel", counted)
    zeros = {"kernel_initializer": "zeros"}
    large, small = keras.Input((64, 16)), keras.Input((1, 16))
    outputs = []
    for name, inputs in (("a", [large, small]), ("b", [small, small]), ("c", [small, small])):
        layer = layers.Dense(16, name=name, **zeros)
        outputs += [layer(x) for x in inputs]
    costs = torchscript.program_costs(keras.Model([large, small], outputs), (0.5,), batch_size=1)
    found = {each.paths[0]: each.dense for each in costs.products}
    assert found["b/kernel"] == found["c/kernel"] != found["a/kernel"]
    assert entries == [128] * 6


@pytest.mark.once
def test_products_take_no_longer_than_their_program(monkeypatch):
    """Each is measured alone, with overhead; what is left of the program is never negative."""
    products = tuple(
        torchscript.ProductCosts((path,), 8e-3, (4e-3,) * 7)
        for path in ("conv/kernel", "head/kernel")
    )
    costs = torchscript.ProgramCosts((0.5,) * 7, products, 10e-3, 1)
    monkeypatch.setattr(torchscript, "program_costs", lambda *args, **kwargs: costs)
    loads = ServedProbes(network(), Latency(0.5)).loads()
    assert loads.rest == pytest.approx(0)
    dense = dict.fromkeys(("conv/kernel", "head/kernel"), 0.0)
    assert loads.predicted(dense) == pytest.approx(1 / 0.5)
    assert loads.predicted(dict.fromkeys(dense, 0.99)) == pytest.approx(1)


@pytest.mark.once
def test_masks_of_normalization_are_not_weights(caplog):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization()])
    pruner = LotteryTicketPruner(ml.convert_to_masked(model, mask_normalization=True))
    pruner.update_masks("smallest_weights", budget={"macs": 0.5})
    assert pruner.multiply_adds == 12
    assert "does not count" not in caplog.text


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="requires PyTorch")
def test_other_backends_measure_in_a_new_process():
    costs = torchscript.program_costs(network(), (0.9,), batch_size=2)
    assert {each.paths for each in costs.products} == {("conv/kernel",), ("head/kernel",)}
    assert costs.seconds > 0
