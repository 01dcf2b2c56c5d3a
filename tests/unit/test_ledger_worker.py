"""A worker that trusts the ledger, crashed at any write: one start, one delivery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from tests.crashing import BOUNDS, CUTS, Crashed, Disk, job_of, result_of
from worker.ledger import Entry, State

R = TypeVar("R")

Life = Generator[None, None, None]


class WorkerMachine(RuleBasedStateMachine):
    """A worker that keeps the rules, a systemd and a master that outlive it.

    A yield is a point where it may die; so is every byte of every write.
    """

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.lives: dict[int, Life] = {}
        self.cut: float | None = None
        self.loaded: set[str] = set()
        self.starts: Counter[tuple[str, int]] = Counter()
        self.deliveries: Counter[tuple[str, int]] = Counter()
        self.acceptances: set[tuple[str, int]] = set()
        self.superseded: set[tuple[str, int]] = set()

    def write(self, write: Callable[[], R]) -> R:
        cut, self.cut = self.cut, None
        return self.disk.write(write, cut)

    def life(self, entry: Entry) -> Life:
        """One job from its acceptance, or from where a dead worker left it, to its end."""
        ledger, unit = self.disk.ledger, f"{entry.job.id}-{entry.id}"

        def now() -> Entry:
            return next(found for found in ledger.recent(1000) if found.id == entry.id)

        def key() -> tuple[str, int]:
            return now().job.id, now().job.retry_count

        if entry.state in (State.ACCEPTED, State.STARTED):
            if "main" not in entry.steps:
                self.write(lambda: ledger.starting(entry.id, "main", unit, {}))
                yield
                self.starts[key()] += 1
                self.loaded.add(unit)
                yield
            status = "completed" if unit in self.loaded else "failed"
            self.write(lambda: ledger.finish(entry.id, result_of(entry.job, status), {}))
            yield
        if not now().settled:
            delivered = key()
            if not self.deliveries[delivered]:  # the master is asked first: it may have landed
                self.deliveries[delivered] += 1
                yield
            # Handed out anew meanwhile: the newer acceptance is owed the result.
            while key() != delivered:
                delivered = key()
                self.deliveries[delivered] += 1
            self.write(lambda: ledger.settle(entry.id, "delivered"))
            yield
        self.loaded.discard(unit)
        self.write(lambda: ledger.reap(entry.id))

    def recover(self) -> None:
        self.lives = {entry.id: self.life(entry) for entry in self.disk.ledger.unreaped()}

    def advance(self, entry_id: int) -> None:
        try:
            next(self.lives[entry_id])
        except StopIteration:
            del self.lives[entry_id]
        except Crashed:
            self.recover()

    @rule(target=jobs, number=st.integers(0, 3), cut=CUTS)
    def hand_out(self, number: int, cut: float | None) -> int:
        """The first time, or the same acceptance again (the master queues what takes long)."""
        self.take(number, 0, cut)
        return number

    @rule(number=consumes(jobs), cut=CUTS)
    def hand_out_anew(self, number: int, cut: float | None) -> None:
        self.take(number, 1, cut)

    def take(self, number: int, retry: int, cut: float | None) -> None:
        job, ledger = job_of(number, retry), self.disk.ledger
        if retry < max((r for name, r in self.acceptances if name == job.id), default=0):
            return  # the master hands out the newest acceptance only
        if ledger.find(job) is not None:
            return  # it is held, or its result was settled
        older = [e for e in ledger.unreaped() if e.job.id == job.id and not e.settled]
        self.cut = cut
        try:
            if older:
                entry = self.write(lambda: ledger.reissue(older[0].id, job))
            else:
                entry = self.write(lambda: ledger.accept(job))
        except Crashed:
            self.recover()
            if self.disk.ledger.find(job) is None:
                return  # never accepted: the master times it out
        else:
            self.lives.setdefault(entry.id, self.life(entry))
        self.cut = None
        if older:
            self.superseded.add((job.id, older[0].job.retry_count))
        self.acceptances.add((job.id, retry))

    @precondition(lambda self: self.lives)
    @rule(which=st.integers(0, 10), cut=CUTS)
    def go_on(self, which: int, cut: float | None) -> None:
        self.cut = cut
        self.advance([*self.lives][which % len(self.lives)])
        self.cut = None

    @rule()
    def kill(self) -> None:
        self.disk.crash()
        self.recover()

    @rule()
    def reboot(self) -> None:
        self.loaded.clear()
        self.kill()

    @invariant()
    def at_most_once(self) -> None:
        assert all(count == 1 for count in self.starts.values())
        assert all(count <= 1 for count in self.deliveries.values())

    def teardown(self) -> None:
        self.kill()
        while self.lives:
            self.advance(next(iter(self.lives)))
        self.at_most_once()
        assert {*self.deliveries} >= self.acceptances - self.superseded
        assert {*self.starts} <= self.acceptances
        assert self.loaded == set()
        assert self.disk.ledger.unreaped() == []
        self.disk.end()


TestWorkerMachine = WorkerMachine.TestCase
TestWorkerMachine.settings = BOUNDS
