"""What the demo puts on the screen: commands with what they say, a log, figures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOLD, PLAIN = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
WIDTH = max(100, shutil.get_terminal_size((120, 24)).columns - 1)


class Log:
    """A service's journal, printed as it comes."""

    def __init__(self, service: str) -> None:
        self._journal = subprocess.Popen(
            ["journalctl", "--follow", "--lines=0", "--output=cat", f"--unit={service}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._print)
        self._thread.start()

    def _print(self) -> None:
        assert self._journal.stdout is not None
        for line in self._journal.stdout:
            said = re.sub(r"^worker(\.\w+)*: ", "", line.rstrip())
            print(wrapped(said, "  | "), flush=True)

    def stop(self) -> None:
        sh("journalctl", "--sync")
        time.sleep(0.5)  # for the log to be read to its end: this is a show
        self._journal.terminate()
        self._journal.wait()
        self._thread.join()


def cgtop() -> None:
    """The second picture: the first one has no rates yet."""
    text = sh(
        "systemd-cgtop", "--batch", "--iterations=2", "--delay=2", "--depth=4", "ffmpeg.slice"
    )
    pictures = [part for part in text.split("\n\n") if part.strip()]
    rows = [line.split() for line in pictures[-1].splitlines()] if pictures else []
    if not rows or any(len(row) != 6 for row in rows):
        print(text, flush=True)
        return
    width = max(len(row[0]) for row in rows)
    table = [["Control Group", "Tasks", "%CPU", "Memory", "Input/s", "Output/s"], *rows]
    lines = [f"{row[0]:{width}}" + "".join(f" {text:>8}" for text in row[1:]) for row in table]
    if all(row[2] == "-" for row in rows):
        lines.append("(No %CPU: this kernel has cpu and cpuacct apart, and cgtop no figures.)")
    print("\n".join(lines), flush=True)


def figure(value: float | None, unit: float, suffix: str, digits: int) -> str:
    text = "-" if value is None else f"{value / unit:.{digits}f} {suffix}"
    return f"{text:>7}"


def cut(line: str) -> str:
    """A line, no longer than the screen is wide."""
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def wrapped(line: str, head: str = "") -> str:
    """A line on as many lines of the screen as it needs."""
    return textwrap.fill(
        line,
        WIDTH,
        initial_indent=head,
        subsequent_indent=f"{head}      ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def headline(text: str) -> None:
    print(f"\n{BOLD}== {text}{PLAIN}", flush=True)


def show(*argv: str, lines: int | None = None) -> int:
    """Run a command, and print it and what it says; returns its exit status."""
    done = call(*argv)
    said = done.stdout.rstrip().splitlines()[:lines]
    command = " ".join(word.removeprefix(f"{ROOT}/") for word in argv)
    print("\n".join([f"$ {command}", *map(cut, said)]), flush=True)
    return done.returncode


def sh(*argv: str) -> str:
    """What a command prints, of both streams."""
    return call(*argv).stdout


def call(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": "", "COLUMNS": "120"}
    return subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
