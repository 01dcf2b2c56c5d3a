"""The command line: one module a command, and the frame that they run in."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from worker.cli.arguments import Arguments, parse
from worker.config import Resolved, resolve
from worker.errors import WorkerError
from worker.printable import escape
from worker.telemetry import logs

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    output = io.StringIO()  # written at the end, where a failure can be told from others
    with contextlib.redirect_stdout(output):
        status = _main(argv)
    if sys.stdout is None or not output.getvalue():
        return status
    try:
        print(output.getvalue(), end="", flush=True)
    except OSError as error:
        # the interpreter will try again when it ends, and would complain in its own way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # who closed a pipe knows
            print(f"ffmpeg-worker: cannot write the output: {error.strerror}", file=sys.stderr)
        return status or 1
    return status


def _main(argv: Sequence[str]) -> int:
    try:
        arguments = parse(argv)
        if arguments.answer:
            print(arguments.answer)
            return 0
        resolved = resolve(
            arguments.flags,
            os.environ,
            config_file=arguments.config_file,
            need_master=arguments.command in ("", "check"),
        )
        return _dispatch(arguments, resolved)
    except WorkerError as error:
        logger.debug("ended by this error", exc_info=True)
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"ffmpeg-worker: {escape(line)}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        logger.debug("ended by a defect", exc_info=True)
        print(
            f"ffmpeg-worker: internal error: {type(error).__name__}: {escape(str(error))}; "
            "LOG_LEVEL=debug shows where",
            file=sys.stderr,
        )
        return 1


def _dispatch(arguments: Arguments, resolved: Resolved) -> int:
    settings = resolved.settings
    # commands are imported here: each pays only for what it uses
    if arguments.command == "check":
        from worker.cli.check import run as check

        return check(resolved)
    key = settings.master_api_key
    logs.setup(
        settings.log_level,
        settings.log_file,
        secrets=[key.get_secret_value()] if key else [],
    )
    for warning in resolved.warnings:
        logger.warning("%s", warning)
    if logger.isEnabledFor(logging.DEBUG):
        from worker.cli.check import rows

        for name, value, source in rows(resolved):
            logger.debug("setting %s: %s (%s)", name, value, source)
    if arguments.command == "run":
        from worker.cli.run import run as run_job

        return run_job(settings, arguments.job_file)
    if arguments.command == "attach":
        from worker.cli.attach import attach

        return attach(settings, arguments.pid, arguments.limits)
    if arguments.command == "detach":
        from worker.cli.attach import detach

        return detach(settings, arguments.pid)
    if arguments.command == "drain":
        from worker.cli.drain import drain

        return drain(settings, wait=arguments.wait, timeout=arguments.timeout)
    if arguments.command == "undrain":
        from worker.cli.drain import undrain

        return undrain(settings)
    if arguments.command == "history":
        from worker.cli.history import history

        return history(settings, arguments.job_id, limit=arguments.limit, as_json=arguments.json)
    from worker.cli.agent import run as run_agent

    return run_agent(settings)
