"""The bed's control groups: one child of the caller's own cgroup in every hierarchy there is.

On cgroup v1, and in the hybrid layout, each controller is a hierarchy of its own; on v2 there is
one. Which of them it is here is read from /proc/self/cgroup (cgroups(7)), nothing is assumed.
"""

from __future__ import annotations

import errno
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bed_kernel import BedError, Process

PREFIX = "ffmpeg-worker-bed-"
# Where our own ancestors wait while a pure v2 cgroup has children with controllers.
CALLER = "ffmpeg-worker-caller"
_REQUIRED = {"cpu", "memory", "pids"}
_WANTED = _REQUIRED | {"cpuset", "io"}
_REMEDY = "in a container start it with full access to its own cgroups (docker: --privileged)"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One hierarchy, as the host mounts it and as the bed will."""

    fstype: str  # cgroup or cgroup2
    options: str  # mount options that select the hierarchy
    place: str  # folder under /sys/fs/cgroup inside; empty: /sys/fs/cgroup itself
    parent: str  # the host's folder of the caller's own cgroup

    def as_dict(self) -> dict[str, str]:
        """For the state file."""
        return asdict(self)

    def folder(self, name: str) -> Path:
        """The host's folder of the bed called `name`."""
        return Path(self.parent, PREFIX + name)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    root: str
    point: str
    fstype: str
    super_options: frozenset[str]


def mounts() -> list[Mount]:
    """The mounts this process sees, in the order they were made."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        own, _, filesystem = line.partition(" - ")
        # Blanks in paths are written \040; proc(5).
        root, point = (
            re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)
            for field in own.split(" ")[3:5]
        )
        fstype, _, super_options = filesystem.split(" ", 2)
        found.append(Mount(root, point, fstype, frozenset(super_options.split(","))))
    return found


def hierarchies() -> list[Hierarchy]:
    """Every hierarchy the bed needs a child in. Raises BedError where one is not mounted."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    on_v1 = {controller for _, names, _ in lines for controller in names.split(",")}
    hybrid = bool(on_v1 & _REQUIRED)
    found = []
    for _, names, path in lines:
        if not names:
            place = "unified" if hybrid else ""
            found.append(Hierarchy("cgroup2", "", place, _own_folder("cgroup2", set(), path)))
        elif hybrid:
            # Those systemd sets nothing in, too: it mounts all, and one without a child of ours
            # would show the bed the caller's own cgroup.
            options = f"none,{names}" if names.startswith("name=") else names
            parent = _own_folder("cgroup", set(names.split(",")), path)
            found.append(Hierarchy("cgroup", options, names.removeprefix("name="), parent))
    missing = (_REQUIRED | {"name=systemd"}) - on_v1 if hybrid else set()
    if missing:
        first = sorted(missing)[0]
        raise BedError(f"there is no cgroup hierarchy with {first}: {_how_to(first)}")
    return found


def _own_folder(fstype: str, controllers: set[str], path: str) -> str:
    """Where the host shows the cgroup `path` of a hierarchy."""
    path = path.removesuffix("/" + CALLER) or "/"
    for mount in mounts():
        if mount.fstype != fstype or not controllers <= mount.super_options:
            continue
        # A container may have only its own part of the hierarchy mounted.
        root = mount.root.rstrip("/")
        if path == root or path.startswith(root + "/"):
            return (mount.point + path[len(root) :]).rstrip("/")
    what = ",".join(sorted(controllers)) or "cgroup2"
    raise BedError(f"the cgroup hierarchy {what} is not mounted: {_how_to(what)}")


def _how_to(what: str) -> str:
    if what == "cgroup2":
        folder, command = "unified", "-t cgroup2 cgroup2"
    else:
        options = f"none,{what}" if what.startswith("name=") else what
        folder, command = what.removeprefix("name="), f"-t cgroup -o {options} cgroup"
    point = f"/sys/fs/cgroup/{folder}"
    return f"as root, `mkdir -p {point}; mount {command} {point}`"


def create(found: list[Hierarchy], name: str) -> None:
    """Make the bed's cgroups. Raises BedError where that is not allowed, or not enough."""
    for hierarchy in found:
        folder = hierarchy.folder(name)
        try:
            if not hierarchy.place:
                _enable_controllers(Path(hierarchy.parent))
            _make(folder, hierarchy)
        except OSError as error:
            raise BedError(
                f"the cgroup {folder} cannot be made ({error.strerror}): "
                f"run as root with a writable /sys/fs/cgroup; {_REMEDY}"
            ) from error


