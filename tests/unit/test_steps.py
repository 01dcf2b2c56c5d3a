"""How often running jobs are looked at."""

from __future__ import annotations

import pytest

from worker.following import look_pause


@pytest.mark.parametrize(
    ("age", "running", "pause"),
    [
        (0, 1, 1.0),
        (59.9, 10, 1.0),
        (59.9, 40, 4.0),
        (0, 100, 10.0),
        (0, 1000, 10.0),
        (60, 1, 5.0),
        (60, 50, 5.0),
        (60, 70, 7.0),
        (3600, 1000, 10.0),
    ],
)
def test_each_second_unless_there_are_many_or_it_runs_for_long(
    age: float, running: int, pause: float
) -> None:
    assert look_pause(age, running) == pause


def test_a_hundred_jobs_cost_as_much_as_ten() -> None:
    assert 100 / look_pause(0, 100) == 10 / look_pause(0, 10)
