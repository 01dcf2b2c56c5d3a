"""What this machine is, found out once at start: for the registration, and to judge jobs by."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from worker import __version__
from worker.jobs.capabilities import Capabilities
from worker.master.wire import NodeRegistration
from worker.node.cpu import cpu_model, go_arch, usable_cpus
from worker.node.encoders import Encoders, encoders_of, probe
from worker.node.gpu import Gpu, find_gpus
from worker.node.kind import node_type
from worker.telemetry.host import parse_meminfo

logger = logging.getLogger(__name__)

_DEFAULTS = ("h264_nvenc", "h264_qsv")
"""Encoders for a job that names none, best first; VAAPI's need filters that a job must ask for."""
_FALLBACK = "libx264"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Nothing in it is taken on trust: an encoder or a GPU counts if it encoded a frame."""

    cpu_model: str
    node_type: str
    """``server``, ``desktop`` or ``laptop``."""
    gpus: tuple[Gpu, ...]
    encoders: Encoders
    labels: Mapping[str, str]
    capabilities: Capabilities

    @property
    def gpu_type(self) -> str | None:
        """The first GPU that has a working encoder."""
        for gpu in self.gpus:
            if not self.encoders.hardware.isdisjoint(encoders_of(gpu)):
                return gpu.name
        return None

    def registration(self, address: str) -> NodeRegistration:
        """``address`` is the node's name: the master tells nodes apart by it."""
        hardware = sorted(self.encoders.hardware)
        return NodeRegistration(
            address=address,
            type=self.node_type,
            cpu_threads=self.capabilities.cpus,
            cpu_model=self.cpu_model,
            has_gpu=self.capabilities.has_gpu,
            gpu_type=self.gpu_type,
            gpu_capabilities=hardware or None,
            ram_total_bytes=self.capabilities.memory_bytes,
            labels=dict(self.labels),
        )


async def gather(*, systemd_version: int | None = None, ffmpeg: str = "ffmpeg") -> NodeFacts:
    """Look at this machine; takes as long as a few short ffmpeg runs."""
    # libudev walks sysfs, which a sick device can hold up
    gpus = tuple(await asyncio.to_thread(find_gpus))
    for gpu in gpus:
        logger.info("GPU %s at %s, render node %s", gpu.name, gpu.address, gpu.render_node)
    return describe(
        gpus,
        await probe(gpus, ffmpeg=ffmpeg),
        cpuinfo=_text(Path("/proc/cpuinfo")),
        meminfo=_text(Path("/proc/meminfo")),
        kind=node_type(),
        systemd_version=systemd_version,
    )


def describe(
    gpus: tuple[Gpu, ...],
    encoders: Encoders,
    *,
    cpuinfo: str,
    meminfo: str,
    kind: str,
    systemd_version: int | None,
) -> NodeFacts:
    """Put together what was found; ``cpuinfo`` and ``meminfo`` are the files in /proc."""
    labels = {
        "arch": go_arch(platform.machine()),
        "os": "linux",
        "node_type": kind,
        "worker_version": __version__,
        "encoders": ",".join(sorted(encoders.proven)),
    }
    if systemd_version is not None:
        labels["systemd_version"] = str(systemd_version)
    default = next((name for name in _DEFAULTS if name in encoders.proven), _FALLBACK)
    return NodeFacts(
        cpu_model=cpu_model(cpuinfo),
        node_type=kind,
        gpus=gpus,
        encoders=encoders,
        labels=MappingProxyType(labels),
        capabilities=Capabilities(
            cpus=usable_cpus(),
            memory_bytes=parse_meminfo(meminfo).get("MemTotal", 0),
            encoders=encoders.usable,
            listed_encoders=encoders.listed,
            # The build lists what it could use with the right GPU; without any, nothing decodes.
            hwaccels=encoders.hwaccels if gpus else frozenset(),
            has_gpu=bool(encoders.hardware),
            default_encoder=default,
        ),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error.strerror)
        return ""
