"""Dispatchers that run for the length of a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.dispatch.bench import Bench, Benches
from worker.jobs.outcome import Intent
from worker.ledger import Ledger
from worker.master.wire import Job


@pytest.fixture
async def benches(tmp_path: Path) -> AsyncIterator[Benches]:
    ledger = Ledger.open(tmp_path / "work/ledger.db")
    tasks: list[tuple[Bench, asyncio.Task[None]]] = []

    def make(*answers: Job | Exception, slots: int = 2, poll_interval: float = 3600.0) -> Bench:
        bench = Bench(ledger, slots, poll_interval)
        bench.source.answers += answers
        tasks.append((bench, asyncio.create_task(bench.dispatcher.run(bench.source))))
        return bench

    yield make
    for bench, task in tasks:
        bench.delivering.set()
        bench.dispatcher.stop_polling()
        await task
        await bench.dispatcher.stop(Intent.SHUTDOWN, asyncio.Event())
    ledger.close()
