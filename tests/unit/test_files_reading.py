"""Reading and taking over what a job wrote, or put in its place."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.errors import JobError, Reason
from worker.files import handover, opening, reading
from worker.files.handover import make_readable, take
from worker.files.reading import read_ends, read_tail, size_of


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "job/files"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    return folder


def a_link(path: Path) -> None:
    path.symlink_to(path.parents[2] / "secret")


def a_broken_link(path: Path) -> None:
    path.symlink_to("nothing")


def a_hard_link(path: Path) -> None:
    path.hardlink_to(path.parents[2] / "secret")


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path) -> None:
    """A device, where we may make one; else what only the fake below takes for one."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path)


TRAPS = [a_link, a_broken_link, a_hard_link, os.mkfifo, Path.mkdir, a_socket, a_device]


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_not_read(
    files: Path, trap: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = files / "main.log"
    trap(path)
    reads: tuple[tuple[Callable[[Path], object], object], ...] = (
        (read_ends, ""), (read_tail, ""), (size_of, None),
    )  # fmt: skip
    for read, nothing in reads:
        caplog.clear()
        assert read(path) == nothing
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "main.log is not a regular file" in caplog.text


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_not_taken_over(files: Path, trap: Callable[[Path], None]) -> None:
    path = files / "output.mp4"
    trap(path)
    before = os.lstat(files.parents[1] / "secret")
    ways: tuple[Callable[[], object], ...] = (
        lambda: make_readable(path, os.getgid()),
        lambda: take("output.mp4", files, files.parent, os.getgid()),
    )
    for take_over in ways:
        with pytest.raises(JobError, match="not a regular file of its own") as caught:
            take_over()
        assert caught.value.reason is Reason.RUNTIME_ERROR
    assert names(files.parent) == ["files"]
    after = os.lstat(files.parents[1] / "secret")
    assert (before.st_mode, before.st_uid) == (after.st_mode, after.st_uid)


def test_nothing_is_no_complaint(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (files, files / "gone"):
        path = folder / "main.log"
        assert (read_ends(path), read_tail(path), size_of(path)) == ("", "", None)
    assert make_readable(files / "input.mp4", os.getgid()) is None
    assert take("output.mp4", files, files.parent, os.getgid()) is None
    assert caplog.text == ""


def test_the_folder_itself_is_no_link(files: Path) -> None:
    (files.parent / "other").symlink_to(files)
    (files / "main.log").write_text("text")
    for read in (read_ends, read_tail, size_of):
        with pytest.raises(NotADirectoryError):
            read(files.parent / "other/main.log")


@pytest.mark.parametrize("swapped_for", [a_link, os.mkfifo])
def test_a_swap_after_the_look(
    files: Path, monkeypatch: pytest.MonkeyPatch, swapped_for: Callable[[Path], None]
) -> None:
    """What is read is what was looked at, whatever has its name by then."""
    path = files / "main.log"
    path.write_text("looked at")
    fstat = os.fstat

    def swap(fd: int) -> os.stat_result:
        found = fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and not swapped:
            swapped.append(1)
            path.unlink()
            swapped_for(path)
        return found

    swapped: list[int] = []
    monkeypatch.setattr(os, "fstat", swap)
    assert read_tail(path) == "looked at"
    assert swapped


def test_a_file_and_a_link_by_turns(files: Path) -> None:
    path, spare = files / "main.log", files / "spare"
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            spare.symlink_to(files.parents[1] / "secret")
            spare.replace(path)
            spare.write_text("mine")
            spare.replace(path)

    spare.write_text("mine")
    spare.replace(path)
    flipping = threading.Thread(target=flip)
    flipping.start()
    try:
        seen: set[str] = set()
        until = time.monotonic() + 2
        while time.monotonic() < until or (len(seen) < 2 and time.monotonic() < until + 60):
            seen.add(read_tail(path))
    finally:
        stop.set()
        flipping.join()
    assert seen == {"mine", ""}


def test_reading_a_file_of_any_size(files: Path) -> None:
    path = files / "log"
    path.write_text("short\n")
    assert read_ends(path) == read_tail(path) == "short\n"
    path.write_bytes(b"first\n" + b"\xff" * 2_000_000 + b"\nlast")
    text = read_ends(path)
    assert text.startswith("first\n")
    assert text.endswith("\nlast")
    assert len(text) < 400_000
    assert read_tail(path, 5) == "\nlast"
    os.truncate(path, 2**40)  # sparse
    assert len(read_ends(path)) < 400_000


@pytest.mark.parametrize("lines", [1, 4_000, 20_000])
def test_the_ends_of_a_log_are_whole_lines(files: Path, lines: int) -> None:
    line = "[info] http://user:secret@host"
    path = files / "main.log"
    path.write_text("".join(f"{line}/{number:06}\n" for number in range(lines)))
    read = read_ends(path).splitlines()
    assert len(read) <= lines
    assert all(one.startswith(line) and len(one) == len(line) + 7 for one in read)
    assert read[0].endswith("/000000")
    assert read[-1].endswith(f"/{lines - 1:06}")


def test_a_size(files: Path) -> None:
    (files / "file").write_text("four")
    assert size_of(files / "file") == 4


def foreign(path: Path, mode: int = 0o600) -> None:
    """A file as a job makes it; of another user where we can."""
    path.write_text("media")
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 61_234, 61_234)


def test_an_input_becomes_readable(files: Path) -> None:
    path = files / "input.mp4"
    foreign(path, 0o6707)
    for _ in range(2):
        assert make_readable(path, os.getgid()) == 5
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getgid())
        assert stat.S_IMODE(found.st_mode) == 0o640


