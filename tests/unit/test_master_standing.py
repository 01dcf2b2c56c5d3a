"""Every state that a job of ours can be found in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.master.standing import Standing, standing, whereabouts
from worker.master.wire import Job

MADE = datetime(2026, 11, 24, 19, 0, 0, 123456, UTC)
MINE = Job.model_validate(
    {"id": "j", "status": "processing", "node_id": "us", "retry_count": 1}
    | {"created_at": "2026-11-24T19:00:00.123456789Z"}
)


def test_the_time_is_read() -> None:
    assert MINE.created_at == MADE


def there(**fields: Any) -> Job:
    return MINE.model_copy(update=fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Standing.OURS),
        ({"status": "running"}, Standing.OURS),
        ({"status": "assigned"}, Standing.OURS),
        ({"status": "a state of tomorrow"}, Standing.OURS),
        ({"status": ""}, Standing.OURS),
        ({"node_id": ""}, Standing.OURS),
        ({"node_id": "us-too"}, Standing.OURS),
        ({"created_at": None}, Standing.OURS),
        ({"status": "paused"}, Standing.PAUSED),
        ({"status": "paused", "node_id": "them"}, Standing.ELSEWHERE),
        ({"status": "canceled"}, Standing.CANCELED),
        ({"status": "cancelled"}, Standing.CANCELED),
        ({"status": "canceled", "node_id": ""}, Standing.CANCELED),
        ({"status": "pending", "node_id": ""}, Standing.PENDING),
        ({"status": "queued", "node_id": "", "retry_count": 2}, Standing.PENDING),
        ({"status": "retrying"}, Standing.PENDING),
        ({"status": "completed"}, Standing.ENDED),
        ({"status": "completed", "node_id": "them"}, Standing.ENDED),
        ({"status": "failed"}, Standing.ENDED),
        ({"status": "timed_out"}, Standing.ENDED),
        ({"status": "timeout"}, Standing.ENDED),
        ({"status": "rejected"}, Standing.ENDED),
        ({"node_id": "them"}, Standing.ELSEWHERE),
        ({"node_id": "them", "retry_count": 2}, Standing.ELSEWHERE),
        ({"node_id": "them", "status": "a state of tomorrow"}, Standing.ELSEWHERE),
    ],
)
def test_standing(fields: dict[str, Any], expected: Standing) -> None:
    assert standing(there(**fields), MINE, {"us-too"}) is expected


@pytest.mark.parametrize("retry", [0, 2, 3])
def test_any_retry_under_an_id_of_ours_is_ours(retry: int) -> None:
    for node_id in ("us", "us-too"):
        found = standing(there(retry_count=retry, node_id=node_id), MINE, {"us-too"})
        assert found is Standing.OURS


def test_whose_a_job_is_cannot_be_told_without_an_id_of_ours() -> None:
    nobodys = MINE.model_copy(update={"node_id": ""})
    assert standing(there(node_id="them"), nobodys, ()) is Standing.OURS
    assert standing(there(node_id="them"), nobodys, {"us"}) is Standing.ELSEWHERE


@pytest.mark.parametrize("status", ["processing", "paused", "canceled", "pending", "completed"])
def test_a_job_made_at_another_time_is_another_one(status: str) -> None:
    for apart in (timedelta(seconds=1), timedelta(days=-3)):
        another = there(status=status, created_at=MADE + apart)
        assert standing(another, MINE, {"us"}) is Standing.ANOTHER


@pytest.mark.parametrize(
    "written",
    ["2026-11-24T19:00:00Z", "2026-11-24T14:00:00.123456789-05:00", "2026-11-24T19:00:00.12Z"],
)
def test_the_same_time_may_be_written_otherwise(written: str) -> None:
    same = Job.model_validate({"id": "j", "status": "paused", "created_at": written})
    assert same.created_at is not None
    assert standing(same, MINE, ()) is Standing.PAUSED


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"status": "completed"}, "completed"),
        ({"status": "to\x1b[31m\n"}, "to [31m"),
        ({"status": ""}, "without a state"),
        ({"node_id": "th\nem"}, "with node th em"),
        (
            {"created_at": MADE + timedelta(days=1)},
            "another job, made at 2026-11-25 19:00:00.123456+00:00, that has the same id",
        ),
    ],
)
def test_where_it_is(fields: dict[str, Any], said: str) -> None:
    job = there(**fields)
    assert whereabouts(job, standing(job, MINE, ())) == said
