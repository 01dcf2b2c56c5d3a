"""The virtual machine itself: `make test-vm` for what runs in it, this for how it behaves.

Needs root, and minutes where there is no image yet. FFMPEG_WORKER_VM_SUITE chooses the suite.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bed"))

from bed_kernel import Process
from vm_image import Image

BED = Path(__file__).resolve().parents[1] / "bed"
SUITE = os.environ.get("FFMPEG_WORKER_VM_SUITE", "bookworm")
PROGRAM = [sys.executable, str(BED / "vm.py")]


def _vm(verb: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, verb, "--suite", SUITE, *arguments]
    options = {"capture_output": True, "text": True, "timeout": 900} | options
    return subprocess.run(command, **options)


def _output(*command: str) -> str:
    done = _vm("run", *command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _traces() -> list[str]:
    """What is left of a machine: its folder and its processes."""
    run = Image(SUITE).machine.run_folder
    found = [str(run)] if run.exists() else []
    listed = subprocess.run(["pgrep", "-af", str(run)], capture_output=True, text=True).stdout
    return found + listed.splitlines()


def _eventually_nothing() -> None:
    deadline = time.monotonic() + 30
    while any("qemu" in trace for trace in _traces()):
        assert time.monotonic() < deadline, _traces()
        time.sleep(0.1)


@pytest.fixture
def down() -> Iterator[None]:
    """No machine before, and none after."""
    _vm("down")
    assert _vm("build").returncode == 0
    yield
    _vm("down")
    assert _traces() == []


@pytest.fixture
def machine(down: None) -> Image:
    done = _vm("up")
    assert done.returncode == 0, done.stderr
    return Image(SUITE)


@pytest.mark.usefixtures("machine")
class TestUp:
    """One machine that is up, in one test for each kind of thing: a start takes seconds."""

    def test_it_is_what_it_should_be(self) -> None:
        version = {"bookworm": "252", "trixie": "257"}[SUITE]
        assert _output("systemctl --version").split()[1] == version
        assert _output("systemctl", "is-system-running") == "running"
        assert _output("stat -f -c %T /sys/fs/cgroup") == "cgroup2fs"
        controllers = set(_output("cat /sys/fs/cgroup/cgroup.controllers").split())
        assert controllers >= {"cpu", "cpuset", "io", "memory", "pids"}
        assert abs(float(_output("date +%s")) - time.time()) < 30
        assert _output("grep -rl http /etc/apt || true") == ""

    def test_limits_are_enforced(self) -> None:
        hog = "systemd-run -q --wait -p MemoryMax=64M -p MemorySwapMax=0 python3 -c"
        assert _vm("run", f"{hog} 'bytearray(16 << 20)'").returncode == 0
        assert _vm("run", f"{hog} 'bytearray(200 << 20)'").returncode != 0

    def test_tester_has_a_manager_with_controllers(self) -> None:
        done = _vm("runas", "tester", "systemctl --user is-system-running; id -un; pwd")
        assert done.stdout.split() == ["running", "tester", "/home/tester"]
        folder = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
        controllers = set(_output(f"cat {folder}/cgroup.controllers").split())
        assert controllers == {"cpu", "cpuset", "io", "memory", "pids"}
        unit = "systemd-run --user -q --wait -p MemoryMax=64M python3 -c"
        assert _vm("runas", "tester", f"{unit} 'bytearray(200 << 20)'").returncode != 0
        assert _vm("runas", "nobody-at-all", "true").returncode != 0

    def test_commands(self) -> None:
        done = _vm("run", "sh", "-c", "cat; echo e >&2; exit 7", input="in")
        assert (done.returncode, done.stdout, done.stderr) == (7, "in", "e\n")
        assert _vm("run", "exit 255").returncode == 255
        assert _output("printf", "%s|", "a b", "$HOME", "'") == "a b|$HOME|'|"
        done = _vm("run", "--timeout", "1", "sleep", "60")
        assert done.returncode == 125
        assert "did not end within 1 s" in done.stderr

    def test_files_in_and_out(self, tmp_path: Path) -> None:
        source = tmp_path / "in put"
        (source / "below").mkdir(parents=True)
        (source / "below/a").write_bytes(bytes(range(256)) * 4096)
        (source / "run").write_text("#!/bin/sh\n")
        (source / "run").chmod(0o755)
        assert _vm("push", str(source), "/var/tmp/in put").returncode == 0
        assert _vm("push", str(source / "run"), "/var/tmp/x/run").returncode == 0
        assert _output("stat", "-c", "%a %u", "/var/tmp/x/run") == "755 0"
        assert _vm("pull", "/var/tmp/in put", str(tmp_path / "out")).returncode == 0
        assert (tmp_path / "out/below/a").read_bytes() == (source / "below/a").read_bytes()
        assert _vm("pull", "/var/tmp/x/run", str(tmp_path / "file")).returncode == 0
        assert (tmp_path / "file").read_text() == "#!/bin/sh\n"
        for command in (("pull", "/no/such", "x"), ("push", "/no/such", "/x")):
            done = _vm(*command)
            assert done.returncode == 125
            assert "/no/such cannot be copied: it does not exist" in done.stderr

    def test_it_is_up_until_it_is_down(self) -> None:
        assert _vm("status").returncode == 0
        assert "up already" in _vm("up").stdout
        assert _vm("run", "touch /etc/trace").returncode == 0
        refused = _vm("test")
        assert refused.returncode == 125
        assert f"`vm.py down --suite {SUITE}`" in refused.stderr
        assert _vm("down").returncode == 0
        assert _vm("status").returncode == 3
        assert _vm("up").returncode == 0
        assert _vm("run", "test -e /etc/trace").returncode == 1

    def test_hung_machine_is_ended(self, machine: Image) -> None:
        process = machine.machine.process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        assert _vm("down", timeout=60).returncode == 0
        assert not process.alive

    def test_hung_machine_is_started_anew(self, machine: Image) -> None:
        process = machine.machine.process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        assert "does not answer" in _vm("up").stdout
        assert not process.alive
        assert _output("echo", "there") == "there"

    def test_machine_that_died_is_said(self, machine: Image) -> None:
        process = machine.machine.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        done = _vm("run", "true")
        assert done.returncode == 125
        assert "vm: the virtual machine " in done.stderr


@pytest.mark.usefixtures("down")
@pytest.mark.parametrize("verb", ["up", "test"])
@pytest.mark.parametrize("after", [0.5, 3.0])
def test_interrupted(verb: str, after: float) -> None:
    command = [*PROGRAM, verb, "--suite", SUITE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            process.wait(after)  # any moment will do
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (130, 0)
    if process.returncode == 130:
        assert said == b"vm: interrupted, and nothing is left half done: start it again\n"
        assert _traces() == []


@pytest.mark.usefixtures("down")
def test_killed_test_takes_the_machine_with_it() -> None:
    with subprocess.Popen([*PROGRAM, "test", "--suite", SUITE]) as process:
        deadline = time.monotonic() + 120
        while (qemu := Image(SUITE).machine.process) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    deadline = time.monotonic() + 10
    while Process.of(qemu.pid) == qemu:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("down")
def test_machine_that_hangs_while_it_tests_is_ended() -> None:
    """ssh gives up after two minutes without an answer."""
    command = [*PROGRAM, "test", "--suite", SUITE, "--part", "core"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        while "== core tests" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        qemu = Image(SUITE).machine.process
        assert qemu is not None
        os.kill(qemu.pid, signal.SIGSTOP)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 125
    assert said.startswith("vm: the virtual machine hung or died in the core tests, and is ended: ")
    assert said.count("\n") == 1
    assert not qemu.alive


@pytest.mark.usefixtures("down")
def test_saved_state_that_cannot_be_restored_is_booted_around() -> None:
    image = Image(SUITE)
    state, aside = image.folder / "state", image.home / "state.aside"
    state.rename(aside)
    try:
        # As if the check were wrong: it is the machine that must cope.
        state.write_bytes(b"no state at all")
        assert image.machine.up(tied=True) == "booted"
        image.machine.down()
    finally:
        aside.rename(state)
    assert image.problem() is None


@pytest.mark.usefixtures("down")
def test_ten_in_a_row() -> None:
    times = []
    for _ in range(10):
        began = time.monotonic()
        assert _vm("up").returncode == 0
        times.append(time.monotonic() - began)
        assert _vm("down").returncode == 0
    print("seconds to come up:", " ".join(f"{seconds:.1f}" for seconds in times))
