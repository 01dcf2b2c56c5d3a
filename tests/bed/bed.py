#!/usr/bin/python3
"""A real systemd to test with, on a machine whose own PID 1 is not systemd.

    bed.py run [--bind DIR[:DST]]… [--net host|private] [--name N] -- COMMAND…
    bed.py up NAME [--bind DIR[:DST]]… [--net host|private]
    bed.py exec NAME COMMAND…
    bed.py status NAME
    bed.py down NAME | --all

A bed is systemd as PID 1 of new PID, mount, cgroup, UTS, IPC and network namespaces. Its root is
an overlay: the host's files, while nothing written inside reaches the host, except below the
folders given with --bind. The project's folder is seen as it is now, read-only. Its cgroups are
children of the caller's, so the kernel enforces the limits of units. `run` makes a bed for one
command and always removes it. The exit status is the command's; 125 where the bed itself failed.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import bed_cgroups
import bed_enter
import bed_state
from bed_host import check_host, environment
from bed_kernel import BedError, Process

PROJECT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
_BOOT_TIMEOUT_SEC = 30.0
_STOP_TIMEOUT_SEC = 10.0
_OWN_FOLDERS = (
    "/",
    "/tmp",
    "/run",
    "/var",
    "/var/run",
    "/var/tmp",
    "/dev",
    "/proc",
    "/sys",
    "/etc",
)
# No site packages, no PYTHON* variables: the programs next to this one start in 20 ms.
_PYTHON = [sys.executable, "-S", "-s", "-E"]


class Bed:
    """One bed. As a context manager it is up inside the block and gone after it.

    Every bed has a name of its own, so any number can be up at once. The bed ends with this
    process, even a killed one, unless it is `detached`.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        binds: Sequence[tuple[str, str]] = (),
        host_network: bool = False,
        detached: bool = False,
    ) -> None:
        """`binds` are folders (outside, inside) that the bed may write to."""
        self.name = f"{os.getpid()}-{secrets.token_hex(3)}" if name is None else name
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", self.name):
            raise BedError(f"{self.name!r} cannot name a bed: use 1 to 32 of a-z, 0-9 and -")
        self._binds = [(str(PROJECT), str(PROJECT), True)]
        for outside, inside in binds:
            if not Path(outside).is_dir():
                raise BedError(f"{outside} cannot be bound: it is no folder")
            absolute = str(Path(outside).resolve())
            target = os.path.normpath(inside or absolute)
            if target in _OWN_FOLDERS:
                # systemd-tmpfiles empties /tmp at boot, and what it emptied would be the host's.
                raise BedError(f"{outside} cannot be bound to {target}: that is the bed's own")
            self._binds.append((absolute, target, False))
        self._host_network = host_network
        self._detached = detached
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def _state(self) -> bed_state.State:
        state = bed_state.read(self.name)
        if state is None or not state.up:
            raise BedError(f"there is no bed called {self.name}: `bed.py up {self.name}`")
        return state

    @property
    def pid(self) -> int:
        """The pid of the bed's PID 1, as the host sees it. Raises BedError if the bed is not up."""
        init = self._state.init
        assert init is not None
        return init.pid

    @property
    def bus_address(self) -> str:
        """The D-Bus address of the bed's system bus, for clients on the host."""
        return f"unix:path={bed_state.FOLDER}/{self.name}/dbus/system_bus_socket"

    def up(self) -> None:
        """Boot, and return when all that is started at boot has been. Raises BedError."""
        check_host()
        state = bed_state.State(
            name=self.name,
            owner=Process.me(),
            hierarchies=bed_cgroups.hierarchies(),
            binds=self._binds,
            host_network=self._host_network,
            tied=not self._detached,
        )
        bed_state.claim(state)
        try:
            with bed_state.lock():
                bed_cgroups.create(state.hierarchies, self.name)
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
                (state.folder / "console.log").open("w+b") as console,
            ):
                # systemd says here that it has finished starting, as to a container's manager.
                ready.bind(str(state.folder / "dbus/ready"))
                self._supervisor = subprocess.Popen(
                    [*_PYTHON, str(_HERE / "bed_init.py"), self.name],
                    stdin=subprocess.DEVNULL if self._detached else subprocess.PIPE,
                    stdout=console,
                    stderr=console,
                    cwd="/",
                    start_new_session=True,
                )
                problem = self._wait_for(ready, self._supervisor.pid)
                if problem:
                    said = Path(f"/proc/self/fd/{console.fileno()}").read_text(errors="replace")
                    lines = [*said.splitlines(), *self._journal()][-20:]
                    raise BedError("\n".join([f"the bed called {self.name} {problem}:", *lines]))
        except BaseException:
            self.down()
            raise

    def _wait_for(self, ready: socket.socket, supervisor: int) -> str | None:
        """Wait until the bed is up; or say what is wrong."""
        deadline = time.monotonic() + _BOOT_TIMEOUT_SEC
        waiting = select.poll()
        waiting.register(ready, select.POLLIN)
        pidfd = os.pidfd_open(supervisor)
        waiting.register(pidfd, select.POLLIN)
        try:
            while True:
                happened = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
                if not happened:
                    return f"was not up after {_BOOT_TIMEOUT_SEC:.0f} s"
                if ready.fileno() not in dict(happened):
                    return "ended while it came up"
                if b"READY=1" in ready.recv(4096).splitlines():
                    return None
        finally:
            os.close(pidfd)

    def _journal(self) -> list[str]:
        state = bed_state.read(self.name)
        if state is None or not state.up:
            return []
        command = ["journalctl", "--no-pager", "--lines=20", "--output=short-monotonic"]
        try:
            result = self.run(command, capture_output=True, text=True, timeout=5)
        except subprocess.TimeoutExpired:
            return ["(the journal cannot be read)"]
        return str(result.stdout).splitlines()

    def popen(
        self,
        argv: Sequence[str],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command inside, as root, outside of all units. `options` are subprocess.Popen's.

        `cwd` is a folder inside; without it the caller's, or / where that is not seen inside.
        `env` is added to the bed's environment. A command that cannot be entered, found or
        executed ends with 125, 127 or 126.
        """
        self._state  # noqa: B018 - raises if the bed is not up
        command = [*_PYTHON, str(_HERE / "bed_enter.py"), self.name, os.fspath(cwd or ""), *argv]
        return subprocess.Popen(command, env=environment() | dict(env or {}), **options)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: Any = None,  # noqa: A002 - as subprocess.run calls it
        timeout: float | None = None,
        check: bool = False,
        capture_output: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command inside and wait for it: subprocess.run, with popen's `cwd` and `env`."""
        if capture_output:
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if input is not None:
            options["stdin"] = subprocess.PIPE
        with self.popen(argv, **options) as process:
            try:
                output, errors = process.communicate(input, timeout)
            except BaseException:
                process.send_signal(bed_enter.KILL)
                raise
        result = subprocess.CompletedProcess(argv, process.returncode, output, errors)
        if check:
            result.check_returncode()
        return result

    def down(self) -> None:
        """Kill all that runs inside and remove the bed. One that is not there is fine."""
        # The supervisor kills PID 1, and with it all that is inside, and then removes the bed.
        if self._supervisor is not None:
            with self._supervisor as supervisor:
                supervisor.terminate()
            self._supervisor = None
        elif (state := bed_state.read(self.name)) is not None:
            if state.init is not None:
                state.owner.end(signal.SIGTERM, _STOP_TIMEOUT_SEC)
                state.init.end(signal.SIGKILL, _STOP_TIMEOUT_SEC)
            elif state.owner.alive and state.owner != Process.me():
                raise BedError(
                    f"the bed called {self.name} is coming up, in process {state.owner.pid}: "
                    "end that, or try again"
                )
        # Still there only if the supervisor was killed, or never came to it.
        with bed_state.lock():
            state = bed_state.read(self.name)
            if state is not None:
                bed_state.remove(state)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()


class _InterruptedError(Exception):
    """A signal asks this program to end."""


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise _InterruptedError(number)


def _run(bed: Bed, command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with bed, bed.popen(command) as process:
            try:
                return process.wait()
            except _InterruptedError as interrupted:
                # A terminal has told the command already, and once more does no harm.
                process.send_signal(interrupted.args[0])
                try:
                    process.wait(_STOP_TIMEOUT_SEC)
                except (subprocess.TimeoutExpired, _InterruptedError):
                    process.send_signal(bed_enter.KILL)
                raise
    except _InterruptedError as interrupted:
        return 128 + int(interrupted.args[0])


def _status(name: str) -> int:
    bed = Bed(name)
    state = bed_state.read(name)
    if state is None or not state.up:
        print("down" if state is None else f"down, with remains: `bed.py down {name}`")
        return 3
    command = ["systemctl", "is-system-running"]
    system = bed.run(command, capture_output=True, text=True).stdout.strip()
    print(f"up\npid: {bed.pid}\nsystem: {system}\nbus: {bed.bus_address}")
    return 0


def _down(name: str | None) -> int:
    if name is not None:
        Bed(name).down()
        return 0
    with bed_state.lock():
        for left in bed_state.names():
            if bed_state.remove_if_dead(left):
                print(f"removed what was left of {left}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    for action in ("run", "up", "exec", "status", "down"):
        made = commands.add_parser(action)
        if action in ("run", "up"):
            made.add_argument("--bind", action="append", default=[], metavar="DIR[:DST]")
            made.add_argument("--net", choices=("private", "host"), default="private")
        if action == "run":
            made.add_argument("--name")
        elif action == "down":
            which = made.add_mutually_exclusive_group(required=True)
            which.add_argument("name", nargs="?")
            which.add_argument("--all", action="store_true", help="what crashes have left")
        else:
            made.add_argument("name")
        if action in ("run", "exec"):
            made.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command: list[str] = getattr(options, "command", None) or []
    if command[:1] == ["--"]:
        del command[0]
    try:
        if options.action in ("run", "exec") and not command:
            parser.error("there is no command to run")
        if options.action == "exec":
            wanted = environment()
            os.environ.clear()
            os.environ.update(wanted)
            return bed_enter.main([options.name, "", *command])
        if options.action == "status":
            return _status(options.name)
        if options.action == "down":
            return _down(options.name)
        binds = []
        for given in options.bind:
            outside, _, inside = given.partition(":")
            binds.append((outside, inside))
        bed = Bed(
            options.name,
            binds=binds,
            host_network=options.net == "host",
            detached=options.action == "up",
        )
        if options.action == "run":
            return _run(bed, command)
        bed.up()
        return 0
    except BedError as error:
        print(f"bed: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
