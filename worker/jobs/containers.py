"""Containers: which suffix means which muxer, and what a muxer can hold.

The names are those of ``ffmpeg -muxers``; what fits was tried with ffmpeg 5.1. A pair that
does not fit must be refused here: libsvtav1 hangs, deaf to SIGTERM, when the muxer turns it down,
and some muxers write a file that nothing can play.
"""

from __future__ import annotations

MUXERS = {
    "mp4": "mp4",
    "m4v": "mp4",
    "mov": "mov",
    "mkv": "matroska",
    "webm": "webm",
    "ts": "mpegts",
    "m2ts": "mpegts",
    "mts": "mpegts",
    "flv": "flv",
    "avi": "avi",
    "mpg": "mpeg",
    "mpeg": "mpeg",
    "ogv": "ogv",
    "ogg": "ogg",
    "nut": "nut",
    "mxf": "mxf",
    "3gp": "3gp",
    "wmv": "asf",
    "asf": "asf",
    "ivf": "ivf",
    "h264": "h264",
    "264": "h264",
    "hevc": "hevc",
    "h265": "hevc",
    "265": "hevc",
    "obu": "obu",
}
"""ffmpeg's muxer by the output's suffix."""

DEFAULT_MUXER = "mp4"

_COMMON = frozenset({"h264", "hevc", "vp9", "vp8", "av1"})
_REFUSED = {
    "mp4": frozenset({"vp8"}),
    "mov": frozenset({"vp8", "vp9", "av1"}),
    "webm": frozenset({"h264", "hevc"}),
    "mpegts": frozenset({"vp8", "vp9", "av1", "theora"}),
    "flv": _COMMON - {"h264"},
    "avi": frozenset({"hevc"}),
    "mpeg": frozenset({"vp8", "vp9", "av1"}),
    "ogv": _COMMON - {"vp8"},
    "ogg": _COMMON - {"vp8"},
    "mxf": _COMMON - {"h264"},
    "3gp": _COMMON - {"h264"},
    "asf": frozenset({"hevc"}),
    "ivf": frozenset({"h264", "hevc"}),
    "h264": _COMMON - {"h264"},
    "hevc": _COMMON - {"hevc"},
    "obu": _COMMON - {"av1"},
}

_WITHOUT_AUDIO = frozenset({"ivf", "h264", "hevc", "obu"})

# Muxers whose default audio encoder fails for common inputs: flv takes mp3 only at 44100 Hz and
# its divisors, 3gp's AMR only 8000 Hz mono, and mxf only 48000 Hz.
_AUDIO_OPTIONS = {
    "flv": ("-c:a", "aac"),
    "3gp": ("-c:a", "aac"),
    "mxf": ("-ar", "48000"),
}


def fits(codec: str | None, muxer: str) -> bool:
    """Whether a container can hold a codec; True where that is not known."""
    return codec not in _REFUSED.get(muxer, ())


def audio_options(muxer: str) -> list[str]:
    """What the muxer needs so that any input's audio goes in; none at all where it has no place."""
    if muxer in _WITHOUT_AUDIO:
        return ["-an"]
    return list(_AUDIO_OPTIONS.get(muxer, ()))
