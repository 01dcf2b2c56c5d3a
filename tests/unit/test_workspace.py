"""The folder of a job: its lock, what a crash left of it, which part of it is the job's."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from worker import workspace
from worker.errors import JobError, Reason, WorkerError
from worker.files.beneath import resolve_input
from worker.files.publish import publish
from worker.workspace import Workspace


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    first = Workspace.create(tmp_path / "jobs", "x")
    with pytest.raises(JobError, match="another process") as caught:
        Workspace.create(tmp_path / "jobs", "x")
    assert caught.value.reason is Reason.PLATFORM_ERROR
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700

    first.remove()
    first.remove()

    Workspace.create(tmp_path / "jobs", "x").remove()
    assert list((tmp_path / "jobs").iterdir()) == []


def test_what_a_crash_left_is_found_and_replaced(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    (left / "main.out").write_text("old")
    held = Workspace.create(tmp_path, "held")
    (tmp_path / "link").symlink_to("/etc")
    assert list(workspace.abandoned(tmp_path)) == [left]

    taken = Workspace.create(tmp_path, "left")

    assert list(left.iterdir()) == [taken.files]
    assert list(taken.files.iterdir()) == []
    assert list(workspace.abandoned(tmp_path)) == []
    taken.remove()
    held.remove()


def test_no_folder_yet_means_nothing_is_left(tmp_path: Path) -> None:
    assert list(workspace.abandoned(tmp_path / "jobs")) == []


def test_clear_keeps_the_folder_and_follows_no_link(tmp_path: Path) -> None:
    space = Workspace.create(tmp_path / "jobs", "x")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("keep")
    (space.path / "link").symlink_to(tmp_path / "precious")
    (space.path / "folder").mkdir()
    (space.path / "folder/file").write_text("gone")

    space.clear()

    assert list(space.path.iterdir()) == []
    assert (tmp_path / "precious/file").read_text() == "keep"
    space.remove()


def test_a_work_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkerError, match="WORK_DIR"):
        workspace.require_work_dir(tmp_path / "file")
    assert workspace.require_work_dir(tmp_path / "a/b") == tmp_path / "a/b/jobs"
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_went_away_is_clear(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = Workspace.create(tmp_path / "jobs", "x")
    space.files.rmdir()
    space.path.rmdir()
    space.clear()
    space.remove()
    assert caplog.text == ""


@pytest.mark.parametrize("make", [Workspace.create, Workspace.reopen])
@pytest.mark.parametrize("with_group", [False, True])
def test_only_one_folder_is_the_jobs(
    tmp_path: Path, make: Callable[..., Workspace], with_group: bool
) -> None:
    group = a_group() if with_group else None
    umask = os.umask(0o077)
    try:
        space = make(tmp_path / "jobs", "x", group)
    finally:
        os.umask(umask)
    inside, above = space.files.stat(), space.path.stat()
    assert stat.S_IMODE(above.st_mode) == 0o700
    assert stat.S_IMODE(inside.st_mode) == (0o770 if with_group else 0o700)
    assert inside.st_gid == (group if with_group else above.st_gid)
    assert inside.st_uid == above.st_uid == os.geteuid()
    for path in (space.log("main"), space.input(), space.output(".mkv")):
        assert path.parent == space.files
    assert space.stdout("main") == space.path / "main.out"
    space.remove()
    assert not space.path.exists()


def a_group() -> int:
    """One that we may give files to: any for root, else our own."""
    return 61_235 if os.geteuid() == 0 else os.getgid()


def test_a_folder_of_a_version_without_one_for_the_job(tmp_path: Path) -> None:
    (tmp_path / "jobs/x").mkdir(parents=True)
    (tmp_path / "jobs/x/main.log").write_text("old")
    space = Workspace.reopen(tmp_path / "jobs", "x", a_group())
    assert space.files.is_dir()
    assert (space.path / "main.log").read_text() == "old"
    space.let_go()
    Workspace.reopen(tmp_path / "jobs", "x", a_group()).remove()


def test_a_link_is_no_folder_for_the_job(tmp_path: Path) -> None:
    (tmp_path / "jobs/x").mkdir(parents=True)
    (tmp_path / "jobs/x/files").symlink_to(tmp_path)
    for _ in range(2):
        with pytest.raises(JobError, match="Not a directory") as caught:
            Workspace.reopen(tmp_path / "jobs", "x", a_group())
        assert caught.value.reason is Reason.PLATFORM_ERROR
        # Nobody holds it after that.
        assert list(workspace.abandoned(tmp_path / "jobs")) == [tmp_path / "jobs/x"]


def test_an_output_is_taken_out_of_reach(tmp_path: Path) -> None:
    space = Workspace.create(tmp_path / "jobs", "x", a_group())
    assert space.take_output(".mp4") is None
    assert space.take_input() is None
    for path in (space.output(".mp4"), space.input()):
        path.write_text("media")
        path.chmod(0o600)
    assert space.take_input() == 5
    for _ in range(2):
        assert space.take_output(".mp4") == space.path / "output.mp4"
    for path in (space.path / "output.mp4", space.input()):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (os.geteuid(), a_group())
        assert stat.S_IMODE(found.st_mode) == 0o640
    space.let_go()
    again = Workspace.reopen(tmp_path / "jobs", "x", a_group())
    assert again.take_output(".mp4") == again.path / "output.mp4"
    again.remove()


def test_what_is_no_output_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    space = Workspace.create(tmp_path / "jobs", "x", a_group())
    space.output(".mp4").symlink_to(tmp_path / "secret")
    space.input().hardlink_to(tmp_path / "secret")
    for take in (lambda: space.take_output(".mp4"), space.take_input):
        with pytest.raises(JobError, match="not a regular file of its own") as caught:
            take()
        assert caught.value.reason is Reason.RUNTIME_ERROR
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    space.remove()
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dies_before", [False, True])
def test_whether_it_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: bool, dies_before: bool
) -> None:
    """An agent that dies at any moment leaves what tells the next one, with a copy, too."""

    class Died(BaseException):
        pass

    def die(*_args: object, **_more: object) -> None:
        raise Died

    (tmp_path / "out").mkdir()
    (tmp_path / "way").symlink_to("out")
    target = tmp_path / "out/x.mp4"
    space = Workspace.create(tmp_path / "jobs", "x", a_group())
    space.output(".mp4").write_text("media")
    staged = space.take_output(".mp4")
    assert staged is not None
    assert space.published() is None
    with monkeypatch.context() as patched:
        # Either does not come to the name, or not to what follows it.
        patched.setattr(os, "link" if dies_before else "unlink", die)
        with pytest.raises(Died):
            publish(
                staged, tmp_path / "way/x.mp4", dirs=[tmp_path], owner=None, copy=copy,
                note=space.publishing,
            )  # fmt: skip
    space.let_go()
    again = Workspace.reopen(tmp_path / "jobs", "x", a_group())
    assert again.published() == (None if dies_before else target)
    if dies_before:
        assert again.take_output(".mp4") == staged
        publish(staged, target, dirs=[tmp_path], owner=None, note=again.publishing)
    assert again.published() == target
    assert target.stat().st_nlink == 1
    assert list((tmp_path / "out").iterdir()) == [target]
    again.remove()
    assert target.read_text() == "media"


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"target": 1}', '{"target": "/nothing"}'])
def test_a_note_that_was_cut_short(tmp_path: Path, text: str) -> None:
    space = Workspace.create(tmp_path / "jobs", "x")
    (space.path / "publishing.json").write_text(text)
    assert space.published() is None
    space.remove()


def test_a_job_that_fills_its_folder(tmp_path: Path) -> None:
    space = Workspace.create(tmp_path / "jobs", "x")
    for name in ("a/b/c", "d"):
        (space.files / name).mkdir(parents=True)
        (space.files / name / "\udcff").symlink_to("/etc")
    space.stdout("main").write_text("text")
    space.clear()
    assert list(space.path.iterdir()) == []
    space.remove()
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_note_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("media")
    found = (tmp_path / "x.mp4").stat()
    note = {"target": str(tmp_path / "x.mp4"), "device": found.st_dev, "inode": found.st_ino}
    space = Workspace.create(tmp_path / "jobs", "x")
    (space.path / "publishing.json").write_text(json.dumps(note))
    assert space.published() == tmp_path / "x.mp4"
    space.remove()


@pytest.mark.parametrize("copied", [False, True])
def test_a_pinned_input_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if copied:
        monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "in.mp4"
    source.write_text("good")
    found = resolve_input(source, [tmp_path], gid=None)
    space = Workspace.create(tmp_path / "jobs", "x", a_group())
    pinned = space.pin(found)
    assert (pinned.path.stat().st_nlink == 1) == copied
    source.rename(tmp_path / "away.mp4")
    source.write_text("another")
    assert pinned.steady
    assert pinned.path.parent == space.path
    assert pinned.path.read_text() == "good"
    with pytest.raises(OSError, match="replaced meanwhile"):
        space.pin(found)
