"""Stands in for an ffmpeg that its input has taken over. Runs inside a job's unit.

Called as ffmpeg is. What it is to do stands in a file that every job can read: one of the functions
below whose names are public, by the bitrate that the job asked for. What it found out goes into
ffmpeg's own log, in lines of JSON, and so to the master in the job's result. Questions of the
agent (-encoders and the like), and jobs for which nothing is ordered, go to the real ffmpeg.

Uses nothing but the standard library: it is run by the distribution's Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ORDERS = Path("/usr/local/share/intruder.json")
REAL = "/usr/bin/ffmpeg"
MARK = "INTRUDER "

_LIBC = ctypes.CDLL(None, use_errno=True)
# x86-64 and arm64, from the kernel's tables.
_CALLS = {
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "bpf": 321, "perf_event_open": 298, "keyctl": 250,
        "add_key": 248, "io_uring_setup": 425, "userfaultfd": 323, "pivot_root": 155, "setns": 308,
        "init_module": 175, "kexec_load": 246, "mount": 165, "umount2": 166, "unshare": 272,
        "clone3": 435, "open_by_handle_at": 304, "fsopen": 430, "quotactl": 179, "swapon": 167,
        "acct": 163, "reboot": 169, "syslog": 103, "settimeofday": 164, "personality": 135,
        "iopl": 172, "pidfd_getfd": 438, "kcmp": 312, "move_pages": 279, "chroot": 161,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "bpf": 280, "perf_event_open": 241, "keyctl": 219,
        "add_key": 217, "io_uring_setup": 425, "userfaultfd": 282, "pivot_root": 41, "setns": 268,
        "init_module": 105, "kexec_load": 104, "mount": 40, "umount2": 39, "unshare": 97,
        "clone3": 435, "open_by_handle_at": 265, "fsopen": 430, "quotactl": 60, "swapon": 224,
        "acct": 89, "reboot": 142, "syslog": 116, "settimeofday": 170, "personality": 92,
        "pidfd_getfd": 438, "kcmp": 272, "move_pages": 239, "chroot": 51,
    },
}[os.uname().machine]  # fmt: skip
_PR_SET_MM = 35
_CLONE_NEWUSER, _CLONE_NEWNS, _CLONE_NEWNET = 0x10000000, 0x00020000, 0x40000000


class Allowed(Exception):
    """An attempt came through; the text says what it got."""


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A system call by its name. Raises OSError."""
    result = _LIBC.syscall(_CALLS[name], *arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def _read(path: str) -> Callable[[], str]:
    def attempt() -> str:
        if os.path.isdir(path):
            if names := os.listdir(path):
                return f"listed: {sorted(names)[:5]}"
            raise FileNotFoundError(errno.ENOENT, "an empty folder")
        with open(path, "rb") as file:
            return f"read {len(file.read(100))} bytes"

    return attempt


def _write(path: str) -> Callable[[], str]:
    def attempt() -> str:
        with open(path, "r+b" if os.path.exists(path) else "xb") as file:
            file.write(b"0")
        return "written"

    return attempt


def _connect(family: int, address: object, kind: int = socket.SOCK_STREAM) -> Callable[[], str]:
    def attempt() -> str:
        with socket.socket(family, kind) as one:
            one.settimeout(2)
            one.connect(address)  # type: ignore[arg-type]
        return "connected"

    return attempt


def _syscall(name: str, *arguments: int | bytes | None) -> Callable[[], str]:
    return lambda: f"returned {_call(name, *arguments)}"


def _others(order: dict[str, object]) -> list[int]:
    """Processes that are not ours: all that could be."""
    pids = [int(str(pid)) for pid in order.get("pids", [])]  # type: ignore[attr-defined]
    return [1, *pids]


def _signal_others(order: dict[str, object]) -> str:
    mine = {os.getpid(), os.getppid()}
    found = []
    for pid in {*range(1, 4000), *_others(order)} - mine:
        try:
            os.kill(pid, 0)
        except OSError:
            continue
        if os.path.exists(f"/proc/{pid}/cgroup"):
            with open(f"/proc/{pid}/cgroup") as file, open("/proc/self/cgroup") as own:
                if file.read() == own.read():
                    continue  # of this unit: a thread of its own, say
        found.append(pid)
    if not found:
        raise PermissionError(errno.EPERM, "no process may be signalled")
    return f"may signal {found}"


def _see_others(order: dict[str, object]) -> str:
    with open("/proc/self/cgroup") as file:
        own = file.read()
    seen = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cgroup") as file:
                    if file.read() != own:
                        seen.append(name)
            except OSError:
                continue
    seen += [str(pid) for pid in _others(order) if os.path.exists(f"/proc/{pid}/cmdline")]
    if not seen:
        raise PermissionError(errno.EPERM, "no other process is seen")
    return f"sees {seen}"


def _drop_and_run() -> str:
    for folder in (os.getcwd(), "/tmp", "/var/tmp", "/dev/shm"):
        path = f"{folder}/dropped"
        try:
            with open("/bin/true", "rb") as source, open(path, "wb") as file:
                file.write(source.read())
            os.chmod(path, 0o755)
        except OSError:
            continue
        pid = os.fork()
        if pid == 0:
            try:
                os.execv(path, [path])
            finally:
                os._exit(126)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return f"{path} was run"
    raise PermissionError(errno.EACCES, "nothing dropped could be run")


def _set_uid_bit() -> str:
    with open("suid", "wb") as file:
        os.fchmod(file.fileno(), 0o4755)
        return f"mode {stat.S_IMODE(os.fstat(file.fileno()).st_mode):o}"


def _writable_code() -> str:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    return "mapped"


def _code_made_executable() -> str:
    area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if _LIBC.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "mprotect")
    return "made executable"


