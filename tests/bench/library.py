"""The unit cycle with dbus-fast in place of dbus-next: what the library costs.

The library is chosen when it is imported, so every chunk is a process of its own:
``python -m tests.bench.library LIBRARY FOLDER COUNT``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.bench.harness import Bench, in_turns
from tests.bench.service import CACHE

LIBRARIES = ("dbus-next", "dbus-fast")
_MODULES = ("", ".aio", ".aio.message_bus", ".constants", ".errors", ".message", ".signature")


def run(bench: Bench) -> None:
    bench.begin("library", "the unit cycle, by D-Bus library")
    if bench.dbus_fast is None:
        bench.note("left out: dbus-fast is not there (pip could not fetch it, or --dbus-fast)")
        return
    place = bench.dbus_fast
    found = in_turns(
        {name: functools.partial(_chunk, bench, name, place) for name in LIBRARIES},
        bench.pick(9, 3),
    )
    for figure, unit in (("limits only", "ms"), ("as a job", "ms"), ("CPU", "ms"), ("RSS", "MB")):
        for loop in ("ours", "minimal") if figure != "RSS" else ("",):
            key = f"{figure} {loop}".strip()
            values = {name: [chunk[key] for chunk in found[name]] for name in LIBRARIES}
            for name in LIBRARIES:
                bench.add(f"{name}: {key}", values[name], unit)
            bench.compare(key, values, "dbus-fast", "dbus-next")
    bench.note("CPU is that of our process per cycle as a job; RSS with only the launcher loaded")


def _chunk(bench: Bench, library: str, place: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", __name__, library, bench.folder, str(bench.pick(40, 8))],
        capture_output=True,
        text=True,
        env=os.environ | CACHE | {"PYTHONPATH": str(place)},
    )
    if done.returncode:
        raise RuntimeError(f"{library}: {done.stderr}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def use(library: str) -> None:
    """Let ``import dbus_next`` give this library. To be called before anything imports it."""
    if library == "dbus-fast":
        for name in _MODULES:
            sys.modules[f"dbus_next{name}"] = importlib.import_module(f"dbus_fast{name}")


def main(library: str, folder: Path, count: int) -> None:
    use(library)
    # Not before: they import the D-Bus library.
    import asyncio
    import time

    from tests.bench.cycle import minimal, ours
    from tests.bench.launches import as_a_job, limits_only, observe
    from tests.bench.service import memory_mb

    answer = {"RSS": memory_mb(os.getpid())[0]}
    for what, launch in (("limits only", limits_only(folder)), ("as a job", as_a_job(folder))):
        wire, _, _ = asyncio.run(observe(launch))
        ours(launch, 2)
        before = time.process_time()
        answer[f"{what} ours"] = ours(launch, count).full
        answer["CPU ours"] = 1000 * (time.process_time() - before) / count
        before = time.process_time()
        answer[f"{what} minimal"] = minimal(launch, wire, count).full
        answer["CPU minimal"] = 1000 * (time.process_time() - before) / count
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
