"""A ledger, and ``history`` on the command line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker import cli
from worker.ledger import Ledger

Run = Callable[..., tuple[int, str, str]]
"""The exit status, standard output and standard error of ``history`` with these words."""


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture
def ledger(ledger_path: Path) -> Iterator[Ledger]:
    """Each thing in it is two seconds after the one before."""
    clock = itertools.count(1_790_000_002.0, 2.0)
    ledger = Ledger.open(ledger_path, clock=clock.__next__)
    yield ledger
    ledger.close()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(["history", "--work-dir", str(tmp_path), *argv])
        return status, *capsys.readouterr()

    return run
