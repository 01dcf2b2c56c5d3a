"""Faults of every kind at random moments, while jobs come in all the time."""

from __future__ import annotations

import heapq
import itertools
import subprocess
import time
from collections.abc import Callable

from tests.chaos import points
from tests.chaos.node import SERVICE, sh
from tests.chaos.points import POINTS, Point
from tests.chaos.sweep import ANSWERS, ROUTES, void
from tests.chaos.world import KINDS, STORM_WEIGHTS, World

OPEN_JOBS = 5
"""So many jobs wait or run at the master all the time."""
PAUSE_SEC = (0.0, 1.6)
"""Between two faults."""
LULLS = 0.25
"""After so many of the faults there is time for a job to end."""
LULL_SEC = 6.0
MODES = ("handback", "drain", "leave")


class Storm:
    """``run`` goes on until there have been so many jobs and so many faults in the whole run."""

    def __init__(self, world: World, say: Callable[[str], None]) -> None:
        self._world = world
        self._say = say
        self._rng = world.rng
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._turns = itertools.count()
        self._armed: Point | None = None
        self._stopping: subprocess.Popen[bytes] | None = None
        """Told to stop, or stopped."""
        self._stop_begun = 0.0
        self._drained = False
        self._faults: dict[Callable[[], None], int] = {
            self._kill: 6,
            self._die_at_a_step: 8,
            self._bad_answers: 8,
            self._master_down: 2,
            self._nodes_forgotten: 1,
            self._dbus: 1,
            self._reload: 2,
            self._reexec: 1,
            self._full_disk: 1,
            self._cancel: 2,
            self._pause: 2,
            self._requeue: 1,
            self._restart: 1,
            self._stop: 2,
            self._drain: 1,
        }

    def run(self, jobs: int, faults: int) -> None:
        world = self._world
        next_report = 0.0
        while len(world.jobs) < jobs or len(world.faults) < faults:
            while len(world.master.open_jobs()) < OPEN_JOBS:
                [kind] = self._rng.choices(KINDS, STORM_WEIGHTS)
                world.submit(kind)
            self._undo(time.monotonic())
            [fault] = self._rng.choices([*self._faults], [*self._faults.values()])
            fault()
            time.sleep(self._rng.uniform(*PAUSE_SEC))  # a random moment is what is wanted
            if self._rng.random() < LULLS:
                self._lull(len(world.master.open_jobs()))
            if self._armed is not None and world.collect(self._armed) is not None:
                self._armed = None
            if len(world.faults) >= faults and len(world.jobs) < jobs:
                # Only jobs are missing: let the node work them off.
                self.calm()
                self._lull(OPEN_JOBS)
            if time.monotonic() > next_report:
                next_report = time.monotonic() + 15
                self._say(
                    f"{len(world.jobs)} jobs, {len(world.master.open_jobs())} open, "
                    f"{len(world.faults)} faults"
                )
        self.calm()

    def calm(self) -> None:
        """Have all undone that goes on: from here on everything is well."""
        world = self._world
        if self._armed is not None:
            world.collect(self._armed)
            self._armed = None
        points.disarm()
        world.master.start()
        world.master.calm()
        while self._later:
            self._undo(time.monotonic())
            time.sleep(0.05)
        if self._stopping is None:
            self._start()
        world.wait_for_poll()

    def _lull(self, jobs: int) -> None:
        """Until fewer jobs are open, or some seconds long."""
        end = time.monotonic() + LULL_SEC
        changed, master = self._world.master.changed, self._world.master
        while len(master.open_jobs()) >= jobs and (left := end - time.monotonic()) > 0:
            self._undo(time.monotonic())
            with changed:
                changed.wait_for(lambda: len(master.open_jobs()) < jobs, min(left, 0.2))

    def _undo(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()

    def _in(self, least: float, most: float, action: Callable[[], None]) -> None:
        due = time.monotonic() + self._rng.uniform(least, most)
        heapq.heappush(self._later, (due, next(self._turns), action))

    # --- the faults

    def _kill(self) -> None:
        if self._stopping is None:
            self._world.kill()

    def _die_at_a_step(self) -> None:
        if self._armed is None:
            self._armed = self._rng.choice(POINTS)
            self._world.arm(self._armed)

    def _bad_answers(self) -> None:
        route, kind = self._rng.choice([*ROUTES]), self._rng.choice([*ANSWERS])
        if self._world.master.up:
            count = self._rng.randint(1, 3)
            self._world.master.fault(route, kind, count)
            self._world.did(f"master: {route} {kind}")
            if kind == "hang":
                self._in(0.3, 2, self._world.master.calm)

    def _master_down(self) -> None:
        if self._world.master.up:
            self._world.did("the master (stopped)")
            self._world.master.stop()
            self._in(0.2, 3, self._world.master.start)

    def _nodes_forgotten(self) -> None:
        self._world.did("the master (forgot all nodes)")
        self._world.master.store.forget_nodes()

    def _dbus(self) -> None:
        self._world.did("systemctl restart dbus")
        sh("systemctl", "restart", "dbus")

    def _reload(self) -> None:
        self._world.did("systemctl daemon-reload")
        sh("systemctl", "daemon-reload")

    def _reexec(self) -> None:
        self._world.did("systemctl daemon-reexec")
        sh("systemctl", "daemon-reexec")

    def _full_disk(self) -> None:
        self._world.did("the state directory (full)")
        self._world.node.fill()
        self._in(0.5, 2.5, self._world.node.empty)

    def _cancel(self) -> None:
        jobs = self._world.master.open_jobs()
        if jobs and self._world.steer(self._rng.choice(jobs), "cancel"):
            self._world.did("the job (cancelled at the master)")

    def _pause(self) -> None:
        if not (jobs := self._world.master.open_jobs()):
            return
        job = self._rng.choice(jobs)
        if self._world.steer(job, "pause"):
            self._world.did("the job (paused)")
            self._in(0.5, 3, lambda: void(self._world.steer(job, "resume")))

    def _requeue(self) -> None:
        if (jobs := self._world.master.open_jobs()) and self._world.master.store.requeue(
            self._rng.choice(jobs)
        ):
            self._world.did("the master (gave the job away as stale)")

    def _restart(self) -> None:
        if self._stopping is None:
            self._world.did("systemctl restart of the agent")
            self._world.restart()

    def _stop(self) -> None:
        if self._stopping is not None:
            return
        self._stop_begun = self._world.did("systemctl stop, then start")
        # Not waited for: it can take until the master is back, or a paused job goes on.
        self._stopping = subprocess.Popen(["systemctl", "stop", SERVICE])
        self._in(0.1, 1.5, self._start)

    def _start(self) -> None:
        """Once the stop is through."""
        if self._stopping is not None:
            over = self._stopping.poll() is not None  # by itself, where systemctl lost the bus
            if not over or self._world.node.show("ActiveState") not in ("inactive", "failed"):
                self._in(0.2, 0.4, self._start)
                return
            self._world.stops.append((self._stop_begun, time.time()))
            self._world.deaths.append(time.time())
            self._stopping = None
        self._world.node.start(STOP_MODE=self._rng.choice(MODES))

    def _drain(self) -> None:
        if self._world.node.command("drain"):
            self._world.did("the node (drained)")
            self._drained = True
            self._in(0.5, 2, self._undrain)

    def _undrain(self) -> None:
        if self._drained and self._world.node.command("undrain"):
            self._drained = False
        elif self._drained:
            self._in(0.3, 0.6, self._undrain)  # no agent answers just now
