"""Where a job reads and writes: paths and URLs as they come from outside."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from worker.jobs.containers import MUXERS
from worker.jobs.policy import INPUT_PROTOCOLS, Policy
from worker.jobs.spec import FileInput, UrlInput
from worker.jobs.text import is_url
from worker.jobs.urls import check_query, read_url
from worker.jobs.values import choices, refused

MAX_LENGTH = 4096
_MAX_NAME = 255  # NAME_MAX
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_WITHOUT_HOST = frozenset({"udp", "tcp", "rtp", "srt"})  # they may listen: udp://@:1234
_LEADS_TO = {"http": "https", "https": "http"}
"""Where a server may send us on; HLS comes by both."""


def read_input(value: str, policy: Policy) -> FileInput | UrlInput:
    """The place an input's name means. Whether it exists is for others to find out.

    ``file:///abs`` counts as a path. Raises JobError (user_error).
    """
    field = "parameters.input"
    _check_text(field, value)
    if value.startswith("/"):
        return _file_input(field, value, value, policy)
    accepted = f"must be an absolute path or a URL ({', '.join(INPUT_PROTOCOLS[1:])})"
    if not is_url(value):
        raise refused(field, value, accepted)
    if value[:7].lower() == "file://":
        return _file_input(field, value, _path_of(field, value), policy)
    try:
        url = read_url(value)
        if url.scheme not in INPUT_PROTOCOLS:
            raise ValueError(accepted)
        if not url.host and not (url.scheme in _WITHOUT_HOST and url.authority):
            raise ValueError("the URL names no host")
        check_query(url)
    except ValueError as error:
        raise refused(field, value, str(error)) from None
    policy.check_input_scheme(url.scheme, field, value)
    further = _LEADS_TO.get(url.scheme)
    return UrlInput(
        str(url), url.scheme, (further,) if further and further in policy.input_protocols else ()
    )


def _file_input(field: str, value: str, name: str, policy: Policy) -> FileInput:
    path = _path(field, name)
    policy.check_input(path, field, value)
    return FileInput(path)


def _path_of(field: str, value: str) -> str:
    """The path that a URL of the scheme ``file`` means."""
    try:
        url = urlsplit(value)
    except ValueError:
        raise refused(field, value, "is no valid URL") from None
    if url.netloc not in ("", "localhost") or url.query or url.fragment:
        raise refused(field, value, "a file's URL is file:///path, without host, ? and #")
    path = unquote(url.path, errors="surrogateescape")
    _check_text(field, path)
    return path


def read_output(value: str, source: object, policy: Policy) -> tuple[Path, str]:
    """Where the output goes, and the muxer that its suffix means. Raises JobError (user_error)."""
    field = "parameters.output"
    _check_text(field, value)
    if is_url(value):
        raise refused(field, value, "must be an absolute path, since output_mode is file")
    path = _path(field, value)
    muxer = MUXERS.get(path.suffix[1:].lower()) if path.suffix.isascii() else None
    if muxer is None:
        raise refused(field, value, f"its suffix {choices(tuple(MUXERS))}")
    if isinstance(source, FileInput) and os.path.normpath(source.path) == os.path.normpath(path):
        raise refused(field, value, "must not be the input itself")
    policy.check_output(path, field, value)
    return path, muxer


def _check_text(field: str, value: str) -> None:
    if len(value) > MAX_LENGTH:
        raise refused(field, value, f"must have at most {MAX_LENGTH} characters")
    if _UNSAFE.search(value):
        raise refused(field, value, "must not contain control characters")


def _path(field: str, value: str) -> Path:
    """``value`` as the path of a file, nothing left in it to be worked out."""
    if not value.startswith("/"):
        raise refused(field, value, "must be an absolute path")
    if value.endswith("/"):
        raise refused(field, value, "must name a file, not a folder")
    parts = [part for part in value.split("/") if part]
    if "." in parts or ".." in parts:
        raise refused(field, value, "must not contain . or .. between slashes")
    if len(value.encode()) >= MAX_LENGTH or any(len(part.encode()) > _MAX_NAME for part in parts):
        raise refused(field, value, "is longer than a path or a file name can be")
    return Path("/", *parts)
