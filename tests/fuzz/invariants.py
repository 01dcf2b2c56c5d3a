"""What must hold of all that is made of a job, judged by rules of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.fuzz.fragments import MARK
from worker.jobs.policy import Policy

MAX_TEXT = 2000
"""Characters of an error or a note."""
FFMPEG, FFPROBE = "/usr/bin/ffmpeg", "/usr/bin/ffprobe"
FILES = "/work/jobs/j/files"
"""The job's own folder."""
SECRETS = "/work/jobs/j/stream.options"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FLAGS = frozenset(
    {"-hide_banner", "-nostdin", "-nostats", "-benchmark", "-y", "-sn", "-dn", "-an", "-re"}
)
_DECIMAL = r"[0-9]{1,6}(\.[0-9]{1,6})?"
_PROTOCOL = r"(http|https|rtmp|rtmps|rtsp|srt|udp|tcp|rtp|tls|crypto|data|srtp)"
_VALUES = {
    option: re.compile(pattern)
    for option, pattern in {
        "-progress": r"pipe:1",
        "-loglevel": r"level\+(quiet|info|error)",
        "-threads": r"[1-9][0-9]{0,2}",
        "-protocol_whitelist": rf"file|{_PROTOCOL}(,{_PROTOCOL})*",
        "-stream_loop": r"-1",
        "-f": r"[a-z0-9]{2,10}",
        "-t": _DECIMAL,
        "-c:v": r"[a-z0-9][a-z0-9_-]{0,63}",
        "-c:a": r"aac",
        "-b:v": r"[1-9][0-9]{3,9}",
        "-preset": r"-1|[a-z0-9]{1,12}",
        "-deadline": r"realtime|good|best",
        "-usage": r"realtime|good",
        "-cpu-used": r"[0-8]",
        "-speed": r"[0-9]|10",
        "-tune": r"[a-z]{2,12}",
        "-row-mt": r"1",
        "-vf": r"(scale=[0-9]{2,5}:[0-9]{2,5}:flags=bicubic,setsar=1"
        r"|crop=trunc\(iw/2\)\*2:trunc\(ih/2\)\*2)?(,?format=nv12,hwupload)?",
        "-r": _DECIMAL,
        "-ar": r"48000",
        "-hwaccel": r"auto|[a-z0-9]{2,12}",
        "-init_hw_device": r"vaapi=gpu",
        "-filter_hw_device": r"gpu",
        "-pix_fmt": r"yuv420p",
        "-g": r"[1-9][0-9]{0,2}",
        "-force_key_frames": r"expr:gte\(t,n_forced\*2\)",
        "-flvflags": r"no_duration_filesize",
        "-rw_timeout": r"10000000",
        "-fpre": re.escape(SECRETS),
        "-select_streams": r"v:0",
        "-read_intervals": r"%\+#1",
        "-show_entries": r"[a-z_A-Z=,:]+",
        "-of": r"json",
    }.items()
}
_GRAPH = re.compile(
    rf"testsrc2=size=[0-9]{{2,5}}x[0-9]{{2,5}}:rate={_DECIMAL}"
    rf"(:duration={_DECIMAL},noise=alls=10:allf=t\+u)?|sine=frequency=1000:sample_rate=44100"
)
_HOST = r"[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\]"
_AUTHORITY = rf"([!-.0-9:;=A-Z_a-z~]*@)?({_HOST})?(:[0-9]{{1,5}})?"
_URL = re.compile(rf"([a-z]+)://({_AUTHORITY})([/?]\S*)?")
_TARGET = re.compile(rf"(rtmps?)://({_AUTHORITY})/[^\s?]+")


class Violation(Exception):
    """Something does not hold."""