def test_without_a_group_nothing_is_changed(files: Path) -> None:
    path = files / "input.mp4"
    foreign(path)
    before = path.stat()
    assert make_readable(path, None) == 5
    after = path.stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


def test_an_access_list_goes(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files / "input.mp4"
    foreign(path)
    gone: list[str] = []
    monkeypatch.setattr(os, "removexattr", lambda _fd, name: gone.append(name))
    make_readable(path, os.getgid())
    assert gone == ["system.posix_acl_access"]


def test_an_access_list_that_cannot_go(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_fd: int, _name: str) -> None:
        raise OSError(5, "Input/output error")

    foreign(files / "input.mp4")
    monkeypatch.setattr(os, "removexattr", fail)
    with pytest.raises(JobError, match=r"cannot take over .*Input/output") as caught:
        make_readable(files / "input.mp4", os.getgid())
    assert caught.value.reason is Reason.PLATFORM_ERROR


def test_an_output_is_taken_once(files: Path) -> None:
    home = files.parent
    foreign(files / "output.mp4")
    assert take("output.mp4", files, home, os.getgid()) == 5
    assert names(files) == []
    assert stat.S_IMODE((home / "output.mp4").stat().st_mode) == 0o640

    (files / "output.mp4").write_text("what a probe that was taken over puts there")
    assert take("output.mp4", files, home, os.getgid()) == 5
    assert (home / "output.mp4").read_text() == "media"


def test_a_crash_between_the_move_and_the_rest(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(*args: object) -> None:
        raise Died

    foreign(files / "output.mp4")
    with monkeypatch.context() as patched:
        patched.setattr(handover, "own", die)
        with pytest.raises(Died):
            take("output.mp4", files, files.parent, os.getgid())
    assert names(files) == []
    assert take("output.mp4", files, files.parent, os.getgid()) == 5
    assert (files.parent / "output.mp4").stat().st_uid == os.geteuid()


def test_descriptors_are_closed(files: Path) -> None:
    (files / "main.log").write_text("text")
    a_link(files / "link")
    before = len(names("/proc/self/fd"))
    for _ in range(3):
        read_tail(files / "main.log")
        read_tail(files / "link")
        make_readable(files / "main.log", None)
    assert len(names("/proc/self/fd")) == before
    assert reading.HEAD_BYTES < reading.TAIL_BYTES
    assert opening.FILE & os.O_NONBLOCK
