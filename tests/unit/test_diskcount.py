"""Files without a name, and blocks without a place in a file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from worker.diskcount import MIB, Count


def deleted(folder: Path, size: int, name: str = "x") -> int:
    """An open file without a name."""
    path = folder / name
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * size)
    path.unlink()
    return fd


def test_a_deleted_file_that_is_mapped_only(tmp_path: Path) -> None:
    """/proc shows it where only few may look, so it is put together here."""
    fd = deleted(tmp_path, 3 * MIB)
    mapped = mmap.mmap(fd, 4096)
    folder = os.open(tmp_path, os.O_RDONLY)
    lines = [
        line for line in Path("/proc/self/maps").read_text("latin-1").splitlines()
        if line.endswith(f"{tmp_path}/x (deleted)")
    ]  # fmt: skip
    proc = tmp_path / "proc/7"
    (proc / "map_files").mkdir(parents=True)
    (proc / "maps").write_text(f"00400000-00401000 r-xp 00000000 08:01 5  /usr/x\n{lines[0]}\n")
    addresses = "-".join(f"{int(part, 16):x}" for part in lines[0].split()[0].split("-"))
    (proc / "map_files" / addresses).symlink_to(f"/proc/self/fd/{fd}")
    count = Count()
    count.add_tree(folder)
    count.add_deleted([7, 8], str(tmp_path / "proc"))
    assert (count.deleted, count.held >= 3 * MIB) == (1, True)
    mapped.close()
    os.close(fd)
    os.close(folder)


def test_what_is_not_the_jobs_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that was replaced, an input that somebody deleted, memory without a file."""
    folder = os.open(tmp_path, os.O_RDONLY)

    def deleted_files() -> int:
        count = Count()
        count.add_tree(folder)
        count.add_deleted([os.getpid()])
        return count.deleted

    before = deleted_files()  # those of the tests' runner
    memory = os.memfd_create("x")
    os.write(memory, b"x" * MIB)
    fd = deleted(tmp_path, MIB)
    assert deleted_files() == before + 1
    stat = os.stat

    def another_owner(path: str) -> os.stat_result:
        found = stat(path)
        return cast(
            "os.stat_result",
            found if "/fd/" in path else SimpleNamespace(st_uid=found.st_uid + 1),
        )

    monkeypatch.setattr(os, "stat", another_owner)
    assert deleted_files() == 0
    for each in (memory, fd, folder):
        os.close(each)


def test_blocks_beyond_the_end() -> None:
    """XFS sets some aside, up to a file's size; a job may allocate as many as it likes."""

    def excess(size: int, allocated: int) -> str:
        count = Count()
        found = SimpleNamespace(
            st_mode=0o100600, st_nlink=1, st_dev=1, st_size=size, st_blocks=allocated // 512
        )
        count.add(cast("os.stat_result", found))
        return count.excess(100 * MIB, 0)

    assert excess(90 * MIB, 180 * MIB) == ""
    assert excess(101 * MIB, 101 * MIB) == "disk limit of 100 MB exceeded (101 MB in 1 file)"
    assert excess(0, 200 * MIB) == ""
    assert excess(0, 300 * MIB) == "disk limit of 100 MB exceeded (300 MB in 1 file)"
    assert excess(1 << 40, 10 * MIB) == ""
