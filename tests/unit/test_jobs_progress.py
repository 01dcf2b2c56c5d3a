from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.jobs.progress import LogFacts, Progress, parse_progress, read_log

BLOCK = """\
frame=60
fps=29.50
stream_0_0_q=-1.0
bitrate=3415.5kbits/s
total_size=839668
out_time_us=1966732
out_time_ms=1966732
out_time=00:00:01.966732
dup_frames=1
drop_frames=2
speed=32.1x
progress=end
"""


def test_a_block() -> None:
    assert parse_progress(BLOCK) == Progress(
        True, 60, 29.5, 3415500.0, 839668, 1.966732, 1, 2, 32.1
    )


def test_the_last_complete_block_counts_however_the_text_is_cut() -> None:
    first = BLOCK.replace("progress=end", "progress=continue")
    last = first.replace("frame=60", "frame=90")
    progress = parse_progress(first[17:] + last + BLOCK[:40])
    assert progress is not None
    assert (progress.frame, progress.ended) == (90, False)


def test_a_block_does_not_inherit_from_the_one_before() -> None:
    progress = parse_progress(BLOCK + "fps=1\nprogress=continue\n")
    assert progress == Progress(fps=1.0)


def test_the_usage_record_is_not_progress() -> None:
    record = "/sys/fs/cgroup/memory/x/memory.oom_control:oom_kill 1\n/sys/a:progress=end\n"
    assert parse_progress(BLOCK + record) == parse_progress(BLOCK)
    assert parse_progress(record) is None


def test_what_is_not_known_is_none() -> None:
    text = "frame=x\nfps=nan\nbitrate=N/A\ntotal_size=N/A\nout_time_us=-5\nspeed=N/A\nprogress=c"
    assert parse_progress(text) == Progress()
    assert parse_progress("frame=99999999999999999999\nprogress=end") == Progress(ended=True)
    assert parse_progress("fps=1e999\nspeed=1.2.3x\nprogress=end") == Progress(ended=True)
    assert parse_progress("") is None


@given(st.text())
def test_progress_tolerates_anything(text: str) -> None:
    parse_progress(text)
    parse_progress(BLOCK + text)


LOG = """\
ffmpeg started on 2026-11-24 at 21:14:33
[info] Input #0, mov,mp4,m4a,3gp,3g2,mj2, from 'file:/in/a.mp4':
[info]   Metadata:
[info]   Duration: 00:01:02.50, start: 0.000000, bitrate: 666 kb/s
[info]   Stream #0:0[0x1](und): Video: h264 (High) (avc1 / 0x31637661), yuv420p
[info] Stream mapping:
[info]   Stream #0:0 -> #0:0 (h264 (native) -> h264 (libx264))
[info] Output #0, mp4, to 'file:/o.mp4':
[info]   Stream #0:0: Video: h264
[info] bench: utime=0.058s stime=0.015s rtime=0.061s
[info] bench: maxrss=57420kB
"""


def test_a_good_log() -> None:
    facts = read_log(LOG)
    assert facts == LogFacts(
        input_duration_sec=62.5,
        input_has_video=True,
        bench_cpu_seconds=0.058 + 0.015,
        bench_maxrss_bytes=57420 * 1024,
    )


def test_what_ffmpeg_counted_itself() -> None:
    text = (
        "[AVIOContext @ 0x55] [verbose] Statistics: 1000 bytes written, 2 seeks, 4 writeouts\n"
        "[AVIOContext @ 0x56] [verbose] Statistics: 300 bytes read, 0 seeks\n"
        "[AVIOContext @ 0x57] [verbose] Statistics: 20 bytes read, 0 seeks\n"
    )
    facts = read_log(LOG + text)
    assert (facts.bytes_read, facts.bytes_written) == (320, 1000)


def test_streams_that_were_not_used() -> None:
    more = "[info]   Stream #0:1: Subtitle: subrip\n[info] Stream mapping:\n"
    text = LOG.replace("[info] Stream mapping:\n", more)
    assert not read_log(LOG).streams_left_out
    assert read_log(text).streams_left_out


