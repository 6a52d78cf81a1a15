"""Functions measured in turns, with a made-up clock."""

import pytest

from masked_layers import turns

pytestmark = pytest.mark.once


@pytest.fixture
def clock(monkeypatch):
    """A clock that functions advance; a list with one entry."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    return now


def test_functions_take_turns_in_changing_order(clock):
    called = []

    def function(name):
        called.append(name)
        clock[0] += 1
        return f"{name}{len(called)}"

    functions = {name: lambda name=name: function(name) for name in "ab"}
    found = turns.alternate(functions, rounds=(2, 5), seconds=7, warm=1)
    assert "".join(called) == "abbaabba"  # The fifth round would begin after 8 seconds.
    assert found == {"a": ["a4", "a5", "a8"], "b": ["b3", "b6", "b7"]}
    found = turns.alternate(functions, rounds=(2, 5), seconds=0, warm=1)
    assert [len(results) for results in found.values()] == [2, 2]
    found = turns.alternate(functions, rounds=(2, 5), seconds=1e9, warm=0)
    assert [len(results) for results in found.values()] == [5, 5]


@pytest.mark.parametrize("turn", [0.0, 0.25])
def test_short_calls_are_timed_together(clock, turn):
    counts = {"long": 0, "short": 0}

    def function(name, seconds):
        counts[name] += 1
        clock[0] += seconds

    functions = {
        "long": lambda: function("long", 2**-4),
        "short": lambda: function("short", 2**-6),
    }
    found = turns.seconds_per_call(
        functions, clock=lambda: clock[0], rounds=(3, 3), seconds=9, warm=1, turn=turn
    )
    assert found == {"long": [2**-4] * 3, "short": [2**-6] * 3}
    together = 4 if turn else 1
    assert counts == dict.fromkeys(counts, 2 + 4 * together)
