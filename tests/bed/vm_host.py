"""What the machine must have for a virtual machine, and what may be told about the machine.

No name of a server that packages come from is ever shown: what programs say goes through
`redacted` before it reaches a log or a terminal.
"""

from __future__ import annotations

import os
import platform
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

from bed_kernel import BedError, Process, die_with_parent

MIB = 1 << 20
# Debian's packages by what is looked for: a program in PATH, or a file.
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "xz": "xz-utils",
    "zstd": "zstd",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
_TO_RUN = ("qemu-system-x86_64", "ssh", "unshare")
# Beyond the guest's own memory: qemu with its translated code, and a reserve for the machine.
_MEMORY_RESERVE_MIB = 1024
_APT_TIMEOUT_SEC = 900.0
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def search_path() -> str:
    """PATH with the folders that have mke2fs, also for somebody whose PATH lacks them."""
    return f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"


def missing_packages(tools: Sequence[str] = tuple(_TOOLS)) -> list[str]:
    """Debian's packages for those of `tools` that this machine lacks."""
    lacking = {
        _TOOLS[tool]
        for tool in tools
        if not (Path(tool).exists() if "/" in tool else shutil.which(tool, path=search_path()))
    }
    return sorted(lacking)


def check_to_run(memory_mib: int) -> None:
    """Raise BedError where a virtual machine cannot run here now."""
    if platform.machine() != "x86_64":
        raise BedError(
            f"the virtual machine is made on x86_64 only, and this is {platform.machine()}"
        )
    if missing := missing_packages(_TO_RUN):
        raise BedError(f"{' and '.join(missing)} is not installed: {_how_to_install(missing)}")
    available, wanted = available_memory() // MIB, memory_mib + _MEMORY_RESERVE_MIB
    if available < wanted:
        raise BedError(
            f"the virtual machine needs {wanted} MiB of memory, of which {available} MiB are "
            "free: end what uses it, or use a larger machine"
        )


def check_disk(folder: Path, needed_mib: int) -> None:
    """Raise BedError where the disk that holds `folder` has less than that free."""
    free = shutil.disk_usage(folder).free // MIB
    if free < needed_mib:
        raise BedError(
            f"{needed_mib} MiB of disk are needed at {folder}, of which {free} MiB are free: "
            "free some, or name another folder in FFMPEG_WORKER_VM"
        )


def available_memory() -> int:
    """Bytes this process and its children may still use: the machine's, or its cgroup's rest."""
    text = Path("/proc/meminfo").read_text()
    rest = [int(re.findall(r"^MemAvailable:\s*(\d+)", text, re.M)[0]) * 1024]
    # In a container the root of what is mounted is the container's own group.
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        files = [Path("/sys/fs/cgroup", name) for name in (limit, usage)]
        if all(file.exists() for file in files):
            allowed, used = (file.read_text().strip() for file in files)
            if allowed != "max":
                rest.append(int(allowed) - int(used))
    return max(0, min(rest))


def install_what_is_missing(log: IO[str]) -> None:
    """Install the programs that make an image, with apt. Raises BedError where that cannot be."""
    missing = missing_packages()
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BedError(f"{', '.join(missing)} is not installed: {_how_to_install(missing)}")
    print(f"vm: installing {' '.join(missing)}", flush=True)
    for command in (
        ["apt-get", "-qq", "update"],
        ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing],
    ):
        if run_logged(command, log, _APT_TIMEOUT_SEC):
            raise BedError(
                f"apt cannot install {' '.join(missing)}, see {log.name}: install it by hand"
            )
    if missing := missing_packages():
        raise BedError(
            f"apt has installed {' '.join(missing)}, but it is not there: see {log.name}"
        )


def _how_to_install(packages: Sequence[str]) -> str:
    names = " ".join(packages)
    if shutil.which("apt-get"):
        return f"run as root `apt-get install --no-install-recommends {names}`"
    return f"without apt it cannot be done here; Debian's name for it is {names}"


def apt_sources(folder: Path = Path("/etc/apt")) -> list[str]:
    """Every address that the apt of this machine takes packages from."""
    found = []
    for path in sorted(folder.glob("sources.list.d/*.sources")):
        for value in re.findall(r"^URIs:((?:.*\n?)(?:[ \t]+\S.*\n?)*)", path.read_text(), re.M):
            found += value.split()
    for path in [folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))]:
        if path.exists():
            found += re.findall(r"^deb\s+(?:\[.*?\]\s+)?(\S+)", path.read_text(), re.M)
    return found


def mirror() -> str:
    """Where Debian's packages come from: FFMPEG_WORKER_VM_MIRROR, or the machine's own source."""
    if given := os.environ.get("FFMPEG_WORKER_VM_MIRROR"):
        return given
    for address in apt_sources():
        if address.rstrip("/").endswith("/debian") and "://" in address:
            return address
    raise BedError(
        "the apt sources of this machine name no mirror of Debian: "
        "name one in FFMPEG_WORKER_VM_MIRROR (http://…/debian)"
    )


@cache
def _secrets() -> list[str]:
    settings = [os.environ.get("FFMPEG_WORKER_VM_MIRROR", ""), *apt_sources()]
    settings += [v for k, v in os.environ.items() if re.search("proxy|index_url", k, re.I)]
    if shutil.which("apt-config"):
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout
        settings += re.findall(r'"([^"]*://[^"]*)"', dump)
    hosts = {re.sub(r"^.*?//(?:[^/@]*@)?([^/:]*).*$", r"\1", s) for s in settings if "//" in s}
    return sorted((host for host in hosts if host), key=len, reverse=True)


def redacted(text: str) -> str:
    """`text` without the names of servers."""
    text = re.sub(r"\b(https?|ftp)://[^/\s'\"]+", r"\1://server", text)
    for host in _secrets():
        text = text.replace(host, "server")
    return text


def run_logged(
    command: Sequence[str], log: IO[str], timeout: float, *, cwd: Path | None = None
) -> int:
    """Run a command for at most `timeout` seconds, with what it says redacted in `log`.

    Nothing it has started survives it, nor this process. Raises BedError when time is up.
    """
    # In a PID namespace of its own all of it can be killed; in a mount namespace of its own
    # nothing stays mounted.
    fence = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--"]
    environment = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C.UTF-8",
        "PATH": search_path(),
    }
    with subprocess.Popen(
        [*fence, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    ) as process:
        assert process.stdout is not None
        deadline = time.monotonic() + timeout
        pending = b""
        try:
            waiting = select.poll()
            waiting.register(process.stdout)
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not waiting.poll(left * 1000):
                    raise BedError(
                        f"{command[0]} did not end within {timeout:.0f} s, see {log.name}: "
                        "see whether the network and the disk work, then try again"
                    )
                data = os.read(process.stdout.fileno(), 65536)
                whole, newline, pending = (pending + data).rpartition(b"\n")
                log.write(redacted((whole + newline).decode(errors="replace")))
                log.flush()
                if not data:
                    log.write(redacted(pending.decode(errors="replace")))
                    return process.wait(max(1.0, deadline - time.monotonic()))
        except BaseException:
            if (started := Process.of(process.pid)) is not None:
                started.end(signal.SIGKILL, 10)
            raise
