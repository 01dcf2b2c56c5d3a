"""The watch over running jobs: what it does about each state, and how often it asks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION
from worker.errors import (
    JobUnknown,
    MasterRefused,
    MasterUnreachable,
    NodeUnknown,
    SystemdError,
    Unauthorized,
)
from worker.master.client import MasterClient
from worker.master.retry import Backoff
from worker.master.wire import Job
from worker.watch import Watch

MADE = "2026-11-24T19:00:00.5Z"


class Enough(Exception):
    """The time of the test is over."""


class Stage:
    """A master that is a table, jobs that run, and time that passes only in sleep."""

    def __init__(
        self,
        *names: str,
        interval: float = 5.0,
        client: Any = None,
        busy: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.now = 0.0
        self.cpu = 0.0
        self.cpu_of_a_look = 0.0
        self.running: dict[str, Job] = {name: job(name) for name in names}
        self.there: dict[str, Job | Exception] = dict(self.running)
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while a look is on its way."""
        self.asked: list[tuple[float, str]] = []
        self.done: list[tuple[str, ...]] = []
        self.paused: set[str] = set()
        self.trouble: Exception | None = None
        self.node_ids = {"us"}
        self.until = 0.0
        self.later: list[tuple[float, Callable[[], None]]] = []
        """What happens at a given time."""
        self.watch = Watch(
            client or self,
            lambda: self.running,
            interval=interval,
            node_ids=lambda: self.node_ids,
            is_paused=lambda name: name in self.paused,
            on_cancelled=self.cancelled,
            on_gone=self.gone,
            on_paused=self.hold,
            on_resumed=self.resume,
            busy=busy,
            clock=lambda: self.now,
            cpu_clock=lambda: self.cpu,
            sleep=self.sleep,
            backoff=Backoff(1.0, 60.0, uniform=lambda low, high: high),
            slow=Backoff(30.0, 270.0, floor=30.0, uniform=lambda low, high: high),
        )

    async def job(self, job: Job) -> Job:
        self.asked.append((self.now, job.id))
        self.cpu += self.cpu_of_a_look
        self.meanwhile()
        answer = self.there[job.id]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        if self.now + seconds > self.until:
            raise Enough
        self.now += seconds
        while self.later and self.later[0][0] <= self.now:
            self.later.pop(0)[1]()

    async def wait(self, seconds: float) -> None:
        """Let the watch work for so long."""
        self.until = self.now + seconds
        with pytest.raises(Enough):
            await self.watch.run()
        self.now = self.until

    def set(self, name: str = "a", **fields: Any) -> None:
        self.there[name] = self.running[name].model_copy(update=fields)

    def _note(self, *what: str) -> None:
        self.done.append(what)
        if self.trouble is not None:
            raise self.trouble

    def begin(self, name: str) -> None:
        self.running[name] = self.there[name] = job(name)

    async def cancelled(self, name: str) -> None:
        self._note("cancelled", name)

    async def gone(self, name: str, why: str) -> None:
        self._note("gone", name, why)

    async def hold(self, name: str) -> None:
        self._note("paused", name)
        self.paused.add(name)

    async def resume(self, name: str) -> None:
        self._note("resumed", name)
        self.paused.discard(name)


def job(name: str, **fields: Any) -> Job:
    given = {"id": name, "status": "processing", "node_id": "us", "created_at": MADE, **fields}
    return Job.model_validate(given)


async def test_it_does_not_wake_up_while_nothing_runs() -> None:
    async def busy() -> None:
        stage.now += 3600
        stage.until += 3600
        stage.begin("a")

    stage = Stage(busy=busy)
    await stage.wait(60)
    assert stage.asked[0] == (3605.0, "a")


# What follows from a state


