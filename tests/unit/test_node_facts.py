from __future__ import annotations

import platform

from worker import __version__
from worker.node.cpu import go_arch, usable_cpus
from worker.node.encoders import Encoders
from worker.node.facts import NodeFacts, describe
from worker.node.gpu import Gpu

NVIDIA = Gpu("nvidia", "NVIDIA T4", "0000:03:00.0", None)
INTEL = Gpu("intel", "Intel UHD", "0000:00:02.0", "/dev/dri/renderD128")


def facts(*proven: str, gpus: tuple[Gpu, ...] = ()) -> NodeFacts:
    listed = frozenset({"libx264", "libx265", "h264_nvenc", "h264_qsv", "h264_vaapi"})
    return describe(
        gpus,
        Encoders(listed=listed, hwaccels=frozenset({"cuda"}), proven=frozenset(proven)),
        cpuinfo="model name : CPU One\n",
        meminfo="MemTotal: 2000 kB\n",
        kind="server",
        systemd_version=252,
    )


def test_registration_of_a_machine_without_gpu() -> None:
    found = facts("libx264", "libx265")
    sent = found.registration("node-1")
    assert sent.address == "node-1"
    assert sent.type == "server"
    assert sent.cpu_model == "CPU One"
    assert sent.cpu_threads == usable_cpus()
    assert sent.ram_total_bytes == 2000 * 1024
    assert (sent.has_gpu, sent.gpu_type, sent.gpu_capabilities) == (False, None, None)
    assert sent.labels["os"] == "linux"
    assert sent.labels["arch"] == go_arch(platform.machine())
    assert sent.labels["node_type"] == "server"
    assert sent.labels["encoders"] == "libx264,libx265"
    assert sent.labels["systemd_version"] == "252"
    assert sent.labels["worker_version"] == __version__


def test_a_gpu_that_encoded_nothing_is_none() -> None:
    sent = facts("libx264", gpus=(NVIDIA,)).registration("n")
    assert (sent.has_gpu, sent.gpu_type, sent.gpu_capabilities) == (False, None, None)


def test_a_gpu_that_works_is_named() -> None:
    sent = facts("libx264", "h264_nvenc", gpus=(INTEL, NVIDIA)).registration("n")
    assert (sent.has_gpu, sent.gpu_type) == (True, "NVIDIA T4")
    assert sent.gpu_capabilities == ["h264_nvenc"]


def test_capabilities() -> None:
    found = facts("libx264", "h264_qsv", gpus=(INTEL,)).capabilities
    assert found.encoders == {"libx264", "libx265", "h264_qsv"}
    assert found.listed_encoders > found.encoders
    assert found.hwaccels == {"cuda"}
    assert found.memory_bytes == 2000 * 1024
    assert found.has_gpu


def test_default_encoder() -> None:
    assert facts("libx264").capabilities.default_encoder == "libx264"
    assert facts("libx264", "h264_vaapi").capabilities.default_encoder == "libx264"
    assert facts("libx264", "h264_qsv").capabilities.default_encoder == "h264_qsv"
    assert facts("h264_qsv", "h264_nvenc").capabilities.default_encoder == "h264_nvenc"
    assert facts().capabilities.default_encoder == "libx264"
