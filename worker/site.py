"""What all jobs of this node share: as whom they run, what they see, where they read and write."""

from __future__ import annotations

import grp
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from worker.config import Settings
from worker.errors import ConfigError
from worker.files.publish import Owner, owner_of
from worker.jobs.policy import Policy
from worker.programs import Programs
from worker.systemd.sandbox import Device, JobRoot
from worker.workspace import using

_GPU_NODES = ("dri/renderD*", "nvidia[0-9]*", "nvidiactl", "nvidia-uvm*", "nvidia-modeset", "kfd")


@dataclass(frozen=True, slots=True)
class Site:
    root: JobRoot
    policy: Policy
    group: str = ""
    """Of all jobs; empty where they run as we do."""
    gid: int | None = None
    owner: Owner | None = None
    """Of published outputs; None: us."""
    gpus: tuple[Device, ...] = ()

    @classmethod
    def prepare(cls, settings: Settings, programs: Programs) -> Site:
        """Make what is missing.
        Raises ConfigError for a user or group that is not there, WorkerError for a work directory
        that cannot be used.
        """
        work_dir = settings.work_dir
        with using(work_dir):
            root = JobRoot.prepare(work_dir / "root", (programs.ffmpeg, programs.ffprobe))
        group, gid, owner = "", None, None
        if not settings.user:
            group, gid, owner = settings.job_group, _gid(settings.job_group), _owner(settings)
        return cls(
            root=root,
            policy=settings.policy,
            group=group,
            gid=gid,
            owner=owner,
            gpus=gpu_nodes(),
        )


def gpu_nodes(dev: Path = Path("/dev")) -> tuple[Device, ...]:
    """The device nodes of this machine's GPUs, each with the group that may open it."""
    found = []
    for path in sorted(path for pattern in _GPU_NODES for path in dev.glob(pattern)):
        status = path.stat()
        if stat.S_ISCHR(status.st_mode):
            found.append(
                Device(str(path), "" if status.st_mode & 0o006 == 0o006 else _group(status))
            )
    return tuple(found)


def _group(status: os.stat_result) -> str:
    try:
        return grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        return str(status.st_gid)


def _gid(name: str) -> int:
    try:
        gid = grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            f"JOB_GROUP: there is no group {name!r}, which jobs are to run with; "
            f"`groupadd --system {name}` makes it (scripts/install.sh does so)"
        ) from None
    if gid == 0:
        raise ConfigError("JOB_GROUP: must not be root's: jobs would have its rights")
    return gid


def _owner(settings: Settings) -> Owner:
    try:
        return owner_of(settings.output_owner)
    except ValueError as error:
        raise ConfigError(f"OUTPUT_OWNER: {error}") from None
