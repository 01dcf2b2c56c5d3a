from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.errors import JobError, Reason
from worker.jobs.capabilities import TYPICAL, Capabilities
from worker.jobs.parse import parse_job
from worker.jobs.policy import Policy
from worker.jobs.spec import (
    FileInput,
    GeneratedInput,
    JobSpec,
    Limits,
    Priority,
    Queue,
    UrlInput,
)
from worker.master.wire import Job

IN, OUT = Path("/in"), Path("/o")
POLICY = Policy(input_dirs=(IN, Path("/media")), output_dirs=(OUT, IN))
DEFAULTS = Limits(cpu_percent=200, memory_mb=2048, disk_mb=5000, timeout_sec=3600)


def parse(
    parameters: object = None,
    *,
    scenario: object = "720p30-h264",
    generate_input: bool = True,
    capabilities: Capabilities = TYPICAL,
    **fields: Any,
) -> JobSpec:
    job = Job(id="j1", scenario=scenario, parameters=parameters, **fields)
    return parse_job(job, capabilities, DEFAULTS, generate_input=generate_input, policy=POLICY)


def refusal(parameters: object = None, **fields: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        parse(parameters, **fields)
    return caught.value


def test_an_empty_job_has_all_defaults() -> None:
    spec = parse(scenario="")
    assert spec == JobSpec(
        id="j1",
        scenario="",
        queue=Queue.DEFAULT,
        priority=Priority.MEDIUM,
        classification="",
        engine="ffmpeg",
        source=GeneratedInput(1280, 720, 30.0, 10.0),
        output=None,
        muxer="mp4",
        encoder="libx264",
        bitrate_bps=2_000_000,
        preset="veryfast",
        tune=None,
        threads=2,
        hwaccel=None,
        duration_sec=None,
        scale=None,
        frame_rate=None,
        limits=DEFAULTS,
    )


def test_the_scenario_means_what_it_says() -> None:
    spec = parse(scenario="4K60-h265")
    assert spec.source == GeneratedInput(3840, 2160, 60.0, 10.0)
    assert spec.encoder == "libx265"


def test_parameters_win_over_the_scenario() -> None:
    spec = parse(
        {"codec": "VP9", "resolution": "640X360", "fps": 25, "frame_rate": 23.976},
        scenario="99999p0-h264",
    )
    assert spec.source == GeneratedInput(640, 360, 23.976, 10.0)
    assert spec.encoder == "libvpx-vp9"


def test_a_scenario_out_of_bounds_matters_only_where_it_is_used() -> None:
    assert refusal(scenario="99999p30-h264").reason is Reason.USER_ERROR
    assert refusal(scenario="720p0-h264").reason is Reason.USER_ERROR
    spec = parse({"input": "/in/a.mp4"}, scenario="99999p0-vp9", generate_input=False)
    assert spec.encoder == "libvpx-vp9"


def test_a_given_input_is_scaled_only_if_asked() -> None:
    assert parse({"input": "/in/a.mp4"}).scale is None
    assert parse({"input": "/in/a.mp4", "resolution": "640x360"}).scale == (640, 360)
    assert parse({"input": "/in/a.mp4", "resolution_width": 640}).scale == (640, 720)
    assert parse({"input": "/in/a.mp4", "resolution_width": 640}, scenario="x").scale == (640, 720)
    given = {"input": "/in/a.mp4", "resolution_height": 480.0, "resolution": "320x240"}
    assert parse(given).scale == (320, 480)
    assert parse({"input": "/in/a.mp4", "fps": 24}).frame_rate == 24
    assert parse({"input": "/in/a.mp4"}).frame_rate is None


@pytest.mark.parametrize(
    ("parameters", "made", "asked"),
    [
        ({}, 10, None),
        ({"duration": 5}, 5, 5),
        ({"duration": 500}, 120, 500),
        ({"duration": 3, "duration_seconds": "x"}, 3, 3),
        ({"duration_seconds": 2.5}, 2.5, 2.5),
    ],
)
def test_duration(parameters: dict[str, Any], made: float, asked: float | None) -> None:
    spec = parse(parameters)
    assert isinstance(spec.source, GeneratedInput)
    assert (spec.source.duration_sec, spec.duration_sec) == (made, asked)


@pytest.mark.parametrize(
    ("bitrate", "bps"),
    [
        ("2000k", 2_000_000),
        ("2M", 2_000_000),
        ("1.5m", 1_500_000),
        ("500K", 500_000),
        (800_000, 800_000),
        ("800000", 800_000),
        ("1G", 10**9),
        (None, 2_000_000),
        (1e6, 10**6),
    ],
)
def test_bitrate(bitrate: object, bps: int) -> None:
    assert parse({"bitrate": bitrate}).bitrate_bps == bps


def test_codec_names() -> None:
    assert parse({"codec": "HEVC"}).encoder == "libx265"
    assert parse({"codec": "libsvtav1"}).encoder == "libsvtav1"
    assert parse({"codec": "av1"}).encoder == "libsvtav1"
    without = replace(TYPICAL, encoders=TYPICAL.encoders - {"libsvtav1"})
    assert parse({"codec": "av1"}, capabilities=without).encoder == "libaom-av1"
    gpu = replace(TYPICAL, encoders=TYPICAL.encoders | {"h264_nvenc"}, default_encoder="h264_nvenc")
    assert parse(scenario="any", capabilities=gpu).encoder == "h264_nvenc"
    assert parse(scenario="720p30-h264", capabilities=gpu).encoder == "libx264"


@pytest.mark.parametrize(
    "parameters",
    [{"codec": c} for c in ("h264_nvenc", "hevc_qsv", "av1_amf", "librav1e", "h264_videotoolbox")]
    + [{"hwaccel": "cuda"}, {"engine": "gstreamer"}],
)
def test_what_the_world_knows_but_this_node_lacks(parameters: dict[str, Any]) -> None:
    assert refusal(parameters).reason is Reason.CAPABILITY_MISMATCH


def test_a_build_without_x265_lacks_it() -> None:
    without = replace(TYPICAL, encoders=frozenset({"libx264"}))
    for codec in ("h265", "libx265", "av1"):
        assert refusal({"codec": codec}, capabilities=without).reason is Reason.CAPABILITY_MISMATCH


def test_presets() -> None:
    assert parse(capabilities=replace(TYPICAL, cpus=2)).preset == "ultrafast"
    assert parse(capabilities=replace(TYPICAL, cpus=8)).preset == "fast"
    assert parse({"preset": "Slow"}).preset == "slow"
    assert parse({"codec": "vp9", "preset": "medium"}).preset == "medium"
    assert parse({"codec": "av1", "preset": "13"}).preset == "13"
    spec = parse({"codec": "mpeg4", "preset": "fast"})
    assert spec.preset is None
    assert spec.notes == ("parameters.preset ignored: mpeg4 has no presets",)


def test_threads_follow_the_quota() -> None:
    assert parse({"resource_limits": {"max_cpu_percent": 101}}).threads == 2
    assert parse({"resource_limits": {"max_cpu_percent": 10}}).threads == 1
    assert parse({"threads": 16.0}).threads == 16


def test_hwaccel() -> None:
    gpu = replace(TYPICAL, hwaccels=frozenset({"cuda"}))
    assert parse({"hwaccel": "cuda"}, capabilities=gpu).hwaccel == "cuda"
    assert parse({"hwaccel": "auto"}, capabilities=gpu).hwaccel == "auto"
    assert parse({"hwaccel": "auto"}).hwaccel is None
    assert parse({"hwaccel": "none"}).hwaccel is None


def test_the_engine_of_the_job_wins() -> None:
    assert parse({"engine": "gstreamer"}, engine="auto").engine == "ffmpeg"
    assert refusal({"engine": "ffmpeg"}, engine="vlc").reason is Reason.USER_ERROR


def test_queue_and_priority() -> None:
    spec = parse(queue="LIVE", priority="high")
    assert (spec.queue, spec.priority) == (Queue.LIVE, Priority.HIGH)
    spec = parse(queue=["x"], priority="urgent")
    assert (spec.queue, spec.priority) == (Queue.DEFAULT, Priority.MEDIUM)


def test_classification_also_from_the_parameters() -> None:
    assert parse({"classification": "test"}).classification == "test"
    assert parse({"classification": "test"}, classification="debug").classification == "debug"
    assert parse({"classification": 5}).notes == ()


def test_unknown_parameters_are_named_once() -> None:
    parameters: dict[str, Any] = {f"p{n:02}": 1 for n in range(12)}
    parameters["a\n" + "x" * 500] = 1
    (note,) = parse(parameters).notes
    assert note.startswith("unknown parameters ignored: a\\nxxx")
    assert note.endswith("p08 and 3 more")
    assert len(note) < 200


def test_a_stream_key_of_a_file_job_is_ignored() -> None:
    assert parse({"output_mode": "file", "rtmp_url": 5, "stream_key": []}).notes == ()


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("/media/a:b%03d.mp4", FileInput(Path("/media/a:b%03d.mp4"))),
        ("file:///media/a%20b.mp4", FileInput(Path("/media/a b.mp4"))),
        ("file://localhost/media/a.mp4", FileInput(Path("/media/a.mp4"))),
        ("//media/a.mp4", FileInput(Path("/media/a.mp4"))),
        ("/media///a//b.mp4", FileInput(Path("/media/a/b.mp4"))),
        ("FILE:///media/a.mp4", FileInput(Path("/media/a.mp4"))),
        ("HTTP://h/a.m3u8", UrlInput("http://h/a.m3u8", "http", ("https",))),
        ("https://u:p%40@h:1/a?b@c", UrlInput("https://u:p%40@h:1/a?b@c", "https", ("http",))),
        ("rtsp://[::1]:554/x?tcp", UrlInput("rtsp://[::1]:554/x?tcp", "rtsp")),
        ("srt://h:9000?mode=caller", UrlInput("srt://h:9000?mode=caller", "srt")),
        ("udp://@:1234", UrlInput("udp://@:1234", "udp")),
    ],
)
def test_inputs(value: str, source: object) -> None:
    assert parse({"input": value}).source == source


