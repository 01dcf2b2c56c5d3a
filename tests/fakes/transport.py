"""A client whose network is a function: for answers that no master would give."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from worker.master.client import MasterClient
from worker.master.wire import JobResult, NodeRegistration

KEY = "correct-horse"

REGISTRATION = NodeRegistration(
    address="box", type="server", cpu_threads=8, cpu_model="x", has_gpu=False, ram_total_bytes=1
)


def client_of(
    handler: Callable[[httpx.Request], httpx.Response], url: str = "http://box:8080"
) -> MasterClient:
    return MasterClient(base_url=url, api_key=KEY, transport=httpx.MockTransport(handler))


def answering(*answers: httpx.Response) -> tuple[MasterClient, list[httpx.Request]]:
    seen: list[httpx.Request] = []
    left = list(answers)

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return left.pop(0)

    return client_of(handler), seen


def text(status: int, body: str) -> httpx.Response:
    return httpx.Response(status, text=body + "\n")


def failing(error: Exception) -> MasterClient:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return client_of(handler)


def result(job_id: str = "j", status: str = "completed") -> JobResult:
    return JobResult(job_id=job_id, node_id="n", status=status)
