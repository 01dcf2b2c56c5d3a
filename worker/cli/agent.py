"""``ffmpeg-worker``: the daemon that takes jobs from a master."""

from __future__ import annotations

import asyncio

from worker.agent import Agent
from worker.config import Settings
from worker.telemetry.notify import Notifier


def run(settings: Settings) -> int:
    """Work until told to stop; returns the exit status."""

    async def work() -> None:
        await Agent(settings, Notifier()).run()

    asyncio.run(work())
    return 0
