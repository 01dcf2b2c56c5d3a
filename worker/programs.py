"""The programs that jobs run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from worker.errors import JobError, Reason


@dataclass(frozen=True, slots=True)
class Programs:
    """Absolute paths of what jobs run; empty where the node lacks it."""

    ffmpeg: str
    ffprobe: str

    @classmethod
    def find(cls) -> Programs:
        return cls(shutil.which("ffmpeg") or "", shutil.which("ffprobe") or "")

    def require(self) -> None:
        """Raise JobError unless both are there."""
        missing = [name for name in ("ffmpeg", "ffprobe") if not getattr(self, name)]
        if missing:
            raise JobError(
                Reason.PLATFORM_ERROR,
                f"{' and '.join(missing)} not found on this node (looked in PATH); "
                "install the ffmpeg package and restart the worker",
            )
