"""The bed's own two processes: the supervisor, on the host's side, and what becomes its PID 1.

    bed_init.py NAME

The supervisor makes the PID namespace and waits. When PID 1 ends, whyever, it removes what the
bed left; when the supervisor is killed, the kernel kills PID 1, and with it all that runs inside.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

import bed_cgroups
import bed_host
import bed_state
from bed_kernel import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    BedError,
    Process,
    bind,
    die_with_parent,
    drop_capabilities,
    mount,
    pivot_root,
    unshare,
)

_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC
# Of what targets want on an installed system, all that a bed needs. The rest is masked: it would
# act on the kernel that is shared with the host, or wait for hardware.
_KEPT = {
    "dbus.service",
    "dbus.socket",
    "dbus-broker.service",
    "dbus-daemon.service",
    # Not started at boot: `loginctl enable-linger USER` starts it, and it a user's own systemd.
    "systemd-logind.service",
    "dbus-org.freedesktop.login1.service",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-journald-dev-log.socket",
    "systemd-tmpfiles-setup.service",
}
_TARGET = """\
[Unit]
Description=Test bed
Requires=sysinit.target dbus.socket
Wants=dbus.service slices.target
After=sysinit.target slices.target dbus.socket dbus.service
AllowIsolate=yes
"""
# Accounting is on by default on cgroup v2 and partly off on v1: let both behave alike.
_MANAGER = """\
[Manager]
DefaultCPUAccounting=yes
DefaultMemoryAccounting=yes
DefaultTasksAccounting=yes
ShowStatus=no
"""
_JOURNAL = """\
[Journal]
Storage=volatile
RateLimitIntervalSec=0
RateLimitBurst=0
ForwardToSyslog=no
ReadKMsg=no
Audit=no
"""


def supervise(name: str) -> int:
    """Run the bed until its PID 1 ends, then remove it."""
    state = bed_state.read(name)
    assert state is not None
    unshare(CLONE_NEWPID)
    wait, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        _become_init(state, wait)
    os.close(wait)
    init = os.pidfd_open(pid)
    signal.signal(signal.SIGTERM, lambda *_: signal.pidfd_send_signal(init, signal.SIGKILL))
    state = state.write(owner=Process.of(os.getpid()), init=Process.of(pid))
    os.write(go, b"!")
    waiting = select.poll()
    waiting.register(init, select.POLLIN)
    if state.tied:
        waiting.register(sys.stdin.fileno(), select.POLLHUP)
    if init not in dict(waiting.poll()):
        signal.pidfd_send_signal(init, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with bed_state.lock():
        bed_state.remove(state)
    return os.waitstatus_to_exitcode(status)


def _become_init(state: bed_state.State, wait: int) -> None:
    try:
        die_with_parent()
        if not os.read(wait, 1):  # the supervisor was gone before the kernel knew our wish
            os._exit(1)
        os.setsid()
        bed_cgroups.join(state.hierarchies, state.name)
        network = 0 if state.host_network else CLONE_NEWNET
        unshare(CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | network)
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
        socket.sethostname(f"bed-{state.name}")
        root = state.folder / "root"
        _build_root(state, root)
        _build_dev(root, state.folder / "console.log")
        for hierarchy in state.hierarchies:
            _mount_cgroups(root / "sys/fs/cgroup", hierarchy)
        _configure(root, state.name)
        os.chdir(root)
        pivot_root()
        drop_capabilities()
        environment = {
            "PATH": bed_host.PATH,
            "container": "bed",
            "NOTIFY_SOCKET": "/run/dbus/ready",
        }
        arguments = ["systemd", "--system", "--unit=bed.target", "--log-target=journal-or-kmsg"]
        os.execve(bed_host.systemd(), arguments, environment)
    except (OSError, BedError) as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()  # a fork must not return into the caller's code
    finally:
        os._exit(1)


def _build_root(state: bed_state.State, root: Path) -> None:
    # The upper layer must not lie in the lower one: it is on a tmpfs that nobody else sees.
    upper = state.folder / "upper"
    mount("tmpfs", str(upper), "tmpfs", options="mode=755")
    (upper / "data").mkdir()
    (upper / "work").mkdir()
    layers = f"lowerdir=/,upperdir={upper}/data,workdir={upper}/work"
    try:
        mount("overlay", str(root), "overlay", options=layers)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise BedError("the kernel has no overlay file system: `modprobe overlay`") from error
        raise
    # An overlay shows one file system of the host: the others are bound, never to be written.
    for found in bed_cgroups.mounts():
        inside = root / found.point.lstrip("/")
        own = found.point == "/" or found.point.startswith(
            ("/proc", "/sys", "/dev", "/run", "/tmp")
        )
        is_config = found.point in ("/etc/resolv.conf", "/etc/hosts")
        if not own and found.fstype != "autofs" and (inside.is_dir() or is_config):
            mount(found.point, str(inside), flags=MS_BIND)
            mount("none", str(inside), flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    for folder in ("proc", "sys", "dev", "run", "tmp"):
        (root / folder).mkdir(exist_ok=True)
    mount("proc", f"{root}/proc", "proc", _SAFE)
    for entry in ("sys", "sysrq-trigger", "irq", "bus"):
        if (root / "proc" / entry).exists():
            bind(f"{root}/proc/{entry}", f"{root}/proc/{entry}", read_only=True)
    mount("sysfs", f"{root}/sys", "sysfs", _SAFE | MS_RDONLY)
    mount("tmpfs", f"{root}/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    binds = [(f"{state.folder}/dbus", "/run/dbus", False), *state.binds]
    for source, target, read_only in binds:
        inside = root / target.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        bind(source, str(inside), read_only=read_only)


def _build_dev(root: Path, console: Path) -> None:
    dev = root / "dev"
    mount("tmpfs", str(dev), "tmpfs", MS_NOSUID, "mode=755")
    for node in ("null", "zero", "full", "random", "urandom", "tty"):
        (dev / node).touch()
        bind(f"/dev/{node}", f"{dev}/{node}")
    # What systemd has to say before there is a journal goes to the kernel's log: here, to a file.
    (dev / "kmsg").touch()
    bind(str(console), f"{dev}/kmsg")
    (dev / "pts").mkdir()
    options = "newinstance,ptmxmode=0666,mode=620,gid=5"
    mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, options)
    (dev / "shm").mkdir()
    mount("tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd"}
    links |= {f"std{name}": f"/proc/self/fd/{fd}" for fd, name in enumerate(("in", "out", "err"))}
    for name, target in links.items():
        (dev / name).symlink_to(target)


def _mount_cgroups(point: Path, hierarchy: bed_cgroups.Hierarchy) -> None:
    # In the new cgroup namespace the root of each is the bed's own cgroup.
    if hierarchy.place:
        if not os.path.ismount(point):
            mount("tmpfs", str(point), "tmpfs", _SAFE, "mode=755")
        for controller in hierarchy.place.split(","):
            if controller != hierarchy.place:  # cpu -> cpu,cpuacct
                (point / controller).symlink_to(hierarchy.place)
        point = point / hierarchy.place
        point.mkdir()
    mount(hierarchy.fstype, str(point), hierarchy.fstype, _SAFE, hierarchy.options)


def _configure(root: Path, name: str) -> None:
    etc = root / "etc"
    units = etc / "systemd/system"
    files = {
        etc / "machine-id": f"{secrets.token_hex(16)}\n",
        etc / "hostname": f"bed-{name}\n",
        etc / "fstab": "",
        units / "bed.target": _TARGET,
        etc / "systemd/system.conf.d/bed.conf": _MANAGER,
        etc / "systemd/journald.conf.d/bed.conf": _JOURNAL,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link, or a mount's empty file
        path.write_text(text)
    masked = set()
    for folder in (units, root / "usr/lib/systemd/system", root / "lib/systemd/system"):
        masked |= {unit.name for unit in folder.glob("*.target.wants/*")} - _KEPT
    for unit in masked:
        if not unit.endswith((".target", ".slice")):
            (units / unit).unlink(missing_ok=True)
            (units / unit).symlink_to("/dev/null")
    # Generators make units from fstab, partitions, init.d…: nothing that a bed would start.
    generators = etc / "systemd/system-generators"
    generators.mkdir(exist_ok=True)
    for generator in (root / "usr/lib/systemd/system-generators").glob("*"):
        (generators / generator.name).unlink(missing_ok=True)
        (generators / generator.name).symlink_to("/dev/null")


if __name__ == "__main__":
    try:
        sys.exit(supervise(sys.argv[1]))
    except (OSError, BedError) as error:
        sys.exit(str(error))
