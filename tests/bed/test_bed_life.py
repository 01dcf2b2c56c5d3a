"""How beds come and go. Needs root and is run on purpose: `pytest tests/bed`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bed_cgroups
import bed_state
from bed import PROJECT, Bed
from bed_kernel import BedError, Process

from tests.slowness import SLOWNESS

PROGRAM = [sys.executable, str(Path(__file__).with_name("bed.py"))]


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a bed that the test makes, and the promise that nothing is left of it."""
    chosen = f"test-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    children = _children()
    yield chosen
    assert _traces(chosen) == []
    assert _children() == children


def _children() -> str:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


def _traces(name: str) -> list[str]:
    """State, cgroups, mounts and living processes of a bed."""
    found = [f for h in bed_cgroups.hierarchies() if (f := h.folder(name)).exists()]
    found += [folder] if (folder := bed_state.FOLDER / name).exists() else []
    found += [Path(mount.point) for mount in bed_cgroups.mounts() if name in str(mount)]
    mark = f"/{bed_cgroups.PREFIX}{name}"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = ((process / "cgroup").read_text(), (process / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
        # A zombie is left only until the host's init looks.
        ours = mark in texts[0] or name in texts[1].split("\0")
        if ours and Process.of(int(process.name)):
            found.append(process)
    return [str(path) for path in found]


def _program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def _output(bed: Bed, *command: str) -> str:
    result = bed.run(command, capture_output=True, text=True, check=True)
    return str(result.stdout).strip()


def _eventually(what: str, condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout * SLOWNESS
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def test_two_at_once_know_nothing_of_each_other(name: str) -> None:
    is_active = ["systemctl", "is-active", "--quiet", "one"]
    with Bed(name) as bed:
        with Bed() as other:
            bed.run(["systemd-run", "--quiet", "--unit=one", "sleep", "60"], check=True)
            assert bed.run(is_active).returncode == 0
            assert other.run(is_active).returncode != 0
            assert bed.pid != other.pid
        assert bed.run(is_active).returncode == 0


def test_bind_can_be_written(name: str, tmp_path: Path) -> None:
    with Bed(name, binds=[(str(tmp_path), "/srv/shared")]) as made:
        made.run(["sh", "-c", "echo inside >/srv/shared/file"], check=True)
    assert (tmp_path / "file").read_text() == "inside\n"


@pytest.mark.parametrize("inside", ["", "/tmp", "/var/tmp/", "/", "/run/../etc"])
def test_what_the_bed_empties_or_fills_itself_is_never_bound(tmp_path: Path, inside: str) -> None:
    outside = str(tmp_path) if inside else "/tmp"
    with pytest.raises(BedError, match="the bed's own"):
        Bed(binds=[(outside, inside)])


def test_network_of_the_host_or_of_its_own(name: str) -> None:
    ours = Path("/proc/self/ns/net").readlink()
    with Bed(name, host_network=True) as made:
        assert _output(made, "readlink", "/proc/self/ns/net") == str(ours)
    with Bed(name) as made:
        assert _output(made, "readlink", "/proc/self/ns/net") != str(ours)
        flags = int(_output(made, "cat", "/sys/class/net/lo/flags"), 16)
        assert flags & 1, "its loopback is not up (IFF_UP, netdevice(7))"


def test_up_exec_status_down(name: str) -> None:
    assert _program("up", name).returncode == 0
    result = _program("exec", name, "sh", "-c", "cat; exit 5", input="through")
    assert (result.returncode, result.stdout) == (5, "through")
    result = _program("status", name)
    assert result.returncode == 0
    assert "system: running" in result.stdout
    taken = _program("up", name)
    assert taken.returncode == 125
    assert f"there already is a bed called {name}" in taken.stderr
    assert _program("down", name).returncode == 0
    assert _program("status", name).returncode == 3
    assert _program("down", name).returncode == 0


@pytest.mark.parametrize("status", [0, 9])
def test_run_removes_the_bed_and_passes_the_status_on(name: str, status: int) -> None:
    result = _program("run", "--name", name, "--", "sh", "-c", f"pwd; exit {status}", cwd=PROJECT)
    assert (result.returncode, result.stdout) == (status, f"{PROJECT}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_removes_the_bed_when_it_is_told_to_end(name: str, number: signal.Signals) -> None:
    command = [*PROGRAM, "run", "--name", name, "--", "sh", "-c", "echo up; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number


def test_killed_run_leaves_nothing(name: str) -> None:
    command = [*PROGRAM, "run", "--name", name, "--", "sh", "-c", "echo up; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
    _eventually("all gone", lambda: not _traces(name))


@pytest.mark.parametrize("remedy", ["up again", "down", "down --all"])
def test_killed_supervisor_takes_all_with_it(name: str, remedy: str) -> None:
    assert _program("up", name).returncode == 0
    state = bed_state.read(name)
    assert state is not None
    assert state.init is not None
    pidfd = state.owner.open()
    assert pidfd is not None
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    _eventually("PID 1's end", lambda: state.init is not None and not state.init.alive)
    assert _traces(name)  # its cgroups and its folder
    if remedy == "up again":
        with Bed(name) as made:
            assert _output(made, "systemctl", "is-system-running") == "running"
    else:
        arguments = ["down", "--all"] if "--all" in remedy else ["down", name]
        assert _program(*arguments).returncode == 0


def test_bed_that_comes_up_is_not_ended_by_another_process(name: str) -> None:
    bed_state.claim(bed_state.State(name, owner=Process.me()))
    try:
        result = _program("down", name)
        assert result.returncode == 125
        assert f"is coming up, in process {os.getpid()}" in result.stderr
    finally:
        Bed(name).down()


def test_poweroff_inside_removes_the_bed(name: str) -> None:
    assert _program("up", name).returncode == 0
    _program("exec", name, "systemctl", "poweroff")
    _eventually("all gone", lambda: not _traces(name))


def test_ten_in_a_row(name: str) -> None:
    times = []
    for _ in range(10):
        began = time.monotonic()
        with Bed(name) as made:
            times.append(time.monotonic() - began)
            assert _output(made, "systemctl", "is-system-running") == "running"
        assert _traces(name) == []
    print("seconds to boot:", " ".join(f"{seconds:.2f}" for seconds in times))


# --- what cannot be is said ---------------------------------------------------------------------


def test_without_root(name: str) -> None:
    # In one process: another user may not even be able to read the program.
    script = "import os, sys, bed; os.setuid(65534); sys.exit(bed.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "up", name]
    here = Path(PROGRAM[1]).parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert result.returncode == 125
    assert result.stderr == (
        "bed: the test bed needs root: run it as root, for example with sudo\n"
    )


def test_without_capability(name: str) -> None:
    result = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", *PROGRAM, "up", name],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 125
    assert "needs the capabilities SYS_ADMIN" in result.stderr
    assert "--privileged" in result.stderr


def test_refusal_of_the_kernel() -> None:
    script = (
        "import bed_kernel as k\ntry: k.unshare(k.CLONE_NEWNS)\nexcept k.BedError as e: print(e)"
    )
    command = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", script]
    here = Path(PROGRAM[1]).parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert result.stdout == (
        "not permitted: new namespaces; in a container, start it with --privileged\n"
    )


@pytest.mark.parametrize(
    ("hide", "sentence"),
    [
        ("mount -t tmpfs none /usr/lib/systemd", "systemd is not installed: `apt-get install "),
        (
            "mount -t tmpfs none /usr/lib/systemd/system",
            "the system bus is not installed: `apt-get install dbus`",
        ),
        ("umount -R /sys/fs/cgroup", "is not mounted: as root, `mkdir -p /sys/fs/cgroup/"),
    ],
)
def test_without_a_part(name: str, hide: str, sentence: str) -> None:
    # In a mount namespace of its own, as that of a container that lacks it.
    command = ["unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh", *PROGRAM, "up", name]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 125
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_writable_cgroups(name: str) -> None:
    folders = sorted({hierarchy.parent for hierarchy in bed_cgroups.hierarchies()})
    binds = " && ".join(f"mount --bind {f} {f} && mount -o remount,bind,ro {f}" for f in folders)
    command = ["unshare", "--mount", "sh", "-c", f'{binds} && exec "$@"', "sh", *PROGRAM, "up"]
    result = subprocess.run([*command, name], capture_output=True, text=True)
    assert result.returncode == 125
    assert "cannot be made (Read-only file system)" in result.stderr


def test_boot_that_fails_shows_the_last_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bed._BOOT_TIMEOUT_SEC", 0.0)
    with pytest.raises(BedError, match=f"the bed called {name} was not up after 0 s"):
        Bed(name).up()


def test_bed_that_cannot_be_built_says_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(BedError, match=r"ended while it came up:\n.*File exists: .*/etc/passwd"):
        Bed(name, binds=[(str(tmp_path), "/etc/passwd")]).up()


@pytest.mark.parametrize("wrong", ["../x", "A", "", "x" * 33])
def test_name_that_is_none(wrong: str) -> None:
    result = _program("up", wrong)
    assert result.returncode == 125
    assert "cannot name a bed" in result.stderr


# --- pids ---------------------------------------------------------------------------------------


def test_recycled_pid_is_not_the_process() -> None:
    me = Process.me()
    assert me.alive
    other = Process(me.pid, "1")
    assert not other.alive
    assert other.open() is None
