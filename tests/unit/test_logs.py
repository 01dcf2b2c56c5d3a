from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.errors import ConfigError
from worker.printable import escape
from worker.telemetry import logs

SECRET = "sesame-open-0123456789"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


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
    assert all(one.startswith("<3>worker.agent: ") for one in lines)
    assert lines[-1] == r"<3>worker.agent: lines\x1b"


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
