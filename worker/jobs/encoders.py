"""Which encoder a codec means, and the presets and tunes that each encoder knows.

Option names and ranges are those that ``ffmpeg -h encoder=NAME`` prints (5.1).
"""

from __future__ import annotations

import re

from worker.errors import Reason
from worker.jobs.capabilities import Capabilities
from worker.jobs.values import choices, refused

AV1_ENCODERS = ("libsvtav1", "libaom-av1", "librav1e")
"""In order of preference: by far the fastest first."""

_ALIASES = {
    "h264": ("libx264",),
    "h265": ("libx265",),
    "hevc": ("libx265",),
    "vp9": ("libvpx-vp9",),
    "av1": AV1_ENCODERS,
}
_SOFTWARE = frozenset({"libx264", "libx264rgb", "libx265", "libvpx", "libvpx-vp9", *AV1_ENCODERS})
_OTHER_KNOWN = frozenset({"libkvazaar", "libopenh264", "libxvid", "libtheora", "libxavs2"})
_HARDWARE = re.compile(
    r"(?:h264|hevc|av1|vp8|vp9|mpeg2|mpeg4|mjpeg|h263|prores|ffv1|nvenc)"
    r"_(?:nvenc|qsv|vaapi|videotoolbox|amf|v4l2m2m|omx|mf|mediacodec|cuvid|rkmpp|vulkan|d3d12va"
    r"|h264|hevc)",
    re.A,
)
_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.A)

X264_PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
    "placebo",
)
_NVENC_PRESETS = (
    *("default", "slow", "medium", "fast", "hp", "hq", "bd", "ll", "llhq", "llhp"),
    *("lossless", "losslesshp", "p1", "p2", "p3", "p4", "p5", "p6", "p7"),
)
_QSV_PRESETS = X264_PRESETS[2:9]
_SVT_PRESETS = tuple(str(n) for n in range(-1, 14))

# Existing clients send x264's preset names with every codec, so the other encoders understand
# them too. What each name becomes, in the order of X264_PRESETS:
_NVENC_OF_X264 = ("p1", "p1", "p2", "p3", "fast", "medium", "slow", "p6", "p7", "p7")
_QSV_OF_X264 = ("veryfast", "veryfast", *_QSV_PRESETS, "veryslow")
_SVT_OF_X264 = ("12", "11", "10", "9", "8", "7", "5", "4", "2", "0")
_RAV1E_OF_X264 = ("10", "9", "8", "7", "6", "5", "4", "3", "2", "0")
_VPX_OF_X264 = (
    ("realtime", "8"),
    ("realtime", "7"),
    ("realtime", "6"),
    ("good", "5"),
    ("good", "4"),
    ("good", "3"),
    ("good", "2"),
    ("good", "1"),
    ("good", "0"),
    ("best", "0"),
)
_AOM_OF_X264 = (
    ("realtime", "8"),
    ("realtime", "7"),
    ("good", "6"),
    ("good", "5"),
    ("good", "4"),
    ("good", "3"),
    ("good", "2"),
    ("good", "1"),
    ("good", "0"),
    ("good", "0"),
)

_TUNES = {
    "libx264": (
        *("film", "animation", "grain", "stillimage", "psnr", "ssim", "fastdecode"),
        "zerolatency",
    ),
    "libx265": ("psnr", "ssim", "grain", "fastdecode", "zerolatency", "animation"),
    "libvpx": ("psnr", "ssim"),
    "libvpx-vp9": ("psnr", "ssim"),
    "libaom-av1": ("psnr", "ssim"),
}
_NVENC_TUNES = ("hq", "ll", "ull", "lossless")


def choose_encoder(asked: str | None, field: str, capabilities: Capabilities) -> str:
    """The encoder for a codec's or an encoder's name; without one, the node's default.

    Raises JobError: capability_mismatch if the name is known to the world but cannot be used
    here, user_error if it is known to nobody.
    """
    if asked is None:
        return capabilities.default_encoder
    name = asked.lower()
    for encoder in _ALIASES.get(name, ()):
        if encoder in capabilities.encoders:
            return encoder
    if name in _ALIASES:
        raise refused(
            field,
            asked,
            f"this node's ffmpeg has none of {', '.join(_ALIASES[name])}",
            Reason.CAPABILITY_MISMATCH,
        )
    if name in capabilities.encoders and _SAFE_NAME.fullmatch(name):
        return name
    if name in capabilities.listed_encoders:
        raise refused(
            field,
            asked,
            "this node's ffmpeg lists the encoder, but it does not work here (no such hardware?)",
            Reason.CAPABILITY_MISMATCH,
        )
    if name in _SOFTWARE or name in _OTHER_KNOWN or _HARDWARE.fullmatch(name):
        raise refused(field, asked, "this node has no such encoder", Reason.CAPABILITY_MISMATCH)
    raise refused(
        field, asked, "must be one of h264, h265, hevc, vp9, av1 or the name of a video encoder"
    )


