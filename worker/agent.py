"""The daemon: builds the parts, runs them together, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from worker import __version__, workspace
from worker.config import Settings
from worker.dispatch import LAST_POLL_SEC, Dispatcher
from worker.errors import Reason, SystemdError
from worker.execution import Execution
from worker.jobs.outcome import Outcome
from worker.jobs.report import JobRun, build_result
from worker.leftovers import Acceptance, Records, Remains
from worker.master.client import MasterClient
from worker.master.delivery import deliver
from worker.master.retry import Backoff, Throttle
from worker.master.session import NodeSession
from worker.master.wire import Job, JobResult
from worker.node import disk
from worker.node.facts import NodeFacts, gather
from worker.steps import Programs
from worker.systemd import enforcement
from worker.systemd.launcher import Launcher
from worker.systemd.scope import attachments
from worker.telemetry.metrics import Metrics
from worker.telemetry.notify import Notifier
from worker.telemetry.server import Server

logger = logging.getLogger(__name__)

BUS_PATIENCE_SEC = 30.0
DISK_WARN_RATIO = 0.90
DISK_FULL_RATIO = 0.95
STATUS_SECONDS = 5.0
CLOSE_SECONDS = 3.0
ATTACHMENTS_SECONDS = 15.0
"""Between two counts of what is attached; each costs systemd a walk over its units."""

T = TypeVar("T")


class Stopped(Exception):
    """Told to stop before the work has begun."""


class Agent:
    """One worker node. ``run`` returns when it was told to stop and has cleaned up."""

    def __init__(self, settings: Settings, notifier: Notifier) -> None:
        self._settings = settings
        self._notifier = notifier
        self._metrics = Metrics(
            settings.node_name, settings.metrics_port, slots=settings.max_concurrent_jobs
        )
        self._launcher = Launcher(user=settings.user)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._disk_complaint = Throttle(600.0)
        self._session: NodeSession | None = None

    async def run(self) -> None:
        """Work until SIGTERM, SIGINT or SIGHUP. Raises WorkerError where that cannot even begin."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        settings = self._settings
        workspace.require_work_dir(settings.work_dir)
        records = Records(settings.work_dir)
        server = None
        try:
            if settings.metrics_port:
                server = Server(
                    self._metrics,
                    self.readiness,
                    address=settings.metrics_addr,
                    port=settings.metrics_port,
                )
                server.start()
            await self._unless_stopped(connect(self._launcher))
            await self._work(records)
        except Stopped:
            logger.info("stopped before any job was taken")
        finally:
            try:
                await asyncio.wait_for(self._launcher.close(), CLOSE_SECONDS)
            except TimeoutError:
                logger.warning("systemd did not answer in time; units may be left over")
            if server is not None:
                server.stop()
            records.close()

    async def _unless_stopped(self, work: Coroutine[None, None, T]) -> T:
        """The result of a part of the start; raises Stopped as soon as we are told to stop."""
        task = asyncio.create_task(work)
        told = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, told}, return_when="FIRST_COMPLETED")
            if not task.done():
                raise Stopped
            return task.result()
        finally:
            for unfinished in (task, told):
                unfinished.cancel()
            await asyncio.gather(task, told, return_exceptions=True)

    def readiness(self) -> list[str]:
        """Why this node takes no jobs now; empty when it does. Called from other threads."""
        reasons = []
        if self._stop.is_set():
            reasons.append("the worker is stopping")
        if not self._launcher.connected:
            reasons.append("no connection to systemd over D-Bus")
        if self._session is None:
            reasons.append("the worker is starting")
        elif not self._session.registered:
            trouble = self._session.last_error
            reasons.append(f"not registered: {trouble}" if trouble else "registering")
        elif self._session.last_error:
            reasons.append(self._session.last_error)
        if unusable := self._disk_unusable():
            reasons.append(unusable)
        return reasons

    async def _work(self, records: Records) -> None:
        settings = self._settings
        logger.info("ffmpeg-worker %s, systemd %d", __version__, self._launcher.version)
        left = records.left()
        remains = Remains(settings.work_dir, self._launcher, [entry.job for entry in left])
        await self._unless_stopped(remains.clear())
        self._notifier.ready("starting")
        facts = await self._unless_stopped(self._look_around())
        self._metrics.set_encoders(facts.encoders.proven, has_gpu=facts.capabilities.has_gpu)
        programs = Programs.find()
        key = settings.master_api_key
        async with MasterClient(
            base_url=settings.master_url,
            api_key=key.get_secret_value() if key else None,
            ca=settings.ca,
            cert=settings.cert,
            key=settings.key,
            insecure=settings.insecure_skip_verify,
        ) as client:
            session = self._session = NodeSession(
                client,
                facts.registration(settings.node_name),
                heartbeat_interval=settings.heartbeat_interval,
                on_heartbeat=self._metrics.heartbeat,
                on_answer=self._metrics.set_master_up,
                in_doubt=True,
                run_by_others=remains.run_by_others,
            )

            def execute(job: Job) -> Execution:
                return Execution(
                    job,
                    node_id=session.node_id or "",
                    launcher=self._launcher,
                    capabilities=facts.capabilities,
                    programs=programs,
                    settings=settings,
                )

            async def report(job: Job, result: JobResult, *, maybe_landed: bool) -> None:
                await deliver(
                    client, job, result, maybe_landed=maybe_landed, node_ids=session.node_ids
                )

            dispatcher = Dispatcher(
                slots=settings.max_concurrent_jobs,
                poll_interval=settings.poll_interval,
                source=session,
                execute=execute,
                deliver=report,
                records=records,
                blocked=self._blocked,
                metrics=self._metrics,
            )
            for entry in left:
                session.remember(entry.job)
            await self._serve(session, dispatcher, left)

    async def _look_around(self) -> NodeFacts:
        """What this machine is and, found out meanwhile, which limits hold on it."""
        facts, limits = await asyncio.gather(
            gather(systemd_version=self._launcher.version),
            enforcement.check(self._launcher, user=self._settings.user),
        )
        if limits is None:
            return facts
        return replace(facts, labels={**facts.labels, "limits": limits.label})

    async def _serve(
        self, session: NodeSession, dispatcher: Dispatcher, left: list[Acceptance]
    ) -> None:
        """Take jobs until told to stop; heartbeats go on until the last report is off."""
        heartbeats = asyncio.create_task(session.run(), name="heartbeats")
        polling = asyncio.create_task(self._poll(session, dispatcher, left), name="polling")
        status = asyncio.create_task(self._tell_status(session, dispatcher), name="status")
        attached = asyncio.create_task(self._count_attached(), name="attachments")
        told = asyncio.create_task(self._stop.wait(), name="stop")
        tasks = (heartbeats, polling, status, attached, told)
        try:
            await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        finally:
            status.cancel()
            attached.cancel()
            self._stop.set()
            self._notifier.stopping("stopping jobs and reporting them")
            dispatcher.stop_polling()
            # A request for a job that is under way may still bring one; it must be answered for.
            patience = LAST_POLL_SEC if session.registered else 0
            await asyncio.wait({polling}, timeout=patience)
            polling.cancel()
            await dispatcher.stop(self._hurry)
            heartbeats.cancel()
            told.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _poll(
        self, session: NodeSession, dispatcher: Dispatcher, left: list[Acceptance]
    ) -> None:
        # The master knows the node again before it hears of its jobs: a report first could make
        # it give us a new id (it does so for a node whose job has just been queued again).
        await session.register()
        dispatcher.changed.set()
        for job, result in ((entry.job, entry.result) for entry in left):
            if result is not None:
                logger.info("job %s: its result was not delivered yet", job.id)
                dispatcher.report(job, result, maybe_landed=True)
            else:
                logger.warning("job %s: the worker ended while it ran; reporting it failed", job.id)
                dispatcher.report(job, self._restarted(job))
        await dispatcher.run()

    def _restarted(self, job: Job) -> JobResult:
        now = datetime.now(UTC)
        run = JobRun(
            job=job,
            node_id=job.node_id,
            node_name=self._settings.node_name,
            started_at=now,
            ended_at=now,
            total_sec=0.0,
        )
        sentence = "the worker was restarted while the job ran; run it again"
        return build_result(run, Outcome.failed(Reason.PLATFORM_ERROR, sentence))

    async def _tell_status(self, session: NodeSession, dispatcher: Dispatcher) -> None:
        """Keep systemctl's status line, the disk gauge and the disk warning up to date."""
        last = ""
        while True:
            used = self._disk_used()
            if used is not None:
                self._metrics.set_disk_used(used)
            if used is not None and used >= DISK_WARN_RATIO and self._disk_complaint.due():
                logger.warning(
                    "the disk of %s is %.0f %% full; at %.0f %% no more jobs are taken",
                    self._settings.work_dir, used * 100, DISK_FULL_RATIO * 100,
                )  # fmt: skip
            reasons = self.readiness()
            line = f"{len(dispatcher.running)} of {dispatcher.slots} slots in use"
            line = f"{line}; taking no jobs: {'; '.join(reasons)}" if reasons else f"ready, {line}"
            if line != last:
                self._notifier.status(line)
                last = line
            dispatcher.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(dispatcher.changed.wait(), STATUS_SECONDS)

    async def _count_attached(self) -> None:
        """Keep the metrics of attached processes up to date."""
        while True:
            try:
                self._metrics.set_attached(await attachments(self._launcher.bus))
            except SystemdError as error:
                logger.debug("cannot count what is attached: %s", error)
            await asyncio.sleep(ATTACHMENTS_SECONDS)

    def _blocked(self) -> str:
        if not self._launcher.connected:
            return "no connection to systemd over D-Bus"
        return self._disk_unusable()

    def _disk_unusable(self) -> str:
        """Why no job can have its files in the work directory; empty if they can."""
        folder = self._settings.work_dir
        try:
            used = disk.usage(folder).used_ratio
        except OSError as error:
            return f"the work directory {folder}: {error.strerror}"
        if used >= DISK_FULL_RATIO:
            return (
                f"the disk of {folder} is {used:.0%} full (limit {DISK_FULL_RATIO:.0%}); "
                "free some space"
            )
        if not os.access(folder / "jobs", os.W_OK | os.X_OK):
            return f"the work directory {folder / 'jobs'} is not writable"
        return ""

    def _disk_used(self) -> float | None:
        """0 to 1; None where the work directory cannot be looked at, which readiness tells."""
        try:
            return disk.usage(self._settings.work_dir).used_ratio
        except OSError:
            return None

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logger.warning("%s again: not waiting for reports any more", number.name)
            self._hurry.set()
        else:
            logger.info("%s: stopping", number.name)
            self._stop.set()


async def connect(launcher: Launcher) -> None:
    """Connect to systemd, waiting a little where the bus is not up yet.

    Raises SystemdError after BUS_PATIENCE_SEC.
    """
    backoff = Backoff(0.5, 5.0)
    deadline = asyncio.get_running_loop().time() + BUS_PATIENCE_SEC
    while True:
        try:
            return await launcher.connect()
        except SystemdError as error:
            wait = backoff.next()
            if asyncio.get_running_loop().time() + wait > deadline:
                raise
            logger.warning("%s; next attempt in %.1f s", error, wait)
            await asyncio.sleep(wait)
