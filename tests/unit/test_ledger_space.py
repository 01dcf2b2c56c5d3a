"""A ledger that cannot be written for a while: a full disk, a file that is gone."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ledger_life import JOB, LIFE, content, copy, log_of, read
from worker.errors import LedgerError
from worker.ledger import Ledger
from worker.master.wire import Job


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Writes beyond it fail with EFBIG, in part or as a whole (setrlimit(2), RLIMIT_FSIZE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("which", range(len(LIFE)))
def test_a_full_disk_at_any_byte_of_a_step(
    ledger: Ledger, ledger_path: Path, tmp_path: Path, which: int
) -> None:
    for step in LIFE[:which]:
        step(ledger)
    before = content(ledger)
    size = log_of(ledger_path).stat().st_size if which else 0
    failures = 0
    for room in range(0, 100_000, 731):
        try:
            with no_file_beyond(size + room):
                LIFE[which](ledger)
        except LedgerError:
            failures += 1
            assert content(ledger) == before
            with no_file_beyond(size):
                assert "free space" in ledger.check()
        else:
            break
    assert failures
    assert content(ledger) != before
    assert read(copy(ledger_path, tmp_path / "copy")) == content(ledger)


def test_after_a_failure_it_works_again_when_there_is_space(
    ledger: Ledger, ledger_path: Path, tmp_path: Path
) -> None:
    for step in LIFE:
        with (
            no_file_beyond(log_of(ledger_path).stat().st_size),
            pytest.raises(LedgerError, match=r"ledger\.db: .* free space"),
        ):
            step(ledger)
        assert ledger.check() == ""
        step(ledger)
        assert read(copy(ledger_path, tmp_path / str(LIFE.index(step)))) == content(ledger)


def test_no_space_for_a_new_ledger(ledger_path: Path) -> None:
    for size in range(0, 8000, 731):
        with no_file_beyond(size), pytest.raises(LedgerError, match="free space"):
            Ledger.open(ledger_path)
        assert not ledger_path.exists()
    Ledger.open(ledger_path).close()


def test_check_costs_no_write_unless_one_failed(ledger: Ledger, ledger_path: Path) -> None:
    ledger.accept(JOB)
    before = log_of(ledger_path).read_bytes()
    assert ledger.check() == ""
    with pytest.raises(ValueError):
        ledger.reap(1)
    assert ledger.check() == ""
    assert log_of(ledger_path).read_bytes() == before
    with no_file_beyond(len(before)), pytest.raises(LedgerError):
        ledger.reap(ledger.accept(Job(id="x")).id)
    assert ledger.check() == ""
    assert log_of(ledger_path).read_bytes() != before


@pytest.mark.parametrize(
    ("flag", "blocks", "what"),
    [(0, 1023, "is full .1047552 bytes free"), (os.ST_RDONLY, 10**6, "mounted read-only")],
)
def test_check_sees_trouble_before_a_write_does(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, flag: int, blocks: int, what: str
) -> None:
    state = SimpleNamespace(f_flag=flag, f_bavail=blocks, f_frsize=1024)
    monkeypatch.setattr(os, "statvfs", lambda _path: state)
    with pytest.raises(AssertionError, match=what):
        assert ledger.check() == ""


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_was_taken_away_is_not_written_on(
    ledger: Ledger, ledger_path: Path, replace: bool
) -> None:
    ledger_path.rename(ledger_path.with_name("moved"))
    if replace:
        ledger_path.write_bytes(b"")
    what = "was replaced" if replace else "is gone"
    with pytest.raises(LedgerError, match=what):
        ledger.accept(JOB)
    assert what in ledger.check()
    ledger_path.with_name("moved").replace(ledger_path)
    assert ledger.check() == ""
    ledger.accept(JOB)


def test_another_program_that_writes(
    ledger: Ledger, ledger_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger._file._db.execute("PRAGMA busy_timeout = 10")
    with contextlib.closing(sqlite3.connect(ledger_path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked; end the program"):
            ledger.accept(JOB)
    assert ledger.check() == ""
    ledger.accept(JOB)
