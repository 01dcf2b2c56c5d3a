"""``attach`` and ``detach`` on the command line: what is accepted, what is said."""

from __future__ import annotations

import re

import pytest

from worker import cli
from worker.cli import attach as command
from worker.cli.arguments import parse
from worker.config import Settings
from worker.errors import ConfigError
from worker.systemd.attachment import Attached, AttachError, Detached, ScopeLimits
from worker.systemd.processes import InForce, Process

MIB = 1 << 20
UNIT = "ffmpeg-job-attached-10.scope"


def attached(**values: object) -> Attached:
    known: dict[str, object] = {
        "unit": UNIT,
        "process": Process(10, "ffmpeg", 1, 100),
        "pids": frozenset({10, 11}),
        "outside": frozenset(),
        "held_bytes": 0,
        "came_from": "",
        "in_force": InForce(50.0, 64 * MIB, 0),
        "runtime_sec": 60.0,
    }
    return Attached(**{**known, **values})  # type: ignore[arg-type]


class FakeScopes:
    """Takes the place of Scopes; remembers what it was asked."""

    asked: list[object]
    answer: Attached | Detached | Exception

    def __init__(self, *, user: bool) -> None:
        self.asked.append(user)

    async def connect(self) -> None:
        self.asked.append("connect")

    async def close(self) -> None:
        self.asked.append("close")

    async def attach(self, pid: int, limits: ScopeLimits) -> Attached | Detached:
        return self._answer(pid, limits)

    async def detach(self, pid: int) -> Attached | Detached:
        return self._answer(pid)

    def _answer(self, *asked: object) -> Attached | Detached:
        self.asked += asked
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def scopes(monkeypatch: pytest.MonkeyPatch) -> type[FakeScopes]:
    FakeScopes.asked = []
    FakeScopes.answer = attached()
    monkeypatch.setattr(command, "Scopes", FakeScopes)
    monkeypatch.setattr(command, "usable_cpus", lambda: 2)
    monkeypatch.setattr(command, "_meminfo", lambda: {"MemTotal": 1000 * MIB, "SwapTotal": 0})
    for name in ("MASTER_URL", "LOG_FILE", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return FakeScopes


# the command line


def test_the_words_of_attach_and_detach() -> None:
    arguments = parse(["attach", "-cpu-percent", "50", "--memory-mb=64", "--user", "4711"])
    assert (arguments.command, arguments.pid) == ("attach", "4711")
    assert arguments.limits == {"--cpu-percent": "50", "--memory-mb": "64"}
    assert arguments.flags == {"--user": "true"}
    arguments = parse(["--timeout", "9", "attach", "4711"])
    assert (arguments.pid, arguments.limits) == ("4711", {"--timeout": "9"})
    arguments = parse(["detach", "4711"])
    assert (arguments.command, arguments.pid, arguments.limits) == ("detach", "4711", {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["attach"], "attach takes one PID"),
        (["detach"], "detach takes one PID"),
        (["attach", "1", "2"], "attach takes one PID"),
        (["detach", "1", "2"], "detach takes one PID"),
        (["detach", "1", "--timeout", "5"], "--timeout: only for attach"),
        (["run", "x", "--cpu-percent", "5"], "--cpu-percent: only for attach"),
        (["--memory-mb", "5"], "--memory-mb: only for attach"),
        (["attach", "-5"], "--5: no such flag"),
        (["attach", "5", "--timeout"], "--timeout: its value is missing"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(argv)


def test_help_says_that_the_timeout_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ffmpeg-worker attach [flags] PID" in text
    assert "ffmpeg-worker detach [flags] PID" in text
    assert "then the processes are ENDED (SIGTERM, then SIGKILL)" in text
    assert "memory that is allocated from now on" in text


# values


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "1_0", " 7", "٣", "", "self", "2147483648", "9" * 40]
)
def test_what_is_no_pid(scopes: type[FakeScopes], text: str) -> None:
    assert cli.main(["attach", "--cpu-percent", "50", "--", text]) == 2
    assert cli.main(["detach", "--", text]) == 2
    assert scopes.asked == []


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        *(("--cpu-percent", text) for text in ("0", "-5", "50%", "1000001", "nan", "1e2")),
        *(("--memory-mb", text) for text in ("0", "15", "1000000001", "64M")),
        *(("--timeout", text) for text in ("0", "10s", "31536001", "inf")),
    ],
)
def test_what_is_no_limit(
    scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str], flag: str, text: str
) -> None:
    assert cli.main(["attach", flag, text, "10"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ffmpeg-worker: {flag}: {text!r} must be a whole number from ")
    assert error.count("\n") == 1
    assert scopes.asked == []


def test_every_wrong_limit_has_its_line(
    scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["attach", "--cpu-percent", "0", "--timeout", "x", "10"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_no_limit_at_all(scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attach", "10"]) == 2
    assert "attach needs a limit: one or more of --cpu-percent" in capsys.readouterr().err
    assert scopes.asked == []


def test_limits_of_the_machine() -> None:
    asked = ScopeLimits(900, 9000 * MIB, 5)
    limits, notes = command.lowered(asked, cpus=2, memory_bytes=1000 * MIB + 7)
    assert limits == ScopeLimits(200, 1000 * MIB, 5)
    assert notes == (
        "CPU limit lowered from 900 % to 200 %, all that this node has",
        "memory limit lowered from 9000 MB to 1000 MB, all that this node has",
    )
    for kept in (ScopeLimits(200, 1000 * MIB, None), ScopeLimits(None, None, 5)):
        assert command.lowered(kept, cpus=2, memory_bytes=1000 * MIB) == (kept, ())
    unknown = ScopeLimits(None, 9000 * MIB, None)
    assert command.lowered(unknown, cpus=2, memory_bytes=0) == (unknown, ())


# what is done and said


def test_attach_needs_no_master(
    scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cpu-percent", "50", "--memory-mb", "64", "--timeout", "60"]
    assert cli.main(["attach", *flags, "10"]) == 0
    assert scopes.asked == [False, "connect", 10, ScopeLimits(50, 64 * MIB, 60), "close"]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"{UNIT}: 2 processes of ffmpeg (10)",
        "CPU: at most 50 % of a core, together",
        "memory: at most 64 MB, together",
        "time: ends in 60 s (SIGTERM, then SIGKILL)",
        "ffmpeg-worker detach 10 lifts the limits",
    ]
    assert captured.err == ""


def test_a_lowered_limit_is_what_is_asked_for_and_noted(
    scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str]
) -> None:
    scopes.answer = attached(in_force=InForce(200.0, None, None), runtime_sec=None)
    assert cli.main(["attach", "--cpu-percent", "900", "10"]) == 0
    assert ScopeLimits(cpu_percent=200) in scopes.asked
    assert "CPU limit lowered from 900 % to 200 %" in capsys.readouterr().err


def test_the_user_s_own_manager(scopes: type[FakeScopes]) -> None:
    assert cli.main(["attach", "--user", "--timeout", "60", "10"]) == 0
    assert scopes.asked[0] is True


@pytest.mark.parametrize("words", [["attach", "--timeout", "60", "10"], ["detach", "10"]])
def test_a_refusal_is_one_line_and_status_1(
    scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    scopes.answer = AttachError("no process has the PID 10")
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "ffmpeg-worker: no process has the PID 10\n"
    assert scopes.asked[-1] == "close"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            Detached("ffmpeg-detached-10.scope", frozenset({10})),
            "process 10: 1 process without limits now, in ffmpeg-detached-10.scope\n",
        ),
        (
            Detached("", frozenset()),
            "process 10: it had ended already, nothing is left of its scope\n",
        ),
    ],
)
def test_detach(
    scopes: type[FakeScopes], capsys: pytest.CaptureFixture[str], answer: Detached, said: str
) -> None:
    scopes.answer = answer
    assert cli.main(["detach", "10"]) == 0
    assert scopes.asked == [False, "connect", 10, "close"]
    assert capsys.readouterr().out == said


ALL = ScopeLimits(50, 64 * MIB, 60)


@pytest.mark.parametrize(
    ("done", "swap", "texts"),
    [
        ({}, 0, []),
        ({}, MIB, []),
        ({"in_force": InForce(50.2, 64 * MIB - 4096, 0)}, MIB, []),
        ({"in_force": InForce(50, 64 * MIB, None)}, 0, []),
        ({"in_force": InForce(50, 64 * MIB, None)}, MIB, ["swap is not limited"]),
        ({"in_force": InForce(70, 64 * MIB, 0)}, 0, ["CPU limit does not hold, 70 % are in force"]),
        ({"in_force": InForce(50, 80 * MIB, 0)}, 0, ["memory limit does not hold, 80 MB are in"]),
        (
            {"in_force": InForce()},
            MIB,
            ["CPU limit does not hold, there is none", "memory limit does not hold, there is none"],
        ),
        ({"held_bytes": 900 * MIB}, 0, ["the 900 MB that the processes hold already are not"]),
        ({"runtime_sec": None}, 0, ["time limit does not hold"]),
        ({"outside": frozenset({7})}, 0, ["1 process started meanwhile could not be limited"]),
    ],
)
def test_what_does_not_hold_is_said(done: dict[str, object], swap: int, texts: list[str]) -> None:
    found = command.troubles(ALL, attached(**done), swap_bytes=swap)
    assert len(found) == len(texts)
    for line, text in zip(found, texts, strict=True):
        assert text in line
        assert "\n" not in line


def test_limits_that_nobody_asked_for_are_not_missed() -> None:
    done = attached(in_force=InForce(), runtime_sec=None, held_bytes=900 * MIB)
    assert command.troubles(ScopeLimits(), done, swap_bytes=MIB) == []
    assert command.report(done) == [
        f"{UNIT}: 2 processes of ffmpeg (10)",
        "ffmpeg-worker detach 10 lifts the limits",
    ]


def test_where_it_came_from_is_said() -> None:
    (first, *_) = command.report(attached(came_from="nginx.service"))
    assert first.endswith("(10), from nginx.service")


def test_the_machine_s_memory_is_read() -> None:
    assert command._meminfo()["MemTotal"] > 0


def test_direct_call_with_settings(scopes: type[FakeScopes]) -> None:
    assert command.attach(Settings(), "10", {"--timeout": "60"}) == 0