@pytest.mark.parametrize(
    ("container", "seconds"),
    [
        ("matroska,webm", 52.5),  # counts from zero, wherever it begins
        ("mov,mp4,m4a,3gp,3g2,mj2", 62.5),
        ("hls", 62.5),
        ("mpegts", None),  # a difference of time stamps, which may jump
    ],
)
def test_how_much_there_is_of_an_input(container: str, seconds: float | None) -> None:
    text = LOG.replace("mov,mp4,m4a,3gp,3g2,mj2", container).replace("start: 0.0", "start: 10.0")
    assert read_log(text).input_duration_sec == seconds


def test_a_cover_picture_is_no_video() -> None:
    log = (
        "[info] Input #0, mp3, from 'a':\n[info]   Stream #0:0: Audio: mp3\n"
        "[info]   Stream #0:1: Video: mjpeg, yuvj420p (attached pic)\n"
    )
    assert read_log(log).input_has_video is False


def test_a_guessed_duration_is_not_known() -> None:
    guess = "[aac @ 0x55d7] [warning] Estimating duration from bitrate, this may be inaccurate\n"
    assert read_log(guess + LOG).input_duration_sec is None
    assert read_log(LOG.replace("00:01:02.50", "N/A")).input_duration_sec is None


def test_metadata_is_no_fact() -> None:
    forged = LOG.replace("Metadata:", "Metadata: bench: maxrss=1kB").replace(
        "kb/s", "kb/s\n[info]     title           : [error] No space left on device"
    )
    facts = read_log(forged)
    assert facts.errors == ()
    assert facts.bench_maxrss_bytes == 57420 * 1024


def test_a_signal() -> None:
    assert read_log("[info] Exiting normally, received signal 15.").stopped_by_signal == 15


@pytest.mark.parametrize(
    ("lines", "telling"),
    [
        (
            [
                "[mov,mp4 @ 0x559f6f320280] [error] moov atom not found",
                "[error] file:/a.mp4: Invalid data found when processing input",
            ],
            "[mov,mp4] moov atom not found",
        ),
        (
            [
                "[h264_nvenc @ 0x55e46595f900] [error] Cannot load libcuda.so.1",
                "[error] Error initializing output stream 0:0 -- Error while opening encoder",
                "[fatal] Conversion failed!",
            ],
            "[h264_nvenc] Cannot load libcuda.so.1",
        ),
        (
            [
                "[h264 @ 0x56188818ef40] [error] Invalid NAL unit size (8244 > 1457).",
                "[error] Error while decoding stream #0:0: Invalid data found",
                "[error] av_interleaved_write_frame(): No space left on device",
                "[fatal] Conversion failed!",
            ],
            "av_interleaved_write_frame(): No space left on device",
        ),
        (
            [
                "[AVHWDeviceContext @ 0x555a8665d580] [error] Cannot load libcuda.so.1",
                "[error] Device creation failed: -1.",
                "[libx264 @ 0x5555] [error] width not divisible by 2 (641x361)",
            ],
            "[libx264] width not divisible by 2 (641x361)",
        ),
        (["[fatal] Conversion failed!"], "Conversion failed!"),
        (["[warning] all well"], None),
    ],
)
def test_the_most_telling_line(lines: list[str], telling: str | None) -> None:
    assert read_log("\n".join(lines)).last_error == telling


def test_errors_are_bounded_and_clean() -> None:
    line = "[error] \x1b[31m" + "x" * 5000 + "\n"
    facts = read_log("[error] first\n" + line * 500 + "[fatal] last\n")
    assert len(facts.errors) == 50
    assert (facts.errors[0], facts.errors[-1]) == ("first", "last")
    assert all(len(error) <= 300 and error.isprintable() for error in facts.errors)


@given(st.text() | st.text().map(lambda text: f"[info] Input #0\n[error] {text}"))
def test_a_log_may_hold_anything(text: str) -> None:
    for error in read_log(text).errors:
        assert len(error) <= 300
