"""Streams: where one goes, whether all of it was sent, and what the server may not repeat."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from worker.errors import JobError, Reason
from worker.jobs import rtmp
from worker.jobs.encoders import codec_of
from worker.jobs.probe import NO_VIDEO, Media, expected_seconds, fault
from worker.jobs.progress import LogFacts, Progress
from worker.jobs.spec import GeneratedInput, JobSpec, StreamOutput
from worker.jobs.text import is_url, url_scheme
from worker.jobs.urls import read_url
from worker.jobs.values import refused

MUXER = "flv"  # RTMP carries nothing else
CODEC = "h264"
"""The only codec of today's encoders that ffmpeg 5.1 puts into flv."""
PORT = 1935
APPLICATION = "live"
SCHEMES = rtmp.SCHEMES

_MAX_NAME = 500
_MAX_KEY = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SAID = "Server error: "
_SHARE, _SECONDS = 0.9, 2.0


@dataclass(frozen=True, slots=True)
class Target:
    output: StreamOutput
    notes: tuple[str, ...] = ()
    """For the log: what was ignored."""


def read_target(
    parameters: Mapping[str, Any], job_id: str, host: str, allowed: Collection[str] = SCHEMES
) -> Target:
    """Where a stream goes. ``host`` is the master's, empty where there is none.

    ``rtmp_url`` is taken as it is. A ``stream_key`` is appended to it where it names an
    application only (``rtmp://host/app``, or anything that ends with a slash), and ignored where
    it names the stream already. Without ``rtmp_url`` the stream goes to the master's host, under
    the key or the job's id.

    Raises JobError (user_error), which never shows the values: they are secret.
    """
    notes: list[str] = []
    if parameters.get("output") not in (None, ""):
        notes.append("parameters.output ignored: a stream leaves no file")
    url, key = _text(parameters, "rtmp_url"), _key(parameters)
    if url is None:
        url = _default_url(key, job_id, host)
    else:
        url = _checked(url)
        if key is not None and _names_stream(url):
            notes.append("parameters.stream_key ignored: rtmp_url names the stream already")
        elif key is not None:
            place, question, query = url.partition("?")
            url = _checked(f"{place.rstrip('/')}/{key}{question}{query}")
    if (scheme := url_scheme(url)) not in allowed:
        raise _wrong("rtmp_url", f"{scheme} is not allowed here (OUTPUT_PROTOCOLS)")
    return Target(StreamOutput(url), tuple(notes))


def _names_stream(url: str) -> bool:
    path = _path(url).partition("?")[0]
    return "/" in path and not path.endswith("/")


def _path(url: str) -> str:
    """Path and query, without the slash in front."""
    rest = url.partition("://")[2]
    return "" if "?" in rest.partition("/")[0] else rest.partition("/")[2]


def check_codec(encoder: str, asked: str | None, field: str) -> None:
    """Raise JobError (user_error) unless a stream can hold what ``encoder`` makes."""
    if codec_of(encoder) != CODEC:
        raise refused(
            field, asked, "a stream holds H.264 only (RTMP carries flv); ask for the codec h264"
        )


def check_sent(spec: JobSpec, progress: Progress | None, log: LogFacts) -> None:
    """Raise JobError unless ffmpeg, which ended well, has sent what was asked for.

    Nine tenths of a length that is known, or all but two seconds, are enough: sound and picture
    rarely end together.
    """
    if log.input_has_video is False:
        raise JobError(Reason.INPUT_ERROR, NO_VIDEO)
    if progress is None or not progress.frame:
        raise fault(log, "no frame was sent")
    expected, sent = expected_seconds(spec, log), progress.out_time_sec or 0.0
    if expected is not None and sent < min(_SHARE * expected, max(expected - _SECONDS, 0)):
        raise fault(log, f"{sent:.2f} s of the {expected:.2f} s that were expected were sent")


