"""Inputs: what a job may name, and what it may lead to by the time it is read."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.conftest import MEDIA, folder_for_now
from tests.attack.sharing import (
    ELSEWHERE,
    INPUT,
    Maker,
    Scene,
    attacked,
    give_away,
    link,
    make_video,
    reading,
    seconds_of,
    swapping,
    writing,
)
from tests.e2e.conftest import WORK_DIR
from tests.slowness import SLOWNESS

CASE = MEDIA / "case"
TITLE = "the-title-of-a-secret-video"
SECRET = ELSEWHERE / "in.mp4"
"""Everybody may read it; nobody but root may pass the folder that it is in."""
SECRET_SECONDS, GOOD_SECONDS = 7, 1
JOBS_IN_A_RACE = 30


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    make_video(SECRET, SECRET_SECONDS, TITLE)
    make_video(ELSEWHERE / "month/in.mp4", SECRET_SECONDS, TITLE)
    ELSEWHERE.chmod(0o700)
    with attacked() as scene:
        yield scene
    shutil.rmtree(ELSEWHERE)


@pytest.fixture
def case() -> Iterator[Path]:
    """A folder in media."""
    with folder_for_now(CASE) as folder:
        yield folder


OUTSIDE, OWN = "lies outside of INPUT_DIRS", "is the worker's own"
DOTS, NO_PATH = "must not contain . or ..", "must be an absolute path or a URL"
CONTROL = "must not contain control characters"


REFUSED = {
    "of the system": ("/etc/shadow", OUTSIDE),
    "of root": (str(SECRET), OUTSIDE),
    "of the worker": ("/etc/ffmpeg-worker/config.env", OUTSIDE),
    "device": ("/dev/zero", OUTSIDE),
    "beside the folder": (f"{MEDIA}-old/in.mp4", OUTSIDE),
    "the folder": (str(MEDIA), OUTSIDE),
    "the folder with a slash": (f"{MEDIA}/", "must name a file, not a folder"),
    "root folder": ("/", "must name a file, not a folder"),
    "up": (f"{MEDIA}/../ledger.db", DOTS),
    "up and down": (f"{MEDIA}/../media/in.mp4", DOTS),
    "up far": (f"{MEDIA}{'/..' * 20}/etc/shadow", DOTS),
    "dot": (f"{MEDIA}/./in.mp4", DOTS),
    "by proc": (f"/proc/self/root{INPUT}", OUTSIDE),
    "by init": (f"/proc/1/root{INPUT}", OUTSIDE),
    "by a thread": (f"/proc/thread-self/root{INPUT}", OUTSIDE),
    "standard input": ("/dev/stdin", OUTSIDE),
    "descriptor": ("/proc/self/fd/0", OUTSIDE),
    "descriptor in dev": ("/dev/fd/3", OUTSIDE),
    "environment": ("/proc/self/environ", OUTSIDE),
    "ledger": (f"{WORK_DIR}/ledger.db", OWN),
    "journal of the ledger": (f"{WORK_DIR}/ledger.db-wal", OWN),
    "job's folder": (f"{WORK_DIR}/jobs/other/files/output.mp4", OWN),
    "job's publishing.json": (f"{WORK_DIR}/jobs/other/publishing.json", OWN),
    "control socket": (f"{WORK_DIR}/control.sock", OWN),
    "root of jobs": (f"{WORK_DIR}/root/etc/x", OWN),
    "other job's output": (f"{WORK_DIR}/job_x_output.mp4", OUTSIDE),
    "relative": ("in.mp4", NO_PATH),
    "home": ("~/in.mp4", NO_PATH),
    "option": ("-rf", NO_PATH),
    "pipe": ("pipe:0", NO_PATH),
    "fd": ("fd:0", NO_PATH),
    "file protocol": (f"file:{INPUT}", NO_PATH),
    "concat": (f"concat:{INPUT}|/etc/shadow", NO_PATH),
    "subfile": ("subfile,,start,0,end,0,,:/etc/shadow", NO_PATH),
    "cache": ("cache:/etc/shadow", NO_PATH),
    "crypto": ("crypto:///etc/shadow", NO_PATH),
    "data": ("data://text/plain,x", NO_PATH),
    "unix socket": ("unix:///run/dbus/system_bus_socket", NO_PATH),
    "ftp": ("ftp://127.0.0.1/x", NO_PATH),
    "nested": ("async://http://127.0.0.1/", "is no valid URL"),
    "file URL outside": ("file:///etc/shadow", OUTSIDE),
    "file URL, escaped slash": ("file:///etc%2fshadow", OUTSIDE),
    "file URL, escaped dots": (f"file://{MEDIA}/%2e%2e/ledger.db", DOTS),
    "file URL, all escaped": (f"file://{MEDIA}/%2e%2e%2fledger.db", DOTS),
    "file URL, other host": (f"file://elsewhere{INPUT}", "without host, ? and #"),
    "file URL, query": (f"file://{INPUT}?x", "without host, ? and #"),
    "file URL, NUL": (f"file://{INPUT}%00.txt", CONTROL),
    "file URL, newline": (f"file://{INPUT}%0a", CONTROL),
    "file URL, no UTF-8": (f"file://{MEDIA}/%ff.mp4", CONTROL),
    "NUL": (f"{INPUT}\0.txt", CONTROL),
    "newline": (f"{MEDIA}/new\nline.mp4", CONTROL),
    "terminal escape": (f"{MEDIA}/\x1b[2J.mp4", CONTROL),
    "line separator": (f"{MEDIA}/a\u2028b.mp4", CONTROL),
    "lone surrogate": (f"{MEDIA}/\udcff.mp4", CONTROL),
    "name too long": (f"{MEDIA}/{'x' * 256}", "longer than a path or a file name can be"),
    "path too long": (f"{MEDIA}{'/x' * 3000}", "must have at most 4096 characters"),
}


@pytest.mark.parametrize(("name", "text"), REFUSED.values(), ids=REFUSED)
def test_a_name_that_is_refused(scene: Scene, name: str, text: str) -> None:
    scene.turns_down(reading(name), text)


def put(*, mode: int = 0o644, uid: int = 0, gid: int = 0, content: bytes | None = None) -> Maker:
    """A copy of the good video, or a file with that content."""

    def make(path: Path) -> None:
        path.write_bytes(INPUT.read_bytes() if content is None else content)
        os.chown(path, uid, gid)
        path.chmod(mode)

    return make


def chain(target: object, length: int) -> Maker:
    """Links that lead to one another, and at the end to the target."""

    def make(path: Path) -> None:
        path.symlink_to(path.with_name("0"))
        for number in range(length):
            path.with_name(f"{number}").symlink_to(f"{number + 1}")
        path.with_name(f"{length}").symlink_to(str(target))

    return make


def hard_link_to_a_secret(path: Path) -> None:
    put(mode=0o600)(secret := ELSEWHERE / "hard")
    os.link(secret, path)


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def behind_an_odd_name(path: Path) -> None:
    put()(odd := path.with_name("odd\nname"))
    path.symlink_to(odd)


NOT_REGULAR, UNREADABLE = "is not a regular file", "cannot be read by jobs: allow it with"
U, I = "user_error", "input_error"  # noqa: E741
FOUND: dict[str, tuple[Maker, str, str]] = {
    "link to shadow": (link("/etc/shadow"), U, OUTSIDE),
    "link to root's video": (link(SECRET), U, OUTSIDE),
    "link to what is not there": (link("/nowhere/x"), U, OUTSIDE),
    "dangling link": (link("gone"), I, "does not exist on this node"),
    "relative link out": (link("../../ledger.db"), U, OUTSIDE),
    "link to a job": (link(WORK_DIR / "jobs/x"), U, OUTSIDE),
    "link to the control socket": (link(WORK_DIR / "control.sock"), U, OUTSIDE),
    "link to the environment": (link("/proc/self/environ"), U, OUTSIDE),
    "link to a descriptor": (link("/proc/self/fd/0"), U, OUTSIDE),
    "link to standard input": (link("/dev/stdin"), U, OUTSIDE),
    "link to a device": (link("/dev/zero"), U, OUTSIDE),
    "link to itself": (link("in.mp4"), I, NOT_REGULAR),
    "link to the folder": (link("."), I, NOT_REGULAR),
    "chain to shadow": (chain("/etc/shadow", 5), U, OUTSIDE),
    "chain of a thousand": (chain("/etc/shadow", 1000), U, OUTSIDE),
    "link to an odd name": (behind_an_odd_name, I, "not a plain UTF-8 path; rename that file"),
    "nothing": (lambda path: None, I, "does not exist on this node"),
    "folder": (Path.mkdir, I, NOT_REGULAR),
    "named pipe": (os.mkfifo, I, NOT_REGULAR),
    "socket": (listen, I, NOT_REGULAR),
    "device": (lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)), I, NOT_REGULAR),
    "hard link to root's": (hard_link_to_a_secret, I, UNREADABLE),
    "root's": (put(mode=0o600), I, UNREADABLE),
    "of root's group": (put(mode=0o640), I, UNREADABLE),
    "of another user": (put(mode=0o600, uid=12345, gid=12345), I, UNREADABLE),
    "of the user of outputs": (put(mode=0o200, uid=12345), I, UNREADABLE),
    "without any right": (put(mode=0), I, UNREADABLE),
    "empty": (put(content=b""), I, "is empty"),
    "no video": (put(content=b"root:x:0:0\n" * 1000), I, "could not read the input"),
}


@pytest.mark.parametrize(("make", "reason", "text"), FOUND.values(), ids=FOUND)
def test_what_stands_under_the_name(
    scene: Scene, case: Path, make: Maker, reason: str, text: str
) -> None:
    make(case / "in.mp4")
    scene.take_note()
    begun = time.monotonic()

    result = scene.refused(reading(case / "in.mp4"), text, reason=reason)

    assert time.monotonic() - begun < 10 * SLOWNESS
    assert "root:" not in json.dumps(result)
    scene.unharmed()
    (ELSEWHERE / "hard").unlink(missing_ok=True)


PLAYLISTS = {
    "concat of root's video": f"ffconcat version 1.0\nfile '{SECRET}'\n",
    "concat of another video": "ffconcat version 1.0\nfile other.mp4\n",
    "concat up": "ffconcat version 1.0\nfile ../in.mp4\n",
    "HLS of root's video": f"#EXTM3U\n#EXTINF:1,\nfile://{SECRET}\n#EXT-X-ENDLIST\n",
    "HLS of shadow": "#EXTM3U\n#EXTINF:1,\n/etc/shadow\n#EXT-X-ENDLIST\n",
    "HLS of another video": "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
    "HLS of the network": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:{port}/jobs\n#EXT-X-ENDLIST\n",
    "HLS of a concat": f"#EXTM3U\n#EXTINF:1,\nconcat:{INPUT}|{SECRET}\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("text", PLAYLISTS.values(), ids=PLAYLISTS)
def test_an_input_that_names_others(scene: Scene, case: Path, text: str) -> None:
    make_video(case / "other.mp4", SECRET_SECONDS, TITLE)
    put(content=text.replace("{port}", str(scene.port)).encode())(case / "in.m3u8")
    requests = len(scene.master.seen("GET /jobs"))
    scene.take_note()

    result = scene.refused(reading(case / "in.m3u8"), reason=I)

    assert TITLE not in json.dumps(result)
    assert len(scene.master.seen("GET /jobs")) == requests
    scene.unharmed()


NAMES = (
    "-rf.mp4", "- y -i.mp4", "a b.mp4", "it's \"quoted\".mp4", "colon:in.mp4", "file:in.mp4",
    "pipe:0", "http:in.mp4", "concat:a|b.mp4", "100%n%%i.mp4", "%03d.mp4", "$HOME ${x} $(id).mp4",
    "back\\slash.mp4", "\\x2e\\x2e.mp4", "%2e%2e.mp4", "[x]*?{a,b}.mp4", "a;b|c&d>e`f`.mp4",
    "#?&=.mp4", "~.mp4", "...mp4", "ümläut-日本-😀.mp4", "e\u0301.mp4", "\u202egpm.4pm",
    "@unit.service", "a,b=c.mp4", "x" * 251 + ".mp4",
)  # fmt: skip
"""Of plain files, all of which have to work."""


@pytest.mark.parametrize("name", NAMES)
def test_a_strange_name_of_a_plain_file(scene: Scene, case: Path, name: str) -> None:
    put()(case / name)
    scene.take_note()

    result = scene.run(reading(case / name))

    assert result["status"] == "completed", result
    assert result["metrics"]["output_duration_sec"] == pytest.approx(1, abs=0.2)
    scene.unharmed()


def in_a_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, mode=0o755)
    put()(path)


HARMLESS: dict[str, tuple[str, Maker]] = {
    "link in media": ("in.mp4", link(INPUT)),
    "relative link in media": ("in.mp4", link("../in.mp4")),
    "chain in media": ("in.mp4", chain(INPUT, 5)),
    "link to the folder": ("up/in.mp4", lambda path: path.parent.symlink_to(MEDIA)),
    "slashes": ("//in.mp4", put()),
    "odd folder": ("a:b %n $X 'q'/in.mp4", in_a_folder),
    "deep folder": ("d/" * 100 + "in.mp4", in_a_folder),
    "a stranger's": ("in.mp4", put(uid=12345, gid=12345)),
    "read-only": ("in.mp4", put(mode=0o444)),
    "hard link": ("in.mp4", lambda path: os.link(INPUT, path)),
}


@pytest.mark.parametrize(("name", "make"), HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("url", [False, True], ids=["path", "URL"])
def test_what_is_harmless_works(
    scene: Scene, case: Path, name: str, make: Maker, url: bool
) -> None:
    path = f"{case}/{name}"
    make(Path(path))
    scene.take_note()
    if url:
        path = "file://localhost" + path.replace("%", "%25").replace("i", "%69").replace(" ", "%20")

    result = scene.run(reading(path))

    assert result["status"] == "completed", result
    scene.unharmed()


RACES = {
    "the file is swapped for a link": ("in.mp4", "other", ""),
    "its folder is swapped for a link": ("day", "other", "in.mp4"),
    "a folder above is swapped for a link": ("year", "other", "month/in.mp4"),
}


@pytest.mark.parametrize(("place", "other", "rest"), RACES.values(), ids=RACES)
def test_a_race_for_the_input(scene: Scene, case: Path, place: str, other: str, rest: str) -> None:
    """Who may write in a folder of media, against the agent and systemd."""
    scene.take_note()
    good = case / place / rest
    good.parent.mkdir(parents=True, exist_ok=True)
    put()(good)
    (case / other).symlink_to(ELSEWHERE if rest else SECRET)
    give_away(case, *case.rglob("*"))
    outputs = [WORK_DIR / f"race-{number}.mp4" for number in range(JOBS_IN_A_RACE)]

    with swapping(case / place, case / other):
        jobs = [scene.master.submit(writing(output, good))["id"] for output in outputs]
        results = [scene.ended(job, 120) for job in jobs]

    for result, output in zip(results, outputs, strict=True):
        if result["status"] == "completed":
            assert seconds_of(output) == pytest.approx(GOOD_SECONDS, abs=0.2)
            output.unlink()
        else:
            assert result["metrics"]["failure_reason"] in (U, I), result
            assert not output.exists()
    told = Counter(result.get("error", "completed") for result in results)
    print(told)
    assert len(told) > 1, "both sides had their luck"
    assert TITLE not in json.dumps(results)
    shutil.rmtree(case)
    case.mkdir()
    scene.unharmed()
