"""The ledger beside a model of it, crashed at any write."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from tests.crashing import BOUNDS, CUTS, Crashed, Disk, job_of, result_of
from worker.ledger import Entry, Ledger, State
from worker.master.wire import Job

ORDER = [*State]


@dataclass
class Model:
    """What the ledger should say of one entry."""

    number: int
    retry: int
    state: State = State.ACCEPTED
    steps: set[str] = field(default_factory=set)
    status: str | None = None
    settled: str = ""


def view(entry: Entry) -> Model:
    return Model(
        int(entry.job.id.removeprefix("job-")),
        entry.job.retry_count,
        entry.state,
        {*entry.steps},
        entry.result.status if entry.result else None,
        entry.settled,
    )


class LedgerMachine(RuleBasedStateMachine):
    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.model: dict[int, Model] = {}
        self.seen: dict[int, Model] = {}

    @property
    def ledger(self) -> Ledger:
        return self.disk.ledger

    def attempt(
        self, write: Callable[[], object], change: Callable[[], None] | None, cut: float | None
    ) -> None:
        """Do it in the ledger and in the model; ``change`` is None if it must be refused."""
        if change is None:
            try:
                write()
            except ValueError:
                return
            raise AssertionError("out of order, and not refused")
        before = deepcopy(self.model)
        change()
        try:
            self.disk.write(write, cut)
        except Crashed as crashed:
            if not crashed.whole:
                self.model = before

    def at(self, entry_id: int) -> Model | None:
        return self.model.get(entry_id)

    @rule(target=entries, number=st.integers(0, 2), retry=st.integers(0, 1), cut=CUTS)
    def accept(self, number: int, retry: int, cut: float | None) -> object:
        open_ = [
            entry_id
            for entry_id, model in self.model.items()
            if (model.number, model.retry, model.settled) == (number, retry, "")
        ]
        entry_id = open_[-1] if open_ else max(self.model, default=0) + 1

        def change() -> None:
            self.model.setdefault(entry_id, Model(number, retry))

        def write() -> None:
            assert self.ledger.accept(job_of(number, retry)).id == entry_id

        self.attempt(write, change, cut)
        return entry_id if entry_id in self.model else multiple()

    @rule(entry_id=entries, step=st.sampled_from(["input", "main"]), cut=CUTS)
    def starting(self, entry_id: int, step: str, cut: float | None) -> None:
        model = self.at(entry_id)

        def change() -> None:
            assert model is not None
            changed = self.model[entry_id]
            changed.steps.add(step)
            changed.state = State.STARTED

        legal = model and model.state in ORDER[:2] and step not in model.steps
        self.attempt(
            lambda: self.ledger.starting(entry_id, step, f"unit-{step}", {}),
            change if legal else None,
            cut,
        )

    @rule(entry_id=entries, status=st.sampled_from(["completed", "failed"]), cut=CUTS)
    def finish(self, entry_id: int, status: str, cut: float | None) -> None:
        model = self.at(entry_id)

        def change() -> None:
            changed = self.model[entry_id]
            changed.status, changed.state = status, State.FINISHED

        self.attempt(
            lambda: self.ledger.finish(entry_id, result_of(Job(id="x"), status), {"a": status}),
            change if model and not model.settled else None,
            cut,
        )

    @rule(entry_id=entries, how=st.sampled_from(["delivered", "dropped"]), cut=CUTS)
    def settle(self, entry_id: int, how: str, cut: float | None) -> None:
        model = self.at(entry_id)
        legal = model and (
            model.settled == how
            or (not model.settled and (how == "dropped" or model.state is State.FINISHED))
        )

        def change() -> None:
            changed = self.model[entry_id]
            if not changed.settled:
                changed.settled, changed.state = how, State.SETTLED

        self.attempt(
            lambda: self.ledger.settle(entry_id, how, "why"), change if legal else None, cut
        )

    @rule(entry_id=entries, cut=CUTS)
    def reap(self, entry_id: int, cut: float | None) -> None:
        model = self.at(entry_id)

        def change() -> None:
            self.model[entry_id].state = State.REAPED

        self.attempt(
            lambda: self.ledger.reap(entry_id), change if model and model.settled else None, cut
        )

    @rule(entry_id=entries, cut=CUTS)
    def reissue(self, entry_id: int, cut: float | None) -> None:
        model = self.at(entry_id)
        number, retry = (model.number, model.retry + 2) if model else (0, 0)

        def change() -> None:
            self.model[entry_id].retry = retry

        self.attempt(
            lambda: self.ledger.reissue(entry_id, job_of(number, retry)),
            change if model and not model.settled else None,
            cut,
        )

    @rule(most=st.integers(0, 2), cut=CUTS)
    def prune(self, most: int, cut: float | None) -> None:
        reaped = [n for n, model in self.model.items() if model.state is State.REAPED]
        gone = sorted(reaped)[: max(0, len(reaped) - most)]

        def change() -> None:
            for entry_id in gone:
                del self.model[entry_id]

        def write() -> None:
            assert self.ledger.prune(30, most) == len(gone)

        self.attempt(write, change, cut)

    @rule()
    def stop_and_start(self) -> None:
        self.disk.crash()

    @invariant()
    def the_ledger_is_as_the_model(self) -> None:
        found = {entry.id: view(entry) for entry in self.ledger.recent(1000)}
        assert found == self.model
        assert [entry.id for entry in self.ledger.unreaped()] == sorted(
            n for n, model in self.model.items() if model.state is not State.REAPED
        )

    @invariant()
    def nothing_goes_back(self) -> None:
        found = {entry.id: view(entry) for entry in self.ledger.recent(1000)}
        for entry_id, old in self.seen.items():
            new = found.get(entry_id)
            if old.state is State.REAPED and (new is None or new.state is State.ACCEPTED):
                continue  # pruned; its number may be in use again
            assert new is not None
            assert ORDER.index(new.state) >= ORDER.index(old.state)
            assert new.steps >= old.steps
            assert old.status is None or new.status is not None
        self.seen = found

    def teardown(self) -> None:
        self.disk.end()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = BOUNDS
