"""The agent dies once at each step of a job, and nothing is lost and nothing runs twice."""

from __future__ import annotations

import random

from tests.chaos import oracle
from tests.chaos.master import ChaosMaster
from tests.chaos.node import Node, installed
from tests.chaos.points import POINTS, RESTART_POINTS
from tests.chaos.sweep import at_point, twice
from tests.chaos.world import World


def test_the_agent_dies_at_each_step() -> None:
    with installed(), ChaosMaster() as master:
        world = World(master, Node(master.url), random.Random(1))
        world.node.start()
        assert world.wait_for_poll(), world.problems

        for point in POINTS:
            at_point(point, wait=False).run(world)
        twice(RESTART_POINTS[-1]).run(world)

        world.wait_for_end()
        problems = oracle.judge(world)
        assert not problems, "\n".join(problems)
        assert len(world.deaths) == len(POINTS) + 2
