"""The user and group of the worker on a test machine, made as install.sh makes them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SYSUSERS = Path(__file__).parents[1] / "units/sysusers.d/ffmpeg-worker.conf"


def ensure() -> None:
    """Make them, in the test bed or the VM only; may be repeated."""
    assert os.environ.get("FFMPEG_WORKER_BED") == "1", "this would change the machine's users"
    subprocess.run(["systemd-sysusers", SYSUSERS], check=True)
