"""Deleting what somebody hostile has grown."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.files import removal
from worker.files.removal import remove_tree

DEEP = 20_000


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def grow_down(top: Path, depth: int) -> None:
    """A folder in a folder in a folder: its path is far longer than PATH_MAX."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in memory: on a disk, twenty thousand folders have it busy for half a minute."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_tree_of_any_depth(in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = in_memory / "tree"
    tree.mkdir()
    grow_down(tree, DEEP)
    (tree / "many").mkdir()
    for number in range(2_000):
        (tree / "many" / str(number)).mkdir()
    most = 0
    before = len(names("/proc/self/fd"))
    rename = os.rename

    def counting(*args: Any, **more: Any) -> None:
        nonlocal most
        most = max(most, len(names("/proc/self/fd")) - before)
        rename(*args, **more)

    monkeypatch.setattr(os, "rename", counting)
    assert remove_tree(tree)
    assert not tree.exists()
    assert 0 < most < 10
    assert len(names("/proc/self/fd")) == before


def test_it_stays_in_the_tree(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("keep")
    (tree / "a/b").mkdir(parents=True)
    for folder in (tree, tree / "a", tree / "a/b"):
        (folder / "link").symlink_to(outside)
        (folder / "file").symlink_to(outside / "file")
        (folder / "hard").hardlink_to(outside / "file")
        (folder / "up").symlink_to("../..")
    (tree / "a/root").symlink_to("/")

    assert remove_tree(tree)

    assert not tree.exists()
    assert (outside / "folder").is_dir()
    assert (outside / "file").read_text() == "keep"


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to("outside")
    (tmp_path / "file").touch()
    assert remove_tree(tmp_path / "link")
    assert remove_tree(tmp_path / "file")
    assert remove_tree(tmp_path / "nothing")
    assert names(tmp_path) == ["outside"]


def test_names_of_any_kind(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for raw in (b"\xff\xfe", b"new\nline", b"-rf", b"x" * 255, "ü".encode() * 127, b"\x1b[2J"):
        for folder in (tree, tree / os.fsdecode(b"sub\xff")):
            (folder / os.fsdecode(raw) / "below").mkdir(parents=True)
    for folder in (tree, tree / os.fsdecode(b"sub\xff")):
        (folder / os.fsdecode(b"file\xff")).touch()
        os.mkfifo(folder / "pipe")
    assert remove_tree(tree)
    assert names(tmp_path) == []


def as_nobody(work: Callable[[], bool]) -> int:
    """Call it in a process without the rights of root, but for a directory of its own."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_folders_that_forbid_it_to_their_owner(tmp_path: Path) -> None:
    home = tmp_path / "home"
    tree = home / "tree"
    for mode in (0o000, 0o100, 0o300, 0o500, 0o600):
        folder = tree / f"{mode:o}"
        (folder / "sub/subsub").mkdir(parents=True)
        (folder / "file").touch()
        (folder / "sub/subsub").chmod(mode)
        (folder / "sub").chmod(mode)
        folder.chmod(mode)
    tree.chmod(0)
    if os.geteuid() == 0:
        for path, _, _ in os.walk(home):
            os.chown(path, 65534, 65534)
        for above in (tmp_path, *tmp_path.parents):
            if above.stat().st_uid == 0 and str(above).startswith("/tmp/"):
                above.chmod(0o711)

    assert as_nobody(lambda: remove_tree(tree)) == 0
    assert names(home) == []


def test_what_cannot_be_deleted_is_told_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        (tmp_path / "tree" / f"stays\n{number}").mkdir(parents=True)
    (tmp_path / "tree/goes").mkdir()
    rmdir = os.rmdir

    def refuse(path: str, **more: int) -> None:
        if "stays" in path:
            raise PermissionError(1, "Operation not permitted")
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", refuse)
    assert not remove_tree(tmp_path / "tree")
    assert len(names(tmp_path / "tree")) == 20
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == removal.MOST_COMPLAINTS + 2
    assert "stays\\n" in lines[0]
    assert "20 names" in lines[-2]
    assert all("\n" not in line for line in lines)


def test_a_moved_folder_that_stays_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree/a/b/c").mkdir(parents=True)
    rmdir = os.rmdir
    refused: list[str] = []

    def busy_once(path: str, **more: int) -> None:
        if "." in path and not refused:  # the first that was moved up
            refused.append(path)
            raise OSError(16, "Device or resource busy")
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", busy_once)
    assert remove_tree(tmp_path / "tree")
    assert refused
    assert not (tmp_path / "tree").exists()


def test_a_link_that_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    """One process swaps a folder for a link all the time; nothing behind the link may go."""
    outside = tmp_path / "outside"
    (outside / "x").mkdir(parents=True)
    (outside / "keep").touch()
    stop = threading.Event()

    def swap(tree: Path) -> None:
        while not stop.is_set():
            try:
                (tree / "f/g").mkdir(parents=True, exist_ok=True)
                (tree / "link").symlink_to(outside)
                (tree / "f").rename(tree / "h")
                (tree / "link").rename(tree / "f")
                (tree / "f").rename(tree / "i")
            except OSError:
                continue

    tree = tmp_path / "tree"
    swapping = threading.Thread(target=swap, args=(tree,))
    swapping.start()
    for _ in range(100):
        tree.mkdir(exist_ok=True)
        remove_tree(tree)
    stop.set()
    swapping.join()
    assert names(outside) == ["keep", "x"]
    remove_tree(tree)
