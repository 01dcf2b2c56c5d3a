"""What single properties of a unit cost: the minimal loop with and without them."""

from __future__ import annotations

import asyncio
import functools

from tests.bench.cycle import Chunk, minimal
from tests.bench.harness import Bench, in_turns
from tests.bench.launches import as_a_job, observe

_SECCOMP = (
    "SystemCallFilter", "SystemCallArchitectures", "SystemCallErrorNumber", "LockPersonality",
    "MemoryDenyWriteExecute", "RestrictNamespaces", "RestrictAddressFamilies", "RestrictRealtime",
    "RestrictSUIDSGID", "ProtectClock", "ProtectHostname", "ProtectKernelModules",
    "ProtectKernelLogs", "PrivateDevices",
)  # fmt: skip
_MOUNTS = (
    "RootDirectory", "MountAPIVFS", "TemporaryFileSystem", "BindReadOnlyPaths", "BindPaths",
    "ProtectSystem", "ProtectHome", "NoExecPaths", "PrivateTmp", "ProtectKernelTunables",
    "ProtectControlGroups", "ProtectProc", "ProcSubset", "WorkingDirectory",
)  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {
    "ExecStopPost": ("ExecStopPost",),
    "accounting": ("CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting"),
    "limits": ("CPUQuotaPerSecUSec", "MemoryMax", "MemorySwapMax", "TasksMax", "CPUWeight"),
    "journal": ("StandardError", "SyslogIdentifier", "LogExtraFields"),
    "LogExtraFields": ("LogExtraFields",),
    "Type=exec": ("Type",),
    "what filters system calls": _SECCOMP,
    "SystemCallFilter": ("SystemCallFilter",),
    "SystemCallArchitectures": ("SystemCallArchitectures",),
    "what mounts": _MOUNTS,
    "ProtectKernelTunables": ("ProtectKernelTunables",),
    "other namespaces": ("PrivateNetwork", "PrivateIPC", "PrivateUsers"),
    "DynamicUser": ("DynamicUser",),
    "devices": ("PrivateDevices", "DevicePolicy", "DeviceAllow"),
    "IPAddressDeny": ("IPAddressDeny",),
    "usage record outside": ("PermissionsStartOnly", "RootDirectoryStartOnly"),
}


def run(bench: Bench) -> None:
    bench.begin("ablation", "the minimal loop as a job, without some of its properties")
    launch = as_a_job(bench.folder)
    wire, _, _ = asyncio.run(observe(launch))
    count = bench.pick(20, 6)
    contenders = {"all": functools.partial(minimal, launch, wire, count)}
    for name, group in GROUPS.items():
        less = [row for row in wire if row[0] not in group]
        if len(less) < len(wire):
            contenders[f"without {name}"] = functools.partial(minimal, launch, less, count)
    known = {row[0] for row in wire} - {"ExecStart", "RemainAfterExit", "Slice"}
    bare = [row for row in wire if row[0] not in known]
    contenders["without anything"] = functools.partial(minimal, launch, bare, count)
    chunks: dict[str, list[Chunk]] = in_turns(contenders, bench.pick(9, 3))
    full = {name: [chunk.full for chunk in found] for name, found in chunks.items()}
    bench.add("all", full["all"], "ms")
    for name in list(full)[1:]:
        bench.compare("full cycle", full, name, "all")
