"""What a job can see and do: its root, and the properties that close it in. Pure but for JobRoot.

A job parses hostile files, so it is taken for hostile itself. It runs under a uid of its own that
no other process has, sees a root of its own that holds programs, its folder and its input, and can
ask the kernel for little else. See systemd.exec(5) for each property, and docs/security.md for what
each is good for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from worker.systemd.property import Property

_FOLDERS = (
    *("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt"),
    *("nix/store", "gnu/store"),
)
"""Programs and their libraries, by where distributions keep them."""
_SETTINGS = (
    *("ld.so.cache", "alternatives", "fonts"),
    *("OpenCL", "glvnd", "vulkan", "drirc"),  # where libraries for GPUs look for their drivers
)
_NETWORK_SETTINGS = (
    *("resolv.conf", "hosts", "host.conf", "gai.conf", "nsswitch.conf", "services", "protocols"),
    # Authorities only: private keys lie in other folders.
    *("ssl/certs", "ssl/openssl.cnf", "ca-certificates", "pki/ca-trust/extracted", "pki/tls/certs"),
)
_SCRATCH = ("/tmp", "/var/tmp")  # noqa: S108 - in the job's root these are its own folder
_LINK_LOCAL = [
    # Where clouds tell a machine its secrets. The last one is Amazon's address for IPv6.
    [2, bytes([169, 254, 0, 0]), 16],
    [10, bytes([0xFE, 0x80, *[0] * 14]), 64],
    [10, bytes([0xFD, 0x00, 0x0E, 0xC2, *[0] * 10, 0x02, 0x54]), 128],
]
_ANYWHERE = [[2, bytes(4), 0], [10, bytes(16), 0]]
_EPERM = 1
_OPEN_FILES = 1024
_CALLS = ["@system-service"]
_NO_CALLS = [
    *("@privileged", "@resources", "@keyring", "@debug"),
    # Large parts of the kernel that no job needs, and where its mistakes have been.
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd"),
    *("process_vm_readv", "process_vm_writev", "process_madvise"),
    "socketpair",  # a file that is on its way in one is in no list of open files
]
_CALLS_FOR_OTHERS = [
    *("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    *("pidfd_open", "pidfd_send_signal", "prlimit64", "kcmp"),
    *("shmget", "shmat", "shmctl", "semget", "semctl", "msgget", "msgctl", "mq_open", "mq_unlink"),
]
"""What one process does to another of the same uid. ffmpeg does without."""
_EMPTY = "mode=0755,nodev,nosuid,noexec,size=1M,nr_inodes=4k,ro"
_SHARED = "mode=1777,nodev,nosuid,noexec,size=64M"
"""Memory, so that it counts for the job's limit."""


@dataclass(frozen=True, slots=True)
class JobRoot:
    """What all jobs see of the host: a folder that becomes their ``/``, and what is put into it."""

    path: Path
    """Holds nothing but links such as ``bin -> usr/bin``, and what systemd mounts things on."""
    folders: tuple[str, ...]
    settings: tuple[str, ...] = ()
    network_settings: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, path: Path, programs: Iterable[str] = (), host: Path = Path("/")) -> JobRoot:
        """Make ``path``, for a host whose ``programs`` may lie in places of their own.

        Raises OSError.
        """
        path.mkdir(mode=0o755, exist_ok=True)
        path.chmod(0o755)  # whatever the umask
        folders = []
        for name in _FOLDERS:
            found = host / name
            if found.is_symlink():
                _link(path / name, found.readlink())
            elif found.is_dir():
                folders.append(f"/{name}")
        for program in programs:
            # The folder by which it was found, and that of what a link there leads to.
            for place in (Path(program), Path(program).resolve() if program else Path()):
                folder = str(place.parent)
                if program and not _below(folder, (*folders, *(f"/{name}" for name in _FOLDERS))):
                    folders.append(folder)
        return cls(
            path,
            tuple(folders),
            tuple(f"/etc/{name}" for name in _SETTINGS if (host / "etc" / name).exists()),
            tuple(f"/etc/{name}" for name in _NETWORK_SETTINGS if (host / "etc" / name).exists()),
        )


@dataclass(frozen=True, slots=True)
class Device:
    """A device node that a job may use."""

    path: str
    group: str = ""
    """Who may open it; empty: everybody."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """How one unit is closed in."""

    root: JobRoot
    folder: Path
    """The one folder that it may write to, at its own path; it is ``/tmp``, too."""
    readable: tuple[Path, ...] = ()
    """Files that it sees besides, each at its own path. Absolute, and free of symbolic links:
    systemd would follow them."""
    group: str = ""
    """The group of all jobs; empty: that of the user's service manager."""
    network: bool = False
    devices: tuple[Device, ...] = ()
    generates_code: bool = False
    """It may make memory executable that it has written, as drivers of GPUs do."""


def sandbox_properties(sandbox: Sandbox, *, user: bool = False) -> list[Property]:
    """The properties that close a unit in; ``user``: for the manager of a user, who is not root."""
    return [
        *([] if user else _identity(sandbox)),
        *_files(sandbox),
        *_devices(sandbox),
        *_network(sandbox),
        *_kernel(sandbox),
        *(_same_uid() if user else _system_only()),
    ]


def _identity(sandbox: Sandbox) -> Iterator[Property]:
    # A uid that no other unit has at the same time, so that no job can signal another one, or see
    # it in /proc. What it leaves behind is deleted or given to another owner before it is reused.
    yield Property("DynamicUser", "b", True)
    if sandbox.group:
        yield Property("Group", "s", sandbox.group)
    groups = sorted({device.group for device in sandbox.devices if device.group})
    if groups:
        yield Property("SupplementaryGroups", "as", groups)


