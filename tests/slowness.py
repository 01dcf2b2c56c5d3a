"""How much slower than a real machine the tests are run: a factor for their time limits."""

from __future__ import annotations

import os

SLOWNESS = float(os.environ.get("FFMPEG_WORKER_SLOWNESS", "1"))
"""1 on a real machine; the emulated one of tests/bed/vm.py sets what it takes."""
