"""What this node can do, as far as jobs depend on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about the node and its ffmpeg, gathered elsewhere."""

    cpus: int
    memory_bytes: int
    encoders: frozenset[str]
    """Usable ones: the software encoders of the build, and hardware encoders that were proven."""
    listed_encoders: frozenset[str]
    """All that the build lists, whether the hardware for them is there or not."""
    hwaccels: frozenset[str]
    """Hardware decoders that can be used."""
    has_gpu: bool
    default_encoder: str

    @property
    def memory_mb(self) -> int:
        return self.memory_bytes // 2**20


SOFTWARE_ENCODERS = frozenset(
    {"libx264", "libx265", "libvpx", "libvpx-vp9", "libaom-av1", "libsvtav1", "mpeg4"}
)

TYPICAL = Capabilities(
    cpus=4,
    memory_bytes=8 * 2**30,
    encoders=SOFTWARE_ENCODERS,
    listed_encoders=SOFTWARE_ENCODERS | {"h264_nvenc", "hevc_nvenc", "h264_qsv", "h264_vaapi"},
    hwaccels=frozenset(),
    has_gpu=False,
    default_encoder="libx264",
)
"""A server without a GPU: for tests and dry runs."""
