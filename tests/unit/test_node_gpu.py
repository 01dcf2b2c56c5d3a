from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from worker.node.gpu import Gpu, find_gpus, select


@dataclass
class FakeDevice:
    sys_name: str
    device_node: str | None = None
    attributes: dict[str, bytes] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)
    ancestors: Iterable[FakeDevice] = ()


def pci(address: str, vendor: str, kind: str, model: str = "") -> FakeDevice:
    attributes = {"vendor": vendor.encode(), "class": kind.encode(), "device": b"0x1eb8\n"}
    properties = {"ID_MODEL_FROM_DATABASE": model} if model else {}
    return FakeDevice(address, None, attributes, properties)


def test_gpus_with_their_names_and_render_nodes() -> None:
    bridge = FakeDevice("0000:00:01.0")
    nvidia = pci("0000:03:00.0", "0x10de", "0x030200", "TU104GL [Tesla T4]")
    intel = pci("0000:00:02.0", "0x8086", "0x030000")
    amd = pci("0000:04:00.0", "0x1002", "0x038000", "Navi 22")
    drm = [
        FakeDevice("card0", "/dev/dri/card0", ancestors=[intel]),
        FakeDevice("renderD128", "/dev/dri/renderD128", ancestors=[intel]),
        FakeDevice("renderD129", "/dev/dri/renderD129", ancestors=[amd, bridge]),
    ]
    assert select([nvidia, intel, amd], drm) == [
        Gpu("intel", "Intel GPU 0x1eb8", "0000:00:02.0", "/dev/dri/renderD128"),
        Gpu("nvidia", "NVIDIA TU104GL [Tesla T4]", "0000:03:00.0", None),
        Gpu("amd", "AMD Navi 22", "0000:04:00.0", "/dev/dri/renderD129"),
    ]


@pytest.mark.parametrize(
    "device",
    [
        pci("0000:00:01.0", "0x1234", "0x030000", "QEMU VGA"),
        pci("0000:00:01.0", "0x1af4", "0x030000", "Virtio GPU"),
        pci("0000:00:1f.3", "0x8086", "0x040300", "HD Audio"),
        pci("0000:01:00.1", "0x10de", "0x040300"),
        pci("0000:00:01.0", "strange", "0x030000"),
        FakeDevice("0000:00:00.0"),
    ],
)
def test_what_is_no_gpu(device: FakeDevice) -> None:
    assert select([device], []) == []


def test_without_udev_there_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pyudev", None)
    caplog.set_level("DEBUG", "worker.node.gpu")
    assert find_gpus() == []
    assert "without udev" in caplog.text
