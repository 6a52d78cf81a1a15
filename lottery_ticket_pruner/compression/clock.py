"""The time of a search: what it took in all processes, and what is left of the time to spend."""

import math
import time


class OutOfTimeError(Exception):
    """Ends an attempt in the middle. The model is restored from a state before it is used again."""


class Stopwatch:
    """Measures the time since it was made, on a machine that may be busy with other things.

    A single thread is given less of its time then, and several threads take more than they need.
    """

    def __init__(self) -> None:
        self._elapsed, self._computed = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds that have elapsed, or those of the processor if they are fewer."""
        elapsed = time.perf_counter() - self._elapsed
        return min(elapsed, time.process_time() - self._computed)


class Clock:
    """Measures the time since the beginning of a search.

    Args:
        started: Value of `time.perf_counter` when this process began with the search.
        minutes: Time to spend, or None for any.
        reserve: Seconds of it that are needed after the search.

    Attributes:
        before: Seconds that earlier processes have spent on the search.
        reserve: Seconds that are needed after the last attempt.
    """

    def __init__(self, started: float, minutes: float | None, reserve: float) -> None:
        self._started = started
        self._minutes = minutes
        self.before = 0.0
        self.reserve = reserve

    @property
    def spent(self) -> float:
        """Seconds so far, without the time between processes."""
        return self.before + time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds that attempts may still take."""
        if self._minutes is None:
            return math.inf
        return 60 * self._minutes - self.reserve - self.spent

    def check(self) -> None:
        """Raises an error if no time is left.

        Raises:
            OutOfTimeError: If the time is over.
        """
        if self.left < 0:
            raise OutOfTimeError