def _realtime() -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "is realtime"


def _raise_limit() -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no limit on files"


def _write_anywhere(folder: str) -> str:
    """Make a file in each folder that there is, but for the job's own."""
    own = {(os.stat(path).st_dev, os.stat(path).st_ino) for path in (folder,)}
    made = []
    for top, folders, _ in os.walk("/"):
        if top in ("/proc", "/sys/kernel"):
            folders[:] = []
        found = os.stat(top)
        if (found.st_dev, found.st_ino) in own:
            continue
        try:
            with open(f"{top}/intruded", "xb"):
                made.append(top)
        except OSError:
            continue
    # Memory of the unit itself, which goes with it.
    made = [top for top in made if top not in ("/dev/shm", "/dev/mqueue")]
    if not made:
        raise PermissionError(errno.EROFS, "no folder but its own is writable")
    return f"wrote in {made}"


def _cgroup_escape() -> str:
    for path in Path("/sys/fs/cgroup").glob("**/cgroup.procs"):
        try:
            path.write_text(str(os.getpid()))
            return f"moved to {path}"
        except OSError:
            continue
    raise PermissionError(errno.EACCES, "no cgroup takes it")


def attempts(order: dict[str, object]) -> dict[str, Callable[[], object]]:
    """What it tries, by name; each returns what it got, or raises."""
    inet, inet6, unix = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
    port = int(str(order.get("port", 80)))
    files = [str(path) for path in order.get("files", [])]  # type: ignore[attr-defined]
    found: dict[str, Callable[[], object]] = {}
    for path in (
        "/etc/shadow", "/etc/passwd", "/etc/ssl/private", "/root", "/home", "/boot", "/srv",
        "/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/transient",
        "/var/log", "/var/lib/systemd", "/etc/systemd", "/etc/ffmpeg-worker", "/proc/1/environ",
        "/proc/1/root/etc/shadow", "/proc/kcore", "/proc/keys", "/proc/cmdline", "/dev/mem",
        "/dev/kmsg", "/sys/kernel/debug", "/sys/kernel/security", "/sys/fs/bpf", *files,
    ):  # fmt: skip
        found[f"read {path}"] = _read(path)
    for path in (
        "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper",
        "/usr/local/bin/x", "/etc/x", "/run/x", "/proc/1/oom_score_adj", *files,
    ):  # fmt: skip
        found[f"write {path}"] = _write(path)
    found |= {
        "connect to the bus": _connect(unix, "/run/dbus/system_bus_socket"),
        "connect to systemd": _connect(unix, "/run/systemd/private"),
        "connect to the control socket": _connect(unix, "/var/lib/ffmpeg-worker/control.sock"),
        "connect to an abstract socket": _connect(unix, "\0intruded"),
        "connect to the host": _connect(inet, ("127.0.0.1", port)),
        "connect to the host by IPv6": _connect(inet6, ("::1", port)),
        "connect to the world": _connect(inet, ("192.0.2.1", 80)),
        "send to the world": _connect(inet, ("192.0.2.1", 53), socket.SOCK_DGRAM),
        "ask a cloud for its secrets": _connect(inet, ("169.254.169.254", 80)),
        "a netlink socket": _connect(socket.AF_NETLINK, (0, 0), socket.SOCK_RAW),
        "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3),
        "a raw socket": lambda: socket.socket(inet, socket.SOCK_RAW, 1),
        "ptrace init": _syscall("ptrace", 16, 1, 0, 0),
        "be traced": _syscall("ptrace", 0, 0, 0, 0),
        "read memory of init": _syscall("process_vm_readv", 1, 0, 0, 0, 0, 0),
        "mount": _syscall("mount", b"none", b"/tmp", b"tmpfs", 0, 0),
        "umount": _syscall("umount2", b"/proc", 2),
        "mount the new way": _syscall("fsopen", b"tmpfs", 0),
        "chroot": _syscall("chroot", b"."),
        "pivot_root": _syscall("pivot_root", b".", b"."),
        "a namespace of users": _syscall("unshare", _CLONE_NEWUSER),
        "a namespace of mounts": _syscall("unshare", _CLONE_NEWNS),
        "a namespace of networks": _syscall("unshare", _CLONE_NEWNET),
        "enter a namespace": _syscall("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0),
        "open by handle": _syscall("open_by_handle_at", -100, 0, 0),
        "load a module": _syscall("init_module", 0, 0, b""),
        "kexec": _syscall("kexec_load", 0, 0, 0, 0),
        "bpf": _syscall("bpf", 0, 0, 0),
        "perf": _syscall("perf_event_open", 0, 0, -1, -1, 0),
        "io_uring": _syscall("io_uring_setup", 1, 0),
        "userfaultfd": _syscall("userfaultfd", 1),
        "keys": _syscall("keyctl", 0, 0xFFFFFFFD, 1),
        "add a key": _syscall("add_key", b"user", b"x", b"x", 1, 0xFFFFFFFD),
        "quotas": _syscall("quotactl", 0x800001 << 8, 0, 0, 0),
        "swap": _syscall("swapon", b"/dev/zero", 0),
        "accounting": _syscall("acct", 0),
        "reboot": _syscall("reboot", 0xFEE1DEAD, 672274793, 0, 0),
        "the kernel's log": _syscall("syslog", 3, 0, 0),
        "set the time": _syscall("settimeofday", 0, 0),
        "another personality": _syscall("personality", 0x0400000),
        "take a descriptor": _syscall("pidfd_getfd", 0, 0, 0),
        "become root": lambda: os.setresuid(0, 0, 0),
        "another group": lambda: os.setgroups([0]),
        "give a file away": lambda: os.chown(os.getcwd(), 0, 0),
        "a set-uid file": _set_uid_bit,
        "a device node": lambda: os.mknod("node", stat.S_IFCHR | 0o666, os.makedev(1, 1)),
        "set the host's name": lambda: socket.sethostname("intruded"),
        "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
        "realtime": _realtime,
        "no limit on files": _raise_limit,
        "writable code": _writable_code,
        "run what was dropped": _drop_and_run,
        "code made executable": _code_made_executable,
        "another cgroup": _cgroup_escape,
        "signal others": lambda: _signal_others(order),
        "see others": lambda: _see_others(order),
        "write anywhere": lambda: _write_anywhere(os.getcwd()),
    }  # fmt: skip
    return found


def look_around(order: dict[str, object]) -> dict[str, str]:
    """Try all that a job must not be able to do: for each, why it could not, or ALLOWED."""
    return {name: _tried(attempt) for name, attempt in attempts(order).items()}


def _tried(attempt: Callable[[], object]) -> str:
    """The outcome, found out by a process of its own: what comes through may change all else."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome = f"ALLOWED: {attempt()}"
        except (OSError, ValueError) as error:
            outcome = f"denied: {error}"
        os.write(writing, outcome.encode())
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 20)
    text = os.read(reading, 4096).decode() if ready else "ALLOWED: it is at it yet"
    os.close(reading)
    with contextlib.suppress(OSError):  # not even its own, where that is filtered
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return text


def sleep(order: dict[str, object]) -> dict[str, str]:
    """Do nothing for a while."""
    time.sleep(float(str(order.get("seconds", 5))))
    return {}


def nothing(order: dict[str, object]) -> dict[str, str]:
    """To be asked for in the end."""
    return {}


def ignore_signals(order: dict[str, object]) -> dict[str, str]:
    """Be deaf to all that can be ignored."""
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def fork_bomb(order: dict[str, object]) -> dict[str, str]:
    """Fork as fast as it goes, each of the new ones as well."""
    while True:
        try:
            os.fork()
        except OSError:
            continue


def memory_bomb(order: dict[str, object]) -> dict[str, str]:
    """Take memory, and touch it."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1 << 20)) * 8)


def busy_loop(order: dict[str, object]) -> dict[str, str]:
    """Two busy processes for each CPU."""
    for _ in range(2 * (os.cpu_count() or 1) - 1):
        if os.fork() == 0:
            break
    while True:
        pass


def fill_disk(order: dict[str, object]) -> dict[str, str]:
    """Write one file after the other, each of a size that is allowed."""
    block, number = os.urandom(1 << 20), 0
    while True:
        number += 1
        with open(f"fill-{number}", "wb", buffering=0) as file:
            for _ in range(16):
                file.write(block)


def fill_disk_unseen(order: dict[str, object]) -> dict[str, str]:
    """The same with files that have no name any more."""
    block, kept = os.urandom(1 << 20), []
    while True:
        kept.append(open("fill", "wb", buffering=0))  # noqa: SIM115 - kept open
        os.unlink("fill")
        for _ in range(16):
            kept[-1].write(block)
        time.sleep(0.02)  # some 800 MB a second: where files are in memory, that is limited, too


def fill_disk_with_names(order: dict[str, object]) -> dict[str, str]:
    """A million empty files."""
    for number in range(1_000_000):
        os.close(os.open(f"name-{number}", os.O_CREAT | os.O_WRONLY))
    time.sleep(60)
    return {}


def dig(order: dict[str, object]) -> dict[str, str]:
    """A tree of folders too deep for a program that calls itself for each, then the transcode."""
    top = os.open(".", os.O_RDONLY)
    for _ in range(int(str(order.get("depth", 20_000)))):
        os.mkdir("d")
        os.chdir("d")
    os.fchdir(top)
    return {}


def leave_a_child(order: dict[str, object]) -> dict[str, str]:
    """A process that outlives the transcode, to change the output after it was checked."""
    if os.fork() == 0:
        os.setsid()
        for number in (0, 1, 2):
            os.dup2(os.open("/dev/null", os.O_RDWR), number)
        time.sleep(600)
    return {}


def wait(order: dict[str, object]) -> dict[str, str]:
    """Until somebody on the host makes a file named ``go`` in the job's folder."""
    while not os.path.exists("go"):
        time.sleep(0.02)
    os.unlink("go")
    return {}


def swap_files(order: dict[str, object]) -> dict[str, str]:
    """End well, with something else in the place of the output or the log (``what``)."""
    _transcode()
    path = sys.argv[-1].removeprefix("file:")
    if order["what"] == "log":
        path = str(_log(sys.argv[1:]))
        Path(path).touch()
    kind, target = order["kind"], str(order.get("target"))
    os.rename(path, "other")
    if kind == "symlink":
        os.symlink(target, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o666)
    elif kind == "hard link":
        os.link("other", path)
    elif kind == "text":
        Path(path).write_text(target * int(str(order.get("times", 1))))
    elif kind == "garbage":
        Path(path).write_bytes(os.urandom(1 << 20))
    sys.exit(int(str(order.get("status", 0))))


def change_modes(order: dict[str, object]) -> dict[str, str]:
    """End well, with rights on the output that it should not have, and tell which it got."""
    _transcode()
    path = sys.argv[-1].removeprefix("file:")
    # Version 2, for the group of all jobs: acl(5), linux/posix_acl_xattr.h.
    entries = ((1, 7, -1), (4, 7, -1), (8, 7, os.getgid()), (0x10, 7, -1), (0x20, 7, -1))
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, who & 0xFFFFFFFF) for tag, rights, who in entries
    )
    return _outcomes(
        {
            "set-uid": lambda: os.chmod(path, 0o4755),
            "set-gid": lambda: os.chmod(path, 0o2755),
            "access list": lambda: os.setxattr(path, "system.posix_acl_access", acl),
            "another mode": lambda: os.chmod(path, int(str(order["mode"]))),
            "another owner": lambda: os.chown(path, 0, 0),
        }
    )


