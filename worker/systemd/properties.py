"""From a Launch to the properties of StartTransientUnit. Pure.

See systemd.service(5), systemd.exec(5) and systemd.resource-control(5) for their meaning and
org.freedesktop.systemd1(5) for their types.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from worker.errors import SystemdError
from worker.printable import escape
from worker.systemd.launch import DeviceLimit, Launch, UnitLimits
from worker.systemd.property import Property
from worker.systemd.sandbox import sandbox_properties

_FIELD_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_USEC = 1_000_000


def properties(
    launch: Launch,
    *,
    version: int,
    grep: str | None = None,
    record_files: Sequence[str] = (),
    user: bool = False,
) -> list[Property]:
    """The properties in the order to send them.

    ``version`` is systemd's. ``grep`` is the path of grep(1) and ``record_files`` the usage
    counters of the unit's cgroup, see usage.py; without either there is no record.
    ``user``: the manager is a user's, and has the rights of that user only.
    Raises SystemdError for a text that D-Bus cannot carry.
    """
    if not launch.argv or not launch.argv[0].startswith("/"):
        raise SystemdError(f"{launch.unit}: the program must be an absolute path")
    for what, text in (
        *((f"argument {i}", word) for i, word in enumerate(launch.argv)),
        *((f"environment variable {name}", value) for name, value in launch.environment.items()),
        ("the output file's name", str(launch.stdout)),
        ("the working directory's name", str(launch.working_directory or "/")),
    ):
        _require_text(launch.unit, what, text)
    # `exec` reports a program that cannot be executed as a failed start; it came with 240.
    result = [
        Property("Description", "s", escape(launch.description), optional=True),
        Property("Type", "s", "exec" if version >= 240 else "simple"),
        # Keeps the unit, and with it the verdict, until it is read and reaped.
        Property("RemainAfterExit", "b", True),
        Property("Slice", "s", launch.slice),
        # `$` starts a variable in an argument. ExecStartEx would have a flag against that, but
        # before 254 a daemon-reload then breaks the running unit.
        Property(
            "ExecStart",
            "a(sasb)",
            [[launch.argv[0], [word.replace("$", "$$") for word in launch.argv], False]],
        ),
        Property("CPUAccounting", "b", True, optional=True),
        Property("MemoryAccounting", "b", True, optional=True),
        Property("IOAccounting", "b", True, optional=True),
        Property("TasksAccounting", "b", True, optional=True),
        *_limits(launch.limits),
        Property("TimeoutStopUSec", "t", round(launch.stop_timeout_sec * _USEC)),
        Property("KillMode", "s", "control-group"),
        Property("Nice", "i", launch.nice, optional=True),
        # One process out of memory ends the whole unit: half a pipeline makes no output.
        # On cgroup v1 systemd cannot see it; there it is read from the usage record.
        Property("OOMPolicy", "s", "kill", optional=True),
        # Where the machine is short of memory, a job is to go before anything else does.
        *([] if user else [Property("OOMScoreAdjust", "i", launch.oom_score_adjust)]),
        Property("StandardInput", "s", "null"),
        _output(launch.stdout, version),
        # Without it, standard error goes where standard output goes.
        Property("StandardError", "s", "journal"),
        # Else a line of the job could begin with "<0>", and be shown on every terminal.
        Property("SyslogLevelPrefix", "b", False),
        Property("SyslogIdentifier", "s", launch.syslog_identifier, optional=True),
    ]
    if launch.sandbox is not None:
        result += sandbox_properties(launch.sandbox, user=user)
    else:
        result += [Property("UMask", "u", 0o077), Property("NoNewPrivileges", "b", True)]
    if launch.journal_fields:
        fields = [_journal_field(name, value) for name, value in launch.journal_fields.items()]
        result.append(Property("LogExtraFields", "aay", fields, optional=True))
    if launch.environment:
        block = [f"{name}={value}" for name, value in launch.environment.items()]
        result.append(Property("Environment", "as", block))
    # A user's manager cannot do without the sandbox for the usage record: its mounts need it.
    record_outside = launch.sandbox is not None and not user
    if launch.working_directory is not None:
        # `-`: for the usage record below systemd would look for it in the job's root, from outside.
        optional = "-" if record_outside else ""
        result.append(Property("WorkingDirectory", "s", f"{optional}{launch.working_directory}"))
    if grep and record_files and launch.usage_record:
        # Runs inside the unit's cgroup, after a failure, just before that is removed: the only
        # moment at which the counters are final and still there. Its failure is ignored.
        argv = [grep, "-sH", ".", *record_files]
        result.append(Property("ExecStopPost", "a(sasb)", [[grep, argv, True]], optional=True))
        if record_outside:
            # The sandbox is for what the job runs. This is ours, with nothing of the job in it. A
            # second sandbox would cost as much again, and memory, of which a job that has just been
            # killed for it has none left.
            result += [
                Property("PermissionsStartOnly", "b", True, optional=True),
                Property("RootDirectoryStartOnly", "b", True, optional=True),
            ]
    return result


def _limits(limits: UnitLimits) -> list[Property]:
    result = [Property("TasksMax", "t", max(1, limits.tasks_max))]
    if limits.cpu_percent is not None:
        # systemd keeps whole percents: 10 ms a second.
        quota = max(1, limits.cpu_percent) * 10_000
        result.append(Property("CPUQuotaPerSecUSec", "t", quota))
    if limits.memory_bytes is not None:
        result.append(Property("MemoryMax", "t", limits.memory_bytes))
        # Else a job over its limit is swapped instead of stopped, and everybody is slow.
        result.append(Property("MemorySwapMax", "t", 0))
    if limits.runtime_sec is not None:
        result.append(Property("RuntimeMaxUSec", "t", round(limits.runtime_sec * _USEC)))
    if limits.file_bytes is not None:
        result.append(Property("LimitFSIZE", "t", limits.file_bytes))
        result.append(Property("LimitFSIZESoft", "t", limits.file_bytes))
    if limits.cpu_weight is not None:
        result.append(Property("CPUWeight", "t", limits.cpu_weight, optional=True))
    if limits.io_weight is not None:
        result.append(Property("IOWeight", "t", limits.io_weight, optional=True))
    for name, attribute in (
        ("IOReadBandwidthMax", "read_bps"),
        ("IOWriteBandwidthMax", "write_bps"),
        ("IOReadIOPSMax", "read_iops"),
        ("IOWriteIOPSMax", "write_iops"),
    ):
        rows = [
            [_device_path(device), value]
            for device in limits.devices
            if (value := getattr(device, attribute)) is not None
        ]
        if rows:
            result.append(Property(name, "a(st)", rows))
    return result


def _device_path(device: DeviceLimit) -> str:
    if not re.fullmatch(r"[0-9]{1,10}:[0-9]{1,10}", device.device):
        raise SystemdError(f"block device {device.device!r} is not of the form MAJOR:MINOR")
    return f"/dev/block/{device.device}"


def _output(path: Path, version: int) -> Property:
    # Before 240 a file can only be written from its beginning.
    name = "StandardOutputFileToAppend" if version >= 240 else "StandardOutputFile"
    return Property(name, "s", str(path))


def _journal_field(name: str, value: str) -> bytes:
    if not _FIELD_NAME.fullmatch(name):
        raise SystemdError(
            f"journal field {name!r}: use capital letters, digits and underscores, 64 at most"
        )
    return f"{name}={escape(value)}".encode()


def _require_text(unit: str, what: str, text: str) -> None:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise SystemdError(f"{unit}: {what} is not valid Unicode, D-Bus cannot carry it") from None
    if b"\0" in encoded:
        raise SystemdError(f"{unit}: {what} contains a NUL character")
