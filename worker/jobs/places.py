"""Where a job reads and writes: paths and URLs as they come from outside."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from worker.jobs.containers import MUXERS
from worker.jobs.spec import FileInput, UrlInput
from worker.jobs.text import is_url
from worker.jobs.values import choices, refused

MAX_LENGTH = 4096
_MAX_NAME = 255  # NAME_MAX
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

PROTOCOLS = {
    "http": "http,https,tcp,tls,crypto,data,httpproxy",
    "https": "http,https,tcp,tls,crypto,data,httpproxy",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tls,tcp",
    "rtsp": "rtsp,rtp,srtp,udp,tcp",
    "srt": "srt",
    "udp": "udp",
    "tcp": "tcp",
    "rtp": "rtp,srtp,udp",
}
"""Schemes an input may have, with all that ffmpeg may open for it: never a local file, so that no
playlist from afar can read one. HLS comes by http."""

FILE_PROTOCOLS = "file,crypto,data"
_WITHOUT_HOST = frozenset({"udp", "tcp", "rtp", "srt"})  # they may listen: udp://@:1234


def read_input(value: str) -> FileInput | UrlInput:
    """The place an input's name means. Whether it exists is for others to find out.

    ``file:///abs`` counts as a path. Raises JobError (user_error).
    """
    field = "parameters.input"
    _check_text(field, value)
    if value.startswith("/"):
        return FileInput(_path(field, value))
    accepted = f"must be an absolute path or a URL ({', '.join(PROTOCOLS)})"
    if not is_url(value):
        raise refused(field, value, accepted)
    try:
        url = urlsplit(value)
        scheme, host = url.scheme.lower(), url.hostname
        port_is_fine = url.port is None or url.port > 0
    except ValueError:
        raise refused(field, value, f"is no valid URL; it {accepted}") from None
    if scheme == "file" and host in (None, "localhost") and not url.query and not url.fragment:
        path = unquote(url.path, errors="surrogateescape")
        _check_text(field, path)
        return FileInput(_path(field, path))
    if scheme not in PROTOCOLS:
        raise refused(field, value, accepted)
    if re.search(r"\s", value):
        raise refused(field, value, "blanks in a URL must be written as %20")
    if not port_is_fine or not (host or (scheme in _WITHOUT_HOST and url.netloc)):
        raise refused(field, value, "the URL names no host")
    return UrlInput(scheme + value[len(scheme) :], scheme)


def read_output(value: str, source: object) -> tuple[Path, str]:
    """Where the output goes, and the muxer that its suffix means. Raises JobError (user_error)."""
    field = "parameters.output"
    _check_text(field, value)
    if is_url(value):
        raise refused(field, value, "must be an absolute path, since output_mode is file")
    if not value.startswith("/"):
        raise refused(field, value, "must be an absolute path")
    if ".." in value.split("/"):
        raise refused(field, value, "must not contain ..")
    path = _path(field, value)
    muxer = MUXERS.get(path.suffix[1:].lower())
    if muxer is None:
        raise refused(field, value, f"its suffix {choices(tuple(MUXERS))}")
    if isinstance(source, FileInput) and os.path.normpath(source.path) == os.path.normpath(path):
        raise refused(field, value, "must not be the input itself")
    return path, muxer


def _check_text(field: str, value: str) -> None:
    if len(value) > MAX_LENGTH:
        raise refused(field, value, f"must have at most {MAX_LENGTH} characters")
    if _UNSAFE.search(value):
        raise refused(field, value, "must not contain control characters")


def _path(field: str, value: str) -> Path:
    if value.endswith("/"):
        raise refused(field, value, "must name a file, not a folder")
    if len(value.encode()) >= MAX_LENGTH or any(
        len(part.encode()) > _MAX_NAME for part in value.split("/")
    ):
        raise refused(field, value, "is longer than a path or a file name can be")
    if not value.startswith("/"):
        raise refused(field, value, "must be an absolute path")
    # Two slashes in front mean the same as one on Linux, but Path keeps them apart.
    return Path("/" + value.lstrip("/"))
