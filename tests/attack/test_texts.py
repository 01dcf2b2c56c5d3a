"""Texts from outside that would forge a line of a log, drive a terminal or hide what is there.

They come from the master, from media and from a job that has been taken over. Wherever the worker
writes them, they are plain.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, PROGRAM, Job, Target, folder_for_now, histories
from tests.e2e.conftest import CONFIG, SERVICE, parameters, sh
from tests.e2e.conftest import PROGRAM as WORKER

LOG = Path("/var/log/ffmpeg-worker/worker.log")
FORGED = "2026-01-01T00:00:00.000+0000 ERROR   worker.agent: FORGED"
NASTY = {
    "a line": f"x\n{FORGED}",
    "a line of the journal": "x\n<0>worker.agent: FORGED",
    "a line of a traceback": "| FORGED",
    "a carriage return": f"x\r{FORGED}",
    "other line ends": f"x\v\f\x1c\x1d\x1e\x85\u2028\u2029{FORGED}",
    "colours": "\x1b[31mFORGED\x1b[0m",
    "clear the screen": "\x1b[2J\x1b[H\x1bc",
    "an answer of the terminal": "\x1b[6n\x1b[c\x05",
    "a title": "\x1b]0;FORGED\x07\x1b]52;c;Zm9yZ2Vk\x1b\\",
    "C1 codes": "\x9b31m\x9d0;x\x9c\x90x\x9c",
    "backspaces": "xyz\b\b\bFORGED\x7f",
    "NUL": "x\0y",
    "bidi": "\u202egnp.4pm\u202c\u2066x\u2069\u200f\u061c",
    "zero width": "j\u200bo\u200cb\u200d\ufeff\u2060\u00ad",
    "fillers": "\u3164\u115f\u2800\u180e\ufe0f\U000e0041",
    "private use": "\ue000\U000f0000\U0010ffff\ufdd0",
    "combining": "Z" + "\u0351\u0346" * 40,
    "formats": "%s%n%d{0}{x.__class__}$HOME%h",
    "markup": "<script>alert(1)</script>&#27;[31m",
    "a surrogate": "\ud800x\udfff",
}
AS_FILE_NAMES = {name: text for name, text in NASTY.items() if "\0" not in text and "/" not in text}


def strange(text: str, *, kept: str = "\n") -> list[str]:
    """The characters of a text that nobody wants to see in a log, or does not see."""
    return sorted(
        {
            f"U+{ord(char):04X}"
            for char in text
            if char not in kept
            and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        }
    )


def forged(text: str) -> list[str]:
    """Lines that begin as ours do, and are not."""
    start = re.compile(r"(<\d>|\| |\d{4}-\d\d-\d\dT[\d:.+-]+ \w+ +worker\.\w+: )?FORGED")
    return [line for line in text.splitlines() if start.match(line)] + [
        line
        for line in text.splitlines()
        if re.match(r"(\d{4}\S+ ERROR +|<\d>)worker\.agent: FORGED", line)
    ]


def check(text: str, what: str) -> None:
    assert text, what
    assert (strange(text), forged(text)) == ([], []), what


def journal(*arguments: str) -> str:
    sh("journalctl", "--sync")
    return sh("journalctl", "-b", "--all", "--no-pager", *arguments)


def messages(unit: str) -> list[str]:
    """What the journal has of a unit, field by field as it was written."""
    found = []
    for line in journal("-o", "json", "-u", unit).splitlines():
        document = json.loads(line)
        for name, value in document.items():
            if isinstance(value, list) and all(isinstance(byte, int) for byte in value):
                document[name] = bytes(value).decode(errors="surrogateescape")
        found.append(document)
    return [entry["MESSAGE"] or "" for entry in found]


def check_everything(standing: Target, results: dict[str, Any]) -> None:
    """All places where the worker itself writes."""
    check(LOG.read_text(), "the log")
    check(journal("-o", "cat", "-u", SERVICE), "the journal of the agent")
    for message in messages(SERVICE):
        assert strange(message, kept="") == [], message
        assert forged(message) == [], message
    # What systemd itself says of the units, with their descriptions in it.
    check(journal("-o", "cat", "_PID=1"), "the journal of systemd")
    for name, result in results.items():
        if "error" in result:
            check(result["error"], f"error of {name}")
        # Lines of ffmpeg, which say what they like, after the command, which is ours.
        assert strange(result.get("logs", "")) == [], name
        for note in result["analyzer_output"].get("notes", []):
            assert strange(note, kept="") == [], name
    for path in ("/metrics", "/ready", "/health"):
        check(standing.worker.get(path)[1], path)
    for command in (("--limit", "1000"), ("--limit", "1000", "--json")):
        check(sh(str(WORKER), "history", "--config", str(CONFIG), *command), "history")
    ids = [result["job_id"] for result in results.values()]
    check(histories(job_id for job_id in ids if "\0" not in job_id), "history of each")


def test_names_and_values(standing: Target) -> None:
    jobs: dict[str, Job] = {}
    for name, text in NASTY.items():
        for field in ("codec", "preset", "tune", "resolution", "input", "output", "output_mode"):
            jobs[f"{field}: {name}"] = Job(parameters(**{field: f"z{text}"}))
        jobs[f"a parameter's name: {name}"] = Job(parameters(**{text: 1, "codec": "-"}))
        jobs[f"a URL: {name}"] = Job(parameters(input=f"http://127.0.0.1:7/{text}/\u202e"))
        for field in ("queue", "priority", "classification", "engine", "scenario", "node_id"):
            value = {field: f"z{text}"}
            jobs[f"{field}: {name}"] = Job(parameters(codec="-"), extra=value)
    results = standing.run_all(jobs, timeout=120)
    assert {result["status"] for result in results.values()} == {"failed"}
    check_everything(standing, results)
    for name, result in results.items():
        check(result["error"], name)
    standing.unharmed()


def test_ids_and_scenarios_of_jobs_that_run(standing: Target) -> None:
    """These get as far as a unit: its name, its description, its fields in the journal."""
    jobs = {
        name: Job(
            {"scenario": f"{text}160x90p5-h264", "parameters": {"input": f"{MEDIA}/in.mp4"}},
            extra={"id": f"id-{text}"},
        )
        for name, text in NASTY.items()
        if name != "a surrogate"
    }
    results = standing.run_all(jobs, timeout=120)
    assert {result["status"] for result in results.values()} == {"completed"}, results
    check_everything(standing, results)
    units = {name: result["metrics"]["unit"] for name, result in results.items()}
    assert len(set(units.values())) == len(jobs)
    for name, unit in units.items():
        assert re.fullmatch(r"ffmpeg-job-[A-Za-z0-9_.-]+\.service", unit), name
        check(journal("-o", "short", "-u", unit), name)
    standing.unharmed()


def test_names_of_files(standing: Target, media: Path) -> None:
    jobs: dict[str, Job] = {}
    with folder_for_now(MEDIA / "names") as folder:
        for number, (name, text) in enumerate(AS_FILE_NAMES.items()):
            encoded = f"{number}{text}.mp4".encode(errors="surrogatepass")[:250]
            (folder / f"to-{number}.mp4").symlink_to(
                f"{number}{text}.mp4" if name != "a surrogate" else "x.mp4"
            )
            Path(os.fsdecode(bytes(folder) + b"/" + encoded)).write_bytes(media.read_bytes())
            jobs[f"named: {name}"] = Job(parameters(input=f"{folder}/{number}{text}.mp4"))
            jobs[f"behind a link: {name}"] = Job(parameters(input=f"{folder}/to-{number}.mp4"))
        standing.take_note()
        results = standing.run_all(jobs, timeout=120)
        check_everything(standing, results)
        standing.unharmed()
    standing.take_note()


def test_what_a_media_file_says_of_itself(standing: Target, media: Path) -> None:
    """ffmpeg repeats it in its log, which becomes a part of the result."""
    jobs: dict[str, Job] = {}
    with folder_for_now(MEDIA / "said") as folder:
        outputs = []
        for number, (name, text) in enumerate(NASTY.items()):
            if "\0" in text or name == "a surrogate":
                continue
            said = ("-metadata", f"title={text}", "-metadata", f"x{text}=y")
            stream = ("-metadata:s:v", f"title={text}", "-metadata:s:v", f"handler_name={text}")
            outputs += ["-c", "copy", *said, *stream, f"{folder}/{number}.mkv"]
            jobs[name] = Job(parameters(input=f"{folder}/{number}.mkv"))
        sh("/usr/bin/ffmpeg", "-v", "error", "-i", str(media), *outputs)
        for path in folder.iterdir():
            path.chmod(0o644)
        standing.take_note()
        results = standing.run_all(jobs, timeout=120)
        assert {result["status"] for result in results.values()} == {"completed"}, results
        assert any("FORGED" in result["logs"] for result in results.values()), "it is told"
        check_everything(standing, results)
        standing.unharmed()
    standing.take_note()


def test_what_a_master_says(standing: Target) -> None:
    """In the bodies, the reasons and the headers of its refusals, and in a job's id."""
    master = standing.master
    for text in NASTY.values():
        body = text.encode(errors="replace").decode()
        for status in (400, 418, 503):
            master.fault("POST /nodes/*/heartbeat", "status", status=status, body=body)
        plain = re.sub(r"[^\x20-\x7e]", "~", body)
        master.fault(
            "GET /jobs/next", "status", status=302, body=body,
            headers={"Location": f"http://\u00e9{plain}\x1b[31m", "Retry-After": "0"},
        )  # fmt: skip
        master.fault("GET /jobs/next", "status", status=200, body=body)
    surrogate = '{"job": {"id": "\\ud800\\n<0>FORGED", "scenario": "x"}}'
    master.fault("GET /jobs/next", "status", status=200, body=surrogate)
    standing.still_beats()
    master.wait_for_request("GET /jobs/next", len(master.seen("GET /jobs/next")) + 2)
    master.clear_faults()
    result = standing.run(parameters(input=f"{MEDIA}/in.mp4"))
    assert result["status"] == "completed"
    check_everything(standing, {"the next one": result})
    standing.unharmed()


