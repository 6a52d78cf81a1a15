"""Budgets of single weights: multiply-adds by brute force, latency with made-up times."""

import itertools

import numpy as np
import pytest

from lottery_ticket_pruner import Latency, selection
from lottery_ticket_pruner.selection import comparisons, weight_budgets
from lottery_ticket_pruner.selection.served_latency import within_served_latency

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
SHAPES = {"conv": (2, 2), "dense": (3, 2)}
COSTS = selection.MultiplyAdds({"conv": 9, "dense": 2}, 5, {"conv": 4, "dense": 6})


def weights(masks=None):
    return {
        path: selection.Weights(
            mask=np.ones(shape, bool) if masks is None else masks[path],
            current=RNG.normal(size=shape),
        )
        for path, shape in SHAPES.items()
    }


def pruned(kernels, share, **arguments):
    request = selection.Request.of("smallest_weights", budget={"macs": share}, **arguments)
    return selection.select(request, kernels, probe=COSTS)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_no_other_weights_are_worth_more_for_as_many_multiply_adds(share):
    kernels = weights()
    masks = pruned(kernels, share, scope="global")
    left = COSTS.of(masks)
    flat = np.concatenate([np.abs(kernel.current).ravel() for kernel in kernels.values()])
    cost = np.repeat([9, 2], [4, 6])
    kept = np.concatenate([masks[path].ravel() for path in kernels])
    assert left == 5 + cost[kept].sum() <= share * COSTS.dense
    # Of all sets of weights with as many multiply-adds or fewer, this one has the largest sum.
    sets = np.array(list(itertools.product([False, True], repeat=10)))
    affordable = sets[sets @ cost + 5 <= left]
    assert flat[kept].sum() == pytest.approx((affordable @ flat).max())
    # The next weight in the ranking would not fit.
    after = np.argmax(np.where(kept, -np.inf, flat / cost))
    assert left + cost[after] > share * COSTS.dense


def test_no_more_is_tried_than_a_distribution_with_dense_kernels_allows():
    kernels = {
        path: selection.Weights(mask=np.ones(shape, bool), current=RNG.normal(size=shape))
        for path, shape in {"first": (10, 10), "last": (10, 30)}.items()
    }
    distribution = {"name": "uniform", "dense_last": True}
    request = selection.Request.of(
        "smallest_weights", budget={"macs": 0.5}, distribution=distribution
    )
    assert weight_budgets._most(request, kernels) == pytest.approx(0.25, abs=2e-4)


