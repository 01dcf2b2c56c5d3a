"""The files of a job: locks, leftovers, what may be read, how an output is published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker import workspace
from worker.errors import JobError, Reason, WorkerError
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

    assert list(left.iterdir()) == []
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


def test_reading_a_file_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert workspace.read_ends(path) == workspace.read_tail(path) == ""
    path.write_text("short\n")
    assert workspace.read_ends(path) == workspace.read_tail(path) == "short\n"
    path.write_bytes(b"first\n" + b"\xff" * 2_000_000 + b"\nlast")
    text = workspace.read_ends(path)
    assert text.startswith("first\n")
    assert text.endswith("\nlast")
    assert len(text) < 400_000
    assert workspace.read_tail(path, 5) == "\nlast"


def test_inputs(tmp_path: Path) -> None:
    good, empty, pipe = tmp_path / "good", tmp_path / "empty", tmp_path / "pipe"
    good.write_text("media")
    empty.touch()
    os.mkfifo(pipe)
    assert workspace.check_input(good) == 5
    for path, words in (
        (tmp_path / "missing", "does not exist"),
        (empty, "is empty"),
        (pipe, "not a regular file"),
        (tmp_path, "not a regular file"),
        (good / "below", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(JobError, match=words) as caught:
            workspace.check_input(path)
        assert caught.value.reason is Reason.INPUT_ERROR


def test_outputs(tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    source.write_text("media")
    (tmp_path / "same.mp4").symlink_to(source)
    workspace.check_output(tmp_path / "out.mp4", source)
    for path, words in (
        (tmp_path / "no/out.mp4", "does not exist"),
        (tmp_path, "is a folder"),
        (source, "same file as the input"),
        (tmp_path / "same.mp4", "same file as the input"),
    ):
        with pytest.raises(JobError, match=words) as caught:
            workspace.check_output(path, source)
        assert caught.value.reason is Reason.USER_ERROR


def test_no_output_among_the_folders_of_jobs(tmp_path: Path) -> None:
    (tmp_path / "jobs/other").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "jobs/other")
    workspace.check_output(tmp_path / "out.mp4", None, tmp_path / "jobs")
    for folder in ("jobs", "jobs/other", "link"):
        with pytest.raises(JobError, match="own files") as caught:
            workspace.check_output(tmp_path / folder / "out.mp4", None, tmp_path / "jobs")
        assert caught.value.reason is Reason.USER_ERROR


def staged(tmp_path: Path) -> Path:
    path = tmp_path / "staged"
    path.write_text("new")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("copy", [False, True])
def test_publishing_replaces_a_link_instead_of_following_it(tmp_path: Path, copy: bool) -> None:
    precious, target = tmp_path / "precious", tmp_path / "out.mp4"
    precious.write_text("keep")
    target.symlink_to(precious)

    assert workspace.publish(staged(tmp_path), target, copy=copy) == 3

    assert precious.read_text() == "keep"
    assert not target.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "staged").exists() is copy
    assert not list(tmp_path.glob(".*.part"))


def test_only_a_plain_file_of_its_own_is_published(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(secret)
    hard.hardlink_to(secret)
    for path in (link, hard, tmp_path):
        with pytest.raises(JobError, match="cannot publish"):
            workspace.publish(path, target)
    assert not target.exists()


def test_publishing_into_a_folder_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="No such file") as caught:
        workspace.publish(staged(tmp_path), tmp_path / "gone/out.mp4")
    assert caught.value.reason is Reason.PLATFORM_ERROR


def test_a_work_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkerError, match="WORK_DIR"):
        workspace.require_work_dir(tmp_path / "file")
    assert workspace.require_work_dir(tmp_path / "a/b") == tmp_path / "a/b/jobs"
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700


def test_a_copy_of_the_longest_name_there_can_be(tmp_path: Path) -> None:
    target = tmp_path / f"{'ü' * 125}.mp4"  # 254 of the 255 bytes of NAME_MAX
    assert workspace.publish(staged(tmp_path), target, copy=True) == 3
    assert target.read_text() == "new"


def test_a_folder_that_went_away_is_clear(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = Workspace.create(tmp_path / "jobs", "x")
    space.path.rmdir()
    space.clear()
    assert "cannot clear" in caplog.text
    space.remove()


def test_an_output_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(JobError, match="Permission denied") as caught:
        workspace.check_output(tmp_path / "out.mp4", None)
    assert caught.value.reason is Reason.PLATFORM_ERROR


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("four")
    (tmp_path / "link").symlink_to("file")
    sizes = [workspace.size_of(tmp_path / name) for name in ("file", "link", "nothing")]
    assert sizes == [4, None, None]


@pytest.mark.parametrize("lines", [1, 4_000, 20_000])
def test_the_ends_of_a_log_are_whole_lines(tmp_path: Path, lines: int) -> None:
    line = "[info] http://user:secret@host"
    path = tmp_path / "main.log"
    path.write_text("".join(f"{line}/{number:06}\n" for number in range(lines)))
    read = workspace.read_ends(path).splitlines()
    assert len(read) <= lines
    assert all(one.startswith(line) and len(one) == len(line) + 7 for one in read)
    assert read[0].endswith("/000000")
    assert read[-1].endswith(f"/{lines - 1:06}")