def lock_up(order: dict[str, object]) -> dict[str, str]:
    """Folders that nobody may pass, and what else could be in the way of cleaning up."""
    own, folder = os.getcwd(), Path("locked/in/it")
    folder.mkdir(parents=True)
    (folder / "file").touch(mode=0)
    (folder / "again").symlink_to(own)
    os.mkfifo(folder / "pipe")
    for path in (folder, *folder.parents[:-1]):
        path.chmod(0)
    Path("-rf").touch()
    Path(os.fsdecode(b"\xff\n\x1b[2J")).mkdir()
    found = _outcomes(
        {
            "its folder's mode": lambda: os.chmod(own, 0),
            "its folder's name": lambda: os.rename(own, f"{own}2"),
            "no folder": lambda: os.rmdir(own),
            "a file beside it": _write(f"{own}/../x"),
            "an attribute": lambda: os.setxattr("-rf", "trusted.x", b"x"),
            "the record of what is published": _write(f"{own}/../publishing.json"),
        }
    )
    _transcode()
    return found


def litter(order: dict[str, object]) -> dict[str, str]:
    """Many names, then the transcode."""
    for number in range(int(str(order["count"]))):
        if number % 50_000 == 0:
            os.mkdir(f"d{number}")
            os.chdir(f"d{number}")
        os.close(os.open(f"{number}", os.O_CREAT | os.O_WRONLY))
    return {}


