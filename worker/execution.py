"""One accepted job on its way through its units: input, transcode, probe, publish, report.

``run`` returns the result to be delivered, whatever happens: every failure of a job is an
outcome, not an exception. A job that another agent began is taken up where it is: what is on
record of it, its units and its files tell how far it got.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from worker import workspace
from worker.acceptance import NoRecords, StepRecords
from worker.config import Settings
from worker.diskwatch import DiskWatch
from worker.errors import JobError, LedgerError, Reason, SystemdError
from worker.files.beneath import InputFile
from worker.following import Left
from worker.jobfiles import JobFiles, suffix_of
from worker.jobs import ffmpeg, probe, streams
from worker.jobs.capabilities import Capabilities
from worker.jobs.judge import CLD_EXITED
from worker.jobs.outcome import Intent, Outcome, error_text, stopped
from worker.jobs.parse import parse_job
from worker.jobs.progress import Progress, parse_progress
from worker.jobs.report import JobRun, build_result
from worker.jobs.spec import FileInput, GeneratedInput, JobSpec, Limits, StreamOutput
from worker.jobs.text import redact
from worker.master.wire import Job, JobResult
from worker.programs import Programs
from worker.site import Site
from worker.steps import StepRun, Steps
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, safe_id
from worker.systemd.ownunit import all_stops
from worker.systemd.suspend import Suspension
from worker.systemd.usage import Usage
from worker.workspace import Workspace

logger = logging.getLogger(__name__)

PROGRESS_LOG_SECONDS = 10.0
FIRST_PROGRESS_SECONDS = 2.0
LOG_LINES = 40
"""Of ffmpeg's last words, as many stay on record."""
_SHUTDOWN_LOOKS_LIKE = (Reason.PLATFORM_ERROR, Reason.RUNTIME_ERROR, Reason.NETWORK_ERROR)
"""A unit is stopped, cannot be started, or misses what the machine has stopped before it."""


