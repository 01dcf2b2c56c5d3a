"""The log: to stderr, and to a file where one is named.

Under systemd each line carries its level as ``<N>`` (sd-daemon(3)) and the journal adds the time;
elsewhere lines carry time and level in words. A message is one line whatever is in it, so that
nothing a master or ffmpeg says can forge a line or drive a terminal; a traceback keeps its
lines, each with the head of its record and a bar that no message begins with.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

from worker.errors import ConfigError
from worker.printable import blotter, escape

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
_CHATTY = ("httpx", "httpcore", "asyncio")
"""Libraries whose lines below a warning say nothing about jobs."""
_LONGEST_LINE = 8192
"""Characters of a message, or of a line of a traceback."""
_HALF_A_SECRET = 2048
"""Characters at the place of a cut that are not shown: a secret that is cut is not recognised."""
_MOST_LINES = 200
"""Of a traceback; the first and the last ones are shown."""
_BAR = "| "


class LineFormatter(logging.Formatter):
    """One record, one line; with a traceback one more for each of its lines.

    Nothing of it is longer than it may be, whatever the message is made of.
    """

    def __init__(self, *, journal: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._journal = journal
        self._blot = blotter(secrets, "********")

    def format(self, record: logging.LogRecord) -> str:
        message = self._clean(_message(record))
        # A message that begins like a line of a traceback is none.
        lines = [f"\\{message}" if message.startswith(_BAR) else message]
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        for block in (record.exc_text, record.stack_info):
            lines += [_BAR + self._clean(line) for line in _lines(block)] if block else []
        head = self._head(record)
        return "\n".join(head + line for line in lines)

    def _head(self, record: logging.LogRecord) -> str:
        if self._journal:
            return f"<{_PRIORITIES.get(record.levelno, 6)}>{record.name}: "
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        zone = time.strftime("%z", time.localtime(record.created))
        return f"{seconds}.{int(record.msecs):03d}{zone} {record.levelname:<7} {record.name}: "

    def _clean(self, text: str) -> str:
        if len(text) <= _LONGEST_LINE:
            return escape(self._blot(text))
        return escape(self._blot(text[:_LONGEST_LINE])[:-_HALF_A_SECRET]) + "…"


def _message(record: logging.LogRecord) -> str:
    """The record's message, also where it does not fit its arguments: logging itself would
    print those, with whatever is in them."""
    try:
        return record.getMessage()
    except Exception as error:
        return f"{record.msg!r} with {record.args!r}: {type(error).__name__}"


def _lines(block: str) -> list[str]:
    lines = block.split("\n")
    if len(lines) <= _MOST_LINES:
        return lines
    half = _MOST_LINES // 2
    return [*lines[:half], f"({len(lines) - 2 * half} lines left out)", *lines[-half:]]


class LogFile(WatchedFileHandler):
    """Follows logrotate's renames; a log that cannot be written never ends the program."""

    def __init__(self, path: Path) -> None:
        self._failed = False
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        # job names and paths are not for every local user
        descriptor = os.open(
            self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640
        )
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # reopening after a rename, which logging does not guard
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not self._failed:
            self._failed = True
            print(
                f"ffmpeg-worker: cannot write {escape(self.baseFilename)}: {sys.exc_info()[1]}",
                file=sys.stderr,
            )


def to_journal(environ: Mapping[str, str], descriptor: int = 2) -> bool:
    """Is the descriptor the very journal stream that $JOURNAL_STREAM names? (systemd.exec(5))"""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"


def setup(level: str, log_file: Path | None = None, *, secrets: Iterable[str] = ()) -> None:
    """Direct the whole program's log; calling it again replaces what was set up before.

    ``level`` is one of Settings.log_level; ``secrets`` never show. Raises ConfigError where
    ``log_file`` cannot be opened.
    """
    secrets = list(secrets)
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(LineFormatter(journal=to_journal(os.environ), secrets=secrets))
    handlers: list[logging.Handler] = [stream]
    if log_file is not None:
        try:
            file = LogFile(log_file)
        except OSError as error:
            raise ConfigError(
                f"LOG_FILE (--log-file): {str(log_file)!r} cannot be opened for writing: "
                f"{error.strerror}"
            ) from None
        file.setFormatter(LineFormatter(journal=False, secrets=secrets))
        handlers.append(file)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, LineFormatter):
            root.removeHandler(old)
            old.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(_LEVELS[level])
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, _LEVELS[level]))
    logging.captureWarnings(True)
