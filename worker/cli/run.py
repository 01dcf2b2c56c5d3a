"""``ffmpeg-worker run``: one job through the same path, without any master."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import sys
from pathlib import Path

from pydantic import ValidationError

from worker import workspace
from worker.config import Settings
from worker.diskwatch import DiskWatch
from worker.errors import ConfigError
from worker.execution import Execution
from worker.jobs.outcome import Intent
from worker.master.wire import Job
from worker.node.facts import gather
from worker.programs import Programs
from worker.site import Site
from worker.systemd import enforcement
from worker.systemd.launcher import Launcher

_LARGEST_JOB = 8 * 1024 * 1024


def run(settings: Settings, job_file: str) -> int:
    """Run the job in ``job_file`` (``-``: standard input); its result goes to stdout as JSON.

    Returns 0 only if the job completed. Raises ConfigError if there is no job in the file.
    """
    job = read_job(job_file)
    return asyncio.run(_run(settings, job))


def read_job(job_file: str) -> Job:
    """A job as the master would hand it out; without an id it gets one."""
    name = "standard input" if job_file == "-" else job_file
    try:
        if job_file == "-":
            data = sys.stdin.buffer.read(_LARGEST_JOB + 1)
        else:
            with Path(job_file).open("rb") as file:
                data = file.read(_LARGEST_JOB + 1)
        if len(data) > _LARGEST_JOB:
            raise ConfigError(f"{name} is larger than 8 MiB: is it the right file?")
        document = json.loads(data)
    except OSError as error:
        raise ConfigError(f"cannot read the job from {name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is no JSON: {error}") from error
    if isinstance(document, dict) and isinstance(document.get("job"), dict):
        document = document["job"]
    if not isinstance(document, dict):
        raise ConfigError(f'{name} holds no JSON object; a job looks like {{"scenario": …}}')
    document.setdefault("id", f"run-{secrets.token_hex(4)}")
    try:
        return Job.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{name}: the job's id must be a text of 1 to 1024 characters") from error


async def _run(settings: Settings, job: Job) -> int:
    workspace.require_work_dir(settings.work_dir)
    programs = Programs.find()
    site, disk = Site.prepare(settings, programs), DiskWatch()
    launcher = Launcher(user=settings.user)
    await launcher.connect()  # without the daemon's patience: somebody is waiting
    try:
        facts, _ = await asyncio.gather(
            gather(systemd_version=launcher.version),
            enforcement.check(launcher, user=settings.user),
        )
        progress = ProgressLine(sys.stderr.isatty())
        execution = Execution(
            job,
            node_id=settings.node_name,
            launcher=launcher,
            capabilities=facts.capabilities,
            programs=programs,
            settings=settings,
            site=site,
            disk=disk,
            on_progress=progress.show,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, execution.stop, Intent.CANCELLED)
        try:
            result = await execution.run()
            assert result is not None  # nobody told it to leave the job to another
        finally:
            progress.clear()
            await execution.release()
            execution.close()
    finally:
        disk.close()
        await launcher.close()
    document = result.model_dump(mode="json", exclude_none=True)
    # In ASCII: what a job or a file is called must not speak to the terminal.
    print(json.dumps(document, indent=2).replace("\x7f", "\\u007f"))
    return 0 if result.status == "completed" else 1


class ProgressLine:
    """The job's progress on one line of a terminal that is written over and over."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._shown = False
        for handler in logging.getLogger().handlers if terminal else ():
            handler.addFilter(self._make_room)

    def _make_room(self, _record: logging.LogRecord) -> bool:
        """A log line starts on a line of its own, not behind the progress."""
        self.clear()
        return True

    def show(self, execution: Execution) -> None:
        if self._terminal:
            self._shown = True
            print(f"\r\x1b[K{execution.progress_text()}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