def check_command(command: tuple[str, ...], policy: Policy) -> None:
    """Judge a command line of ffmpeg or ffprobe word by word. Raises Violation."""
    if command[0] not in (FFMPEG, FFPROBE):
        raise Violation(f"the program is {command[0]!r}")
    for word in command:
        if type(word) is not str or not word or _CONTROL.search(word):
            raise Violation(f"unfit word {word!r}")
    words = iter(command[1:])
    whitelist, demuxer, output, inputs = "", "", "", 0
    for word in words:
        if output:
            raise Violation(f"{word!r} follows the output {output!r}")
        if word in _FLAGS:
            continue
        if not word.startswith("-"):
            output = word
            continue
        value = next(words, "")
        if word == "-i":
            check_source(value, whitelist, demuxer, policy)
            inputs, whitelist, demuxer = inputs + 1, "", ""
        elif word not in _VALUES:
            raise Violation(f"unknown option {word!r}")
        elif not _VALUES[word].fullmatch(value):
            raise Violation(f"{word} has the value {value!r}")
        elif word == "-protocol_whitelist":
            whitelist = value
        elif word == "-f":
            demuxer = value
    if not inputs or bool(output) is (command[0] == FFPROBE):
        raise Violation(f"{inputs} inputs, output {output!r}")
    if output:
        check_target(output, whitelist, demuxer, policy)


def check_source(value: str, whitelist: str, demuxer: str, policy: Policy) -> None:
    if demuxer == "lavfi":
        if whitelist or not _GRAPH.fullmatch(value):
            raise Violation(f"graph {value!r}")
        return
    if demuxer:
        raise Violation(f"the input has the format {demuxer!r}")
    if value.startswith("file:"):
        path = value.removeprefix("file:")
        if whitelist != "file" or not (
            below(path, [FILES])
            or (below(path, policy.input_dirs) and not below(f"{path}/", policy.closed))
        ):
            raise Violation(f"file {value!r} with {whitelist!r}")
        return
    url = _URL.fullmatch(value)
    if url is None or url[1] not in policy.input_protocols or url[1] == "file":
        raise Violation(f"URL {value!r}")
    names = whitelist.split(",")
    if names[0] != url[1] or not {"http", "https", "rtmp", "rtmps", "rtsp", "srt"}.intersection(
        names
    ) - {url[1]} <= policy.input_protocols & {"http", "https"}:
        raise Violation(f"URL {value!r} with {whitelist!r}")


def check_target(value: str, whitelist: str, muxer: str, policy: Policy) -> None:
    if value.startswith("file:"):
        if whitelist != "file" or not below(value.removeprefix("file:"), [FILES]) or not muxer:
            raise Violation(f"output {value!r} with {whitelist!r}")
        return
    url = _TARGET.fullmatch(value)
    if (
        url is None
        or url[1] not in policy.output_protocols
        or muxer != "flv"
        or whitelist != {"rtmp": "rtmp,tcp", "rtmps": "rtmps,tls,tcp"}[url[1]]
    ):
        raise Violation(f"output {value!r} with {whitelist!r}")


def below(path: str, folders: Iterable[Path | str]) -> bool:
    """Whether a path lies below one of ``folders`` and has nothing in it to be worked out."""
    parts = path.removesuffix("/").split("/")
    return not {"", ".", ".."}.intersection(parts[1:]) and any(
        path.startswith(f"{folder}/") for folder in folders
    )


def check_text(text: str, what: str, limit: int = MAX_TEXT) -> None:
    """Judge a text that people see. Raises Violation."""
    if not text.isprintable() or len(text) > limit:
        raise Violation(f"{what} is not printable or too long: {text!r}")
    check_secret(text, what)


def check_secret(text: str, what: str) -> None:
    if MARK in text:
        raise Violation(f"{what} has a secret in it: {text!r}")


def check_property(value: object, what: str) -> None:
    """Judge the value of a unit's property, all that is in it. Raises Violation."""
    if isinstance(value, bytes):
        # A line for the journal, or else an address.
        value = value.decode() if what == "LogExtraFields" else ""
    if isinstance(value, str):
        if _CONTROL.search(value):
            raise Violation(f"property {what} has {value!r}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_property(item, what)
    elif isinstance(value, Mapping):
        check_property(list(value.items()), what)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise Violation(f"property {what} is {value}")
