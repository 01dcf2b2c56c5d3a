"""The ledger's own thread: the event loop does not wait, and no write is lost."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from worker.ledger import Ledger
from worker.master.wire import Job


async def test_calls_are_done_in_order_in_one_thread(ledger: Ledger) -> None:
    threads = set()

    def accept(number: int) -> None:
        threads.add(threading.get_ident())
        ledger.accept(Job(id=f"job-{number}"))

    await asyncio.gather(*(ledger.run(accept, number) for number in range(20)))
    assert [entry.job.id for entry in ledger.unreaped()] == [f"job-{n}" for n in range(20)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_the_loop_goes_on_and_a_cancelled_task_loses_no_write(
    ledger: Ledger, tmp_path: Path
) -> None:
    go_on = threading.Event()
    busy = asyncio.create_task(ledger.run(go_on.wait, 10))
    waiting = asyncio.create_task(ledger.run(ledger.accept, Job(id="x")))
    await asyncio.sleep(0)  # both calls are made
    for task in (busy, waiting):
        task.cancel()
    await asyncio.gather(busy, waiting, return_exceptions=True)
    assert busy.cancelled()
    assert waiting.cancelled()
    assert ledger.recent(1) == []
    go_on.set()
    ledger.close()  # waits for the calls
    again = Ledger.open(tmp_path / "ledger.db")
    assert [entry.job.id for entry in again.unreaped()] == ["x"]
    again.close()


async def test_an_error_reaches_the_task_that_waits(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="no entry 3"):
        await ledger.run(ledger.reap, 3)
