"""The limits of a job: each field by itself from the first place that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import ceil

from worker.jobs.capabilities import Capabilities
from worker.jobs.spec import Limits
from worker.jobs.values import integer, mapping, refused
from worker.systemd.launch import DeviceLimit

MAX_CPU_PERCENT = 100 * 4096
MAX_MEMORY_MB = 2**30
"""1 PiB"""
MAX_DISK_MB = 2**30
MAX_TIMEOUT_SEC = 30 * 86400
_DEFAULT_PERIOD_USEC = 100_000
_MAX_RATE = 2**63 - 1
_IO_FIELDS = {
    "rbps": "read_bps",
    "wbps": "write_bps",
    "riops": "read_iops",
    "wiops": "write_iops",
}

_Source = tuple[str, Mapping[str, object]]


def resolve_limits(
    resource_limits: object,
    parameters: Mapping[str, object],
    wrapper_constraints: object,
    defaults: Limits,
    capabilities: Capabilities,
) -> tuple[Limits, tuple[str, ...]]:
    """The limits in force, and notes for the log about those that were lowered to the node's.

    Precedence: the job's ``resource_limits``, ``parameters.resource_limits``, the job's
    ``wrapper_constraints``, the defaults. Only the value that counts is judged. ``max`` for the
    CPU means all that the node has. Raises JobError (user_error).
    """
    sources: tuple[_Source, ...] = (
        ("resource_limits", mapping(resource_limits, "resource_limits")),
        (
            "parameters.resource_limits",
            mapping(parameters.get("resource_limits"), "parameters.resource_limits"),
        ),
    )
    wrapper = mapping(wrapper_constraints, "wrapper_constraints")
    node_cpu = 100 * max(1, capabilities.cpus)

    cpu = _first(sources, "max_cpu_percent", MAX_CPU_PERCENT)
    if cpu is None:
        cpu = _cpu_max(wrapper.get("cpu_max"), node_cpu)
    memory = _first(sources, "max_memory_mb", MAX_MEMORY_MB)
    if memory is None:
        memory = _zero_is_absent(wrapper, "memory_max_mb", MAX_MEMORY_MB)
    disk = _first(sources, "max_disk_mb", MAX_DISK_MB)
    timeout = _first(sources, "timeout_sec", MAX_TIMEOUT_SEC)

    notes: list[str] = []
    limits = Limits(
        cpu_percent=_lowered(
            "CPU limit", defaults.cpu_percent if cpu is None else cpu, node_cpu, " %", notes
        ),
        memory_mb=_lowered(
            "memory limit",
            defaults.memory_mb if memory is None else memory,
            max(1, capabilities.memory_mb),
            " MB",
            notes,
        ),
        disk_mb=defaults.disk_mb if disk is None else disk,
        timeout_sec=defaults.timeout_sec if timeout is None else timeout,
        cpu_weight=_zero_is_absent(wrapper, "cpu_weight", 10_000) or defaults.cpu_weight,
        io=_io_max(wrapper.get("io_max")) or defaults.io,
    )
    return limits, tuple(notes)


def _first(sources: tuple[_Source, ...], field: str, high: int) -> int | None:
    for path, values in sources:
        if values.get(field) is not None:
            return integer(values[field], f"{path}.{field}", 1, high)
    return None


def _zero_is_absent(wrapper: Mapping[str, object], field: str, high: int) -> int | None:
    """0 is what a Go program sends for a field that it does not set."""
    value = wrapper.get(field)
    if value is None:
        return None
    return integer(value, f"wrapper_constraints.{field}", 0, high) or None


def _lowered(what: str, value: int, most: int, unit: str, notes: list[str]) -> int:
    if value <= most:
        return value
    notes.append(f"{what} lowered from {value}{unit} to {most}{unit}, all that this node has")
    return most


def _cpu_max(value: object, node_percent: int) -> int | None:
    """Percent of one core from cgroup v2's ``cpu.max`` syntax, microseconds per period."""
    field = "wrapper_constraints.cpu_max"
    accepted = (
        'must be "QUOTA PERIOD" in microseconds (quota from 1000, period from 1000 to 1000000) '
        'or "max"'
    )
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise refused(field, value, accepted)
    match = re.fullmatch(r"\s*(max|\d{1,15})(?:\s+(\d{1,15}))?\s*", value, re.A)
    if match is None:
        raise refused(field, value, accepted)
    period = int(match[2]) if match[2] else _DEFAULT_PERIOD_USEC
    if not 1000 <= period <= 1_000_000:
        raise refused(field, value, accepted)
    if match[1] == "max":
        return node_percent
    quota = int(match[1])
    if quota < 1000:
        raise refused(field, value, accepted)
    return ceil(100 * quota / period)


def _io_max(value: object) -> DeviceLimit | None:
    """One line of cgroup v2's ``io.max``: ``MAJ:MIN rbps=N wbps=N riops=N wiops=N``."""
    field = "wrapper_constraints.io_max"
    accepted = (
        'must be "MAJ:MIN" and any of rbps=, wbps=, riops=, wiops= with a positive number or max'
    )
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 500:
        raise refused(field, value, accepted)
    device, *settings = value.split() or [""]
    if re.fullmatch(r"\d{1,8}:\d{1,8}", device, re.A) is None:
        raise refused(field, value, accepted)
    found = dict(_io_settings(settings, value, field, accepted))
    if not any(rate is not None for rate in found.values()):
        return None
    return DeviceLimit(device, **found)


def _io_settings(
    settings: list[str], value: str, field: str, accepted: str
) -> Iterator[tuple[str, int | None]]:
    seen: set[str] = set()
    for setting in settings:
        key, _, amount = setting.partition("=")
        known = _IO_FIELDS.get(key)
        if known is None or known in seen:
            raise refused(field, value, accepted)
        seen.add(known)
        if amount == "max":
            yield known, None
        elif re.fullmatch(r"\d{1,19}", amount, re.A) and 0 < int(amount) <= _MAX_RATE:
            yield known, int(amount)
        else:
            raise refused(field, value, accepted)
