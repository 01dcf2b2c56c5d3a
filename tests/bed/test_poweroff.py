"""What a service learns about its stop when the machine it runs on is powered off or rebooted."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bed import Bed

from tests.system.test_ownunit import NAME, PROGRAM, UNIT

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with Bed(binds=[(str(tmp_path), str(tmp_path))]) as bed:
        yield bed


@pytest.mark.parametrize("order", ["poweroff", "reboot"])
def test_the_machine_goes(bed: Bed, tmp_path: Path, order: str) -> None:
    answers = tmp_path / "answers"
    (tmp_path / "program.py").write_text(PROGRAM)
    unit = UNIT.format(
        dependency="",
        root=ROOT,
        python=sys.executable,
        program=tmp_path / "program.py",
        whose="system",
        answers=answers,
    )
    target = f"/run/systemd/system/{NAME}"
    bed.run(["tee", target], input=unit, text=True, capture_output=True, check=True)
    for words in (["daemon-reload"], ["start", NAME], [order]):
        bed.run(["systemctl", *words], check=True, timeout=60)
    deadline = time.monotonic() + 30
    while not (answers.exists() and answers.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "it was not told to stop"
        time.sleep(0.05)
    reason, seconds = answers.read_text().split()
    assert reason == "shutdown"
    assert float(seconds) < 2
