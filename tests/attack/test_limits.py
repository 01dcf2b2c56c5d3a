"""Limits that hold: bombs, fillers and loops run as jobs, and the agent does not even notice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, Intruder, Target, intruding, left_of_jobs
from tests.attack.intruder import ORDERS
from tests.e2e.conftest import WORK_DIR, job_units, parameters, running, sh, until
from tests.slowness import SLOWNESS

FILE = {"input": f"{MEDIA}/in.mp4"}
LATE = 2.0 * SLOWNESS
"""How far apart two heartbeats may be that are to come each second."""


def job(bitrate: int, **limits: int) -> dict[str, Any]:
    return parameters(**FILE, bitrate=bitrate, resource_limits=limits)


@pytest.fixture(scope="module")
def placed() -> Iterator[Intruder]:
    with intruding() as intruder:
        yield intruder


@pytest.fixture(scope="module")
def target(placed: Intruder, standing: Target) -> Target:
    """One for all: the worker looks for programs when it starts, so after the intruder."""
    return standing


@pytest.fixture
def intruder(placed: Intruder) -> Iterator[Intruder]:
    yield placed
    ORDERS.unlink()
    until(lambda: left_of_jobs() == [], name="something of a job is left")


@pytest.mark.parametrize("how", ["fill_disk", "fill_disk_unseen", "fill_disk_with_names"])
def test_a_disk_filler_is_ended(intruder: Intruder, target: Target, how: str) -> None:
    intruder.order(how)
    before = shutil.disk_usage(WORK_DIR).free
    begun = time.monotonic()

    result = target.refused(
        job(2_000_000, max_disk_mb=64), "disk limit of 64 MB", reason="resource_error"
    )

    assert time.monotonic() - begun < 20 * SLOWNESS, result
    until(lambda: before - shutil.disk_usage(WORK_DIR).free < 100 << 20, name="not given back")
    target.unharmed()


def test_one_file_over_the_limit_is_cut_off_by_the_kernel(target: Target) -> None:
    values = {"duration": 10, "bitrate": "50M", "resource_limits": {"max_disk_mb": 2}}
    result = target.refused(
        {"scenario": "1280x720p30-h264", "parameters": values},
        "disk limit of 2 MB",
        reason="resource_error",
    )
    assert result["metrics"]["io_write_bytes"] < 4 << 20
    target.unharmed()


def test_a_memory_bomb_ends_alone(intruder: Intruder, target: Target) -> None:
    intruder.order("memory_bomb")
    target.refused(
        job(2_000_000, max_memory_mb=64), "memory limit of 64 MB", reason="resource_error"
    )
    target.unharmed()


def test_a_time_limit_holds_whatever_the_job_does_with_signals(
    intruder: Intruder, target: Target
) -> None:
    intruder.order("ignore_signals")
    target.refused(job(2_000_000, timeout_sec=2), reason="timeout")
    target.unharmed()


@pytest.fixture
def for_five(target: Target) -> Iterator[Target]:
    with target.configured(MAX_CONCURRENT_JOBS="5", HEARTBEAT_INTERVAL="1s"):
        yield target


def test_all_at_once_and_the_agent_heartbeats_on_time(intruder: Intruder, for_five: Target) -> None:
    target, master = for_five, for_five.master
    bombs = {
        1_000_000: ("fork_bomb", {"timeout_sec": 15}),
        2_000_000: ("memory_bomb", {"max_memory_mb": 256, "timeout_sec": 15}),
        3_000_000: ("fill_disk", {"max_disk_mb": 200, "timeout_sec": 15}),
        4_000_000: ("busy_loop", {"timeout_sec": 15, "max_cpu_percent": 400}),
        5_000_000: ("fork_bomb", {"timeout_sec": 15, "max_cpu_percent": 400}),
    }
    for bitrate, (what, _) in bombs.items():
        intruder.order(what, bitrate=bitrate)
    target.still_beats()
    begun, told = time.monotonic(), len(master.results)
    ids = [master.submit(job(bitrate, **limits))["id"] for bitrate, (_, limits) in bombs.items()]
    for job_id in ids:
        master.wait(job_id, 120 * SLOWNESS)
    ended = time.monotonic()

    beats = [one.at for one in master.seen("POST /nodes/*/heartbeat") if begun <= one.at <= ended]
    gaps = [
        later - earlier for earlier, later in zip([begun, *beats], [*beats, ended], strict=True)
    ]
    assert max(gaps) < LATE, gaps
    reasons = {one["job_id"]: one["metrics"]["failure_reason"] for one in master.results[told:]}
    assert [reasons[job_id] for job_id in ids] == [
        "timeout", "resource_error", "resource_error", "timeout", "timeout",
    ]  # fmt: skip
    intruder.order("nothing")
    until(lambda: job_units() == [], name="units are left")
    target.unharmed()


def test_a_limit_that_an_operator_changes_is_in_force_noticed_and_told(
    intruder: Intruder, target: Target
) -> None:
    intruder.order("sleep", seconds=6 * SLOWNESS, then="transcode")
    job_id = target.master.submit(job(2_000_000, max_cpu_percent=100))["id"]
    unit = running(job_id)

    sh("systemctl", "set-property", "--runtime", unit, "CPUQuota=40%", "MemoryMax=300M")

    until(lambda: "CPUQuota 100% → 40%" in target.worker.log(), name="not noticed")
    assert sh("systemctl", "show", unit, "-p", "CPUQuotaPerSecUSec", "--value").strip() == "400ms"
    target.master.wait(job_id, 60 * SLOWNESS)
    [result] = [one for one in target.master.results if one["job_id"] == job_id]
    assert result["status"] == "completed", result
    changed = result["analyzer_output"]["limits_changed"]
    assert changed == "CPUQuota 100% → 40%, MemoryMax 2048 MB → 300 MB"
    target.unharmed()


def test_a_ceiling_over_all_jobs_is_set() -> None:
    show = ["systemctl", "show", "ffmpeg.slice", "-p", "MemoryMax,TasksMax,CPUWeight"]
    found = dict(line.split("=") for line in sh(*show).splitlines())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert int(found["MemoryMax"]) < memory
    assert int(found["TasksMax"]) < int(Path("/proc/sys/kernel/pid_max").read_text())
    assert int(found["CPUWeight"]) < 100
