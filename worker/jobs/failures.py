"""Whose fault it is, from what ffmpeg logged. Texts are those of ffmpeg 4.4 to 7."""

from __future__ import annotations

import re

from worker.errors import Reason
from worker.jobs import rtmp
from worker.jobs.progress import LogFacts
from worker.jobs.text import url_scheme

_WRITE_FAILED = re.compile(
    r"No space left on device|File too large|Disk quota exceeded", re.IGNORECASE
)
_MEMORY = re.compile(
    r"Cannot allocate memory|malloc of size \d+ failed|Out of memory"
    r"|Resource temporarily unavailable",
    re.IGNORECASE,
)
_CAPABILITY = re.compile(
    r"Unknown encoder|Unknown decoder|Encoder not found|Unrecognized hwaccel"
    r"|No device available for|Device setup failed"
    r"|\[\w+_(?:nvenc|qsv|vaapi|amf|v4l2m2m|omx|videotoolbox)\] .*"
    r"(?:Cannot load|No capable devices|Could not find a valid device|Error initializing"
    r"|unsupported|OpenEncodeSessionEx failed|not support|can't configure encoder|No NVENC)"
    r"|Impossible to convert between the formats supported by the filter"
    r"|A hardware device reference is required|Automatic encoder selection failed",
    re.IGNORECASE,
)
_NETWORK = re.compile(
    r"Connection refused|Connection reset|Connection timed out|Operation timed out"
    r"|Failed to resolve hostname|Name or service not known|Network is unreachable"
    r"|No route to host|Host is unreachable|Server returned [45]\w\w|HTTP error [45]"
    r"|Broken pipe|Cannot open connection|Temporary failure in name resolution"
    r"|TLS|certificate|handshake|Stream ends prematurely|Input/output error|Server error",
    re.IGNORECASE,
)
_INPUT = re.compile(
    r"Invalid data found when processing input|moov atom not found"
    r"|[Cc]ould not find codec parameters|does not contain any stream|matches no streams"
    r"|EBML header parsing failed|No such file or directory|Permission denied|Is a directory"
    r"|End of file|Invalid frame size|partial file|Protocol .* not on whitelist"
    r"|Failed to open segment|Decoder .* not found|not divisible by 2"
    r"|File ended prematurely|Cannot determine format of input stream|Unsafe file name"
)
_USER = re.compile(
    r"Error setting option|Unrecognized option|Option .* not found|Error applying encoder options"
    r"|codec not currently supported in container|not compatible with|only supported in"
    r"|Unsupported codec id|are supported for WebM|Error setting preset/tune|Invalid value"
    r"|Unable to parse option value|out of range|size of \S+ is not valid for|incompatible with"
    r"|Codec \w+ is not supported|No bmp codec tag found"
)
_OUTPUT = re.compile(
    r"No such file or directory|Permission denied|Read-only file system|Is a directory"
    r"|Not a directory|File exists"
)
# That the server took the stream no longer; ffmpeg can exit with 0 if it is the end that was lost.
_SEND_FAILED = re.compile(
    r"av_interleaved_write_frame\(\)|Error (?:writing|closing|muxing)"
    r"|Error submitting a packet to the muxer"
)
_SERVER = "Server error"
_DAMAGED = re.compile(
    r"Invalid data|partial file|truncated|Invalid NAL|[Ee]rror while decoding"
    r"|File ended prematurely|moov atom|Error submitting packet to decoder|corrupt"
)


def input_is_damaged(log: LogFacts) -> bool:
    """Whether ffmpeg complained about the data it read."""
    return any(_DAMAGED.search(line) for line in log.errors)


def lines_without_names(log: LogFacts, source: str | None, output: str | None) -> list[str]:
    """The error lines with INPUT and OUTPUT for the names on the command line.

    Of a stream ``output`` is the whole URL; the command line has no more than its place. A
    file's name must not be able to choose the reason of a failure, nor must a server's words.
    """
    lines = ["".join(line.partition(_SERVER)[:2]) for line in log.errors]
    lines = [_without(line, source, "INPUT") for line in lines]
    lines = [_without(line, output, "OUTPUT") for line in lines]
    place = rtmp.split(output).place if output and url_scheme(output) in rtmp.SCHEMES else None
    return [_without(line, place, "OUTPUT") for line in lines]


def write_failed(lines: list[str]) -> bool:
    """Whether the output could not be written. ffmpeg can exit with 0 all the same: the
    trailer and the last buffered bytes are written when it has made up its mind."""
    return any(_WRITE_FAILED.search(line) for line in lines)


def sending_failed(lines: list[str]) -> bool:
    """Whether it is the output, a stream, that was not taken, or no longer."""
    return any("OUTPUT" in line or _SEND_FAILED.search(line) for line in lines)


def classify(lines: list[str], *, is_url: bool = False, is_stream: bool = False) -> Reason:
    """The reason of ffmpeg's own failure, from ``lines_without_names``.

    ``is_url`` is said of the input, ``is_stream`` of the output.
    """

    def found(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(line) for line in lines)

    if write_failed(lines) or found(_MEMORY):
        return Reason.RESOURCE_ERROR
    if found(_CAPABILITY):
        return Reason.CAPABILITY_MISMATCH
    if is_stream and (
        sending_failed(lines)
        or any("INPUT" not in line and _NETWORK.search(line) for line in lines)
    ):
        return Reason.NETWORK_ERROR
    if any("OUTPUT" in line and _OUTPUT.search(line) for line in lines):
        return Reason.PLATFORM_ERROR
    if is_url and found(_NETWORK):
        return Reason.NETWORK_ERROR
    if found(_USER):
        return Reason.USER_ERROR
    if found(_INPUT):
        return Reason.INPUT_ERROR
    return Reason.RUNTIME_ERROR


def _without(line: str, name: str | None, word: str) -> str:
    if not name:
        return line
    line = line.replace(f"file:{name}", word).replace(name, word)
    # Of a long name only the beginning may be left, since lines are shortened.
    return line.partition(name[:80])[0] + word if name[:80] in line else line
