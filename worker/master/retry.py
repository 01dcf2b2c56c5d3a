"""How long to wait before asking again, and how often to complain meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

_MOST_DOUBLINGS = 32  # keeps 2**n from growing for ever; every cap is reached long before

Uniform = Callable[[float, float], float]


class Backoff:
    """Exponential backoff with full jitter: a random time between nothing and the step.

    The step is ``base`` seconds at first and doubles up to ``cap`` seconds. Full jitter
    spreads many workers that lost the same master at the same moment best (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    ``floor`` is in seconds too: a wait that is never undercut, with the jitter on top of it.
    """

    def __init__(
        self, base: float, cap: float, *, floor: float = 0.0, uniform: Uniform = random.uniform
    ) -> None:
        if not 0 < base <= cap or floor < 0:
            raise ValueError(f"not 0 < base <= cap, floor >= 0: {base=} {cap=} {floor=}")
        self._base = base
        self._cap = cap
        self._floor = floor
        self._uniform = uniform
        self._doublings = 0

    def next(self, retry_after: float | None = None) -> float:
        """Seconds to wait now. ``retry_after`` is what the master asked for, if it did.

        The jitter comes on top of that too: workers that were all told the same second
        should not all come back in that second.
        """
        step = min(self._cap, self._base * 2**self._doublings)
        self._doublings = min(self._doublings + 1, _MOST_DOUBLINGS)
        return max(self._floor, retry_after or 0.0) + self._uniform(0.0, step)

    def reset(self) -> None:
        """Start over with the first step, after a success."""
        self._doublings = 0


class Throttle:
    """Lets one complaint through at once, and then one each ``interval`` seconds.

    The interval doubles with each complaint, up to ``most`` seconds: an hour of the same
    trouble is worth a handful of lines.
    """

    def __init__(
        self,
        interval: float = 60.0,
        most: float = 1800.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first = self._interval = interval
        self._most = most
        self._clock = clock
        self._last: float | None = None

    def due(self) -> bool:
        """Whether to complain now; the caller does so if it is."""
        now = self._clock()
        if self._last is not None:
            if now - self._last < self._interval:
                return False
            self._interval = min(self._most, 2 * self._interval)
        self._last = now
        return True

    def relax(self) -> None:
        """The trouble is over; should it come and go, it is still told at most once an interval."""
        self._interval = self._first

    def reset(self) -> None:
        """The trouble is over: the next one is news again."""
        self._last = None
        self.relax()
