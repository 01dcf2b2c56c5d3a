from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import JobError, Reason
from worker.jobs.capabilities import TYPICAL, Capabilities
from worker.jobs.labels import MAX_DURATION_SEC
from worker.jobs.parse import parse_job
from worker.jobs.progress import LogFacts, Progress
from worker.jobs.spec import GeneratedInput, JobSpec, Limits, StreamOutput
from worker.jobs.streams import check_sent, host_of, sent_media, without_key
from worker.master.wire import Job

MEDIA = "/var/lib/ffmpeg-worker/media/in.mp4"
DEFAULTS = Limits(cpu_percent=200, memory_mb=2048, disk_mb=5000, timeout_sec=3600)


def parse(
    job_id: str = "j1",
    *,
    host: str = "master",
    scenario: str = "640x360p25",
    capabilities: Capabilities = TYPICAL,
    **parameters: Any,
) -> JobSpec:
    job = Job(id=job_id, scenario=scenario, parameters={"output_mode": "rtmp", **parameters})
    return parse_job(job, capabilities, DEFAULTS, generate_input=True, stream_host=host)


def url(*args: Any, **more: Any) -> str:
    output = parse(*args, **more).output
    assert isinstance(output, StreamOutput)
    return output.url


def refusal(*args: Any, **more: Any) -> str:
    with pytest.raises(JobError) as caught:
        parse(*args, **more)
    assert caught.value.reason is Reason.USER_ERROR
    return caught.value.message


def test_a_stream_with_all_defaults() -> None:
    spec = parse(scenario="")
    assert spec.output == StreamOutput("rtmp://master:1935/live/j1")
    assert (spec.muxer, spec.encoder, spec.duration_sec) == ("flv", "libx264", None)
    assert spec.source == GeneratedInput(1280, 720, 30.0, 10.0)
    assert parse(output_mode="STREAM").output == spec.output


def test_the_default_goes_to_the_masters_host() -> None:
    assert url(host="10.0.0.1", stream_key="a-b_c") == "rtmp://10.0.0.1:1935/live/a-b_c"
    assert url(host="fd00::1") == "rtmp://[fd00::1]:1935/live/j1"
    assert "parameters.rtmp_url: must be given" in refusal(host="")
    assert url(host="", rtmp_url="rtmp://h/live/x") == "rtmp://h/live/x"


def test_the_masters_host() -> None:
    assert host_of("https://[fd00::1]:8080/x") == "fd00::1"
    assert host_of("http://Master:8080") == "master"
    assert host_of("") == ""
    assert host_of("http://[") == ""


def test_a_key_is_one_segment() -> None:
    assert url(stream_key="a/b?c#d e:é").endswith(":1935/live/a%2Fb%3Fc%23d%20e%3A%C3%A9")
    assert url("job/../1").endswith("/live/job%2F..%2F1")
    assert url(stream_key=" ").endswith("/live/j1")


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("rtmp://h/app", "rtmp://h/app/k%201"),
        ("rtmps://u:p@h:443/app/", "rtmps://u:p@h:443/app/k%201"),
        ("RTMP://h/app/instance/", "rtmp://h/app/instance/k%201"),
        ("rtmp://[::1]/app?token=a/b", "rtmp://[::1]/app/k%201?token=a/b"),
        ("rtmp://h/app/name?token=t", "rtmp://h/app/name?token=t"),
        ("rtmp://h/app/name", "rtmp://h/app/name"),
    ],
)
def test_a_key_completes_a_url_that_names_no_stream(given: str, sent: str) -> None:
    spec = parse(rtmp_url=given, stream_key="k 1")
    assert spec.output == StreamOutput(sent)
    ignored = "parameters.stream_key ignored: rtmp_url names the stream already"
    assert (ignored in spec.notes) is sent.endswith(("name", "token=t"))
    assert "k 1" not in str(spec.notes)


def test_a_url_is_taken_as_it_is() -> None:
    for value in ("rtmp://h/app", "rtmp://h/app/", "rtmps://u:p@h:1/a/b/c?x=1"):
        assert url(rtmp_url=value) == value


