from __future__ import annotations

import grp
import logging
import os
import pwd
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from worker import __main__, __version__, cli
from worker.cli.arguments import Arguments, parse
from worker.cli.run import ProgressLine
from worker.config import KEYS, Settings
from worker.errors import ConfigError, MasterUnreachable, SystemdError
from worker.execution import Execution
from worker.systemd.launcher import Launcher
from worker.telemetry import logs

SECRET = "sesame-open-0123456789"
URL = "https://m:8080"
pytestmark = pytest.mark.usefixtures("no_settings", "logging_restored")


def command(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[..., int]) -> None:
    """Put ``run`` in the place of the command's module."""
    module = types.ModuleType(f"worker.cli.{name}")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, module.__name__, module)


# the words


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--master", URL], URL),
        (["--master=" + URL], URL),
        (["-master", URL], URL),
        (["-master=" + URL], URL),
        (["--master", "a", "--master", URL], URL),
        (["--master", "-x"], "-x"),
        (["--master="], None),
        (["--master", ""], None),
        ([], None),
    ],
)
def test_values(argv: list[str], text: str | None) -> None:
    assert parse(argv).flags.get("--master") == text


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--generate-input"], "true"),
        (["--generate-input=true"], "true"),
        (["--generate-input=false"], "false"),
        (["--generate-input", "false"], "false"),
        (["-generate-input", "0"], "0"),
        (["--generate-input", "--register"], "true"),
        (["--generate-input=maybe"], "maybe"),
        (["--generate-input="], None),
        (["--generate-input", ""], None),
    ],
)
def test_booleans(argv: list[str], text: str | None) -> None:
    assert parse(argv).flags.get("--generate-input") == text


def test_a_boolean_does_not_swallow_the_job_file() -> None:
    assert parse(["run", "--generate-input", "job.json"]) == Arguments(
        command="run", flags={"--generate-input": "true"}, job_file="job.json"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "-", "--log-level", "debug"],
        ["--log-level", "debug", "run", "-"],
        ["run", "--log-level=debug", "-"],
        ["--log-level=debug", "--", "run", "-"],
    ],
)
def test_flags_stand_anywhere(argv: list[str]) -> None:
    assert parse(argv) == Arguments(command="run", flags={"--log-level": "debug"}, job_file="-")


def test_the_guides_exec_start() -> None:
    argv = ["--register", "--master", URL, "--api-key", "k", "--max-concurrent-jobs", "4"]
    argv += ["--poll-interval", "3s", "--heartbeat-interval", "30s", "--generate-input=true"]
    argv += ["--insecure-skip-verify=false", "--metrics-port", "9091", "--skip-confirmation"]
    argv += ["--allow-master-as-worker"]
    arguments = parse(argv)
    assert arguments.command == ""
    assert arguments.flags == {
        "--register": "true",
        "--master": URL,
        "--api-key": "k",
        "--max-concurrent-jobs": "4",
        "--poll-interval": "3s",
        "--heartbeat-interval": "30s",
        "--generate-input": "true",
        "--insecure-skip-verify": "false",
        "--metrics-port": "9091",
        "--skip-confirmation": "true",
        "--allow-master-as-worker": "true",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api-kye", SECRET], "--api-kye: no such flag"),
        ([f"--api-kye={SECRET}"], "--api-kye: no such flag"),
        (["--mast", URL], "--mast: no such flag"),
        (["-x"], "--x: no such flag"),
        ([SECRET], "neither flag nor command"),
        (["check", SECRET], "check takes flags only"),
        (["run"], "run takes one JOB.json"),
        (["run", "a", "b"], "run takes one JOB.json"),
        (["--master"], "--master: its value is missing"),
        (["--version=2"], "argument --version: ignored explicit argument"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


# what becomes of them


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-version"):
        assert cli.main([flag]) == 0
        assert capsys.readouterr().out == f"ffmpeg-worker {__version__}\n"


def test_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert cli.main([flag]) == 0
        text = capsys.readouterr().out
        for key in KEYS:
            assert key.flag in text
            assert all(name in text for name in key.names)
        assert max(map(len, text.splitlines())) <= 100


def test_the_script_takes_the_process_s_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ffmpeg-worker", "--version"])
    assert __main__.main() == 0
    assert capsys.readouterr().out == f"ffmpeg-worker {__version__}\n"


def test_wrong_values_are_one_line_each_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--poll-interval", "3", "--log-level", "\x1b[2J", "--master", URL]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "ffmpeg-worker: --poll-interval: '3' has no unit: write 3s, 3m or the like\n"
        r"ffmpeg-worker: --log-level: '\x1b[2J' must be debug, info, warn (or warning) or error"
        "\n"
    )


def test_the_agent_gets_the_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        seen.append(settings)
        logging.getLogger("worker.test").info("key %s", SECRET)
        return 5

    command(monkeypatch, "agent", run)
    monkeypatch.setenv("MASTER_URL", URL)
    assert cli.main(["--api-key", SECRET, "--metrics-port", "0"]) == 5
    assert seen[0].master_url == URL
    assert seen[0].metrics_port == 0
    stderr = capsys.readouterr().err
    assert "every local user can see the key" in stderr
    assert "key ********" in stderr
    assert SECRET not in stderr


def test_run_needs_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Settings, str]] = []

    def run(settings: Settings, job_file: str) -> int:
        seen.append((settings, job_file))
        return 0

    command(monkeypatch, "run", run)
    assert cli.main(["run", "job.json"]) == 0
    assert seen[0][0].master_url == ""
    assert seen[0][1] == "job.json"


