"""Scenario names: ``720p30-h264``, ``4K60-hevc``, ``1280x720…``; any other is just a label."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_CODEC = r"h264|h265|hevc|vp9|av1"
_BY_HEIGHT = re.compile(
    rf"(?P<height>\d{{1,9}})p(?P<fps>{_NUMBER})-(?P<codec>{_CODEC})", re.I | re.A
)
_4K = re.compile(rf"4k(?P<fps>{_NUMBER})-(?P<codec>{_CODEC})", re.I | re.A)
_BY_SIZE = re.compile(
    rf"(?P<width>\d{{1,9}})x(?P<height>\d{{1,9}})(?!\d)"
    rf"(?:[p@](?P<fps>{_NUMBER})(?:fps)?(?![\d.]))?"
    rf"(?:-(?P<codec>{_CODEC})(?![a-z0-9]))?",
    re.I | re.A,
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a name says about the video. Not judged: a number may be out of all bounds."""

    width: int | None = None
    height: int | None = None
    frame_rate: float | None = None
    codec: str | None = None
    """In small letters."""


LABEL = Scenario()


def read_scenario(name: str) -> Scenario:
    """The meaning of a scenario's name; ``LABEL`` if it has none. Letter case does not matter.

    ``<height>p<fps>-<codec>`` (16:9) and ``4K<fps>-<codec>`` must match as a whole. After
    ``<width>x<height>`` an optional ``p<fps>`` or ``@<fps>`` and an optional ``-<codec>`` are
    understood, and what follows is ignored.
    """
    name = name.strip()
    if match := _BY_HEIGHT.fullmatch(name):
        height = int(match["height"])
        return Scenario(width_16_9(height), height, float(match["fps"]), match["codec"].lower())
    if match := _4K.fullmatch(name):
        return Scenario(3840, 2160, float(match["fps"]), match["codec"].lower())
    if match := _BY_SIZE.match(name):
        fps, codec = match["fps"], match["codec"]
        return Scenario(
            int(match["width"]),
            int(match["height"]),
            float(fps) if fps else None,
            codec.lower() if codec else None,
        )
    return LABEL


def width_16_9(height: int) -> int:
    """The even width nearest to 16:9, e.g. 854 for 480."""
    return round(height * 16 / 9 / 2) * 2