@pytest.mark.parametrize(
    "value",
    [
        *(5, ["rtmp://h/a/hunter2"], True, "h/live/hunter2", "//h/live/hunter2", "rtmp:/h/hunter2"),
        *("http://h/live/hunter2", "rtmpt://h/live/hunter2", "file:///hunter2", "-hunter2"),
        *("rtmp://h/live/hunter2 live=1", "rtmp://h/live/a\nhunter2", "rtmp://h/live/\0hunter2"),
        *("rtmp:///live/hunter2", "rtmp://:1935/live/hunter2", "rtmp://[h/live/hunter2"),
        *("rtmp://h:0/live/hunter2", "rtmp://h:x/live/hunter2", "rtmp://h:99999/live/hunter2"),
        *("rtmp://h", "rtmp://h/", "rtmp://h?hunter2", "rtmp://h/?hunter2", "rtmp://h?/live/x"),
        *("rtmp://h/live/hunter2" + "x" * 900, f"rtmp://h/{'x/' * 600}hunter2"),
        *("rtmp://h/live/hunter2?" + "x" * 1000, f"rtmp://{'h' * 256}/live/hunter2"),
        f"rtmp://hunter2:{'p' * 100}@h/live/x",
        *("rtmp://h#/live/hunter2", "rtmp://h\\@x/live/hunter2", "rtmp://u:p@x@h/live/hunter2"),
        *("rtmp://-h/live/hunter2", "rtmp://h%2f/live/hunter2", "rtmp://h:٣/live/hunter2"),
        *("rtmp://[::g]/live/hunter2", "RTMPE://h/live/hunter2"),
        *("rtmp://\xfc/live/hunter2", f"rtmp://h/{'a' * 128}/hunter2"),
    ],
)
def test_urls_that_are_refused(value: object) -> None:
    message = refusal(rtmp_url=value)
    assert message.startswith("parameters.rtmp_url: ")
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "value", [5, ["hunter2"], "hunter2\nx", "hunter2\0", "hunter2" * 40, "é" * 100, ".", ".."]
)
def test_keys_that_are_refused(value: object) -> None:
    message = refusal(stream_key=value)
    assert message.startswith("parameters.stream_key: ")
    assert "hunter2" not in message


def test_a_job_id_that_is_no_name_needs_a_key() -> None:
    assert "parameters.stream_key: must be given" in refusal("/" * 200)
    assert url("/" * 200, stream_key="k").endswith("/live/k")


def test_an_appended_key_may_be_too_much() -> None:
    long = f"rtmp://h/{'x' * 60}/{'y' * 66}/{'z' * 700}/"
    assert url(rtmp_url=long) == long
    assert "name and query must have at most" in refusal(rtmp_url=long, stream_key="k" * 200)
    assert "the application must have at most" in refusal(rtmp_url=f"rtmp://h/{'x' * 128}/k")


def test_only_h264_is_streamed() -> None:
    for codec in ("h265", "vp9", "av1", "mpeg4"):
        message = refusal(codec=codec)
        assert message.startswith(f"parameters.codec = '{codec}': a stream holds H.264 only")
    assert refusal(scenario="720p30-h265").startswith("scenario's codec = 'h265': ")
    assert parse(scenario="720p30-h265", codec="h264").encoder == "libx264"
    other = replace(TYPICAL, default_encoder="libx265")
    assert parse(capabilities=other).encoder == "libx264"
    gpu = replace(TYPICAL, encoders=TYPICAL.encoders | {"h264_nvenc"}, default_encoder="h264_nvenc")
    assert parse(capabilities=gpu).encoder == "h264_nvenc"


def test_a_node_without_h264_cannot_stream() -> None:
    without = replace(TYPICAL, encoders=frozenset({"libx265"}), default_encoder="libx265")
    with pytest.raises(JobError) as caught:
        parse(capabilities=without)
    assert caught.value.reason is Reason.CAPABILITY_MISMATCH


