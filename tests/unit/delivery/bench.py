"""A job whose report is to be delivered, and waits that take no time."""

from __future__ import annotations

from typing import Any

from tests.fakes.master import FakeMaster
from worker.master.client import MasterClient
from worker.master.delivery import Delivered, Delivery, Dropped, deliver
from worker.master.wire import Job, JobResult


class Waits:
    """Stands in for sleeping; something may happen meanwhile."""

    def __init__(self, *meanwhile: Any) -> None:
        self.seconds: list[float] = []
        self._meanwhile = list(meanwhile)

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self._meanwhile:
            self._meanwhile.pop(0)()


def steady(low: float, high: float) -> float:
    return high


class Bench:
    """A master with one job, taken by a node of ours."""

    def __init__(self, master: FakeMaster, client: MasterClient, job: Job, node_id: str) -> None:
        self.master = master
        self.client = client
        self.job = job
        self.node_id = node_id

    def result(self, status: str = "completed", **fields: Any) -> JobResult:
        return JobResult(job_id=self.job.id, node_id=self.node_id, status=status, **fields)

    def delivery(self, status: str = "completed", **options: Any) -> Delivery:
        return Delivery(self.client, self.job, self.result(status), **options)

    async def deliver(self, status: str = "completed", **options: Any) -> Delivered | Dropped:
        """Deliver it without spending the time of the waits between the attempts."""
        options = {"sleep": Waits(), **options}
        return await deliver(self.client, self.job, self.result(status), **options)

    def set(self, **fields: Any) -> None:
        with self.master.store.changed:
            self.master.store.jobs[self.job.id].update(fields)

    @property
    def posts(self) -> int:
        return len(self.master.seen("POST /results"))
