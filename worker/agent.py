"""The daemon: builds the parts, runs them together, and stops them in order."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from worker import __version__, workspace
from worker.acceptance import Acceptance
from worker.config import Settings
from worker.control import Control, socket_path
from worker.diskwatch import DiskWatch
from worker.dispatch import REQUEST_SEC, Dispatcher
from worker.ending import Ending, end_silence, silence_left
from worker.errors import (
    JobUnknown,
    LedgerError,
    MasterRefused,
    MasterUnreachable,
    SystemdError,
    WorkerError,
)
from worker.execution import Execution
from worker.jobs.capabilities import Capabilities
from worker.ledger import Entry, Ledger
from worker.master.client import MasterClient
from worker.master.delivery import Delivered, Dropped, deliver
from worker.master.retry import Backoff
from worker.master.session import NodeSession
from worker.master.standing import Standing, standing
from worker.master.wire import Job, JobResult
from worker.node.facts import NodeFacts, gather
from worker.programs import Programs
from worker.recovery import Found, Recovery
from worker.reports import failed
from worker.site import Site
from worker.steering import Draining, JobOrders
from worker.systemd import enforcement
from worker.systemd.launcher import Launcher
from worker.systemd.suspend import Suspension
from worker.telemetry.metrics import Metrics
from worker.telemetry.notify import Notifier
from worker.telemetry.pulse import Pulse, feed
from worker.telemetry.server import Server
from worker.upkeep import Upkeep
from worker.watch import Watch

logger = logging.getLogger(__name__)

BUS_PATIENCE_SEC = 30.0
CLOSE_SECONDS = 3.0
MOST_NODE_IDS = 20
_CAPABILITIES, _NODE_IDS = "capabilities", "node ids"


class Agent:
    """One worker node. ``run`` returns when it was told to stop and has cleaned up."""

    def __init__(self, settings: Settings, notifier: Notifier) -> None:
        self._settings = settings
        self._notifier = notifier
        self._metrics = Metrics(
            settings.node_name, settings.metrics_port, slots=settings.max_concurrent_jobs
        )
        self._launcher = Launcher(user=settings.user)
        self._suspension = Suspension(self._launcher, user=settings.user)
        self._pulse = Pulse()
        self._launcher.tracker.beat = partial(self._pulse.beat, "unit tracker")
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._online = asyncio.Event()
        """There is a session with the master, registered or about to be."""
        self._programs = Programs.find()
        self._disk = DiskWatch()
        self._capabilities: Capabilities | None = None
        self._session: NodeSession | None = None
        self._waiting = ""
        self._draining: Draining | None = None

    async def run(self) -> None:
        """Work until SIGTERM, SIGINT or SIGHUP. Raises WorkerError where that cannot even begin."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        settings = self._settings
        workspace.require_work_dir(settings.work_dir)
        self._site = Site.prepare(settings, self._programs)
        self._ledger = ledger = Ledger.open(settings.work_dir / "ledger.db")
        server = None
        try:
            ledger.import_records(settings.work_dir / "accepted")
            self._upkeep = Upkeep(
                settings, self._notifier, self._metrics, self._launcher, ledger, self.readiness
            )
            if settings.metrics_port:
                server = Server(
                    self._metrics,
                    self.readiness,
                    address=settings.metrics_addr,
                    port=settings.metrics_port,
                )
                server.start()
            if await self._connected():
                await self._work()
            else:
                logger.info("stopped before any job was taken")
        finally:
            try:
                await asyncio.wait_for(self._launcher.close(), CLOSE_SECONDS)
            except TimeoutError:
                logger.warning("systemd did not answer in time; units may be left over")
            if server is not None:
                server.stop()
            ledger.close()
            self._disk.close()

    def readiness(self) -> list[str]:
        """Why this node takes no jobs now; empty when it does. Called from other threads."""
        reasons = []
        if self._stop.is_set():
            reasons.append("the worker is stopping")
        if self._draining and self._draining.on:
            reasons.append("draining (`ffmpeg-worker undrain` ends it)")
        if not self._launcher.connected:
            reasons.append("no connection to systemd over D-Bus")
        if self._session is None:
            reasons.append(self._waiting or "the worker is starting")
        elif not self._session.registered:
            trouble = self._session.last_error
            reasons.append(f"not registered: {trouble}" if trouble else "registering")
        elif self._session.last_error:
            reasons.append(self._session.last_error)
        reasons += self._upkeep.unusable()
        return reasons

    def _blocked(self) -> str:
        """Why no job may be taken now, besides what is between us and the master."""
        if self._draining and self._draining.on:
            return "draining"
        if not self._launcher.connected:
            return "no connection to systemd over D-Bus"
        return "; ".join(self._upkeep.unusable())

    # --- at work

    async def _connected(self) -> bool:
        """Connect to systemd; False if told to stop meanwhile."""
        connecting = asyncio.create_task(connect(self._launcher))
        told = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({connecting, told}, return_when="FIRST_COMPLETED")
            if connecting.done():
                connecting.result()
            return connecting.done()
        finally:
            for task in (connecting, told):
                task.cancel()
            await asyncio.gather(connecting, told, return_exceptions=True)

    async def _work(self) -> None:
        settings, ledger = self._settings, self._ledger
        logger.info("ffmpeg-worker %s, systemd %d", __version__, self._launcher.version)
        recovery = Recovery(ledger, self._launcher, settings.work_dir)
        found = await recovery.look()
        self._suspension.sweep(found.loaded)
        self._dispatcher = dispatcher = Dispatcher(
            slots=settings.max_concurrent_jobs,
            poll_interval=settings.poll_interval,
            execute=self._execution,
            deliver=self._deliver,
            ledger=ledger,
            blocked=self._blocked,
            metrics=self._metrics,
            pulse=self._pulse,
        )
        self._draining = Draining(dispatcher, ledger)
        # What runs is followed before anything slow is done. What this node can do is known
        # from the last time; it decides nothing for a job that was begun.
        self._capabilities = _capabilities(ledger.get(_CAPABILITIES))
        resumed = self._capabilities is not None
        if resumed:
            self._resume(found)
        self._notifier.ready("starting")
        key = settings.master_api_key
        async with MasterClient(
            base_url=settings.master_url,
            api_key=key.get_secret_value() if key else None,
            ca=settings.ca,
            cert=settings.cert,
            key=settings.key,
            insecure=settings.insecure_skip_verify,
        ) as self._client:
            control = Control(socket_path(settings.work_dir), self._draining.commands)
            try:
                await control.start()
            except WorkerError as error:
                logger.warning("%s; `ffmpeg-worker drain` will not work", error)
            try:
                await self._serve(dispatcher, self._go_online(recovery, found, resumed))
            finally:
                await control.close()

    def _resume(self, found: Found) -> None:
        for entry in found.begun:
            if entry.steps:
                self._dispatcher.start(Acceptance(self._ledger, entry))
            else:  # taken over from a version that noted less
                found.owed.append(
                    replace(entry, result=failed(entry.job, "the worker ended while the job ran"))
                )

    async def _go_online(self, recovery: Recovery, found: Found, resumed: bool) -> None:
        """Find out what this node is, register, settle what was left, and take jobs."""
        facts = await self._look_around()
        self._capabilities = facts.capabilities
        await self._ledger.run(
            self._ledger.put, _CAPABILITIES, json.dumps(asdict(facts.capabilities), default=sorted)
        )
        self._metrics.set_encoders(facts.encoders.proven, has_gpu=facts.capabilities.has_gpu)
        if not resumed:
            self._resume(found)
        await recovery.put_away([*found.settled, *found.owed])
        await self._let_the_master_notice()
        session = self._session = NodeSession(
            self._client,
            facts.registration(self._settings.node_name),
            heartbeat_interval=self._settings.heartbeat_interval,
            on_heartbeat=self._metrics.heartbeat,
            on_answer=self._metrics.set_master_up,
            in_doubt=True,
            run_by_others=recovery.run_by_others,
            node_ids=_texts(self._ledger.get(_NODE_IDS)),
            on_registered=self._known_as,
            sleep=self._beating("heartbeats"),
        )
        for entry in (*found.begun, *found.owed, *found.unstarted):
            session.remember(entry.job)
        # The master knows the node again before it hears of its jobs: a report first could make
        # it give us a new id (it does so for a node whose job has just been queued again).
        await session.register()
        self._online.set()
        self._dispatcher.tell_change()
        for entry in found.owed:
            assert entry.result is not None
            logger.info("job %s: its result was not delivered yet", entry.job.id)
            acceptance = Acceptance(self._ledger, entry)
            self._dispatcher.reports.add(acceptance, entry.result, maybe_landed=True)
        for entry in found.unstarted:
            await self._begin_if_ours(entry, session)
        await self._dispatcher.run(session)

    async def _known_as(self, node_id: str) -> None:
        """Remember the node's ids: a job may have been handed out under any of the last ones."""
        ids = [*(name for name in _texts(self._ledger.get(_NODE_IDS)) if name != node_id), node_id]
        try:
            text = json.dumps(ids[-MOST_NODE_IDS:])
            await self._ledger.run(self._ledger.put, _NODE_IDS, text)
        except LedgerError as error:
            logger.error("the node's id is not on record: %s", error)

    async def _look_around(self) -> NodeFacts:
        """What this machine is and, found out meanwhile, which limits hold on it."""
        facts, limits = await asyncio.gather(
            gather(systemd_version=self._launcher.version),
            enforcement.check(self._launcher, user=self._settings.user),
        )
        if limits is None:
            return facts
        return replace(facts, labels={**facts.labels, "limits": limits.label})

    async def _let_the_master_notice(self) -> None:
        """Keep silent until the master has given away the jobs that were left to it."""
        wait = silence_left(self._ledger)
        if wait > 0:
            self._waiting = (
                f"silent for {wait:.0f} s more, so that the master gives the jobs to others that "
                "were stopped here in their last retry"
            )
            logger.warning("%s", self._waiting)
            await asyncio.sleep(wait)
        await self._ledger.run(end_silence, self._ledger)

    async def _begin_if_ours(self, entry: Entry, session: NodeSession) -> None:
        """Start a job that was accepted and never begun, unless it is somebody else's by now."""
        acceptance, backoff = Acceptance(self._ledger, entry), Backoff(1.0, 60.0)
        while True:
            try:
                there = await self._client.job(entry.job)
                found = standing(there, entry.job, session.node_ids)
                break
            except JobUnknown:
                found = Standing.ANOTHER
                break
            except (MasterRefused, MasterUnreachable) as error:
                wait = backoff.next(error.retry_after)
                logger.warning(
                    "job %s was accepted and not begun; asking whether it is still ours in "
                    "%.0f s: %s", entry.job.id, wait, error,
                )  # fmt: skip
                await asyncio.sleep(wait)
        if found in (Standing.OURS, Standing.PAUSED):
            logger.info("job %s was accepted and not begun; starting it now", entry.job.id)
            self._dispatcher.start(acceptance)
        else:
            why = f"it was not begun, and is no longer ours ({found.value})"
            logger.warning("job %s: %s", entry.job.id, why)
            await acceptance.close("dropped", why)

    def _execution(self, acceptance: Acceptance) -> Execution:
        assert self._capabilities is not None
        session = self._session
        return Execution(
            acceptance.job,
            node_id=(session.node_id if session else None) or "",
            launcher=self._launcher,
            capabilities=self._capabilities,
            programs=self._programs,
            settings=self._settings,
            site=self._site,
            disk=self._disk,
            records=acceptance,
            accepted_at=acceptance.accepted_at,
            suspension=self._suspension,
        )

    async def _deliver(
        self, job: Job, result: JobResult, *, maybe_landed: bool
    ) -> Delivered | Dropped:
        await self._online.wait()
        assert self._session is not None
        return await deliver(
            self._client, job, result, maybe_landed=maybe_landed, node_ids=self._session.node_ids
        )

    def _watch(self) -> Watch:
        orders = JobOrders(self._dispatcher)
        running = self._dispatcher.running
        return Watch(
            self._client,
            lambda: {name: execution.job for name, execution in running.items()},
            interval=self._settings.job_check_interval,
            node_ids=lambda: self._session.node_ids if self._session else (),
            is_paused=orders.is_paused,
            on_cancelled=orders.cancelled,
            on_gone=orders.gone,
            on_paused=orders.paused,
            on_resumed=orders.resumed,
            busy=self._busy,
            sleep=self._beating("watch"),
        )

    async def _busy(self) -> None:
        """Until a job runs, for the watch: it need not wake up while none does."""
        self._pulse.parked("watch")
        while not self._dispatcher.running:
            await self._dispatcher.news.wait()

    def _beating(self, loop: str) -> Callable[[float], Awaitable[None]]:
        """A sleep that tells the watchdog how long it may take until the loop is seen again."""

        async def sleep(seconds: float) -> None:
            self._pulse.beat(loop, within=seconds + REQUEST_SEC)
            await asyncio.sleep(seconds)

        return sleep

    # --- the end

    async def _serve(self, dispatcher: Dispatcher, online: Coroutine[None, None, None]) -> None:
        """Work until told to stop; heartbeats go on until the last report is off."""
        polling = asyncio.create_task(online, name="polling")
        heartbeats = asyncio.create_task(self._heartbeats(), name="heartbeats")
        told = asyncio.create_task(self._stop.wait(), name="stop")
        others = [
            asyncio.create_task(self._watch().run(), name="watch"),
            asyncio.create_task(self._upkeep.status(dispatcher), name="status"),
            asyncio.create_task(self._upkeep.attached(), name="attachments"),
            asyncio.create_task(self._upkeep.history(), name="history"),
            asyncio.create_task(feed(self._pulse, self._notifier), name="watchdog"),
        ]
        tasks = (told, polling, heartbeats, *others)
        ending = Ending(
            self._settings,
            self._notifier,
            self._launcher.bus,
            dispatcher,
            self._ledger,
            self._hurry,
        )
        try:
            done, _ = await asyncio.wait({told, polling, heartbeats}, return_when="FIRST_COMPLETED")
            self._stop.set()
            dispatcher.stop_polling()
            registered = self._session is not None and self._session.registered
            await ending.run(polling, told=told in done, registered=registered)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _heartbeats(self) -> None:
        await self._online.wait()
        assert self._session is not None
        await self._session.run()

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logger.warning("%s again: not waiting any more", number.name)
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


def _capabilities(text: str | None) -> Capabilities | None:
    """What was found out about this node last time; None if that cannot be known."""
    try:
        fields: dict[str, Any] = json.loads(text or "")
        for name in ("encoders", "listed_encoders", "hwaccels"):
            fields[name] = frozenset(fields[name])
        return Capabilities(**fields)
    except (ValueError, TypeError, KeyError):
        return None


def _texts(text: str | None) -> list[str]:
    """A list of texts as it was put into the ledger; empty if there is none."""
    found = json.loads(text or "[]")
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []
