"""``history`` on the command line: what it shows, and what it hides."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worker.cli.arguments import Arguments, parse
from worker.errors import ConfigError
from worker.ledger import Ledger
from worker.master.wire import Job, JobResult
from worker.systemd.names import unit_name

if TYPE_CHECKING:
    from tests.unit.history.conftest import Run

KEY = "live-9f8e7d6c"
EVIDENCE = {
    "unit": "ffmpeg-job-17.service",
    "state": {"result": "oom-kill", "exec_main_code": 2, "exec_main_status": signal.SIGKILL},
    "usage": {"cpu_seconds": 12.34, "memory_peak_bytes": 512_000_000, "oom_kills": 1},
    "log": "frame=1\nPAST \x1b[31mred",
}
pytestmark = pytest.mark.usefixtures("utc", "no_settings", "logging_restored")


def job(job_id: str = "17", **fields: Any) -> Job:
    return Job.model_validate({"id": job_id, "node_id": "n"} | fields)


def failed(job_id: str, error: str) -> JobResult:
    return JobResult(job_id=job_id, node_id="n", status="failed", error=error)


def live(ledger: Ledger, accepted: Job, error: str | None = None, **evidence: Any) -> None:
    """A whole life of a job."""
    entry = ledger.accept(accepted)
    limits = {"cpu_percent": 200, "memory_mb": 512, "disk_mb": 5000, "timeout_sec": 60}
    ledger.starting(entry.id, "main", unit_name(accepted.id), {"limits": limits})
    result = failed(accepted.id, error) if error else None
    ledger.finish(
        entry.id,
        result or JobResult(job_id=accepted.id, node_id="n", status="completed"),
        EVIDENCE | evidence,
    )
    ledger.settle(entry.id, "delivered", reaped=True)


# the words


def test_words() -> None:
    assert parse(["history"]) == Arguments("history")
    assert parse(["history", "17", "--limit", "3", "-json"]) == Arguments(
        "history", job_id="17", limit="3", json=True
    )
    assert parse(["history", "--", "--17"]).job_id == "--17"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["history", "a", "b"], "history takes one JOB_ID or none"),
        (["check", "--json"], "--json: only for history"),
        (["--limit", "3"], "--limit: only for history"),
    ],
)
def test_wrong_words(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(argv)


@pytest.mark.parametrize("limit", ["0", "-1", "many", "1e3"])
def test_a_wrong_limit(run: Run, limit: str) -> None:
    status, out, err = run("--limit", limit)
    assert (status, out) == (2, "")
    assert "--limit: " in err
    assert "whole number" in err


# the table


def test_table(ledger: Ledger, run: Run) -> None:
    live(ledger, job("17"), "resource_error: memory limit of 512 MB exceeded")
    live(ledger, job("18"))
    gone = ledger.accept(job("19", retry_count=2))
    ledger.settle(gone.id, "dropped", "the job was cancelled")
    ledger.accept(job("20"))

    status, out, err = run()

    assert (status, err) == (0, "")
    rows = [line.split(maxsplit=7) for line in out.splitlines()]
    assert rows[0] == ["ACCEPTED", "JOB", "RETRY", "STATE", "SECONDS", "RESULT", "VERDICT"]
    assert [row[2:] for row in rows[1:]] == [
        [
            "17",
            "0",
            "reaped",
            "4.0",
            "delivered",
            "resource_error: memory limit of 512 MB exceeded",
        ],
        ["18", "0", "reaped", "4.0", "delivered", "completed"],
        ["19", "2", "settled", "-", "dropped", "dropped: the job was cancelled"],
        ["20", "0", "accepted", "-", "-", "-"],
    ]
    assert rows[1][:2] == ["2026-09-21", "14:13:22"]


def test_the_newest_ones_come_last(ledger: Ledger, run: Run) -> None:
    for number in range(25):
        ledger.accept(job(f"j{number:02}"))
    shown = [line.split()[2] for line in run()[1].splitlines()[1:]]
    assert shown == [f"j{number:02}" for number in range(5, 25)]
    assert [line.split()[2] for line in run("--limit", "2")[1].splitlines()[1:]] == ["j23", "j24"]


def test_nothing_on_record(ledger: Ledger, run: Run, tmp_path: Path) -> None:
    assert run()[:2] == (0, f"no jobs on record in {tmp_path}/ledger.db\n")
    assert run("--json")[:2] == (0, "[]\n")


# one job


def test_everything_of_one_job(ledger: Ledger, run: Run) -> None:
    live(ledger, job(scenario="1280x720p30-h264", parameters={"bitrate": 5}), "timeout: 60 s")
    live(ledger, job(retry_count=1, created_at="2026-11-24T15:00:00Z"))
    ledger.accept(job("18"))

    status, out, _ = run("17")

    assert status == 0
    first, second = out.split("\n\n")
    lines = [" ".join(line.split()) for line in first.splitlines()]
    assert lines == [
        "job 17, retry 0: reaped",
        "accepted 2026-09-21 14:13:22 +0.000 s",
        "main started 2026-09-21 14:13:24 +2.000 s ffmpeg-job-17.service",
        "finished 2026-09-21 14:13:26 +4.000 s",
        "delivered 2026-09-21 14:13:28 +6.000 s",
        "cleared away 2026-09-21 14:13:30 +8.000 s",
        "limits CPU 200 %, memory 512 MB, disk 5000 MB, time 60 s (main)",
        "verdict timeout: 60 s",
        "unit ffmpeg-job-17.service: Result=oom-kill, ended by SIGKILL",
        "used CPU 12.3 s, memory peak 512.0 MB, killed for lack of memory: 1",
        "node id n",
        "scenario 1280x720p30-h264",
        'parameters {"bitrate": 5}',
        "ffmpeg's last lines",
        "frame=1",
        "PAST \\x1b[31mred",
    ]
    assert second.startswith("job 17, retry 1: reaped\n")
    assert "2026-11-24T15:00:00+00:00" in second
    assert "18" not in out.split()


def test_a_job_is_found_by_the_name_of_its_unit(ledger: Ledger, run: Run) -> None:
    ledger.accept(job("a/b c"))
    name = unit_name("a/b c").removeprefix("ffmpeg-job-").removesuffix(".service")
    assert run(name)[:2] == run("a/b c")[:2]
    assert run(name)[1].startswith("job a/b c, retry 0: accepted\n")


def test_the_newest_acceptances_of_one_job(ledger: Ledger, run: Run) -> None:
    for retry in range(3):
        ledger.accept(job(retry_count=retry))
    assert "retry 0" in run("17")[1]
    assert run("17", "--limit", "1")[1].startswith("job 17, retry 2: ")


def test_a_job_that_was_never_here(ledger: Ledger, run: Run) -> None:
    status, out, err = run("no\x1bsuch")
    assert (status, out) == (1, "")
    assert "has no job" in err
    assert "HISTORY_DAYS" in err
    assert "\x1b" not in err


def test_for_programs(ledger: Ledger, run: Run) -> None:
    live(ledger, job("17"), "timeout: 60 s")
    ledger.accept(job("18"))
    first, second = json.loads(run("--json")[1])
    assert (first["job_id"], first["state"], first["error"]) == ("17", "reaped", "timeout: 60 s")
    assert first["accepted_at"] == "2026-09-21T14:13:22.000+00:00"
    assert first["settled_at"] == "2026-09-21T14:13:28.000+00:00"
    assert first["seconds"] == 4.0
    assert first["evidence"]["state"]["result"] == "oom-kill"
    [step] = first["steps"]
    assert step["facts"]["limits"]["memory_mb"] == 512
    assert (second["job_id"], second["settled"], second["status"]) == ("18", None, None)
    assert [told["job_id"] for told in json.loads(run("18", "--json")[1])] == ["18"]


# what strangers wrote


def test_hostile_texts_do_nothing_to_a_terminal(ledger: Ledger, run: Run) -> None:
    evil = "a\x1b]0;owned\x07\r\n\u202e\x7f\x9b2J"
    asked = {"codec": evil + "\ud800", evil: 1, "\ud800": 2}
    live(ledger, job(evil, scenario=evil + "\ud800", parameters=asked), evil, log=evil)
    for argv in ([], ["--json"], [evil], [evil, "--json"]):
        status, out, _ = run(*argv)
        assert status == 0
        assert all(char.isprintable() for line in out.split("\n") for char in line), argv
    assert len(run()[1].splitlines()) == 2


def test_long_texts_are_cut_in_the_table(ledger: Ledger, run: Run) -> None:
    live(ledger, job("x" * 1000), "timeout: " + "y" * 1000)
    assert len(run()[1].splitlines()[1]) < 250


@pytest.mark.parametrize(
    "parameters",
    [
        {"output_mode": "rtmp", "rtmp_url": f"rtmp://h/app/{KEY}"},
        {"output_mode": "rtmp", "rtmp_url": f"rtmp:/h/app/{KEY}"},
        {"output_mode": "rtmp", "rtmp_url": f"rtmp://h/app/name?sign={KEY}"},
        {"output_mode": "rtmp", "rtmp_url": "rtmp://h/app", "stream_key": KEY},
        {"stream_key": [KEY]},
        {"stream_key": {"codec": f"x://u:{KEY}@h"}},
        {"input": f"https://user:{KEY}@h/in.mp4"},
        {"input": f"https://h/in.mp4?token={KEY}"},
        {"output": f"srt://h:1?passphrase={KEY}"},
        {"api_token": KEY},
        {"api_token": {"input": KEY}},
        {"input": {"codec": KEY}},
        {"description": f"key is {KEY}"},
        {"metadata": {"deep": [{"secret": KEY}]}},
        KEY,
        [KEY],
    ],
)
def test_no_secret_is_shown(ledger: Ledger, run: Run, parameters: object) -> None:
    live(ledger, job(parameters=parameters, resource_limits={"why": KEY}, wrapper_constraints=KEY))
    for argv in ([], ["17"], ["--json"]):
        assert KEY not in run(*argv)[1]


def test_the_key_of_a_stream_is_hidden_wherever_it_is_repeated(ledger: Ledger, run: Run) -> None:
    asked = {"rtmp_url": f"rtmp://h/app/{KEY}", "output_mode": "rtmp", "fps": 30}
    log = f"stream {KEY} is in use\nrtmp://h/app/{KEY}: Input/output error"
    live(ledger, job(parameters=asked), f"network_error: {KEY} refused", log=log)
    for argv in ([], ["17"], ["--json"]):
        _, out, _ = run(*argv)
        assert KEY not in out
        assert "*** refused" in out
    assert "rtmp://h/app/***" in run("17")[1]
    assert '"fps": 30' in run("17")[1]
