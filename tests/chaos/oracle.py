"""Whether the promises were kept: each acceptance has one result, nothing ran twice."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.master import Event
from tests.chaos.node import Start
from tests.chaos.world import Job, World
from worker.ledger import Entry

STOPPED = "the worker was stopped"
AT_WORK = ("processing", "paused")


@dataclass
class Acceptance:
    """One hand-out of a job, until the next one of the same job."""

    retry: int
    begin: float
    end: float = float("inf")
    results: list[Event] = field(default_factory=list)
    taken_back: Event | None = None
    """Cancelled, or given away by the master itself."""
    starts: dict[str, list[Start]] = field(default_factory=dict)
    """Of its units, by step: ``input``, ``probe`` and, as the transcode, ``""``."""


@dataclass
class History:
    """All that is known of one job."""

    job: Job
    state: str
    error: str
    events: list[Event]
    acceptances: list[Acceptance]
    results: list[Event]

    def starts(self, step: str = "") -> list[Start]:
        return [start for one in self.acceptances for start in one.starts.get(step, [])]


def histories(world: World) -> dict[str, History]:
    starts = world.node.starts()
    with world.master.changed:
        events = list(world.master.store.events)
    found = {}
    for job in world.jobs.values():
        own = [event for event in events if event.job == job.id]
        state = world.master.state(job.id)
        found[job.id] = History(
            job, state["status"], state.get("error", ""), own,
            list(_acceptances(job, own, starts)),
            [event for event in own if event.what == "result"],
        )  # fmt: skip
    return found


def _acceptances(job: Job, events: Sequence[Event], starts: Sequence[Start]) -> list[Acceptance]:
    found: list[Acceptance] = []
    for event in events:
        if event.what == "handout":
            if found:
                found[-1].end = event.at
            found.append(Acceptance(event.retry, event.at))
        elif event.what == "result" and found:
            found[-1].results.append(event)
        elif event.what in ("cancel", "requeue") and found:
            found[-1].taken_back = found[-1].taken_back or event
    for start in starts:
        stem = start.unit.removeprefix(f"ffmpeg-job-{job.id}")
        if stem != start.unit:
            step = stem.removesuffix(".service").removeprefix("-")
            for one in found:
                if one.begin <= start.at < one.end:
                    one.starts.setdefault(step, []).append(start)
    return found


def judge(world: World) -> list[str]:
    """Everything that is not as promised. Empty if all is well."""
    problems = list(world.problems)
    entries = world.node.entries()
    for history in histories(world).values():
        for problem in _of_job(world, history, entries):
            problems.append(f"job {history.job.id} ({history.job.kind}): {problem}")
    left = world.node.left()
    problems += [f"left over: {what}" for what in left[:10]]
    problems += [f"left over: {len(left) - 10} more"] if len(left) > 10 else []
    problems += _of_log(world)
    return problems


def _of_job(world: World, history: History, entries: Sequence[Entry]) -> Iterator[str]:
    carried = False
    if not history.acceptances:
        if history.state != "canceled":
            yield f"was never handed out and is {history.state}"
        return
    for one in history.acceptances:
        name = f"retry {one.retry}"
        if len(one.results) > 1:
            said = ", ".join(f"{event.status} at {event.at:.3f}" for event in one.results)
            yield f"{name}: {len(one.results)} results: {said}"
        if not one.results and one.taken_back is None:
            yield f"{name}: no result"
        for step in ("", "input"):
            if len(one.starts.get(step, [])) > 1:
                yield f"{name}: unit {step or 'main'} was started {len(one.starts[step])} times"
        ran = bool(one.starts.get(""))
        for event in one.results:
            if event.status == "completed" and not ran and not carried:
                yield f"{name}: completed, and ffmpeg was never started"
            if event.status == "failed":
                yield from _explained(world, history.job, one, event)
        # What the master gave away by itself goes on here, and answers for the next hand-out.
        given_away = one.taken_back is not None and one.taken_back.what == "requeue"
        carried = given_away and (ran or carried)
    yield from _results_in_time(history)
    noted = [entry for entry in entries if entry.job.id == history.job.id and "main" in entry.steps]
    if len(history.starts()) > len(noted):
        yield f"{len(history.starts())} starts of ffmpeg, {len(noted)} on record"
    yield from _end(history)


def _results_in_time(history: History) -> Iterator[str]:
    """A result must not overwrite what became of the job, unless that was not to be seen."""
    looked = changed = 0
    for index, event in enumerate(history.events):
        if event.what == "look":
            looked = index
        elif event.what in ("cancel", "requeue"):
            changed = index
        elif event.what == "result" and event.state not in AT_WORK and changed < looked:
            yield f"a result ({event.status}) came when the job was {event.state}"


def _explained(world: World, job: Job, one: Acceptance, event: Event) -> Iterator[str]:
    """A good job fails only where it was stopped, or the disk was full."""
    if job.bad:
        if not event.error.startswith(("input_error", "runtime_error")):
            stopped = STOPPED in event.error and _overlaps(world.stops, one.begin, event.at)
            if not stopped and not _overlaps(world.node.full, one.begin, event.at):
                yield f"retry {one.retry}: failed for another reason than its input: {event.error}"
        return
    stopped = STOPPED in event.error and _overlaps(world.stops, one.begin, event.at)
    if not stopped and not _overlaps(world.node.full, one.begin, event.at):
        yield f"retry {one.retry}: failed although nothing was wrong with it: {event.error}"


def _overlaps(spans: Sequence[tuple[float, float]], begin: float, end: float) -> bool:
    return any(first < end and begin < last for first, last in spans)


def _end(history: History) -> Iterator[str]:
    job, state = history.job, history.state
    cancelled = any(event.what == "cancel" for event in history.events)
    wanted = {"failed"} if job.bad else {"completed"}
    if cancelled:
        wanted.add("canceled")
    if state not in wanted:
        yield f"is {state} in the end, not {' or '.join(sorted(wanted))}: {history.error}"
    if job.output is None:
        return
    if job.output.exists():
        if problem := _incomplete(job.output, job.seconds):
            yield f"is {state}, and its output is not whole: {problem}"
        elif state == "failed":
            yield "is failed, and there is an output"
    elif state == "completed":
        yield "is completed, and there is no output"


def _incomplete(path: Path, seconds: float) -> str:
    command = ["ffprobe", "-v", "error", "-show_entries", "format=duration", "-of", "json"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    if done.returncode or done.stderr:
        return done.stderr.strip() or f"ffprobe gave {done.returncode}"
    found = float(json.loads(done.stdout)["format"]["duration"])
    return "" if abs(found - seconds) < 0.3 else f"{found} s of {seconds} s"


def _of_log(world: World) -> Iterator[str]:
    """What must not be in the agent's log."""
    for line in world.node.log():
        if any(word in line for word in ("Traceback", "internal error", "never retrieved")):
            yield f"log: {line}"
        if "Failed with result" in line and "'signal'" not in line:
            at = float(line.partition(" ")[0])
            if not _overlaps(world.node.full, at - 1, at + 1):
                yield f"log: {line}"
