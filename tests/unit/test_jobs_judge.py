from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import pytest

from worker.errors import Reason
from worker.jobs.judge import EXEC_FAILURES, judge
from worker.jobs.outcome import Intent, Outcome
from worker.jobs.progress import LogFacts, read_log
from worker.jobs.spec import Limits

LIMITS = Limits(cpu_percent=200, memory_mb=512, disk_mb=100, timeout_sec=60)


@dataclass
class State:
    result: str = "exit-code"
    exec_main_code: int = 1
    exec_main_status: int = 1
    load_state: str = "loaded"
    vanished: bool = False
    wall_seconds: float | None = None


@dataclass
class Used:
    cpu_seconds: float | None = None
    memory_peak_bytes: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    oom_kills: int | None = 0
    memory_limit_hits: int | None = 0
    task_limit_hits: int | None = 0


CLEAN = State("success", 1, 0)
KILLED = State("signal", 2, 9)


def verdict(
    state: State, used: Used | None = None, *errors: str, intent: Intent = Intent.NONE, **more: Any
) -> Outcome:
    log = read_log("\n".join(f"[error] {line}" for line in errors))
    return judge(state, used or Used(), intent, log, LIMITS, **more)


def reason(state: State, used: Used | None = None, *errors: str, **more: Any) -> Reason | None:
    outcome = verdict(state, used, *errors, **more)
    assert outcome.completed is (outcome.reason is None)
    return outcome.reason


def test_only_a_clean_exit_is_completed() -> None:
    assert verdict(CLEAN).completed
    for state in (
        State("success", 1, 1),
        State("exit-code", 1, 0),
        State("success", 2, 15),
        State("success", 0, 0),
        State("success", 1, 0, load_state="not-found"),
        State("success", 1, 0, vanished=True),
    ):
        assert not verdict(state).completed


def test_a_clean_exit_counts_although_a_cancel_was_on_its_way() -> None:
    assert verdict(CLEAN, intent=Intent.CANCELLED).completed


@pytest.mark.parametrize("state", [State("success", 2, 15), State("exit-code", 1, 255), KILLED])
def test_our_own_intent_comes_before_what_systemd_says(state: State) -> None:
    outcome = verdict(state, Used(oom_kills=1), "some error", intent=Intent.SHUTDOWN)
    assert outcome.reason is Reason.PLATFORM_ERROR
    assert outcome.message.startswith("the worker was stopped")
    assert verdict(state, intent=Intent.CANCELLED).message == "the job was cancelled"


def test_a_vanished_unit_is_never_a_success() -> None:
    assert reason(State("success", 1, 0, vanished=True)) is Reason.PLATFORM_ERROR


def test_the_time_limit() -> None:
    outcome = verdict(State("timeout", 2, 15))
    assert outcome.reason is Reason.TIMEOUT
    assert "60 s" in outcome.message


@pytest.mark.parametrize(
    ("state", "used", "sentence"),
    [
        (State("oom-kill", 2, 9), Used(memory_limit_hits=3), "memory limit of 512 MB exceeded"),
        (KILLED, Used(oom_kills=1, memory_limit_hits=1), "memory limit of 512 MB exceeded"),
        (KILLED, Used(oom_kills=1, memory_peak_bytes=510 * 2**20), "memory limit of 512 MB"),
        # a child was killed, and the main process failed for it
        (State("exit-code", 1, 137), Used(oom_kills=1, memory_limit_hits=1), "memory limit of 512"),
        (KILLED, Used(oom_kills=None, memory_peak_bytes=510 * 2**20), "memory limit of 512 MB"),
        (KILLED, Used(oom_kills=1, memory_peak_bytes=2**20), "the host ran out of memory"),
        (State("oom-kill", 1, 1), Used(oom_kills=None), "the host ran out of memory"),
        (State("oom-kill", 2, 9), Used(None, None, None, None, None, None), "memory limit of 512"),
    ],
)
def test_out_of_memory(state: State, used: Used, sentence: str) -> None:
    outcome = verdict(state, used)
    assert outcome.reason is Reason.RESOURCE_ERROR
    assert outcome.message.startswith(sentence)


