"""The ledger: what is put on record comes back, step by step, and only in order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.errors import LedgerError
from worker.ledger import Entry, Ledger, State
from worker.ledger.entry import EVIDENCE_BYTES, LOG_CHARACTERS
from worker.master.wire import Job, JobResult

JOB = Job.model_validate(
    {
        "id": "a/b ü\x00",
        "sequence_number": 7,
        "node_id": "n",
        "retry_count": 2,
        "created_at": "2026-11-24T15:00:00.88228354Z",
        "parameters": {"bitrate": float("inf"), "x": ["\udfff", None, 1], "": "\x00"},
        "queue": 17,
    }
)
RESULT = JobResult(
    job_id=JOB.id,
    node_id="n",
    status="completed",
    metrics={"frames": 3},
    analyzer_output={"vmaf": 93.1},
    error="no\nü",
    logs="ü\x00",
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger.open(tmp_path / "ledger.db", clock=clock)
    yield ledger
    ledger.close()


def reopened(ledger: Ledger, path: Path) -> list[Entry]:
    """What another process would find."""
    ledger.close()
    again = Ledger.open(path)
    found = again.recent(100)
    again.close()
    return found


def test_a_life(ledger: Ledger, tmp_path: Path) -> None:
    entry = ledger.accept(JOB)
    assert (entry.job, entry.state, entry.result) == (JOB, State.ACCEPTED, None)
    assert entry.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    ledger.starting(entry.id, "input", "u-input.service", {})
    ledger.starting(entry.id, "main", "u.service", {"length": 1.5, "text": "\ud800"})
    [entry] = ledger.unreaped()
    assert entry.state is State.STARTED
    assert [*entry.steps] == ["input", "main"]
    assert entry.steps["main"].unit == "u.service"
    assert entry.steps["main"].facts == {"length": 1.5, "text": "\ud800"}
    assert (entry.started_at, entry.steps["main"].asked_at) == (1002.0, 1003.0)

    ledger.finish(entry.id, RESULT, {"cpu": 3})
    [entry] = ledger.unreaped()
    assert (entry.state, entry.result, entry.evidence) == (State.FINISHED, RESULT, {"cpu": 3})

    ledger.settle(entry.id, "delivered")
    [entry] = ledger.unreaped()
    assert (entry.state, entry.settled, entry.why) == (State.SETTLED, "delivered", "")

    ledger.reap(entry.id)
    assert ledger.unreaped() == []
    [entry] = reopened(ledger, tmp_path / "ledger.db")
    assert entry.state is State.REAPED
    assert entry.result == RESULT.model_copy(update={"logs": None, "analyzer_output": {}})
    assert entry.job == JOB
    assert (entry.accepted_at, entry.finished_at, entry.settled_at, entry.reaped_at) == (
        1001.0, 1004.0, 1005.0, 1006.0,
    )  # fmt: skip


def test_a_result_may_change_until_it_is_settled(ledger: Ledger) -> None:
    entry = ledger.accept(JOB)
    ledger.finish(entry.id, RESULT, {"a": 1})
    failed = RESULT.model_copy(update={"status": "failed"})
    ledger.finish(entry.id, failed, {"b": 2})
    [entry] = ledger.unreaped()
    assert (entry.result, entry.evidence) == (failed, {"b": 2})
    ledger.settle(entry.id, "delivered")
    with pytest.raises(ValueError, match="delivered already"):
        ledger.finish(entry.id, RESULT, {})


def test_a_result_that_its_model_would_not_read(ledger: Ledger) -> None:
    odd = RESULT.model_copy(
        update={"error": "\udc80", "logs": "\ud800x", "metrics": {"n": "\udc80"}}
    )
    ledger.finish(ledger.accept(JOB).id, odd, {})
    [entry] = ledger.unreaped()
    assert entry.result == odd.model_copy(update={"error": "?", "logs": "?x"})


def illegal(ledger: Ledger, entry_id: int) -> dict[str, Callable[[], object]]:
    return {
        "start": lambda: ledger.starting(entry_id, "main", "u", {}),
        "finish": lambda: ledger.finish(entry_id, RESULT, {}),
        "deliver": lambda: ledger.settle(entry_id, "delivered"),
        "drop": lambda: ledger.settle(entry_id, "dropped", "why"),
        "reissue": lambda: ledger.reissue(entry_id, JOB),
        "reap": lambda: ledger.reap(entry_id),
    }


@pytest.mark.parametrize(
    ("before", "refused"),
    [
        ([], {"deliver", "reap"}),
        (["start"], {"start", "deliver", "reap"}),
        (["finish"], {"start", "reap"}),
        (["finish", "deliver"], {"start", "finish", "drop", "reissue"}),
        (["drop"], {"start", "finish", "deliver", "reissue"}),
        (["drop", "reap"], {"start", "finish", "deliver", "reissue"}),
    ],
)
def test_steps_out_of_order_are_refused(
    ledger: Ledger, before: list[str], refused: set[str]
) -> None:
    entry_id = ledger.accept(JOB).id
    for step in before:
        illegal(ledger, entry_id)[step]()
    state = ledger.recent(1)
    for step in refused:
        with pytest.raises(ValueError):
            illegal(ledger, entry_id)[step]()
        assert ledger.recent(1) == state, step


def test_settling_and_reaping_may_be_repeated(ledger: Ledger) -> None:
    entry_id = ledger.accept(JOB).id
    ledger.settle(entry_id, "dropped", "the master \ud800 took it back")
    ledger.settle(entry_id, "dropped", "another reason")
    ledger.reap(entry_id)
    [entry] = ledger.recent(1)
    ledger.reap(entry_id)
    assert ledger.recent(1) == [entry]
    assert entry.why == "the master ? took it back"


@pytest.mark.parametrize("before", [False, True])
def test_settled_and_reaped_at_once(ledger: Ledger, before: bool) -> None:
    entry_id = ledger.accept(JOB).id
    ledger.finish(entry_id, RESULT, {})
    if before:
        ledger.settle(entry_id, "delivered")
    for _ in range(2):
        ledger.settle(entry_id, "delivered", reaped=True)
    [entry] = ledger.recent(1)
    assert (entry.state, entry.settled) == (State.REAPED, "delivered")
    assert ledger.unreaped() == []


@pytest.mark.parametrize(("how", "why"), [("", ""), ("lost", "x"), ("dropped", "")])
def test_settled_how_and_why(ledger: Ledger, how: str, why: str) -> None:
    with pytest.raises(ValueError, match="how and why"):
        ledger.settle(ledger.accept(JOB).id, how, why)


def test_an_unknown_entry_is_refused(ledger: Ledger) -> None:
    for step in illegal(ledger, 5).values():
        with pytest.raises(ValueError, match="no entry 5"):
            step()


@pytest.mark.parametrize(
    "other",
    [
        {"id": "a/b ü"},
        {"retry_count": 3},
        {"created_at": "2026-11-24T15:00:00.882284Z"},
        {"created_at": None},
    ],
)
def test_one_acceptance_is_told_from_another(ledger: Ledger, other: dict[str, Any]) -> None:
    entry = ledger.accept(JOB)
    assert ledger.find(JOB) == entry
    same = Job.model_validate({**dict(JOB), "created_at": "2026-11-24T16:00:00.882283999+01:00"})
    assert ledger.find(same) == entry
    fresh = Job.model_validate({**dict(JOB), **other})
    assert ledger.find(fresh) is None
    second = ledger.accept(fresh)
    assert ledger.find(fresh) == second != entry
    assert ledger.find(JOB) == entry


@pytest.mark.parametrize("edge", ["0002-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00"])
def test_times_at_the_edge_of_the_calendar(ledger: Ledger, edge: str) -> None:
    job = Job.model_validate({"id": "x", "created_at": edge})
    assert job.created_at is not None
    assert ledger.accept(job) == ledger.find(job)


def test_an_acceptance_is_put_on_record_once_until_it_is_settled(ledger: Ledger) -> None:
    entry = ledger.accept(JOB)
    ledger.starting(entry.id, "main", "u", {})
    assert ledger.accept(JOB).state is State.STARTED
    ledger.settle(entry.id, "dropped", "handed back")
    again = ledger.accept(JOB)
    assert (again.state, again.steps) == (State.ACCEPTED, {})
    assert again.id != entry.id
    assert ledger.find(JOB) == again


def test_a_reissued_job_keeps_what_was_done(ledger: Ledger) -> None:
    entry = ledger.accept(JOB)
    ledger.starting(entry.id, "main", "u", {})
    newer = JOB.model_copy(update={"retry_count": 3})
    entry = ledger.reissue(entry.id, newer)
    assert (entry.job, entry.state, [*entry.steps]) == (newer, State.STARTED, ["main"])
    assert ledger.find(newer) == entry
    assert ledger.find(JOB) is None
    with pytest.raises(ValueError, match="is of job"):
        ledger.reissue(entry.id, JOB.model_copy(update={"id": "other"}))


def test_what_is_kept_is_bounded(ledger: Ledger) -> None:
    entry = ledger.accept(JOB)
    long = RESULT.model_copy(update={"logs": "ü" * LOG_CHARACTERS + "the end"})
    ledger.finish(entry.id, long, {"log": ["\ud800" * 100_000], "few": 1, "many": [0] * 10**5})
    [entry] = ledger.unreaped()
    assert entry.result is not None
    assert entry.result.logs is not None
    assert len(entry.result.logs) == LOG_CHARACTERS
    assert entry.result.logs.endswith("the end")
    assert entry.evidence["few"] == 1
    assert entry.evidence["left_out"] == 1
    assert entry.evidence["log"][0].startswith("\ud800")
    assert len(json.dumps(entry.evidence)) < EVIDENCE_BYTES
    ledger.settle(entry.id, "dropped", "x" * 10**6)
    [entry] = ledger.unreaped()
    assert len(entry.why) == 2000


@pytest.mark.parametrize("evidence", [{"x" * 20_000: 1}, {str(n): n for n in range(5000)}])
def test_evidence_that_is_all_names(ledger: Ledger, evidence: dict[str, Any]) -> None:
    ledger.finish(ledger.accept(JOB).id, RESULT, evidence)
    [entry] = ledger.unreaped()
    assert len(json.dumps(entry.evidence, separators=(",", ":"))) <= EVIDENCE_BYTES
    assert entry.evidence["left_out"] == len(evidence) - (len(entry.evidence) - 1)


def numbered(number: int) -> Job:
    return Job.model_validate({"id": f"job-{number}"})


def test_only_reaped_entries_are_pruned(ledger: Ledger, clock: Clock) -> None:
    ids = [ledger.accept(numbered(number)).id for number in range(6)]
    ledger.starting(ids[0], "main", "u", {})
    for entry_id in ids[:4]:
        ledger.settle(entry_id, "dropped", "test")
    for entry_id in ids[:3]:
        ledger.reap(entry_id)
    assert ledger.prune(1, 3) == 0
    assert ledger.prune(1, 2) == 1
    assert [entry.id for entry in ledger.recent(9)] == [*reversed(ids[1:])]
    clock.now += 86400
    assert ledger.prune(1, 2) == 2
    assert [entry.id for entry in ledger.recent(2)] == [ids[5], ids[4]]
    assert [entry.id for entry in ledger.unreaped()] == ids[3:]
    assert ledger.prune(0, 0) == 0


def test_the_steps_of_a_pruned_entry_are_no_others(ledger: Ledger) -> None:
    """SQLite gives the number of the newest entry anew once that is gone."""
    entry = ledger.accept(JOB)
    ledger.starting(entry.id, "main", "u", {})
    ledger.finish(entry.id, RESULT, {})
    ledger.settle(entry.id, "delivered")
    ledger.reap(entry.id)
    assert ledger.prune(30, 0) == 1
    again = ledger.accept(JOB)
    assert (again.state, again.steps, again.result) == (State.ACCEPTED, {}, None)


def test_values(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.get("draining") is None
    for value in ("1", "", "\ud800\x00"):
        ledger.put("draining", value)
        assert ledger.get("draining") == value
    ledger.close()
    again = Ledger.open(tmp_path / "ledger.db")
    assert again.get("draining") == "\ud800\x00"
    again.close()


def test_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "new/work/ledger.db"
    for umask in (0, 0o277):
        old = os.umask(umask)
        try:
            ledger = Ledger.open(path)
            ledger.accept(JOB)
        finally:
            os.umask(old)
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
            "ledger.db": 0o600,
            "ledger.db-wal": 0o600,
            "ledger.db-shm": 0o600,
        }
        ledger.close()
        path.unlink()
        path.parent.rmdir()


def test_one_agent_at_a_time(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"another worker uses .*WORK_DIR"):
        Ledger.open(tmp_path / "ledger.db")
    ledger.accept(JOB)
    ledger.close()
    ledger.close()
    Ledger.open(tmp_path / "ledger.db").close()
