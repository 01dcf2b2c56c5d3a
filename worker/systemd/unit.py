"""One started unit, in the hands of whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from worker.errors import BusGone, NoSuchUnit, SystemdError
from worker.systemd.launch import Launch
from worker.systemd.state import UnitState, counter
from worker.systemd.tracker import Tracked
from worker.systemd.usage import Usage, parse_record

if TYPE_CHECKING:
    from worker.systemd.launcher import Launcher

logger = logging.getLogger(__name__)

_RECORD_BYTES = 64 * 1024


class Unit:
    """A transient unit from its start until it is reaped.

    It stays loaded after its end, verdict and all, so reap() must be called, always.
    """

    def __init__(self, launcher: Launcher, launch: Launch, tracked: Tracked) -> None:
        self.launch = launch
        self._launcher = launcher
        self._tracked = tracked
        self._usage = Usage()
        self._reaped = False

    def __repr__(self) -> str:
        return f"<Unit {self.name}>"

    @property
    def name(self) -> str:
        return self.launch.unit

    @property
    def state(self) -> UnitState:
        """What is known now; does not change any more once finished."""
        return self._tracked.state

    @property
    def started(self) -> bool:
        """The program was executed, whatever became of it.

        From systemd 240 on a start job that is done proves it. Otherwise the exit status has to
        tell: the statuses of systemd.exec(5) then count as "not executed", and a program that
        ends at once with such a status is misjudged.
        """
        if self._tracked.job_result == "done" and self._launcher.version >= 240:
            return True
        return self.state.exec_main_start_usec is not None and not self.state.exec_failed

    async def finished(self) -> UnitState:
        """Wait for the end; returns the final state. Survives every loss of the bus.

        Raises BusGone only if the launcher is closed meanwhile.
        """
        await self._tracked.done.wait()
        if self._tracked.final is None:
            raise BusGone(f"{self.name}: the launcher was closed before the unit ended")
        return self._tracked.final

    def sample(self) -> Usage:
        """Read the counters, which are gone at the end; returns the largest ever seen."""
        if self._tracked.final is None:
            state = self.state
            sample = self._launcher.meter.sample(state.control_group, state.main_pid)
            self._usage = self._usage.merged(sample)
        return self._usage

    async def usage(self) -> Usage:
        """What the unit used: samples, its usage record and systemd's own accounting.

        To be asked after the end and before reap(), which drops systemd's part of it.
        """
        if not self.state.ended_well:  # else there is none, but for what the job may have written
            launcher = self._launcher
            files = launcher.meter.record_files(launcher.control_group(self.launch))
            self._usage = self._usage.merged(parse_record(self._output_end(), files))
        if not self.state.vanished:
            self._usage = self._usage.merged(await self._accounting())
        return self._usage

    async def stop(self) -> None:
        """End the unit: SIGTERM, then SIGKILL after the launch's stop_timeout_sec.

        The order is given until systemd has taken it, however long the bus is away. Returns when
        the unit has ended. Raises SystemdError if it cannot be ended.
        """
        if self._tracked.final is not None:
            return
        limit = self._stop_limit()
        try:
            await self._launcher.repeat("StopUnit", "ss", self.name, "replace")
        except NoSuchUnit:
            self._launcher.tracker.mark(self._tracked)
        try:
            async with asyncio.timeout(limit):
                await self.finished()
        except TimeoutError:
            if not self._launcher.connected:
                raise BusGone(f"{self.name}: no connection to systemd to see its end") from None
            raise SystemdError(
                f"{self.name} has not ended {limit:g} s after it was told to. Probably one of its"
                f" processes is stuck in I/O: see systemctl status {self.name}"
            ) from None

    async def kill(self) -> None:
        """SIGKILL to all its processes, now. The order is given until systemd has taken it."""
        if self._tracked.final is None:
            with contextlib.suppress(NoSuchUnit):
                await self._launcher.repeat("KillUnit", "ssi", self.name, "all", signal.SIGKILL)

    async def reap(self) -> None:
        """Drop the unit from systemd, stopping it if it runs; then its name is free again.

        May be repeated. Raises SystemdError if systemd does not let go of it.
        """
        if self._reaped:
            return
        if self.state.load_state != "not-found":
            failed = self.state.active_state == "failed"
            await self._launcher.unload(self._tracked, failed=failed, timeout=self._stop_limit())
        self._reaped = True
        self._launcher.tracker.forget(self._tracked)

    def _stop_limit(self) -> float:
        # systemd waits that long after SIGTERM, after SIGKILL, for ExecStopPost, and once more
        # after each of the two signals to that.
        return self.launch.stop_timeout_sec * 5 + 5

    def _output_end(self) -> str:
        """The end of what this unit printed, where the usage record is."""
        try:
            with self.launch.stdout.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(self._tracked.output_begin, size - _RECORD_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    async def _accounting(self) -> Usage:
        names = [name for name in self._accounted() if name not in self._launcher.never_counted]
        values = await asyncio.gather(
            *(self._launcher.bus.get(self._tracked.path, "Service", name) for name in names),
            return_exceptions=True,
        )
        known: dict[str, int] = {}
        for name, value in zip(names, values, strict=True):
            if isinstance(value, SystemdError):
                logger.debug("%s: no %s: %s", self.name, name, value)
            elif isinstance(value, BaseException):
                raise value
            elif (number := counter(value)) is not None:
                known[name] = number
            elif self.state.ended_well:
                # Its cgroup was there until its end: this machine counts that for no unit.
                self._launcher.never_counted.add(name)
        nsec = known.get("CPUUsageNSec")
        return Usage(
            cpu_seconds=None if nsec is None else nsec / 1e9,
            memory_peak_bytes=known.get("MemoryPeak"),
            io_read_bytes=known.get("IOReadBytes"),
            io_write_bytes=known.get("IOWriteBytes"),
        )

    def _accounted(self) -> Iterator[str]:
        yield "CPUUsageNSec"
        if self._launcher.version >= 255:  # before, the others go with the cgroup
            yield from ("MemoryPeak", "IOReadBytes", "IOWriteBytes")


def size_of(output: Path) -> int:
    """Of the file for standard output; 0 if it is not there yet."""
    try:
        return output.stat().st_size
    except OSError:
        return 0
