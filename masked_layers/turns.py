"""Measures functions in turns, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: tuple[int, int],
    seconds: float,
    warm: int,
) -> dict[str, list[Any]]:
    """Calls functions in turns, in changing order, and returns the results of counted rounds.

    Args:
        functions: The functions by name.
        rounds: The least and the greatest number of counted rounds.
        seconds: Time after which no further round begins, once there are enough.
        warm: Number of rounds before these, which are not counted.
    """
    results: dict[str, list[Any]] = {name: [] for name in functions}
    start = time.perf_counter()
    least, most = rounds
    for number in range(warm + most):
        if number >= warm + least and time.perf_counter() - start > seconds:
            break
        for name in sorted(functions, reverse=bool(number % 2)):
            result = functions[name]()
            if number >= warm:
                results[name].append(result)
    return results


def seconds_per_call(
    functions: Mapping[str, Callable[[], Any]],
    *,
    clock: Callable[[], Any] = time.perf_counter,
    rounds: tuple[int, int],
    seconds: float,
    warm: int,
    turn: float = 0.005,
) -> dict[str, list[Any]]:
    """Returns the seconds of a call of each function in each round, called in turns.

    Args:
        functions: The functions by name. Each is called twice before anything is measured.
        clock: Function that returns seconds: a number, or an array for several clocks.
        rounds: As in `alternate`.
        seconds: As in `alternate`.
        warm: As in `alternate`.
        turn: Seconds of a turn at least. Shorter calls are repeated in it and timed together.
    """
    longest = 0.0
    for function in functions.values():
        function()
        start = time.perf_counter()
        function()
        longest = max(longest, time.perf_counter() - start)
    count = max(1, int(turn / longest)) if longest else 1

    def timed(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            start = clock()
            for _ in range(count):
                function()
            return (clock() - start) / count

        return call

    turns = {name: timed(function) for name, function in functions.items()}
    return alternate(turns, rounds=rounds, seconds=seconds, warm=warm)
