"""The demo master, with a memory of who asked for what in which order, and that can go away."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from tests.fakes.master import FakeMaster
from tests.fakes.shapes import Data
from tests.fakes.store import Store

What = Literal["handout", "result", "look", "cancel", "pause", "resume", "requeue"]

MOST_RETRIES = 50
"""What the agent is told: it never takes a stop for the end of a job's last retry."""
ENDED = ("completed", "failed", "canceled")


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job. ``at`` is in Unix time."""

    at: float
    what: What
    job: str
    retry: int
    """The job's count when it happened."""
    state: str
    """The job's state just before."""
    status: str = ""
    """Of a result."""
    error: str = ""
    node: str = ""


class ChaosStore(Store):
    """Writes down what happens, and has a limit of retries for each job."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.most_retries: dict[str, int] = {}
        self.polled_at = 0.0
        """When a node asked for a job last (Unix time)."""

    def _note(
        self, what: What, job: Data, state: str, retry: int, result: Data | None = None
    ) -> None:
        result = result or {}
        self.events.append(
            Event(
                time.time(), what, job["id"], retry, state, result.get("status", ""),
                result.get("error", ""), result.get("node_id", ""),
            )
        )  # fmt: skip

    def next_job(self, node_id: str) -> Data | None:
        with self.changed:
            job = super().next_job(node_id)
            self.polled_at = time.time()
            self.changed.notify_all()
            if job is not None:
                self._note("handout", job, "pending", job.get("retry_count", 0))
            return job

    def result(self, result: Data) -> Data:
        with self.changed:
            job = self.jobs.get(result.get("job_id", ""))
            if job is not None:
                self._note("result", job, job["status"], job["retry_count"], result)
                self._max_retries = self.most_retries.get(job["id"], MOST_RETRIES)
            return super().result(result)

    def view(self, key: str) -> Data:
        with self.changed:
            job = self.look_up(key)
            self._note("look", job, job["status"], job["retry_count"])
            return super().view(key)

    def steer(self, key: str, action: str) -> Data:
        with self.changed:
            job = self.look_up(key)
            state, retry = job["status"], job["retry_count"]
            answer = super().steer(key, action)
            what: Mapping[str, What] = {"cancel": "cancel", "pause": "pause", "resume": "resume"}
            self._note(what[action], job, state, retry)
            return answer

    def requeue(self, job_id: str) -> bool:
        """What the scheduler does with a batch job after 30 minutes, now."""
        with self.changed:
            job = self.jobs[job_id]
            if job["status"] != "processing":
                return False
            self._note("requeue", job, job["status"], job["retry_count"])
            self._queue_again(job, "Batch job stale - exceeded 1800s timeout")
            return True

    def forget_nodes(self) -> None:
        """Lose the table of nodes."""
        with self.changed:
            self.nodes.clear()
            self.changed.notify_all()


class ChaosMaster:
    """A demo master that can be stopped, and started again on the same port with its memory."""

    def __init__(self) -> None:
        self.store = ChaosStore()
        self._fake = self._new(0)
        self.port = self._fake.port
        self.up = False

    def _new(self, port: int) -> FakeMaster:
        fake = FakeMaster(port=port)
        fake.store = self.store
        return fake

    @property
    def url(self) -> str:
        return self._fake.url

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        if not self.up:
            if self._fake.errors or self._fake.released.is_set():
                self._fake = self._new(self.port)
            self._fake.__enter__()
            self.up = True

    def stop(self) -> None:
        """Close all connections and be gone; AssertionError if the demo master had a bug."""
        if self.up:
            self.up = False
            self._fake.close()
            assert not self._fake.errors, f"the demo master itself failed: {self._fake.errors}"

    def fault(self, route: str, kind: Any, count: int = 1) -> None:
        """As FakeMaster.fault; what hangs is let go by calm()."""
        self._fake.released.clear()
        self._fake.fault(route, kind, count=count)

    def calm(self) -> None:
        """No faults any more."""
        self._fake.clear_faults()

    def asked(self, route: str) -> int:
        """How many requests there were to a route since the last start."""
        return len(self._fake.seen(route))

    def submit(self, request: Data, *, retries: int = MOST_RETRIES) -> str:
        """A new job's id."""
        job = self.store.submit(request, {"max_retries": MOST_RETRIES})
        with self.store.changed:
            self.store.most_retries[job["id"]] = retries
        return str(job["id"])

    def state(self, job_id: str) -> Data:
        with self.store.changed:
            return dict(self.store.jobs[job_id])

    def steer(self, job_id: str, action: str) -> None:
        """Raises RefusedError where the job's state does not allow it."""
        self.store.steer(str(self.state(job_id)["sequence_number"]), action)

    def open_jobs(self) -> list[str]:
        with self.store.changed:
            return [name for name, job in self.store.jobs.items() if job["status"] not in ENDED]

    @property
    def changed(self) -> threading.Condition:
        return self.store.changed
