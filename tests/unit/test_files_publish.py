"""An output gets its name whole or not at all, in the right folder, over nobody else's file."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.errors import JobError, Reason
from worker.files import outputs
from worker.files.beneath import kept_files, resolve_input
from worker.files.owner import Owner, owner_of, user_name
from worker.files.publish import check_output, publish
from worker.jobs.policy import workers_own

IS_ROOT = os.geteuid() == 0
US = Owner(os.geteuid(), os.getegid(), "us")
OTHER = Owner(61_234, 61_235, "other") if IS_ROOT else US


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    path = tmp_path / "job/output.mp4"
    path.parent.mkdir()
    path.write_text("new")
    path.chmod(0o600)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "a/b").mkdir(parents=True)
    return folder


def give(path: Path, owner: Owner) -> None:
    if IS_ROOT:
        os.chown(path, owner.uid, owner.gid)


def refused(call: Callable[..., object], *args: Any, **more: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        call(*args, **more)
    return caught.value


def no_link(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """link(2) fails the first time, as between two mounts or where there are no hard links."""
    link = os.link
    failed: list[int] = []

    def fail(*args: Any, **more: Any) -> None:
        if code != errno.EXDEV or not failed:
            failed.append(code)
            raise OSError(code, os.strerror(code))
        link(*args, **more)

    monkeypatch.setattr(os, "link", fail)
    return failed


@pytest.mark.parametrize("way", ["link", "copy", "mounts", "no links"])
def test_a_new_file(staged: Path, out: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way in ("mounts", "no links"):
        failed = no_link(monkeypatch, errno.EXDEV if way == "mounts" else errno.EPERM)
    target = out / "a/b/out.mp4"
    notes: list[tuple[str, int]] = []

    def note(path: Path, final: Path) -> None:
        assert final == target
        assert not target.exists()
        notes.append((path.name, path.stat().st_ino))

    size = publish(
        staged, target, dirs=[out], owner=OTHER, copy=way == "copy", note=note
    )  # fmt: skip

    found = target.stat()
    assert size == found.st_size == 3
    assert target.read_text() == "new"
    assert (found.st_uid, found.st_gid, found.st_nlink) == (OTHER.uid, OTHER.gid, 1)
    assert stat.S_IMODE(found.st_mode) == 0o644
    assert names(target.parent) == ["out.mp4"]
    assert notes[-1][1] == found.st_ino
    assert len(notes) == (2 if way == "mounts" else 1)
    assert staged.exists() is (way in ("copy", "mounts"))
    if way in ("mounts", "no links"):
        assert failed


@pytest.mark.parametrize("copy", [False, True])
def test_replacing_a_file_of_the_owner(staged: Path, out: Path, copy: bool) -> None:
    target = out / "out.mp4"
    target.write_text("older and longer")
    give(target, OTHER)
    assert publish(staged, target, dirs=[out], owner=OTHER, copy=copy) == 3
    assert target.read_text() == "new"
    assert names(out) == ["a", "out.mp4"]
    assert target.stat().st_uid == OTHER.uid


@pytest.mark.parametrize("mounts", [False, True])
def test_replacing_between_mounts(
    staged: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mounts: bool
) -> None:
    replace, calls = os.replace, []

    def fail(*args: Any, **more: Any) -> None:
        calls.append(args)
        if mounts and len(calls) == 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(*args, **more)

    monkeypatch.setattr(os, "replace", fail)
    (out / "out.mp4").write_text("old")
    publish(staged, out / "out.mp4", dirs=[out], owner=None)
    assert (out / "out.mp4").read_text() == "new"
    assert len(calls) == (2 if mounts else 1)


def a_link(path: Path) -> None:
    (path.parent / "precious").write_text("keep")
    path.symlink_to("precious")


def a_hard_link(path: Path) -> None:
    (path.parent / "precious").write_text("keep")
    path.hardlink_to(path.parent / "precious")


def a_strangers_file(path: Path) -> None:
    path.write_text("keep")
    if IS_ROOT:
        os.chown(path, 61_999, 61_999)


OBSTACLES = [
    (a_link, "is there already and belongs to .*: it is a symbolic link; remove it or"),
    (a_hard_link, "it has other names"),
    (os.mkfifo, "it is a named pipe"),
    (Path.mkdir, "is a folder; name a file"),
    (a_strangers_file, "belongs to .*outputs replace only what belongs to other; .*chown"),
]


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(("obstacle", "words"), OBSTACLES)
def test_what_is_not_replaced(
    staged: Path, out: Path, obstacle: Callable[[Path], None], words: str, copy: bool
) -> None:
    target = out / "out.mp4"
    obstacle(target)
    owner = OTHER
    if obstacle is a_strangers_file and not IS_ROOT:
        owner = Owner(os.geteuid() + 1, os.getegid(), "other")  # then it is we who are the stranger
    before = {path.name: path.lstat() for path in out.iterdir()}
    for error in (
        refused(publish, staged, target, dirs=[out], owner=owner, copy=copy),
        refused(check_output, target, None, dirs=[out], owner=owner),
    ):
        assert error.reason is Reason.USER_ERROR
        assert re.search(words, str(error))
    assert {path.name: path.lstat() for path in out.iterdir()} == before
    assert staged.read_text() == "new"


def test_without_an_owner_it_is_we_who_own(staged: Path, out: Path) -> None:
    if IS_ROOT:
        (out / "out.mp4").touch()
        os.chown(out / "out.mp4", 61_999, 61_999)
        error = refused(publish, staged, out / "out.mp4", dirs=[out], owner=None)
        assert f"only what belongs to {user_name(os.geteuid())}" in str(error)
        (out / "out.mp4").unlink()
    publish(staged, out / "out.mp4", dirs=[out], owner=None)
    assert (out / "out.mp4").stat().st_uid == os.geteuid()


@pytest.mark.parametrize("way", ["link", "copy", "no links"])
def test_a_file_that_appears_meanwhile(
    staged: Path, out: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Between the last look at the target and its name."""
    target = out / "out.mp4"
    if way == "no links":
        no_link(monkeypatch, errno.EOPNOTSUPP)
    look = outputs.is_replaceable

    def appears(*args: Any) -> bool:
        answer = look(*args)
        if not target.exists():
            target.write_text("precious")
        return answer

    looks = iter([look, appears])
    monkeypatch.setattr("worker.files.publish.is_replaceable", lambda *args: next(looks)(*args))
    error = refused(publish, staged, target, dirs=[out], owner=OTHER, copy=way == "copy")
    assert error.reason is Reason.USER_ERROR
    assert "appeared while the job ran" in str(error)
    assert target.read_text() == "precious"
    assert names(out) == ["a", "out.mp4"]


