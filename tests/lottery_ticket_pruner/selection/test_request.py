"""The pruning request, which is resolved once and passed on to selection."""

import dataclasses

import numpy as np
import pytest

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.selection import Request, Weights, select, select_many, update

RNG = np.random.default_rng(0)
WEIGHTS = {
    path: Weights(mask=np.ones((8, 6), bool), final=RNG.permutation(48).reshape(8, 6))
    for path in ("a/kernel", "b/kernel")
}

pytestmark = pytest.mark.once


def test_names_are_resolved_once_and_objects_are_not_changed():
    request = Request.of("large_final", structure="4x1", distribution="erk", sparsity=0.5)
    assert request.criterion is criteria.get("large_final")
    assert request.structure == structures.get("4x1")
    assert request.distribution == distributions.get("erk")
    assert request.scope == "layer"
    again = Request.of(
        request.criterion, structure=request.structure, distribution=request.distribution
    )
    assert again.criterion is request.criterion
    assert again.structure is request.structure
    assert again.distribution is request.distribution


def test_a_request_does_not_change():
    request = Request.of("large_final", rate=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.rate = 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "largest"}, "criterion"),
        ({"scope": "model"}, "`scope` must be one of"),
        ({"scope": "output", "structure": "filters"}, 'contradicts scope="output"'),
        ({"scope": "layer", "structure": "2:4"}, "determines how many weights are kept"),
        ({"distribution": "even"}, "distribution"),
        ({"distribution": "erk", "budget": {"latency": 0.5}}, "leave out .*`distribution`"),
        ({"distribution": "erk", "budget": {"macs": 0.5}, "structure": "4x1"}, "leave out"),
        ({"seed": -1}, "non-negative integer"),
    ],
)
def test_requests_refuse_everything_that_needs_no_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request.of(**{"criterion": "large_final"} | arguments)


def test_the_fronts_select_by_the_request():
    request = Request.of("large_final", sparsity=0.5, scope="global", seed=3)
    expected = update("large_final", WEIGHTS, sparsity=0.5, scope="global", seed=3)
    (many,) = select_many(request, WEIGHTS, [0.5])
    for masks in (select(request, WEIGHTS), many):
        assert all((masks[path] == expected[path]).all() for path in WEIGHTS)


def test_evidence_is_measured_under_the_masks_of_each_round():
    seen = []

    def measure(masks):
        seen.append({path: int(mask.sum()) for path, mask in masks.items()})
        # The remaining weights of b become worthless after the first round.
        worth = {"a/kernel": 1.0, "b/kernel": 2.0 if len(seen) == 1 else 0.0}
        return {"gradient": {path: np.full((8, 6), worth[path]) for path in masks}}

    slow = criteria.Criterion(
        "slow", lambda group: group.gradient, frozenset({"gradient"}), scope="global", rounds=2
    )
    masks = select(Request.of(slow, sparsity=0.75), WEIGHTS, measure)
    # Densities decrease by the same factor: 96 -> 48 -> 24 weights.
    assert seen == [{"a/kernel": 48, "b/kernel": 48}, {"a/kernel": 0, "b/kernel": 48}]
    assert {path: int(mask.sum()) for path, mask in masks.items()} == {
        "a/kernel": 0,
        "b/kernel": 24,
    }


def test_a_criterion_measures_once_if_it_says_nothing_else():
    calls = []

    def measure(masks):
        calls.append(masks)
        return {"gradient": {path: np.ones(mask.shape) for path, mask in masks.items()}}

    mine = criteria.Criterion("mine", lambda group: group.gradient, frozenset({"gradient"}))
    select(Request.of(mine, sparsity=0.5), WEIGHTS, measure)
    assert len(calls) == 1


@pytest.mark.parametrize("structure", [None, "2x1"])
def test_invalid_amounts_of_several_rounds_are_those_of_one(structure):
    def measure(masks):
        return {"gradient": {path: np.ones(mask.shape) for path, mask in masks.items()}}

    slow = criteria.Criterion(
        "slow", lambda group: group.gradient, frozenset({"gradient"}), scope="global", rounds=2
    )
    with pytest.raises(ValueError, match=r"`sparsity` must be a number in \[0, 1\).*=1\.5 of"):
        select(Request.of(slow, sparsity=1.5, structure=structure), WEIGHTS, measure)


def test_without_measuring_there_is_one_round_of_the_evidence_given():
    given = {
        path: dataclasses.replace(weights, gradient=np.arange(48.0).reshape(8, 6))
        for path, weights in WEIGHTS.items()
    }
    calls = []

    def score(group):
        calls.append(group)
        return group.gradient

    slow = criteria.Criterion("slow", score, frozenset({"gradient"}), scope="global", rounds=5)
    masks = select(Request.of(slow, sparsity=0.5), given)
    assert len(calls) == 1
    assert all((mask == (np.arange(48).reshape(8, 6) >= 24)).all() for mask in masks.values())
