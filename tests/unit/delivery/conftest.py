"""A fake master with one job, taken by a node of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION
from tests.unit.delivery.bench import Bench
from worker.master.client import MasterClient


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with FakeMaster() as master:
        master.submit({"scenario": "720p30-h264"})
        async with MasterClient(base_url=master.url) as client:
            node = await client.register(REGISTRATION)
            job = await client.next_job(node.id)
            assert job is not None
            yield Bench(master, client, job, node.id)
