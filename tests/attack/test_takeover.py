"""A job that was taken over leaves traps for the agent: in its output, its log, its folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, Intruder, Result, intruding
from tests.attack.sharing import HELD, INPUT, Scene, attacked, reading, seconds_of, writing
from tests.e2e.conftest import WORK_DIR, job_cgroups, until
from tests.slowness import SLOWNESS

TARGET = WORK_DIR / "out.mp4"
LARGEST_RESULT = 256 * 1024
LONGEST_PAUSE = 5.0
"""Seconds between two heartbeats, where one is due each second."""


@pytest.fixture(scope="module")
def intruder() -> Iterator[Intruder]:
    with intruding() as intruder:
        intruder.order("wait", bitrate=HELD, then="transcode")
        yield intruder


@pytest.fixture(scope="module")
def scene(intruder: Intruder) -> Iterator[Scene]:
    with attacked() as scene:
        yield scene


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each job's folder goes, whatever it has left there."""
    yield
    TARGET.unlink(missing_ok=True)
    until(lambda: not list(WORK_DIR.glob("jobs/*")), 120, "a job's folder is left")


def assert_decent(scene: Scene, result: Result) -> None:
    """Nothing of a secret file in it, nothing that a terminal obeys, and no more than is read."""
    text = json.dumps(result, ensure_ascii=False)
    assert "root:" not in text
    assert len(text.encode()) < LARGEST_RESULT
    for told in (*result.get("logs", "").splitlines(), *scene.worker.log().splitlines()):
        assert told.isprintable() or told.replace("\t", "").isprintable(), told


NOT_PLAIN = "output.mp4 is not a regular file of its own: the job put something else in its place"
PUT: dict[str, tuple[dict[str, str], str]] = {
    "link to shadow": ({"kind": "symlink", "target": "/etc/shadow"}, NOT_PLAIN),
    "link to the input": ({"kind": "symlink", "target": str(INPUT)}, NOT_PLAIN),
    "link to the true output": ({"kind": "symlink", "target": "other"}, NOT_PLAIN),
    "link to the ledger": ({"kind": "symlink", "target": "../../../ledger.db"}, NOT_PLAIN),
    "dangling link": ({"kind": "symlink", "target": "/etc/new"}, NOT_PLAIN),
    "named pipe": ({"kind": "fifo"}, NOT_PLAIN),
    "folder": ({"kind": "folder"}, NOT_PLAIN),
    "socket": ({"kind": "socket"}, NOT_PLAIN),
    "hard link": ({"kind": "hard link"}, NOT_PLAIN),
    "nothing": ({"kind": ""}, "ffmpeg ended well but left no output"),
    "nothing in it": ({"kind": "text", "target": ""}, "output"),
    "garbage": ({"kind": "garbage"}, "output"),
    "playlist of shadow": (
        {"kind": "text", "target": "ffconcat version 1.0\nfile '/etc/shadow'\n"},
        "output",
    ),
    "playlist of the input": (
        {"kind": "text", "target": f"ffconcat version 1.0\nfile '{INPUT}'\n"},
        "output",
    ),
}


@pytest.mark.parametrize(("order", "text"), PUT.values(), ids=PUT)
def test_in_the_place_of_the_output(
    scene: Scene, intruder: Intruder, order: dict[str, str], text: str
) -> None:
    intruder.order("swap_files", what="output", **order)
    scene.take_note()

    result = scene.refused(writing(TARGET), text, reason="runtime_error")

    assert_decent(scene, result)
    scene.unharmed()


LOGS: dict[str, dict[str, Any]] = {
    "link to shadow": {"kind": "symlink", "target": "/etc/shadow"},
    "link to the ledger": {"kind": "symlink", "target": "../../../ledger.db"},
    "link to the output": {"kind": "symlink", "target": "output.mp4"},
    "named pipe": {"kind": "fifo"},
    "folder": {"kind": "folder"},
    "socket": {"kind": "socket"},
    "hard link": {"kind": "hard link"},
    "garbage": {"kind": "garbage"},
    "100 MB of lines": {"kind": "text", "target": "[error] x\n" * 1000, "times": 10_000},
    "100 MB in one line": {"kind": "text", "target": "[error] x" * 1000, "times": 11_000},
    "NULs": {"kind": "text", "target": "\0" * 1000, "times": 1000},
    "terminal escapes": {
        "kind": "text",
        "target": "[error] \x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\u202egpj\r\x08\x7f\u2028\ufeff\n",
        "times": 100,
    },
    "what a master runs again": {
        "kind": "text",
        "target": "[error] worker died: connection refused, timeout\n",
        "times": 100,
    },
}


@pytest.mark.parametrize("status", [0, 1], ids=["ends well", "fails"])
@pytest.mark.parametrize("order", LOGS.values(), ids=LOGS)
def test_in_the_place_of_the_log(
    scene: Scene, intruder: Intruder, order: dict[str, Any], status: int
) -> None:
    intruder.order("swap_files", what="log", status=status, **order)
    scene.take_note()

    result = scene.run(writing(TARGET))

    assert_decent(scene, result)
    if status:
        assert result["status"] == "failed"
        for word in ("worker died", "connection refused", "timeout"):
            assert word not in result["error"]
        scene.unharmed()
    else:
        assert result["status"] == "completed", result
        scene.unharmed(TARGET)


