from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from worker.errors import JobError, Reason
from worker.jobs.capabilities import TYPICAL, Capabilities
from worker.jobs.parse import parse_job
from worker.jobs.policy import Policy
from worker.jobs.spec import FileInput, GeneratedInput, JobSpec, Limits, StreamOutput, UrlInput
from worker.master.wire import Job

WORK = Path("/work")
POLICY = Policy(
    input_dirs=(Path("/data"), WORK / "media"),
    output_dirs=(WORK, Path("/data/out")),
    closed=(WORK / "jobs", WORK / "root"),
)


def parse(policy: Policy, **parameters: Any) -> JobSpec:
    job = Job(id="j", parameters=parameters)
    return parse_job(
        job, TYPICAL, Limits(200, 2048, 5000, 3600), generate_input=True, stream_host="m",
        policy=policy,
    )  # fmt: skip


def refusal(policy: Policy, **parameters: Any) -> str:
    with pytest.raises(JobError) as caught:
        parse(policy, **parameters)
    assert caught.value.reason is Reason.USER_ERROR
    return caught.value.message


@pytest.mark.parametrize("path", ["/data/a.mp4", "/data/out/a.mp4", "/work/media/b/c.mp4"])
def test_inputs_below_the_named_folders(path: str) -> None:
    assert parse(POLICY, input=path).source == FileInput(Path(path))


@pytest.mark.parametrize("path", ["/etc/passwd", "/database/a", "/work/a.mp4", "/work/mediax/a"])
def test_inputs_elsewhere_are_refused(path: str) -> None:
    assert refusal(POLICY, input=path) == (
        f"parameters.input = '{path}': lies outside of INPUT_DIRS (/data, /work/media)"
    )


@pytest.mark.parametrize("path", ["/work/a.mp4", "/work/x/a.mp4", "/data/out/a.mp4"])
def test_outputs_below_the_named_folders(path: str) -> None:
    assert parse(POLICY, output=path).output == Path(path)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/a.mp4", "lies outside of OUTPUT_DIRS (/work, /data/out)"),
        ("/data/a.mp4", "lies outside of OUTPUT_DIRS"),
        ("/work/jobs/other/files/output.mp4", "the worker's own"),
        ("/work/root/a.mp4", "the worker's own"),
    ],
)
def test_outputs_elsewhere_are_refused(path: str, why: str) -> None:
    message = refusal(POLICY, output=path)
    assert message.startswith(f"parameters.output = '{path}': ")
    assert why in message


def test_the_workers_own_folders_are_closed_whatever_is_allowed() -> None:
    policy = Policy(input_dirs=(WORK,), closed=(WORK / "jobs",))
    assert "the worker's own" in refusal(policy, input="/work/jobs/x/files/input.mp4")
    assert "the worker's own" in refusal(policy, input="/work/jobs")
    assert parse(policy, input="/work/jobsx/a").source == FileInput(Path("/work/jobsx/a"))


def test_a_folder_counts_by_its_true_name_too(tmp_path: Path) -> None:
    (tmp_path / "true").mkdir()
    (tmp_path / "link").symlink_to("true")
    policy = Policy(input_dirs=(tmp_path / "link",), output_dirs=(tmp_path / "link",))
    for name in ("link", "true"):
        assert parse(policy, input=str(tmp_path / name / "a.mp4")).source
        assert parse(policy, output=str(tmp_path / name / "b.mp4")).output
    assert "INPUT_DIRS" in refusal(policy, input=str(tmp_path / "other/a.mp4"))


def test_what_is_shown_of_many_folders_is_short() -> None:
    policy = Policy(input_dirs=tuple(Path(f"/{n}" * 20) for n in range(100)))
    assert len(refusal(policy, input="/x")) < 300


def test_protocols_that_are_not_allowed() -> None:
    policy = Policy(input_protocols=frozenset({"https"}), output_protocols=frozenset({"rtmps"}))
    assert parse(
        policy, input="https://h/a", output_mode="rtmp", rtmp_url="rtmps://h/a/k"
    ).source == UrlInput("https://h/a", "https")
    for value in ("http://h/a", "udp://@:1", "/var/lib/ffmpeg-worker/media/a.mp4"):
        assert "INPUT_PROTOCOLS" in refusal(policy, input=value)
    assert "OUTPUT_PROTOCOLS" in refusal(policy, output="/var/lib/ffmpeg-worker/a.mp4")
    assert "OUTPUT_PROTOCOLS" in refusal(policy)
    assert "OUTPUT_PROTOCOLS" in refusal(policy, output_mode="rtmp")
    message = refusal(policy, output_mode="rtmp", rtmp_url="rtmp://u:pw@h/live/hunter2")
    assert re.search("hunter2|pw", message) is None


def test_a_test_video_is_always_allowed() -> None:
    assert isinstance(parse(Policy(input_protocols=frozenset())).source, GeneratedInput)


def test_where_a_server_may_lead_to() -> None:
    one = Policy(input_protocols=frozenset({"http"}))
    assert parse(one, input="http://h/a").source == UrlInput("http://h/a", "http", ())
    assert parse(POLICY, input="https://h/a").source == UrlInput("https://h/a", "https", ("http",))


def test_what_a_job_needs_of_the_machine() -> None:
    plain = parse(POLICY)
    assert (plain.network_needed, plain.gpu_needed) == (False, False)
    assert not parse(POLICY, input="/data/a").network_needed
    assert parse(POLICY, input="srt://h:1").network_needed
    stream = parse(POLICY, output_mode="rtmp")
    assert isinstance(stream.output, StreamOutput)
    assert stream.network_needed
    gpu = Capabilities(
        4, 2**33, TYPICAL.encoders | {"h264_nvenc"}, TYPICAL.listed_encoders,
        frozenset({"cuda"}), True, "h264_nvenc",
    )  # fmt: skip
    limits = Limits(200, 2048, 5000, 3600)
    for parameters, needed in (
        ({}, True),
        ({"codec": "h264"}, False),
        ({"codec": "h264", "hwaccel": "cuda"}, True),
    ):
        spec = parse_job(Job(id="j", parameters=parameters), gpu, limits, generate_input=True)
        assert spec.gpu_needed is needed
