"""Names that a master chooses: of jobs, and what else it says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.conftest import intruding
from tests.attack.sharing import HELD, Scene, attacked, reading
from tests.e2e.conftest import WORK_DIR, job_units, sh
from worker.systemd.names import safe_id, unit_name

TRANSIENT = Path("/run/systemd/transient")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with intruding() as intruder:
        intruder.order("wait", bitrate=HELD, then="transcode")
        with attacked() as scene:
            yield scene


IDS = {
    "up": "../../etc/x",
    "absolute": "/etc/x",
    "folder": "a/b",
    "the folder": ".",
    "the folder above": "..",
    "hidden": ".hidden",
    "a unit": "a.service",
    "a slice": "x.slice",
    "init": "init.scope",
    "instance": "job@1",
    "1,000 characters": "x" * 1000,
    "1,000 of four bytes": "\U0001f600" * 1000,
    "input of another": "x-input",
    "probe of another": "x-probe",
    "attached": "attached-1",
    "looks mapped": f"x-h{'0' * 64}",
    "other scripts": "ünï-日本-😀",
    "right to left": "\u202egpm.exe",
    "combining": "e\u0301",
    "newline": "a\nExecStartPre=/bin/touch /etc/x",
    "carriage return": "a\r\nb",
    "NUL": "a\0b",
    "terminal escape": "\x1b[2J\x1b]0;x\x07",
    "specifier": "%n%%i%H",
    "escaped": "a\\x2db",
    "command": "$(reboot)",
    "backquotes": "`id`",
    "variable": "${PATH}",
    "quotes": "'\"",
    "pattern": "*?[a-z]",
    "blank": " ",
    "byte order mark": "\ufeff",
    "option": "-rf",
    "long option": "--help",
    "dash": "-",
    "JSON": '{"id": "x"}',
}


@pytest.mark.parametrize("job_id", IDS.values(), ids=IDS)
def test_a_job_id(scene: Scene, job_id: str) -> None:
    scene.take_note()

    result = scene.run(reading(), {"id": job_id})

    assert result["status"] == "completed", result
    assert result["job_id"] == job_id
    unit = result["metrics"]["unit"]
    assert re.fullmatch(r"ffmpeg-job-[A-Za-z0-9][A-Za-z0-9_.-]*\.service", unit), unit
    assert len(unit) < 256
    assert sorted(path.name for path in WORK_DIR.iterdir() if path.is_dir()) == [
        "jobs", "media", "root",
    ]  # fmt: skip
    for line in scene.worker.log().splitlines():
        assert line.isprintable(), line
    scene.unharmed()


@pytest.mark.parametrize("job_id", ["", "x" * 1025, "\udcff", 7, None], ids=repr)
def test_what_is_no_id(scene: Scene, job_id: object) -> None:
    """It cannot be answered for, so it is not run; the next one is."""
    scene.take_note()

    scene.master.submit(reading(), {"id": job_id})
    result = scene.run(reading())

    assert "to GET /jobs/next is no job with an id" in scene.worker.log()

    assert result["status"] == "completed", result
    scene.unharmed()


@pytest.mark.parametrize(
    "ids",
    [("p/q", "p q"), ("x\n", "x\r"), ("/..", "/."), ("é", "e\u0302"), ("A", "a"), ("y-input", "y")],
    ids=repr,
)
def test_ids_that_look_the_same_in_a_unit_name(scene: Scene, ids: tuple[str, str]) -> None:
    scene.take_note()
    for job_id in ids:
        scene.begin(reading(bitrate=HELD), job_id)

    assert len(set(map(scene.files, ids))) == 2
    assert set(job_units()) == {unit_name(job_id) for job_id in ids}
    results = [scene.end(job_id) for job_id in ids]

    assert [result["status"] for result in results] == ["completed", "completed"]
    assert {result["metrics"]["unit"] for result in results} == set(map(unit_name, ids))
    scene.unharmed()


HOSTILE = (
    "x)\n[Service]\nExecStartPre=/bin/touch /etc/x\n%H %n $HOME ${PATH} \x1b[2J\u202e\"'\\ "
    "OTHER=1 JOB_ID=other"
)


@pytest.mark.parametrize(
    "text", [HOSTILE, "%" * 199, "y" * 2_000, "\\\n", "\udcff\0"], ids=lambda text: repr(text[:9])
)
def test_what_is_said_of_a_job(scene: Scene, text: str) -> None:
    scene.take_note()
    job = {**reading(bitrate=HELD), "scenario": text, "classification": text}
    job["parameters"] |= {"name": text, "description": text, "metadata": {text: text}, text: text}
    labels = {"queue": f"live/../../{text}", "priority": f"high\n{text}", "confidence": text}
    job_id = scene.begin(job, **labels)

    before = _shown(job_id)
    sh("systemctl", "daemon-reload")

    assert _shown(job_id) == before, "as it was written down, so it is read"
    assert before["Slice"] == "ffmpeg-default.slice"
    assert before["Nice"] == "10"
    assert before["ExecStartPre"] == ""
    assert before["Description"].startswith(f"FFmpeg transcode job {job_id} (")
    assert before["Description"].endswith(", default/medium)")
    assert len(before["Description"]) < 1000
    assert all(value.isprintable() for value in before.values())
    written = (TRANSIENT / unit_name(job_id)).read_text()
    assert written.count("[Service]\n") == 1
    assert not re.search(r"^ExecStartPre=", written, re.MULTILINE)
    result = scene.end(job_id)
    assert result["status"] == "completed", result
    entries = _journal(job_id)
    assert entries
    for entry in entries:
        assert entry["JOB_ID"] == job_id
        assert "OTHER" not in entry
    for line in scene.worker.log().splitlines():
        assert line.isprintable(), line
    scene.unharmed()


def _shown(job_id: str) -> dict[str, str]:
    """Of the job's unit. Each property is one line."""
    names = "Description,Slice,Nice,ExecStartPre,User,Environment"
    text = sh("systemctl", "show", unit_name(job_id), "-p", names)
    found = {"ExecStartPre": ""}
    return found | dict(line.partition("=")[::2] for line in text.splitlines())


def _journal(job_id: str) -> list[dict[str, object]]:
    """What the job's ffmpeg said, some of it after the reload."""
    sh("journalctl", "--sync")
    match = (f"_SYSTEMD_UNIT={unit_name(job_id)}", "SYSLOG_IDENTIFIER=ffmpeg-job")
    return [json.loads(line) for line in sh("journalctl", "-o", "json", *match).splitlines()]


@pytest.mark.parametrize(
    ("length", "status"), [(100_000, "completed"), (200_000, "failed")], ids=["cut", "refused"]
)
def test_too_much_is_said(scene: Scene, length: int, status: str) -> None:
    scene.take_note()

    result = scene.run({**reading(), "scenario": "y" * length})

    assert result["status"] == status, result
    if status == "failed":
        assert result["metrics"]["failure_reason"] == "user_error"
    assert len(json.dumps(result)) < 20_000
    scene.unharmed()


def test_folders_of_jobs(scene: Scene) -> None:
    """One for each, directly below the folder of all, for root alone."""
    scene.begin(reading(bitrate=HELD), "../../../etc")

    folder = WORK_DIR / "jobs" / safe_id("../../../etc")
    assert list((WORK_DIR / "jobs").iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == 0
    assert scene.end("../../../etc")["status"] == "completed"
