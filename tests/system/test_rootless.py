"""What closes a job in without root: a user's service manager, asked for the worker's own sandbox.

A job has the uid of its agent there. The tables say what it can do nevertheless, so a protection
that is lost or gained is seen. Runs inside the test bed, which sets FFMPEG_WORKER_BED.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lingering import User, lingering_user
from tests.slowness import SLOWNESS
from tests.system.launching import close_clean
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, slice_name, unit_name
from worker.systemd.sandbox import JobRoot, Sandbox
from worker.systemd.unit import Unit

V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
SECRET = "the key of the master"

PROBE = r"""
import ctypes, errno, fcntl, json, mmap, os, resource, signal, socket, sys
victim, home, runtime, port, cgroup = int(sys.argv[1]), *sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def write(path, text):
    os.write(os.open(path, os.O_WRONLY), text)

def unix(address):
    socket.socket(socket.AF_UNIX).connect(address)

def signal_by_pipe():
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, victim)

def run_own():
    with open("/usr/bin/true", "rb") as program, open("own", "wb") as copy:
        copy.write(program.read())
    os.chmod("own", 0o700)
    os.waitpid(os.posix_spawn("./own", ["own"], {}), 0)

def setuid_file():
    os.close(os.open("setuid", os.O_CREAT, 0o600))
    os.chmod("setuid", 0o4755)

attempts = {
    # the agent and other jobs: processes of the same uid
    "signal a process": lambda: os.kill(victim, 0),
    "signal all processes": lambda: os.kill(-1, 0),
    "signal a thread": lambda: call("tgkill", victim, victim, 0),
    "signal by pidfd": lambda: os.pidfd_open(victim),
    "signal by a pipe's owner": signal_by_pipe,
    "see other processes": lambda: os.stat(f"/proc/{victim}"),
    "make another the first to be killed": lambda: write(f"/proc/{victim}/oom_score_adj", b"999"),
    "limit another process": lambda: resource.prlimit(victim, resource.RLIMIT_NOFILE, (9, 9)),
    "trace another process": lambda: call("ptrace", 0x4206, victim, None, None),
    "another's memory": lambda: os.open(f"/proc/{victim}/mem", os.O_RDWR),
    "another's environment": lambda: open(f"/proc/{victim}/environ", "rb").read(),
    "another's files": lambda: os.listdir(f"/proc/{victim}/root/"),
    "pin another to a CPU": lambda: os.sched_setaffinity(victim, [0]),
    "shared memory of others": lambda: call("shmget", 4711, 100, 0),
    "keyrings": lambda: call("syscall", 250, 0, -4, 1),
    # what the user has
    "the key": lambda: open(home + "/key").read(),
    "the work directory": lambda: os.listdir(home + "/work/accepted"),
    "write to the home": lambda: open(home + "/.profile", "w"),
    "the session bus": lambda: unix(runtime + "/bus"),
    "the user's service manager": lambda: unix(runtime + "/systemd/private"),
    "the system bus": lambda: unix("/run/dbus/system_bus_socket"),
    "an abstract socket": lambda: unix("\0rootless-test"),
    "a server on this host": lambda: socket.create_connection(("127.0.0.1", int(port)), 3),
    "packets of the kernel": lambda: socket.socket(socket.AF_NETLINK),
    # its own limits
    "leave the cgroup": lambda: write(f"{cgroup}/cgroup.procs", b"0"),
    "make a cgroup": lambda: os.mkdir(f"{cgroup}/own"),
    "raise the CPU priority": lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
    # the host
    "write to /usr": lambda: os.open("/usr/own", os.O_CREAT),
    "write to /var": lambda: os.open("/var/own", os.O_CREAT),
    "write to /run": lambda: os.open("/run/own", os.O_CREAT),
    "the users' names": lambda: open("/etc/passwd").read(),
    "messages of the kernel": lambda: os.open("/dev/kmsg", os.O_RDONLY),
    "a namespace of its own": lambda: call("unshare", 0x10000000),
    "memory to write and execute": lambda: mmap.mmap(-1, 4096, prot=7),
    "another personality": lambda: call("personality", 0x40000),
    "a file that is set-uid": setuid_file,
    "run a file of its own": run_own,
    "the clock": lambda: call("adjtimex", ctypes.create_string_buffer(512)),
    # what it is there for
    "its folder": lambda: open("file", "w").close(),
    "its temporary files": lambda: open("/tmp/file", "w").close(),
    "its shared memory": lambda: open("/dev/shm/file", "w").close(),
}
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, str(error))
found["what it sees"] = sorted(os.listdir("/"))
print(json.dumps(found))
"""

NOT_HELD = {
    # The kernel asks for the same uid only, and ffmpeg needs the call: it makes pipes.
    "signal by a pipe's owner": "done",
    # ProtectProc= needs a new /proc, and that a process ID namespace.
    "see other processes": "done",
    "make another the first to be killed": "done",
}
"""Where a job is held as root's agent holds it, and without root is not."""
HELD = {
    "signal a process": "EPERM",
    "signal all processes": "EPERM",
    "signal a thread": "EPERM",
    "signal by pidfd": "EPERM",
    "limit another process": "EPERM",
    "trace another process": "EPERM",
    "another's memory": "EACCES",
    "another's environment": "EACCES",
    "another's files": "EACCES",
    "pin another to a CPU": "EPERM",
    "shared memory of others": "EPERM",
    "keyrings": "EPERM",
    "the key": "ENOENT",
    "the work directory": "ENOENT",
    "write to the home": "EROFS",
    "the session bus": "EAFNOSUPPORT",
    "the user's service manager": "EAFNOSUPPORT",
    "the system bus": "EAFNOSUPPORT",
    "an abstract socket": "EAFNOSUPPORT",
    "a server on this host": "EAFNOSUPPORT",
    "packets of the kernel": "EAFNOSUPPORT",
    "leave the cgroup": "EROFS",
    "make a cgroup": "EROFS",
    "raise the CPU priority": "EPERM",
    "write to /usr": "EROFS",
    "write to /var": "EROFS",
    "write to /run": "EROFS",
    "the users' names": "ENOENT",
    "messages of the kernel": "ENOENT",
    "a namespace of its own": "EPERM",
    "memory to write and execute": "EPERM",
    "another personality": "EPERM",
    "a file that is set-uid": "EPERM",
    "run a file of its own": "EACCES",
    "the clock": "EPERM",
}
NEEDED = dict.fromkeys(("its folder", "its temporary files", "its shared memory"), "done")
VISIBLE = {"dev", "etc", "home", "opt", "proc", "root", "run", "sys", "tmp", "usr", "var"}
"""Of the root, besides links into /usr. All but /usr, /opt, /proc and /sys are the job's own."""


