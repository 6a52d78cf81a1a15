"""Schedules: values by their formulas, steps at which masks change, names and configurations."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lottery_ticket_pruner import schedules
from lottery_ticket_pruner.schedules import Constant, Function, Geometric, Polynomial

pytestmark = pytest.mark.once

ALL = [
    Constant(0.5, begin_step=3),
    Constant(0.5, 0, 40, 10),
    Polynomial(0.2, 0.9, 10, 50, power=2, frequency=7),
    Geometric(0.0, 0.99, 5, 105, frequency=20),
]


def test_polynomial_follows_the_papers_formula():
    # Zhu & Gupta: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with n = 4 changes every dt = 10.
    schedule = Polynomial(0.0, 0.8, begin_step=20, end_step=60, frequency=10)
    expected = [0.0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8]
    assert [schedule(step) for step in range(20, 61, 10)] == pytest.approx(expected)
    assert (schedule(0), schedule(1000)) == (0.0, 0.8)


def test_geometric_drops_the_same_share_at_every_change():
    schedule = Geometric(0.5, 0.95, begin_step=100, end_step=500, frequency=100)
    left = np.array([1 - schedule(step) for step in range(100, 501, 100)])
    np.testing.assert_allclose(left[1:] / left[:-1], (0.05 / 0.5) ** (1 / 4))
    assert (left[0], left[-1]) == pytest.approx((0.5, 0.05))


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Constant(0.5, begin_step=3, frequency=4), [3, 7, 11, 15, 19]),
        (Constant(0.5, 2, 9, 3), [2, 5, 8]),
        (Polynomial(0, 0.5, 5, 15, frequency=5), [5, 10, 15]),
        (Function(lambda step: 0.1, frequency=8), [0, 8, 16]),
    ],
)
def test_masks_change_from_the_first_step_to_the_last(schedule, steps):
    assert [step for step in range(20) if schedule.due(step)] == steps


@given(
    st.sampled_from([Polynomial, Geometric]),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(0, 50),
    st.integers(1, 50),
)
def test_ramps_go_from_one_sparsity_to_the_other_without_turning(cls, first, last, begin, length):
    schedule = cls(first, last, begin, begin + length)
    values = [schedule(step) for step in range(begin + length + 3)]
    differences = np.diff(values) * np.sign(last - first)
    assert (differences >= -1e-12).all()
    assert values[begin] == pytest.approx(first, abs=1e-12)
    assert values[begin + length] == values[-1] == pytest.approx(last, abs=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_schedule_survives_its_configuration(schedule):
    config = json.loads(json.dumps(schedule.get_config()))
    again = schedules.get(config)
    assert type(again) is type(schedule)
    assert again.get_config() == schedule.get_config()
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [(again(s), again.due(s)) for s in range(120)] == [
        (schedule(s), schedule.due(s)) for s in range(120)
    ]
    assert repr(eval(repr(schedule))) == repr(schedule)


def test_schedules_are_equal_by_class_and_arguments():
    def halves(step):
        return 0.5

    others = [
        Constant(0.25, begin_step=3),
        Constant(0.5),
        Polynomial(0.2, 0.9, 10, 50, power=3, frequency=7),
        Geometric(0.2, 0.9, 10, 50, frequency=7),
        Function(halves),
        Function(halves, frequency=7),
        Function(lambda step: 0.5),
    ]
    assert len({*ALL, *others}) == len(ALL) + len(others)
    assert Function(halves) == schedules.get(halves)
    assert Constant(0.5) == schedules.get(0.5) != 0.5
    assert Polynomial(0, 0.5, 0, 9, power=3) == Polynomial(0, 0.5, 0, 9, power=3.0)
    assert len({Polynomial(0, 0.5, 0, 9, power=3), Polynomial(0, 0.5, 0, 9, power=3.0)}) == 1


@pytest.mark.parametrize("cls", [Polynomial, Geometric])
def test_a_ramp_of_no_length_is_a_step(cls):
    schedule = cls(0.25, 0.75, begin_step=10, end_step=10, frequency=3)
    assert [schedule(step) for step in (0, 9, 10, 11, 99)] == [0.25, 0.25, 0.75, 0.75, 0.75]
    assert [step for step in range(50) if schedule.due(step)] == [10]
    assert schedules.get(schedule.get_config()) == schedule


def test_numbers_of_numpy_can_be_stored():
    schedule = Constant(np.float32(0.5), np.int64(3), np.int32(9), np.int16(2))
    assert json.loads(json.dumps(schedule.get_config())) == Constant(0.5, 3, 9, 2).get_config()


def test_a_registered_function_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(schedules, "_REGISTRY", schedules._REGISTRY.copy())

    @schedules.register("staircase")
    def staircase(step):
        return min(step // 10, 9) / 10

    assert schedules.names() == ["constant", "polynomial", "geometric", "staircase"]
    assert schedules.get("staircase")(57) == 0.5
    config = schedules.get({"name": "staircase", "frequency": 10}).get_config()
    assert config == {"name": "staircase", "begin_step": 0, "end_step": None, "frequency": 10}
    assert schedules.get(config).due(30)
    with pytest.raises(ValueError, match="taken by"):
        schedules.register("staircase")(lambda step: 0.0)


def test_a_registered_class_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(schedules, "_REGISTRY", schedules._REGISTRY.copy())

    class Linear(schedules.Schedule):
        def __init__(self, slope, frequency=100):
            super().__init__(frequency=frequency)
            self.slope = slope

        def sparsity(self, step):
            return self.slope * step

    assert repr(Linear(0.1)) == "Linear(slope=0.1, frequency=100)"
    schedules.register("linear")(Linear)
    config = Linear(0.01, 5).get_config()
    assert config == {"name": "linear", "slope": 0.01, "frequency": 5}
    assert schedules.get(config)(50) == 0.5


def test_schedules_without_a_configuration_can_still_be_printed_and_compared(monkeypatch):
    monkeypatch.setattr(schedules, "_REGISTRY", schedules._REGISTRY.copy())

    def make():  # Like a notebook cell that is run twice.
        @schedules.register("cell")
        def cell(step):
            return 0.5

        @schedules.register("class_of_cell")
        class Cell(schedules.Schedule):
            def __init__(self, top, **others):
                super().__init__(**others)
                self._top = top

            def sparsity(self, step):
                return self._top

        return Function(cell, 3), Cell(0.5, begin_step=3), Cell(0.6, begin_step=3)

    for earlier, later in zip(make(), make(), strict=True):
        assert "begin_step=3" in repr(earlier)
        assert earlier == earlier != later
    _, one, other = make()
    assert one != other
    assert one == type(one)(0.5, begin_step=3)


def test_get_takes_numbers_and_functions():
    assert schedules.get(0.75)(123) == 0.75
    own = schedules.get(lambda step: step / 1000)
    assert own(500) == 0.5
    assert [step for step in range(250) if own.due(step)] == [0, 100, 200]
    assert schedules.get(ALL[0]) is ALL[0]


def test_get_takes_the_configurations_of_tfmot():
    config = {"target_sparsity": 0.5, "begin_step": 2, "end_step": -1, "frequency": 3}
    schedule = schedules.get({"class_name": "ConstantSparsity", "config": config})
    assert schedule.get_config() == Constant(0.5, 2, None, 3).get_config()
    with pytest.raises(ValueError, match="Unknown schedule class 'Own'"):
        schedules.get({"class_name": "Own", "config": {}})


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("cosine", "Unknown schedule 'cosine'. Known are: constant, polynomial, geometric"),
        ("polynomial", "cannot be created from the arguments {}"),
        ({"name": "constant", "power": 3}, "unexpected keyword argument 'power'"),
        ({}, "Unknown schedule None"),
        (None, "Received: None of type NoneType"),
        (Polynomial, "Received: <class"),
        (1.0, r"`sparsity` must be a number in \[0, 1\)"),
    ],
)
def test_get_refuses_everything_but_schedules(identifier, message):
    with pytest.raises(ValueError, match=message):
        schedules.get(identifier)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-0.1), "`sparsity`"),
        (lambda: Constant(0.5, -1), "`begin_step` must be an integer of at least 0"),
        (lambda: Constant(0.5, 5, 4), "`end_step` must be an integer of at least 5"),
        (lambda: Constant(0.5, frequency=0), "`frequency` must be an integer of at least 1"),
        (lambda: Constant(0.5, begin_step=1.5), "Received: begin_step=1.5"),
        (lambda: Polynomial(0, 1, 0, 10), "`final_sparsity`"),
        (lambda: Geometric(0, 0.5, 10, 9), "`end_step` must be an integer of at least 10"),
        (lambda: Polynomial(0, 0.5, 10, None), "`end_step` must be .* Received: end_step=None"),
        (lambda: Constant(False), "`sparsity` must be .* Received: sparsity=False"),
        (lambda: Constant(float("nan")), "`sparsity`"),
        (lambda: Constant(0.5, True), "`begin_step`"),
        (lambda: Constant(0.5, frequency=float("inf")), "`frequency`"),
        *[
            (lambda power=power: Polynomial(0, 0.5, 0, 10, power=power), "`power` must be a finite")
            for power in (-1, 0, float("nan"), float("inf"), True, "3", None)
        ],
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
