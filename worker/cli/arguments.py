"""Reading the command line.

Flags are written as the worker this replaces takes them (Go's ``flag`` package): one or two
dashes, ``--flag value`` or ``--flag=value``, and booleans that need no value. What is left over
is never repeated in an error: it may be a key behind a misspelt flag.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from worker import __version__
from worker.config import KEYS
from worker.config.keys import BOOLEAN_WORDS
from worker.errors import ConfigError

COMMANDS = ("run", "check", "attach", "detach", "drain", "undrain", "history")
_BOOLEANS = frozenset(key.flag for key in KEYS if key.boolean)
_LIMITS = {
    "--cpu-percent": ("N", "CPU, 100 is one core"),
    "--memory-mb": ("N", "memory that is allocated from now on"),
    "--timeout": ("S", "seconds from now: then the processes are ENDED (SIGTERM, then SIGKILL)"),
}
"""Flags of attach; the last one is of drain --wait as well."""
_VALUED = frozenset(key.flag for key in KEYS if not key.boolean) | {"--config", "--limit", *_LIMITS}
_GROUPS = {
    "master": "the master",
    "node": "this node",
    "jobs": "jobs",
    "telemetry": "log, metrics and health",
    "accepted": "accepted for the sake of existing unit files",
}
_USAGE = """ffmpeg-worker [flags]                      take jobs from a master
       ffmpeg-worker run [flags] JOB.json | -    run one job, without a master
       ffmpeg-worker check [flags]               show the configuration in force
       ffmpeg-worker attach [flags] PID          limit a running process and its children
       ffmpeg-worker detach [flags] PID          lift these limits, the process goes on
       ffmpeg-worker drain [--wait] [flags]      have the running worker take no new jobs
       ffmpeg-worker undrain [flags]             have it take jobs again
       ffmpeg-worker history [flags] [JOB_ID]    show the jobs accepted here, or all of one"""
_EPILOG = """\
Each flag but --user, --config and the accepted ones has an environment variable (in [brackets]),
which may also stand in the --config FILE (KEY=value lines, as in systemd's EnvironmentFile=).
A flag beats the environment, the environment beats the file. An empty value counts as not given.
Exit status: 0 done, 1 failed, 2 the configuration or the command line is wrong."""


@dataclass(frozen=True, slots=True)
class Arguments:
    command: str = ""
    """One of COMMANDS, or empty: take jobs from a master."""
    flags: dict[str, str] = field(default_factory=dict)
    """Those of ``worker.config.KEYS``, as written; the last one wins."""
    config_file: str = ""
    job_file: str = ""
    pid: str = ""
    """Of ``attach`` and ``detach``, as written."""
    limits: dict[str, str] = field(default_factory=dict)
    """The flags of ``attach`` alone, as written."""
    wait: bool = False
    """Of ``drain``."""
    timeout: str = ""
    """Of ``drain`` with ``wait``, as written."""
    job_id: str = ""
    """Of ``history``; empty: all jobs."""
    limit: str = ""
    """Of ``history``, as written."""
    json: bool = False
    """Of ``history``."""
    answer: str = ""
    """What ``--help`` or ``--version`` asked for; then nothing is to be run."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see ffmpeg-worker --help")


