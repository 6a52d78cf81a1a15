"""The search for the fewest channels with which a model is fast enough, without a model."""

import numpy as np
import pytest

from lottery_ticket_pruner import Latency
from lottery_ticket_pruner.budgets import UnreachableBudgetError
from lottery_ticket_pruner.selection import Request
from lottery_ticket_pruner.selection.latency_search import within_latency
from lottery_ticket_pruner.structures import Channels

pytestmark = pytest.mark.once

CHANNELS = 64  # The cost is the square of the share of channels that is left.


def cost_at(sparsity):
    return (1 - int(sparsity * CHANNELS) / CHANNELS) ** 2


LATENCIES = {
    "in proportion to the cost": lambda cost: cost,
    "mostly overhead": lambda cost: 0.3 + 0.7 * cost,
    "convex": lambda cost: 0.1 + 0.9 * cost**2,
    "concave": lambda cost: 0.05 + 0.95 * np.sqrt(cost),
    "in steps": lambda cost: np.ceil(20 * cost) / 20,
    "flat, then steep": lambda cost: min(1.0, 0.2 + 3 * cost),
    "slower if little is pruned": lambda cost: cost if cost < 0.5 else 1.2,
}


class Probe:
    """Measures a made-up latency, with noise if asked."""

    def __init__(self, latency, share, noise=0.0, final=1.0):
        self.latency, self.share, self.noise, self.final = latency, share, noise, final
        self.unpruned = 1 / share
        self.rng = np.random.default_rng(0)
        self.calls = []

    def __call__(self, masks, *, predicted, final=False):
        load = self.latency(cost_at(masks)) / self.share
        load *= np.exp(self.noise * self.rng.normal()) * (self.final if final else 1)
        self.calls.append((masks, predicted, final, load))
        return load


def search(probe, least=0.0, most=0.9):
    # These masks are only the sparsity, for the probe above.
    return within_latency(
        Latency(probe.share), Channels(), probe, (least, most), lambda masks: masks, cost_at
    )


@pytest.mark.parametrize("share", [0.9, 0.75, 0.5, 0.35, 0.25])
@pytest.mark.parametrize("name", LATENCIES)
def test_the_budget_is_met_closely_with_few_models(name, share):
    latency = LATENCIES[name]
    probe = Probe(latency, share)
    if latency(cost_at(0.9)) > share:
        with pytest.raises(UnreachableBudgetError, match=r"cannot be reached.*`at_most`") as caught:
            search(probe)
        assert "`" not in caught.value.found  # For `prune`, which has no such arguments.
        return
    found = latency(cost_at(search(probe)))
    assert found <= share
    # Nothing that meets the budget is much slower. Every number of channels is tried here.
    every = [latency(cost_at(k / CHANNELS)) for k in range(58)]
    assert found >= 0.9 * max(x for x in every if x <= share)
    assert len(probe.calls) <= 9
    *_, (_, _, final, _) = probe.calls
    assert final
    assert [final for *_, final, _ in probe.calls].count(True) == 1


def test_latencies_are_predicted_from_the_models_measured_before():
    probe = Probe(LATENCIES["mostly overhead"], 0.6)
    search(probe)
    errors = [abs(load / predicted - 1) for _, predicted, _, load in probe.calls]
    assert errors[-1] < 0.01 < errors[0]


def test_nothing_is_pruned_beyond_other_budgets_if_they_are_enough():
    probe = Probe(LATENCIES["in proportion to the cost"], 0.5)
    assert search(probe, least=0.5) == 0.5
    assert [sparsity for sparsity, *_ in probe.calls] == [0.5, 0.5]


def test_more_is_pruned_than_other_budgets_require_if_they_are_not_enough():
    probe = Probe(LATENCIES["mostly overhead"], 0.5)
    found = search(probe, least=0.4)
    assert found > 0.4
    assert 0.45 <= probe.latency(cost_at(found)) <= 0.5


def test_a_last_measurement_above_the_budget_is_not_accepted():
    probe = Probe(LATENCIES["in proportion to the cost"], 0.5, final=1.08)
    found = search(probe)
    assert 0.4 <= 1.08 * cost_at(found) <= 0.5
    assert [final for *_, final, _ in probe.calls].count(True) > 1


