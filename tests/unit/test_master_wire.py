from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.master.wire import Job, JobResult, NodeRegistration, ResultAnswer, bounded, encode


def result(**fields: object) -> JobResult:
    return JobResult.model_validate(
        {"job_id": "j", "node_id": "n", "status": "completed", **fields}
    )


def test_fields_without_a_value_are_not_sent() -> None:
    sent = json.loads(encode(result()))
    assert set(sent) == {
        "job_id", "node_id", "status", "metrics", "analyzer_output", "completed_at",
    }  # fmt: skip


def test_a_registration_has_the_types_that_the_master_wants() -> None:
    registration = NodeRegistration(
        address="box", type="server", cpu_threads=8, cpu_model="A \u00b5 CPU", has_gpu=False,
        gpu_capabilities=["nvenc"], ram_total_bytes=1 << 33,
    )  # fmt: skip
    assert json.loads(encode(registration)) == {
        "address": "box",
        "type": "server",
        "cpu_threads": 8,
        "cpu_model": "A \u00b5 CPU",
        "has_gpu": False,
        "gpu_capabilities": ["nvenc"],
        "ram_total_bytes": 8589934592,
        "labels": {},
    }


def test_times_carry_a_zone() -> None:
    at = datetime(2026, 11, 24, 19, 0, 0, 123456, tzinfo=UTC)
    sent = json.loads(encode(result(completed_at=at)))
    assert sent["completed_at"] == "2026-11-24T19:00:00.123456+00:00"
    naive = json.loads(encode(result(completed_at=datetime(2026, 11, 24, 19))))  # noqa: DTZ001
    assert naive["completed_at"].endswith("+00:00")


def test_what_json_cannot_carry_is_replaced() -> None:
    body = encode(
        result(
            logs="caf\udce9.mp4 \u00e9 \x00",
            metrics={"fps": float("nan"), "speed": float("inf"), "pair": (1, 2.5), "raw": b"x"},
        )
    )
    sent = json.loads(body)
    assert sent["logs"] == "caf?.mp4 \u00e9 \x00"
    assert sent["metrics"] == {"fps": None, "speed": None, "pair": [1, 2.5], "raw": "b'x'"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_metrics_become_json(value: object) -> None:
    assert "value" in json.loads(encode(result(metrics={"value": value})))["metrics"]


def test_an_answer_may_be_anything() -> None:
    assert ResultAnswer.model_validate({"status": 7, "retry": "x", "new": 1}) == ResultAnswer()
    answer = ResultAnswer.model_validate({"status": "retrying", "retry": 2, "max_retries": 3})
    assert (answer.status, answer.retry, answer.max_retries) == ("retrying", 2, 3)


def test_a_jobs_odd_fields_are_kept_for_the_judge() -> None:
    job = Job.model_validate(
        {"id": "j", "sequence_number": "4", "parameters": 5, "created_at": "0001-01-01T00:00:00Z"}
    )
    assert (job.sequence_number, job.parameters, job.created_at) == (None, 5, None)


def test_a_large_job_that_fits_is_left_as_it_is() -> None:
    job = Job(id="a", parameters={"text": "a" * 100_000, "many": [0] * 3000})
    assert bounded(job) is job


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sequence_number": -1}, None), ({"sequence_number": 2**63}, None),
        ({"sequence_number": True}, None), ({"sequence_number": 1.0}, None),
        ({"sequence_number": "7"}, None), ({"sequence_number": 2**53}, 2**53),
        ({"retry_count": -5}, 0), ({"retry_count": 10**4000}, 0), ({"retry_count": [1]}, 0),
        ({"retry_count": 3}, 3), ({"max_retries": {}}, None),
        ({"created_at": "9" * 100_000}, None), ({"created_at": 1e300}, None),
        ({"created_at": "0000-00-00T00:00:00Z"}, None), ({"created_at": {"a": 1}}, None),
        ({"status": "x" * 100_000}, "x" * 1024), ({"status": 7}, ""),
        ({"status": "\ud800"}, "?"), ({"node_id": ["n"]}, ""),
        ({"node_id": "n" * 2000}, "n" * 1024),
    ],
)  # fmt: skip
def test_fields_of_a_job(fields: dict[str, Any], expected: object) -> None:
    (name,) = fields
    assert getattr(Job(id="a", **fields), name) == expected