TALKER = """#!/usr/bin/python3
import os, re, sys
if "FFREPORT" in os.environ and "lavfi" not in sys.argv:
    with open("/usr/local/share/said", "rb") as file:
        said = file.read()
    name = re.match(r"file=((?:\\\\.|[^:])+)", os.environ["FFREPORT"])[1]
    with open(re.sub(r"\\\\(.)", r"\\1", name), "ab") as log:
        log.write(b"[error] " + said.replace(b"\\n", b"\\n[error] ") + b"\\n" + said + b"\\n")
    for descriptor in (1, 2):
        os.write(descriptor, said + b"\\n")
    sys.exit(1)
os.execv("/usr/bin/ffmpeg", ["ffmpeg", *sys.argv[1:]])
"""


@pytest.fixture
def talker(standing: Target) -> Iterator[Target]:
    """With a program in the place of ffmpeg that writes all of it to its log and its outputs."""
    said = Path("/usr/local/share/said")
    said.write_bytes("\n".join(NASTY.values()).encode(errors="surrogatepass") + b"\xff\xfe\x80")
    said.chmod(0o644)
    PROGRAM.write_text(TALKER)
    PROGRAM.chmod(0o755)
    try:
        with standing.configured():
            yield standing
    finally:
        PROGRAM.unlink()
        said.unlink()
        standing.take_note()


def test_what_a_job_says_that_was_taken_over(talker: Target) -> None:
    """It can write what it likes under its own unit's name, and nothing under another's."""
    result = talker.run(parameters(input=f"{MEDIA}/in.mp4"))
    assert result["status"] == "failed", result
    assert "FORGED" in result["logs"], "it is told"
    check_everything(talker, {"it": result})
    unit = result["metrics"]["unit"]
    sh("journalctl", "--sync")
    entries = [
        json.loads(line) for line in journal("-o", "json", f"_SYSTEMD_UNIT={unit}").splitlines()
    ]
    assert entries, "what it wrote to standard error"
    for entry in entries:
        assert entry["_SYSTEMD_UNIT"] == unit
        assert entry["SYSLOG_IDENTIFIER"].startswith("ffmpeg-job"), entry
        assert int(entry["PRIORITY"]) >= 6, "no message to all who are logged in"
    # journalctl shows no line that has a control character in it, but says "blob data".
    sh("journalctl", "--sync")
    shown = sh("journalctl", "-b", "--no-pager", "-o", "short", "-u", unit)
    assert [char for char in strange(shown) if int(char[2:], 16) < 0xA0] == []
    talker.unharmed()
