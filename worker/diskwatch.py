"""Watches what running jobs take of the disk, and has a job stopped that takes too much.

LimitFSIZE= bounds each file, and a job may make many. So all it has is counted about once a
second, in blocks: they are what is used up.

A file that is deleted while it is open or mapped takes its blocks until it is closed. Such files
are looked for through /proc when the disk has lost more than the folders have gained, and every
now and then. Not seen is one that is kept in neither way, as in a message on its way between two
sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from worker.diskcount import FOLDER_FLAGS, MIB, Count, TooMuch
from worker.errors import JobError, Reason
from worker.systemd.survivors import survivors
from worker.systemd.usage import CGROUP_ROOT

logger = logging.getLogger(__name__)

T = TypeVar("T")

INTERVAL_SECONDS = 1.0
_UNEXPLAINED_BYTES = 64 * MIB
_ROUNDS_BETWEEN_LOOKS = 30


class DiskGuard:
    """The watch over one job, from the beginning to the end of a ``with`` block."""

    def __init__(
        self,
        watch: DiskWatch,
        folder: Path,
        limit: int,
        control_group: Callable[[], str],
        on_exceeded: Callable[[], None],
        spared: int,
        also: Sequence[Path],
    ) -> None:
        self.exceeded = ""
        """What was too much, "disk limit of 100 MB exceeded (137 MB in 12 files)"; or empty."""
        self.control_group = control_group
        self.on_exceeded = on_exceeded
        self.fd = -1
        self._watch = watch
        self.folder = folder
        self._limit, self._spared = limit, spared
        self._also = [os.fspath(path) for path in also]
        self._allocated: int | None = None
        self._rounds = 0

    def __enter__(self) -> Self:
        """Raises JobError if the folder cannot be opened."""
        try:
            self.fd = os.open(self.folder, FOLDER_FLAGS)
        except OSError as error:
            raise JobError(
                Reason.PLATFORM_ERROR, f"cannot watch the folder {self.folder}: {error.strerror}"
            ) from error
        self._watch.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.remove(self)

    async def final(self) -> str:
        """``exceeded`` after one more look at the folder. To be asked when the unit has ended."""
        if not self.exceeded:
            self.judge(await self._watch.in_thread(self.count))
        return self.exceeded

    def judge(self, count: Count) -> None:
        """Note what is too much."""
        if not self.exceeded:
            self.exceeded = count.excess(self._limit, self._spared)

    def count(self) -> Count:
        """What lies in the folder. In the watch's thread only: two would read in turns."""
        count = Count()
        try:
            count.add_tree(self.fd)
            for path in self._also:
                with contextlib.suppress(FileNotFoundError):
                    count.add(os.lstat(path))
        except TooMuch as error:
            count.trouble = str(error)
        except OSError as error:  # without the name, which is the job's
            count.trouble = f"the job's folder cannot be read: {error.strerror}"
        return count

    def count_deleted(self, count: Count, pids: Iterable[int]) -> None:
        """Add what these processes have in use that lies in no folder."""
        try:
            count.add_deleted(pids)
        except TooMuch as error:
            count.trouble = str(error)

    def growth(self, count: Count) -> int:
        """By how much the folder has grown since it was counted last; 0 the first time."""
        before, self._allocated = self._allocated, count.allocated
        return 0 if before is None else count.allocated - before

    def look_due(self) -> bool:
        """It is time to look for deleted files, whatever the disk says."""
        self._rounds = (self._rounds + 1) % _ROUNDS_BETWEEN_LOOKS
        return self._rounds == 0


