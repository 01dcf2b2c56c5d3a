"""The daemon: builds the parts, runs them together, and stops them in order."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
from datetime import UTC, datetime

from worker import __version__, workspace
from worker.config import Settings
from worker.dispatch import LAST_POLL_SEC, Dispatcher
from worker.errors import Reason, SystemdError
from worker.execution import Execution
from worker.jobs.outcome import Outcome
from worker.jobs.report import JobRun, build_result
from worker.leftovers import Leftovers
from worker.master.client import MasterClient
from worker.master.delivery import deliver
from worker.master.retry import Backoff, Throttle
from worker.master.session import NodeSession
from worker.master.wire import Job, JobResult
from worker.node import disk
from worker.node.facts import gather
from worker.steps import Programs
from worker.systemd.launcher import Launcher
from worker.telemetry.metrics import Metrics
from worker.telemetry.notify import Notifier
from worker.telemetry.server import Server

logger = logging.getLogger(__name__)

BUS_PATIENCE_SEC = 30.0
DISK_WARN_RATIO = 0.90
DISK_FULL_RATIO = 0.95
STATUS_SECONDS = 1.0


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
        self._dispatcher: Dispatcher | None = None

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT. Raises WorkerError where that cannot even begin."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        settings = self._settings
        server = None
        if settings.metrics_port:
            server = Server(
                self._metrics,
                self.readiness,
                address=settings.metrics_addr,
                port=settings.metrics_port,
            )
            server.start()
        try:
            workspace.require_work_dir(settings.work_dir)
            await connect(self._launcher)
            await self._work()
        finally:
            await self._launcher.close()
            if server is not None:
                server.stop()

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
        if full := self._disk_full():
            reasons.append(full)
        return reasons

    async def _work(self) -> None:
        settings = self._settings
        logger.info("ffmpeg-worker %s, systemd %d", __version__, self._launcher.version)
        leftovers = Leftovers(settings.work_dir / "jobs", self._launcher)
        await leftovers.stop()
        self._notifier.ready("starting")
        facts = await gather(systemd_version=self._launcher.version)
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
                in_doubt=True,
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

            async def report(job: Job, result: JobResult) -> None:
                await deliver(client, job, result)

            dispatcher = self._dispatcher = Dispatcher(
                slots=settings.max_concurrent_jobs,
                poll_interval=settings.poll_interval,
                source=session,
                execute=execute,
                deliver=lambda job, result: deliver(client, job, result),
                blocked=self._blocked,
                metrics=self._metrics,
            )
            await self._serve(client, session, dispatcher, leftovers)

    async def _serve(
        self,
        client: MasterClient,
        session: NodeSession,
        dispatcher: Dispatcher,
        leftovers: Leftovers,
    ) -> None:
        """Take jobs until told to stop; heartbeats go on until the last report is off."""
        heartbeats = asyncio.create_task(session.run(), name="heartbeats")
        polling = asyncio.create_task(self._poll(client, session, dispatcher, leftovers))
        status = asyncio.create_task(self._tell_status(session, dispatcher), name="status")
        told = asyncio.create_task(self._stop.wait(), name="stop")
        tasks = (heartbeats, polling, status, told)
        try:
            await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        finally:
            status.cancel()
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
        self,
        client: MasterClient,
        session: NodeSession,
        dispatcher: Dispatcher,
        leftovers: Leftovers,
    ) -> None:
        node_id = await session.register()
        for job in await leftovers.jobs(client, node_id):
            logger.warning("job %s: the worker ended while it ran; reporting it failed", job.id)
            dispatcher.report(
                job, self._restarted(job, node_id), functools.partial(leftovers.forget, job)
            )
        await dispatcher.run()

    def _restarted(self, job: Job, node_id: str) -> JobResult:
        now = datetime.now(UTC)
        run = JobRun(
            job=job,
            node_id=node_id,
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
            self._metrics.set_disk_used(used)
            if used >= DISK_WARN_RATIO and self._disk_complaint.due():
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
            await asyncio.sleep(STATUS_SECONDS)

    def _blocked(self) -> str:
        if not self._launcher.connected:
            return "no connection to systemd over D-Bus"
        return self._disk_full()

    def _disk_full(self) -> str:
        used = self._disk_used()
        if used < DISK_FULL_RATIO:
            return ""
        return (
            f"the disk of {self._settings.work_dir} is {used:.0%} full "
            f"(limit {DISK_FULL_RATIO:.0%}); free some space"
        )

    def _disk_used(self) -> float:
        """0 to 1; 1 where the work directory cannot even be looked at."""
        try:
            return disk.usage(self._settings.work_dir).used_ratio
        except OSError as error:
            logger.error("work directory %s: %s", self._settings.work_dir, error.strerror)
            return 1.0

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
