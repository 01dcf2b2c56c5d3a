"""A session with a fake master, in a time of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import pytest

from tests.fakes.master import FakeMaster
from tests.fakes.transport import REGISTRATION
from tests.unit.session.script import Time, highest
from worker.master.client import MasterClient
from worker.master.session import NodeSession


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def master(time: Time) -> Iterator[FakeMaster]:
    with FakeMaster(clock=time.clock) as master:
        yield master


@pytest.fixture
async def client(master: FakeMaster) -> AsyncIterator[MasterClient]:
    async with MasterClient(base_url=master.url) as client:
        yield client


@pytest.fixture
def new_session(client: MasterClient, time: Time) -> Callable[..., NodeSession]:
    """Each is a run of the agent, with options of its own."""
    return partial(NodeSession, client, REGISTRATION, clock=time.clock, sleep=time.sleep)


@pytest.fixture
def beats() -> list[None]:
    return []


@pytest.fixture
def session(new_session: Callable[..., NodeSession], beats: list[None]) -> NodeSession:
    return new_session(
        heartbeat_interval=30.0, on_heartbeat=lambda: beats.append(None), uniform=highest
    )