def test_killed_by_somebody_else() -> None:
    outcome = verdict(KILLED, Used(memory_peak_bytes=2**20))
    assert outcome.reason is Reason.PLATFORM_ERROR
    assert "signal 9 (KILL) by somebody else" in outcome.message
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert "stopped by somebody else" in verdict(State("signal", 2, number)).message
    log = LogFacts(stopped_by_signal=15)
    outcome = judge(State("exit-code", 1, 255), Used(), Intent.NONE, log, LIMITS)
    assert outcome.reason is Reason.PLATFORM_ERROR


def test_a_stop_that_took_too_long_is_not_the_time_limit() -> None:
    # systemd says "timeout" as well where a process did not end within TimeoutStopSec
    state = State("timeout", 2, 9, wall_seconds=LIMITS.timeout_sec - 1)
    assert reason(state) is Reason.PLATFORM_ERROR
    assert "stopped by somebody else" in verdict(state).message
    state = State("timeout", 2, 9, wall_seconds=LIMITS.timeout_sec + 10)
    assert reason(state) is Reason.TIMEOUT


def test_stopped_by_hand_and_gone() -> None:
    outcome = verdict(State("success", 2, 15, vanished=True))
    assert outcome.reason is Reason.PLATFORM_ERROR
    assert "stopped by somebody else" in outcome.message


@pytest.mark.parametrize("status", [203, 243])
def test_a_program_that_ran_may_use_systemds_numbers(status: int) -> None:
    # ffmpeg 6 and newer exit with the low byte of an AVERROR: 243 is -EACCES
    state = State("exit-code", 1, status)
    assert reason(state) is Reason.PLATFORM_ERROR
    line = "file:/in.mp4: Invalid data found when processing input"
    assert reason(state, None, line, executed=True) is Reason.INPUT_ERROR


def test_crashes() -> None:
    for number, name in ((11, "SEGV"), (6, "ABRT"), (31, "SYS"), (4, "ILL")):
        outcome = verdict(State("core-dump", 3, number))
        assert outcome.reason is Reason.RUNTIME_ERROR
        assert outcome.message == f"ffmpeg crashed with signal {number} ({name})"
    assert reason(State("signal", 2, 99)) is Reason.RUNTIME_ERROR


def test_the_disk_limit() -> None:
    outcome = verdict(State("signal", 2, 25))
    assert outcome.reason is Reason.RESOURCE_ERROR
    assert "disk limit of 100 MB" in outcome.message


def test_a_trailer_that_could_not_be_written_is_a_failure_despite_exit_status_0() -> None:
    line = "Error writing trailer of file:/o.mp4: No space left on device"
    outcome = verdict(CLEAN, None, line)
    assert outcome.reason is Reason.RESOURCE_ERROR
    assert outcome.message.endswith(f"; ffmpeg: {line}")


@pytest.mark.parametrize("status", EXEC_FAILURES)
def test_a_program_that_never_ran(status: int) -> None:
    outcome = verdict(State("exit-code", 1, status), program="/usr/bin/ffmpeg")
    assert outcome.reason is Reason.PLATFORM_ERROR
    assert outcome.message.endswith(f"({status}/{EXEC_FAILURES[status]})")
    if status == 203:
        sentence = "could not run /usr/bin/ffmpeg: not found or not executable"
        assert outcome.message.startswith(sentence)


