"""The watch over running jobs: what it does about each state."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION
from tests.unit.watch.stage import Stage, job
from worker.errors import SystemdError
from worker.master.client import MasterClient


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
