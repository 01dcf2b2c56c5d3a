"""Is what came out a video, and is it as long as was asked?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from worker.errors import JobError, Reason
from worker.jobs.failures import input_is_damaged
from worker.jobs.progress import LogFacts
from worker.jobs.spec import GeneratedInput, JobSpec, UrlInput
from worker.jobs.text import label

NO_VIDEO = "the input has no video stream (a cover picture is none)"
_MAX_TEXT = 2**20
_TOLERANCE_SEC = 0.5
_TOLERANCE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Media:
    """A media file as ffprobe sees it. None is what the container does not say."""

    container: str = ""
    duration_sec: float | None = None
    size_bytes: int | None = None
    bitrate_bps: int | None = None
    codec: str | None = None
    """Of the first video stream, as are the fields below; None if there is no such stream."""
    width: int | None = None
    height: int | None = None
    frame_rate: float | None = None
    frames: int | None = None
    decodes: bool = False
    """Whether a frame of the video could be decoded."""
    video_duration_sec: float | None = None

    @property
    def has_video(self) -> bool:
        return self.codec is not None


def parse_probe(text: str) -> Media:
    """What ``probe_command`` printed. Raises JobError (runtime_error) if that is no answer."""
    try:
        data = json.loads(text[:_MAX_TEXT])
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise JobError(
            Reason.RUNTIME_ERROR, "ffprobe could not read the output: it gave no description"
        )
    container = _object(data.get("format"))
    video = next((s for s in _objects(data.get("streams")) if s.get("codec_type") == "video"), {})
    codec, name = video.get("codec_name"), container.get("format_name")
    duration = _float(container.get("duration"))
    return Media(
        container=label(name, 60) if isinstance(name, str) else "",
        duration_sec=_float(video.get("duration")) if duration is None else duration,
        size_bytes=_int(container.get("size")),
        bitrate_bps=_int(container.get("bit_rate")),
        codec=label(codec, 60) if isinstance(codec, str) else ("unknown" if video else None),
        width=_int(video.get("width")),
        height=_int(video.get("height")),
        frame_rate=_ratio(video.get("avg_frame_rate")) or _ratio(video.get("r_frame_rate")),
        frames=_int(video.get("nb_frames")),
        decodes=any(f.get("media_type") == "video" for f in _objects(data.get("frames"))),
        video_duration_sec=_video_seconds(video),
    )


def expected_seconds(spec: JobSpec, log: LogFacts) -> float | None:
    """How long the output should be; None if nobody knows.

    What was asked, but no more than the input has; a generated input is looped for as long as
    it takes. An input's length is that of its longest stream, subtitles and second languages
    included, so it counts only if all streams were used, or if ffmpeg complained of the data.
    """
    if isinstance(spec.source, GeneratedInput):
        return spec.source.duration_sec if spec.duration_sec is None else spec.duration_sec
    if log.input_duration_sec is None:
        # A file that does not say how long it is may be short; a stream has to last.
        return spec.duration_sec if isinstance(spec.source, UrlInput) else None
    if log.streams_left_out and not input_is_damaged(log):
        return None
    if spec.duration_sec is None:
        return log.input_duration_sec
    return min(spec.duration_sec, log.input_duration_sec)


def check_output(
    media: Media,
    spec: JobSpec,
    expected_sec: float | None,
    log: LogFacts,
    *,
    encoded_sec: float | None = None,
) -> None:
    """Raise JobError if the output is not what was asked for.

    ``encoded_sec`` is the length that ffmpeg reported at its end: raw streams, such as .h264,
    do not know their own.
    """
    damaged = input_is_damaged(log)
    if log.input_has_video is False:
        raise JobError(Reason.INPUT_ERROR, NO_VIDEO)
    if not media.has_video or not media.decodes:
        what = "a frame that can be decoded" if media.has_video else "a video stream"
        raise fault(log, f"the output is without {what}")
    length = encoded_sec if media.duration_sec is None else media.duration_sec
    if damaged and length is not None and media.video_duration_sec is not None:
        # Sound goes on where the picture is lost.
        length = min(length, media.video_duration_sec)
    if expected_sec is None or length is None:
        return
    frame_rate = media.frame_rate or 30.0
    tolerance = max(_TOLERANCE_SEC, 2 / frame_rate, _TOLERANCE_SHARE * expected_sec)
    # A job of a fraction of a second must not get away with next to nothing.
    tolerance = min(tolerance, max(2 / frame_rate, expected_sec / 2))
    if length < expected_sec - tolerance:
        sentence = f"the output has {length:.2f} s of the {expected_sec:.2f} s that were expected"
        raise fault(log, sentence)


def fault(log: LogFacts, sentence: str) -> JobError:
    """The error of an output that is not what was asked for: the input's fault if it is damaged."""
    said = f"; ffmpeg: {log.last_error}" if log.last_error else ""
    if input_is_damaged(log):
        return JobError(Reason.INPUT_ERROR, f"{sentence}: the input is damaged or cut off{said}")
    return JobError(Reason.RUNTIME_ERROR, sentence + said)


def _video_seconds(video: Mapping[str, object]) -> float | None:
    """The length of a stream; Matroska has it in a tag, as 00:01:02.500000000."""
    tag = _object(video.get("tags")).get("DURATION")
    if isinstance(tag, str) and (match := re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", tag, re.A)):
        return _float(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]))
    return _float(video.get("duration"))


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _float(value: object) -> float | None:
    """ffprobe writes most numbers as strings."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and 0 <= number < 1e15 else None


def _int(value: object) -> int | None:
    number = _float(value)
    return None if number is None else int(number)


def _ratio(value: object) -> float | None:
    """``30000/1001``; ``0/0`` is ffprobe's word for unknown."""
    if not isinstance(value, str):
        return None
    above, _, below = value.partition("/")
    numerator, denominator = _float(above), _float(below or "1")
    return numerator / denominator if numerator and denominator else None
