"""Plans of searches and trainings: the arguments of public functions, validated when created."""

import dataclasses
import inspect

import keras
import numpy as np
import pytest

from lottery_ticket_pruner import training
from lottery_ticket_pruner.learned import LearningPlan, learn_supermask
from lottery_ticket_pruner.search_plans import (
    ControlPlan,
    Listeners,
    PruningPlan,
    SearchPlan,
    taken,
)
from lottery_ticket_pruner.tickets import (
    SearchData,
    TicketSearch,
    find_ticket,
    search,
    train_to_rewinding_point,
)
from lottery_ticket_pruner.training import ArrayDataset, TrainingPlan
from lottery_ticket_pruner.training.plans import EpochPlan
from searches import SHORT, assert_equal, make_model


def plan_of(pruning=None, **options):
    return SearchPlan(
        training=TrainingPlan(**SHORT | options),
        pruning=PruningPlan(**{"rounds": 1} | (pruning or {})),
        control=ControlPlan(controls=("random_mask",)),
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("front", "plans", "others"),
    [
        (
            find_ticket,
            (TrainingPlan, PruningPlan, ControlPlan, Listeners),
            {"model", "x", "y", "validation_data", "test_data", "replicate", "checkpoint"},
        ),
        (
            training.train,
            (TrainingPlan, training.Listeners),
            {"model", "x", "y", "sample_weight", "validation_data"},
        ),
        (
            training.fit,
            (EpochPlan,),
            {"model", "x", "y", "sample_weight", "class_weight", "validation_data"}
            | {"validation_split"},
        ),
        (
            learn_supermask,
            (TrainingPlan, LearningPlan),
            {"model", "x", "y", "test_data", "validation_data", "on_progress"},
        ),
    ],
)
def test_flat_signatures_have_the_fields_and_defaults_of_their_plans(front, plans, others):
    taken_there = dict(inspect.signature(front).parameters)
    # Only `prune` ends trainings early, and only searches report what was trained.
    not_arguments = {"training", "ends", "on_training"}
    fields = {field.name: field for plan in plans for field in dataclasses.fields(plan)}
    # Searches and learned masks are evaluated in batches of the engine's choice.
    not_here = {"validation_batch_size"} if front in (find_ticket, learn_supermask) else set()
    assert taken_there.keys() - others == fields.keys() - not_arguments - not_here
    for name in taken_there.keys() - others:
        default = fields[name].default
        if default is not dataclasses.MISSING:
            assert taken_there[name].default == default, name


@pytest.mark.once
def test_names_of_compared_arguments_in_checkpoints_do_not_change(data):
    """With a new or changed name, all existing states on disk would be refused."""
    plan = plan_of({"kept": "constant"}, augment=None)
    examples = ArrayDataset.of(*data)
    under_way = TicketSearch(
        make_model(), SearchData(data), examples, None, plan, Listeners()
    )  # fmt: skip
    assert under_way.arguments().keys() == {
        "rounds", "steps", "rewind_to", "rate", "sparsity", "scope", "retraining", "controls",
        "control_rounds", "seed", "strategy", "kept", "pruned", "batch_size", "eval_every",
        "augment", "optimizer", "loss", "metrics", "layers", "initial_weights", "data",
        "validation_data", "test_data",
    }  # fmt: skip
    assert under_way.arguments()["controls"] == ["random_mask"]


@pytest.mark.once
def test_a_search_by_plans_is_that_of_the_front(data):
    by_plan = search(make_model(), SearchData(data, data, data), plan_of({"rewind_to": 2}, seed=3))
    by_front = find_ticket(
        make_model(), *data, rounds=1, rewind_to=2, controls=("random_mask",), seed=3,
        validation_data=data, test_data=data, **SHORT,
    )  # fmt: skip
    assert_equal(by_plan.ticket.get_weights(), by_front.ticket.get_weights())
    rows = [[{**row, "seconds": 0} for row in each.rows] for each in (by_plan, by_front)]
    assert rows[0] == rows[1]


@pytest.mark.once
def test_the_rewinding_point_is_that_of_every_search_with_the_seed(data, masked):
    found = find_ticket(masked, *data, rounds=1, rewind_to=2, controls=(), seed=5, **SHORT)
    alone = make_model()
    plan = TrainingPlan(**SHORT | {"steps": 2}, seed=5)
    train_to_rewinding_point(alone, ArrayDataset.of(*data), plan)
    assert_equal(alone.get_weights(), found.initial_weights)
    other = make_model()
    train_to_rewinding_point(other, ArrayDataset.of(*data), dataclasses.replace(plan, seed=6))
    assert (other.get_weights()[0] != found.initial_weights[0]).any()


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.0}, r"`steps` must be an integer. Received: steps=2\.0"),
        ({"batch_size": "20"}, "`batch_size` must be an integer. Received: batch_size='20'"),
        ({"eval_every": 0.5}, r"`eval_every` must be an integer. Received: eval_every=0\.5"),
        ({"eval_every": 0}, "eval_every >= 1 or None. Received: .*eval_every=0"),
        ({"steps": -1}, "Expected steps >= 0"),
        ({"validation_batch_size": 0}, "a batch size of at least 1 for evaluation. Received: 0"),
    ],
)
def test_numbers_are_checked_where_a_plan_is_made(data, options, message):
    with pytest.raises(ValueError, match=message):
        TrainingPlan(**SHORT | options)
    model = make_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        training.train(model, *data, **SHORT | options)
    assert_equal(model.get_weights(), before)


@pytest.mark.once
def test_a_plan_takes_options_by_the_names_of_its_fields():
    @dataclasses.dataclass
    class Options:
        steps: int = 7
        batch_size: int = 5
        strategy: str = "random"

    plan = taken(TrainingPlan, Options(), seed=3, batch_size=6)
    assert plan == TrainingPlan(steps=7, batch_size=6, seed=3)


@pytest.mark.once
def test_data_are_put_on_the_device_once_for_all_arms(data, monkeypatch):
    made = []
    original = keras.ops.convert_to_tensor

    def counted(array, *args, **kwargs):
        if isinstance(array, np.ndarray) and array.shape == data[0].shape:
            made.append(array)
        return original(array, *args, **kwargs)

    monkeypatch.setattr(keras.ops, "convert_to_tensor", counted)
    find_ticket(make_model(), *data, rounds=1, rewind_to=2, controls=("random_mask",), **SHORT)
    assert len(made) <= 1
