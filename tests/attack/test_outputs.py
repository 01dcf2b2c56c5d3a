"""Outputs: where a job may put its file, and what may stand there by the time it does."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.conftest import folder_for_now, intruding
from tests.attack.sharing import (
    ELSEWHERE,
    HELD,
    INPUT,
    STRANGER,
    Maker,
    Scene,
    assert_good,
    attacked,
    give_away,
    ids_of,
    link,
    ours,
    swapping,
    writing,
)
from tests.e2e.conftest import WORK_DIR

CASE = WORK_DIR / "case"
JOBS_IN_A_RACE = 20


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    ELSEWHERE.mkdir(mode=0o755)
    with intruding() as intruder:
        intruder.order("wait", bitrate=HELD, then="transcode")
        with attacked() as scene:
            yield scene
    shutil.rmtree(ELSEWHERE)


@pytest.fixture
def case() -> Iterator[Path]:
    """A folder among the outputs."""
    with folder_for_now(CASE) as folder:
        yield folder


OUTSIDE, OWN = "lies outside of OUTPUT_DIRS", "is the worker's own"
AMONG = "is among the worker's own files"
DOTS, ABSOLUTE = "must not contain . or ..", "must be an absolute path"
A_LINK, NOT_OURS = "it is a symbolic link", "outputs replace only what belongs to ffmpeg-worker"


REFUSED = {
    "of the system": ("/etc/cron.d/x.mp4", OUTSIDE),
    "of root": ("/root/x.mp4", OUTSIDE),
    "scratch": ("/tmp/x.mp4", OUTSIDE),
    "beside the folder": (f"{WORK_DIR}-old/x.mp4", OUTSIDE),
    "device": ("/dev/null.mp4", OUTSIDE),
    "shared memory": ("/dev/shm/x.mp4", OUTSIDE),
    "by proc": (f"/proc/self/root{WORK_DIR}/x.mp4", OUTSIDE),
    "descriptor": ("/proc/self/fd/1.mp4", OUTSIDE),
    "up": (f"{WORK_DIR}/../x.mp4", DOTS),
    "up and down": (f"{WORK_DIR}/case/../x.mp4", DOTS),
    "dot": (f"{WORK_DIR}/./x.mp4", DOTS),
    "relative": ("x.mp4", ABSOLUTE),
    "option": ("-y.mp4", ABSOLUTE),
    "protocol": (f"file:{WORK_DIR}/x.mp4", ABSOLUTE),
    "tee": (f"tee:{WORK_DIR}/x.mp4", ABSOLUTE),
    "URL": ("http://127.0.0.1/x.mp4", ABSOLUTE),
    "file URL": (f"file://{WORK_DIR}/x.mp4", ABSOLUTE),
    "no suffix": (f"{WORK_DIR}/ledger", "its suffix must be one of"),
    "shell script": (f"{WORK_DIR}/x.sh", "its suffix must be one of"),
    "playlist": (f"{WORK_DIR}/x.m3u8", "its suffix must be one of"),
    "pattern": (f"{WORK_DIR}/x%03d.png", "its suffix must be one of"),
    "newline": (f"{WORK_DIR}/x\n.mp4", "must not contain control characters"),
    "NUL": (f"{WORK_DIR}/x\0.mp4", "must not contain control characters"),
    "input": (str(INPUT), "must not be the input itself"),
    "input with slashes": (f"{WORK_DIR}//media///in.mp4", "must not be the input itself"),
    "ledger": (f"{WORK_DIR}/ledger.db/x.mp4", OWN),
    "other job's output": (f"{WORK_DIR}/job_other_output.mp4", AMONG),
    "other job's output with slashes": (f"{WORK_DIR}//job_other_output.mp4", AMONG),
    "kept input": (f"{WORK_DIR}/input_x.mp4", AMONG),
    "folder of jobs": (f"{WORK_DIR}/jobs/x.mp4", OWN),
    "other job's folder": (f"{WORK_DIR}/jobs/other/files/output.mp4", OWN),
    "root of jobs": (f"{WORK_DIR}/root/x.mp4", OWN),
    "library of jobs": (f"{WORK_DIR}/root/usr/lib/x.mp4", OWN),
    "missing folder": (f"{WORK_DIR}/missing/x.mp4", "does not exist on this node; make it first"),
    "file for a folder": (f"{WORK_DIR}/ledger.db-wal/x.mp4", OWN),
}


@pytest.mark.parametrize(("name", "text"), REFUSED.values(), ids=REFUSED)
def test_a_name_that_is_refused(scene: Scene, name: str, text: str) -> None:
    scene.turns_down(writing(name), text)


def of(uid: int, gid: int = 0, mode: int = 0o666) -> Maker:
    def make(path: Path) -> None:
        path.write_bytes(b"somebody's")
        os.chown(path, uid, gid)
        path.chmod(mode)

    return make


def hard_linked(path: Path) -> None:
    ours(path)
    os.link(path, path.with_name("other name"))


def another_name_of_ours(path: Path) -> None:
    ours(path.with_name("old.mp4"))
    path.symlink_to("old.mp4")


TAKEN: dict[str, tuple[str, Maker, str]] = {
    "link to passwd": ("x.mp4", link("/etc/passwd"), A_LINK),
    "dangling link": ("x.mp4", link("/etc/new.mp4"), A_LINK),
    "link to ours": ("x.mp4", another_name_of_ours, A_LINK),
    "link to the input": ("x.mp4", link(INPUT), A_LINK),
    "link to itself": ("x.mp4", link("x.mp4"), A_LINK),
    "input's other name": ("x.mp4", lambda path: os.link(INPUT, path), "same file as the input"),
    "folder": ("x.mp4", Path.mkdir, "is a folder; name a file"),
    "named pipe": ("x.mp4", os.mkfifo, "it is a named pipe"),
    "device": (
        "x.mp4",
        lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        "it is a device",
    ),
    "ours with two names": ("x.mp4", hard_linked, "it has other names (hard links), too"),
    "a stranger's": ("x.mp4", of(STRANGER, STRANGER), NOT_OURS),
    "of our group": (
        "x.mp4",
        lambda path: of(STRANGER, ids_of("ffmpeg-worker")[1])(path),
        NOT_OURS,
    ),
    "root's": ("x.mp4", of(0), NOT_OURS),
    "folder leads out": ("out/x.mp4", lambda path: link(ELSEWHERE)(path.parent), OUTSIDE),
    "folder leads to etc": ("out/x.mp4", lambda path: link("/etc")(path.parent), OUTSIDE),
    "folder leads to jobs": ("out/x.mp4", lambda path: link("../jobs")(path.parent), AMONG),
    "folder leads to root": ("out/x.mp4", lambda path: link("../root")(path.parent), AMONG),
    "folder leads to outputs": (
        "out/input_.mp4",
        lambda path: link("..")(path.parent),
        AMONG,
    ),
    "folder leads to itself": ("out/x.mp4", lambda path: link("out")(path.parent), "not exist"),
    "folder leads nowhere": ("out/x.mp4", lambda path: link("gone")(path.parent), "not exist"),
    "folder leads out, dangling": ("out/x.mp4", lambda path: link("/x/y")(path.parent), OUTSIDE),
}


@pytest.mark.parametrize(("name", "make", "text"), TAKEN.values(), ids=TAKEN)
def test_what_stands_there_before(
    scene: Scene, case: Path, name: str, make: Maker, text: str
) -> None:
    make(case / name)
    scene.turns_down(writing(case / name), text)


def gone(path: Path) -> None:
    shutil.rmtree(path.parent)


def swapped(target: object) -> Maker:
    """The folder is moved away, and a link stands there instead."""

    def make(path: Path) -> None:
        path.parent.rename(path.parent.with_name("moved"))
        path.parent.symlink_to(str(target))

    return make


MEANWHILE: dict[str, tuple[Maker, str, str]] = {
    "link to passwd": (link("/etc/passwd"), "user_error", A_LINK),
    "dangling link": (link("/etc/new.mp4"), "user_error", A_LINK),
    "folder": (Path.mkdir, "user_error", "is a folder; name a file"),
    "named pipe": (os.mkfifo, "user_error", "it is a named pipe"),
    "root's file": (of(0), "user_error", NOT_OURS),
    "a stranger's file": (of(STRANGER), "user_error", NOT_OURS),
    "input's other name": (lambda path: os.link(INPUT, path), "user_error", "hard links"),
    "folder leads out": (swapped(ELSEWHERE), "user_error", OUTSIDE),
    "folder leads to etc": (swapped("/etc"), "user_error", OUTSIDE),
    "folder leads to jobs": (swapped("../jobs"), "user_error", AMONG),
    "folder is gone": (gone, "platform_error", "cannot publish the output as"),
}


@pytest.mark.parametrize(("make", "reason", "text"), MEANWHILE.values(), ids=MEANWHILE)
def test_what_appears_while_the_job_runs(
    scene: Scene, case: Path, make: Maker, reason: str, text: str
) -> None:
    target = case / "out/x.mp4"
    target.parent.mkdir(mode=0o755)
    job_id = scene.begin(writing(target, bitrate=HELD))
    make(target)
    scene.take_note()

    result = scene.end(job_id)

    assert result["metrics"]["failure_reason"] == reason, result
    assert text in result["error"]
    scene.unharmed()


def publishes(scene: Scene, target: Path, labels: dict[str, str] | None = None) -> None:
    scene.take_note()
    result = scene.run(writing(target), labels)
    assert result["status"] == "completed", result
    assert_good(target)
    scene.unharmed(target)


@pytest.mark.parametrize("before", [None, ours], ids=["new", "older one"])
def test_a_good_output(scene: Scene, case: Path, before: Maker | None) -> None:
    target = case / "x.mp4"
    if before is not None:
        before(target)
    publishes(scene, target)


@pytest.mark.parametrize("name", ["media/x.mp4", "ledger.db-x.mp4", "control.sock.mp4", "jobs.mp4"])
def test_what_only_looks_like_the_workers_own(scene: Scene, name: str) -> None:
    publishes(scene, WORK_DIR / name)
    (WORK_DIR / name).unlink()


def test_a_job_may_name_its_own_default(scene: Scene) -> None:
    target = WORK_DIR / "job_mine_output.mp4"
    publishes(scene, target, {"id": "mine"})
    target.unlink()


def test_two_jobs_for_one_target(scene: Scene, case: Path) -> None:
    target = case / "x.mp4"
    scene.take_note()
    jobs = [scene.begin(writing(target, bitrate=HELD)) for _ in range(2)]
    for job_id in jobs:
        (scene.files(job_id) / "go").touch()

    results = [scene.ended(job_id) for job_id in jobs]

    done = [result for result in results if result["status"] == "completed"]
    assert done
    for result in results:
        if result not in done:
            assert "appeared while the job ran" in result["error"]
    assert_good(target)
    scene.unharmed(target)


RACES = {"the folder is swapped for a link": "out/x.mp4", "the target is swapped": "x.mp4"}


@pytest.mark.parametrize("name", RACES.values(), ids=RACES)
def test_a_race_for_the_output(scene: Scene, case: Path, name: str) -> None:
    """Who may write in a folder of outputs, against the agent."""
    scene.take_note()
    target, link = case / name, case / "link"
    place, victim = case / name.partition("/")[0], ELSEWHERE / "victim"
    ours(victim)
    if place == target:
        ours(target)
        link.symlink_to(victim)
    else:
        place.mkdir()
        link.symlink_to(ELSEWHERE)
    os.chown(case, STRANGER, STRANGER)
    give_away(link)

    with swapping(place, link):
        jobs = [scene.master.submit(writing(target))["id"] for _ in range(JOBS_IN_A_RACE)]
        results = [scene.ended(job, 120) for job in jobs]

    for result in results:
        if result["status"] != "completed":
            assert result["metrics"]["failure_reason"] in ("user_error", "platform_error"), result
    told = Counter(result.get("error", "completed") for result in results)
    print(told)
    assert len(told) > 1, "both sides had their luck"
    assert list(case.rglob(".*")) == []
    assert list(ELSEWHERE.iterdir()) == [victim]
    assert victim.read_bytes() == b"older"
    victim.unlink()
    shutil.rmtree(case)
    case.mkdir()
    scene.unharmed()