@pytest.mark.parametrize("mode", [0o777, 0o000], ids=["for everybody", "for nobody"])
def test_rights_on_the_output(scene: Scene, intruder: Intruder, mode: int) -> None:
    intruder.order("change_modes", mode=mode, status=0)
    scene.take_note()

    result = scene.run(writing(TARGET))

    assert result["status"] == "completed", result
    found = intruder.found(result)
    assert found.pop("another mode").startswith("ALLOWED")
    assert found.pop("access list").startswith("ALLOWED"), "else it shows nothing here"
    assert {name: text for name, text in found.items() if not text.startswith("denied")} == {}
    assert TARGET.stat().st_mode & 0o7777 == 0o644
    assert os.listxattr(TARGET) == []
    assert seconds_of(TARGET) == pytest.approx(1, abs=0.2)
    scene.unharmed(TARGET)


def test_what_is_in_the_way_of_cleaning_up(scene: Scene, intruder: Intruder) -> None:
    intruder.order("lock_up", status=0)
    scene.take_note()

    result = scene.run(writing(TARGET))

    found = intruder.found(result)
    assert {name: text for name, text in found.items() if not text.startswith("denied")} == {}
    assert result["status"] == "completed", result
    assert_decent(scene, result)
    scene.unharmed(TARGET)


def longest_pause(scene: Scene, job_id: str) -> float:
    """Seconds between two heartbeats until nothing of the job is left."""
    beats, since, longest = 0, time.monotonic(), 0.0
    folder = WORK_DIR / "jobs" / job_id
    while scene.master.job(job_id)["status"] not in ("completed", "failed") or folder.exists():
        now = time.monotonic()
        longest = max(longest, now - since)
        if (count := len(scene.master.seen("POST /nodes/*/heartbeat"))) > beats:
            beats, since = count, now
        time.sleep(0.02)
    return longest


@pytest.mark.parametrize(
    ("do", "order"),
    [("dig", {"depth": 20_000}), ("litter", {"count": 200_000})],
    ids=["20,000 deep", "200,000 names"],
)
def test_a_tree_left_behind(
    scene: Scene, intruder: Intruder, do: str, order: dict[str, int]
) -> None:
    intruder.order(do, then="transcode", **order)
    scene.take_note()
    scene.master.submit(writing(TARGET), {"id": do})

    pause = longest_pause(scene, do)

    result = scene.ended(do)
    assert result["metrics"]["failure_reason"] == "resource_error", result
    assert "cannot be checked: " in result["error"]
    assert pause < LONGEST_PAUSE * SLOWNESS
    scene.unharmed()


def test_a_process_left_behind(scene: Scene, intruder: Intruder) -> None:
    """It could write to the output after that was checked."""
    intruder.order("leave_a_child", then="transcode")
    scene.take_note()

    scene.refused(writing(TARGET), "left 1 processes behind", reason="runtime_error")

    until(lambda: job_cgroups() == [], name="the process lives on")
    scene.unharmed()


def _block(**values: object) -> str:
    return "".join(f"{name}={value}\n" for name, value in (values | {"progress": "end"}).items())


HUGE = 10**18
FLOODS: dict[str, dict[str, Any]] = {
    "garbage": {"text": "", "garbage": 50_000_000},
    "one line": {"text": "x" * 1000, "times": 50_000},
    "progress": {
        "text": _block(frame=HUGE, fps="1e308", out_time_us=HUGE, total_size=HUGE, speed="1e308x"),
        "times": 1000,
    },
    "no numbers": {
        "text": _block(frame="nan", fps="inf", out_time_us="-1", total_size="9" * 4000, speed="x"),
        "times": 1000,
    },
    "usage": {
        "text": f"CGROUP/memory.peak:{HUGE}\nCGROUP/cpu.stat:usage_usec {HUGE}\n"
        f"CGROUP/memory.events:oom_kill {HUGE}\nCGROUP/pids.events:max {HUGE}\n"
        f"CGROUP/io.stat:8:0 rbytes={HUGE} wbytes={HUGE}\n"
        f"CGROUP/cpu.pressure:some avg10=0.00 avg60=0.00 avg300=0.00 total={HUGE}\n",
        "times": 2,
    },
}


@pytest.mark.parametrize("then", ["transcode", ""], ids=["ends well", "fails"])
@pytest.mark.parametrize("order", FLOODS.values(), ids=FLOODS)
def test_standard_output(
    scene: Scene, intruder: Intruder, order: dict[str, Any], then: str
) -> None:
    intruder.order("flood", then=then, **order)
    scene.take_note()

    result = scene.run(writing(TARGET))

    assert_decent(scene, result)
    json.dumps(result, allow_nan=False)
    metrics = result["metrics"]
    assert metrics.get("memory_peak_bytes", 0) < 2**40, "its own word is not taken for the kernel's"
    assert metrics.get("cpu_seconds", 0) < 1000
    assert metrics.get("io_write_bytes", 0) < 2**40
    if then:
        assert result["status"] == "completed", result
        scene.unharmed(TARGET)
    else:
        assert metrics["failure_reason"] == "runtime_error", result
        scene.unharmed()


def test_another_job_is_not_seen(scene: Scene, intruder: Intruder) -> None:
    files = scene.files(victim := scene.begin(reading(bitrate=HELD)))
    secret = files / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o644)
    places = [secret, files, files.parent, WORK_DIR, MEDIA, WORK_DIR / "jobs"]
    intruder.order("list_places", files=[str(place) for place in places])
    scene.take_note()

    result = scene.run(reading(), {"id": "thief"})

    found = intruder.found(result)
    assert found.keys() == set(map(str, places))
    for place in places[:3]:
        assert found[str(place)].startswith("denied"), found
    assert found[f"{WORK_DIR}/jobs"] == "ALLOWED: listed: ['thief']"
    assert found[str(WORK_DIR)] == "ALLOWED: listed: ['jobs', 'media']"
    assert found[str(MEDIA)] == "ALLOWED: listed: ['in.mp4']"
    assert scene.end(victim)["status"] == "completed"
    scene.unharmed()
