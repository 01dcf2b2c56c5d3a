from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.jobs.containers import MUXERS, fits
from worker.jobs.encoders import X264_PRESETS, codec_of, preset_options, presets_of
from worker.jobs.ffmpeg import (
    input_command,
    input_encoder,
    probe_command,
    report_environment,
    source_name,
    stream_command,
    transcode_command,
)
from worker.jobs.policy import INPUT_PROTOCOLS
from worker.jobs.spec import (
    FileInput,
    GeneratedInput,
    JobSpec,
    Limits,
    Priority,
    Queue,
    StreamOutput,
    UrlInput,
)

SPEC = JobSpec(
    id="j1",
    scenario="s",
    queue=Queue.DEFAULT,
    priority=Priority.MEDIUM,
    classification="",
    engine="ffmpeg",
    source=FileInput(Path("/in/a.mp4")),
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
    limits=Limits(200, 2048, 5000, 3600),
)
ENCODERS = (
    *("libx264", "libx265", "libvpx", "libvpx-vp9", "libaom-av1", "libsvtav1", "librav1e", "mpeg4"),
    *("h264_nvenc", "hevc_qsv", "h264_vaapi", "h264_v4l2m2m"),
)
OPTIONS = frozenset(
    {"-hide_banner", "-nostdin", "-nostats", "-loglevel", "-benchmark", "-progress", "-y", "-i"}
    | {"-threads", "-protocol_whitelist", "-stream_loop", "-t", "-sn", "-dn", "-an", "-c:v", "-c:a"}
    | {"-b:v", "-preset", "-deadline", "-cpu-used", "-usage", "-speed", "-tune", "-row-mt", "-vf"}
    | {"-r", "-ar", "-f", "-hwaccel", "-init_hw_device", "-filter_hw_device", "-pix_fmt"}
)


def transcode(spec: JobSpec, source: str = "/in/a.mp4") -> list[str]:
    return list(transcode_command(spec, "/usr/bin/ffmpeg", source, Path("/out/o.mp4")))


def test_a_plain_transcode() -> None:
    assert " ".join(transcode(SPEC)) == (
        "/usr/bin/ffmpeg -hide_banner -nostdin -nostats -benchmark -progress pipe:1 -y "
        "-loglevel level+info -threads 2 -protocol_whitelist file -i file:/in/a.mp4 "
        "-sn -dn -c:v libx264 -b:v 2000000 -preset veryfast -threads 2 "
        "-vf crop=trunc(iw/2)*2:trunc(ih/2)*2 -protocol_whitelist file -f mp4 file:/out/o.mp4"
    )


@pytest.mark.parametrize("encoder", ["libvpx-vp9", "mpeg4"])
def test_an_odd_size_stays_odd_where_the_codec_allows(encoder: str) -> None:
    assert "-vf" not in transcode(replace(SPEC, encoder=encoder, preset=None))


def test_a_url_with_a_secret_keeps_ffmpeg_out_of_the_journal() -> None:
    for url, level in (
        ("http://h/x", "level+info"),
        ("http://user:pw@h/x", "level+quiet"),
        ("http://h/x?token=t", "level+quiet"),
        ("rtmp://h/live/key", "level+quiet"),
    ):
        words = transcode(replace(SPEC, source=UrlInput(url, url.partition(":")[0])), url)
        assert words[words.index("-loglevel") + 1] == level


STREAM = replace(
    SPEC, source=GeneratedInput(640, 360, 30, 10), output=StreamOutput("rtmp://h/live/k"),
    muxer="flv",
)  # fmt: skip
SENDING = (
    "-pix_fmt yuv420p {} -flvflags no_duration_filesize -protocol_whitelist rtmp,tcp "
    "-rw_timeout 10000000 -fpre /j/secrets -f flv rtmp://h/live"
)


def stream(spec: JobSpec, source: str = "/in/a.mp4") -> str:
    return " ".join(stream_command(spec, "/usr/bin/ffmpeg", source, secrets=Path("/j/secrets")))


def test_a_generated_stream_is_made_on_the_way() -> None:
    assert stream(STREAM) == (
        "/usr/bin/ffmpeg -hide_banner -nostdin -nostats -benchmark -progress pipe:1 -y "
        "-loglevel level+quiet -re -f lavfi -i testsrc2=size=640x360:rate=30 "
        "-re -f lavfi -i sine=frequency=1000:sample_rate=44100 -t 10 "
        "-sn -dn -c:v libx264 -b:v 2000000 -preset veryfast -threads 2 -c:a aac "
        + SENDING.format("-g 60")
    )
    assert " -t 500 " in stream(replace(STREAM, duration_sec=500))


