"""How often the watch asks, and what it makes of a master that fails."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.watch.stage import Stage
from worker.errors import JobUnknown, MasterRefused, MasterUnreachable, NodeUnknown, Unauthorized

# How often


async def test_it_does_not_wake_up_while_nothing_runs() -> None:
    async def busy() -> None:
        stage.now += 3600
        stage.until += 3600
        stage.begin("a")

    stage = Stage(busy=busy)
    await stage.wait(60)
    assert stage.asked[0] == (3605.0, "a")


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