def codec_of(encoder: str) -> str | None:
    """The codec an encoder makes (``h264``, ``hevc``, ``vp8``, …), None if not known here."""
    for codec, names in (
        ("h264", ("libx264", "libx264rgb", "libopenh264")),
        ("hevc", ("libx265", "libkvazaar")),
        ("vp9", ("libvpx-vp9",)),
        ("vp8", ("libvpx",)),
        ("av1", AV1_ENCODERS),
        ("mpeg4", ("mpeg4", "libxvid")),
        ("mpeg2video", ("mpeg2video",)),
        ("mpeg1video", ("mpeg1video",)),
        ("theora", ("libtheora",)),
    ):
        if encoder in names:
            return codec
    match = re.match(r"(h264|hevc|av1|vp8|vp9|mpeg4|mpeg2)_", encoder)
    if match is None:
        return None
    return "mpeg2video" if match[1] == "mpeg2" else match[1]


def is_hardware(encoder: str) -> bool:
    """Whether an encoder works with a device rather than with the CPU."""
    return _HARDWARE.fullmatch(encoder) is not None


def presets_of(encoder: str) -> tuple[str, ...]:
    """The preset names that are accepted for an encoder; empty if it has no presets."""
    if encoder in ("libx264", "libx264rgb", "libx265"):
        return X264_PRESETS
    if encoder.endswith("_nvenc"):
        return _merged(_NVENC_PRESETS)
    if encoder.endswith("_qsv"):
        return _merged(_QSV_PRESETS)
    if encoder == "libsvtav1":
        return _merged(_SVT_PRESETS)
    if encoder in ("libvpx", "libvpx-vp9", "libaom-av1", "librav1e"):
        return X264_PRESETS
    return ()


def _merged(own: tuple[str, ...]) -> tuple[str, ...]:
    return (*own, *(name for name in X264_PRESETS if name not in own))


def default_preset(encoder: str, cpus: int) -> str | None:
    """The fewer threads the node has, the less time it spends on a frame."""
    if not presets_of(encoder):
        return None
    return "ultrafast" if cpus < 4 else "veryfast" if cpus < 8 else "fast"


def preset_options(encoder: str, preset: str | None) -> list[str]:
    """ffmpeg's options for a preset that ``presets_of`` holds."""
    if preset is None:
        return []
    speed = X264_PRESETS.index(preset) if preset in X264_PRESETS else None
    if encoder in ("libvpx", "libvpx-vp9") and speed is not None:
        deadline, cpu_used = _VPX_OF_X264[speed]
        return ["-deadline", deadline, "-cpu-used", cpu_used]
    if encoder == "libaom-av1" and speed is not None:
        usage, cpu_used = _AOM_OF_X264[speed]
        return ["-usage", usage, "-cpu-used", cpu_used]
    if encoder == "librav1e" and speed is not None:
        return ["-speed", _RAV1E_OF_X264[speed]]
    if encoder == "libsvtav1" and speed is not None:
        preset = _SVT_OF_X264[speed]
    elif encoder.endswith("_nvenc") and speed is not None:
        preset = _NVENC_OF_X264[speed]
    elif encoder.endswith("_qsv") and speed is not None:
        preset = _QSV_OF_X264[speed]
    return ["-preset", preset]


def check_preset(preset: str | None, encoder: str, cpus: int) -> tuple[str | None, str | None]:
    """The preset to use, and a note if the one asked for had to be ignored.

    An encoder without presets ignores x264's names, which clients send with every codec; any
    other name is a JobError.
    """
    field = "parameters.preset"
    known = presets_of(encoder)
    if preset is None:
        return default_preset(encoder, cpus), None
    if preset in known:
        return preset, None
    if known:
        raise refused(field, preset, f"{choices(known)} for {encoder}")
    if preset in X264_PRESETS:
        return None, f"parameters.preset ignored: {encoder} has no presets"
    raise refused(field, preset, f"{encoder} has no presets, so it must be left out")


def check_tune(tune: str | None, encoder: str) -> str | None:
    """``tune`` if the encoder knows it. Raises JobError (user_error)."""
    if tune is None:
        return None
    known = _NVENC_TUNES if encoder.endswith("_nvenc") else _TUNES.get(encoder, ())
    if tune in known:
        return tune
    accepted = f"{choices(known)} for {encoder}" if known else f"{encoder} knows no tune"
    raise refused("parameters.tune", tune, accepted)