@dataclass(frozen=True)
class Place:
    """A user's files as the agent lays them out, and what there is to attack."""

    user: User
    root: JobRoot
    media: Path
    victim: int
    """A process of the user: the agent, or another job."""
    port: int
    """Where something listens on the host's loopback."""

    def folder(self, job: str) -> Path:
        folder = self.user.home / "work/jobs" / job / "files"
        folder.mkdir(parents=True)
        for path in (folder, folder.parent):
            path.chmod(0o700)
            shutil.chown(path, self.user.uid)
        return folder

    def launch(
        self, job: str, argv: tuple[str, ...], *, network: bool = False, **limits: float
    ) -> Launch:
        folder = self.folder(job)
        return Launch(
            unit=unit_name(job, Step.MAIN),
            description=f"test job {job}",
            argv=argv,
            slice=slice_name("default"),
            limits=UnitLimits(**limits),  # type: ignore[arg-type]
            stdout=folder.parent / "main.out",
            working_directory=folder,
            sandbox=Sandbox(self.root, folder, readable=(self.media,), network=network),
        )


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with (
        lingering_user("rootless") as user,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0rootless-test")
        abstract.listen()
        (user.home / "key").write_text(SECRET)
        (user.home / "work/accepted").mkdir(parents=True)
        media = user.home / "media.mp4"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i"]
        command += ["testsrc2=size=160x120:rate=10:duration=1", str(media)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        root = JobRoot.prepare(user.home / "work/root", ["/usr/bin/ffmpeg"])
        # systemd makes in it, as the user, what it mounts on
        for path in user.home.rglob("*"):
            os.chown(path, user.uid, pwd.getpwuid(user.uid).pw_gid, follow_symlinks=False)
        with subprocess.Popen(
            ["/bin/sleep", "infinity"], user=user.uid, extra_groups=[], env={"KEY": SECRET}
        ) as victim:
            try:
                yield Place(user, root, media, victim.pid, server.getsockname()[1])
            finally:
                victim.kill()


@pytest.fixture
async def launcher(place: Place) -> AsyncIterator[Launcher]:
    launcher = Launcher(user=True, address=f"unix:path={place.user.runtime_dir}/bus")
    # A session bus takes nobody but its user, not even root.
    os.setresuid(place.user.uid, place.user.uid, 0)
    try:
        await launcher.connect()
    finally:
        os.setresuid(0, 0, 0)
    yield launcher
    await close_clean(launcher)


async def ended(unit: Unit) -> str:
    """How a unit ended, and it is gone: its result, and what its program exited with."""
    state = await unit.finished()
    await unit.usage()
    await unit.reap()
    return f"{state.result} {state.exec_main_status}"


async def attempt(launcher: Launcher, place: Place, *, network: bool) -> dict[str, object]:
    job = "streaming" if network else "file"
    tree = "/sys/fs/cgroup" if V2 else "/sys/fs/cgroup/unified"
    cgroup = f"{tree}/user.slice/user-{place.user.uid}.slice/{place.user.manager}/init.scope"
    told = (place.victim, place.user.home, place.user.runtime_dir, place.port, cgroup)
    argv = ("/usr/bin/python3", "-c", PROBE, *map(str, told))
    unit = await launcher.start(place.launch(job, argv, network=network))
    how = await ended(unit)
    said = unit.launch.stdout.read_text()
    assert how == "success 0", said
    found = json.loads(said.splitlines()[0])
    assert isinstance(found, dict)
    return found


async def test_what_a_file_job_can_do(launcher: Launcher, place: Place) -> None:
    found = await attempt(launcher, place, network=False)

    seen = found.pop("what it sees")
    if found["memory to write and execute"] == "EACCES":  # Linux 6.3, PR_SET_MDWE of prctl(2)
        found["memory to write and execute"] = "EPERM"
    assert found == HELD | NOT_HELD | NEEDED
    assert isinstance(seen, list)
    links = {"bin", "sbin", "lib", "lib32", "lib64", "libx32"}
    assert set(seen) - links <= VISIBLE


async def test_what_a_streaming_job_can_do(launcher: Launcher, place: Place) -> None:
    """Addresses are no obstacle: filtering them takes root (systemd.resource-control(5))."""
    found = await attempt(launcher, place, network=True)

    for name in ("the session bus", "the system bus", "an abstract socket"):
        assert found[name] == HELD[name]
    assert found["a server on this host"] == "done"
    assert found["the key"] == "ENOENT"


async def test_ffmpeg_works_within(launcher: Launcher, place: Place) -> None:
    output = place.user.home / "work/jobs/transcode/files/output.mp4"
    argv = ["/usr/bin/ffmpeg", "-nostdin", "-v", "error", "-i", str(place.media)]
    argv += ["-f", "lavfi", "-i", "sine=duration=1", "-c:v", "libx264", "-c:a", "aac", str(output)]

    unit = await launcher.start(place.launch("transcode", tuple(argv), runtime_sec=60 * SLOWNESS))

    assert await ended(unit) == "success 0"
    assert output.stat().st_size > 1000
    assert output.stat().st_uid == place.user.uid


async def test_what_holds_on_every_cgroup_version(launcher: Launcher, place: Place) -> None:
    fill = ("/bin/sh", "-c", "exec cat /dev/zero >file")
    unit = await launcher.start(place.launch("large", fill, file_bytes=1 << 20))
    assert await ended(unit) == f"signal {signal.SIGXFSZ.value}"
    assert (unit.launch.stdout.parent / "files/file").stat().st_size == 1 << 20

    unit = await launcher.start(place.launch("long", ("/bin/sleep", "600"), runtime_sec=1))
    assert await ended(unit) == f"timeout {signal.SIGTERM.value}"


async def test_the_record_of_a_failure_is_kept(launcher: Launcher, place: Place) -> None:
    """What runs after the job is not in its namespaces, and must start all the same."""
    unit = await launcher.start(place.launch("failing", ("/bin/sh", "-c", "exit 3")))

    assert (await unit.finished()).exec_main_status == 3
    usage = await unit.usage()
    await unit.reap()

    assert "/cpu.stat:usage_usec " in unit.launch.stdout.read_text()
    assert usage.oom_kills == (0 if V2 else None)


async def test_a_job_cannot_have_a_uid_of_its_own(place: Place) -> None:
    """Why it shares that of the agent: the reason for every line of NOT_HELD."""
    variables = {"XDG_RUNTIME_DIR": str(place.user.runtime_dir), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["systemd-run", "--user", "--wait", "--collect", "-p", "DynamicUser=yes", "/bin/true"],
        user=place.user.uid,
        group=pwd.getpwuid(place.user.uid).pw_gid,
        extra_groups=[],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode != 0