async def test_nothing_follows_from_a_job_that_runs(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage("a")
    await stage.wait(60)
    assert stage.done == []
    assert len(stage.asked) == 12
    assert caplog.records == []


@pytest.mark.parametrize("spelling", ["canceled", "cancelled"])
async def test_a_cancelled_job_is_stopped_once(spelling: str) -> None:
    stage = Stage("a")
    stage.set(status=spelling)
    await stage.wait(60)
    assert stage.done == [("cancelled", "a")]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"status": "completed"}, "it is completed at the master"),
        ({"status": "failed"}, "it is failed at the master"),
        ({"node_id": "them"}, "it is with node them at the master"),
        ({"node_id": "them", "retry_count": 1}, "it is with node them at the master"),
    ],
)
async def test_a_job_that_is_not_ours_any_more_is_stopped_once(
    fields: dict[str, Any], why: str
) -> None:
    stage = Stage("a")
    stage.set(**fields)
    await stage.wait(60)
    assert stage.done == [("gone", "a", why)]


async def test_another_job_of_the_same_id_ends_ours() -> None:
    stage = Stage("a")
    stage.there["a"] = job("a", created_at="2026-12-24T19:00:00Z")
    await stage.wait(10)
    ((what, name, why),) = stage.done
    assert (what, name) == ("gone", "a")
    assert "another job" in why


async def test_a_job_is_held_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage("a")
    for status in ("paused", "processing", "paused"):
        stage.set(status=status)
        await stage.wait(30)
    assert stage.done == [("paused", "a"), ("resumed", "a"), ("paused", "a")]
    assert len(caplog.records) == 3


async def test_what_was_held_before_the_agent_started_is_known_from_the_execution() -> None:
    stage = Stage("a", "b")
    stage.paused = {"a", "b"}
    stage.set("b", status="paused")
    await stage.wait(20)
    assert stage.done == [("resumed", "a")]


async def test_a_job_that_is_queued_again_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage("a")
    stage.set(status="pending", node_id="", retry_count=1)
    await stage.wait(60)
    stage.set(retry_count=1)  # handed to us anew, in an answer that is on its way
    await stage.wait(10)
    stage.running["a"] = stage.there["a"] = job("a", retry_count=1)  # and here it is
    await stage.wait(10)
    assert stage.done == []
    assert [r.levelname for r in caplog.records if r.levelname != "INFO"] == ["WARNING"]
    assert "pending at the master (retry 1)" in caplog.text


async def test_a_job_that_is_queued_and_given_to_another_node_is_stopped() -> None:
    stage = Stage("a")
    stage.set(status="pending", node_id="", retry_count=1)
    await stage.wait(10)
    stage.set(node_id="them", retry_count=1)
    await stage.wait(10)
    assert [what for what, *_ in stage.done] == ["gone"]


async def test_a_job_that_moved_to_an_id_of_ours_learnt_meanwhile_is_ours() -> None:
    stage = Stage("a")
    stage.set(node_id="us-too")
    stage.meanwhile = lambda: stage.node_ids.add("us-too")
    await stage.wait(10)
    assert stage.asked
    assert stage.done == []


async def test_a_new_acceptance_that_is_cancelled_is_news() -> None:
    stage = Stage("a")
    stage.set(status="canceled")
    await stage.wait(10)
    stage.running["a"] = job("a", retry_count=1)
    stage.set(status="canceled")
    await stage.wait(10)
    assert stage.done == [("cancelled", "a")] * 2


async def test_a_job_that_is_cancelled_once_more_is_stopped_once_more() -> None:
    stage = Stage("a")
    for status in ("canceled", "processing", "canceled"):
        stage.set(status=status)
        await stage.wait(10)
    assert stage.done == [("cancelled", "a")] * 2


async def test_an_answer_about_the_past_is_ignored() -> None:
    """The job ended, or was handed out again, while the answer was on its way."""
    stage = Stage("a", "b")
    stage.set("a", status="completed")  # our own report
    stage.set("b", node_id="them")

    def change() -> None:
        stage.running.pop("a", None)
        stage.running["b"] = job("b", retry_count=1)
        stage.meanwhile = lambda: None
        stage.there["b"] = stage.running["b"]

    before = stage.there["b"]
    stage.meanwhile = change
    await stage.wait(5)
    assert len(stage.asked) == 1
    assert stage.done == []
    assert before != stage.there["b"]


