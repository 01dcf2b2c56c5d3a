"""dbus-fast in place of dbus-next: what the library costs, for a unit and for a whole job.

dbus-fast began as a copy of dbus-next, so a module ``dbus_next`` that gives its modules instead
is all it takes: found first on PYTHONPATH, it decides for a process and those that it starts.
Each chunk is such a process: ``python -m tests.bench.library FOLDER COUNT``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.bench.harness import Bench, in_turns
from tests.bench.makespan import through_the_master
from tests.bench.service import CACHE, Service, make_media, memory_mb, quick_programs
from tests.fakes.master import FakeMaster

LIBRARIES = ("dbus-next", "dbus-fast")
_ALIAS = '''\
"""Not dbus-next: dbus-fast under its name."""
import importlib
import sys

for name in ("", ".aio", ".aio.message_bus", ".constants", ".errors", ".message", ".signature",
             "._private", "._private.unmarshaller"):
    sys.modules[f"dbus_next{name}"] = importlib.import_module(f"dbus_fast{name}")
# Its unmarshaller has no such name; the bus does not ask for the class that wants it.
sys.modules["dbus_next._private.unmarshaller"].MarshallerStreamEndError = EOFError
'''


def alias(folder: Path) -> None:
    """Make ``import dbus_next`` give the dbus-fast in ``folder`` to who has that on its path."""
    (folder / "dbus_next").mkdir()
    (folder / "dbus_next" / "__init__.py").write_text(_ALIAS)


def run(bench: Bench) -> None:
    bench.begin("library", "the unit cycle and a job of next to no work, by D-Bus library")
    place = bench.dbus_fast
    if place is None:
        bench.note("left out: dbus-fast is not there (pip could not fetch it, or --dbus-fast)")
        return
    paths = {name: str(place) if name == "dbus-fast" else "" for name in LIBRARIES}
    found = in_turns(
        {name: functools.partial(_chunk, bench, path) for name, path in paths.items()},
        bench.pick(9, 3),
    )
    for figure, unit in (("limits only", "ms"), ("as a job", "ms"), ("CPU", "ms"), ("RSS", "MB")):
        for loop in ("ours", "minimal") if figure != "RSS" else ("",):
            _compare(bench, found, f"{figure} {loop}".strip(), unit)
    bench.note("CPU is that of our process per cycle as a job; RSS of all that, loaded")
    media = make_media(bench.folder / "media.mp4", seconds=1)
    programs = quick_programs(bench.folder, media)
    agents = in_turns(
        {
            name: functools.partial(_agent, bench, path, media, programs)
            for name, path in paths.items()
        },
        bench.pick(5, 1),
        warm_up=False,
    )
    _compare(bench, agents, "CPU of the agent per job", "ms")
    _compare(bench, agents, "RSS of the agent", "MB")


def _compare(
    bench: Bench, found: dict[str, list[dict[str, float]]], figure: str, unit: str
) -> None:
    values = {name: [chunk[figure] for chunk in found[name]] for name in LIBRARIES}
    for name in LIBRARIES:
        bench.add(f"{name}: {figure}", values[name], unit)
    bench.compare(figure, values, "dbus-fast", "dbus-next")


def _chunk(bench: Bench, path: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", __name__, bench.folder, str(bench.pick(40, 8))],
        capture_output=True,
        text=True,
        env=os.environ | CACHE | {"PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"PYTHONPATH={path}: {done.stderr}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def _agent(bench: Bench, path: str, media: Path, programs: Path) -> dict[str, float]:
    count = bench.pick(100, 20)
    request = {"scenario": "bench", "parameters": {"input": str(media)}}
    with (
        FakeMaster(max_retries=0) as master,
        Service(
            master,
            programs=programs,
            environment={"PYTHONPATH": path},
            POLL_INTERVAL="200ms",
            MAX_CONCURRENT_JOBS=4,
        ) as service,
    ):
        through_the_master(master, [request] * 20)
        before = service.cpu_seconds
        through_the_master(master, [request] * count)
        return {
            "CPU of the agent per job": 1000 * (service.cpu_seconds - before) / count,
            "RSS of the agent": memory_mb(service.pid)[0],
        }


def main(folder: Path, count: int) -> None:
    import asyncio
    import time

    from tests.bench.cycle import minimal, ours
    from tests.bench.launches import as_a_job, limits_only, observe

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
    main(Path(sys.argv[1]), int(sys.argv[2]))
