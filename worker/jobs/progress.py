"""Reading what ffmpeg says: ``-progress`` blocks on its output, and its own log."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from worker.jobs.text import plain

_MAX_TEXT = 4 * 2**20
_MAX_ERRORS = 50
_MAX_INT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Progress:
    """One block of ``-progress`` output. None is what ffmpeg calls N/A, or did not say."""

    ended: bool = False
    frame: int | None = None
    fps: float | None = None
    bitrate_bps: float | None = None
    total_size: int | None = None
    """Bytes written so far."""
    out_time_sec: float | None = None
    dup_frames: int | None = None
    drop_frames: int | None = None
    speed: float | None = None
    """1 is real time."""


def parse_progress(text: str) -> Progress | None:
    """The last complete block in ``text``, which may start and end anywhere; None without one."""
    lines = text[-_MAX_TEXT:].splitlines()
    values: dict[str, str] = {}
    block: dict[str, str] | None = None
    for line in lines:
        if line.startswith("/"):  # the usage record of the cgroup, which another module reads
            continue
        key, equals, value = line.partition("=")
        if not equals:
            continue
        values[key.strip()] = value.strip()
        if key.strip() == "progress":
            block, values = values, {}
    if block is None:
        return None
    micros = _int(block.get("out_time_us"))
    kilobits = _float(block.get("bitrate", "").removesuffix("kbits/s"))
    return Progress(
        ended=block["progress"] == "end",
        frame=_int(block.get("frame")),
        fps=_float(block.get("fps")),
        bitrate_bps=None if kilobits is None else kilobits * 1000,
        total_size=_int(block.get("total_size")),
        out_time_sec=None if micros is None else micros / 1e6,
        dup_frames=_int(block.get("dup_frames")),
        drop_frames=_int(block.get("drop_frames")),
        speed=_float(block.get("speed", "").removesuffix("x")),
    )


def _int(text: str | None) -> int | None:
    if text is None or re.fullmatch(r"\d{1,19}", text, re.A) is None:
        return None
    value = int(text)
    return value if value <= _MAX_INT else None


def _float(text: str | None) -> float | None:
    if text is None or re.fullmatch(r"\s*[\d.]{1,30}(?:e[+-]?\d{1,3})?", text, re.A) is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class LogFacts:
    """What the log tells."""

    errors: tuple[str, ...] = ()
    """Lines of level error and worse, cleaned and bounded; the first and the last ones if many."""
    last_error: str | None = None
    """The line that says most about why ffmpeg failed."""
    input_duration_sec: float | None = None
    """How much there is of the first input, as its header claims; None if unknown or guessed."""
    input_has_video: bool | None = None
    """A cover picture is none. None if no input could be opened."""
    streams_left_out: bool = False
    """Whether the first input has streams that were not used, and may be the longest."""
    bytes_read: int | None = None
    bytes_written: int | None = None
    """By ffmpeg's own count, buffers and page cache aside; None if it did not get to its end."""
    bench_cpu_seconds: float | None = None
    bench_maxrss_bytes: int | None = None
    stopped_by_signal: int | None = None
    """The signal that made ffmpeg end early but in good order (and exit with 255)."""


_TAGGED = re.compile(
    r"(?P<prefix>(?:\[[^\]\n]{1,80} @ 0x[0-9a-f]+\] )*)\[(?:error|fatal|panic)\] (?P<text>.*)"
)
_POINTER = re.compile(r" @ 0x[0-9a-f]+\]")
_INPUT = re.compile(r"\[info\] Input #\d+, (.{1,100}?), from ", re.A)
_DURATION = re.compile(
    r"\[info\]   Duration: (\d+):(\d\d):(\d\d(?:\.\d+)?),(?: start: (-?\d+\.\d+))?", re.A
)
_MAPPED = re.compile(r"\[info\]   Stream #0:\d+ -> #", re.A)
_STATISTICS = re.compile(r"\[verbose\] Statistics: (\d{1,18}) bytes (read|written)", re.A)
# No header of these says how long they are: ffmpeg subtracts the first time stamp from the last,
# which is wrong where time stamps jump (joined recordings, a clock that starts anew).
_WITHOUT_DURATION = frozenset({"mpegts", "mpeg", "mpegtsraw"})
# These count the time before their first frame as well.
_COUNTED_FROM_ZERO = frozenset({"matroska,webm", "flv"})
_BENCH_TIME = re.compile(r"bench: utime=(\d{1,9}\.\d+)s stime=(\d{1,9}\.\d+)s", re.A)
_BENCH_RSS = re.compile(r"bench: maxrss=(\d{1,15})kB", re.A)
_SIGNAL = re.compile(r"Exiting normally, received signal (\d{1,2})\.", re.A)

