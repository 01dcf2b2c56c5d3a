"""The files a virtual machine starts from, made once and kept: disk, kernel, saved state.

FOLDER/SUITE/
    lock          held by whoever makes, starts or ends this machine
    build.log     what the last build said
    image/        base.img: never booted · booted.img, state: as of the saved moment · vmlinuz,
                  initrd · key, known_hosts · manifest.json: what all these must be
    packages/     Python packages for the guest's Python
    run/          while it is up
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import vm_guest
import vm_host
from bed_kernel import BedError
from vm_machine import HARDWARE, MEMORY_MIB, Machine

SUITES = ("bookworm", "trixie")
_FOLDER = Path("/var/tmp/ffmpeg-worker-vm")
_DISK = "8G"  # as the guest sees it; it is sparse
_NEEDED_MIB = 5120  # at most at a time while an image is made
_BOOTSTRAP_TIMEOUT_SEC = 1200.0
_FIRST_BOOT_TIMEOUT_SEC = 300.0
_LOCK_TIMEOUT_SEC = 3600.0
_BLOCK = 1 << 18
# So that all of it is in the page cache of the saved state.
_WARM_UP = f"""\
timeout 120 systemctl is-system-running --wait >&2
python3 -c 'import asyncio, ctypes, json, sqlite3, ssl, subprocess, venv'
for i in 1 2; do systemd-run -q --wait -p CPUQuota=50% /bin/true; done
ffmpeg -v error -y -f lavfi -i testsrc=size=160x120:rate=10 -t 1 -preset ultrafast /tmp/w.mp4
ffprobe -v error /tmp/w.mp4
rm -f /tmp/w.mp4
busctl list >/dev/null
systemctl status >/dev/null
journalctl -n1 >/dev/null
loginctl user-status {vm_guest.USER} >/dev/null
journalctl --sync
sync
"""


class Image:
    """The image of a suite."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.home = _home() / suite
        try:
            self.home.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(self.home, error) from error
        self.folder = self.home / "image"
        self.machine = Machine(self.folder, self.home / "run")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One at a time. Raises BedError where somebody else takes too long, or none can."""
        deadline, told = time.monotonic() + _LOCK_TIMEOUT_SEC, False
        try:
            opened = (self.home / "lock").open("w")
        except OSError as error:
            raise _not_writable(self.home, error) from error
        with opened as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BedError(
                            f"another process is at {self.home}: wait for it, or end it"
                        ) from None
                    if not told:
                        print(f"vm: waiting for the other process at {self.home}", flush=True)
                        told = True
                    time.sleep(0.2)
            yield

    def problem(self, *, thorough: bool = False) -> str | None:
        """Why the image has to be made; None where it is whole and of today's recipe."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            if manifest["stamp"] != self._stamp():
                return "it was made by another recipe"
            known = manifest["files"]
        except FileNotFoundError:
            return "there is none"
        except (ValueError, KeyError, TypeError):
            return "its manifest is damaged"
        for name, facts in known.items():
            path = self.folder / name
            if not path.exists():
                return f"{name} is gone"
            if path.stat().st_size != facts["size"]:
                return f"{name} is damaged"
            # Reading gigabytes takes seconds, so only what has been touched is read.
            if thorough or _touched(path) != facts["touched"]:
                if _digest(path) != facts["sha256"]:
                    return f"{name} is damaged"
                facts["touched"] = _touched(path)
                self._write_manifest(self.folder, manifest)
        return None

    def ensure(self, *, again: bool = False) -> bool:
        """Make the image where that is needed; whether it was. Call it locked."""
        self.machine.check_place()
        problem = "that is asked for" if again else self.problem()
        if problem is None:
            return False
        if self.machine.process is not None:
            raise BedError(
                f"the image of {self.suite} has to be made anew ({problem}), "
                f"but the machine is up: `vm.py down --suite {self.suite}`"
            )
        with (self.home / "build.log").open("w") as log:
            vm_host.install_what_is_missing(log)
            vm_host.check_to_run(MEMORY_MIB)
            # With qemu back, an image that it has made before may be right again.
            if not again and (problem := self.problem()) is None:
                return False
            print(f"vm: making the image of {self.suite}: {problem}", flush=True)
            began = time.monotonic()
            # A damaged one is of no use, and its space is needed.
            shutil.rmtree(self.folder, ignore_errors=True)
            draft = self.home / "image.new"
            shutil.rmtree(draft, ignore_errors=True)
            vm_host.check_disk(self.home, _NEEDED_MIB)
            draft.mkdir(mode=0o700)
            try:
                self._make(draft, log)
                draft.rename(self.folder)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        print(f"vm: made in {time.monotonic() - began:.0f} s", flush=True)
        return True

    def _make(self, draft: Path, log: IO[str]) -> None:
        root = draft / "root"
        self._bootstrap(root, log)
        vm_guest.configure(root, draft, log)
        kernel = root / "boot" / f"vmlinuz-{vm_guest.kernel_version(root)}"
        shutil.copyfile(kernel, draft / "vmlinuz")
        shutil.rmtree(root / "boot")
        vm_guest.make_initrd(root, draft / "initrd", log)
        base = draft / "base.img"
        # Without a journal: nothing written here has to survive a crash.
        options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0"]
        command = ["mke2fs", *options, "-m", "0", "-d", str(root), str(base), _DISK]
        if vm_host.run_logged(command, log, 600):
            raise BedError(f"the disk cannot be made, see {log.name}")
        shutil.rmtree(root)
        print("vm: first boot, whose state is kept", flush=True)
        machine = Machine(draft, self.home / "run")
        subprocess.run(["cp", "--sparse=always", base, draft / "booted.img"], check=True)
        try:
            machine.start(draft / "booted.img", keep=True, tied=True)
            machine.wait(_FIRST_BOOT_TIMEOUT_SEC)
            machine.run([_WARM_UP], timeout=300, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            machine.hang_up()
            # The guest ends the session a moment later, and nothing tells the outside.
            time.sleep(3)
            machine.save(draft / "state")
        finally:
            machine.down()
        names = ["base.img", "booted.img", "state", "vmlinuz", "initrd", "key", "known_hosts"]
        files = {
            name: {
                "size": (draft / name).stat().st_size,
                "sha256": _digest(draft / name),
                "touched": _touched(draft / name),
            }
            for name in names
        }
        self._write_manifest(draft, {"stamp": self._stamp(), "files": files})

    def _bootstrap(self, root: Path, log: IO[str]) -> None:
        source = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {} {} main"
        hook = root.with_name("hook.sh")
        hook.write_text(f"#!/bin/sh\nchroot \"$1\" sh -e <<'END'\n{vm_guest.KERNEL_HOOK}END\n")
        hook.chmod(0o700)
        command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--skip=check/empty"]
        command += [f"--include={','.join(vm_guest.PACKAGES.split())}", f"--customize-hook={hook}"]
        # A mirror that is a copy of some day is as good.
        for name in ("Acquire::Check-Valid-Until", "Acquire::Check-Date"):
            command += [f'--aptopt={name} "false"']
        command += ['--aptopt=Acquire::Languages "none"']
        for folder in ("doc", "man", "locale", "info"):
            command += [f"--dpkgopt=path-exclude=/usr/share/{folder}/*"]
        command += [self.suite, str(root), source.format(vm_host.mirror(), self.suite)]
        if vm_host.run_logged(command, log, _BOOTSTRAP_TIMEOUT_SEC):
            raise BedError(
                f"Debian {self.suite} cannot be unpacked, see {log.name}: "
                "mostly the mirror is out of reach, then try again"
            )
        hook.unlink()

    def _stamp(self) -> str:
        """What the image depends on: this recipe, and the qemu that reads its saved state."""
        recipe = [self.suite, _DISK, _WARM_UP, *HARDWARE, Path(vm_guest.__file__).read_text()]
        made = hashlib.sha256("\0".join(recipe).encode())
        qemu = shutil.which("qemu-system-x86_64", path=vm_host.search_path())
        if qemu is not None:
            version = subprocess.run([qemu, "--version"], capture_output=True, timeout=60).stdout
            made.update(version)
        return made.hexdigest()

    @staticmethod
    def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
        new = folder / "manifest.json.new"
        new.write_text(json.dumps(manifest, indent=1))
        new.rename(folder / "manifest.json")


def _home() -> Path:
    """The folder of all images; nobody else may write there."""
    folder = Path(os.environ.get("FFMPEG_WORKER_VM") or _FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BedError(
            f"{folder} cannot be made ({error.strerror}): name another folder in FFMPEG_WORKER_VM"
        ) from error
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise BedError(f"others can write to {folder}: name another folder in FFMPEG_WORKER_VM")
    return folder.resolve()


def _not_writable(folder: Path, error: OSError) -> BedError:
    remedy = "name another folder in FFMPEG_WORKER_VM"
    if error.errno == errno.EROFS:
        remedy = f"mount it read-write, or {remedy}"
    return BedError(f"{folder} cannot be written to ({error.strerror}): {remedy}")


def _touched(path: Path) -> list[int]:
    """Changes whenever the file is written to, whatever is done to hide that."""
    facts = path.stat()
    return [facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]


def _digest(path: Path) -> str:
    """SHA-256 of the blocks of a file that are not all zero, and of where they are."""
    made = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            position -= position % _BLOCK
            file.seek(position)
            data = file.read(_BLOCK)
            if data.count(0) != len(data):
                made.update(position.to_bytes(8, "big"))
                made.update(data)
            position += _BLOCK
    return made.hexdigest()
