"""``ffmpeg-worker history``: what the ledger knows of the jobs that this node has accepted."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from worker.config import Settings
from worker.config.keys import integer
from worker.errors import ConfigError, WorkerError
from worker.jobs.text import label
from worker.ledger import history as ledger
from worker.ledger.account import account
from worker.printable import escape

_limit = integer(1, 1_000_000)
_NEWEST = 20
_LONGEST_ID = 40
"""Characters; a UUID has 36. ``--json`` has the whole."""
_LONGEST_VERDICT = 120
_LONGEST_LINE = 300
_MOST = 1_000_000
_HEAD = ("ACCEPTED", "JOB", "RETRY", "STATE", "SECONDS", "RESULT", "VERDICT")
_COUNTERS = (
    ("cpu_seconds", "CPU {:.1f} s"),
    ("memory_peak_bytes", "memory peak {:.1f} MB"),
    ("io_read_bytes", "read {:.1f} MB"),
    ("io_write_bytes", "written {:.1f} MB"),
    ("oom_kills", "killed for lack of memory: {}"),
    ("memory_limit_hits", "memory limit hit: {}"),
    ("task_limit_hits", "forks refused: {}"),
    ("cpu_stall_seconds", "waited for CPU {:.1f} s"),
    ("memory_stall_seconds", "waited for memory {:.1f} s"),
    ("io_stall_seconds", "waited for I/O {:.1f} s"),
)
_LIMITS = (
    ("cpu_percent", "CPU {} %"),
    ("memory_mb", "memory {} MB"),
    ("disk_mb", "disk {} MB"),
    ("timeout_sec", "time {} s"),
)


def history(settings: Settings, job_id: str, *, limit: str, as_json: bool) -> int:
    """Print the newest jobs, or all that is known of one, to stdout; newest last.

    Returns the exit status. Raises ConfigError for a wrong ``limit``, LedgerError if there is no
    ledger or it cannot be read, WorkerError if the job is not in it.
    """
    try:
        most = _limit(limit) if limit else (_MOST if job_id else _NEWEST)
    except ValueError as error:
        raise ConfigError(f"--limit: {limit[:40]!r} {error}") from None
    path = settings.work_dir / "ledger.db"
    entries = ledger.of_job(path, job_id, most) if job_id else ledger.newest(path, most)
    if job_id and not entries:
        raise WorkerError(
            f"the ledger {path} has no job {label(job_id, _LONGEST_ID)!r}: it was not accepted "
            "here, or so long ago that it is off the record (HISTORY_DAYS)"
        )
    accounts = [account(entry) for entry in entries]
    if as_json:
        # ASCII; DEL is the one control character that JSON leaves as it is.
        print(json.dumps(accounts, indent=1, default=str).replace("\x7f", "\\u007f"))
    elif job_id:
        print("\n\n".join("\n".join(_all(told)) for told in accounts))
    elif accounts:
        print("\n".join(_table([_HEAD, *map(_row, accounts)])))
    else:
        print(f"no jobs on record in {escape(str(path))}")
    return 0


def _row(told: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _local(told["accepted_at"]),
        label(told["job_id"], _LONGEST_ID),
        str(told["retry"]),
        told["state"],
        "-" if told["seconds"] is None else f"{told['seconds']:.1f}",
        told["settled"] or "-",
        label(_verdict(told), _LONGEST_VERDICT),
    )


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for *cells, last in rows:
        padded = (
            cell.rjust(width) if name in ("RETRY", "SECONDS") else cell.ljust(width)
            for cell, width, name in zip(cells, widths, _HEAD, strict=False)
        )
        yield "  ".join((*padded, last)).rstrip()


def _verdict(told: Mapping[str, Any]) -> str:
    """What became of the job, and why the master was not told, as far as either is known."""
    verdict = told["error"] or told["status"] or ""
    if told["why"] and told["why"] not in verdict:
        verdict = f"{verdict}; dropped: {told['why']}" if verdict else f"dropped: {told['why']}"
    return verdict or "-"


def _all(told: Mapping[str, Any]) -> Iterator[str]:
    """Everything of one acceptance, a fact a line."""
    yield f"job {escape(told['job_id'])}, retry {told['retry']}: {told['state']}"
    yield from _times(told)
    for step in told["steps"]:
        limits = step["facts"].get("limits")
        if isinstance(limits, dict) and (text := _figures(limits, _LIMITS)):
            yield _line("limits", f"{text} ({escape(step['step'])})")
    yield _line("verdict", _verdict(told))
    evidence = told["evidence"]
    if isinstance(state := evidence.get("state"), dict):
        yield _line("unit", f"{evidence.get('unit', '')}: {_ending(state)}")
    if isinstance(usage := evidence.get("usage"), dict) and (text := _figures(usage, _COUNTERS)):
        yield _line("used", text)
    asked = {name: value for name, value in told["job"].items() if value not in (None, "", {})}
    for name, value in asked.items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield _line(name.replace("_", " "), text)
    if isinstance(log := evidence.get("log"), str) and log:
        yield "  ffmpeg's last lines"
        yield from (f"    {label(line, _LONGEST_LINE)}" for line in log.splitlines())


def _times(told: Mapping[str, Any]) -> Iterator[str]:
    """When each step was taken, with the seconds since the acceptance."""
    begun = _moment(told["accepted_at"])
    steps = [("accepted", told["accepted_at"], "")]
    steps += [(f"{step['step']} started", step["asked_at"], step["unit"]) for step in told["steps"]]
    steps += [
        ("finished", told["finished_at"], ""),
        (told["settled"] or "", told["settled_at"], ""),
        ("cleared away", told["reaped_at"], ""),
    ]
    for what, time, more in steps:
        if time is not None:
            after = (_moment(time) - begun).total_seconds()
            yield _line(what, f"{_local(time)}  {after:+10.3f} s  {more}".rstrip())


def _ending(state: Mapping[str, Any]) -> str:
    """How systemd saw the unit end, in its own words."""
    code, status = state.get("exec_main_code"), state.get("exec_main_status")
    text = f"Result={state.get('result', '')}"
    if code == 1:  # CLD_EXITED, waitid(2)
        return f"{text}, exit status {status}"
    if code in (2, 3):  # CLD_KILLED, CLD_DUMPED
        try:
            return f"{text}, ended by {signal.Signals(int(str(status))).name}"
        except ValueError:
            return f"{text}, ended by signal {status}"
    return f"{text}, {state.get('active_state', '')}"


def _figures(values: Mapping[str, Any], forms: tuple[tuple[str, str], ...]) -> str:
    found = []
    for name, form in forms:
        value = values.get(name)
        if isinstance(value, int | float):
            value = value / 1e6 if name.endswith("_bytes") else value
            if round(value, 1):
                found.append(form.format(value))
    return ", ".join(found)


def _line(what: str, text: str) -> str:
    return f"  {escape(what):20}{escape(text)}"


def _moment(time: str) -> datetime:
    return datetime.fromisoformat(time)


def _local(time: str) -> str:
    return f"{_moment(time).astimezone():%Y-%m-%d %H:%M:%S}"
