"""The units that are shipped, as this systemd reads them: each version knows other settings."""

from __future__ import annotations

import subprocess
from pathlib import Path

UNITS = Path(__file__).parents[2] / "units"


def test_shipped_units_are_understood(tmp_path: Path) -> None:
    copies = [tmp_path / unit.name for unit in UNITS.iterdir()]
    for copy in copies:
        text = (UNITS / copy.name).read_text()
        copy.write_text(text.replace("/usr/local/bin/ffmpeg-worker", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, copies)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0