def test_a_stream_is_as_long_as_it_is_asked_to_be() -> None:
    assert parse(duration=5000).source == GeneratedInput(640, 360, 25.0, 5000)
    assert parse(duration=MAX_DURATION_SEC).duration_sec == MAX_DURATION_SEC
    assert parse(input=MEDIA).duration_sec is None


def test_the_file_of_a_stream_is_ignored_and_said_so() -> None:
    spec = parse(output="rtmp://h/live/hunter2")
    assert spec.notes == ("parameters.output ignored: a stream leaves no file",)


def sent(seconds: float | None, frame: int | None = 1) -> Progress:
    return Progress(ended=True, frame=frame, out_time_sec=seconds)


def test_what_was_sent_is_enough() -> None:
    log = LogFacts(input_has_video=True)
    for asked, seconds in ((100, 90), (100, 120), (10, 8), (10, 9), (1, 0)):
        check_sent(parse(duration=asked), sent(seconds), log)
    file = parse(input=MEDIA)
    check_sent(file, sent(None), log)
    check_sent(file, sent(18), replace(log, input_duration_sec=20.0))


def short(spec: JobSpec, progress: Progress | None, log: LogFacts) -> JobError:
    with pytest.raises(JobError) as caught:
        check_sent(spec, progress, log)
    return caught.value


def test_what_was_sent_is_too_little() -> None:
    log = LogFacts(input_has_video=True)
    assert "89.90 s of the 100.00 s" in short(parse(duration=100), sent(89.9), log).message
    assert short(parse(duration=10), sent(7.9), log).reason is Reason.RUNTIME_ERROR
    assert "no frame was sent" in short(parse(), None, log).message
    assert "no frame was sent" in short(parse(), sent(10, 0), log).message
    assert short(parse(), sent(None), log).reason is Reason.RUNTIME_ERROR
    file = parse(input=MEDIA)
    damaged = replace(log, input_duration_sec=20.0, errors=("File ended prematurely",))
    assert short(file, sent(5), damaged).reason is Reason.INPUT_ERROR
    silent = replace(log, input_has_video=False)
    assert short(file, sent(5), silent).reason is Reason.INPUT_ERROR


def test_what_went_over_the_wire() -> None:
    progress = Progress(frame=250, out_time_sec=10.0)
    media = sent_media(parse(), progress)
    assert (media.codec, media.width, media.height, media.frame_rate) == ("h264", 640, 360, 25.0)
    media = sent_media(parse(input=MEDIA), progress)
    assert (media.width, media.frame_rate, media.duration_sec) == (None, 25.0, 10.0)
    media = sent_media(parse(input=MEDIA, fps=12, resolution="320x240"), Progress())
    assert (media.width, media.height, media.frame_rate) == (320, 240, 12.0)
    assert sent_media(parse(input="http://h/x"), Progress()).frame_rate is None


def test_a_server_may_not_repeat_the_key() -> None:
    log = (
        "[info] key%201 is none of its words\n"
        "[rtmp @ 0x1] [error] Server error: key%201 (key 1) is taken, t=hunter2\n"
        "[error] end"
    )
    assert without_key(log, "rtmp://h/live/key%201?t=hunter2") == (
        "[info] key%201 is none of its words\n"
        "[rtmp @ 0x1] [error] Server error: *** (***) is taken, ***\n"
        "[error] end"
    )


text = st.text(max_size=30) | st.sampled_from(["/", "h/live/x", "[::1]", "a@b@c/d", "h?a/b#c@d"])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["rtmp://", "RTMPS://", "http://", ""]), text, st.none() | text,
    st.sampled_from(["m", "::1", ""]), st.text(min_size=1, max_size=40),
)  # fmt: skip
def test_any_place_is_either_fit_to_send_to_or_refused(
    scheme: str, rest: str, key: str | None, host: str, job_id: str
) -> None:
    with contextlib.suppress(JobError):
        sent_to = url(job_id, host=host, rtmp_url=scheme + rest, stream_key=key)
        assert re.fullmatch(r"rtmps?://[^/\s]+/\S+", sent_to)
        assert len(sent_to.encode()) < 2000
