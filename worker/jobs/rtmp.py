"""What ffmpeg makes of an RTMP URL, and how the stream's key is kept out of its command line.

ffmpeg would take application and stream's name from the URL (rtmp_open in
libavformat/rtmpproto.c). The same two as options of the protocol can stand in a file of presets
(``-fpre``, in ffmpeg(1)), of which every line is ``option=value``. The command line, which every
local user can read, then has no more than ``rtmp://host/app``.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMES = ("rtmp", "rtmps")
MAX_APPLICATION = 127
"""Bytes: ffmpeg refuses longer ones."""
MAX_NAME = 900
"""Bytes of the stream's name with its query: a line of presets has at most 999."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The parts of an RTMP URL."""

    server: str
    """``scheme://authority``"""
    application: str
    name: str
    """The stream's name and its query, the key, as ffmpeg would send them; may be empty."""

    @property
    def place(self) -> str:
        """The URL for a command line that ``presets`` belong to: server and application, of which
        the second element, if it has one, might be meant for a key."""
        # With a slash the name is empty; without one, ffmpeg would take the application for it.
        return f"{self.server}/{self.application.partition('/')[0]}{'' if self.name else '/'}"

    @property
    def presets(self) -> str:
        """The file of presets that has the rest; empty where there is no more."""
        if not self.name and "/" not in self.application:
            return ""
        name = f"rtmp_playpath={self.name}\n" if self.name else ""
        return f"rtmp_app={self.application}\n{name}"


def split(url: str) -> Stream:
    """Take ``url`` apart as ffmpeg 5.1 does, but for slashes in the query.

    An application has one element, or two where the path has three or more.
    """
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    path, question, query = path.partition("?")
    first = path.find("/")
    second = path.find("/", first + 1) if first >= 0 else -1
    colon = path.find(":", first + 1)
    end = first if second < 0 or first < colon < second or path.startswith("ondemand/") else second
    application, name = (path[:end], path[end + 1 :]) if end >= 0 else (path, "")
    name += question + query
    if ":" not in name and name.endswith((".f4v", ".mp4")):
        name = f"mp4:{name}"
    else:
        name = name.removesuffix(".flv")
    return Stream(f"{scheme}://{authority}", application, name)
