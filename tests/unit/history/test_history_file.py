"""The ledger's file, as ``history`` finds it: it only reads, beside any worker or none."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from worker.ledger import Ledger, history
from worker.ledger.schema import MIGRATIONS
from worker.master.wire import Job

if TYPE_CHECKING:
    from tests.unit.history.conftest import Run


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()
    } | {".": (folder.stat().st_mtime_ns, b"")}


def by_another_process(path: Path) -> str:
    """The ids that a process of its own reads: SQLite shares its locks within a process."""
    script = (
        "import sys; from pathlib import Path; from worker.ledger import history\n"
        "print(*(entry.job.id for entry in history.newest(Path(sys.argv[1]), 9)))"
    )
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def crashed(path: Path, *jobs: str) -> None:
    """A worker that accepts jobs and dies: its log stays beside the file."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from worker.ledger import Ledger; from worker.master.wire import Job\n"
        "ledger = Ledger.open(Path(sys.argv[1]))\n"
        "for name in sys.argv[2:]: ledger.accept(Job(id=name))\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(path), *jobs], check=True)
    assert path.with_name("ledger.db-wal").stat().st_size


def test_beside_a_worker(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert by_another_process(path) == ""
    ledger.accept(Job(id="1"))
    before = files(tmp_path)
    assert by_another_process(path) == "1"
    assert files(tmp_path) == before
    ledger.accept(Job(id="2"))
    assert by_another_process(path) == "1 2"


def test_without_a_worker(ledger: Ledger, tmp_path: Path) -> None:
    ledger.accept(Job(id="1"))
    ledger.close()
    before = files(tmp_path)
    assert "ledger.db-wal" not in before
    assert by_another_process(tmp_path / "ledger.db") == "1"
    assert files(tmp_path) == before


@pytest.mark.parametrize("index", [True, False])
def test_after_a_crash(tmp_path: Path, index: bool) -> None:
    path = tmp_path / "ledger.db"
    crashed(path, "1", "2")
    if not index:
        path.with_name("ledger.db-shm").unlink()
    before = files(tmp_path)
    assert by_another_process(path) == "1 2"
    assert files(tmp_path) == before
    Ledger.open(path).close()
    assert by_another_process(path) == "1 2"


@pytest.mark.parametrize("how", ["live", "crashed", "closed"])
def test_without_the_right_to_write(tmp_path: Path, how: str) -> None:
    """As somebody who may read the files and nothing else."""
    folder = tmp_path / "w"
    path = folder / "ledger.db"
    crashed(path, "1")
    worker = None
    if how == "live":
        worker = worker_with(path)
    elif how == "closed":
        Ledger.open(path).close()
    for place in (*tmp_path.parents[:-2], tmp_path):
        place.chmod(place.stat().st_mode | 0o055)
    folder.chmod(0o555)
    for file in folder.iterdir():
        file.chmod(0o444)
    before = files(folder)
    assert as_another_user(lambda: [entry.job.id for entry in history.newest(path, 9)]) == "['1']"
    assert files(folder) == before
    folder.chmod(0o700)
    if worker:
        worker.communicate("")
        assert worker.returncode == 0


def worker_with(path: Path) -> subprocess.Popen[str]:
    """A process that holds the ledger until its standard input ends."""
    script = (
        "import sys; from pathlib import Path; from worker.ledger import Ledger\n"
        "ledger = Ledger.open(Path(sys.argv[1])); print(flush=True)\n"
        "sys.stdin.read(); ledger.close()"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout
    worker.stdout.readline()
    return worker


def as_another_user(function: Callable[[], object]) -> str:
    """What it returns or raises, as text, in a process that is not root's."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            said = str(function())
        except BaseException as error:
            said = str(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def test_while_workers_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    crashed(path, "0")
    over = threading.Event()

    def come_and_go() -> None:
        number = 0
        while not over.is_set():
            crashed(path, str(number := number + 1))
            ledger = Ledger.open(path)
            ledger.accept(Job(id=str(number := number + 1)))
            ledger.close()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        last = 0
        for _ in range(10):
            found = [int(name) for name in by_another_process(path).split()]
            assert found == [*range(found[0], found[-1] + 1)]
            assert found[-1] >= last
            last = found[-1]
    finally:
        over.set()
        thread.join()


def test_no_ledger(run: Run, tmp_path: Path) -> None:
    status, out, err = run()
    assert (status, out) == (1, "")
    assert f"there is no ledger in {tmp_path}" in err
    assert "--work-dir" in err
    assert [*tmp_path.iterdir()] == []


def test_no_work_directory(run: Run, tmp_path: Path) -> None:
    status, _, err = run("--work-dir", str(tmp_path / "none"))
    assert status == 1
    assert "there is no ledger" in err


def make(kind: str, path: Path) -> None:
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("x" * 8192)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("elsewhere")
        case "other":
            with sqlite3.connect(path) as db:
                db.execute("CREATE TABLE t (x)")
        case "newer" | "older":
            Ledger.open(path).close()
            with sqlite3.connect(path) as db:
                version = len(MIGRATIONS) + (1 if kind == "newer" else -1)
                db.execute(f"PRAGMA user_version = {version}")
            db.close()
        case "torn":
            ledger = Ledger.open(path)
            ledger.accept(Job(id="17"))
            ledger.close()
            with sqlite3.connect(path) as db:
                db.execute("UPDATE entry SET job = '{'")
            db.close()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("empty", "is damaged: the file is empty"),
        ("text", "is damaged: file is not a database"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("link", "not a regular file"),
        ("other", "database of another program"),
        ("newer", "use the program that the worker runs with"),
        ("older", "start the worker once"),
        ("torn", "is damaged: entry 1 cannot be read"),
    ],
)
def test_what_is_no_ledger(run: Run, tmp_path: Path, kind: str, sentence: str) -> None:
    make(kind, tmp_path / "ledger.db")
    names = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = run()
    assert (status, out) == (1, "")
    assert sentence in err
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_ledger_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    crashed(path, "1")
    path.chmod(0)
    said = as_another_user(lambda: history.newest(path, 1))
    assert said.startswith(f"cannot read the ledger {path}: Permission denied")
    assert "only root and the worker's own user may" in said