def _files(sandbox: Sandbox) -> Iterator[Property]:
    root, folder = sandbox.root, str(sandbox.folder)
    shown = [*root.folders, *root.settings, *(root.network_settings if sandbox.network else ())]
    files = [str(path) for path in sandbox.readable]
    places = (folder, *files)
    yield Property("RootDirectory", "s", str(root.path))
    yield Property("MountAPIVFS", "b", True)
    # A job that has a file below /tmp sees an empty folder there, but for that file.
    scratch = [place for place in _SCRATCH if not any(_below(path, (place,)) for path in places)]
    # What a path of the job passes through is made here, not in the root that all jobs share.
    passed = {f"/{path.split('/')[1]}" for path in (*places, "/run", "/var")}
    hidden = sorted(passed - set(root.folders))
    yield Property(
        "TemporaryFileSystem",
        "a(ss)",
        [*([path, _EMPTY] for path in hidden), ["/dev/shm", _SHARED]],  # noqa: S108
    )
    yield Property("BindReadOnlyPaths", "a(ssbt)", [_same(path) for path in (*shown, *files)])
    yield Property(
        "BindPaths",
        "a(ssbt)",
        [
            _same(folder),
            *([folder, place, False, 0] for place in scratch),
            *(_same(device.path) for device in sandbox.devices),
        ],
    )
    yield Property("ProtectSystem", "s", "strict")
    # `+`: in the job's root, not the host's, see systemd.exec(5).
    noexec = [f"+{place}" for place in (folder, *scratch)]
    yield Property("NoExecPaths", "as", noexec, optional=True)
    # `yes` would hide what the job has below these folders, too.
    at_home = any(_below(place, ("/home", "/root", "/run/user")) for place in places)
    yield Property("ProtectHome", "s", "tmpfs" if at_home else "yes")
    yield Property("PrivateTmp", "b", len(scratch) == len(_SCRATCH))
    yield Property("UMask", "u", 0o077)


def _devices(sandbox: Sandbox) -> Iterator[Property]:
    yield Property("PrivateDevices", "b", True)
    yield Property("DevicePolicy", "s", "closed")
    if sandbox.devices:
        yield Property("DeviceAllow", "a(ss)", [[device.path, "rw"] for device in sandbox.devices])


def _network(sandbox: Sandbox) -> Iterator[Property]:
    if sandbox.network:
        # No AF_UNIX: names are looked up without it, and it would reach what listens on the host.
        yield Property("RestrictAddressFamilies", "(bas)", [True, ["AF_INET", "AF_INET6"]])
        yield Property("IPAddressDeny", "a(iayu)", _LINK_LOCAL)
    else:
        yield Property("PrivateNetwork", "b", True)
        yield Property("RestrictAddressFamilies", "(bas)", [True, []])
        yield Property("IPAddressDeny", "a(iayu)", _ANYWHERE)


def _kernel(sandbox: Sandbox) -> Iterator[Property]:
    for name in (
        "NoNewPrivileges", "PrivateUsers", "ProtectKernelTunables", "ProtectKernelModules",
        "ProtectKernelLogs", "ProtectControlGroups", "LockPersonality", "RestrictRealtime",
        "RestrictSUIDSGID", "RemoveIPC",
    ):  # fmt: skip
        yield Property(name, "b", True)
    yield Property("MemoryDenyWriteExecute", "b", not sandbox.generates_code)
    yield Property("CapabilityBoundingSet", "t", 0)
    yield Property("AmbientCapabilities", "t", 0)
    yield Property("RestrictNamespaces", "t", 0)
    yield Property("KeyringMode", "s", "private")
    # As many files as any program may have open, and no more: each is looked for by diskwatch.py.
    yield Property("LimitNOFILE", "t", _OPEN_FILES)
    yield Property("LimitNOFILESoft", "t", _OPEN_FILES)
    # A crash must not fill the host's disk with what the job chose to have in its memory.
    yield Property("LimitCORE", "t", 0)
    yield Property("LimitCORESoft", "t", 0)
    yield Property("SystemCallArchitectures", "as", ["native"])
    yield Property("SystemCallFilter", "(bas)", [True, _CALLS])
    yield Property("SystemCallFilter", "(bas)", [False, _NO_CALLS])
    # Without it ffmpeg, which asks for this and that, would be killed.
    yield Property("SystemCallErrorNumber", "i", _EPERM)
    # Each came with a later systemd than the oldest that the worker runs on.
    yield Property("ProtectHostname", "b", True, optional=True)
    yield Property("ProtectClock", "b", True, optional=True)
    yield Property("ProtectProc", "s", "invisible", optional=True)
    yield Property("ProcSubset", "s", "pid", optional=True)


def _system_only() -> Iterator[Property]:
    yield Property("PrivateIPC", "b", True, optional=True)
    # The cgroups, where other jobs have their ids. What is left of /sys tells of the hardware:
    # encoders look there for processors, and drivers for their GPU.
    yield Property("InaccessiblePaths", "as", ["-+/sys/fs", "-+/sys/kernel"])


def _same_uid() -> Iterator[Property]:
    # Without these: under a user's manager what runs after the job is in the sandbox, too. It has
    # a user namespace of its own, cannot enter the job's IPC namespace from there, and fails (226)
    # before it has recorded anything. And counters are what it records.
    yield Property("SystemCallFilter", "(bas)", [False, _CALLS_FOR_OTHERS])


def _same(path: str) -> list[object]:
    """Mounted where it is; together with what is mounted below it."""
    return [path, path, False, _MS_REC]


_MS_REC = 0x4000


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        if path.readlink() == target:
            return
        path.unlink()
    path.symlink_to(target)