def _enable_controllers(own: Path) -> None:
    """On pure v2: give the children of `own` their controllers."""
    offered = set((own / "cgroup.controllers").read_text().split())
    if not offered >= _REQUIRED:
        raise BedError(
            f"limits cannot be enforced: the caller's cgroup {own} lacks the controllers "
            f"{', '.join(sorted(_REQUIRED - offered))}; "
            f"run it under `systemd-run --scope -p Delegate=yes …`, or {_REMEDY}"
        )
    control = own / "cgroup.subtree_control"
    missing = (offered & _WANTED) - set(control.read_text().split())
    if not missing:
        return
    request = " ".join(f"+{controller}" for controller in sorted(missing))
    try:
        control.write_text(request)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # No cgroup but the root may have both processes and children with controllers.
        _step_aside(own)
        control.write_text(request)


def _step_aside(own: Path) -> None:
    """Move the processes of `own` to a child of it, if it is ours to arrange.

    It is if the host's systemd delegated it, or if nobody but this process and its ancestors is
    there.
    """
    here = {int(pid) for pid in (own / "cgroup.procs").read_text().split()}
    others = here - _ancestors()
    if others and not _delegated(own):
        raise BedError(
            f"limits cannot be enforced: the caller's cgroup {own} holds other processes "
            f"({', '.join(str(pid) for pid in sorted(others)[:5])}); "
            "run it in a cgroup of its own: `systemd-run --scope -p Delegate=yes …`"
        )
    (own / CALLER).mkdir(exist_ok=True)
    _move(here, own / CALLER)


def _delegated(own: Path) -> bool:
    # systemd marks what it delegates, https://systemd.io/CGROUP_DELEGATION
    names = set(os.listxattr(own)) & {"trusted.delegate", "user.delegate"}
    return any(os.getxattr(own, name) == b"1" for name in names)


def _ancestors() -> set[int]:
    pids, pid = set(), os.getpid()
    while pid > 0:
        pids.add(pid)
        pid = int(re.findall(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[0])
    return pids


def _move(pids: set[int], folder: Path) -> None:
    for pid in pids:
        try:
            (folder / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            continue


def _make(folder: Path, hierarchy: Hierarchy) -> None:
    folder.mkdir(exist_ok=True)
    if "cpuset" in hierarchy.place.split(","):
        for file in ("cpuset.cpus", "cpuset.mems"):  # a new v1 cpuset has none, and is unusable
            (folder / file).write_text((folder.parent / file).read_text())


def join(found: list[Hierarchy], name: str, child: str = "") -> None:
    """Move the calling process into the bed's cgroups, or into a child of them."""
    for hierarchy in found:
        folder = hierarchy.folder(name)
        if child:
            folder /= child
            _make(folder, hierarchy)
        # 0 is the writer itself, whatever pid it has in whose eyes.
        (folder / "cgroup.procs").write_text("0")


def remove(found: list[Hierarchy], name: str, timeout: float = 5.0) -> None:
    """Remove the bed's cgroups, whose processes are gone. Raises BedError if some are not."""
    deadline = time.monotonic() + timeout
    for hierarchy in found:
        folder = hierarchy.folder(name)
        while folder.is_dir():
            for path, _, _ in os.walk(folder, topdown=False):
                try:
                    Path(path).rmdir()
                except OSError as error:
                    if error.errno not in (errno.EBUSY, errno.ENOENT, errno.ENOTEMPTY):
                        raise
            if not folder.is_dir():
                break
            if time.monotonic() > deadline:
                raise BedError(f"the cgroup {folder} is still in use by {_users(folder)}")
            # The kernel lets go of a killed process a moment after its end is reported, and
            # gives no event for it.
            time.sleep(0.005)
        if not hierarchy.place:
            _step_back(Path(hierarchy.parent))


def _users(folder: Path) -> str:
    pids = [p for file in folder.rglob("cgroup.procs") for p in file.read_text().split()]
    known = [pid for pid in pids if Process.of(int(pid))]
    return f"the processes {', '.join(known[:5])}" if known else "the kernel"


def _step_back(own: Path, timeout: float = 5.0) -> None:
    """Undo _step_aside when the last bed below `own` is gone. Raises OSError if it cannot be."""
    aside = own / CALLER
    if not aside.is_dir() or any(own.glob(PREFIX + "*")):
        return
    control = own / "cgroup.subtree_control"
    deadline = time.monotonic() + timeout
    while True:
        try:
            words = control.read_text().split()
            control.write_text(" ".join(f"-{controller}" for controller in words))
            _move({int(pid) for pid in (aside / "cgroup.procs").read_text().split()}, own)
            aside.rmdir()
            return
        except OSError as error:
            # A process that has just been killed, or was just forked, is still in there.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
