"""Time that passes as a test has it, for a session that does not end by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.master import FakeMaster
from worker.master.session import NodeSession


class Enough(Exception):
    """Ends a loop that does not end by itself."""


class Time:
    """A clock that moves only when somebody sleeps. The last step of the script ends it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.script: list[Callable[[], object]] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        if not self.script:
            raise Enough
        self.script.pop(0)()

    def clock(self) -> float:
        return self.now


def nothing() -> None:
    """A step of the script in which nothing happens."""


def highest(low: float, high: float) -> float:
    return high


async def run(session: NodeSession) -> None:
    with pytest.raises(Enough):
        await session.run()


def routes(master: FakeMaster) -> list[str]:
    names = []
    for request in master.requests:
        name = f"{request.method} {request.path}"
        names.append("beat" if name.endswith("/heartbeat") else name)
    return names
