from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.master.retry import Backoff, Throttle


def highest(low: float, high: float) -> float:
    return high


def test_the_step_doubles_up_to_the_cap() -> None:
    backoff = Backoff(1.0, 10.0, uniform=highest)
    assert [backoff.next() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_reset_starts_over() -> None:
    backoff = Backoff(1.0, 10.0, uniform=highest)
    backoff.next()
    backoff.next()
    backoff.reset()
    assert backoff.next() == 1.0


def test_jitter_is_full() -> None:
    asked: list[tuple[float, float]] = []

    def note(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    backoff = Backoff(2.0, 60.0, uniform=note)
    assert backoff.next() == 0.0
    assert backoff.next() == 0.0
    assert asked == [(0.0, 2.0), (0.0, 4.0)]


def test_what_the_master_asks_for_is_never_undercut() -> None:
    backoff = Backoff(1.0, 10.0, uniform=lambda low, high: low)
    assert backoff.next(retry_after=17.0) == 17.0
    assert Backoff(1.0, 10.0, uniform=highest).next(retry_after=17.0) == 18.0


def test_the_larger_of_floor_and_retry_after_counts() -> None:
    backoff = Backoff(30.0, 270.0, floor=30.0, uniform=highest)
    assert backoff.next() == 60.0
    assert backoff.next(retry_after=5.0) == 90.0
    for _ in range(5):
        last = backoff.next()
    assert last == 300.0


@given(st.integers(1, 5000), st.floats(0, 100))
def test_it_stays_in_bounds_for_ever(attempts: int, retry_after: float) -> None:
    backoff = Backoff(0.5, 60.0)
    waits = [backoff.next(retry_after) for _ in range(attempts)]
    assert all(retry_after <= wait <= retry_after + 60.0 for wait in waits)


@pytest.mark.parametrize(("base", "cap", "floor"), [(0, 1, 0), (2, 1, 0), (1, 2, -1)])
def test_nonsense_is_refused(base: float, cap: float, floor: float) -> None:
    with pytest.raises(ValueError, match="base"):
        Backoff(base, cap, floor=floor)


def test_a_throttle_lets_one_through_a_minute() -> None:
    now = 100.0
    throttle = Throttle(60.0, clock=lambda: now)
    assert throttle.due()
    now = 159.0
    assert not throttle.due()
    now = 160.0
    assert throttle.due()
    assert not throttle.due()
    throttle.reset()
    assert throttle.due()


def test_a_throttle_grows_more_patient_until_the_trouble_is_over() -> None:
    now = 0.0
    throttle = Throttle(60.0, 240.0, clock=lambda: now)
    told = []
    for ten in range(100):
        now = 10.0 * ten
        if throttle.due():
            told.append(now)
    assert told == [0, 60, 180, 420, 660, 900]
    throttle.relax()
    now = 950.0
    assert not throttle.due(), "trouble that comes and goes is no news each time"
    now = 960.0
    assert throttle.due()
