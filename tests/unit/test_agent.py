"""The daemon's own decisions: when it is ready, when it takes no jobs, how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.master import FakeMaster
from worker import agent as agent_module
from worker.agent import Agent, Stopped, connect
from worker.config import resolve
from worker.errors import BusGone, SystemdError, WorkerError
from worker.leftovers import Acceptance, Records
from worker.master.session import NodeSession
from worker.master.wire import Job, JobResult
from worker.node.disk import DiskUsage
from worker.systemd import enforcement
from worker.systemd.enforcement import Enforcement, Limit
from worker.systemd.launcher import Launcher
from worker.telemetry.notify import Notifier


class FakeBus:
    """Each answer to the question what is attached is one of these, then the last one again."""

    def __init__(self) -> None:
        self.attached: list[list[str] | SystemdError] = [[]]

    async def call(self, member: str, *_: object) -> list[object]:
        assert member == "ListUnitsByPatterns"
        answer = self.attached.pop(0) if len(self.attached) > 1 else self.attached[0]
        if isinstance(answer, SystemdError):
            raise answer
        return [[[name] for name in answer]]


class FakeLauncher:
    """A systemd with no units. ``error`` is raised on connecting, once for each in it."""

    def __init__(self) -> None:
        self.connected = True
        self.version = 252
        self.errors: list[SystemdError] = []
        self.closed = False
        self.bus = FakeBus()

    async def connect(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    async def leftovers(self) -> list[str]:
        return []

    async def close(self) -> None:
        self.closed = True


Make = Callable[..., Agent]


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def make(tmp_path: Path, launcher: FakeLauncher) -> Make:
    def make(**keys: str) -> Agent:
        environment = {
            "MASTER_URL": "http://127.0.0.1:1",
            "NODE_NAME": "box",
            "METRICS_PORT": "0",
            "WORK_DIR": str(tmp_path),
            "POLL_INTERVAL": "100ms",
            "PATH": str(tmp_path),  # no ffmpeg, so nothing is probed
            **keys,
        }
        settings = resolve({}, environment).settings
        agent = Agent(settings, Notifier({}))
        agent._launcher = cast("Launcher", launcher)
        return agent

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def answering(**fields: Any) -> NodeSession:
    return cast("NodeSession", SimpleNamespace(registered=True, last_error="", **fields))


def test_reasons_not_to_be_ready(make: Make, launcher: FakeLauncher, tmp_path: Path) -> None:
    agent = make()
    (tmp_path / "jobs").mkdir()
    assert agent.readiness() == ["the worker is starting"]
    session = answering()
    agent._session = session
    assert agent.readiness() == []
    session.last_error = "no answer"
    assert agent.readiness() == ["no answer"]
    session.registered = False
    assert agent.readiness() == ["not registered: no answer"]
    session.last_error = ""
    assert agent.readiness() == ["registering"]
    session.registered = True
    launcher.connected = False
    assert agent.readiness() == ["no connection to systemd over D-Bus"]


@pytest.mark.parametrize(("used", "full"), [(949, False), (950, True), (1000, True)])
def test_a_full_disk_blocks(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, full: bool
) -> None:
    agent = make()
    (tmp_path / "jobs").mkdir()
    monkeypatch.setattr(
        "worker.node.disk.usage", lambda path: DiskUsage(1000, used, 1000 - used)
    )  # fmt: skip
    assert ("full" in agent._blocked()) is full


def test_a_work_directory_that_is_gone_or_read_only_blocks(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make(WORK_DIR=str(tmp_path / "gone"))
    assert "No such file" in agent._blocked()
    assert agent._disk_used() is None
    agent = make()
    (tmp_path / "jobs").mkdir()
    assert agent._blocked() == ""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in agent._blocked()


async def test_the_start_ends_as_soon_as_it_is_told_to(make: Make) -> None:
    agent = make()
    ended = asyncio.Event()

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    asyncio.get_running_loop().call_soon(agent._signalled, signal.SIGTERM)
    async with asyncio.timeout(5):
        with pytest.raises(Stopped):
            await agent._unless_stopped(for_ever())
    assert ended.is_set(), "nothing goes on behind our back"


async def test_a_part_of_the_start_gives_its_result_or_its_error(make: Make) -> None:
    agent = make()

    async def seven() -> int:
        return 7

    async def error() -> None:
        raise SystemdError("no")

    assert await agent._unless_stopped(seven()) == 7
    with pytest.raises(SystemdError):
        await agent._unless_stopped(error())


async def test_a_bus_that_comes_late_is_waited_for(
    launcher: FakeLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    launcher.errors = [BusGone("cannot connect")]
    async with asyncio.timeout(5):
        await connect(cast("Launcher", launcher))
    assert "cannot connect; next attempt" in caplog.text


async def test_a_bus_that_never_comes_ends_the_agent(
    launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "BUS_PATIENCE_SEC", 0.0)
    launcher.errors = [BusGone("cannot connect")] * 3
    with pytest.raises(BusGone):
        await connect(cast("Launcher", launcher))


async def test_told_to_stop_while_the_bus_is_away(make: Make, launcher: FakeLauncher) -> None:
    agent = make()
    launcher.errors = [BusGone("cannot connect")] * 100
    asyncio.get_running_loop().call_later(0.05, agent._signalled, signal.SIGTERM)
    async with asyncio.timeout(5):
        await agent.run()
    assert launcher.closed


async def test_a_second_agent_with_the_same_work_directory_does_not_start(
    make: Make, tmp_path: Path, launcher: FakeLauncher
) -> None:
    first = Records(tmp_path)
    with pytest.raises(WorkerError, match="another worker uses"):
        await make().run()
    first.close()


async def test_told_to_stop_while_the_master_is_down(make: Make) -> None:
    agent = make()
    work = asyncio.create_task(agent.run())
    async with asyncio.timeout(10):
        while agent._session is None or not agent._session.last_error:
            await asyncio.sleep(0.01)
        agent._signalled(signal.SIGTERM)
        await work
    assert agent.readiness()[0] == "the worker is stopping"


async def test_told_to_stop_while_the_master_does_not_answer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "LAST_POLL_SEC", 0.1)
    with FakeMaster() as master:
        master.fault("GET /jobs/next", "hang", count=100)
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        await asyncio.to_thread(master.wait_for_request, "GET /jobs/next")
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work


@pytest.mark.parametrize("completed", [True, False])
async def test_what_an_earlier_run_accepted_is_answered_for_once(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, completed: bool
) -> None:
    """Even where the master gave us a new id meanwhile, and shows its list to nobody."""
    caplog.set_level(logging.INFO)
    with FakeMaster(max_retries=0) as master:
        job = master.submit({}, {"status": "processing", "node_id": "our-old-id"})
        accepted = Job.model_validate(job)
        records = Records(tmp_path)
        records.accepted(accepted)
        if completed:
            result = JobResult(job_id=job["id"], node_id="our-old-id", status="completed")
            records.ended(accepted, result)
        records.close()
        master.fault("GET /jobs", "status", count=100)
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        ended = await asyncio.to_thread(master.wait, job["id"])
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work
        assert ended["status"] == ("completed" if completed else "failed")
        assert len(master.results) == 1
        if not completed:
            assert "restarted" in ended["error"]
    records = Records(tmp_path)
    assert records.left() == []
    records.close()


async def test_a_result_that_cannot_be_delivered_waits_for_the_next_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.dispatch.LAST_REPORTS_SEC", 0.1)
    with FakeMaster() as master:
        master.fault("POST /results", "status", status=503, count=1000)
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        master.submit({"parameters": {"codec": "betamax"}})
        await asyncio.to_thread(master.wait_for_request, "POST /results")
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work
    records = Records(tmp_path)
    [entry] = records.left()
    assert isinstance(entry, Acceptance)
    assert entry.result is not None
    assert entry.result.status == "failed"
    records.close()


async def test_what_is_attached_is_counted_also_after_systemd_was_away(
    make: Make, launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "ATTACHMENTS_SECONDS", 0.0)
    counted: list[frozenset[str]] = []
    agent = make()
    monkeypatch.setattr(agent._metrics, "set_attached", counted.append)
    launcher.bus.attached = [["a.scope"], BusGone("gone"), ["a.scope", "b.scope"], []]
    counting = asyncio.create_task(agent._count_attached())
    async with asyncio.timeout(5):
        while [] not in map(list, counted):
            await asyncio.sleep(0)
    counting.cancel()
    assert counted[:3] == [{"a.scope"}, {"a.scope", "b.scope"}, frozenset()]


@pytest.mark.parametrize(
    ("found", "label"),
    [
        (Enforcement((Limit.CPU, Limit.TASKS, Limit.CPU_WEIGHT), {}, ""), "cpu,tasks"),
        (Enforcement((), {}, ""), ""),
        (None, None),
    ],
)
async def test_the_master_is_told_which_limits_hold(
    make: Make, monkeypatch: pytest.MonkeyPatch, found: Enforcement | None, label: str | None
) -> None:
    asked: list[bool] = []

    async def check(_launcher: object, *, user: bool) -> Enforcement | None:
        asked.append(user)
        return found

    monkeypatch.setattr(enforcement, "check", check)
    facts = await make()._look_around()
    assert facts.registration("box").labels.get("limits") == label
    assert asked == [False]


async def test_limits_that_cannot_be_looked_at_do_not_keep_it_from_starting(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    facts = await make()._look_around()
    assert "limits" not in facts.labels
    assert "cannot tell which limits hold: there is no sleep(1) in PATH" in caplog.text