@pytest.mark.parametrize("status", ["canceled", "paused", "failed"])
@pytest.mark.parametrize("trouble", [SystemdError("no answer"), KeyError("a defect")])
async def test_what_could_not_be_done_is_done_at_the_next_look(
    status: str, trouble: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage("a")
    stage.set(status=status)
    stage.trouble = trouble
    await stage.wait(11)
    assert len(stage.done) == 2
    stage.trouble = None
    await stage.wait(60)
    assert len(stage.done) == 3
    complaints = [r for r in caplog.records if "not done yet" in r.message]
    assert len(complaints) == 1
    assert ("Traceback" in caplog.text) is isinstance(trouble, KeyError)


# How often


async def test_a_job_is_first_asked_for_one_interval_after_it_began() -> None:
    stage = Stage(interval=5.0)
    stage.later.append((20.0, lambda: stage.begin("a")))
    await stage.wait(36)
    times = [time - 20 for time, _ in stage.asked]
    assert times == pytest.approx([5.0, 10.0, 15.0], abs=1.0)


async def test_jobs_that_began_together_are_not_asked_for_in_a_burst() -> None:
    stage = Stage(*"abcde")
    await stage.wait(30)
    times = [time for time, _ in stage.asked]
    assert times[:5] == pytest.approx([5.0, 5.5, 6.0, 6.5, 7.0])
    for name in "abcde":
        mine = [time for time, asked in stage.asked if asked == name]
        gaps = [after - before for before, after in itertools.pairwise(mine)]
        assert gaps == pytest.approx([5.0] * len(gaps))


async def test_many_jobs_are_asked_for_more_rarely() -> None:
    names = [f"job-{number}" for number in range(100)]
    stage = Stage(*names, interval=1.0)
    await stage.wait(101)
    assert len(stage.asked) == pytest.approx(400, abs=2)
    for name in names:
        assert sum(asked == name for _, asked in stage.asked) in (4, 5)


async def test_a_long_interval_does_not_hide_a_job_that_begins() -> None:
    stage = Stage("a", interval=300.0)
    stage.later.append((310.0, lambda: stage.begin("b")))
    await stage.wait(680)
    assert stage.asked == [(300.0, "a"), (600.0, "a"), (675.0, "b")]


async def test_a_job_that_ended_is_forgotten() -> None:
    stage = Stage("a", "b")
    stage.set("a", status="canceled")
    stage.later.append((12.0, lambda: stage.running.__delitem__("a")))
    stage.later.append((30.0, lambda: stage.begin("a")))
    stage.later.append((32.0, lambda: stage.set("a", status="canceled")))
    await stage.wait(42)
    times = [time for time, name in stage.asked if name == "a"]
    assert times == pytest.approx([5.0, 10.0, 35.0, 40.0], abs=1.5)
    assert stage.done == [("cancelled", "a")] * 2


async def test_looks_that_cost_much_are_rare() -> None:
    """As with a master that shows a job only in the list of thousands."""
    stage = Stage(*"abcde")
    stage.cpu_of_a_look = 0.5
    await stage.wait(260)
    assert len(stage.asked) == 11
    stage.cpu_of_a_look = 50.0
    await stage.wait(260)
    assert 4 <= len(stage.asked) - 11 <= 5


async def test_nothing_is_asked_before_we_are_registered() -> None:
    stage = Stage("a")
    stage.node_ids = set()
    await stage.wait(30)
    assert stage.asked == []
    stage.node_ids = {"us"}
    await stage.wait(2)
    assert len(stage.asked) == 1


# Masters that fail


@pytest.mark.parametrize(
    "error",
    [MasterUnreachable("gone"), MasterRefused("busy", 503), NodeUnknown("Node not found", 404)],
)
async def test_a_master_in_trouble_is_asked_more_and_more_rarely(error: MasterRefused) -> None:
    stage = Stage("a", interval=1.0)
    if isinstance(error, NodeUnknown):
        error.status = 500
    stage.there["a"] = error
    await stage.wait(200)
    times = [time for time, _ in stage.asked]
    assert times == pytest.approx([1, 2, 4, 8, 16, 32, 64, 124, 184])
    stage.set(status="canceled")
    await stage.wait(60)
    assert stage.done == [("cancelled", "a")]


async def test_a_master_that_does_not_answer_is_the_sessions_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage("a")
    stage.there["a"] = MasterUnreachable("gone")
    await stage.wait(200)
    assert caplog.records == []


@pytest.mark.parametrize(
    "error",
    [
        MasterRefused("slow down", 429, retry_after=100.0),
        MasterRefused("no such route", 404, retry_after=100.0),
        MasterUnreachable("not now", retry_after=100.0),
        Unauthorized("no", 403, retry_after=100.0),
    ],
)
async def test_the_wait_that_the_master_asks_for_is_kept(error: Exception) -> None:
    stage = Stage("a")
    stage.there["a"] = error
    await stage.wait(104)
    assert len(stage.asked) == 1


async def test_a_refused_key_is_tried_slowly() -> None:
    stage = Stage("a", "b")
    stage.there["a"] = stage.there["b"] = Unauthorized("no", 401)
    await stage.wait(160)
    assert [time for time, _ in stage.asked] == pytest.approx([5, 65, 155])
    stage.set("a")
    stage.set("b")
    await stage.wait(200)
    stage.there["a"] = stage.there["b"] = Unauthorized("no", 401)
    stage.asked.clear()
    await stage.wait(65)
    assert len(stage.asked) == 2


async def test_one_odd_answer_does_not_keep_the_others_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage("odd", "a")
    stage.there["odd"] = MasterRefused("is no JSON", 200)
    await stage.wait(20)
    stage.set("a", status="canceled")
    await stage.wait(8)
    assert stage.done == [("cancelled", "a")]
    assert [r.levelname for r in caplog.records if r.levelname != "INFO"] == ["WARNING"]


async def test_a_defect_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage("odd", "a")
    stage.there["odd"] = RecursionError("odd")
    stage.set("a", status="canceled")
    await stage.wait(30)
    assert stage.done == [("cancelled", "a")]
    assert [r.levelname for r in caplog.records if r.levelname == "ERROR"] == ["ERROR"]
    assert len([name for _, name in stage.asked if name == "odd"]) > 2


async def test_a_job_that_the_master_does_not_know_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage("a", "b")
    stage.there["a"] = JobUnknown("the master at box:80 has no job a", 404)
    await stage.wait(200)
    assert stage.done == []
    assert [r.message for r in caplog.records] == [
        "job a: it goes on, although the master at box:80 has no job a"
    ]
    asked = [name for _, name in stage.asked]
    assert asked.count("a") == 4
    assert asked.count("b") >= 35
    stage.set(status="canceled")
    await stage.wait(60)
    assert stage.done == [("cancelled", "a")]


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_master_that_shows_no_jobs_is_said_so_of_once(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage("a", "b")
    for name in "ab":
        stage.there[name] = MasterRefused("404 page not found", status)
    await stage.wait(600)
    assert len(stage.asked) == 10
    assert ["shows no jobs" in r.message for r in caplog.records] == [True]
    stage.set("a", status="canceled")
    stage.set("b")
    await stage.wait(80)
    assert stage.done == [("cancelled", "a")]


# With a master that speaks the protocol


async def test_over_http(caplog: pytest.LogCaptureFixture) -> None:
    with FakeMaster() as master:
        async with MasterClient(base_url=master.url) as client:
            stage = Stage(client=client, interval=1.0)
            node = await client.register(REGISTRATION)
            stage.node_ids = {node.id}
            for _ in range(3):
                master.submit({"scenario": "720p30-h264"})
                taken = await client.next_job(node.id)
                assert taken is not None
                stage.running[taken.id] = taken
            a, b, c = stage.running
            await stage.wait(3)
            assert stage.done == []
            master.store.steer("1", "cancel")
            master.store.steer("2", "pause")
            with master.store.changed:
                del master.store.jobs[c]
            await stage.wait(3)
            assert sorted(stage.done) == sorted([("cancelled", a), ("paused", b)])
            assert f"job {c}: it goes on" in caplog.text
            master.store.steer("2", "resume")
            await stage.wait(3)
            assert stage.done[2:] == [("resumed", b)]
            master.fault("GET *", "status", status=404, body="404 page not found", count=9)
            await stage.wait(3)
            assert "shows no jobs" in caplog.text
