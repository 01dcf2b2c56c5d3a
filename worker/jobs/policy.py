"""What the operator lets jobs read and write, whoever asks. Judged by the names alone.

A name may still lead elsewhere, through a symbolic link: that is judged where files are opened.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from worker.jobs.text import shortened
from worker.jobs.values import refused

INPUT_PROTOCOLS = ("file", "http", "https", "rtmp", "rtmps", "rtsp", "srt", "udp", "tcp", "rtp")
"""All that an input may come by."""
OUTPUT_PROTOCOLS = ("file", "rtmp", "rtmps")
"""All that an output may go by."""
_PRIVATE = (
    *("jobs", "root", "accepted", "ledger.db", "ledger.db-wal", "ledger.db-shm"),
    *("control.sock", "control.sock.lock"),
)
"""What the worker keeps in its work directory for itself."""


def workers_own(work_dir: Path) -> tuple[Path, ...]:
    """The worker's own files and folders, which are no job's input and no job's output."""
    return tuple(work_dir / name for name in _PRIVATE)


WORK_DIR = Path("/var/lib/ffmpeg-worker")
INPUT_DIR = WORK_DIR / "media"
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Policy:
    """The shipped defaults, unless something else is said."""

    input_dirs: tuple[Path, ...] = (INPUT_DIR,)
    """Absolute, as the operator wrote them."""
    output_dirs: tuple[Path, ...] = (WORK_DIR,)
    input_protocols: frozenset[str] = field(default=frozenset(INPUT_PROTOCOLS))
    output_protocols: frozenset[str] = field(default=frozenset(OUTPUT_PROTOCOLS))
    closed: tuple[Path, ...] = workers_own(WORK_DIR)
    """The worker's own files and folders, which no job may name, whatever the lists say."""

    def check_input(self, path: Path, name: str, value: str) -> None:
        """Raise JobError (user_error) unless a job may name ``path`` as its input."""
        if "file" not in self.input_protocols:
            raise refused(name, value, "files are not allowed here (INPUT_PROTOCOLS)")
        self._check_closed(path, name, value)
        if not _lies_below(path, self.input_dirs):
            raise refused(name, value, f"lies outside of INPUT_DIRS ({_listed(self.input_dirs)})")

    def check_output(self, path: Path, name: str, value: str) -> None:
        """Raise JobError (user_error) unless a job may name ``path`` as its output."""
        self._check_closed(path, name, value)
        if not _lies_below(path, self.output_dirs):
            raise refused(name, value, f"lies outside of OUTPUT_DIRS ({_listed(self.output_dirs)})")

    def _check_closed(self, path: Path, name: str, value: str) -> None:
        # With a part more, so that a closed file or folder itself counts as well.
        if _lies_below(path / "_", self.closed):
            raise refused(name, value, "is the worker's own, or lies in a folder that is")

    def check_input_scheme(self, scheme: str, name: str, value: str) -> None:
        """Raise JobError (user_error) unless inputs may come by ``scheme``."""
        if scheme not in self.input_protocols:
            raise refused(name, value, f"{scheme} is not allowed here (INPUT_PROTOCOLS)")


def _lies_below(path: Path, dirs: Iterable[Path]) -> bool:
    """Whether ``path`` lies below one of ``dirs``.

    A directory counts by the name that was written and by the one that it has without symbolic
    links.
    """
    return any(
        path.is_relative_to(name) and path != name
        for written in dirs
        for name in {written, _real(written)}
    )


@cache
def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _listed(dirs: tuple[Path, ...]) -> str:
    return shortened(", ".join(map(str, dirs)), _SHOWN)


SHIPPED = Policy()
"""What is in force where nothing else was said."""
