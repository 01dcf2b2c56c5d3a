"""GPUs, as udev knows them. A GPU counts for jobs only once an encoder on it worked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

logger = logging.getLogger(__name__)

VENDORS: Mapping[int, str] = MappingProxyType({0x10DE: "nvidia", 0x8086: "intel", 0x1002: "amd"})
"""PCI vendors whose GPUs encode video; the VGA of a virtual machine is of another."""
_DISPLAY_CLASS = 0x03
_LABELS = {"nvidia": "NVIDIA", "intel": "Intel", "amd": "AMD"}


class Device(Protocol):
    """What is used of pyudev.Device."""

    @property
    def sys_name(self) -> str: ...
    @property
    def device_node(self) -> str | None: ...
    @property
    def attributes(self) -> Mapping[str, bytes]: ...
    @property
    def properties(self) -> Mapping[str, str]: ...
    @property
    def ancestors(self) -> Iterable[Device]: ...


@dataclass(frozen=True, slots=True)
class Gpu:
    vendor: str
    """``nvidia``, ``intel`` or ``amd``."""
    name: str
    address: str
    """On the PCI bus, such as ``0000:01:00.0``."""
    render_node: str | None
    """Such as ``/dev/dri/renderD128``; None without a DRM driver."""


def find_gpus() -> list[Gpu]:
    """In the order of their PCI addresses; none where udev's library is missing."""
    try:
        import pyudev  # loads libudev, which small containers lack

        context = pyudev.Context()
        return select(context.list_devices(subsystem="pci"), context.list_devices(subsystem="drm"))
    except (ImportError, OSError) as error:
        logger.debug("GPUs cannot be looked for without udev: %s", error)
        return []


def select(pci: Iterable[Device], drm: Iterable[Device]) -> list[Gpu]:
    """The GPUs among PCI devices, with their render nodes from among the DRM devices."""
    nodes: dict[str, str] = {}
    for device in drm:
        if device.sys_name.startswith("renderD") and device.device_node:
            for ancestor in device.ancestors:
                nodes.setdefault(ancestor.sys_name, device.device_node)
    gpus = []
    for device in pci:
        vendor = VENDORS.get(_number(device, "vendor"))
        if vendor is None or _number(device, "class") >> 16 != _DISPLAY_CLASS:
            continue
        gpus.append(
            Gpu(
                vendor=vendor,
                name=_name(device, vendor),
                address=device.sys_name,
                render_node=nodes.get(device.sys_name),
            )
        )
    return sorted(gpus, key=lambda gpu: gpu.address)


def _name(device: Device, vendor: str) -> str:
    """From udev's hardware database; the device's number where that has no name for it."""
    model = device.properties.get("ID_MODEL_FROM_DATABASE", "")
    number = f"GPU {_number(device, 'device'):#06x}"
    return f"{_LABELS[vendor]} {model or number}"


def _number(device: Device, attribute: str) -> int:
    """A number from sysfs, such as ``0x030000``; 0 where there is none."""
    try:
        return int(device.attributes.get(attribute, b"0").decode("ascii"), 16)
    except ValueError:
        return 0
