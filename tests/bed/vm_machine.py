"""One virtual machine: a qemu process, and ssh into it.

qemu emulates the processor in software, always. Where /dev/kvm can be opened it may still hang,
so it is not even looked for.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bed_kernel import BedError, Process, die_with_parent
from vm_qmp import Qmp

MEMORY_MIB = 2048
_CPUS = 2
_RESTORE_TIMEOUT_SEC = 60.0
_BOOT_TIMEOUT_SEC = 300.0
_ANSWER_TIMEOUT_SEC = 30.0
_SSH_FAILED = 255  # ssh's own status; a command may have the same
# Sockets' names have 107 bytes at most (unix(7)), and ssh adds 17 of its own while it makes one.
_LONGEST_FOLDER = 85
# What a saved state belongs to, so that it is in the stamp of an image.
# Nehalem has all that Debian's programs use, and no AVX, which is slow to emulate.
HARDWARE = [
    *("-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "Nehalem"),
    *("-smp", str(_CPUS), "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config"),
    *("-display", "none", "-device", "virtio-rng-pci"),
]
_KERNEL = (
    "console=ttyS0 net.ifnames=0 mitigations=off quiet systemd.show_status=0 "
    "tsc=reliable no_timer_check"
)


class Machine:
    """A machine whose files are in `image` and whose traces, while it is up, are in `run`."""

    def __init__(self, image: Path, run: Path) -> None:
        self.image = image
        self.run_folder = run
        self.console = run / "console.log"
        self._started: subprocess.Popen[bytes] | None = None

    def check_place(self) -> None:
        """Raise BedError where the machine cannot work in its folder."""
        name = os.fsencode(self.run_folder)
        if len(name) > _LONGEST_FOLDER or b"," in name:
            raise BedError(
                f"{self.run_folder} cannot be used: qemu and ssh take neither a comma nor more "
                f"than {_LONGEST_FOLDER} bytes; name another folder in FFMPEG_WORKER_VM"
            )

    # --- the process ---------------------------------------------------------------------------

    @property
    def _state(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads((self.run_folder / "machine.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return state

    @property
    def process(self) -> Process | None:
        """The qemu that runs, or None. A recycled pid is not taken for it."""
        state = self._state
        if state is None:
            return None
        process = Process(**state["process"])
        return process if process.alive else None

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 that leads to the guest's ssh."""
        state = self._state
        if state is None:
            raise BedError("the virtual machine is not up: `vm.py up`")
        return int(state["port"])

    def start(self, disk: Path, *, keep: bool, tied: bool, state: Path | None = None) -> None:
        """Start qemu: cold, or at a saved `state`; `keep` what the guest writes on the disk.

        A `tied` machine is killed by the kernel when this process ends. Raises BedError.
        """
        shutil.rmtree(self.run_folder, ignore_errors=True)
        self.run_folder.mkdir(parents=True, mode=0o700)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        snapshot = "off" if keep else "on"
        command = ["qemu-system-x86_64", *HARDWARE]
        command += ["-kernel", str(self.image / "vmlinuz"), "-initrd", str(self.image / "initrd")]
        command += ["-append", _KERNEL, "-device", "virtio-blk-pci,drive=disk"]
        drive = f"file={disk},format=raw,if=none,id=disk,cache=unsafe,snapshot={snapshot}"
        # The guest reaches nothing outside of itself.
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"
        command += ["-drive", drive, "-netdev", network]
        command += ["-device", "virtio-net-pci,netdev=net,romfile="]
        command += ["-serial", f"file:{self.console}"]
        command += ["-qmp", f"unix:{self.run_folder}/qmp,server=on,wait=off"]
        if state is not None:
            command += ["-incoming", f"exec:cat {shlex.quote(str(state))}"]
        # qemu's own -daemonize breaks exec: migrations, so it is left to run by itself here.
        with (self.run_folder / "qemu.log").open("wb") as log:
            self._started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                # The disk's snapshot is a nameless file: gone with the process.
                env=os.environ | {"TMPDIR": str(self.run_folder)},
                start_new_session=True,
                preexec_fn=die_with_parent if tied else None,
            )
        process = Process.of(self._started.pid)
        if process is None:
            raise BedError(f"qemu ended at once: {self.said()}")
        values = {"process": asdict(process), "port": port}
        (self.run_folder / "machine.json").write_text(json.dumps(values))

    def up(self, *, tied: bool) -> str:
        """Start it and return when ssh answers: how that was reached. Raises BedError."""
        saved = self.image / "state"
        try:
            if saved.exists():
                self.start(self.image / "booted.img", keep=False, tied=tied, state=saved)
                try:
                    with Qmp(self.run_folder / "qmp", _ANSWER_TIMEOUT_SEC) as qmp:
                        qmp.resume(_RESTORE_TIMEOUT_SEC)
                    self.wait(_RESTORE_TIMEOUT_SEC)
                    return "restored"
                except (BedError, OSError) as error:
                    print(f"vm: restoring failed ({error}), booting instead", flush=True)
                    self.down()
            self.start(self.image / "base.img", keep=False, tied=tied)
            self.wait(_BOOT_TIMEOUT_SEC)
        except BaseException:
            self.down()
            raise
        return "booted"

    def wait(self, timeout: float) -> None:
        """Wait until ssh answers, and set the guest's clock. Raises BedError after `timeout` s."""
        deadline = time.monotonic() + timeout
        while self.process is not None and time.monotonic() < deadline:
            # While the guest boots, qemu accepts connections that nobody answers.
            if self._connect():
                now = datetime.datetime.now(datetime.UTC).timestamp()
                done = self.run([f"date --set=@{now}"], timeout=30, stdout=subprocess.DEVNULL)
                if done.returncode == 0:
                    return
            time.sleep(0.1)
        why = "does not answer" if self.process is not None else "has ended"
        raise BedError(
            f"the virtual machine {why} after {timeout:.0f} s at most: {self.said()}; "
            "`vm.py build --again` makes it anew"
        )

    def said(self) -> str:
        """The last lines of qemu and of the guest's console."""
        lines = []
        for path in (self.run_folder / "qemu.log", self.console):
            with contextlib.suppress(FileNotFoundError):
                lines += path.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return " / ".join(said[-3:]) or "it said nothing"

    def save(self, target: Path) -> None:
        """Write the state of the running machine to `target`, stopped from then on."""
        with Qmp(self.run_folder / "qmp", _ANSWER_TIMEOUT_SEC) as qmp:
            qmp.save(target)

    def down(self) -> None:
        """End it, however it is; what it has written is lost, unless it was to be kept."""
        process = self.process
        if process is not None:
            self.hang_up()
            with (
                contextlib.suppress(OSError, BedError),
                Qmp(self.run_folder / "qmp", 5) as qmp,
            ):
                qmp.command("quit")
            with contextlib.suppress(BedError):
                process.end(signal.SIGCONT, 5)  # only waits, and wakes one that is stopped
            process.end(signal.SIGKILL, 10)
        if self._started is not None:
            self._started.wait(10)
            self._started = None
        shutil.rmtree(self.run_folder, ignore_errors=True)

    # --- inside --------------------------------------------------------------------------------

    def _ssh(self, *options: str) -> list[str]:
        # The host key is known and named: whatever else listens on the port is not taken for it.
        fixed = {
            "BatchMode": "yes",
            "ConnectTimeout": "5",
            "ControlPath": f"{self.run_folder}/ssh",
            "HostKeyAlias": "vm",
            "LogLevel": "ERROR",
            "ServerAliveCountMax": "8",
            "ServerAliveInterval": "15",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.image / "known_hosts"),
        }
        command = ["ssh", "-F", "none", "-i", str(self.image / "key"), "-p", str(self.port)]
        for name, value in fixed.items():
            command += ["-o", f"{name}={value}"]
        return [*command, *options, "root@127.0.0.1"]

    def _connect(self) -> bool:
        """Open the connection that all commands share; whether that worked."""
        command = self._ssh("-o", "ControlMaster=yes", "-fN")
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_ANSWER_TIMEOUT_SEC,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def hang_up(self) -> None:
        """Close the shared connection."""
        if (self.run_folder / "ssh").exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(self._ssh("-O", "exit"), capture_output=True, timeout=10)

    def run(
        self,
        command: Sequence[str],
        *,
        user: str = "root",
        timeout: float | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command inside and wait for it. `options` are subprocess.run's.

        One argument is a line for the shell, several are an argv. Raises BedError where the
        machine is not up or does not answer, subprocess.TimeoutExpired after `timeout` seconds.
        """
        line = command[0] if len(command) == 1 else shlex.join(command)
        if user != "root":
            line = _as_user(user, line)
        if timeout is not None:
            # The end of ssh here is none of the command there; this side's time is up first.
            line = f"exec timeout --kill-after=5 {timeout + 1:.0f} bash -c {shlex.quote(line)}"
        if self.process is None:
            raise BedError("the virtual machine is not up: `vm.py up`")
        if not (self.run_folder / "ssh").exists() and not self._connect():
            raise BedError("the virtual machine does not answer: `vm.py down` ends it")
        done = subprocess.run([*self._ssh(), line], timeout=timeout, **options)
        if done.returncode == _SSH_FAILED and not self._answers():
            raise BedError("the virtual machine does not answer any more: `vm.py down` ends it")
        return done

    def _answers(self) -> bool:
        try:
            done = subprocess.run(
                [*self._ssh(), "true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_ANSWER_TIMEOUT_SEC,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def push(self, source: Path, target: str, excluded: Sequence[str] = ()) -> None:
        """Copy a file to `target`, or what a folder holds into the folder `target`."""
        if not source.exists():
            raise BedError(f"{source} cannot be copied: it does not exist")
        where = shlex.quote(target)
        if source.is_dir():
            leave = [f"--exclude={pattern}" for pattern in excluded]
            sender = ["tar", "-C", str(source), *leave, "--owner=0", "--group=0", "-cf", "-", "."]
            self._pipe(
                sender, f"mkdir -p {where} && tar -C {where} --warning=no-timestamp -xf -", target
            )
        else:
            mode = oct(source.stat().st_mode & 0o777)[2:]
            line = f'mkdir -p "$(dirname {where})" && cat >{where} && chmod {mode} {where}'
            self._pipe(["cat", str(source)], line, target)

    def _pipe(self, sender: list[str], receiver: str, target: str) -> None:
        with subprocess.Popen(sender, stdout=subprocess.PIPE) as sending:
            done = self.run([receiver], stdin=sending.stdout)
        if sending.returncode or done.returncode:
            raise BedError(f"{target} in the virtual machine was not written: is its disk full?")

    def pull(self, source: str, target: Path) -> None:
        """Copy a file from inside to `target`, or what a folder holds into the folder."""
        what = shlex.quote(source)
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL}
        if self.run([f"test -e {what}"], **quiet).returncode:
            raise BedError(f"{source} cannot be copied: it does not exist in the virtual machine")
        if self.run([f"test -d {what}"], **quiet).returncode == 0:
            target.mkdir(parents=True, exist_ok=True)
            sent = self.run([f"tar -C {what} -cf - ."], stdout=subprocess.PIPE, **quiet)
            subprocess.run(["tar", "-C", str(target), "-xf", "-"], input=sent.stdout, check=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                self.run([f"cat {what}"], stdout=file, **quiet)


def _as_user(user: str, line: str) -> str:
    """`line` as somebody who has logged in: with a home, and the bus of the user's systemd."""
    name = shlex.quote(user)
    return (
        f"id -u {name} >/dev/null || exit; run=/run/user/$(id -u {name}); cd ~{name} || exit; "
        f"exec runuser -u {name} -- env HOME=$PWD USER={name} LOGNAME={name} "
        "XDG_RUNTIME_DIR=$run DBUS_SESSION_BUS_ADDRESS=unix:path=$run/bus "
        f"bash -c {shlex.quote(line)}"
    )