class DiskWatch:
    """All watches of an agent. It wakes up while there are any, and counts in a thread.

    The agent needs CAP_DAC_OVERRIDE for folders that a job has closed to others, CAP_SYS_PTRACE
    for the open files of its processes, and CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN for mapped
    ones (proc(5)). Of these, what it may not see is not counted.
    """

    def __init__(
        self,
        *,
        interval: float = INTERVAL_SECONDS,
        cgroups: Path = Path(CGROUP_ROOT),
        free_bytes: Callable[[int], int] | None = None,
    ) -> None:
        """``free_bytes`` tells what is left on the file system of an open folder."""
        self._interval = interval
        self._cgroups = cgroups
        self._free_bytes = free_bytes or _free_bytes
        self._guards: set[DiskGuard] = set()
        # Not the loop's own threads: jobs' outputs are copied there, and all may be busy. One
        # only, so that no two of its calls are under way at once.
        self._pool = ThreadPoolExecutor(1, "diskwatch")
        self._task: asyncio.Task[None] | None = None
        self._disks: dict[int, _Disk] = {}

    def over(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        control_group: Callable[[], str],
        on_exceeded: Callable[[], None],
        spared_bytes: int = 0,
        also: Sequence[Path] = (),
    ) -> DiskGuard:
        """Watch a job that may have ``limit_bytes`` in ``folder``, besides ``spared_bytes``.

        ``control_group`` says where its unit's cgroup is. ``on_exceeded`` is called once, in the
        event loop, if it takes too much while it runs. It has to kill the unit: a job may ignore
        SIGTERM and go on writing. ``also`` are files elsewhere that it writes to.
        """
        return DiskGuard(self, folder, limit_bytes, control_group, on_exceeded, spared_bytes, also)

    def close(self) -> None:
        """End the thread, when nothing is watched any more."""
        self._pool.shutdown(wait=False)

    def add(self, guard: DiskGuard) -> None:
        """Begin to watch."""
        self._guards.add(guard)
        self._pool.submit(self._remember, guard)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="disk watch")

    def remove(self, guard: DiskGuard) -> None:
        """End a watch."""
        self._guards.discard(guard)
        self._pool.submit(os.close, guard.fd)  # there, after what still counts in it
        if not self._guards and self._task is not None:
            self._task.cancel()
            self._task = None

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do what takes the disk's time."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except Exception:  # whatever it was, jobs must not be left without a watch
                logger.exception("the look at the jobs' folders failed; it is taken again")
            await asyncio.sleep(self._interval)

    async def _round(self) -> None:
        guards = [(each, each.control_group()) for each in self._guards if not each.exceeded]
        for guard, count in await self.in_thread(lambda: self._look(guards)):
            if guard.exceeded or guard not in self._guards:
                continue  # its unit has ended meanwhile, and somebody asked for the last count
            guard.judge(count)
            if guard.exceeded:
                logger.warning("%s: %s", guard.folder, guard.exceeded)
                guard.on_exceeded()

    def _remember(self, guard: DiskGuard) -> None:
        """What the disk has before the job takes of it, where nobody has looked yet."""
        with contextlib.suppress(OSError):  # the next look says what is wrong with it
            device = os.fstat(guard.fd).st_dev
            if device not in self._disks:
                self._disks[device] = _Disk(self._free_bytes(guard.fd))

    def _look(self, guards: list[tuple[DiskGuard, str]]) -> list[tuple[DiskGuard, Count]]:
        """Count all folders, and where there is reason to, deleted files as well."""
        counts = [(guard, group, guard.count()) for guard, group in guards]
        grown: defaultdict[int, int] = defaultdict(int)
        for guard, _, count in counts:
            grown[count.device] += guard.growth(count)
        folders = {count.device: guard.fd for guard, _, count in counts}
        self._disks = {each: self._disks.get(each) or _Disk() for each in folders}
        suspect = {
            device for device, disk in self._disks.items()
            if disk.has_lost(self._free_bytes(folders[device]), grown[device])
        }  # fmt: skip
        for guard, group, count in counts:
            if guard.look_due() or count.device in suspect:
                guard.count_deleted(count, survivors(group, self._cgroups))
        return [(guard, count) for guard, _, count in counts]


class _Disk:
    """One file system, and what it has lost that no folder of a job has gained."""

    def __init__(self, free: int | None = None) -> None:
        self._free = free
        self._lost = 0

    def has_lost(self, free: int, grown: int) -> bool:
        """It is time to find out where it went, and to begin anew."""
        before, self._free = self._free, free
        if before is not None:
            self._lost = max(0, self._lost + before - free - grown)
        if self._lost <= _UNEXPLAINED_BYTES:
            return False
        self._lost = 0
        return True


def _free_bytes(fd: int) -> int:
    found = os.fstatvfs(fd)
    return found.f_bfree * found.f_frsize