@pytest.mark.parametrize("result", ["resources", "protocol", "start-limit-hit", "weird\n"])
def test_a_unit_that_systemd_could_not_start(result: str) -> None:
    outcome = verdict(State(result, 0, 0))
    assert outcome.reason is Reason.PLATFORM_ERROR
    assert outcome.message.isprintable()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("file:/in.mp4: No such file or directory", Reason.INPUT_ERROR),
        ("file:/in.mp4: Permission denied", Reason.INPUT_ERROR),
        ("file:/in.mp4: Invalid data found when processing input", Reason.INPUT_ERROR),
        ("[mov,mp4] moov atom not found", Reason.INPUT_ERROR),
        ("[libx264] width not divisible by 2 (641x361)", Reason.INPUT_ERROR),
        ("file:/out/o.mp4: Permission denied", Reason.PLATFORM_ERROR),
        ("file:/out/o.mp4: No such file or directory", Reason.PLATFORM_ERROR),
        ("av_interleaved_write_frame(): No space left on device", Reason.RESOURCE_ERROR),
        ("Error writing trailer of x: File too large", Reason.RESOURCE_ERROR),
        ("[h264] get_buffer(): Cannot allocate memory", Reason.RESOURCE_ERROR),
        ("Unknown encoder 'libx265'", Reason.CAPABILITY_MISMATCH),
        ("[h264_nvenc] Cannot load libcuda.so.1", Reason.CAPABILITY_MISMATCH),
        ("[h264] No device available for decoder: device type cuda", Reason.CAPABILITY_MISMATCH),
        ("[AVHWDeviceContext] Cannot load libcuda.so.1", Reason.RUNTIME_ERROR),
        ("[libx264] Error setting preset/tune bogus/(null).", Reason.USER_ERROR),
        ("[flv] Video codec hevc not compatible with flv", Reason.USER_ERROR),
        ("something new", Reason.RUNTIME_ERROR),
    ],
)
def test_ffmpegs_own_failures(line: str, expected: Reason) -> None:
    for status in (1, 187, 255):
        state = State("exit-code", 1, status)
        assert reason(state, None, line, source="/in.mp4", output="/out/o.mp4") is expected


@pytest.mark.parametrize(
    "line",
    [
        "[tcp] Connection to tcp://h:1 failed: Connection refused",
        "[tcp] Failed to resolve hostname h: Name or service not known",
        "http://h/x: Server returned 404 Not Found",
        "http://h/x: Server returned 5XX Server Error reply",
        "rtmp://h/live/x: Input/output error",
        "[tls] The TLS connection was non-properly terminated.",
        "[rtmp] Server error: Failed to play x, no such stream",
    ],
)
def test_network_failures(line: str) -> None:
    assert reason(State(), None, line, is_url=True) is Reason.NETWORK_ERROR
    assert reason(State(), None, line) is not Reason.NETWORK_ERROR


URL = "rtmp://h/live/key"


@pytest.mark.parametrize(
    "line",
    [
        "[tcp] Connection to tcp://h:1935?tcp_nodelay=0 failed: Connection refused",
        "[tcp] Failed to resolve hostname h: Name or service not known",
        f"{URL}: Input/output error",
        f"{URL}: Operation not permitted",
        "av_interleaved_write_frame(): Broken pipe",
        "av_interleaved_write_frame(): Connection timed out",
        f"Error writing trailer of {URL}: Connection reset by peer",
        "[rtmp] Server error: Already publishing",
        "[rtmp] Server error: No space left on device, Unknown encoder",
        "[vost#0:0/libx264] Error submitting a packet to the muxer: Broken pipe",
    ],
)
def test_a_stream_that_was_not_taken(line: str) -> None:
    outcome = verdict(State(), None, line, output=URL, is_stream=True, source="/in.mp4")
    assert outcome.reason is Reason.NETWORK_ERROR
    assert outcome.message.startswith("ffmpeg could not send the stream: ")
    assert "live/key" not in outcome.message


def test_a_stream_has_other_faults_too() -> None:
    more: dict[str, Any] = {"output": URL, "is_stream": True, "source": "/in.mp4"}
    assert reason(State(), None, "Unknown encoder 'x'", **more) is Reason.CAPABILITY_MISMATCH
    line = "/in.mp4: Invalid data found when processing input"
    assert reason(State(), None, line, **more) is Reason.INPUT_ERROR
    assert reason(State(), None, "/in.mp4: Input/output error", **more) is Reason.RUNTIME_ERROR
    assert reason(State("timeout", 2, 15), None, **more) is Reason.TIMEOUT