def test_a_file_is_streamed_at_the_speed_of_life() -> None:
    words = stream(replace(STREAM, source=FileInput(Path("/in/a.mp4"))))
    assert " -re -threads 2 -protocol_whitelist file -i file:/in/a.mp4 -sn" in words
    assert words.endswith(SENDING.format("-force_key_frames expr:gte(t,n_forced*2)"))
    rated = replace(STREAM, source=FileInput(Path("/in/a.mp4")), frame_rate=12.5)
    assert " -r 12.5 " in stream(rated)
    assert " -g 25 " in stream(rated)


def test_what_comes_by_network_sets_its_own_pace() -> None:
    words = stream(replace(STREAM, source=UrlInput("http://h/x", "http")), "http://h/x")
    assert "-re" not in words.split()
    assert " -protocol_whitelist http,tcp,crypto,data -i http://h/x" in words
    both = replace(STREAM, source=UrlInput("http://h/x", "http", ("https",)))
    assert " -protocol_whitelist http,https,tcp,crypto,data,tls -i http://h" in stream(
        both, "http://h"
    )


def test_a_stream_by_tls_opens_nothing_else() -> None:
    words = stream(replace(STREAM, output=StreamOutput("rtmps://h/live/k")))
    assert " -protocol_whitelist rtmps,tls,tcp -rw_timeout " in words


def test_vaapi_chooses_its_own_pixels_for_a_stream() -> None:
    words = stream(replace(STREAM, encoder="h264_vaapi", preset=None))
    assert "-pix_fmt" not in words
    assert " -vf format=nv12,hwupload " in words


def test_only_a_stream_has_a_streams_command() -> None:
    with pytest.raises(ValueError, match="output of job j1 is a file"):
        stream(SPEC)


def test_the_decoder_leaves_room_for_the_encoders_threads() -> None:
    words = transcode(replace(SPEC, threads=256))
    assert words[words.index("-threads") + 1] == "16"
    assert words[words.index("-c:v") :].count("256") == 1


def test_every_setting_has_its_place() -> None:
    spec = replace(
        SPEC, hwaccel="cuda", duration_sec=1.5, scale=(640, 360), frame_rate=29.97, tune="film"
    )
    words = transcode(spec)
    source = words.index("-i")
    assert words.index("-hwaccel") < source
    assert words[words.index("-t") :][:2] == ["-t", "1.5"]
    assert words.index("-t") > source
    assert words[words.index("-vf") + 1] == "scale=640:360:flags=bicubic,setsar=1"
    assert words[words.index("-r") + 1] == "29.97"
    assert words[words.index("-tune") + 1] == "film"


def test_a_generated_input_is_looped_only_if_it_is_too_short() -> None:
    spec = replace(SPEC, source=GeneratedInput(640, 360, 30, 120), duration_sec=121)
    assert "-stream_loop" in transcode(spec)
    assert "-stream_loop" not in transcode(replace(spec, duration_sec=120))
    assert "-stream_loop" not in transcode(replace(SPEC, duration_sec=999))


@pytest.mark.parametrize("scheme", INPUT_PROTOCOLS[1:])
def test_no_url_may_lead_to_a_local_file(scheme: str) -> None:
    spec = replace(SPEC, source=UrlInput(f"{scheme}://h:1/x", scheme))
    words = transcode(spec, f"{scheme}://h:1/x")
    allowed = words[words.index("-protocol_whitelist") + 1].split(",")
    assert not {"file", "pipe", "concat", "subfile"} & set(allowed)
    assert words[words.index("-i") + 1] == f"{scheme}://h:1/x"


def test_vaapi_gets_its_frames_uploaded() -> None:
    words = transcode(replace(SPEC, encoder="h264_vaapi", preset=None, scale=(640, 360)))
    assert words[words.index("-vf") + 1].endswith(",format=nv12,hwupload")
    assert words.index("-init_hw_device") < words.index("-i")


def test_containers_without_audio_get_none() -> None:
    assert "-an" in transcode(replace(SPEC, muxer="h264"))
    assert "-an" not in transcode(SPEC)


def test_the_generated_input() -> None:
    spec = replace(SPEC, source=GeneratedInput(1280, 720, 29.97, 10.0))
    words = input_command(spec, "/usr/bin/ffmpeg", Path("/jobs/in.mp4"), threads=4)
    graph = "testsrc2=size=1280x720:rate=29.97:duration=10,noise=alls=10:allf=t+u"
    assert words[words.index("-i") + 1] == graph
    assert words[words.index("-threads") + 1] == "4"
    assert words[-1] == "file:/jobs/in.mp4"
    with pytest.raises(ValueError, match="given"):
        input_command(SPEC, "ffmpeg", Path("/x"))


def test_what_a_generated_input_is_encoded_with() -> None:
    assert input_encoder(frozenset({"libx265", "libx264"})) == "libx264"
    assert input_encoder(frozenset({"libx265"})) == "mpeg4"


