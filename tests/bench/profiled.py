"""The agent under cProfile: ``python -m tests.bench.profiled STATS``.

The profile is written to STATS when the agent ends. What is imported at the start is not in it.
"""

from __future__ import annotations

import cProfile
import sys

import worker.cli.agent  # noqa: F401 - which the command imports only when it is run
from worker.__main__ import main

if __name__ == "__main__":
    stats = sys.argv.pop()
    # By the wall clock: the clock of CPU time is so slow that it would be half of the profile.
    # Waiting is in the row of epoll.
    profile = cProfile.Profile()
    try:
        status = profile.runcall(main)
    finally:
        profile.dump_stats(stats)
    sys.exit(status)
