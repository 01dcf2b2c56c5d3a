"""Disk space, counted as df(1) counts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes of one file system."""

    total: int
    used: int
    available: int
    """What programs without privileges can still write: without the reserve of root."""

    @property
    def used_ratio(self) -> float:
        """0 to 1: of what programs can use, so that 1 is when they cannot write any more."""
        usable = self.used + self.available
        return self.used / usable if usable else 1.0


def usage(path: Path) -> DiskUsage:
    """Of the file system that ``path`` is on. Raises OSError, also where there is no such path."""
    status = os.statvfs(path)
    return DiskUsage(
        total=status.f_blocks * status.f_frsize,
        used=(status.f_blocks - status.f_bfree) * status.f_frsize,
        available=status.f_bavail * status.f_frsize,
    )
