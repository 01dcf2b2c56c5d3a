from __future__ import annotations

import logging
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from tests.fakes.master import FakeMaster
from worker.errors import ConfigError, NodeUnknown
from worker.master.client import MasterClient
from worker.printable import escape
from worker.telemetry import logs

SECRET = "sesame-open-0123456789"
pytestmark = pytest.mark.usefixtures("logging_restored")


def line(
    message: str, *args: object, level: int = logging.INFO, journal: bool = True, **more: object
) -> str:
    record = logging.LogRecord("worker.agent", level, "f.py", 1, message, args, None)
    record.__dict__.update(more)
    return logs.LineFormatter(journal=journal, secrets=[SECRET]).format(record)


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.DEBUG, "<7>"),
        (logging.INFO, "<6>"),
        (logging.WARNING, "<4>"),
        (logging.ERROR, "<3>"),
        (logging.CRITICAL, "<2>"),
        (25, "<6>"),
    ],
)
def test_levels_as_sd_daemon_writes_them(level: int, prefix: str) -> None:
    assert line("a %s", "job", level=level) == f"{prefix}worker.agent: a job"


def test_time_and_level_in_words_where_there_is_no_journal() -> None:
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4} WARNING worker\.agent: late",
        line("late", level=logging.WARNING, journal=False),
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n<3>forged", r"a\n<3>forged"),
        ("a\rb", r"a\rb"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("tab\there", r"tab\there"),
        ("\x9b31m", r"\x9b31m"),
        ("right\u202eleft", r"right\u202eleft"),
        ("line\u2028sep", r"line\u2028sep"),
        ("\udcff", r"\udcff"),
        ("über 漢字", "über 漢字"),
        ("plain", "plain"),
    ],
)
def test_nothing_in_a_message_breaks_its_line(text: str, shown: str) -> None:
    assert line("job %s", text) == f"<6>worker.agent: job {shown}"
    assert escape(text) == shown


def test_a_traceback_keeps_its_lines_each_with_a_head() -> None:
    try:
        raise ValueError("two\nlines\x1b")
    except ValueError:
        text = line("failed", level=logging.ERROR, exc_info=sys.exc_info())
    lines = text.split("\n")
    assert lines[0] == "<3>worker.agent: failed"
    assert "Traceback" in lines[1]
    assert all(one.startswith("<3>worker.agent: | ") for one in lines[1:])
    assert lines[-1] == r"<3>worker.agent: | lines\x1b"


HOSTILE = (
    "x\n<0>worker.agent: job 1: completed\r\nMESSAGE=forged\x85a\u2028b\x1b]0;t\x07"
    "\u202e\u2066\u200b\ufeff\x9b1m"
)


@pytest.mark.parametrize("journal", [True, False])
def test_no_line_of_a_traceback_passes_for_a_record(journal: bool) -> None:
    try:
        try:
            raise OSError(2, HOSTILE, HOSTILE)
        except OSError as error:
            error.add_note(HOSTILE)
            raise ExceptionGroup(HOSTILE, [ValueError(HOSTILE)]) from error
    except ExceptionGroup:
        text = line("job %s", HOSTILE, journal=journal, exc_info=sys.exc_info(), stack_info=HOSTILE)
    first, *more = text.splitlines()  # which knows all line ends that Unicode has
    assert len(more) > 10
    head = first.partition("worker.agent: ")[0] + "worker.agent: "
    assert first.startswith(f"{head}job x\\n<0>worker.agent: job 1")
    assert all(one.startswith(f"{head}| ") for one in more)
    assert all(one.isprintable() for one in (first, *more))


def test_a_message_does_not_pass_for_a_line_of_a_traceback() -> None:
    assert line("%s", "| Traceback") == r"<6>worker.agent: \| Traceback"


def test_a_record_has_an_end() -> None:
    try:
        raise ValueError("\n".join(["y" * 100_000] * 5000))
    except ValueError:
        text = line("%s", "x" * 10_000_000, exc_info=sys.exc_info())
    lines = text.split("\n")
    assert len(lines) == 202
    assert max(map(len, lines)) < 8300
    assert any("lines left out" in one for one in lines)
    assert len(line("%s", "\U000e0041" * 100_000)) < 10 * 8300  # escapes are longer


def test_arguments_that_do_not_fit_are_one_line_too() -> None:
    text = line("%d of %s", HOSTILE, SECRET)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert text.endswith(": TypeError")
    assert "forged" in text
    assert SECRET not in text


def test_the_key_never_shows() -> None:
    try:
        raise ValueError(f"bad header {SECRET}")
    except ValueError:
        text = line("sent %s", f"Bearer {SECRET}", exc_info=sys.exc_info())
    assert SECRET not in text
    assert "Bearer ********" in text
    assert "bad header ********" in text


def test_the_journal_is_recognized_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        name = f"{status.st_dev}:{status.st_ino}"
        assert logs.to_journal({"JOURNAL_STREAM": name}, stream.fileno())
        assert not logs.to_journal({"JOURNAL_STREAM": "1:2"}, stream.fileno())
        assert not logs.to_journal({}, stream.fileno())
    assert not logs.to_journal({"JOURNAL_STREAM": name}, 1_000_000)


def test_setup_writes_to_stderr_and_file_and_follows_a_rename(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "worker.log"
    logs.setup("info", path, secrets=[SECRET])
    logger = logging.getLogger("worker.test")
    logger.debug("not shown")
    logger.info("first %s", SECRET)
    path.rename(tmp_path / "worker.log.1")
    logger.info("second")
    assert "first ********" in (tmp_path / "worker.log.1").read_text(encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert "second" in text
    assert "first" not in text
    assert stat.S_IMODE(path.stat().st_mode) & ~0o640 == 0
    stderr = capsys.readouterr().err
    assert "first ********" in stderr
    assert "second" in stderr
    assert "not shown" not in stderr


def test_setup_again_replaces_what_was_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("debug")
    logs.setup("warning")
    logging.getLogger("worker.test").warning("once")
    assert capsys.readouterr().err.count("once") == 1
    assert logging.getLogger().level == logging.WARNING


def test_the_http_library_is_quiet_even_at_debug() -> None:
    logs.setup("debug")
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    assert logging.getLogger("httpx").isEnabledFor(logging.WARNING)


async def test_the_key_is_in_no_log_of_the_http_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worker.log"
    logs.setup("debug", path, secrets=[SECRET])
    for name in ("httpx", "httpcore"):  # even if somebody made them talk
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
        logging.getLogger(name).manager._clear_cache()  # type: ignore[attr-defined]
    with FakeMaster() as master:
        async with MasterClient(base_url=master.url, api_key=SECRET) as client:
            with pytest.raises(NodeUnknown):
                await client.heartbeat("n")
    for text in (path.read_text(encoding="utf-8"), capsys.readouterr().err):
        assert "send_request_headers" in text
        assert SECRET not in text


def test_a_log_file_that_cannot_be_opened_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LOG_FILE \(--log-file\): .*No such file"):
        logs.setup("info", tmp_path / "none" / "worker.log")


def test_a_log_file_that_goes_away_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    logs.setup("info", directory / "worker.log")
    directory.rename(tmp_path / "moved")
    logger = logging.getLogger("worker.test")
    logger.info("one")
    logger.info("two")
    stderr = capsys.readouterr().err
    assert stderr.count("cannot write") == 1
    assert "two" in stderr