def sent_media(spec: JobSpec, progress: Progress) -> Media:
    """What went over the wire. Nobody has probed it: this is what ffmpeg was told and counted."""
    source = spec.source
    size, frame_rate = spec.scale, spec.frame_rate
    if isinstance(source, GeneratedInput):
        size, frame_rate = (source.width, source.height), source.frame_rate
    elif frame_rate is None and progress.frame and progress.out_time_sec:
        frame_rate = progress.frame / progress.out_time_sec
    return Media(
        container=MUXER,
        duration_sec=progress.out_time_sec,
        codec=codec_of(spec.encoder),
        width=size[0] if size else None,
        height=size[1] if size else None,
        frame_rate=frame_rate,
    )


def without_key(log: str, url: str) -> str:
    """``log`` without the stream's name and the query where it repeats what the server said.

    URLs are redacted elsewhere; a server may tell the bare key ("stream KEY is in use").
    """
    place, _, query = url.partition("?")
    last, name = place.rstrip("/").rpartition("/")[2], rtmp.split(place).name
    words = {last, name, query}
    secrets = sorted(words.union(map(unquote, words)) - {""}, key=len, reverse=True)
    lines = log.split("\n")
    for number, line in enumerate(lines):
        head, mark, said = line.partition(_SAID)
        if mark:
            for secret in secrets:
                said = said.replace(secret, "***")
            lines[number] = head + mark + said
    return "\n".join(lines)


def host_of(url: str) -> str:
    """The host of a URL without brackets; empty where it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _wrong(field: str, accepted: str) -> JobError:
    return JobError(Reason.USER_ERROR, f"parameters.{field}: {accepted}")


def _text(parameters: Mapping[str, Any], field: str) -> str | None:
    value = parameters.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(field, "must be a string")
    return value.strip() or None


def _key(parameters: Mapping[str, Any]) -> str | None:
    """The stream's key as one segment of a path."""
    key = _text(parameters, "stream_key")
    if key is None:
        return None
    if len(key) > _MAX_KEY:
        raise _wrong("stream_key", f"must have at most {_MAX_KEY} characters")
    if _CONTROL.search(key):
        raise _wrong("stream_key", "must not contain control characters")
    return _segment(key, "stream_key", "is too long once it is percent-encoded")


def _segment(text: str, field: str, complaint: str) -> str:
    segment = quote(text, safe="")
    if segment in (".", ".."):
        raise _wrong(field, "must not be . or ..")
    if len(segment) > _MAX_NAME:
        raise _wrong(field, complaint)
    return segment


def _default_url(key: str | None, job_id: str, host: str) -> str:
    if not host:
        raise _wrong(
            "rtmp_url", "must be given, since there is no master whose host is the default"
        )
    if key is None:
        key = _segment(
            job_id, "stream_key", "must be given, since the job's id is no name for a stream"
        )
    return f"rtmp://{f'[{host}]' if ':' in host else host}:{PORT}/{APPLICATION}/{key}"


def _checked(value: str) -> str:
    """``value``, its scheme in small letters, if ffmpeg and a server can make sense of it."""
    field = "rtmp_url"
    accepted = f"must be a URL of the scheme {' or '.join(SCHEMES)}, e.g. rtmp://host/app/key"
    if not is_url(value) or value.partition(":")[0].lower() not in SCHEMES:
        raise _wrong(field, accepted)
    try:
        url = read_url(value)
    except ValueError as error:
        raise _wrong(field, str(error)) from None
    if not url.host:
        raise _wrong(field, "the URL names no host")
    stream = rtmp.split(str(url))
    if not url.rest.startswith("/") or not stream.application.strip("/"):
        raise _wrong(field, "the URL names no application; it is rtmp://host/app/key")
    if len(stream.application.encode()) > rtmp.MAX_APPLICATION:
        raise _wrong(field, f"the application must have at most {rtmp.MAX_APPLICATION} bytes")
    if len(stream.name.encode()) > rtmp.MAX_NAME:
        raise _wrong(field, f"the stream's name and query must have at most {rtmp.MAX_NAME} bytes")
    return str(url)