def parse(argv: Sequence[str]) -> Arguments:
    """Raises ConfigError."""
    flags, words = _split(argv)
    parser = _parser()
    known, unknown = parser.parse_known_args(flags)
    if unknown:
        names = ", ".join(sorted({flag.partition("=")[0] for flag in unknown}))
        parser.error(f"{names}: no such flag")
    given: dict[str, str] = vars(known)
    if given.pop("help"):
        return Arguments(answer=parser.format_help().rstrip())
    if given.pop("version"):
        return Arguments(answer=f"ffmpeg-worker {__version__}")
    config_file = given.pop("--config")
    limits = {flag: text for flag in _LIMITS if (text := given.pop(flag))}
    wait, as_json, limit = (
        bool(given.pop("--wait")),
        bool(given.pop("--json")),
        given.pop("--limit"),
    )
    values = {flag: text for flag, text in given.items() if text}

    command, rest = (words[0], words[1:]) if words else ("", [])
    if command not in ("", *COMMANDS):
        parser.error(f"there is a word that is neither flag nor command ({', '.join(COMMANDS)})")
    if wait and command != "drain":
        parser.error("--wait: only for drain")
    timeout = limits.pop("--timeout", "") if command == "drain" else ""
    if timeout and not wait:
        parser.error("--timeout: drain takes it together with --wait")
    if (as_json or limit) and command != "history":
        parser.error(f"{'--json' if as_json else '--limit'}: only for history")
    if limits and command != "attach":
        parser.error(f"{', '.join(limits)}: only for attach")
    if command in ("attach", "detach"):
        if len(rest) != 1:
            parser.error(f"{command} takes one PID")
        return Arguments(command, values, config_file, pid=rest[0], limits=limits)
    if command == "history":
        if len(rest) > 1:
            parser.error("history takes one JOB_ID or none")
        return Arguments(
            command, values, config_file, job_id="".join(rest), limit=limit, json=as_json
        )
    if len(rest) != (1 if command == "run" else 0):
        parser.error(
            "run takes one JOB.json, or - for standard input"
            if command == "run"
            else f"{command} takes flags only"
        )
    return Arguments(
        command, values, config_file, job_file="".join(rest), wait=wait, timeout=timeout
    )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags, each with its value as ``--flag=value``, and all other words."""
    flags: list[str] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        if name == "-h":
            name = "--help"
        elif not name.startswith("--"):
            name = "-" + name
        # a value is the next word whatever it looks like: keys may start with a dash
        takes_next = name in _VALUED or (
            name in _BOOLEANS and rest and (rest[0] in BOOLEAN_WORDS or not rest[0])
        )
        if not equals and takes_next:
            if not rest:
                raise ConfigError(f"{name}: its value is missing; see ffmpeg-worker --help")
            equals, value = "=", rest.pop(0)
        flags.append(name + equals + value)
    return flags, words


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ffmpeg-worker",
        usage=_USAGE,
        description="Runs FFmpeg jobs as systemd units, with limits that the kernel enforces.",
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=100
        ),
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--config", dest="--config", default="", metavar="FILE", help="see below")
    general.add_argument("--version", action="store_true", help="print the version")
    general.add_argument("-h", "--help", action="store_true", help="print this")
    section = parser.add_argument_group("limits, for attach: one or more of them")
    for flag, (metavar, text) in _LIMITS.items():
        section.add_argument(flag, dest=flag, default="", metavar=metavar, help=text)
    section = parser.add_argument_group("drain")
    section.add_argument(
        "--wait",
        dest="--wait",
        action="store_true",
        help="until no job runs and every result is delivered; with --timeout S: for S seconds, "
        "then fail",
    )
    section = parser.add_argument_group("history")
    section.add_argument(
        "--limit",
        dest="--limit",
        default="",
        metavar="N",
        help="the N newest (20; of one job: all)",
    )
    section.add_argument(
        "--json", dest="--json", action="store_true", help="one JSON list, for programs"
    )
    for group, title in _GROUPS.items():
        section = parser.add_argument_group(title)
        for key in KEYS:
            if key.group != group:
                continue
            names = f" [{', '.join(key.names)}]" if key.names else ""
            # the destination is the flag itself, so that values keep the name they came under
            if key.boolean:
                section.add_argument(
                    key.flag,
                    dest=key.flag,
                    default="",
                    const="true",
                    nargs="?",
                    metavar="BOOL",
                    help=key.help + names,
                )
            else:
                section.add_argument(
                    key.flag, dest=key.flag, default="", metavar=key.metavar, help=key.help + names
                )
    return parser