def test_paths_are_taken_literally() -> None:
    path = Path("/o/a:b%03d -y.mp4")
    assert probe_command("ffprobe", path)[-2:] == ("-i", "file:/o/a:b%03d -y.mp4")
    with pytest.raises(ValueError, match="absolute"):
        probe_command("ffprobe", Path("pipe:0"))


def test_the_name_of_the_log_is_escaped() -> None:
    assert report_environment(Path("/j/a:b\\c'd e%f.log")) == {
        "FFREPORT": "file=/j/a\\:b\\\\c\\'d\\ e%%f.log:level=40"
    }


def test_what_is_read() -> None:
    made = Path("/jobs/in.mp4")
    assert source_name(SPEC, made) == Path("/in/a.mp4")
    assert source_name(replace(SPEC, source=UrlInput("srt://h:1", "srt")), made) == "srt://h:1"
    assert source_name(replace(SPEC, source=GeneratedInput(16, 16, 1, 1)), made) == made


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_known_preset_becomes_options(encoder: str) -> None:
    known = presets_of(encoder)
    assert not known or set(X264_PRESETS) <= set(known)
    for preset in known:
        options = preset_options(encoder, preset)
        assert options[0] in {"-preset", "-deadline", "-usage", "-speed"}
        assert len(options) in (2, 4)
    assert preset_options(encoder, None) == []


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("libvpx-vp9", ["-deadline", "realtime", "-cpu-used", "6"]),
        ("libaom-av1", ["-usage", "good", "-cpu-used", "6"]),
        ("libsvtav1", ["-preset", "10"]),
        ("h264_nvenc", ["-preset", "p2"]),
        ("hevc_qsv", ["-preset", "veryfast"]),
        ("librav1e", ["-speed", "8"]),
        ("libx265", ["-preset", "veryfast"]),
    ],
)
def test_what_x264s_preset_names_become(encoder: str, options: list[str]) -> None:
    assert preset_options(encoder, "veryfast") == options


@pytest.mark.parametrize(
    ("encoder", "suffix", "fit"),
    [
        ("libx264", "webm", False),
        ("libvpx-vp9", "webm", True),
        ("libsvtav1", "mov", False),
        ("libsvtav1", "mp4", True),
        ("hevc_nvenc", "flv", False),
        ("h264_qsv", "flv", True),
        ("libx265", "avi", False),
        ("libvpx-vp9", "ts", False),
        ("libx264", "h265", False),
        ("some_new_encoder", "webm", True),
    ],
)
def test_what_a_container_can_hold(encoder: str, suffix: str, fit: bool) -> None:
    assert fits(codec_of(encoder), MUXERS[suffix]) is fit


names = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", ".."))
paths = st.builds(lambda name: Path("/") / name, names)


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    encoder = draw(st.sampled_from(ENCODERS))
    known = presets_of(encoder)
    sides = st.integers(8, 8192).map(lambda n: 2 * n)
    rates = st.floats(1, 240)
    source: GeneratedInput | FileInput | UrlInput = draw(
        st.builds(GeneratedInput, sides, sides, rates, st.floats(0.001, 120))
        | st.builds(FileInput, paths)
        | st.sampled_from(INPUT_PROTOCOLS[1:]).map(lambda s: UrlInput(f"{s}://h:1/-y", s))
    )
    return replace(
        SPEC,
        source=source,
        encoder=encoder,
        muxer=draw(st.sampled_from(sorted(set(MUXERS.values())))),
        bitrate_bps=draw(st.integers(1000, 10**9)),
        preset=draw(st.none() | st.sampled_from(known)) if known else None,
        tune=draw(st.none() | st.just("psnr")),
        threads=draw(st.integers(1, 256)),
        hwaccel=draw(st.sampled_from([None, "auto", "cuda"])),
        duration_sec=draw(st.none() | st.floats(0.001, 7 * 86400)),
        scale=draw(st.none() | st.tuples(sides, sides)),
        frame_rate=draw(st.none() | rates),
    )


@settings(max_examples=200, deadline=None)
@given(specs(), paths)
def test_nothing_from_a_job_can_pass_for_an_option(spec: JobSpec, path: Path) -> None:
    made = Path("/jobs/input.mp4")
    commands = [transcode_command(spec, "/usr/bin/ffmpeg", source_name(spec, made), path)]
    if isinstance(spec.source, GeneratedInput):
        commands.append(input_command(spec, "/usr/bin/ffmpeg", made))
    for command in commands:
        assert all(word and "\0" not in word for word in command)
        assert command[-1].startswith("file:/")
        for before, word in pairwise(command):
            is_value = before in ("-stream_loop", "-preset")  # -1 and SVT's -1
            assert not word.startswith("-") or word in OPTIONS or is_value
