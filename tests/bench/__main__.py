"""Measures the project: ``python -m tests.bench [NAME…] [--quick] [--out FILE]``.

Everything happens inside a test bed. Started outside, this program boots one and runs itself in
it; dbus-fast, for the benchmark that compares the libraries and for ``--library dbus-fast``, is
then fetched by pip into a folder that goes away again. All measurements are written to FILE as a
table.

Exit status: 0, also where a target is not reached; 1 if a benchmark broke.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench import ablation, cycle, durable, idle, latency, library, load, makespan, service
from tests.bench.harness import Bench

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "cycle": (cycle.run, "a unit of /bin/true against a minimal loop and systemd-run"),
    "makespan": (makespan.run, "jobs of a second against the same commands in a plain loop"),
    "latency": (latency.run, "submitted to completed, by poll interval"),
    "idle": (idle.run, "memory and CPU without jobs"),
    "jobs": (load.jobs, "1,000 jobs of next to no work: rate, CPU, memory"),
    "adopt": (durable.adopt, "a new agent takes over 100 running jobs"),
    "disk": (durable.disk, "bytes that the agent writes for a job"),
    "growth": (durable.growth, "memory over 5,000 jobs (long)"),
    "many": (load.many, "CPU and scrape time with 100 units running"),
    "library": (library.run, "a unit and a job with dbus-fast in place of dbus-next"),
    "ablation": (ablation.run, "what single properties of a unit cost (only when named)"),
    "profile": (load.profile, "where the agent's CPU time goes (only when named)"),
}
ON_DEMAND = ("ablation", "profile")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if os.environ.get("FFMPEG_WORKER_BED") == "1":
        return inside(options)
    return outside(options)


def outside(options: argparse.Namespace) -> int:
    """Boot a bed and measure in it."""
    out: Path = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ffmpeg-worker-bench-") as folder:
        words = [*options.names, "--out", str(out), *(["--quick"] if options.quick else [])]
        place = Path(folder)
        other = options.library == "dbus-fast"
        if other or "library" in options.names:
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            fetch = [*pip, "--no-deps", "--target", folder, "dbus-fast"]
            if subprocess.run(fetch, stdin=subprocess.DEVNULL).returncode == 0:
                words += ["--dbus-fast", folder]
                library.alias(place)
            elif other:
                print("dbus-fast cannot be fetched")
                return 1
            else:
                print("dbus-fast cannot be fetched: the benchmark `library` is left out")
        bed = [sys.executable, str(ROOT / "tests/bed/bed.py"), "run"]
        binds = [f"--bind={out.parent}", f"--bind={place}"]
        path = ["env", f"PYTHONPATH={place}"] if other else []
        command = [*bed, *binds, "--", *path, sys.executable, "-m", "tests.bench", *words]
        return subprocess.run(command, cwd=ROOT).returncode


def inside(options: argparse.Namespace) -> int:
    service.install()
    failed = False
    with tempfile.TemporaryDirectory(prefix="ffmpeg-worker-bench-") as folder:
        bench = Bench(quick=options.quick, folder=Path(folder), dbus_fast=options.dbus_fast)
        for name in options.names:
            bench.folder = Path(folder) / name
            bench.folder.mkdir()
            try:
                BENCHMARKS[name][0](bench)
            except Exception:
                traceback.print_exc()
                failed = True
            bench.write(options.out)  # what is measured is kept, whatever happens next
    goals = [figure for figure in bench.figures if figure.most is not None]
    missed = [figure for figure in goals if not figure.reached]
    print(f"\n{len(goals) - len(missed)} of {len(goals)} targets reached")
    for figure in missed:
        print(
            f"  missed: {figure.benchmark}: {figure.name}: {figure.median:.3f} {figure.unit},"
            f" at most {figure.most:g} wanted"
        )
    if options.quick:
        print("--quick: too few measurements to judge by")
    print(f"all measurements: {options.out}")
    return int(failed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:10} {text}" for name, (_, text) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones, default: all")
    parser.add_argument("--quick", action="store_true", help="only see that they work")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench/bench.tsv", metavar="FILE")
    parser.add_argument(
        "--library", choices=library.LIBRARIES, default="dbus-next", help="what all of it runs with"
    )
    parser.add_argument("--dbus-fast", type=Path, metavar="DIR", help="where dbus-fast is")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    options.names = options.names or [name for name in BENCHMARKS if name not in ON_DEMAND]
    return options


if __name__ == "__main__":
    sys.exit(main())
