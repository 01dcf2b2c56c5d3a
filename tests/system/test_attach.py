"""Limits for processes that somebody else started, on a real systemd: they hold, nobody is harmed.

Runs inside the test bed, which sets FFMPEG_WORKER_BED.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest

from tests.slowness import SLOWNESS
from worker.systemd.attachment import ScopeLimits, scope_name
from worker.systemd.bus import Bus
from worker.systemd.processes import InForce, Processes, limits_in_force
from worker.systemd.scope import Scopes, attachments

MIB = 1 << 20
PYTHON = shutil.which("python3") or sys.executable
FFMPEG = (
    *("ffmpeg", "-hide_banner", "-loglevel", "error", "-nostats", "-nostdin"),
    *("-f", "lavfi", "-i", "testsrc2=size=1280x720:rate=30", "-c:v", "libx264", "-f", "null", "-"),
)
FED_FFMPEG = (
    *("ffmpeg", "-hide_banner", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "yuv420p"),
    *("-s", "1920x1080", "-i", "pipe:0", "-c:v", "libx264", "-f", "null", "-"),
)
FRAME_BYTES = 1920 * 1080 * 3 // 2
SLEEP = ("sleep", "300")
FAMILY = ("sh", "-c", "sleep 300 & sh -c 'sleep 301 & wait' & wait")
FAMILY_SIZE = 4
LOOK = Processes()
UNITS = ("ffmpeg-job-*", "ffmpeg-detached-*")


async def run(
    *command: str, check: bool = True, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=PIPE,
        stderr=STDOUT,
        stdin=DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0 or not check, f"{command}: {output}"
    return process.returncode or 0, output


def worker(*words: object) -> list[str]:
    return [sys.executable, "-m", "worker", *map(str, words)]


async def attach(pid: int, *flags: str) -> str:
    """What the command says."""
    return (await run(*worker("attach", *flags, pid)))[1]


async def detach(pid: int) -> str:
    return (await run(*worker("detach", pid)))[1]


async def refused(*command: str) -> str:
    """The one line that a command ends with that cannot be done."""
    status, output = await run(*command, check=False)
    assert status == 1, output
    (line,) = output.splitlines()
    assert line.startswith("ffmpeg-worker: ")
    return line


async def until(condition: Callable[[], bool], timeout: float = 15) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(timeout * SLOWNESS):
        while not condition():
            await asyncio.sleep(0.02)


async def units() -> list[str]:
    output = (await run("systemctl", "list-units", "--all", "--plain", "-q", *UNITS))[1]
    return [line.split()[0] for line in output.splitlines()]


async def no_units() -> None:
    async with asyncio.timeout(15 * SLOWNESS):
        while await units():
            await asyncio.sleep(0.02)


def units_of(pids: Iterable[int]) -> set[str]:
    return {LOOK.unit(pid) for pid in pids}


def family(pid: int) -> set[int]:
    return {member.pid for member in LOOK.family(pid)}


def zombies(parent: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = [process for pid in pids if (process := LOOK.get(pid))]
    return [process.pid for process in found if process.parent == parent and process.ended]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def cpu_share(pids: Iterable[int], seconds: float = 3) -> float:
    """Cores used. Limits in these tests are so low that they bind on a busy machine too."""
    pids, begun = list(pids), time.monotonic()
    before = sum(map(cpu_seconds, pids))
    await asyncio.sleep(seconds)
    return (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - begun)


class Foreign:
    """Starts processes that know nothing of us."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    async def start(self, *command: str, children: int = 1) -> Process:
        """Returns when so many processes of it run, itself included."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )
        self._started.append(process)
        await until(lambda: len(family(process.pid)) >= children)
        return process

    async def end(self) -> None:
        for process in self._started:
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await process.communicate()


@pytest.fixture(scope="session", autouse=True)
def bed() -> None:
    assert os.environ.get("FFMPEG_WORKER_BED") == "1", "not inside the test bed: see tests/bed"


@pytest.fixture
async def foreign() -> AsyncIterator[Foreign]:
    """When the test is over, its processes are ended, and no unit and no cgroup is left."""
    assert await units() == []
    foreign = Foreign()
    yield foreign
    await foreign.end()
    await no_units()
    await until(
        lambda: (
            not [
                path
                for pattern in UNITS
                for path in Path("/sys/fs/cgroup").glob(f"**/{pattern}")
                if path.is_dir()
            ]
        )
    )


async def test_a_twentieth_of_a_core_for_a_foreign_ffmpeg_and_more_again(foreign: Foreign) -> None:
    process = await foreign.start(*FFMPEG)
    await until(lambda: cpu_seconds(process.pid) > 0.3)
    output = await attach(process.pid, "--cpu-percent", "5")
    unit = scope_name(process.pid)
    assert output.splitlines()[0].startswith(f"{unit}: 1 process of ffmpeg ({process.pid})")
    assert "CPU: at most 5 % of a core, together" in output
    assert "warning" not in output.lower()
    assert units_of([process.pid]) == {unit}
    assert await cpu_share([process.pid]) == pytest.approx(0.05, abs=0.02)

    output = await detach(process.pid)
    assert f"1 process without limits now, in ffmpeg-detached-{process.pid}.scope" in output
    assert await units() == [f"ffmpeg-detached-{process.pid}.scope"]
    assert await cpu_share([process.pid]) > 0.1
    cgroups = LOOK.cgroups(process.pid)
    assert limits_in_force(f"ffmpeg-detached-{process.pid}.scope", cgroups) == InForce()
    assert process.returncode is None


async def test_the_memory_limit_kills_a_foreign_ffmpeg(foreign: Foreign) -> None:
    process = await foreign.start(*FED_FFMPEG)
    output = await attach(process.pid, "--memory-mb", "64")
    assert "memory: at most 64 MB, together" in output
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(200):
            process.stdin.write(bytes(FRAME_BYTES))
            await process.stdin.drain()
    async with asyncio.timeout(20 * SLOWNESS):
        assert await process.wait() == -signal.SIGKILL


async def test_without_the_memory_limit_it_lives(foreign: Foreign) -> None:
    process = await foreign.start(*FED_FFMPEG)
    await attach(process.pid, "--memory-mb", "64")
    await detach(process.pid)
    assert process.stdin is not None
    for _ in range(60):
        process.stdin.write(bytes(FRAME_BYTES))
        await process.stdin.drain()
    process.stdin.close()
    async with asyncio.timeout(60 * SLOWNESS):
        assert await process.wait() == 0


async def test_memory_held_before_is_told_to_be_left_out(foreign: Foreign) -> None:
    held = f"x = bytearray({100 * MIB}); print(len(x), flush=True); input()"
    process = await foreign.start(PYTHON, "-c", held)
    await until(lambda: LOOK.anonymous_bytes(process.pid) > 100 * MIB)
    output = await attach(process.pid, "--memory-mb", "64")
    assert "MB that the processes hold already are not counted" in output
    assert process.returncode is None


async def test_the_time_limit_ends_all_of_it(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    output = await attach(process.pid, "--timeout", "1")
    assert "time: ends in 1 s" in output
    members = family(process.pid)
    async with asyncio.timeout(5 * SLOWNESS):
        assert await process.wait() == -signal.SIGTERM
    await until(lambda: not any(LOOK.unit(pid) == scope_name(process.pid) for pid in members))


async def test_detach_lifts_the_time_limit_too(foreign: Foreign) -> None:
    process = await foreign.start(*SLEEP)
    limit, begun = 3 + round(SLOWNESS / 2), time.monotonic()  # the two commands take less
    await attach(process.pid, "--timeout", str(limit))
    await detach(process.pid)
    await asyncio.sleep(begun + limit + 2 - time.monotonic())
    assert process.returncode is None


async def test_children_are_included_those_to_come_as_well(foreign: Foreign) -> None:
    two = "for i in 1 2; do sh -c 'while :; do :; done' & done; read x; sleep 300 & wait"
    process = await foreign.start("sh", "-c", two, children=3)
    output = await attach(process.pid, "--cpu-percent", "10")
    assert f"{scope_name(process.pid)}: 3 processes" in output
    assert await cpu_share(family(process.pid)) == pytest.approx(0.1, abs=0.03)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    await until(lambda: len(family(process.pid)) == 4)
    assert units_of(family(process.pid)) == {scope_name(process.pid)}
    assert "4 processes without limits now" in await detach(process.pid)
    assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}


async def test_children_born_during_the_move(foreign: Foreign) -> None:
    # each child makes a child of its own, as fast as it can, some of them short-lived
    program = (
        "import os, time\n"
        "for number in range(120):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(0.004)\n"
        "        if number % 3 and os.fork(): time.sleep(300)\n"
        "        time.sleep(0.05 if number % 2 else 300)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.004)\n"
        "time.sleep(300)\n"
    )
    for _ in range(3):
        process = await foreign.start(PYTHON, "-c", program, children=10)
        output = await attach(process.pid, "--cpu-percent", "100")
        assert "could not be limited" not in output
        assert units_of(family(process.pid)) == {scope_name(process.pid)}
        await detach(process.pid)
        assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}
        assert process.returncode is None


async def test_attach_again_after_a_detach(foreign: Foreign) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    for _ in range(3):
        await attach(process.pid, "--cpu-percent", "50")
        assert units_of(family(process.pid)) == {scope_name(process.pid)}
        await detach(process.pid)
    await attach(process.pid, "--cpu-percent", "50")
    assert await units() == [scope_name(process.pid)]


async def test_detach_of_what_an_ended_process_left_behind(foreign: Foreign) -> None:
    process = await foreign.start("sh", "-c", "sleep 300 & read x", children=2)
    await attach(process.pid, "--cpu-percent", "50")
    (orphan,) = family(process.pid) - {process.pid}
    process.kill()
    await process.wait()
    try:
        assert "1 process without limits now" in await detach(process.pid)
        assert units_of([orphan]) == {f"ffmpeg-detached-{process.pid}.scope"}
    finally:
        os.kill(orphan, signal.SIGKILL)


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
    await run("systemctl", "stop", agent, check=False)
    await run("systemctl", "reset-failed", agent, check=False)
    await run("systemctl", "daemon-reload")
    await run("systemctl", "daemon-reexec", check=False)
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
    pid = int((await run("systemctl", "show", "-P", "MainPID", "owner.service"))[1])
    assert "from owner.service" in await attach(pid, "--cpu-percent", "50")
    await detach(pid)
    assert (await run("systemctl", "is-active", "owner.service"))[1].strip() == "active"
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
    pid = int((await run("systemctl", "show", "-P", "MainPID", "ffmpeg-job-17.service"))[1])
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


async def test_limits_above_the_machine_are_lowered(foreign: Foreign) -> None:
    process = await foreign.start(*SLEEP)
    output = await attach(process.pid, "--cpu-percent", "999999", "--memory-mb", "900000000")
    cpus = len(os.sched_getaffinity(1))
    assert f"CPU limit lowered from 999999 % to {100 * cpus} %" in output
    assert "memory limit lowered from 900000000 MB" in output
    assert f"CPU: at most {100 * cpus} % of a core" in output
    assert "does not hold" not in output


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


async def test_in_the_user_s_own_manager(foreign: Foreign, tmp_path: Path) -> None:
    process = await foreign.start(*FAMILY, children=FAMILY_SIZE)
    manager = "user-manager.service"
    place = {"XDG_RUNTIME_DIR": str(tmp_path)}
    await run(
        *("systemd-run", "-q", f"--unit={manager}", "-p", "Delegate=yes"),
        *("-E", f"XDG_RUNTIME_DIR={tmp_path}", "/lib/systemd/systemd", "--user"),
    )
    try:
        await until(lambda: (tmp_path / "bus").exists())
        async with asyncio.timeout(15 * SLOWNESS):
            while (await run("busctl", "--user", "status", "org.freedesktop.systemd1",
                             check=False, environment=place))[0]:  # fmt: skip
                await asyncio.sleep(0.05)
        flags = ("--user", "--cpu-percent", "50")
        output = (await run(*worker("attach", *flags, process.pid), environment=place))[1]
        assert units_of(family(process.pid)) == {scope_name(process.pid)}
        # without delegated controllers (always so on cgroup v1) nothing holds, and that is said
        v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        assert ("CPU: at most 50 %" in output) is v2
        assert ("the CPU limit does not hold, there is none in force" in output) is not v2
        text = await refused(*worker("detach", process.pid))
        assert "is attached in another service manager: try it with --user" in text
        await run(*worker("detach", "--user", process.pid), environment=place)
        assert units_of(family(process.pid)) == {f"ffmpeg-detached-{process.pid}.scope"}
        assert len(family(process.pid)) == FAMILY_SIZE
    finally:
        await foreign.end()
        await run("systemctl", "stop", manager)
