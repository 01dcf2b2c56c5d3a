"""What is started in the unit benchmarks, and how it looks on the bus and to systemd-run."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import accounts
from worker.config.settings import Settings
from worker.jobs.capabilities import TYPICAL
from worker.jobs.parse import parse_job
from worker.launching import launch_of
from worker.master.wire import Job
from worker.programs import Programs
from worker.site import Site
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, slice_name, unit_name
from worker.workspace import Workspace

TRUE = (shutil.which("true") or "/bin/true",)
JOB_ID = "bench"
UNIT = unit_name(JOB_ID)

Wire = list[list[Any]]
"""Properties as StartTransientUnit takes them: names and variants."""

_DROPPED = frozenset({"ExecStart", "RemainAfterExit"})
_RENAMED = {"CPUQuotaPerSecUSec": "CPUQuota", "StandardOutputFileToAppend": "StandardOutput"}


def limits_only(folder: Path) -> Launch:
    """The smallest launch that limits CPU, memory, tasks and time."""
    return Launch(
        unit=UNIT,
        description="benchmark",
        argv=TRUE,
        slice=slice_name("default"),
        limits=UnitLimits(cpu_percent=200, memory_bytes=2 << 30, runtime_sec=3600),
        stdout=folder / "limits.out",
    )


def as_a_job(folder: Path) -> Launch:
    """What a job with a given input is started with, but for the program."""
    accounts.ensure()
    source = folder / "given.mp4"
    source.write_bytes(b"x")
    settings = Settings(work_dir=folder, input_dirs=(folder,))
    site = Site.prepare(settings, Programs(*TRUE, *TRUE))
    job = Job(id=JOB_ID, scenario="720p30-h264", parameters={"input": str(source)})
    spec = parse_job(job, TYPICAL, settings.defaults, generate_input=True, policy=settings.policy)
    space = Workspace.create(folder / "jobs", JOB_ID, site.gid)
    return launch_of(Step.MAIN, JOB_ID, space, spec, spec.limits, TRUE, site, (source,))


async def observe(launch: Launch) -> tuple[Wire, list[str], float]:
    """Run one cycle of our launcher; its properties, its D-Bus calls, and the seconds it took."""
    launcher = Launcher()
    await launcher.connect()
    call = launcher.bus.call
    calls: list[str] = []
    wire: Wire = []

    async def spy(
        member: str, signature: str = "", body: Sequence[Any] = (), **options: Any
    ) -> list[object]:
        calls.append(member)
        if member == "StartTransientUnit":
            wire[:] = body[2]  # the last one counts: without what this systemd does not know
        return await call(member, signature, body, **options)

    launcher.bus.call = spy  # type: ignore[method-assign]
    begun = time.perf_counter()
    unit = await launcher.start(launch)
    await unit.finished()
    await unit.reap()
    seconds = time.perf_counter() - begun
    await launcher.close()
    return wire, calls, seconds


def systemd_run(wire: Wire, unit: str) -> tuple[list[str], list[str]]:
    """A ``systemd-run --wait`` with the same properties, and the names of those it cannot have."""
    command = [shutil.which("systemd-run") or "systemd-run", "--wait", "--collect", "--quiet"]
    command += [f"--unit={unit}"]
    missing = []
    for name, variant in wire:
        if name in _DROPPED or re.fullmatch("Limit[A-Z]+Soft", name):
            continue
        texts = list(_as_text(name, variant.signature, variant.value))
        if not texts:
            missing.append(name)
        command += (f"--property={text}".replace(UNIT, unit) for text in texts)
    return [*command, "--", *TRUE], missing


def _as_text(name: str, signature: str, value: Any) -> Iterator[str]:
    """Assignments as in a unit file; none if it is not known how."""
    setting = _RENAMED.get(name, name)
    match name, signature:
        case "CPUQuotaPerSecUSec", _:
            yield f"{setting}={value / 10_000:g}%"
        case "StandardOutputFileToAppend", _:
            yield f"{setting}=append:{value}"
        case "UMask", _:
            yield f"{setting}={value:04o}"
        case "CapabilityBoundingSet" | "AmbientCapabilities", "t" if value == 0:
            yield f"{setting}="
        case "RestrictNamespaces", _ if value == 0:
            yield f"{setting}=yes"
        case "IPAddressDeny", _ if [row[2] for row in value] == [0, 0]:
            yield f"{setting}=any"
        case "TemporaryFileSystem", _:
            yield f"{setting}={' '.join(f'{path}:{options}' for path, options in value)}"
        case _, "b":
            yield f"{setting}={'yes' if value else 'no'}"
        case _, "t" if name.endswith("USec"):
            yield f"{re.sub('USec$', 'Sec', setting)}={value}us"
        case _, "s" | "t" | "i" | "u":
            yield f"{setting}={value}"
        case _, "as":
            if name == "Environment":
                yield from (f"{setting}={text}" for text in value)
            else:
                yield f"{setting}={' '.join(value)}"
        case _, "aay":
            yield from (f"{setting}={os.fsdecode(bytes(item))}" for item in value)
        case _, "(bas)" if value[1]:
            yield f"{setting}={'' if value[0] else '~'}{' '.join(value[1])}"
        case _, "a(sasb)":
            for _path, argv, ignored in value:
                yield f"{setting}={'-' if ignored else ''}{' '.join(argv)}"
        case _, "a(ssbt)":
            yield f"{setting}={' '.join(f'{row[0]}:{row[1]}' for row in value)}"