@pytest.mark.parametrize("seed", range(8))
def test_noise_neither_prolongs_the_search_nor_leads_it_far_away(seed):
    probe = Probe(LATENCIES["mostly overhead"], 0.6, noise=0.05)
    probe.rng = np.random.default_rng(seed)
    found = probe.latency(cost_at(search(probe)))
    assert 0.48 < found < 0.68
    assert len(probe.calls) <= 24


def test_what_cannot_be_reached_says_how_far_it_goes():
    probe = Probe(LATENCIES["mostly overhead"], 0.2)
    with pytest.raises(ValueError, match=r"at most 0\.2 of the .* possible .*, 0\.30\d of the"):
        search(probe)
    assert len(probe.calls) <= 8


def test_endless_noise_ends_with_the_model_measured_last():
    class AlwaysSlow(Probe):
        def __call__(self, masks, *, predicted, final=False):
            load = super().__call__(masks, predicted=predicted, final=final)
            return 1.02 if final else load

    probe = AlwaysSlow(LATENCIES["in proportion to the cost"], 0.5)
    found = search(probe)
    sparsity = [sparsity for sparsity, _, final, _ in probe.calls if final][-1]
    assert found == sparsity < 0.9
    assert len(probe.calls) <= 24


@pytest.mark.parametrize(
    ("least", "cost", "loads"),
    [
        # What other budgets require is fast enough, but not in the long measurement.
        (0.55, lambda sparsity: 1 - sparsity, [0.97, 1.02, 0.95, 0.96]),
        (0.55, lambda sparsity: 1 - sparsity, [0.97, 1.02, 1.01, 0.95, 0.96]),
        # The same channels are measured twice.
        (0.0, lambda sparsity: 1 - int(4 * sparsity) / 4, [1.1, 0.8, 0.96]),
    ],
)
def test_noise_for_models_of_equal_cost(least, cost, loads):
    class Recorded:
        unpruned = 2.0

        def __call__(self, masks, *, predicted, final=False):
            return loads.pop(0)

    bounds = least, 0.7
    found = within_latency(Latency(0.5), Channels(), Recorded(), bounds, lambda s: s, cost)
    assert least < found <= 0.7
    assert loads == []


def test_a_budget_that_only_short_measurements_meet_cannot_be_reached():
    probe = Probe(LATENCIES["in proportion to the cost"], 1.01 * cost_at(0.9), final=1.1)
    with pytest.raises(ValueError, match="cannot be reached"):
        search(probe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a share"),
        ({"share": 0.5, "milliseconds": 3}, "either a share"),
        ({"share": 0}, r"number in \(0, 1\]"),
        ({"share": 1.5}, r"number in \(0, 1\]"),
        ({"share": True}, r"number in \(0, 1\]"),
        ({"share": "half"}, r"number in \(0, 1\]"),
        ({"milliseconds": -1}, "positive number"),
        ({"milliseconds": float("inf")}, "positive number"),
        ({"share": 0.5, "batch_size": 0}, "positive integer"),
        ({"share": 0.5, "batch_size": 1.0}, "positive integer"),
    ],
)
def test_budgets_of_latency_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Latency(**arguments)


def test_requests_take_shares_and_objects():
    def budget_of(value, **arguments):
        budget = {"latency": value, "weights": 0.9}
        request = Request.of("random", budget=budget, **{"structure": "channels", **arguments})
        assert budget == {"latency": value, "weights": 0.9}  # The user's dict is not changed.
        return request.budget

    assert budget_of(0.5) == {"latency": Latency(0.5), "weights": 0.9}
    latency = Latency(milliseconds=3, batch_size=8)
    assert budget_of(latency)["latency"] is latency
    for value, arguments, message in (
        (1.5, {}, r"in \(0, 1\]"),
        ({"share": 0.5}, {}, r"in \(0, 1\]"),
        (0.5, {"structure": "filters"}, "a share of the weights is a `sparsity`"),
        (0.5, {"structure": None}, "a share of the weights is a `sparsity`"),
        (0.5, {"rate": 0.5}, "leave out `rate`"),
    ):
        with pytest.raises(ValueError, match=message):
            budget_of(value, **arguments)