@pytest.mark.parametrize("before", [None, "dense"])
def test_layers_get_the_smallest_sparsity_that_fits(before):
    masks = {path: np.ones(shape, bool) for path, shape in SHAPES.items()}
    if before:
        masks["dense"][:2] = False
    kernels = weights(masks)
    found = pruned(kernels, 0.6)
    counts = []  # By the rule of the library: floor(sparsity * size) are pruned of each.
    for k in range(10):
        kept = {p: min(masks[p].sum(), masks[p].size - k * masks[p].size // 10) for p in SHAPES}
        counts.append((5 + 9 * kept["conv"] + 2 * kept["dense"], kept))
    _, expected = next(pair for pair in counts if pair[0] <= 0.6 * COSTS.dense)
    assert {path: mask.sum() for path, mask in found.items()} == expected
    assert all((masks[path] >= mask).all() for path, mask in found.items())


def test_given_scores_rank_in_one_pass_as_in_several():
    kernels = weights()
    scores = {path: -np.abs(kernel.current) for path, kernel in kernels.items()}
    request = selection.Request.of("smallest_weights", sparsity=0.3)
    for again in (False, True):  # not the criterion's, which are the opposite
        masks = comparisons.ranked_by(request, kernels, scores).prune(
            {"sparsity": 0.3}, again=again
        )
        kept = [masks[path] for path in kernels]
        values = np.concatenate([np.abs(kernels[path].current).ravel() for path in kernels])
        np.testing.assert_array_equal(
            np.concatenate([mask.ravel() for mask in kept]), values < np.sort(values)[7]
        )


def test_what_multiply_adds_cannot_do_is_an_error():
    with pytest.raises(ValueError, match=r"cannot be met.* 0\.\d+ are left \(\d+ of 53\)"):
        pruned(weights(), 0.1)
    request = selection.Request.of("smallest_weights", budget={"macs": 0.5})
    with pytest.raises(ValueError, match=r"LotteryTicketPruner\.update_masks"):
        selection.select(request, weights())
    for name in ("macs", "latency"):
        with pytest.raises(ValueError, match="determines how many weights are kept"):
            selection.Request.of("smallest_weights", budget={name: 0.5}, structure="2:4")
    nothing = selection.MultiplyAdds({}, 5, {})
    with pytest.raises(ValueError, match=r"None of the weights .* takes part"):
        selection.select(request, weights(), probe=nothing)


class Probe:
    """Made-up programs, which take a multiple of what the times of their products predict.

    Args:
        limit: The budget, as a share of the dense program.
        factor: The multiple for programs with sparse kernels.
    """

    def __init__(self, limit, factor=1.0):
        grid = (0.7, 0.9, 0.999)
        loads = {"a": (0.4, (0.5, 0.2, 0.1)), "b": (0.3, (0.2, 0.1, 0.01)), "c": (0.2, (1, 1, 0.3))}
        self.products = [
            selection.Product({path: 1000}, dense / limit, grid, [each / limit for each in sparse])
            for path, (dense, sparse) in loads.items()
        ]
        self.rest, self.factor, self.calls, self.timed = 0.1 / limit, factor, [], 0

    def loads(self):
        self.timed += 1
        return selection.Loads(self.products, self.rest)

    def __call__(self, masks, *, predicted):
        sparsities = {path: float(mask[0]) for path, mask in masks.items()}
        load = predicted_load(self, sparsities)
        if any(sparsities.values()):
            load *= self.factor
        self.calls.append((predicted, load))
        return load


def predicted_load(probe, sparsities):
    return selection.Loads(probe.products, probe.rest).predicted(sparsities)


def search(probe, limit, now=0.0, losses=None):
    """Returns the sparsities, which stand for masks here."""
    now = dict.fromkeys("abc", now)

    def masks_at(sparsities):
        return {path: np.array([{**now, **sparsities}[path]]) for path in now}

    masks = within_served_latency(Latency(limit), probe, now, masks_at, losses)
    return {path: float(mask[0]) for path, mask in masks.items()}


@pytest.mark.parametrize("limit", [0.8, 0.5, 0.45])
def test_kernels_that_gain_get_the_smallest_common_sparsity(limit):
    probe = Probe(limit)
    found = search(probe, limit)
    assert found["c"] == 0.0  # It never becomes faster.
    pruned = {sparsity for sparsity in found.values() if sparsity}
    assert len(pruned) == 1
    (sparsity,) = pruned
    assert predicted_load(probe, found) <= 1

    def load_at(s):
        return predicted_load(
            probe,
            {p: s if each.load(s) < each.dense else 0.0 for p, each in by_path(probe).items()},
        )

    assert load_at(sparsity - 1e-4) > 1
    assert len(probe.calls) == 1  # The first prediction was right.


def by_path(probe):
    return {path: each for each in probe.products for path in each.sizes}


# With 0.6, a sum is 1 or above 1 by its last bit, depending on how `sum` of this Python rounds.
@pytest.mark.parametrize("limit", [0.8, 0.61, 0.45, 0.42])
def test_globally_the_least_is_lost(limit):
    losses = {"a": lambda s: s**2, "b": lambda s: 3 * s**4, "c": lambda s: s}
    probe = Probe(limit)
    found = search(probe, limit, losses=losses)
    assert predicted_load(probe, found) <= 1
    # Against all combinations on a fine grid.
    grid = [0.0, *np.linspace(0.7, 0.999, 60)]
    best = min(
        losses["a"](a) + losses["b"](b)
        for a, b in itertools.product(grid, grid)
        if predicted_load(probe, {"a": a, "b": b, "c": 0.0}) <= 1
    )
    lost = sum(losses[path](sparsity) for path, sparsity in found.items())
    assert lost <= 1.03 * best


@pytest.mark.parametrize("factor", [1.3, 0.8])
def test_wrong_predictions_are_corrected(factor):
    probe = Probe(0.6, factor)
    search(probe, 0.6)
    predicted, load = probe.calls[-1]
    assert 0.85 <= load <= 1
    assert load == pytest.approx(predicted, rel=0.05)
    assert 2 <= len(probe.calls) <= 3


@pytest.mark.parametrize(
    ("limit", "now", "factor"), [(1, 0.0, 1.0), (0.65, 0.9, 1.0), (0.4, 0.9, 0.6)]
)
def test_a_budget_that_is_met_prunes_nothing_and_times_no_kernels(limit, now, factor):
    """Also if products would be predicted to be too slow."""
    probe = Probe(limit, factor)
    assert search(probe, limit, now=now) == dict.fromkeys("abc", now)
    assert len(probe.calls) == 1
    assert probe.timed == 0
    assert probe.calls[0][0] is None  # Nothing is predicted.


def test_a_program_that_met_the_budget_is_not_forgotten_for_a_later_one():
    class Noisy(Probe):
        def __call__(self, masks, *, predicted):
            super().__call__(masks, predicted=predicted)
            return [0.6, 4.0, 1.2, 1.2, 1.2][len(self.calls) - 1]

    probe = Noisy(0.5)
    first = search(Probe(0.5), 0.5)
    assert search(probe, 0.5) == first
    assert len(probe.calls) > 2


def of_scores(scores):
    """Prunes kernels "a" and "b", which can save as much, by given scores."""
    kernels = {p: selection.Weights(mask=np.ones(1000, bool), current=scores[p]) for p in "ab"}
    probe = Probe(0.65)
    probe.products = [selection.Product({p: 1000}, 0.7, (0.5, 0.999), (0.2, 0.1)) for p in "ab"]

    def scored(group):
        return np.select(
            [group.current == -1, group.current == -2], [np.inf, np.nan], group.current
        )

    request = selection.Request.of(scored, budget={"latency": 0.65}, scope="global")
    return selection.select(request, kernels, probe=probe), probe


def test_infinite_scores_are_kept_as_long_as_others_can_be_pruned():
    masks, _ = of_scores({"a": np.full(1000, -1.0), "b": np.arange(1000.0)})
    assert masks["a"].all()
    assert not masks["b"].all()


def test_nan_scores_are_an_error_before_anything_is_timed():
    scores = {"a": np.arange(1000.0), "b": np.full(1000, 1e9)}
    scores["b"][3] = -2
    with pytest.raises(ValueError, match=r"'b'.*NaN"):
        of_scores(scores)


def test_a_jump_of_the_times_is_measured_once():
    """Between loads of 1.6 and 0.7 there is nothing to find."""
    probe = Probe(0.5)
    probe.products = [selection.Product(dict.fromkeys("abc", 1000), 1.4, (0.7, 0.999), (0.5, 0.4))]
    assert list(search(probe, 0.5).values()) == pytest.approx([0.7] * 3)
    assert len(probe.calls) == 1


def test_what_cannot_be_reached_says_the_smallest_latency():
    with pytest.raises(ValueError, match=r"at most 0\.3 of .* pruning single weights: 0\.4\d* of"):
        search(Probe(0.3), 0.3)


def test_if_no_program_is_fast_enough_the_fastest_is_taken():
    class AlwaysSlow(Probe):
        def __call__(self, masks, *, predicted):
            super().__call__(masks, predicted=predicted)
            return 1.05 + 0.01 * len(self.calls)

    probe = AlwaysSlow(0.7)
    found = search(probe, 0.7)
    assert 1 < len(probe.calls) <= 5
    assert predicted_load(probe, found) == pytest.approx(1, abs=1e-3)  # The first one.
