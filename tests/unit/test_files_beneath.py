"""Inputs lie where they may, whatever links there are, and whoever swaps them meanwhile."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.errors import JobError, Reason
from worker.files import beneath
from worker.files.beneath import InputFile, is_steady, is_that_file, resolve_input
from worker.jobs.policy import workers_own

OTHER = 61_234


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/in.mp4").write_text("media")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/in.mp4").write_text("secret!")
    return folder


def refused(path: Path, *dirs: Path, gid: int | None = None, **more: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        resolve_input(path, dirs, gid=gid, **more)
    return caught.value


def test_a_plain_input(media: Path) -> None:
    path = media / "a/b/in.mp4"
    found = resolve_input(path, [media], gid=None)
    status = path.stat()
    assert (found.path, found.size) == (path, 5)
    assert (found.device, found.inode) == (status.st_dev, status.st_ino)


def test_links_that_stay_beneath(media: Path, tmp_path: Path) -> None:
    (media / "c").symlink_to("a/b")
    (media / "d.mp4").symlink_to(media / "c/in.mp4")
    (tmp_path / "way").symlink_to(media)
    for path in (media / "c/in.mp4", media / "d.mp4", tmp_path / "way/d.mp4"):
        assert resolve_input(path, [media], gid=None).path == media / "a/b/in.mp4"
    assert resolve_input(media / "d.mp4", [tmp_path / "way"], gid=None).size == 5


@pytest.mark.parametrize("depth", range(3))
def test_a_link_out_of_it_at_every_component(media: Path, tmp_path: Path, depth: int) -> None:
    (tmp_path / "outside/b").mkdir()
    (tmp_path / "outside/b/in.mp4").write_text("secret!")
    there = [tmp_path / "outside", tmp_path / "outside/b", tmp_path / "outside/in.mp4"][depth]
    link = [media / "a", media / "a/b", media / "a/b/in.mp4"][depth]
    link.rename(tmp_path / "away")
    link.symlink_to(there)
    error = refused(media / "a/b/in.mp4", media)
    assert error.reason is Reason.USER_ERROR
    assert error.message.endswith(f"lies outside of INPUT_DIRS ({media})")


def test_outside_tells_nothing_of_what_is_there(media: Path, tmp_path: Path) -> None:
    (media / "out").symlink_to(tmp_path / "outside")
    (media / "broken").symlink_to(tmp_path / "nothing")
    errors = {
        str(refused(path, media, tmp_path / "more")).replace(str(path), "X")
        for path in (
            tmp_path / "outside/in.mp4",
            tmp_path / "outside/nothing",
            tmp_path / "outside/in.mp4/below",
            tmp_path / ("x" * 300),
            media / "out/in.mp4",
            media / "out/nothing",
            media / "broken",
            Path("/proc/self/root"),
            tmp_path / "media2",
        )
    }
    assert errors == {f"input X lies outside of INPUT_DIRS ({media}, {tmp_path / 'more'})"}
    for path in (media / "../media/a/b/in.mp4", media / "nothing/../../outside/in.mp4"):
        assert "must not contain .." in str(refused(path, media))


def test_what_is_no_input(media: Path) -> None:
    (media / "empty").touch()
    os.mkfifo(media / "pipe")
    (media / "loop").symlink_to("loop")
    (media / "bad").symlink_to("a/b/\udcff.mp4")
    try:
        os.mknod(media / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        (media / "device").mkdir()
    for path, words in (
        (media / "missing", "does not exist"),
        (media / "no/file", "does not exist"),
        (media / "empty", "is empty"),
        (media / "pipe", "not a regular file"),
        (media / "device", "not a regular file"),
        (media / "a", "not a regular file"),
        (media, "not a regular file"),
        (media / "loop", "not a regular file"),
        (media / "a/b/in.mp4/below", "Not a directory"),
        (media / ("x" * 300), "File name too long"),
        (media / "/".join(["x" * 100] * 45), "File name too long"),
        (media / "bad", "not a plain UTF-8 path"),
    ):
        error = refused(path, media)
        assert error.reason is Reason.INPUT_ERROR
        assert words in str(error)


def test_a_chain_of_too_many_links(media: Path) -> None:
    (media / "link0").symlink_to("a/b/in.mp4")
    for number in range(3_000):
        (media / f"link{number + 1}").symlink_to(f"link{number}")
    assert "lies outside" in str(refused(media / "link3000", media))


def test_nothing_is_opened_that_is_not_a_file(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a device may set it going: only looking at it does not."""
    os.mkfifo(media / "pipe")
    opened, real_open = [], os.open

    def spy(path: str, flags: int, *args: int, **more: int) -> int:
        if not flags & (os.O_PATH | os.O_DIRECTORY):
            opened.append((path, flags))
        return real_open(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", spy)
    refused(media / "pipe", media)
    assert opened == []
    resolve_input(media / "a/b/in.mp4", [media], gid=None)
    assert len(opened) == 1
    assert opened[0][1] & os.O_NONBLOCK


@pytest.mark.parametrize("component", ["media", "a", "b", "in.mp4"])
def test_a_link_that_appears_during_the_walk(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    """Swapped after the path was resolved, just before that component is opened."""
    (tmp_path / "outside/a/b").mkdir(parents=True)
    (tmp_path / "outside/b").mkdir()
    for folder in ("a/b", "b"):
        (tmp_path / "outside" / folder / "in.mp4").write_text("secret!")
    way = {"media": media, "a": media / "a", "b": media / "a/b", "in.mp4": media / "a/b/in.mp4"}
    there = {"media": "", "a": "a", "b": "b", "in.mp4": "in.mp4"}[component]
    real_open = os.open
    swapped: list[str] = []

    def swap(path: str, flags: int, *args: int, **more: int) -> int:
        if path == component and not swapped:
            swapped.append(path)
            way[component].rename(tmp_path / "away")
            way[component].symlink_to(tmp_path / "outside" / there)
        return real_open(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", swap)
    error = refused(media / "a/b/in.mp4", media)
    assert swapped
    assert error.reason is Reason.INPUT_ERROR
    assert "not a regular file" in str(error) or "Not a directory" in str(error)


def test_a_link_that_comes_and_goes(media: Path, tmp_path: Path) -> None:
    """For two seconds a folder and a link take turns: what is found is never the other's."""
    (tmp_path / "outside/b").mkdir()
    (tmp_path / "outside/b/in.mp4").write_text("secret!")
    stop = threading.Event()
    flips = 0

    def flip() -> None:
        nonlocal flips
        while not stop.is_set():
            (media / "a").rename(media / "real")
            (media / "a").symlink_to(tmp_path / "outside")
            (media / "a").unlink()
            (media / "real").rename(media / "a")
            flips += 1

    flipping = threading.Thread(target=flip)
    flipping.start()
    sizes: set[tuple[int, Path]] = set()
    errors: set[str] = set()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until or not ((sizes and errors) or time.monotonic() > until + 60):
            try:
                found = resolve_input(media / "a/b/in.mp4", [media], gid=None)
                sizes.add((found.size, found.path))
            except JobError as error:
                errors.add(str(error).partition("in.mp4 ")[2])
    finally:
        stop.set()
        flipping.join()
    assert sizes == {(5, media / "a/b/in.mp4")}
    assert errors
    assert flips > 10


def test_what_jobs_may_read(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media / "a/b/in.mp4"
    gid = os.getgid()
    for mode, group, fine in (
        (0o644, gid + 1, True),
        (0o640, gid + 1, False),
        (0o640, gid, True),
        (0o604, gid, False),  # for members of the group it is the group's mode that counts
        (0o600, gid, False),
        (0o606, gid + 1, True),
    ):
        path.chmod(mode)
        if fine:
            assert resolve_input(path, [media], gid=group).size == 5
        else:
            error = refused(path, media, gid=group)
            assert error.reason is Reason.INPUT_ERROR
            assert "chmod o+r" in str(error)
            assert "chgrp" in str(error)
    path.chmod(0o600)
    assert resolve_input(path, [media], gid=None).size == 5
    assert "`chgrp 4000000`" in str(refused(path, media, gid=4_000_000))
    monkeypatch.setattr(os, "getxattr", lambda _path, name: b"a list of " + name.encode())
    assert resolve_input(path, [media], gid=gid).size == 5


def test_what_we_may_not_read(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_handle: int, _flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(beneath, "reopen", refuse)
    assert "cannot be read: Permission denied" in str(refused(media / "a/b/in.mp4", media))


def test_the_workers_own_files(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (tmp_path / "link").symlink_to(work)
    for name in (
        "jobs/x/files/input.mp4", "root/file", "accepted/x", "ledger.db", "ledger.db-wal",
        "control.sock.lock", "media/in.mp4", "jobs.mp4", "input_x.mp4", "media/jobs/in.mp4",
    ):  # fmt: skip
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("media")
        for given in (path, tmp_path / "link" / name):
            if name.startswith(("media", "jobs.", "input")):
                found = resolve_input(given, [work], gid=None, private=workers_own(work))
                assert found.path == path
            else:
                error = refused(given, tmp_path, private=workers_own(work))
                assert error.reason is Reason.USER_ERROR
                assert "own files" in str(error)


def status(uid: int, mode: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))


US = os.geteuid()
DIR, FILE = stat.S_IFDIR, stat.S_IFREG


@pytest.mark.parametrize(
    ("way", "steady"),
    [
        ([(0, 0o755), (0, 0o755), (OTHER, 0o644)], True),
        ([(0, 0o755), (US, 0o700), (OTHER, 0o666)], True),
        ([(0, 0o755), (OTHER, 0o755), (0, 0o644)], False),
        ([(0, 0o755), (OTHER, 0o500), (0, 0o644)], False),
        ([(0, 0o755), (0, 0o775), (0, 0o644)], False),
        ([(0, 0o755), (0, 0o757), (0, 0o644)], False),
        ([(0, 0o755), (0, 0o1777), (0, 0o644)], True),
        ([(0, 0o755), (0, 0o1777), (US, 0o644)], True),
        ([(0, 0o755), (0, 0o1777), (OTHER, 0o644)], False),
        ([(0, 0o755), (OTHER, 0o1777), (0, 0o644)], False),
        ([(0, 0o777), (0, 0o755), (0, 0o644)], False),
        ([(0, 0o1777), (0, 0o755), (OTHER, 0o644)], True),
        ([(0, 0o1777), (OTHER, 0o755), (0, 0o644)], False),
    ],
)
def test_who_may_swap_a_component(way: list[tuple[int, int]], steady: bool) -> None:
    *folders, (uid, mode) = way
    found = [status(owner, DIR | bits) for owner, bits in folders]
    assert is_steady([*found, status(uid, FILE | mode)]) is steady


def test_steady_is_asked_of_the_whole_way(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[os.stat_result]] = []

    def ask(way: list[os.stat_result]) -> bool:
        asked.append(way)
        return True

    monkeypatch.setattr(beneath, "is_steady", ask)
    resolve_input(media / "a/b/in.mp4", [media], gid=None)
    path = media / "a/b/in.mp4"
    expected = [place.stat().st_ino for place in (path, *path.parents)][::-1]
    assert [found.st_ino for found in asked[0]] == expected


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen(["/bin/sleep", "60"]) as sleeping:
        yield sleeping.pid
        sleeping.kill()


def test_whether_a_process_sees_that_file(media: Path, process: int) -> None:
    path = media / "a/b/in.mp4"
    found = resolve_input(path, [media], gid=None)
    assert is_that_file(process, found) is True
    path.rename(media / "away")
    assert is_that_file(process, found) is False
    path.symlink_to(media / "away")
    assert is_that_file(process, found) is False
    path.unlink()
    path.write_text("another")
    assert is_that_file(process, found) is False
    (media / "a").rename(media / "c")
    (media / "a").touch()
    assert is_that_file(process, found) is False


def test_a_process_that_is_gone() -> None:
    found = InputFile(Path("/etc/passwd"), 1, 1, 1, True)
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_that_file(child.pid, found) is None  # a zombie has no root any more
    child.wait()
    assert is_that_file(child.pid, found) is None


def test_descriptors_are_closed(media: Path, process: int) -> None:
    (media / "link").symlink_to("/etc")
    before = len(names("/proc/self/fd"))
    for _ in range(3):
        is_that_file(process, resolve_input(media / "a/b/in.mp4", [media], gid=None))
        for name in ("a", "missing", "link/passwd", "a/b/in.mp4/below"):
            refused(media / name, media)
    assert len(names("/proc/self/fd")) == before