@pytest.mark.parametrize(
    "value",
    [
        "a.mp4",
        "-",
        "../a.mp4",
        "pipe:0",
        "concat:/a|/b",
        "subfile,,start,0,end,1,,:/a",
        "data:,x",
        "gopher://h/x",
        "concat:http://h/x",
        "http:///x",
        "http://",
        "http://[::1",
        "http://h:0/x",
        "http://h:99999/x",
        "http://h/a b",
        "/a\0b",
        "/a\nb",
        "/" + "x" * 5000,
        "/" + "é" * 200,
        "file:relative",
        "file://other/a.mp4",
        "file:///a%00b",
        "/a\ud800",
        "/dir/",
        5,
        ["/a"],
        "file:///a%ff",
        *("/media/../etc/passwd", "/media/./a.mp4", "/media/a/..", "file:///media/%2e%2e/a"),
        *("/etc/passwd", "/media", "/mediax/a.mp4", "/o/a.mp4", "file:///media/a?x", "/"),
        *("file:////etc/passwd", "file:///media/a.mp4#x", "http://h\\@i/", "http://a@b@h/"),
        *("http://h#@i/x", "http://h%2fi/x", "http://-h/x", "http://[h]/x", "http://[::1%25l]/"),
        *("http://h:٣/x", "http://h:+1/x", "http://[::1]x/", "http://h\xe9/x"),
        *("udp://h:1?fec=x", "srt://h:1?x=/etc", "tcp://h:1?listen&y", "udp://h:1#?ttl=1"),
        *("rtp://h:1?ttl=1?fec=prompeg", "unix:///run/x", "http+tcp://h/x", "file:http://h/x"),
        *("cache:http://h/x", "async:http://h", "crypto+http://h/x", "httpproxy://h/x"),
    ],
)
def test_inputs_that_are_refused(value: object) -> None:
    error = refusal({"input": value})
    assert error.reason is Reason.USER_ERROR
    assert error.message.startswith("parameters.input = ")