def test_an_input_that_fails_is_not_called_the_stream() -> None:
    source = "http://h/in.mp4"
    line = f"{source}: Server returned 404 Not Found"
    outcome = verdict(State(), None, line, source=source, output=URL, is_url=True, is_stream=True)
    assert outcome.reason is Reason.NETWORK_ERROR
    assert outcome.message.startswith("ffmpeg could not get the input over the network")


def test_the_end_of_a_stream_may_be_lost_in_a_clean_exit() -> None:
    line = f"Error writing trailer of {URL}: Broken pipe"
    assert reason(CLEAN, None, line, output=URL, is_stream=True) is Reason.NETWORK_ERROR
    assert reason(CLEAN, None, line, output="/o.flv") is None
    assert reason(CLEAN, None, "concealing errors", output=URL, is_stream=True) is None


def test_a_stream_is_known_by_what_the_command_line_has_of_its_url() -> None:
    more: dict[str, Any] = {"output": "rtmp://h:1/live/key?t=x", "is_stream": True}
    for line in ("rtmp://h:1/live: Unknown error occurred", "rtmp://h:1/live: End of file"):
        assert reason(State(), None, line, **more) is Reason.NETWORK_ERROR
    line = "rtmp://other/live: End of file"
    assert reason(State(), None, line, **more) is Reason.INPUT_ERROR


def test_a_file_name_cannot_choose_the_reason() -> None:
    name = "/in/No space left on device, Unknown encoder.mp4"
    line = f"file:{name}: No such file or directory"
    assert reason(State(), None, line, source=name) is Reason.INPUT_ERROR
    long = "/in/" + "x" * 290 + "No space left on device.mp4"
    assert (
        reason(State(), None, f"file:{long}: Is a directory", source=long) is Reason.RUNTIME_ERROR
    )


def test_the_task_limit() -> None:
    assert reason(State(), Used(task_limit_hits=1), "odd") is Reason.RESOURCE_ERROR


def test_the_sentence_names_the_step_and_keeps_secrets() -> None:
    line = "rtmp://u:hidden@h/live/secret: Connection refused"
    outcome = verdict(State(), None, line, is_url=True, step="generating the input")
    assert outcome.message == (
        "generating the input failed: ffmpeg could not get the input over the network "
        "(exit status 1); ffmpeg: rtmp://***@h/live/***: Connection refused"
    )


def test_an_input_without_video_is_to_blame_whatever_the_muxer_said() -> None:
    log = read_log(
        "[info] Input #0, mp3, from 'a':\n[info]   Stream #0:0: Audio: mp3\n"
        "[error] Could not find tag for codec h264, codec not currently supported in container\n"
    )
    outcome = judge(State(), Used(), Intent.NONE, log, LIMITS)
    assert outcome.reason is Reason.INPUT_ERROR
    assert "no video stream" in outcome.message


@pytest.mark.parametrize(
    "line",
    [
        "[concat @ 0x5] Unsafe file name '/etc/passwd'",
        "Cannot determine format of input stream 0:0 after EOF",
        "[matroska,webm @ 0x5] File ended prematurely",
    ],
)
def test_more_faults_of_the_input(line: str) -> None:
    assert reason(State(), None, line) is Reason.INPUT_ERROR


def test_a_step_that_was_stopped_has_not_failed() -> None:
    outcome = verdict(KILLED, intent=Intent.CANCELLED, step="generating the input")
    assert outcome.message == "the job was cancelled"


@pytest.mark.parametrize(
    "line",
    [
        "[flv @ 0x5] Codec mpeg4 is not supported in the official FLV specification,",
        "[matroska @ 0x5] No bmp codec tag found for codec webp",
        "[h263 @ 0x5] The specified picture size of 320x240 is not valid for the H.263 codec.",
        "[dnxhd @ 0x5] video parameters incompatible with DNxHD. Valid DNxHD profiles:",
    ],
)
def test_more_that_the_job_should_not_ask_for(line: str) -> None:
    assert reason(State(), None, line) is Reason.USER_ERROR