# A failure prints its cause first and then, level by level, that things failed. Damaged input
# prints a lot that is rarely the reason of an end, and a search for hardware prints its misses.
_GENERIC = re.compile(
    r"Conversion failed!|Error (?:re)?initializing|Error opening (?:output|input) files?"
    r"|Error opening (?:input|output)|Error while opening|Error while processing"
    r"|Failed to inject frame|Task finished with error|Terminating thread|Error sending frames"
    r"|Error encoding a frame|Error muxing|Nothing was written into output|Could not open encoder"
    r"|Error closing file|Error writing trailer"
)
_DAMAGE = re.compile(
    r"\[(?:h264|hevc|vp8|vp9|libdav1d|libvpx|av1|mpeg4|mpeg2video|aac|mp3|mp3float|ac3|opus|NULL)\]"
    r"|[Ee]rror while decoding|Error splitting"
    r"|Error submitting packet to decoder"
)
_SEARCH = re.compile(r"\[AVHWDeviceContext\]|Device creation failed")
_REPEATS_THE_CAUSE = re.compile(
    r"Invalid data found when processing input$|Could not write header|Device setup failed"
    r"|partial file|File ended prematurely"
    r"|: Input/output error$|: Generic error in an external library$"
)


def read_log(text: str) -> LogFacts:
    """The facts in a log written with ``-loglevel level+info``. Tolerates anything."""
    errors: list[str] = []
    duration: float | None = None
    guessed = False
    has_video: bool | None = None
    cpu: float | None = None
    rss: int | None = None
    signal: int | None = None
    in_input, inputs, container = False, 0, ""
    streams = mapped = 0
    moved: dict[str, int] = {}
    for line in text[-_MAX_TEXT:].splitlines():
        if match := _TAGGED.match(line):
            cleaned = _POINTER.sub("]", match["prefix"]) + match["text"]
            errors.append(plain(cleaned))
            continue
        if match := _INPUT.match(line):
            inputs, in_input, container = inputs + 1, True, match[1]
            has_video = has_video or False
        elif "[info] Output #" in line or "[info] Stream mapping" in line:
            in_input = False
        elif in_input and "[info]   Stream #" in line:
            streams += 1
            if " Video: " in line:
                has_video = has_video or "(attached pic)" not in line
        elif _MAPPED.match(line):
            mapped += 1
        elif in_input and inputs == 1 and (match := _DURATION.search(line)):
            duration = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
            if container in _COUNTED_FROM_ZERO:
                duration -= max(0.0, float(match[4] or 0))
            if container in _WITHOUT_DURATION:
                guessed = True
        elif "Estimating duration from bitrate" in line:
            guessed = True
        elif match := _STATISTICS.search(line):
            moved[match[2]] = moved.get(match[2], 0) + int(match[1])
        elif match := _BENCH_TIME.search(line):
            cpu = float(match[1]) + float(match[2])
        elif match := _BENCH_RSS.search(line):
            rss = int(match[1]) * 1024
        elif match := _SIGNAL.search(line):
            signal = int(match[1])
    if duration is not None and not 0 < duration < 1e9:
        duration = None
    return LogFacts(
        errors=_bounded(errors),
        last_error=most_telling(errors),
        input_duration_sec=None if guessed else duration,
        input_has_video=has_video,
        streams_left_out=streams > mapped,
        bytes_read=moved.get("read"),
        bytes_written=moved.get("written"),
        bench_cpu_seconds=cpu,
        bench_maxrss_bytes=rss,
        stopped_by_signal=signal,
    )


def _bounded(errors: list[str]) -> tuple[str, ...]:
    half = _MAX_ERRORS // 2
    return tuple(errors if len(errors) <= _MAX_ERRORS else errors[:half] + errors[-half:])


def most_telling(errors: list[str]) -> str | None:
    """The first line that names a cause; where none does, the least generic one."""
    return min(errors, key=_rank, default=None)  # min() takes the first of equals


def _rank(line: str) -> int:
    for rank, pattern in ((4, _GENERIC), (3, _SEARCH), (2, _DAMAGE), (1, _REPEATS_THE_CAUSE)):
        if pattern.search(line):
            return rank
    return 0