def flood(order: dict[str, object]) -> dict[str, str]:
    """Standard output full of what the agent may take for ffmpeg's or for systemd's."""
    own = Path("/proc/self/cgroup").read_text().rpartition(":")[2].strip()
    text = str(order["text"]).replace("CGROUP", f"/sys/fs/cgroup{own}")
    with open(1, "wb", closefd=False) as out:
        for _ in range(int(str(order.get("times", 1)))):
            out.write(text.encode())
        out.write(os.urandom(int(str(order.get("garbage", 0)))))
    return {}


def list_places(order: dict[str, object]) -> dict[str, str]:
    """What is in files and folders, or why that cannot be seen."""
    return _outcomes({str(path): _read(str(path)) for path in order["files"]})  # type: ignore[attr-defined]


def _outcomes(attempts: dict[str, Callable[[], object]]) -> dict[str, str]:
    outcome = {}
    for name, attempt in attempts.items():
        try:
            outcome[name] = f"ALLOWED: {attempt()}"
        except OSError as error:
            outcome[name] = f"denied: {error}"
    return outcome


def _transcode() -> None:
    """As the real one would, but for the log."""
    environment = {name: value for name, value in os.environ.items() if name != "FFREPORT"}
    subprocess.run([REAL, *sys.argv[1:]], check=True, env=environment)


def _log(argv: list[str]) -> Path:
    """Where ffmpeg would write its log: FFREPORT, see ffmpeg(1)."""
    name = re.match(r"file=((?:\\.|[^:])+)", os.environ["FFREPORT"])
    assert name is not None, argv
    return Path(re.sub(r"\\(.)", r"\1", name[1]).replace("%%", "%"))


def main(argv: list[str]) -> NoReturn:
    """Do as ordered, once for each run of the transcode proper; else be ffmpeg."""
    orders = json.loads(ORDERS.read_text()) if ORDERS.exists() else {}
    bitrate = argv[argv.index("-b:v") + 1] if "-b:v" in argv else ""
    order = orders.get(bitrate) or orders.get("*")
    if "FFREPORT" not in os.environ or order is None or "lavfi" in argv:
        os.execv(REAL, [REAL, *argv])
    found = globals()[order["do"]](order)
    with _log(argv).open("a") as log:
        for name, outcome in found.items():  # long lines are cut on their way
            log.write(f"{MARK}{json.dumps([name, outcome[:1000]])}\n")
    if order.get("then") == "transcode":
        os.execv(REAL, [REAL, *argv])
    sys.exit(int(order.get("status", 1)))


if __name__ == "__main__":
    main(sys.argv[1:])
