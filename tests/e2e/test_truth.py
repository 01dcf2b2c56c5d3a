"""What is reported is true: good jobs complete, bad ones do not, and the figures can be checked."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Worker, job_cgroups, job_units, sh
from tests.fakes.master import FakeMaster

SUBTITLES = "1\n00:00:01,000 --> 00:01:00,000\nhello\n"


def run(master: FakeMaster, **values: Any) -> dict[str, Any]:
    job = {"scenario": "160x120p10-h264", "parameters": {"preset": "ultrafast", **values}}
    job_id = master.submit(job)["id"]
    master.wait(job_id, timeout=60)
    [result] = [result for result in master.results if result["job_id"] == job_id]
    assert job_units() == []
    assert job_cgroups() == []
    return result


def probe(path: Path) -> dict[str, Any]:
    """The first video stream, with its frames counted by decoding them, and the container."""
    entries = "stream=width,height,nb_read_frames,avg_frame_rate:format=duration,bit_rate"
    text = sh(
        *("ffprobe", "-v", "error", "-count_frames", "-select_streams", "v:0"),
        *("-show_entries", entries, "-of", "json", str(path)),
    )
    document = json.loads(text)
    return {**document["streams"][0], **document["format"]}


@pytest.fixture(scope="module")
def media(make_media: Callable[..., Path]) -> Path:
    """A folder of files that are odd but fine, and of some that are not."""
    plain = make_media("plain.mp4", seconds=4)
    folder = plain.parent

    def ffmpeg(*words: str) -> None:
        sh("ffmpeg", "-v", "error", "-y", *words)

    def at(name: str) -> str:
        return str(folder / name)

    source = ("-i", str(plain))
    (folder / "subtitles.srt").write_text(SUBTITLES)
    ffmpeg(*source, "-i", at("subtitles.srt"), "-map", "0", "-map", "1", "-c", "copy",
           at("subtitles.mkv"))  # fmt: skip
    ffmpeg("-itsoffset", "100", *source, "-c", "copy", "-copyts", at("late.mkv"))
    ffmpeg(*source, "-c", "copy", at("first.ts"))
    ffmpeg("-itsoffset", "100", *source, "-c", "copy", "-copyts", at("second.ts"))
    joined = (folder / "first.ts").read_bytes() + (folder / "second.ts").read_bytes()
    (folder / "joined.ts").write_bytes(joined)
    ffmpeg("-f", "lavfi", "-i", "sine=d=20", "-f", "lavfi", "-i", "sine=d=3:f=99", *source,
           "-map", "2:v", "-map", "1:a", "-map", "0:a", "-c:v", "copy",
           "-disposition:a:0", "default", "-disposition:a:1", "0",
           at("languages.mkv"))  # fmt: skip
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=161x121:rate=25:d=1", "-c:v", "mpeg4",
           "-pix_fmt", "yuv420p", at("odd.avi"))  # fmt: skip
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=1/5:d=15", at("slow.mp4"))
    ffmpeg(*source, "-frames:v", "1", at("picture.jpg"))
    ffmpeg("-f", "lavfi", "-i", "sine=d=3", "-i", at("picture.jpg"), "-map", "0", "-map", "1",
           "-c:v", "copy", "-disposition:v", "attached_pic", at("cover.mp3"))  # fmt: skip
    ffmpeg(*source, "-c", "copy", at("whole.mkv"))
    whole = (folder / "whole.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 3])
    (folder / "evil.ffconcat").write_text("ffconcat version 1.0\nfile '/etc/passwd'\n")
    return folder


GOOD = {
    "subtitles.mkv": 40,  # subtitles that go on for a minute
    "late.mkv": None,  # begins at 100 s
    "joined.ts": None,  # time stamps jump
    "languages.mkv": 40,  # a second sound track that goes on
    "odd.avi": 25,
    "slow.mp4": 3,
    "picture.jpg": 1,
}
BAD = {
    "cover.mp3": "no video stream",
    "cut.mkv": "damaged or cut off",
    "evil.ffconcat": "Unsafe file name",
    "subtitles.srt": "input",
}


def test_a_good_job_is_never_called_a_failure(
    worker: Worker, master: FakeMaster, media: Path, tmp_path: Path
) -> None:
    worker.start(master)
    for name, frames in GOOD.items():
        output = tmp_path / f"{name}.mp4"
        result = run(master, input=str(media / name), output=str(output))

        assert result["status"] == "completed", result["error"]
        seen, metrics = probe(output), result["metrics"]
        counted = int(seen["nb_read_frames"])
        assert metrics["frames_encoded"] == counted, name
        assert frames in (None, counted), name
        assert metrics["output_file_bytes"] == output.stat().st_size
        assert metrics["output_duration_sec"] == pytest.approx(float(seen["duration"]), abs=0.001)
        assert metrics["bitrate_bps"] == int(seen["bit_rate"])
        above, below = seen["avg_frame_rate"].split("/")
        assert metrics["fps"] == pytest.approx(int(above) / int(below))
        assert metrics["resolution"] == f"{seen['width']}x{seen['height']}"


def test_a_bad_input_is_never_called_anything_else(
    worker: Worker, master: FakeMaster, media: Path, tmp_path: Path
) -> None:
    worker.start(master)
    for name, words in BAD.items():
        output = tmp_path / f"{name}.mkv"
        result = run(master, input=str(media / name), output=str(output))

        assert result["status"] == "failed", name
        assert result["error"].startswith("input_error: "), result["error"]
        assert words in result["error"]
        assert not output.exists()
        assert result["metrics"]["cpu_seconds"] > 0, "however short"
        assert result["metrics"]["memory_peak_bytes"] > 2**20


def test_the_figures_are_those_of_the_same_command_by_hand(
    worker: Worker, master: FakeMaster, make_media: Callable[..., Path], tmp_path: Path
) -> None:
    worker.start(master)
    source = make_media("figures.mp4", seconds=8, size="640x360", rate=25)
    output = tmp_path / "out.mp4"
    result = run(master, input=str(source), output=str(output))
    metrics = result["metrics"]

    [command] = [line[2:] for line in result["logs"].splitlines() if line.startswith("$ ")]
    *words, _ = command.split()  # this command has no blanks in its words
    words = [word.strip("'") for word in words]
    with Path(os.devnull).open("wb") as null:
        pid = os.posix_spawn(
            words[0],
            [*words, str(tmp_path / "by-hand.mp4")],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, null.fileno(), fd) for fd in (1, 2)],
        )
        _, status, used = os.wait4(pid, 0)

    assert status == 0
    assert (tmp_path / "by-hand.mp4").stat().st_size == output.stat().st_size
    by_hand = used.ru_utime + used.ru_stime
    assert by_hand / 3 < metrics["cpu_seconds"] < by_hand * 3, "a busy machine is no clock"
    # Shared libraries, half of ffmpeg's resident memory, are charged to whoever used them first.
    assert used.ru_maxrss * 1024 / 3 < metrics["memory_peak_bytes"] < used.ru_maxrss * 1024 * 2
    assert metrics["io_read_bytes"] >= source.stat().st_size
    assert output.stat().st_size <= metrics["io_write_bytes"] < 2 * output.stat().st_size + 2**16

    part = run(master, input=str(source), duration=0.2)["metrics"]
    assert part["input_file_bytes"] == source.stat().st_size
    # Both count what was read while the unit was set up.
    less = metrics["io_read_bytes"] - part["io_read_bytes"]
    assert part["io_read_bytes"] > 2**14
    assert less > source.stat().st_size / 4


def test_limits_that_are_too_small(
    worker: Worker, master: FakeMaster, media: Path, tmp_path: Path
) -> None:
    worker.start(master)
    source = str(media / "plain.mp4")
    for megabytes in (1, 2, 4, 8, 16):  # with the smallest not even the program gets loaded
        result = run(master, input=source, resource_limits={"max_memory_mb": megabytes})

        expected = f"resource_error: memory limit of {megabytes} MB exceeded"
        assert result["error"].startswith(expected)
        assert 0 < result["metrics"]["memory_peak_bytes"] <= megabytes * 2**20

    result = run(
        master,
        input=source,
        output=str(tmp_path / "out.mp4"),
        resolution="1280x720",
        bitrate="100M",
        resource_limits={"max_disk_mb": 1},
    )
    assert result["error"].startswith("resource_error: disk limit of 1 MB exceeded")
    assert result["metrics"]["io_write_bytes"] >= 2**20
    assert list(tmp_path.iterdir()) == []


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def web(media: Path) -> Iterator[str]:
    """``media`` by HTTP: host and port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=media)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_secret_of_an_input_gets_out(worker: Worker, master: FakeMaster, web: str) -> None:
    worker.start(master)
    since = sh("journalctl", "-n", "0", "--show-cursor").rpartition("cursor: ")[2].strip()
    for name, status in (("whole.mkv", "completed"), ("nothing.mp4", "failed")):
        result = run(master, input=f"http://user:hunter2@{web}/{name}?token=hunter2")
        assert result["status"] == status, result
        assert name in result["logs"]
        assert "hunter2" not in json.dumps(result)

    result = run(master, input="rtmp://127.0.0.1:9/live/hunter2")
    assert result["error"].startswith("network_error: ")
    assert "hunter2" not in json.dumps(result)

    sh("journalctl", "--sync")
    journal = sh("journalctl", "-o", "export", "--all", f"--after-cursor={since}")
    told = [line for line in journal.splitlines() if "hunter2" in line]
    # The command line is there for all to see as long as the process runs.
    assert [line for line in told if not line.startswith("_CMDLINE=")] == []
