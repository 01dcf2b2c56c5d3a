"""Where the files of one job lie: its input, its output, and the disk that they need."""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path
from typing import Any

from worker.config import Settings
from worker.errors import JobError, Reason
from worker.files.beneath import InputFile, kept_files, resolve_input
from worker.files.publish import Note, check_output, publish
from worker.jobs.outcome import Outcome
from worker.jobs.spec import FileInput, JobSpec, StreamOutput
from worker.launching import MIB
from worker.node import disk
from worker.site import Site

logger = logging.getLogger(__name__)


class JobFiles:
    """Finds and places the files of one job, within what the site allows.

    ``job_id`` is for people, ``name`` what the job's files are called after.
    """

    def __init__(self, job_id: str, name: str, settings: Settings, site: Site) -> None:
        self._job_id = job_id
        self._name = name
        self._settings = settings
        self._site = site

    def find(self, source: FileInput) -> InputFile:
        """The input that the job names. Raises JobError."""
        policy = self._site.policy
        return resolve_input(
            source.path, policy.input_dirs, gid=self._site.gid, private=policy.closed
        )

    def require_room(self, spec: JobSpec, given: InputFile | None) -> None:
        """Raise JobError unless the job's output may go where it is to go, and the disk has room.

        ``given`` is the input that was found, if it is a file.
        """
        if isinstance(spec.output, Path):
            check_output(spec.output, given, **self._rules(spec))
        if not isinstance(spec.output, StreamOutput):
            self._require_disk(spec)

    def require_not_full(self, outcome: Outcome) -> None:
        """Raise JobError if it is the disk: ffmpeg cannot write down that it is full, either."""
        folder = self._settings.work_dir
        try:
            full = disk.usage(folder).available < MIB
        except OSError:
            return  # then nobody can tell
        if full:
            raise JobError(
                Reason.RESOURCE_ERROR,
                f"no space is left in {folder}; free some. {outcome.message}",
            )

    async def keep_input(self, made: Path) -> None:
        """Leave a copy of the input that was generated, if such are wanted."""
        if self._settings.persist_inputs:
            kept = self._settings.work_dir / f"input_{self._name}.mp4"
            await self._put(made, kept, self._kept, copy=True)

    async def publish(self, made: Path, spec: JobSpec, note: Note) -> None:
        """Put the output in its place, if it is wanted at all; ``note`` is told before it is there.

        Raises JobError.
        """
        if isinstance(spec.output, Path):
            await self._put(made, spec.output, self._rules(spec), note=note)
        elif self._settings.persist_outputs:
            target = self._settings.work_dir / self._default_name(spec)
            await self._put(made, target, self._kept, note=note)

    def _rules(self, spec: JobSpec) -> dict[str, Any]:
        """Where an output that the job names may go."""
        policy = self._site.policy
        return {
            "dirs": policy.output_dirs,
            "owner": self._site.owner,
            "private": (*policy.closed, *kept_files(self._settings.work_dir)),
            "mine": self._default_name(spec),
        }

    @property
    def _kept(self) -> dict[str, Any]:
        """Where files go that are kept under a name of ours."""
        return {"dirs": (self._settings.work_dir,), "owner": self._site.owner}

    def _default_name(self, spec: JobSpec) -> str:
        """Of an output that the job does not name."""
        return f"job_{self._name}_output{suffix_of(spec)}"

    def _require_disk(self, spec: JobSpec) -> None:
        """Raise JobError unless the job's disk limit fits on every file system it writes to."""
        need = spec.limits.disk_mb
        folders = [
            self._settings.work_dir,
            *([spec.output.parent] if isinstance(spec.output, Path) else []),
        ]
        for folder in dict.fromkeys(folders):
            try:
                found = disk.usage(folder)
            except OSError as error:
                raise JobError(
                    Reason.PLATFORM_ERROR,
                    f"cannot see how much disk space {folder} has: {error.strerror}",
                ) from error
            available = found.available // MIB
            logger.info(
                "job %s: Disk space: %.0f%% used (%d MB available) in %s",
                self._job_id, found.used_ratio * 100, available, folder,
            )  # fmt: skip
            if available < need:
                raise JobError(
                    Reason.RESOURCE_ERROR,
                    f"the job may need {need} MB of disk, but only {available} MB are available "
                    f"in {folder}; free some space or lower max_disk_mb",
                )

    async def _put(self, made: Path, target: Path, rules: dict[str, Any], **more: Any) -> None:
        """Publish a file without holding up the others: it may be large, and the disk slow."""
        await asyncio.to_thread(functools.partial(publish, made, target, **rules, **more))
        logger.info("job %s: wrote %s", self._job_id, target)


def suffix_of(spec: JobSpec) -> str:
    """What the name of the job's output ends in, the dot included."""
    return spec.output.suffix if isinstance(spec.output, Path) else ".mp4"