def test_no_input_needs_generation() -> None:
    for parameters in ({}, {"input": None}, {"input": ""}):
        assert refusal(parameters, generate_input=False).reason is Reason.USER_ERROR


@pytest.mark.parametrize(
    ("value", "muxer"), [("/o/a.MKV", "matroska"), ("/o/a.m2ts", "mpegts"), ("/o/x.m4v", "mp4")]
)
def test_outputs(value: str, muxer: str) -> None:
    spec = parse({"output": value})
    assert (spec.output, spec.muxer) == (Path(value), muxer)


@pytest.mark.parametrize(
    "value",
    [
        "o.mp4",
        "/o/a",
        "/o/a.txt",
        "/o/../a.mp4",
        "/o/a.mp4/",
        "rtmp://h/live/x",
        "/a\0.mp4",
        "-",
        "/o/a.webm",
        "/o/a.ivf",
        "/o/a.ogv",
        "/in/a.mp4",
        "/in//a.mp4",
        *("/o/./b.mp4", "/media/b.mp4", "/b.mp4", "/ox/b.mp4", "tee:/o/b.mp4", "/o/b.m\u212av"),
        7,
        "/o/" + "x" * 300 + ".mp4",
    ],
)
def test_outputs_that_are_refused(value: object) -> None:
    error = refusal({"output": value, "input": "/in/a.mp4"})
    assert error.reason is Reason.USER_ERROR
    assert "parameters.output" in error.message


