"""CPUs: how many jobs may use, and what they are called."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from types import MappingProxyType

_ARM_PARTS: Mapping[int, str] = MappingProxyType(
    {
        0xD03: "Cortex-A53",
        0xD05: "Cortex-A55",
        0xD07: "Cortex-A57",
        0xD08: "Cortex-A72",
        0xD09: "Cortex-A73",
        0xD0A: "Cortex-A75",
        0xD0B: "Cortex-A76",
        0xD0C: "Neoverse-N1",
        0xD40: "Neoverse-V1",
        0xD41: "Cortex-A78",
        0xD49: "Neoverse-N2",
        0xD4F: "Neoverse-V2",
    }
)
"""Parts of implementer 0x41 (Arm Ltd.), as in the MIDR_EL1 register."""
_GO_ARCH = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "i686": "386",
    "i386": "386",
    "armv7l": "arm",
    "armv6l": "arm",
    "loongarch64": "loong64",
}


def usable_cpus() -> int:
    """CPUs that jobs may run on.

    Jobs are children of PID 1, so its affinity counts, not ours: a CPUAffinity= of our own unit
    does not bind them. In a container it is the container's set. Quotas are not looked at.
    """
    for pid in (1, 0):
        try:
            return len(os.sched_getaffinity(pid))
        except OSError:  # no such process in our namespace, or not ours to ask
            continue
    return os.cpu_count() or 1


def cpu_model(cpuinfo: str) -> str:
    """The model from the text of /proc/cpuinfo; the architecture where it names none."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, colon, value = line.partition(":")
        if colon and value.strip():
            facts.setdefault(name.strip().lower(), " ".join(value.split()))
    # x86, MIPS, POWER and (lower-cased) some ARM kernels; "hardware" and "model" are boards
    for name in ("model name", "cpu model", "cpu"):
        if name in facts and not facts[name].isdigit():
            return facts[name]
    part = _number(facts.get("cpu part", ""))
    if part is not None and _number(facts.get("cpu implementer", "")) == 0x41:
        return f"ARM {_ARM_PARTS.get(part, f'part {part:#x}')}"
    return facts.get("hardware") or facts.get("model") or platform.machine() or "unknown"


def _number(text: str) -> int | None:
    return int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", text) else None


def go_arch(machine: str) -> str:
    """Go's name of the architecture, which the master's users filter by."""
    return _GO_ARCH.get(machine, machine)
