"""What one job has on the disk: its folder, and files it has in use that lie in no folder.

Everything counted here is the job's own and may be made to harm. No link is followed, no file is
opened, and what would take long to count (too many names, too deep a tree) ends the count.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MIB = 1024 * 1024
MOST_ENTRIES = 10_000
"""Files and folders of one job."""
MOST_LEVELS = 3
"""Of folders within the job's."""
MOST_OPEN = 100_000
"""Open files of one job. A thread may have a table of its own, so each thread's count."""
_BLOCK = 512  # the unit of st_blocks, whatever the file system's is
_BEYOND_END = 64 * 1024
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.ELOOP)
"""ENOTDIR, ELOOP: something else has taken the name meanwhile."""


class TooMuch(Exception):
    """What there is will not be counted to its end. The text says why."""


@dataclass(slots=True)
class Count:
    """What one job has on the disk, so far."""

    allocated: int = 0
    """Bytes of all blocks."""
    held: int = 0
    """Likewise, without those that lie beyond the end of a file."""
    files: int = 0
    deleted: int = 0
    """Of ``files``, those that have no name any more."""
    trouble: str = ""
    """Why it was not counted to the end."""
    device: int = 0
    """Of the folder's file system."""
    _entries: int = 0
    _devices: set[int] = field(default_factory=set)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def excess(self, limit: int, spared: int) -> str:
        """What is too much, in a sentence's words; empty if nothing is.

        XFS sets aside up to a file's size once more while it grows. So blocks beyond the ends of
        files do not count, unless they are more than that: a job may allocate them, too.
        """
        if self.trouble:
            return f"disk limit of {limit // MIB} MB cannot be checked: {self.trouble}"
        taken = self.held - spared
        if taken <= limit:
            if self.allocated - spared <= 2 * limit:
                return ""
            taken = self.allocated - spared
        files = f"{self.files} file{'' if self.files == 1 else 's'}"
        files += f", {self.deleted} of them deleted but in use" if self.deleted else ""
        return f"disk limit of {limit // MIB} MB exceeded ({-(-taken // MIB)} MB in {files})"

    def add_tree(self, fd: int, level: int = 0) -> None:
        """Everything below an open folder."""
        if not level:
            self.device = os.fstat(fd).st_dev
            self._devices.add(self.device)
        with os.scandir(fd) as entries:
            for entry in entries:
                self._entries += 1
                if self._entries > MOST_ENTRIES:
                    raise TooMuch(f"there are more than {MOST_ENTRIES} files and folders")
                try:
                    found = entry.stat(follow_symlinks=False)
                    self.add(found)
                    if stat.S_ISDIR(found.st_mode):
                        if level == MOST_LEVELS:
                            raise TooMuch(f"folders are more than {MOST_LEVELS} levels deep")
                        self._add_folder(entry.name, fd, level + 1)
                except OSError as error:
                    if error.errno not in _GONE:
                        raise

    def add(self, found: os.stat_result) -> None:
        """One file or folder; nothing for one that was added before under another name."""
        if not stat.S_ISDIR(found.st_mode):
            if found.st_nlink != 1:
                if (found.st_dev, found.st_ino) in self._seen:
                    return
                self._seen.add((found.st_dev, found.st_ino))
            self._devices.add(found.st_dev)  # an overlay's files may have another than its folders
            self.files += 1
        size = found.st_blocks * _BLOCK
        self.allocated += size
        is_file = stat.S_ISREG(found.st_mode)
        self.held += min(size, found.st_size + _BEYOND_END) if is_file else size

    def add_deleted(self, pids: Iterable[int], proc: str = "/proc") -> None:
        """The files without a name that these processes have open or mapped."""
        opened = 0
        for pid in pids:
            try:
                owner = os.stat(f"{proc}/{pid}").st_uid  # noqa: PTH116
            except OSError:  # ended meanwhile
                continue
            for thread in _names(f"{proc}/{pid}/task"):
                for name in _names(folder := f"{proc}/{pid}/task/{thread}/fd"):
                    opened += 1
                    if opened > MOST_OPEN:
                        raise TooMuch(f"more than {MOST_OPEN} files are open")
                    self._add_if_deleted(f"{folder}/{name}", owner)
            for addresses in _deleted_mappings(f"{proc}/{pid}/maps"):
                self._add_if_deleted(f"{proc}/{pid}/map_files/{addresses}", owner)

    def _add_folder(self, name: str, parent: int, level: int) -> None:
        fd = os.open(name, FOLDER_FLAGS, dir_fd=parent)
        try:
            self.add_tree(fd, level)
        finally:
            os.close(fd)

    def _add_if_deleted(self, link: str, owner: int) -> None:
        try:
            found = os.stat(link)  # noqa: PTH116 - of the open file, not of a path
        except OSError:  # closed meanwhile
            return
        # Anonymous memory has the form of a deleted file, too, of a device of its own.
        if found.st_nlink or not stat.S_ISREG(found.st_mode) or found.st_dev not in self._devices:
            return
        # Nor is it the job's doing if a program or library is replaced while it runs. A process
        # that hides from others of its user shows root as its owner, proc(5).
        if owner not in (0, found.st_uid):
            return
        before = self.files
        self.add(found)
        self.deleted += self.files - before


def _names(folder: str) -> list[str]:
    """What is in a folder of a process; nothing when that is gone, or not ours to see."""
    try:
        return os.listdir(folder)  # noqa: PTH208 - no objects, as there are many
    except OSError:
        return []


def _deleted_mappings(maps: str) -> Iterator[str]:
    """Where a process has deleted files mapped, each file once, named as map_files has it."""
    try:
        with open(maps, "rb") as file:  # noqa: PTH123
            lines = [line for line in file if line.endswith(b" (deleted)\n")]
    except OSError:
        return
    files = {}
    for line in lines:
        addresses, _, _, device, inode, _ = line.split(maxsplit=5)
        files[device, inode] = addresses
    for addresses in files.values():
        yield "-".join(f"{int(address, 16):x}" for address in addresses.split(b"-"))