@pytest.mark.parametrize("component", ["out", "a", "b"])
def test_a_link_that_appears_during_the_walk(
    staged: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    (tmp_path / "foreign/a/b").mkdir(parents=True)
    (tmp_path / "foreign/b").mkdir()
    way = {"out": out, "a": out / "a", "b": out / "a/b"}[component]
    there = {"out": "", "a": "a", "b": "b"}[component]
    real_open = os.open
    swapped: list[str] = []

    def swap(path: str, flags: int, *args: int, **more: int) -> int:
        if path == component and not swapped:
            swapped.append(path)
            way.rename(tmp_path / "away")
            way.symlink_to(tmp_path / "foreign" / there)
        return real_open(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", swap)
    error = refused(publish, staged, out / "a/b/out.mp4", dirs=[out], owner=OTHER)
    assert swapped
    assert error.reason is Reason.PLATFORM_ERROR
    assert "Not a directory" in str(error)
    assert not list(tmp_path.rglob("out.mp4"))


@pytest.mark.parametrize("copy", [False, True])
def test_a_folder_that_becomes_a_link_after_it_was_opened(
    staged: Path, out: Path, tmp_path: Path, copy: bool
) -> None:
    """The file goes where the folder is now: it was opened, and a path is not looked up again."""
    (tmp_path / "foreign").mkdir()

    def swap(_path: Path, _target: Path) -> None:
        (out / "a/b").rename(out / "a/moved")
        (out / "a/b").symlink_to(tmp_path / "foreign")

    publish(staged, out / "a/b/out.mp4", dirs=[out], owner=OTHER, copy=copy, note=swap)
    assert names(tmp_path / "foreign") == []
    assert names(out / "a/moved") == ["out.mp4"]


def test_a_link_that_comes_and_goes(staged: Path, out: Path, tmp_path: Path) -> None:
    """For two seconds, folder and target take turns with links to what is somebody else's."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "out.mp4").write_text("precious")
    (foreign / "out.mp4").chmod(0o600)
    before = (foreign / "out.mp4").lstat()
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            (out / "a").rename(out / "real")
            (out / "a").symlink_to(foreign)
            (out / "a").unlink()
            (out / "real").rename(out / "a")
            (out / "a/link").symlink_to(foreign / "out.mp4")
            (out / "a/link").replace(out / "a/out.mp4")
            (out / "a/out.mp4").unlink(missing_ok=True)

    flipping = threading.Thread(target=flip)
    flipping.start()
    published, errors = 0, 0
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until or not (
            (published and errors) or time.monotonic() > until + 60
        ):
            staged.write_text("new")
            try:
                publish(staged, out / "a/out.mp4", dirs=[out], owner=OTHER, copy=True)
                published += 1
            except JobError:
                errors += 1
    finally:
        stop.set()
        flipping.join()
    after = (foreign / "out.mp4").lstat()
    assert (foreign / "out.mp4").read_text() == "precious"
    assert names(foreign) == ["out.mp4"]
    assert (after.st_uid, after.st_mode, after.st_ino, after.st_nlink) == (
        before.st_uid, before.st_mode, before.st_ino, 1
    )  # fmt: skip
    assert published
    assert errors
    assert not list(out.rglob(".*.part"))


def test_only_a_plain_file_of_its_own_is_published(staged: Path, out: Path) -> None:
    link, hard = staged.with_name("link"), staged.with_name("hard")
    link.symlink_to(staged)
    hard.hardlink_to(staged)
    for path in (link, hard, out / "a"):
        error = refused(publish, path, out / "out.mp4", dirs=[out], owner=OTHER)
        assert "cannot publish the output as" in str(error)
        assert "not a regular file of its own" in str(error)
    assert not (out / "out.mp4").exists()


def test_where_nothing_is_published(staged: Path, out: Path, tmp_path: Path) -> None:
    (out / "way").symlink_to(tmp_path)
    for call in (
        lambda target: publish(staged, target, dirs=[out], owner=OTHER),
        lambda target: check_output(target, None, dirs=[out], owner=OTHER),
    ):
        for target in (tmp_path / "x.mp4", out / "way/x.mp4", out, tmp_path / "no/x.mp4"):
            error = refused(call, target)
            assert error.reason is Reason.USER_ERROR
            assert str(error) == f"output {target} lies outside of OUTPUT_DIRS ({out})"
        assert "must not contain .." in str(refused(call, out / "a/../x.mp4"))
    assert not (tmp_path / "x.mp4").exists()
    error = refused(publish, staged, out / "gone/x.mp4", dirs=[out], owner=OTHER)
    assert "No such file" in str(error)
    assert error.reason is Reason.PLATFORM_ERROR


def test_a_folder_that_is_reached_by_a_link(staged: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(out)
    (out / "short").symlink_to("a/b")
    check_output(tmp_path / "way/short/x.mp4", None, dirs=[tmp_path / "way"], owner=OTHER)
    publish(staged, tmp_path / "way/short/x.mp4", dirs=[out], owner=OTHER)
    assert (out / "a/b/x.mp4").read_text() == "new"


def test_the_workers_own_names(staged: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "jobs/x").mkdir(parents=True)
    (work / "media").mkdir()
    (tmp_path / "link").symlink_to(work / "jobs/x")
    private = (*workers_own(work), *kept_files(work))
    mine = "job_x_output.mp4"
    for target in (
        work / "jobs/x/out.mp4", work / "jobs/out.mp4", tmp_path / "link/out.mp4",
        work / "ledger.db", work / "ledger.db-wal", work / "control.sock", work / "root/x.mp4",
        work / "input_y.mp4", work / "job_y_output.mp4", work / "job_y_output.mkv",
    ):  # fmt: skip
        for error in (
            refused(check_output, target, None, dirs=[work], owner=OTHER, private=private,
                    mine=mine),
            refused(publish, staged, target, dirs=[work], owner=OTHER, private=private,
                    mine=mine),
        ):  # fmt: skip
            assert error.reason is Reason.USER_ERROR
            assert "own files" in str(error)
    for name in (mine, "x.mp4", "media/input_y.mp4", "media/job_y_output.mp4"):
        check_output(work / name, None, dirs=[work], owner=OTHER, private=private, mine=mine)
    publish(staged, work / mine, dirs=[work], owner=OTHER, private=private, mine=mine)


def test_outputs_that_cannot_be(out: Path, tmp_path: Path) -> None:
    source = out / "in.mp4"
    source.write_text("media")
    found = resolve_input(source, [out], gid=None)
    check_output(out / "out.mp4", found, dirs=[out], owner=US)
    for target, words in (
        (out / "no/out.mp4", "output folder .*/out/no does not exist on this node; make it"),
        (out / "in.mp4/out.mp4", "does not exist"),
        (out / "a", "is a folder"),
        (source, "same file as the input"),
    ):
        with pytest.raises(JobError, match=words) as caught:
            check_output(target, found, dirs=[out], owner=US)
        assert caught.value.reason is Reason.USER_ERROR


def test_a_folder_that_is_read_only(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    error = refused(check_output, out / "a/x.mp4", None, dirs=[out], owner=US)
    assert error.reason is Reason.PLATFORM_ERROR
    assert f"ReadWritePaths={out}/a" in str(error)


def test_an_output_that_cannot_be_looked_at(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", fail)
    error = refused(check_output, out / "x.mp4", None, dirs=[out], owner=US)
    assert error.reason is Reason.PLATFORM_ERROR
    assert "cannot be looked at: Permission denied" in str(error)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, Reason.RESOURCE_ERROR), (errno.EIO, Reason.PLATFORM_ERROR)],
)
def test_a_copy_that_fails_leaves_nothing(
    staged: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: Reason
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    error = refused(publish, staged, out / "x.mp4", dirs=[out], owner=OTHER, copy=True)
    assert error.reason is reason
    assert names(out) == ["a"]
    assert staged.read_text() == "new"


def test_it_is_on_the_disk_before_it_has_its_name(
    staged: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, link = os.fsync, os.link

    def sync(fd: int) -> None:
        found = os.fstat(fd)
        events.append("folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_mode & 0o777:o}")
        assert stat.S_ISDIR(found.st_mode) or found.st_uid == OTHER.uid
        fsync(fd)

    def named(*args: Any, **more: Any) -> None:
        events.append("name")
        link(*args, **more)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", named)
    publish(staged, out / "x.mp4", dirs=[out], owner=OTHER)
    assert events == ["644", "name", "folder"]


def test_a_copy_of_the_longest_name_there_can_be(staged: Path, out: Path) -> None:
    target = out / f"{'ü' * 125}.mp4"  # 254 of the 255 bytes of NAME_MAX
    assert publish(staged, target, dirs=[out], owner=OTHER, copy=True) == 3
    assert target.read_text() == "new"


def test_descriptors_are_closed(staged: Path, out: Path) -> None:
    before = len(names("/proc/self/fd"))
    for number in range(3):
        publish(staged, out / f"{number}.mp4", dirs=[out], owner=OTHER, copy=True)
        refused(publish, staged, out / "a", dirs=[out], owner=OTHER)
        refused(publish, staged, out / "no/x", dirs=[out], owner=OTHER)
    assert len(names("/proc/self/fd")) == before


def test_owners() -> None:
    me = pwd.getpwuid(0)
    group = grp.getgrall()[-1]
    assert owner_of(me.pw_name) == Owner(0, me.pw_gid, me.pw_name)
    assert owner_of("0") == Owner(0, me.pw_gid, "0")
    text = f"{me.pw_name}:{group.gr_name}"
    assert owner_of(text) == Owner(0, group.gr_gid, text)
    assert owner_of("61234:61235") == Owner(61_234, 61_235, "61234:61235")
    for text, words in (
        ("", "no user ''"),
        ("no-such-user", "no user 'no-such-user'; make it or name another"),
        (f"{me.pw_name}:no-such-group", "no group 'no-such-group'"),
        (f"{me.pw_name}:", "no group ''"),
        ("61234", "must name a group, too"),
        ("4294967295:0", "no number of either"),
        ("0:4294967295", "no number of either"),
        ("-1:0", "no user '-1'"),
    ):
        with pytest.raises(ValueError, match=words):
            owner_of(text)
    assert user_name(61_234) == "61234"


def test_what_a_dead_agent_left_of_a_copy_is_taken_up(staged: Path, out: Path) -> None:
    class DiedError(Exception):
        pass

    def die(_staged: Path, _target: Path) -> None:
        raise DiedError

    left = out / f".out.mp4.{staged.stat().st_ino:x}.part"
    left.write_text("half")  # an agent that is killed cannot remove it
    left.chmod(0o600)
    with pytest.raises(DiedError):
        publish(staged, out / "out.mp4", dirs=[out], owner=None, copy=True, note=die)
    left.write_text("half")
    publish(staged, out / "out.mp4", dirs=[out], owner=None, copy=True)
    assert names(out) == ["a", "out.mp4"]
    assert (out / "out.mp4").read_text() == staged.read_text()
