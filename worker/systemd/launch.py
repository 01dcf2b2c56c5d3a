"""What to run and under which limits: pure data, from which the unit's properties are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from worker.systemd.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class DeviceLimit:
    """Block device bandwidth, see IOReadBandwidthMax= in systemd.resource-control(5)."""

    device: str
    """``MAJOR:MINOR``"""
    read_bps: int | None = None
    write_bps: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None


@dataclass(frozen=True, slots=True)
class UnitLimits:
    """Resource limits of one unit (systemd.resource-control(5)); None sets no limit."""

    cpu_percent: int | None = None
    """CPUQuota, 100 is one core."""
    memory_bytes: int | None = None
    """MemoryMax; swap is then forbidden (MemorySwapMax=0), so that the limit means what it says."""
    runtime_sec: float | None = None
    """RuntimeMaxSec"""
    file_bytes: int | None = None
    """LimitFSIZE: the largest file a process of the unit may write."""
    tasks_max: int = 512
    """TasksMax: threads and processes. SVT-AV1 hangs, without an error, at 64."""
    cpu_weight: int | None = None
    """CPUWeight, 1 to 10000, 100 is the default."""
    io_weight: int | None = None
    """IOWeight, 1 to 10000, 100 is the default."""
    devices: tuple[DeviceLimit, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """One transient service unit, before it exists.

    Everything here can be read by every local user over D-Bus (argv, environment,
    description), so it must hold no secret.
    """

    unit: str
    """Full name, ``ffmpeg-job-<id>.service``."""
    description: str
    argv: tuple[str, ...]
    """argv[0] is the absolute path of the program."""
    slice: str
    limits: UnitLimits
    stdout: Path
    """The file that standard output is appended to; its folder must exist."""
    stop_timeout_sec: float = 10.0
    """Time between SIGTERM and SIGKILL."""
    nice: int = 10
    oom_score_adjust: int = 500
    """How readily the kernel ends it when the machine has no memory left, -1000 to 1000."""
    environment: Mapping[str, str] = field(default_factory=dict)
    working_directory: Path | None = None
    usage_record: bool = True
    """Write down the counters of its cgroup when it fails (see usage.py). It costs a process, also
    for a unit that ended well, when that is unloaded."""
    sandbox: Sandbox | None = None
    """None: a program that nothing hostile can have a say in."""
    syslog_identifier: str = "ffmpeg-job"
    journal_fields: Mapping[str, str] = field(default_factory=dict)
    """Extra fields of the unit's journal entries, e.g. JOB_ID (LogExtraFields=)."""