WRONG: dict[str, tuple[object, ...]] = {
    "duration": (0, -1, "10", True, float("nan"), float("inf"), 10**40, 8 * 86400, 1e-9),
    "duration_seconds": ([],),
    "fps": (0, 241, "30", float("nan")),
    "resolution": (720, "720", "0x0", "99999x720", "641x360", "1280\u00d7720", "1x1x1"),
    "resolution_width": (0, 15, 16385, 641, 640.5, "640", True),
    "bitrate": (
        *(0, "999", "2000kk", "-1k", "fast", True, float("inf"), [], "2 M"),
        *(2e9, "2G", "1e6", "999999999999G"),
    ),
    "codec": ("theora2", 264, "-h264", "libx264;ls", "a\nb"),
    "preset": ("fastest", 3, "-y", "p1"),
    "tune": ("loud", "hq", 1),
    "hwaccel": ("warp", 1, True),
    "threads": (0, 257, "2", 1.5, True),
    "output_mode": ("udp", 1),
    "engine": ("vlc", 1),
    "resource_limits": ("big", [1]),
}


@pytest.mark.parametrize(
    "parameters",
    [
        *({field: value} for field, values in WRONG.items() for value in values),
        *({"codec": "av1", "preset": "14"}, {"codec": "mpeg4", "preset": "quick"}),
        *({"codec": "vp9", "tune": "film"}, {"codec": "av1", "tune": "psnr"}),
        *("text", 5, [1], True),
    ],
)
def test_wrong_values(parameters: object) -> None:
    error = refusal(parameters)
    assert error.reason is Reason.USER_ERROR
    assert error.message.startswith("parameters")


@pytest.mark.parametrize("scenario", [5, ["x"], {"a": 1}, True])
def test_a_scenario_must_be_a_string(scenario: object) -> None:
    assert "scenario" in refusal(scenario=scenario).message


def test_refusals_keep_secrets() -> None:
    message = refusal({"output": "rtmp://u:hidden@host/live/secretkey"}).message
    assert "secretkey" not in message
    assert "hidden" not in message


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
plausible = st.sampled_from(
    [
        "h264",
        "av1",
        "h264_qsv",
        "ultrafast",
        "/in/a.mp4",
        "/o/a.webm",
        "http://h/x",
        "2000k",
        "1280x720",
        "1920x1081",
        "auto",
        "cuda",
        "zerolatency",
        "film",
        "max",
        "50000 100000",
        "8:0 rbps=1",
        "live",
        "720p30-h264",
        "0p0-vp9",
        "4K999-hevc",
        "\x1b[31m",
        "\ud800",
        "x" * 9999,
        "rtmp",
        "rtmp://h/live",
        "file:///a",
    ]
) | st.sampled_from([0, 1, 30, 640, 10**9, 10**30, -1, 0.5, 1e308, float("nan")])
value = anything | plausible
parameter_names = st.sampled_from(
    [
        "input",
        "output",
        "output_mode",
        "rtmp_url",
        "stream_key",
        "codec",
        "bitrate",
        "preset",
        "duration",
        "duration_seconds",
        "resolution",
        "resolution_width",
        "resolution_height",
        "frame_rate",
        "fps",
        "hwaccel",
        "threads",
        "tune",
        "engine",
        "classification",
    ]
)
limit_fields = st.dictionaries(
    st.sampled_from(
        [
            "max_cpu_percent",
            "max_memory_mb",
            "max_disk_mb",
            "timeout_sec",
            "cpu_max",
            "cpu_weight",
            "memory_max_mb",
            "io_max",
        ]
    ),
    value,
)
parameter_values = st.dictionaries(parameter_names | st.text(max_size=20), value, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    scenario=value,
    parameters=parameter_values | anything,
    resource_limits=limit_fields | anything,
    wrapper=limit_fields | anything,
    rest=st.fixed_dictionaries(
        dict.fromkeys(("engine", "classification", "queue", "priority"), value)
    ),
    generate=st.booleans(),
)
@example("", {"input": "http://[:\u2100/"}, None, None, {}, True)
def test_any_job_is_either_understood_or_refused(
    scenario: object,
    parameters: object,
    resource_limits: object,
    wrapper: object,
    rest: dict[str, Any],
    generate: bool,
) -> None:
    spec: JobSpec | None = None
    refused: JobError | None = None
    try:
        spec = parse(
            parameters,
            scenario=scenario,
            generate_input=generate,
            resource_limits=resource_limits,
            wrapper_constraints=wrapper,
            **rest,
        )
    except JobError as error:
        refused = error
    if refused is not None:
        assert 0 < len(refused.message) < 500
        assert re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", refused.message) is None
    if spec is not None:
        assert 1000 <= spec.bitrate_bps <= 10**9
        assert 1 <= spec.threads <= 256
        assert all(note.isprintable() and len(note) < 600 for note in spec.notes)
        assert len(spec.scenario) <= 200
