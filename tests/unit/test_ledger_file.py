"""The ledger's file when things go wrong: damage, other versions, a sudden end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ledger_life import JOB, LIFE, content, copy, log_of, read
from worker.errors import LedgerError
from worker.ledger import Ledger, State, schema


def test_every_step_is_on_the_disk_when_it_returns(
    ledger: Ledger, ledger_path: Path, tmp_path: Path
) -> None:
    for number, step in enumerate(LIFE):
        step(ledger)
        assert read(copy(ledger_path, tmp_path / str(number))) == content(ledger)


@pytest.mark.parametrize(
    ("pragma", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("page_size", 1024)],
)
def test_how_sqlite_is_set(ledger: Ledger, pragma: str, value: object) -> None:
    """``synchronous`` 2 is FULL: each commit is forced onto the disk."""
    [[found]] = ledger._file._db.execute(f"PRAGMA {pragma}")
    assert found == value


def test_a_log_that_was_cut_gives_an_earlier_state(
    ledger: Ledger, ledger_path: Path, tmp_path: Path
) -> None:
    """SQLite takes the log as far as it is whole: never a part of a step, nothing out of order."""
    states = [content(ledger)]
    for step in LIFE:
        step(ledger)
        states.append(content(ledger))
    size = log_of(ledger_path).stat().st_size
    reached = 0
    for cut in [*range(0, size, 397), size]:
        found = read(copy(ledger_path, tmp_path / str(cut), cut))
        assert found in states[reached:], cut
        reached = states.index(found, reached)
    assert reached == len(states) - 1


def test_a_process_that_is_killed_loses_nothing_that_it_was_told_is_written(
    ledger_path: Path,
) -> None:
    code = (
        "import sys; from pathlib import Path; from worker.ledger import Ledger\n"
        "from worker.master.wire import Job\n"
        "ledger = Ledger.open(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    i = ledger.accept(Job(id=f'job-{sys.argv[2]}-{n}')).id; print(n, 'a', flush=True)\n"
        "    ledger.starting(i, 'main', 'u', {}); print(n, 's', flush=True)\n"
    )
    for turn in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(ledger_path), str(turn)],
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            told = [next(child.stdout) for _ in range(random.randint(1, 60))]
            child.kill()
            told += [line for line in child.stdout if line.endswith("\n")]
        ledger = Ledger.open(ledger_path)
        mine = [e for e in ledger.unreaped() if e.job.id.startswith(f"job-{turn}-")]
        ledger.close()
        written = sum(1 if entry.state is State.ACCEPTED else 2 for entry in mine)
        assert len(told) <= written <= len(told) + 1


def test_sudden_changes_of_the_file_are_refused_or_harmless(
    ledger_path: Path, tmp_path: Path
) -> None:
    ledger = Ledger.open(ledger_path)
    for step in LIFE[:5]:
        step(ledger)
    ledger.close()
    dice = random.Random(1)
    data = ledger_path.read_bytes()
    refused = 0
    for offset in range(0, len(data), 331):
        broken = bytearray(data)
        broken[offset : offset + 16] = dice.randbytes(16)
        target = tmp_path / str(offset) / "ledger.db"
        target.parent.mkdir()
        target.write_bytes(broken)
        try:
            read(target)
        except LedgerError:
            refused += 1
            assert target.read_bytes() == broken
    assert refused >= 5


def test_what_is_refused_keeps_its_log(ledger: Ledger, ledger_path: Path, tmp_path: Path) -> None:
    """Closing a database writes its log into it, and removes the log."""
    ledger.accept(JOB)
    crashed = copy(ledger_path, tmp_path / "crashed")
    # The log has all pages of the tables but this one, which is damaged.
    pages = crashed.read_bytes()
    for page in range(1, len(pages) // schema.PAGE_BYTES):
        start = page * schema.PAGE_BYTES
        broken = pages[:start] + b"\xff" * schema.PAGE_BYTES + pages[start + schema.PAGE_BYTES :]
        crashed.write_bytes(broken)
        log = log_of(crashed).read_bytes()
        assert log
        try:
            read(crashed)
        except LedgerError:
            assert crashed.read_bytes() == broken
            assert log_of(crashed).read_bytes() == log
            return
        shutil.rmtree(crashed.parent)
        crashed = copy(ledger_path, crashed.parent)
    pytest.fail("no page of the file is looked at")


def ways_to_damage() -> dict[str, Callable[[Path], object]]:
    def other(path: Path) -> None:
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE theirs (x)")

    def link(path: Path) -> None:
        path.symlink_to(path.rename(path.with_name("elsewhere")))

    def socket(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def sql(statement: str) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
                db.execute(statement)

        return change

    def free_pages(path: Path) -> None:
        """Pages in the list of free ones that are not there (sqlite.org/fileformat.html)."""
        with path.open("r+b") as file:
            file.seek(36)
            file.write((7).to_bytes(4, "big"))

    return {
        "is damaged: .*freelist": free_pages,
        "is damaged: the file is empty": lambda path: path.write_bytes(b""),
        "is damaged: file is not a database": lambda path: path.write_bytes(os.urandom(5000)),
        "is damaged": lambda path: os.truncate(path, 3000),
        "is damaged: it is a database of another program": other,
        "is damaged: it is not a regular file": socket,
        "Too many levels of symbolic links": link,
        "Is a directory": lambda path: (path.unlink(), path.mkdir()),
        "is damaged: entry 1 cannot be read": sql("UPDATE entry SET job = '{'"),
        "is damaged: entry 1 cannot": sql("UPDATE outcome SET result = '[]'"),
        "is damaged: parts of it": sql("DELETE FROM entry"),
    }


@pytest.mark.parametrize("what", [*ways_to_damage()])
def test_what_is_no_sound_ledger_is_refused_and_left_as_it_is(ledger_path: Path, what: str) -> None:
    ledger = Ledger.open(ledger_path)
    for step in LIFE[:5]:
        step(ledger)
    ledger.close()
    ways_to_damage()[what](ledger_path)
    before = ledger_path.lstat()
    for _ in range(2):  # the lock is let go of
        with pytest.raises(LedgerError, match=what) as raised:
            Ledger.open(ledger_path)
    assert str(ledger_path) in str(raised.value)
    assert ledger_path.lstat().st_ino == before.st_ino
    assert ledger_path.lstat().st_size == before.st_size


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_log_without_its_file_is_not_thrown_away(
    ledger: Ledger, ledger_path: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """SQLite would delete it, and begin anew."""
    ledger.accept(JOB)
    left = copy(ledger_path, tmp_path / "left")
    damage(left)
    with pytest.raises(LedgerError, match="is damaged: the file is"):
        Ledger.open(left)
    assert log_of(left).read_bytes() == log_of(ledger_path).read_bytes()


def test_a_ledger_that_was_not_made_to_its_end_is_made_anew(ledger_path: Path) -> None:
    new = ledger_path.with_name("ledger.db.new")
    new.write_bytes(os.urandom(3000))
    new.with_name("ledger.db.new-journal").write_bytes(os.urandom(3000))
    Ledger.open(ledger_path).close()
    assert [file.name for file in ledger_path.parent.iterdir()] == ["ledger.db"]


SECOND = "ALTER TABLE entry ADD COLUMN note TEXT NOT NULL DEFAULT 'none'"
THIRD = "UPDATE entry SET note = name; CREATE TABLE more (x)"


def columns(path: Path, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def test_an_older_ledger_is_brought_up_to_date_step_by_step(ledger_path: Path) -> None:
    ledger = Ledger.open(ledger_path)
    ledger.accept(JOB)
    before = content(ledger)
    ledger.close()
    ledger = Ledger.open(ledger_path, migrations=(*schema.MIGRATIONS, SECOND, THIRD))
    assert content(ledger) == before
    ledger.close()
    assert columns(ledger_path, "SELECT note FROM entry") == [("job-1",)]
    assert columns(ledger_path, "PRAGMA user_version") == [(3,)]


def test_a_step_that_fails_leaves_the_version_before_it(ledger_path: Path) -> None:
    ledger = Ledger.open(ledger_path)
    ledger.accept(JOB)
    ledger.close()
    failing = "UPDATE entry SET note = 'half'; CREATE TABLE more (x); INSERT INTO missing VALUES(1)"
    with pytest.raises(LedgerError, match="no such table: missing"):
        Ledger.open(ledger_path, migrations=(*schema.MIGRATIONS, SECOND, failing))
    assert columns(ledger_path, "PRAGMA user_version") == [(2,)]
    assert columns(ledger_path, "SELECT note FROM entry") == [("none",)]
    assert columns(ledger_path, "SELECT name FROM sqlite_master WHERE name = 'more'") == []
    Ledger.open(ledger_path, migrations=(*schema.MIGRATIONS, SECOND, THIRD)).close()


def test_a_table_with_dependents_can_be_built_anew(ledger_path: Path) -> None:
    """With foreign keys in force, dropping the old table would delete the steps."""
    ledger = Ledger.open(ledger_path)
    for step in LIFE[:3]:
        step(ledger)
    before = content(ledger)
    ledger.close()
    rebuild = (
        "CREATE TABLE anew AS SELECT * FROM entry; DROP TABLE entry;"
        "ALTER TABLE anew RENAME TO entry; CREATE UNIQUE INDEX entry_id ON entry (id)"
    )
    ledger = Ledger.open(ledger_path, migrations=(*schema.MIGRATIONS, rebuild))
    assert content(ledger) == before
    ledger.close()


def test_a_newer_ledger_is_refused_with_both_versions(ledger_path: Path) -> None:
    Ledger.open(ledger_path, migrations=(*schema.MIGRATIONS, SECOND)).close()
    with pytest.raises(
        LedgerError, match=r"of version 2, .* up to 1; install the newer worker .*lost"
    ):
        Ledger.open(ledger_path)
    Ledger.open(ledger_path, migrations=(*schema.MIGRATIONS, SECOND)).close()


@pytest.mark.parametrize("name", ["open", "mkdir"])
def test_a_folder_that_cannot_be_used(
    ledger_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(LedgerError, match=r"Permission denied; make it.* writable"):
        Ledger.open(ledger_path.parent / "new/ledger.db")


def test_a_file_in_place_of_the_folder(ledger_path: Path) -> None:
    ledger_path.write_text("")
    with pytest.raises(LedgerError, match="File exists"):
        Ledger.open(ledger_path / "ledger.db")


def test_a_closed_ledger_says_so(ledger_path: Path) -> None:
    ledger = Ledger.open(ledger_path)
    ledger.close()
    with pytest.raises(LedgerError, match="closed database"):
        ledger.accept(JOB)
