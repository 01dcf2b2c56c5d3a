from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import JobError, Reason
from worker.jobs.capabilities import TYPICAL
from worker.jobs.parse import parse_job
from worker.jobs.probe import Media, check_output, expected_seconds, parse_probe
from worker.jobs.progress import LogFacts
from worker.jobs.spec import FileInput, JobSpec, Limits, UrlInput
from worker.master.wire import Job

GENERATED = parse_job(Job(id="j"), TYPICAL, Limits(200, 2048, 5000, 3600), generate_input=True)
SPEC = replace(GENERATED, source=FileInput(Path("/in.mp4")))
GOOD = Media("mp4", 10.0, 1000, 800, "h264", 640, 360, 30.0, 300, True)
DAMAGED = LogFacts(errors=("[matroska,webm] File ended prematurely",))
ANSWER: dict[str, Any] = {
    "frames": [{"media_type": "video"}],
    "programs": [],
    "streams": [
        {
            "codec_name": "h264",
            "codec_type": "video",
            "width": 640,
            "height": 360,
            "r_frame_rate": "30/1",
            "avg_frame_rate": "30000/1001",
            "nb_frames": "300",
        }
    ],
    "format": {"format_name": "mp4", "duration": "10.0", "size": "1000", "bit_rate": "800"},
}


def test_an_answer() -> None:
    media = parse_probe(json.dumps(ANSWER))
    assert media == replace(GOOD, frame_rate=30000 / 1001)


def test_an_answer_with_gaps() -> None:
    text = json.dumps({"streams": [{"codec_type": "video", "avg_frame_rate": "0/0"}]})
    assert parse_probe(text) == Media(codec="unknown")
    assert parse_probe("{}") == Media()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "\x00"])
def test_no_answer(text: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_probe(text)
    assert caught.value.reason is Reason.RUNTIME_ERROR


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from([*sorted(ANSWER), "size"]), inner)
    ),
)


@given(anything)
def test_any_answer_can_be_read(answer: object) -> None:
    if isinstance(answer, dict):
        parse_probe(json.dumps(answer))
    else:
        parse_probe(json.dumps({"format": answer, "streams": [answer], "frames": answer}))


@pytest.mark.parametrize(
    ("spec", "asked", "has", "expected"),
    [
        (SPEC, None, None, None),
        (SPEC, None, 60.0, 60.0),
        (SPEC, 10.0, 60.0, 10.0),
        (SPEC, 90.0, 60.0, 60.0),
        (GENERATED, None, 9.9, 10.0),
        (GENERATED, 300.0, 120.0, 300.0),
    ],
)
def test_how_long_the_output_should_be(
    spec: JobSpec, asked: float | None, has: float | None, expected: float | None
) -> None:
    spec = replace(spec, duration_sec=asked)
    assert expected_seconds(spec, LogFacts(input_duration_sec=has)) == expected


@pytest.mark.parametrize("expected", [None, 10.0, 10.4, 11.1, 5.0])
def test_long_enough(expected: float | None) -> None:
    check_output(GOOD, SPEC, expected, LogFacts())


@pytest.mark.parametrize(
    ("media", "expected", "log", "reason"),
    [
        (GOOD, 60.0, LogFacts(), Reason.RUNTIME_ERROR),
        (GOOD, 60.0, DAMAGED, Reason.INPUT_ERROR),
        (replace(GOOD, duration_sec=0.1), 0.5, LogFacts(), Reason.RUNTIME_ERROR),
        (replace(GOOD, decodes=False), None, LogFacts(), Reason.RUNTIME_ERROR),
        (replace(GOOD, decodes=False), None, DAMAGED, Reason.INPUT_ERROR),
        (Media(duration_sec=10.0), 10.0, LogFacts(), Reason.RUNTIME_ERROR),
        (Media(duration_sec=10.0), 10.0, LogFacts(input_has_video=False), Reason.INPUT_ERROR),
    ],
)
def test_what_is_not_what_was_asked(
    media: Media, expected: float | None, log: LogFacts, reason: Reason
) -> None:
    with pytest.raises(JobError) as caught:
        check_output(media, SPEC, expected, log)
    assert caught.value.reason is reason


def test_a_raw_stream_is_measured_by_what_ffmpeg_said() -> None:
    raw = replace(GOOD, duration_sec=None)
    spec = replace(SPEC, muxer="h264", duration_sec=60.0)
    check_output(raw, spec, 60.0, LogFacts(), encoded_sec=59.9)
    with pytest.raises(JobError, match=r"20\.00 s of the 60\.00 s"):
        check_output(raw, spec, 60.0, LogFacts(), encoded_sec=20.0)


def test_a_stream_that_was_left_out_may_be_the_long_one() -> None:
    log = LogFacts(input_duration_sec=60.0, streams_left_out=True)
    assert expected_seconds(SPEC, log) is None
    assert expected_seconds(replace(SPEC, duration_sec=50.0), log) is None
    assert expected_seconds(SPEC, replace(log, errors=DAMAGED.errors)) == 60.0


def test_a_stream_of_unknown_length_has_to_last_and_a_file_has_not() -> None:
    stream = replace(SPEC, source=UrlInput("rtmp://h/live/k", "rtmp"), duration_sec=90.0)
    assert expected_seconds(stream, LogFacts()) == 90.0
    assert expected_seconds(replace(SPEC, duration_sec=90.0), LogFacts()) is None


def test_damage_shows_in_the_picture_though_the_sound_goes_on() -> None:
    lost = replace(GOOD, video_duration_sec=6.0)
    check_output(lost, SPEC, 10.0, LogFacts())
    with pytest.raises(JobError, match=r"6\.00 s of the 10\.00 s") as caught:
        check_output(lost, SPEC, 10.0, DAMAGED)
    assert caught.value.reason is Reason.INPUT_ERROR


def test_a_cover_picture_is_no_output() -> None:
    with pytest.raises(JobError, match="cover") as caught:
        check_output(GOOD, SPEC, 10.0, LogFacts(input_has_video=False))
    assert caught.value.reason is Reason.INPUT_ERROR


@pytest.mark.parametrize(
    ("stream", "seconds"),
    [
        ({"duration": "7.5"}, 7.5),
        ({"tags": {"DURATION": "00:01:07.500000000"}}, 67.5),
        ({"tags": {"DURATION": "long"}, "duration": "1"}, 1.0),
        ({"tags": 7}, None),
    ],
)
def test_the_length_of_the_video(stream: dict[str, Any], seconds: float | None) -> None:
    answer = {"streams": [{"codec_type": "video", **stream}]}
    assert parse_probe(json.dumps(answer)).video_duration_sec == seconds
