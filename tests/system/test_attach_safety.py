"""Who is limited comes to no harm, and nobody is limited who must not be. On a real systemd."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import DEVNULL
from pathlib import Path

import pytest

from tests.system.commands import run, tried, until
from tests.system.foreign import (
    FAMILY,
    FAMILY_SIZE,
    LOOK,
    PYTHON,
    SLEEP,
    Foreign,
    attach,
    detach,
    family,
    no_units,
    refused,
    units,
    units_of,
    worker,
    zombies,
)
from worker.systemd.attachment import ScopeLimits, scope_name
from worker.systemd.bus import Bus
from worker.systemd.processes import Processes
from worker.systemd.scope import Scopes, attachments


async def test_the_scope_goes_with_its_process(foreign: Foreign) -> None:
    process = await foreign.start(*SLEEP)
    await attach(process.pid, "--cpu-percent", "50")
    process.kill()
    await process.wait()
    await no_units()
    assert "is not attached" in await refused(*worker("detach", process.pid))


async def test_it_outlives_who_attached_it_and_systemd_s_restart(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    script = f"{' '.join(worker('attach', '--cpu-percent', 50, process.pid))} && exec sleep 300"
    agent = "attaching.service"
    await run(
        *("systemd-run", "-q", f"--unit={agent}", f"--working-directory={Path.cwd()}"),
        *("/bin/sh", "-c", script),
    )
    members = family(process.pid)
    await until(lambda: units_of(members) == {scope_name(process.pid)})
    await run("systemctl", "kill", "-s", "KILL", agent)
    await tried("systemctl", "stop", agent)
    await tried("systemctl", "reset-failed", agent)
    await run("systemctl", "daemon-reload")
    await tried("systemctl", "daemon-reexec")
    assert family(process.pid) == members
    assert units_of(members) == {scope_name(process.pid)}
    assert f"{len(members)} processes without limits" in await detach(process.pid)


async def test_a_command_killed_half_way_harms_nobody(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    members = family(process.pid)
    command = worker("attach", "--cpu-percent", "50", process.pid)
    for step in range(10):
        killed = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL)
        await asyncio.sleep(0.2 + 0.08 * step)
        with contextlib.suppress(ProcessLookupError):
            killed.kill()
        await killed.wait()
        assert family(process.pid) == members
        if scope_name(process.pid) in await units():
            await detach(process.pid)
        assert family(process.pid) == members


async def test_a_service_keeps_its_main_process(foreign: Foreign) -> None:
    await run("systemd-run", "-q", "--unit=owner.service", *SLEEP)
    pid = int(await run("systemctl", "show", "-P", "MainPID", "owner.service"))
    assert "from owner.service" in await attach(pid, "--cpu-percent", "50")
    await detach(pid)
    assert await run("systemctl", "is-active", "owner.service") == "active"
    await run("systemctl", "stop", "owner.service")
    assert LOOK.get(pid) is None


async def test_what_must_not_be_attached(foreign: Foreign) -> None:
    limit = ("--cpu-percent", "50")
    assert "process 1 is the service manager" in await refused(*worker("attach", *limit, 1))
    none = int(Path("/proc/sys/kernel/pid_max").read_text()) - 1
    assert f"no process has the PID {none}" in await refused(*worker("attach", *limit, none))
    me = " ".join(worker("attach", *limit, "$$"))
    assert "is this command itself" in await refused("sh", "-c", f"exec {me}")
    assert "runs this command" in await refused("sh", "-c", f"{me}; exit $?")

    parent = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    child = max(family(parent.pid))
    await attach(child, *limit)
    text = await refused(*worker("attach", *limit, child))
    assert f"is in {scope_name(child)} already: ffmpeg-worker detach {child} comes first" in text
    text = await refused(*worker("attach", *limit, parent.pid))
    assert f"its child {child} is in {scope_name(child)} already" in text
    assert f"process {parent.pid} is not attached" in await refused(*worker("detach", parent.pid))
    await detach(child)
    await attach(parent.pid, *limit)
    text = await refused(*worker("detach", child))
    assert f"is in {scope_name(parent.pid)}: ffmpeg-worker detach {parent.pid}" in text

    contained = await foreign.start("unshare", "--pid", "--fork", *SLEEP, children=2)
    inner = max(family(contained.pid))
    for pid in (contained.pid, inner):
        assert "is in a container" in await refused(*worker("attach", *limit, pid))

    thread = "import threading; threading.Thread(target=input).start(); input()"
    threaded = await foreign.start(PYTHON, "-c", thread)
    tasks = Path(f"/proc/{threaded.pid}/task")
    await until(lambda: len(list(tasks.iterdir())) == 2)
    tid = max(int(path.name) for path in tasks.iterdir())
    text = await refused(*worker("attach", *limit, tid))
    assert f"{tid} is a thread: attach its process, {threaded.pid}" in text

    dead = await foreign.start(PYTHON, "-c", "import os\nif os.fork(): input()", children=1)
    await until(lambda: bool(zombies(dead.pid)))
    assert "no process has the PID" in await refused(
        *worker("attach", *limit, zombies(dead.pid)[0])
    )


async def test_a_job_of_the_worker_is_not_attached(foreign: Foreign) -> None:
    await run("systemd-run", "-q", "--unit=ffmpeg-job-17.service", *SLEEP)
    pid = int(await run("systemctl", "show", "-P", "MainPID", "ffmpeg-job-17.service"))
    text = await refused(*worker("attach", "--cpu-percent", "50", pid))
    assert "is in ffmpeg-job-17.service already: it is a job of the worker" in text
    await run("systemctl", "stop", "ffmpeg-job-17.service")


async def test_only_root_may(foreign: Foreign) -> None:
    process = await foreign.start(*SLEEP)
    nobody = ("setpriv", "--reuid=65534", "--clear-groups")
    text = await refused(*nobody, *worker("attach", "--cpu-percent", "50", process.pid))
    assert "not permitted" in text
    assert "run this as root" in text
    assert units_of([process.pid]) != {scope_name(process.pid)}


async def test_a_pid_that_went_to_another_is_let_go(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)

    class Recycled(Processes):
        """The process is younger once systemd has it: another one with its PID."""

        def get(self, pid: int):  # type: ignore[no-untyped-def]
            found = super().get(pid)
            if found and pid == process.pid and self.unit(pid) == scope_name(pid):
                return type(found)(found.pid, found.name, found.parent, found.started + 1)
            return found

    scopes = Scopes(processes=Recycled())
    await scopes.connect()
    try:
        with pytest.raises(Exception, match="PID went to another"):
            await scopes.attach(process.pid, ScopeLimits(cpu_percent=50))
        assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}
    finally:
        await scopes.close()


async def test_attachments_are_counted(foreign: Foreign) -> None:
    bus = Bus()
    await bus.connect()
    try:
        assert await attachments(bus) == frozenset()
        processes = [await foreign.start(*SLEEP) for _ in range(2)]
        for process in processes:
            await attach(process.pid, "--cpu-percent", "50")
        assert await attachments(bus) == {scope_name(process.pid) for process in processes}
    finally:
        await bus.close()
