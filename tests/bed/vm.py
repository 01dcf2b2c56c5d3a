#!/usr/bin/python3
"""A real Debian with a real systemd on cgroup v2, in a virtual machine, to test with.

    vm.py build [--again]        make the image and its saved state, where that is needed
    vm.py up                     start it; every start is from the same state
    vm.py run COMMAND…           run it as root; one argument is a line for the shell
    vm.py runas USER COMMAND…    the same as somebody else; `tester` has a user manager
    vm.py push SOURCE TARGET     copy a file, or what is in a folder, into it
    vm.py pull SOURCE TARGET     … and out of it
    vm.py down                   end it; what was written inside is lost
    vm.py status                 whether it is up
    vm.py test [--part PART] [-- PYTEST…]
                                 run the project's tests in it, from `up` to `down`; `core` is
                                 the part that takes minutes, see vm_tests.py

--suite bookworm (systemd 252, the default) or trixie (257) comes after the verb. The exit status
is the command's; 125 where the machine itself failed. All of it lies in
/var/tmp/ffmpeg-worker-vm, or where FFMPEG_WORKER_VM says. qemu emulates the processor, so it
needs neither KVM nor a systemd here, and programs inside take 10 to 30 times longer.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import vm_host
import vm_tests
from bed_kernel import BedError
from vm_image import SUITES, Image
from vm_machine import MEMORY_MIB

_SPARE_MIB = 1024  # of disk, for what the guest writes
_TEST_TIMEOUT_SEC = 4 * 3600.0  # everything takes an hour and a half


class _InterruptedError(BaseException):
    """A signal asks this program to end."""


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # Once is enough: cleaning up is not to be interrupted.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise _InterruptedError(number)


def _prepare(image: Image) -> None:
    """See to a whole image, and that the machine can be started here. Call it locked.

    Raises BedError.
    """
    image.ensure()
    vm_host.check_to_run(MEMORY_MIB)
    vm_host.check_disk(image.home, _SPARE_MIB)


def _up(image: Image, *, tied: bool) -> None:
    """Bring the machine up from a prepared image. Call it locked. Raises BedError."""
    began = time.monotonic()
    try:
        how = image.machine.up(tied=tied)
    except BedError:
        if image.problem(thorough=True) is None:
            raise
        image.ensure()
        began = time.monotonic()
        how = image.machine.up(tied=tied)
    print(f"vm: {image.suite} {how} in {time.monotonic() - began:.1f} s", flush=True)


def _start(image: Image) -> int:
    with image.lock():
        if image.machine.process is not None:
            try:
                image.machine.run(["true"], timeout=60, stdin=subprocess.DEVNULL)
            except (BedError, subprocess.TimeoutExpired):
                print("vm: it does not answer, so it is started anew", flush=True)
                image.machine.down()
            else:
                print(f"vm: {image.suite} is up already")
                return 0
        _prepare(image)
        _up(image, tied=False)
    return 0


def _test(image: Image, options: argparse.Namespace) -> int:
    with image.lock():
        if image.machine.process is not None:
            raise BedError(
                f"the {image.suite} machine is up, and tests need a fresh one: "
                f"`vm.py down --suite {image.suite}`"
            )
        _prepare(image)
        vm_tests.packages(image)
        try:
            _up(image, tied=True)
            return vm_tests.run(
                image, image.machine, options.part, options.command, options.timeout
            )
        finally:
            image.machine.down()


def _status(image: Image) -> int:
    process = image.machine.process
    if process is None:
        print("down")
        return 3
    print(f"up\npid: {process.pid}\nssh: 127.0.0.1:{image.machine.port}")
    return 0


def _act(options: argparse.Namespace) -> int:
    image = Image(options.suite)
    machine = image.machine
    if options.action == "build":
        with image.lock():
            if not image.ensure(again=options.again):
                print(f"vm: the image of {image.suite} is up to date")
    elif options.action == "up":
        return _start(image)
    elif options.action == "down":
        # Without the lock: whoever holds it may be the one that hangs.
        machine.down()
    elif options.action == "status":
        return _status(image)
    elif options.action == "test":
        return _test(image, options)
    elif options.action == "push":
        machine.push(Path(options.source), options.target)
    elif options.action == "pull":
        machine.pull(options.source, Path(options.target))
    else:
        user = options.user if options.action == "runas" else "root"
        return int(machine.run(options.command, user=user, timeout=options.timeout).returncode)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    for action in ("build", "up", "run", "runas", "push", "pull", "down", "status", "test"):
        made = commands.add_parser(action)
        made.add_argument("--suite", choices=SUITES, default=SUITES[0])
        if action == "build":
            made.add_argument("--again", action="store_true", help="even if it is up to date")
        elif action in ("push", "pull"):
            made.add_argument("source")
            made.add_argument("target")
        elif action == "runas":
            made.add_argument("user")
        elif action == "test":
            made.add_argument("--part", choices=vm_tests.PARTS, default="all")
        if action in ("run", "runas", "test"):
            limit = _TEST_TIMEOUT_SEC if action == "test" else None
            made.add_argument("--timeout", type=float, metavar="SECONDS", default=limit)
            made.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if getattr(options, "command", [])[:1] == ["--"]:
        del options.command[0]
    if options.action in ("run", "runas") and not options.command:
        parser.error("there is no command to run")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        if os.geteuid() != 0:
            raise BedError("virtual machines are made and run by root: use sudo, for example")
        return _act(options)
    except BedError as error:
        print(f"vm: {error}", file=sys.stderr)
    except subprocess.TimeoutExpired as error:
        print(f"vm: it did not end within {error.timeout:.0f} s: is it hung?", file=sys.stderr)
    except OSError as error:
        said = vm_host.redacted(str(error))
        print(f"vm: {said}: put that right, or `vm.py build --again`", file=sys.stderr)
    except _InterruptedError as interrupted:
        print("vm: interrupted, and nothing is left half done: start it again", file=sys.stderr)
        return 128 + int(interrupted.args[0])
    return 125


if __name__ == "__main__":
    sys.exit(main())
