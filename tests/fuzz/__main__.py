"""``python -m tests.fuzz [--count N] [--seed S] [--first N]``: see tests/fuzz/__init__.py.

Exit status 1 with the seed and the job if anything does not hold. ``--count 1 --first N`` runs
that one job again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from tests.fuzz.cases import rng_of, run_case
from tests.fuzz.jobs import make_job
from worker.node.cpu import usable_cpus

ACCEPTED = "accepted"
_CHUNK = 5000


@dataclass(slots=True)
class Chunk:
    verdicts: Counter[str] = field(default_factory=Counter)
    failure: str = ""


def run_chunk(seed: int, first: int, count: int) -> Chunk:
    """Run jobs up to the first violation."""
    chunk = Chunk()
    for number in range(first, first + count):
        try:
            chunk.verdicts[run_case(rng_of(seed, number))] += 1
        except Exception:
            raw = make_job(rng_of(seed, number))
            chunk.failure = (
                f"--seed {seed} --first {number} --count 1\n{raw!r}\n{traceback.format_exc()}"
            )
            break
    return chunk


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=None, help="a new one unless given")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"fuzz: {options.count} jobs, seed {seed}", flush=True)
    begun, end = time.monotonic(), options.first + options.count
    verdicts: Counter[str] = Counter()
    with ProcessPoolExecutor(usable_cpus()) as pool:
        chunks = [
            pool.submit(run_chunk, seed, first, min(_CHUNK, end - first))
            for first in range(options.first, end, _CHUNK)
        ]
        for chunk in as_completed(chunks):
            result = chunk.result()
            verdicts += result.verdicts
            if result.failure:
                pool.shutdown(cancel_futures=True)
                print(f"fuzz: VIOLATION\n{result.failure}", file=sys.stderr)
                return 1
    report(verdicts, time.monotonic() - begun)
    return 0


def report(verdicts: Counter[str], seconds: float) -> None:
    total = verdicts.total()
    accepted = sum(number for verdict, number in verdicts.items() if verdict.startswith(ACCEPTED))
    print(
        f"fuzz: {total} jobs in {seconds:.0f} s ({total / seconds:.0f}/s), nothing amiss: "
        f"{accepted} accepted ({accepted / total:.0%}), {verdicts['unreadable']} unreadable, "
        f"{total - accepted - verdicts['unreadable']} refused"
    )
    for verdict, number in verdicts.most_common():
        print(f"{number:9}  {verdict}")


if __name__ == "__main__":
    sys.exit(main())