class Execution:
    """Runs one job. ``run`` may be awaited once; ``stop`` may be called at any time."""

    def __init__(
        self,
        job: Job,
        *,
        node_id: str,
        launcher: Launcher,
        capabilities: Capabilities,
        programs: Programs,
        settings: Settings,
        site: Site,
        disk: DiskWatch,
        records: StepRecords | None = None,
        accepted_at: float | None = None,
        suspension: Suspension | None = None,
        on_progress: Callable[[Execution], None] | None = None,
    ) -> None:
        """``node_id`` is what the master calls us, where the job itself does not say it.

        ``records`` is what outlives us; ``accepted_at`` (Unix time) is now unless it is given.
        """
        self.job = job
        """The acceptance this run answers for; a job re-issued while it runs replaces it."""
        self.spec: JobSpec | None = None
        """None if the job asks for what cannot be."""
        self.outcome: Outcome | None = None
        """None until run() is done."""
        self.facts: JobRun | None = None
        """What the result was made of; None until run() is done."""
        self.generation_sec: float | None = None
        """How long it took to make the input, if it was made."""
        self.progress: Progress | None = None

        self._node_id = job.node_id or node_id
        self._launcher = launcher
        self._capabilities = capabilities
        self._programs = programs
        self._settings = settings
        self._site = site
        self._on_progress = on_progress
        self._name = safe_id(job.id)
        self._files = JobFiles(job.id, self._name, settings, site)
        self._workspace: Workspace | None = None
        self._records = records or NoRecords()
        self._accepted_at = time.time() if accepted_at is None else accepted_at
        self._generation: StepRun | None = None
        self._refused: JobError | None = None
        self._expected_sec: float | None = None
        self._next_progress_log = 0.0
        self._main: StepRun | None = None
        self._media: probe.Media | None = None
        self._input_bytes: int | None = None
        self._output_bytes: int | None = None
        self._staged_bytes: int | None = None
        self._command: tuple[str, ...] = ()
        self._given: InputFile | None = None
        self.steps = Steps(job, launcher, self._show, self._records, site, disk, suspension)
        try:
            self.spec = parse_job(
                job,
                capabilities,
                settings.defaults,
                generate_input=settings.generate_input,
                stream_host=streams.host_of(settings.master_url),
                policy=site.policy,
            )
        except JobError as error:
            self._refused = error

    # --- for whoever holds the job

    def stop(self, intent: Intent) -> None:
        """Ask for the end of the job: its unit is stopped, and the result says why."""
        self.steps.stop(intent)

    def leave(self) -> None:
        """Let go of the job as it is, for the next agent to take up: run() returns None."""
        self.steps.leave()

    async def release(self) -> None:
        """Clear away the units and the files: the result is on record."""
        await self.steps.release()
        if self._workspace is not None:
            # In a thread: a hostile job may have left a million names there.
            await asyncio.to_thread(self._workspace.clear)

    def close(self) -> None:
        """Let go of the job's folder: its result is safe. May be repeated."""
        if self._workspace is not None:
            self._workspace.remove()

    def progress_text(self) -> str:
        """How far the running step is, for people."""
        step = "transcoding" if self._command else "generating the input"
        if self.spec is not None and isinstance(self.spec.output, StreamOutput):
            step = "streaming"
        progress = self.progress
        if progress is None:
            return f"{step}: starting"
        text = f"{step}: frame {progress.frame or 0}, {progress.fps or 0:.0f} fps"
        if progress.speed is not None:
            text += f", speed {progress.speed:.2f}x"
        if progress.out_time_sec is not None and self._expected_sec:
            text += f", {min(100.0, 100 * progress.out_time_sec / self._expected_sec):.0f} %"
        return text

    async def run(self) -> JobResult | None:
        """Do the whole job; None if it was left. Raises nothing, unless its task is cancelled.

        The units and files stay until release(): they are all that tells of the job until its
        result is on record.
        """
        begun_at = datetime.fromtimestamp(self._accepted_at, UTC)
        begun = time.monotonic()
        if self.steps.resumed:
            begun -= max(0.0, time.time() - self._accepted_at)
        try:
            outcome = await self._work()
        except Left:
            logger.info("job %s: left to the next run of the worker", self.job.id)
            if self._workspace is not None:
                self._workspace.let_go()
            return None
        except JobError as error:
            outcome = Outcome.of(error)
        except (SystemdError, LedgerError) as error:
            outcome = Outcome.failed(Reason.PLATFORM_ERROR, str(error))
        except OSError as error:
            outcome = Outcome.failed(workspace.reason(error), f"a file of the job: {error}")
        except Exception as error:
            # A defect of ours costs this job, not the node.
            logger.exception("job %s: internal error", self.job.id)
            outcome = Outcome.failed(Reason.PLATFORM_ERROR, f"internal error: {error!r}")
        if await self._ended_with_the_machine(outcome):
            self.steps.stop(Intent.POWEROFF)
            outcome = stopped(Intent.POWEROFF)
        seconds = time.monotonic() - begun
        if outcome.completed:
            logger.info("job %s: completed in %.1f s", self.job.id, seconds)
        else:
            logger.warning("job %s: failed: %s", self.job.id, error_text(outcome))
        self.outcome = outcome
        self.facts = self._gathered(begun_at, seconds, outcome)
        return build_result(self.facts, outcome)

    async def _ended_with_the_machine(self, outcome: Outcome) -> bool:
        """systemd stops all units at once: the job's may have ended before we were told."""
        if outcome.reason in _SHUTDOWN_LOOKS_LIKE and self.steps.intent is Intent.NONE:
            return await all_stops(self._launcher.bus)
        return False

    @property
    def killed(self) -> bool:
        """The last unit did not end of itself, nor of a friendly signal: SIGKILL ended it."""
        step = self._main or self._generation
        return step is not None and (
            step.state.exec_main_code != CLD_EXITED
            and step.state.exec_main_status == signal.SIGKILL
        )

    def evidence(self) -> dict[str, Any]:
        """What the verdict rests on, for the record."""
        step = self._main or self._generation
        if step is None:
            return {}
        return {
            "unit": step.unit,
            "state": asdict(step.state),
            "usage": {key: value for key, value in asdict(step.usage).items() if value is not None},
            "log": redact("\n".join(step.log_text.splitlines()[-LOG_LINES:])),
        }

    # --- the way of the job

    async def _work(self) -> Outcome:
        # First: a node without ffmpeg has no encoders, and every job would ask for too much.
        self._programs.require()
        if self._refused is not None:
            raise self._refused
        spec = self.spec
        assert spec is not None
        if self.steps.resumed:
            self._look_again(spec)
        else:
            self._look_before(spec)
        jobs_dir = self._settings.work_dir / "jobs"
        make = Workspace.reopen if self.steps.resumed else Workspace.create
        space = await asyncio.to_thread(make, jobs_dir, self._name, self._site.gid)
        self._workspace = space
        if isinstance(spec.output, StreamOutput):
            return await self._stream(space, spec, spec.output)
        if isinstance(spec.source, GeneratedInput):
            await self._generate(space, spec)
        main = await self._transcode(space, spec)
        if not main.outcome.completed:
            self._staged_bytes = workspace.size_of(space.output(suffix_of(spec)))
            if main.outcome.reason is Reason.RUNTIME_ERROR:
                self._files.require_not_full(main.outcome)
            return main.outcome
        published = space.published()
        made = published or space.take_output(suffix_of(spec))
        if made is None:
            raise JobError(Reason.RUNTIME_ERROR, "ffmpeg ended well but left no output")
        self._staged_bytes = self._output_bytes = workspace.size_of(made)
        await self._check(space, spec, made, main)
        if published is None:
            await self._files.publish(made, spec, space.publishing)
        return main.outcome

    def _look_before(self, spec: JobSpec) -> None:
        """Raise JobError where the job cannot succeed, before anything is done for it."""
        for note in spec.notes:
            logger.info("job %s: %s", self.job.id, note)
        if isinstance(spec.source, FileInput):
            self._given = self._files.find(spec.source)
            self._input_bytes = self._given.size
        self._files.require_room(spec, self._given)

    def _look_again(self, spec: JobSpec) -> None:
        """The input as it is now, for a unit that was to be started and was not."""
        if isinstance(spec.source, FileInput):
            try:
                self._given = self._files.find(spec.source)
            except JobError as error:  # which matters only if it is still to be read
                logger.debug("job %s: %s", self.job.id, error)

    async def _generate(self, space: Workspace, spec: JobSpec) -> None:
        """Make the input in a unit of its own, under the node's limits rather than the job's."""
        assert isinstance(spec.source, GeneratedInput)
        if (record := self._records.recorded(Step.MAIN)) is not None:
            self.generation_sec = record.get("generation_sec")
            return
        self._expected_sec = spec.source.duration_sec
        self._next_progress_log = time.monotonic() + FIRST_PROGRESS_SECONDS
        target = space.input()
        limits = self._node_limits(spec.limits)
        command = ffmpeg.input_command(
            spec, self._programs.ffmpeg, target, encoders=self._capabilities.encoders
        )
        run = await self.steps.generate(space, spec, limits, command)
        self._generation, self.generation_sec = run, run.wall_seconds
        if not run.outcome.completed:
            assert run.outcome.reason is not None
            raise JobError(run.outcome.reason, run.outcome.message)
        self._input_bytes = space.take_input()
        if self._input_bytes is None:
            raise JobError(Reason.RUNTIME_ERROR, "ffmpeg ended well but left no test input")
        logger.info(
            "job %s: input generated in %.1f s (%d bytes)",
            self.job.id, run.wall_seconds, self._input_bytes,
        )  # fmt: skip
        await self._files.keep_input(target)

    def _source(self, space: Workspace, spec: JobSpec) -> str:
        """What ffmpeg reads: a path or a URL."""
        if self._given is not None:
            return str(self._given.path)
        return str(ffmpeg.source_name(spec, space.input()))

    async def _transcode(self, space: Workspace, spec: JobSpec) -> StepRun:
        staged = space.output(suffix_of(spec))
        source = self._source(space, spec)
        command = ffmpeg.transcode_command(spec, self._programs.ffmpeg, source, staged)
        return await self._main_step(space, spec, command, source, str(staged))

    async def _stream(self, space: Workspace, spec: JobSpec, output: StreamOutput) -> Outcome:
        """Send the output to a server: nothing to publish, and nothing left to probe."""
        logger.info("job %s: streaming to %s", self.job.id, redact(output.url))
        if isinstance(spec.source, GeneratedInput):
            self._expected_sec = spec.source.duration_sec
        begun = self._records.recorded(Step.MAIN) is not None
        if self._given is not None and not self._given.steady and not begun:
            # What is sent cannot be taken back, should it turn out to be another file.
            self._given = await asyncio.to_thread(space.pin, self._given)
        source = self._source(space, spec)
        # What is secret in the URL stands in a file: a command line can be read by everybody.
        hidden = ffmpeg.stream_secrets(spec)
        secrets = space.write_secrets(hidden) if hidden else None
        command = ffmpeg.stream_command(spec, self._programs.ffmpeg, source, secrets=secrets)
        readable = (secrets,) if secrets else ()
        main = await self._main_step(space, spec, command, source, output.url, readable)
        if main.progress is not None:
            self._output_bytes = main.progress.total_size
            self._media = streams.sent_media(spec, main.progress)
        if main.outcome.completed:
            streams.check_sent(spec, main.progress, main.log)
        return main.outcome

    async def _main_step(
        self,
        space: Workspace,
        spec: JobSpec,
        command: tuple[str, ...],
        source: str,
        output: str,
        readable: tuple[Path, ...] = (),
    ) -> StepRun:
        limits = spec.limits
        logger.info(
            "job %s: Resource limits: CPU=%d%%, Memory=%dMB, Disk=%dMB, Timeout=%ds",
            self.job.id, limits.cpu_percent, limits.memory_mb, limits.disk_mb, limits.timeout_sec,
        )  # fmt: skip
        self._command = command
        self.progress = None
        self._expected_sec = spec.duration_sec or self._expected_sec
        self._next_progress_log = time.monotonic() + FIRST_PROGRESS_SECONDS
        facts = {"generation_sec": self.generation_sec, "input_bytes": self._input_bytes}
        if (record := self._records.recorded(Step.MAIN)) is not None:
            self._input_bytes = record.get("input_bytes")
        self._main = await self.steps.transcode(
            space, spec, command, source, output, facts, given=self._given, readable=readable
        )
        self.progress = self._main.progress or self.progress
        return self._main

    async def _check(self, space: Workspace, spec: JobSpec, made: Path, main: StepRun) -> None:
        """Look at what came out, in a unit: the file was made by a parser of hostile input."""
        limits = self._node_limits(spec.limits)
        command = ffmpeg.probe_command(self._programs.ffprobe, made)
        text = await self.steps.probe(space, spec, limits, command, made)
        self._media = probe.parse_probe(text)
        expected = probe.expected_seconds(spec, main.log)
        encoded = main.progress.out_time_sec if main.progress else None
        probe.check_output(self._media, spec, expected, main.log, encoded_sec=encoded)

    # --- what is told

    def _show(self, text: str) -> None:
        """A running step's standard output grew; called once a second."""
        progress = parse_progress(text)
        if progress is None:
            return
        self.progress = progress
        now = time.monotonic()
        if now >= self._next_progress_log:
            logger.info("job %s: %s", self.job.id, self.progress_text())
            self._next_progress_log = now + PROGRESS_LOG_SECONDS
        if self._on_progress is not None:
            self._on_progress(self)

    def _gathered(self, begun_at: datetime, seconds: float, outcome: Outcome) -> JobRun:
        main = self._main
        step = main or self._generation
        generated = self.generation_sec is not None
        usage = step.usage if step else None
        if main is not None and usage is not None:
            # What a killed ffmpeg wrote is seen in its file only.
            usage = usage.merged(Usage(io_write_bytes=self._staged_bytes))
        return JobRun(
            job=self.job,
            node_id=self._node_id,
            node_name=self._settings.node_name,
            started_at=begun_at,
            ended_at=datetime.now(UTC),
            total_sec=seconds,
            spec=self.spec,
            unit=step.unit if step else "",
            transcode_sec=main.wall_seconds if main else None,
            usage=usage,
            progress=main.progress if main else None,
            media=self._media,
            input_bytes=self._input_bytes,
            output_bytes=self._output_bytes,
            generation_sec=self.generation_sec,
            input_encoder=(
                ffmpeg.input_encoder(self._capabilities.encoders) if generated else None
            ),
            command=self._command,
            log_tail=step.log_text if step else "",
            limits_changed=main.changes if main else "",
        )

    def _node_limits(self, limits: Limits) -> Limits:
        """The node's defaults, within what the machine has."""
        defaults = self._settings.defaults
        return Limits(
            cpu_percent=min(defaults.cpu_percent, 100 * self._capabilities.cpus),
            memory_mb=min(defaults.memory_mb, self._capabilities.memory_mb),
            disk_mb=max(defaults.disk_mb, limits.disk_mb),
            timeout_sec=defaults.timeout_sec,
            cpu_weight=limits.cpu_weight,
        )
