"""``ffmpeg-worker``: the daemon that takes jobs from a master."""

from __future__ import annotations

import asyncio
import faulthandler

from worker.agent import Agent
from worker.config import Settings
from worker.telemetry.notify import Notifier


def run(settings: Settings) -> int:
    """Work until told to stop; returns the exit status."""

    async def work() -> None:
        await Agent(settings, Notifier()).run()

    faulthandler.enable()  # where it hung goes to the journal when the watchdog ends it
    asyncio.run(work())
    return 0
