"""Runs the units of one job, one after the other, and judges each."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from worker import workspace
from worker.acceptance import StepRecords, boot_id
from worker.diskwatch import DiskWatch
from worker.errors import JobError, Reason, SystemdError
from worker.files.beneath import InputFile, is_that_file
from worker.following import Following, Left
from worker.jobs.judge import judge
from worker.jobs.outcome import Intent, Outcome, stopped
from worker.jobs.progress import LogFacts, Progress, parse_progress, read_log
from worker.jobs.spec import JobSpec, Limits, StreamOutput, UrlInput
from worker.jobs.streams import without_key
from worker.launching import MIB, changed_limits, launch_of
from worker.master.wire import Job
from worker.site import Site
from worker.systemd.adoption import adopt
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, unit_name
from worker.systemd.overrides import described
from worker.systemd.state import UnitState
from worker.systemd.survivors import survivors
from worker.systemd.suspend import Suspension
from worker.systemd.unit import Unit
from worker.systemd.usage import Usage
from worker.workspace import Workspace

logger = logging.getLogger(__name__)

_Number = TypeVar("_Number", int, float)
PROBE_TIMEOUT_SEC = 120
PROBE_OUTPUT_BYTES = 1024 * 1024
STREAM_FILES_MB = 2048
"""A stream leaves no output; its log and progress may grow to this, whatever max_disk_mb is."""


@dataclass(frozen=True, slots=True)
class StepRun:
    """What one unit of the job did."""

    unit: str
    outcome: Outcome
    state: UnitState
    usage: Usage
    log: LogFacts
    log_text: str
    progress: Progress | None
    wall_seconds: float
    """Without the time for which it was paused."""
    changes: str
    """Limits that somebody else changed while it ran, for people; empty: none."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """One step, before it is taken."""

    step: Step
    limits: Limits
    command: tuple[str, ...]
    what: str = ""
    """For the sentence that tells of a failure; empty for the transcode."""
    program: str = "ffmpeg"
    source: str | None = None
    output: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is put on record with the start."""
    readable: tuple[Path, ...] = ()
    """Files that the unit is to see besides those of the job."""
    given: InputFile | None = None


