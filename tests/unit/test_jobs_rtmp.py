from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_jobs_ffmpeg import SPEC, STREAM
from worker.jobs.ffmpeg import stream_command, stream_secrets
from worker.jobs.rtmp import split
from worker.jobs.spec import JobSpec, StreamOutput


@pytest.mark.parametrize(
    ("url", "application", "name"),
    [
        ("rtmp://h/live/key", "live", "key"),
        ("rtmp://u:p@h:1/live/key?t=a/b", "live", "key?t=a/b"),
        ("rtmps://h/live/inst/key%20x", "live/inst", "key%20x"),
        ("rtmp://h/a/b/c/d", "a/b", "c/d"),
        ("rtmp://h/live/mp4:dir/key", "live", "mp4:dir/key"),
        ("rtmp://h/live/inst/mp4:key", "live/inst", "mp4:key"),
        ("rtmp://h/ondemand/dir/key", "ondemand", "dir/key"),
        ("rtmp://h/live/film.mp4", "live", "mp4:film.mp4"),
        ("rtmp://h/live/film.flv", "live", "film"),
        ("rtmp://h/live/film.flv?x", "live", "film.flv?x"),
        ("rtmp://h/live", "live", ""),
        ("rtmp://h/live/", "live", ""),
    ],
)
def test_a_url_is_taken_apart_as_ffmpeg_does(url: str, application: str, name: str) -> None:
    stream = split(url)
    assert (stream.application, stream.name) == (application, name)
    first, slash = application.split("/")[0], "" if name else "/"
    assert stream.place == f"{url.partition('://')[0]}://{url.split('/')[2]}/{first}{slash}"


def to(url: str) -> JobSpec:
    return replace(STREAM, output=StreamOutput(url))


def test_the_key_stands_in_a_file_and_not_in_the_command() -> None:
    spec, secrets = to("rtmp://h:1935/live/inst/hunter2?t=hunter3"), Path("/jobs/j/files/secrets")
    assert stream_secrets(spec) == "rtmp_app=live/inst\nrtmp_playpath=hunter2?t=hunter3\n"
    command = stream_command(spec, "/usr/bin/ffmpeg", "", secrets=secrets)
    assert command[-5:] == (
        "-fpre", "/jobs/j/files/secrets", "-f", "flv", "rtmp://h:1935/live",
    )  # fmt: skip
    assert "hunter" not in " ".join(command)


def test_a_url_without_a_key_needs_no_file() -> None:
    spec = to("rtmp://h/live")
    assert stream_secrets(spec) == ""
    command = stream_command(spec, "/usr/bin/ffmpeg", "", secrets=None)
    assert "-fpre" not in command
    assert command[-1] == "rtmp://h/live"


def test_what_might_be_a_key_is_hidden_too() -> None:
    spec = to("rtmp://h/live/hunter2/")
    assert stream_secrets(spec) == "rtmp_app=live/hunter2\n"
    command = stream_command(spec, "/usr/bin/ffmpeg", "", secrets=Path("/x"))
    assert command[-1] == "rtmp://h/live/"


def test_a_key_never_gets_into_the_command_for_want_of_a_file() -> None:
    with pytest.raises(ValueError, match="needs a file"):
        stream_command(to("rtmp://h/live/k"), "/usr/bin/ffmpeg", "", secrets=None)


def test_only_a_stream_has_secrets_and_only_an_absolute_path_holds_them() -> None:
    with pytest.raises(ValueError, match="is a file"):
        stream_secrets(SPEC)
    with pytest.raises(ValueError, match="absolute"):
        stream_command(to("rtmp://h/live/k"), "/usr/bin/ffmpeg", "", secrets=Path("x"))
