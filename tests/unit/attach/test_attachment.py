"""Which processes may be attached, and what is asked of systemd for them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from tests.unit.attach.proc import Proc
from worker.systemd.attachment import (
    AttachError,
    ScopeLimits,
    attachable,
    limit_properties,
    not_attached,
    scope_name,
    scope_properties,
)
from worker.systemd.names import safe_id
from worker.systemd.processes import Processes
from worker.systemd.property import Property

OWN = os.getpid()


# who may be attached


def test_an_ordinary_process_may(look: Processes) -> None:
    assert [member.pid for member in attachable(look, 10)] == [10, 11, 12]


def test_others_may_not(proc: Proc, look: Processes) -> None:
    proc.add(2, 0, name="kthreadd", flags=0x208040)
    proc.add(20, cgroup="/ffmpeg.slice/ffmpeg-live.slice/ffmpeg-job-17.service")
    proc.add(30, cgroup="/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-attached-30.scope")
    proc.add(31, 13, cgroup="/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-attached-31.scope")
    proc.add(40, cgroup="/system.slice/ffmpeg-worker.service")
    proc.add(50, world="container")
    proc.add(60, owner=10)
    proc.add(70)
    proc.add(OWN, 70)
    for pid, text in {
        1: "process 1 is the service manager",
        2: r"2 \(kthreadd\) is a thread of the kernel",
        99: "no process has the PID 99",
        20: "is in ffmpeg-job-17.service already: it is a job of the worker",
        30: "in ffmpeg-job-attached-30.scope already: ffmpeg-worker detach 30 comes first",
        13: "its child 31 is in ffmpeg-job-attached-31.scope already: ffmpeg-worker detach 31",
        40: "is the worker",
        50: "is in a container",
        60: "60 is a thread: attach its process, 10",
        70: "process 70 runs this command",
        OWN: f"process {OWN} is this command itself",
    }.items():
        with pytest.raises(AttachError, match=text) as caught:
            attachable(look, pid)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 1


def test_what_is_not_attached_is_told_where_to_look(proc: Proc, look: Processes) -> None:
    proc.add(31, 30, cgroup="/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-attached-30.scope")
    assert "is in ffmpeg-job-attached-30.scope: ffmpeg-worker detach 30" in not_attached(look, 31)
    assert "process 10 is not attached: systemctl list-units" in not_attached(look, 10)
    proc.add(40, cgroup="/user@7.service/ffmpeg.slice/ffmpeg-job-attached-40.scope")
    assert "try it with --user, or without" in not_attached(look, 40)


# properties


def values(properties: Sequence[Property]) -> dict[str, object]:
    names = [item.name for item in properties]
    assert len(names) == len(set(names))
    return {item.name: item.value for item in properties}


def test_all_limits() -> None:
    found = values(limit_properties(ScopeLimits(150, 64 << 20, 90)))
    assert found["CPUQuotaPerSecUSec"] == 1_500_000
    assert (found["MemoryMax"], found["MemorySwapMax"]) == (64 << 20, 0)
    assert found["RuntimeMaxUSec"] == 90_000_000
    assert found["Slice"] == "ffmpeg-default.slice"


def test_what_is_not_asked_for_is_not_limited() -> None:
    found = values(limit_properties(ScopeLimits()))
    assert not {"CPUQuotaPerSecUSec", "MemoryMax", "MemorySwapMax", "RuntimeMaxUSec"} & set(found)
    assert values(scope_properties([1], ""))["TasksMax"] == 2**64 - 1


def test_no_limit_is_silently_left_out_where_systemd_does_not_know_it() -> None:
    properties = [*scope_properties([3], "x"), *limit_properties(ScopeLimits(1, 1, 1))]
    needed = {item.name for item in properties if not item.optional}
    assert needed >= {"PIDs", "CPUQuotaPerSecUSec", "MemoryMax", "RuntimeMaxUSec"}


def test_no_job_can_have_the_name_of_an_attachment() -> None:
    assert not safe_id("attached-17").startswith("attached")
    assert scope_name(17) == "ffmpeg-job-attached-17.scope"