class Steps:
    """The units of one job. ``on_output`` gets the end of the running one's standard output.

    A unit whose start is on record is never started again: it is followed where it is still
    there. So that it is, each stays loaded, verdict and all, until release().
    """

    def __init__(
        self,
        job: Job,
        launcher: Launcher,
        on_output: Callable[[str], None],
        records: StepRecords,
        site: Site,
        disk: DiskWatch,
        suspension: Suspension | None = None,
    ) -> None:
        self.intent = Intent.NONE
        """Why the job was told to stop."""
        self.resumed = any(records.recorded(step) is not None for step in Step)
        """An earlier agent has begun the job."""
        self.start_seconds: list[float] = []
        """How long each start took, from asking systemd to its answer."""
        self._job = job
        self._launcher = launcher
        self._on_output = on_output
        self._records = records
        self._site = site
        self._disk = disk
        self._suspension = suspension
        self._unit: Unit | None = None
        self._ended: list[Unit] = []
        self._reaped: set[str] = set()
        self._left = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self, intent: Intent) -> None:
        """End the unit that runs; none is started after this."""
        if self.intent is Intent.NONE:
            self.intent = intent
            if self._unit is not None:
                self._background(self._end(self._unit))

    @property
    def paused(self) -> bool:
        """The unit that runs is held; where none runs, none is."""
        return bool(self._unit and self._suspension and self._suspension.paused(self._unit))

    async def pause(self) -> None:
        """Hold the unit that runs, if one does. Raises SystemdError."""
        if self._unit and self._suspension:
            await self._suspension.pause(self._unit)

    async def resume(self) -> None:
        """Let it go on. Raises SystemdError."""
        if self._unit and self._suspension:
            await self._suspension.resume(self._unit)

    def leave(self) -> None:
        """Let the unit run and follow it no longer; none is started after this."""
        self._left.set()

    async def release(self) -> None:
        """Drop the units from systemd: return when none of this job is loaded any more.

        To be called when the result is on record, or will not be needed.
        """
        self._reap_ended()
        for step in (Step.INPUT, Step.MAIN):
            name = unit_name(self._job.id, step)
            if self._records.recorded(step) is not None and name not in self._reaped:
                self._background(self._end_by_name(name))  # followed by nobody, for some reason
        while self._tasks:
            for error in await asyncio.gather(*self._tasks, return_exceptions=True):
                if error is not None:
                    logger.error("job %s: clean-up failed", self._job.id, exc_info=error)

    async def generate(
        self, space: Workspace, spec: JobSpec, limits: Limits, command: tuple[str, ...]
    ) -> StepRun:
        """Make the job's test input."""
        return await self._run(
            space, spec, _Plan(Step.INPUT, limits, command, what="generating the input")
        )

    async def transcode(
        self,
        space: Workspace,
        spec: JobSpec,
        command: tuple[str, ...],
        source: str,
        output: Path | str,
        facts: Mapping[str, Any],
        given: InputFile | None = None,
        readable: tuple[Path, ...] = (),
    ) -> StepRun:
        """The job proper, under its own limits. ``source`` and ``output`` are paths or URLs.

        ``facts`` is what was learnt before, to be put on record with the start. ``given`` is the
        input where it is a file that lies elsewhere, ``readable`` what the unit is to see besides.
        """
        limits = spec.limits
        if isinstance(spec.output, StreamOutput):
            limits = replace(limits, disk_mb=max(limits.disk_mb, STREAM_FILES_MB))
        plan = _Plan(
            Step.MAIN, limits, command, source=source, output=str(output), facts=facts,
            given=given, readable=readable,
        )  # fmt: skip
        return await self._run(space, spec, plan)

    async def probe(
        self,
        space: Workspace,
        spec: JobSpec,
        limits: Limits,
        command: tuple[str, ...],
        output: Path,
    ) -> str:
        """What ffprobe says of the output. Raises JobError if it could not be run."""
        limits = Limits(
            cpu_percent=limits.cpu_percent,
            memory_mb=limits.memory_mb,
            disk_mb=limits.disk_mb,
            timeout_sec=min(limits.timeout_sec, PROBE_TIMEOUT_SEC),
        )
        what = "probing the output"
        plan = _Plan(Step.PROBE, limits, command, what, program="ffprobe", readable=(output,))
        run = await self._run(space, spec, plan)
        text = workspace.read_tail(space.stdout(Step.PROBE), PROBE_OUTPUT_BYTES)
        # An exit status of 1 is ffprobe's verdict on the file, to be read from what it printed.
        if not run.outcome.completed and run.outcome.reason in (
            Reason.PLATFORM_ERROR, Reason.RESOURCE_ERROR, Reason.TIMEOUT,
        ):  # fmt: skip
            raise JobError(run.outcome.reason, run.outcome.message)
        return text

    async def _run(self, space: Workspace, spec: JobSpec, plan: _Plan) -> StepRun:
        step, record = plan.step, self._records.recorded(plan.step)
        limits = _recorded_limits(plan.limits, record)
        readable = (*plan.readable, *([plan.given.path] if plan.given else ()))
        launch = launch_of(
            step, self._job.id, space, spec, limits, plan.command, self._site, readable
        )
        asked = time.monotonic()
        unit = await self._unit_of(plan, launch, limits, record)
        self._unit = unit
        try:
            following = Following(self._launcher, unit, self._on_output, self._left)
            with self._disk.over(
                space.files,
                limits.disk_mb * MIB,
                control_group=lambda: unit.state.control_group,
                on_exceeded=lambda: self._background(self._kill(unit)),
                spared_bytes=workspace.size_of(space.input()) or 0,
                also=(launch.stdout,),
            ) as disk:
                if self.intent is not Intent.NONE:  # told to stop while systemd was starting it
                    self._background(self._end(unit))
                state = await following.end()
                too_much = await disk.final()
            usage = await unit.usage()
            held = self._suspension.paused_seconds(unit) if self._suspension else 0.0
        finally:
            self._unit = None
            self._ended.append(unit)
        left_behind = survivors(state.control_group)
        if step is Step.PROBE:
            self._ended.remove(unit)
            self._background(self._reap(unit))
        main = step is Step.MAIN
        is_stream = main and isinstance(spec.output, StreamOutput)
        log_text = workspace.read_ends(space.log(step))
        if is_stream and plan.output is not None:
            log_text = without_key(log_text, plan.output)
        log = read_log(log_text)
        wall = state.wall_seconds
        if wall is None:
            wall = time.monotonic() - asked
        usage = usage.merged(
            # ffmpeg's own account of itself, the only one of a job that ends within a second. No
            # more than can be: a job that was taken over may have written anything.
            Usage(
                cpu_seconds=_at_most(log.bench_cpu_seconds, (wall + 1) * (os.cpu_count() or 1)),
                # Counts shared libraries in full, though the kernel charges them to whoever used
                # them first, so it can be above the limit without any harm.
                memory_peak_bytes=_at_most(log.bench_maxrss_bytes, launch.limits.memory_bytes),
                io_read_bytes=log.bytes_read,
                io_write_bytes=log.bytes_written,
            )
        )
        outcome = judge(
            state, usage, self.intent, log, changed_limits(limits, following.changes),
            step=plan.what, program=plan.program, source=plan.source, output=plan.output,
            is_url=main and isinstance(spec.source, UrlInput), is_stream=is_stream,
            executed=unit.started or bool(log_text),
        )  # fmt: skip
        if too_much and self.intent is Intent.NONE:
            hint = "raise max_disk_mb, or ask for a lower bitrate or duration"
            outcome = Outcome.failed(Reason.RESOURCE_ERROR, f"{too_much}; {hint}")
        elif outcome.completed and left_behind:
            # They could still write to what is about to be checked and published.
            outcome = Outcome.failed(
                Reason.RUNTIME_ERROR,
                f"{plan.program} ended and left {len(left_behind)} processes behind; they are "
                "ended, and nothing of the job is used",
            )
        return StepRun(
            unit=unit.name,
            outcome=outcome,
            state=state,
            usage=usage,
            log=log,
            log_text=log_text,
            progress=parse_progress(workspace.read_tail(launch.stdout)),
            wall_seconds=max(0.0, wall - held),
            changes=described(following.changes),
        )

    async def _unit_of(
        self, plan: _Plan, launch: Launch, limits: Limits, record: Mapping[str, Any] | None
    ) -> Unit:
        """The step's unit: a new one, or the one that an earlier agent started."""
        if self._left.is_set():
            raise Left
        if record is not None:
            unit = await adopt(self._launcher, launch)
            if unit is not None:
                logger.info("job %s: following %s, started earlier", self._job.id, unit.name)
                return unit
            # Its standard output is made before the program is run, so it never was.
            if record.get("boot_id") != boot_id() or launch.stdout.exists():
                raise JobError(Reason.PLATFORM_ERROR, _gone(launch.unit, record))
        if self.intent is not Intent.NONE:
            raise JobError(Reason.PLATFORM_ERROR, stopped(self.intent).message)
        if plan.step is Step.PROBE:
            if self.resumed:  # looked at by an agent that died meanwhile: look again
                await self._launcher.stop_and_reap(launch.unit)
                launch.stdout.unlink(missing_ok=True)  # else the new answer follows the old one
        elif record is None:
            kept = {
                "cpu_percent": limits.cpu_percent,
                "memory_mb": limits.memory_mb,
                "disk_mb": limits.disk_mb,
                "timeout_sec": limits.timeout_sec,
            }
            await self._records.starting(plan.step, launch.unit, {**plan.facts, "limits": kept})
            self._reap_ended()  # of the step before: what it told is on record now
        asked = time.monotonic()
        unit = await self._launcher.start(launch)
        self.start_seconds.append(time.monotonic() - asked)
        self._announce(unit)
        if plan.given is not None and not plan.given.steady:
            await self._check_given(unit, plan.given)
        return unit

    async def _check_given(self, unit: Unit, given: InputFile) -> None:
        """Raise JobError, with the unit ended, unless it sees the input that was judged.

        systemd follows links when it maps the input, and whoever may write to the folders above
        may have put one there since it was looked at.
        """
        try:
            if is_that_file(unit.state.main_pid, given):
                return
        except OSError as error:
            logger.warning("job %s: cannot see what its unit sees: %s", self._job.id, error)
        self._ended.append(unit)
        await unit.kill()
        await unit.finished()
        raise JobError(
            Reason.INPUT_ERROR,
            f"input {given.path} was replaced while the job was started, or could not be looked at "
            "in time; give its folder to root, or run the job again",
        )

    def _announce(self, unit: Unit) -> None:
        """The facts that an operator checks a job's limits by."""
        state, limits = unit.state, unit.launch.limits
        logger.info(
            "job %s: %s: Process started with PID: %d, cgroup %s, nice=%d, CPUQuota=%s%%, "
            "MemoryMax=%s MB, RuntimeMaxSec=%s",
            self._job.id, unit.name, state.main_pid, state.control_group, unit.launch.nice,
            limits.cpu_percent, (limits.memory_bytes or 0) // MIB, limits.runtime_sec,
        )  # fmt: skip

    def _reap_ended(self) -> None:
        for unit in self._ended:
            self._reaped.add(unit.name)
            self._background(self._reap(unit))
        self._ended.clear()

    async def _end_by_name(self, name: str) -> None:
        try:
            await self._launcher.stop_and_reap(name)
        except SystemdError as error:
            logger.error("job %s: %s is left over: %s", self._job.id, name, error)

    async def _end(self, unit: Unit) -> None:
        try:
            await unit.stop()
        except SystemdError as error:
            logger.error("job %s: %s", self._job.id, error)

    async def _kill(self, unit: Unit) -> None:
        try:
            await unit.kill()
        except SystemdError as error:
            logger.error("job %s: %s", self._job.id, error)

    async def _reap(self, unit: Unit) -> None:
        try:
            await unit.reap()
            if self._suspension is not None:
                await self._suspension.forget(unit)
        except SystemdError as error:
            logger.error("job %s: %s is left over: %s", self._job.id, unit.name, error)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _at_most(value: _Number | None, limit: _Number | None) -> _Number | None:
    return value if value is None or limit is None else min(value, limit)


def _recorded_limits(limits: Limits, record: Mapping[str, Any] | None) -> Limits:
    """What the unit was started with, should the configuration have changed since."""
    known = record.get("limits") if record is not None else None
    return replace(limits, **known) if isinstance(known, dict) else limits


def _gone(unit: str, record: Mapping[str, Any]) -> str:
    if record.get("boot_id") != boot_id():
        return f"the machine was restarted while {unit} ran; run the job again"
    return (
        f"{unit} was started before the worker was, and is gone: somebody stopped it, or it ran "
        "into a stop of systemd; run the job again"
    )
