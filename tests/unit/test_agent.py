"""The daemon's own decisions: when it is ready, when it takes no jobs, how it starts and stops."""

from __future__ import annotations

import asyncio
import grp
import logging
import pwd
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.attachments import FakeBus
from tests.fakes.master import FakeMaster
from worker import agent as agent_module
from worker.agent import Agent, connect
from worker.config import resolve
from worker.errors import BusGone, SystemdError, WorkerError
from worker.ledger import Entry, Ledger, State
from worker.master.session import NodeSession
from worker.master.wire import Job, JobResult
from worker.steering import Draining
from worker.systemd import enforcement
from worker.systemd.enforcement import Enforcement, Limit
from worker.systemd.launcher import Launcher
from worker.systemd.ownunit import StopReason
from worker.telemetry.notify import Notifier
from worker.upkeep import Upkeep


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

    async def stop_and_reap(self, _unit: str) -> None:
        pass

    def sweep(self, _loaded: object) -> None:
        pass

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
            "JOB_GROUP": grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name,
            "OUTPUT_OWNER": "nobody",
            **keys,
        }
        settings = resolve({}, environment).settings
        agent = Agent(settings, Notifier({}))
        agent._launcher = cast("Launcher", launcher)
        return agent

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def stopped(_bus: object) -> StopReason:
        return StopReason.STOP

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("worker.ending.stop_reason", stopped)


def answering(**fields: Any) -> NodeSession:
    return cast("NodeSession", SimpleNamespace(registered=True, last_error="", **fields))


def test_reasons_not_to_be_ready(make: Make, launcher: FakeLauncher) -> None:
    agent = make()
    agent._upkeep = cast("Upkeep", SimpleNamespace(unusable=list))
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
    launcher.connected = True
    agent._draining = cast("Draining", SimpleNamespace(on=True))
    assert agent.readiness() == ["draining (`ffmpeg-worker undrain` ends it)"]
    assert agent._blocked() == "draining"
    agent._draining = None
    agent._upkeep = cast("Upkeep", SimpleNamespace(unusable=lambda: ["the disk is full"]))
    assert agent.readiness() == ["the disk is full"]
    assert agent._blocked() == "the disk is full"


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
    first = Ledger.open(tmp_path / "ledger.db")
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
    monkeypatch.setattr("worker.ending.LAST_POLL_SEC", 0.1)
    with FakeMaster() as master:
        master.fault("GET /jobs/next", "hang", count=100)
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        await asyncio.to_thread(master.wait_for_request, "GET /jobs/next")
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work


def entries(work_dir: Path) -> list[Entry]:
    ledger = Ledger.open(work_dir / "ledger.db")
    try:
        return ledger.recent(100)
    finally:
        ledger.close()


@pytest.mark.parametrize("completed", [True, False])
async def test_what_an_earlier_run_accepted_is_answered_for_once(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, completed: bool
) -> None:
    """Even where the master gave us a new id meanwhile, and shows its list to nobody."""
    caplog.set_level(logging.INFO)
    with FakeMaster(max_retries=0) as master:
        job = master.submit({}, {"status": "processing", "node_id": "our-old-id"})
        ledger = Ledger.open(tmp_path / "ledger.db")
        entry = ledger.accept(Job.model_validate(job))
        ledger.starting(entry.id, "main", "ffmpeg-job-x.service", {"boot_id": "an older one"})
        if completed:
            result = JobResult(job_id=job["id"], node_id="our-old-id", status="completed")
            ledger.finish(entry.id, result, {})
        ledger.close()
        master.fault("GET /jobs", "status", count=100)
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        ended = await asyncio.to_thread(master.wait, job["id"])
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work
        assert ended["status"] == ("completed" if completed else "failed")
        assert len(master.results) == 1
    assert [entry.state for entry in entries(tmp_path)] == [State.REAPED]


@pytest.mark.parametrize("ours", [True, False])
async def test_what_was_accepted_and_not_begun_is_begun_if_it_is_still_ours(
    make: Make, tmp_path: Path, ours: bool
) -> None:
    with FakeMaster(max_retries=0) as master:
        node = "our-old-id" if ours else "another"
        job = master.submit(
            {"parameters": {"codec": "betamax"}}, {"status": "processing", "node_id": node}
        )
        ledger = Ledger.open(tmp_path / "ledger.db")
        ledger.accept(Job.model_validate({**job, "node_id": "our-old-id"}))
        ledger.close()
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        await asyncio.to_thread(master.wait_for_request, "GET /jobs/next")
        if ours:
            await asyncio.to_thread(master.wait, job["id"])
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work
        assert len(master.results) == ours
    [entry] = entries(tmp_path)
    assert (entry.state, entry.settled) == (State.REAPED, "delivered" if ours else "dropped")


async def test_a_result_that_cannot_be_delivered_waits_for_the_next_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.reports.LAST_REPORTS_SEC", 0.1)
    with FakeMaster() as master:
        master.fault("POST /results", "status", status=503, count=1000)
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        master.submit({"parameters": {"codec": "betamax"}})
        await asyncio.to_thread(master.wait_for_request, "POST /results")
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work
    [entry] = entries(tmp_path)
    assert entry.state is State.FINISHED
    assert entry.result is not None
    assert entry.result.status == "failed"


async def test_nothing_is_said_until_the_master_has_given_its_jobs_away(
    make: Make, tmp_path: Path
) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.put("silent since", str(time.time()))
    ledger.close()
    with FakeMaster() as master:
        agent = make(MASTER_URL=master.url)
        work = asyncio.create_task(agent.run())
        async with asyncio.timeout(10):
            while not agent._waiting:
                await asyncio.sleep(0.01)
        assert agent.readiness()[0].startswith("silent for ")
        agent._signalled(signal.SIGTERM)
        async with asyncio.timeout(10):
            await work
        assert master.seen("POST /nodes/register") == []


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
