"""The system calls the bed needs and Python 3.11 does not offer, and processes told apart.

Everything here is called through libc: starting `mount` thirty times would cost more than the
whole boot of the bed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
from dataclasses import dataclass

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
# Capabilities that reach past every namespace, to the clock, the modules and the log of the one
# kernel that bed and host share (numbers: linux/capability.h).
_DROPPED = {
    "SYS_MODULE": 16,
    "SYS_RAWIO": 17,
    "SYS_TIME": 25,
    "MAC_OVERRIDE": 32,
    "MAC_ADMIN": 33,
    "SYSLOG": 34,
    "WAKE_ALARM": 35,
    "BLOCK_SUSPEND": 36,
}

_libc = ctypes.CDLL(None, use_errno=True)


class BedError(Exception):
    """The bed cannot do what was asked. The text is one sentence: what is wrong and what helps."""


def _call(what: str, function: str, *arguments: int | bytes | None) -> None:
    converted = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc, function)(*converted) != 0:
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.EACCES):
            raise BedError(f"not permitted: {what}; in a container, start it with --privileged")
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError or BedError that names source and target."""
    arguments = (source.encode(), target.encode(), fstype.encode() or None, flags)
    _call(f"mount {fstype or source} on {target}", "mount", *arguments, options.encode() or None)


def bind(source: str, target: str, *, read_only: bool = False) -> None:
    """Show `source`, and what is mounted below it, at `target`."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if read_only:
        mount("none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _call("new namespaces", "unshare", flags)


def setns(fd: int) -> None:
    """setns(2): enter the namespace that `fd` refers to."""
    _call("enter a namespace", "setns", fd, 0)


def pivot_root() -> None:
    """Make the working directory, a mount point, the root, and let go of the old one."""
    try:
        # Both arguments the same: the old root lands on top of the new one and is taken off it;
        # no folder for it is needed (pivot_root(2), NOTES).
        _call("pivot_root", "pivot_root", b".", b".")
        _call("umount of the old root", "umount2", b".", _MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # In an initramfs, or in a chroot, nothing can be pivoted.
        mount(".", "/", flags=MS_MOVE)
        os.chroot(".")
    os.chdir("/")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    _call("prctl", "prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def drop_capabilities() -> None:
    """Take what could touch the shared kernel from everything executed from here on."""
    for name, number in _DROPPED.items():
        _call(f"drop CAP_{name}", "prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Process:
    """A process: its pid and when it started, so that a recycled pid is not taken for it."""

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has `pid` now. None where there is none, or only a zombie."""
        try:
            fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            text = os.read(fd, 4096)
        except ProcessLookupError:
            return None
        finally:
            os.close(fd)
        # The second field is the name, in parentheses, and may contain anything; proc(5).
        fields = text.rpartition(b")")[2].split()
        return None if fields[0] in b"ZX" else cls(pid, fields[19].decode())

    @classmethod
    def me(cls) -> Process:
        """The calling process."""
        process = cls.of(os.getpid())
        assert process is not None
        return process

    @property
    def alive(self) -> bool:
        """Whether it is still this process that runs under the pid."""
        return Process.of(self.pid) == self

    def open(self) -> int | None:
        """A pidfd of exactly this process, or None where it has ended. The caller closes it."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Only now: from here on the descriptor stays with whatever process it was opened for.
        if self.alive:
            return fd
        os.close(fd)
        return None

    def end(self, number: signal.Signals, timeout: float) -> None:
        """Send it a signal and wait until it is gone. Raises BedError after `timeout` seconds."""
        pidfd = self.open()
        if pidfd is None:
            return
        try:
            signal.pidfd_send_signal(pidfd, number)
            gone = select.poll()
            gone.register(pidfd, select.POLLIN)
            if not gone.poll(timeout * 1000):
                raise BedError(f"process {self.pid} of the bed did not end within {timeout:.0f} s")
        finally:
            os.close(pidfd)
