"""``python -m tests.chaos``: the whole suite. Runs inside the test bed; see ``make chaos``."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import oracle, report
from tests.chaos.master import ChaosMaster
from tests.chaos.node import ChaosError, Node, installed
from tests.chaos.storm import Storm
from tests.chaos.sweep import cases
from tests.chaos.world import World


def say(text: str) -> None:
    print(f"chaos: {text}", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    made.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    made.add_argument("--jobs", type=int, default=200, help="at least so many")
    made.add_argument("--faults", type=int, default=300, help="at least so many")
    made.add_argument("--only", default="", help="of the cases, those whose name has this (regex)")
    made.add_argument("--write", type=Path, metavar="FOLDER", help="for failures.md and the logs")
    made.add_argument("--log-level", default="info", help="of the agent")
    return made


def main() -> int:
    options = parser().parse_args()
    say(f"seed {options.seed}")
    begun = time.monotonic()
    with installed(), ChaosMaster() as master:
        node = Node(master.url, LOG_LEVEL=options.log_level)
        world = World(master, node, random.Random(options.seed))
        node.start()
        try:
            ok = run(world, options)
        finally:
            if options.write:
                (options.write / "agent.log").write_text("\n".join(node.log()))
                rows = [f"{at:.3f} {what}\n" for at, what in sorted(world.faults)]
                (options.write / "faults.log").write_text("".join(rows))
    say(f"{'passed' if ok else 'FAILED'} in {time.monotonic() - begun:.0f} s, seed {options.seed}")
    return 0 if ok else 1


def examples(world: World, problems: Sequence[str]) -> list[str]:
    """A job for each kind of problem."""
    kinds: dict[str, str] = {}
    for problem in problems:
        for job in world.jobs:
            if job in problem:
                kinds.setdefault(re.sub(r"[0-9a-f-]{36}|\d|\(\w+\)", "", problem), job)
    return list(dict.fromkeys(kinds.values()))[:8]


def run(world: World, options: argparse.Namespace) -> bool:
    world.wait_for_poll()
    for case in cases():
        if re.search(options.only, case.name):
            before = len(world.problems)
            begun = time.monotonic()
            try:
                case.run(world)
            except ChaosError as error:
                world.problems.append(f"{case.name}: {error}")
            bad = world.problems[before:]
            say(f"{case.name}: {time.monotonic() - begun:.1f} s{' '.join(['', *bad])}")
    Storm(world, say).run(options.jobs, options.faults)
    world.wait_for_end()
    problems = oracle.judge(world)
    found = oracle.histories(world)
    for problem in problems:
        say(f"PROBLEM {problem}")
    for job in examples(world, problems):
        print(report.life_of(world, found[job]))
    text = report.write(world, found, options.seed)
    if options.write:
        (options.write / "failures.md").write_text(text)
    elif not problems:
        print(text)
    return not problems


if __name__ == "__main__":
    sys.exit(main())