def test_check_shows_values_and_sources_but_not_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.env"
    path.write_text(f"MASTER_URL={URL}\nPOLL_INTERVAL=90s\nCOLOUR=red\n", encoding="utf-8")
    monkeypatch.setenv("MASTER_API_KEY", SECRET)
    assert cli.main(["check", "--config", str(path), "--generate-input=false"]) == 0
    captured = capsys.readouterr()
    rows = [line.split(maxsplit=2) for line in captured.out.splitlines()]
    shown = {name: (value, source) for name, value, source in rows}
    assert shown["MASTER_URL"] == (URL, f"{path}:1: MASTER_URL")
    assert shown["POLL_INTERVAL"] == ("1m30s", f"{path}:2: POLL_INTERVAL")
    assert shown["MASTER_API_KEY"] == ("********", "environment variable MASTER_API_KEY")
    assert shown["GENERATE_INPUT"] == ("false", "--generate-input")
    assert shown["LOG_FILE"] == ("-", "default")
    assert len(shown) == len(Settings.model_fields)
    assert SECRET not in captured.out + captured.err
    assert captured.err == (
        f"ffmpeg-worker: warning: {path}:3: COLOUR is not known and has no effect\n"
    )


def test_check_of_a_wrong_configuration_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 2
    assert "MASTER_URL is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MasterUnreachable("no route\nto the master"), 1, "no route"),
        (ConfigError("bad"), 2, "bad"),
        (RuntimeError("a \x1b defect"), 1, r"internal error: RuntimeError: a \x1b defect"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
@pytest.mark.parametrize("level", ["info", "debug"])
def test_errors_are_one_line_and_tracebacks_for_debug_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
    level: str,
) -> None:
    def run(settings: Settings) -> int:
        raise error

    command(monkeypatch, "agent", run)
    assert cli.main(["--master", URL, "--log-level", level]) == status
    stderr = capsys.readouterr().err
    assert message in stderr
    wanted = level == "debug" and not isinstance(error, KeyboardInterrupt)
    assert ("Traceback" in stderr) is wanted
    if level == "info":
        assert all(line.startswith("ffmpeg-worker: ") for line in stderr.splitlines())


def test_run_does_not_wait_for_a_systemd_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = []

    async def connect(launcher: Launcher) -> None:
        attempts.append(launcher)
        raise SystemdError("cannot connect to D-Bus at unix:path=/nowhere")

    monkeypatch.setattr(Launcher, "connect", connect)
    monkeypatch.setenv("JOB_GROUP", grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name)
    monkeypatch.setenv("OUTPUT_OWNER", "nobody")
    job = tmp_path / "job.json"
    job.write_text('{"scenario": "720p30-h264"}')
    assert cli.main(["run", "--work-dir", str(tmp_path / "work"), str(job)]) == 1
    assert len(attempts) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "ffmpeg-worker: cannot connect to D-Bus at unix:path=/nowhere\n"


def test_a_job_file_that_is_too_large_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (8 * 1024 * 1024) + b"{}")
    assert cli.main(["run", str(large)]) == 2
    error = f"ffmpeg-worker: {large} is larger than 8 MiB: is it the right file?\n"
    assert capsys.readouterr().err == error


def program(*argv: str, stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker", *argv], stdout=stdout, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["check", "--master", URL]])
def test_output_that_cannot_be_written_is_an_error(argv: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = program(*argv, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "ffmpeg-worker: cannot write the output: No space left on device\n"


def test_a_reader_that_goes_away_is_no_reason_to_complain() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = program("--help", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_log_line_does_not_stand_behind_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    class Running:
        def progress_text(self) -> str:
            return "transcoding: 10 %"

    logs.setup("info")
    progress = ProgressLine(True)
    progress.show(cast("Execution", Running()))
    logging.getLogger("worker.test").info("half of it is done")
    progress.clear()
    head, _, rest = capsys.readouterr().err.partition("transcoding: 10 %")
    assert head == "\r\x1b[K"
    assert rest.startswith("\r\x1b[K")
    assert rest.endswith("half of it is done\n")


def test_debug_tells_the_settings_but_not_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "agent", lambda settings: 0)
    monkeypatch.setenv("MASTER_API_KEY", SECRET)
    assert cli.main(["--master", URL, "--log-level", "debug"]) == 0
    said = capsys.readouterr().err
    assert "setting MASTER_URL: https://m:8080 (--master)" in said
    assert "setting MASTER_API_KEY: ********" in said
    assert SECRET not in said
