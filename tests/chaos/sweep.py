"""One fault at each step of a job, each with a job of its own that is looked at afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tests.chaos import points
from tests.chaos.node import sh, until
from tests.chaos.points import INPUT, POINTS, RESTART_POINTS, Point
from tests.chaos.world import Job, Kind, World

AGENT = "the agent (kill -9)"
RUNNING = "while the transcode ran"
MAIN_ENDED = POINTS.index(points.BY_NAME["main-ended"])


@dataclass(frozen=True)
class Case:
    """``group`` is a heading of the report."""

    name: str
    act: Callable[[World], None]
    group: str = ""

    def run(self, world: World) -> None:
        world.group = self.group
        self.act(world)


ROUTES = {
    "GET /jobs/next": "asked for a job",
    "GET /jobs/[0-9]*": "asked how a job stands",
    "POST /results": "sent a result",
    "POST /nodes/*/heartbeat": "sent a heartbeat",
    "POST /nodes/register": "registered",
}
ANSWERS = {
    "status": "answered 500",
    "garbage": "answered with something that is not its protocol",
    "half": "did it and sent half of its answer",
    "lose": "did it and hung up without an answer",
    "drop": "hung up without doing it",
    "hang": "said nothing for a second",
}


def kind_for(point: Point) -> Kind:
    match point.name:
        case "main-runs":
            return "long"
        case "input-runs":
            return "large"
    return "generated"


def at_point(point: Point, *, wait: bool = True) -> Case:
    """The agent dies at a step boundary."""

    def case(world: World) -> None:
        with world.master.changed:  # nobody gets the job before the order is given
            job = world.submit(kind_for(point))
            world.arm(point, job)
        at = world.wait_until_fired(point)
        if at is None:
            return
        world.observe(AGENT, point.text, job, at, over=POINTS.index(point) >= MAIN_ENDED)
        if wait:
            world.wait(job)
            world.wait_for_poll(at)

    return Case(f"step {point.name}", case)


def twice(point: Point) -> Case:
    """The agent dies while a transcode runs, and again when it has started."""

    def case(world: World) -> None:
        job = _running(world)
        world.arm(point, job)
        at = world.kill()
        if world.wait_until_fired(point) is not None:
            world.observe(AGENT, f"{RUNNING}, {point.text}", job, at)
        world.wait(job)
        world.wait_for_poll()

    return Case(f"twice {point.name}", case)


def answers(route: str, kind: str) -> Case:
    """The master gives a bad answer to one request."""

    def case(world: World) -> None:
        master = world.master
        if route.endswith(("register", "heartbeat")):
            job = _running(world)
            before = master.asked(route)
            master.fault(route, kind)
            if route.endswith("register"):
                world.restart()
        else:
            with master.changed:
                job = world.submit("long" if "[0-9]" in route else "generated")
                before = master.asked(route)
                master.fault(route, kind)
        with master.changed:
            master.changed.wait_for(lambda: master.asked(route) > before, 30)
        at = world.did(f"master: {route} {kind}")
        if kind == "hang":
            time.sleep(1)
            master.calm()
        sent = route == "POST /results"
        who, when = f"the master {ANSWERS[kind]}", f"when the agent {ROUTES[route]}"
        world.observe(who, when, job, at, over=sent)
        world.wait(job)

    return Case(f"answer {kind} {route}", case)


def answers_and_dies(kind: str) -> Case:
    """The answer to a result is lost, and the agent that waits for it is killed."""

    def case(world: World) -> None:
        master, route = world.master, "POST /results"
        with master.changed:
            job = world.submit("generated")
            before = master.asked(route)
            master.fault(route, kind)
        with master.changed:
            master.changed.wait_for(lambda: master.asked(route) > before, 30)
        at = world.did(f"master: {route} {kind}")
        world.kill()
        master.calm()
        who = f"the master {ANSWERS[kind]}, and the agent was killed"
        world.observe(who, "when the agent sent a result", job, at, over=True)
        world.wait(job)
        world.wait_for_poll()

    return Case(f"answer and kill {kind}", case)


def around(who: str, when: str, fault: Callable[[World, Job], None], step: str = "") -> Case:
    """Something happens while a unit of a job runs."""

    def case(world: World) -> None:
        job = _running(world, step)
        at = world.did(f"{who} {when}")
        fault(world, job)
        world.observe(who, when, job, at)
        world.wait(job)
        world.wait_until_gone(job)

    return Case(f"{who} {when}", case)


def _running(world: World, step: str = "") -> Job:
    job = world.submit("large" if step == INPUT else "long")
    world.wait_for_unit(job, step)
    return job


def master_down(world: World, job: Job) -> None:
    world.master.stop()
    time.sleep(3)
    world.master.start()


def master_down_and_kill(world: World, job: Job) -> None:
    world.master.stop()
    world.kill()
    time.sleep(4)
    world.master.start()


def forgotten(world: World, job: Job) -> None:
    world.master.store.forget_nodes()


def full_disk(world: World, job: Job) -> None:
    world.node.fill()
    time.sleep(1.5)
    world.node.empty()


def cancel(world: World, job: Job) -> None:
    world.steer(job.id, "cancel")


def cancel_and_kill(world: World, job: Job) -> None:
    world.steer(job.id, "cancel")
    world.kill()


def pause(world: World, job: Job) -> None:
    world.steer(job.id, "pause")
    time.sleep(2)
    world.steer(job.id, "resume")


def pause_and_kill(world: World, job: Job) -> None:
    world.steer(job.id, "pause")
    time.sleep(1.5)
    world.kill()
    time.sleep(1.5)
    world.steer(job.id, "resume")


def requeue(world: World, job: Job) -> None:
    world.master.store.requeue(job.id)


def drain(world: World, job: Job) -> None:
    world.node.command("drain")
    world.restart()
    world.wait(job)
    until(lambda: world.node.command("undrain"), 30, "the agent to take jobs again")


def restart(world: World, job: Job) -> None:
    world.restart()


def stop(world: World, job: Job) -> None:
    world.stop()
    time.sleep(0.5)
    world.node.start(STOP_MODE="handback")


def stop_case(mode: str, what: str) -> Case:
    """STOP_MODE is read at the start of an agent, so it gets one."""

    def case(world: World) -> None:
        world.node.start(STOP_MODE=mode)
        world.restart()
        around(f"systemctl stop, then start ({what})", RUNNING, stop).act(world)

    return Case(f"stop {mode}", case)


def command(*words: str) -> Callable[[World, Job], None]:
    return lambda world, job: void(sh(*words))


def void(_: object) -> None:
    """For what is called for its effect."""


def agent_cases() -> Iterator[Case]:
    for point in POINTS:
        yield at_point(point)
    for point in RESTART_POINTS:
        yield twice(point)


def master_cases() -> Iterator[Case]:
    for route in ROUTES:
        for kind in ANSWERS:
            yield answers(route, kind)
    for kind in ("half", "lose", "drop", "hang"):
        yield answers_and_dies(kind)
    yield around("the master (stopped for 3 s)", RUNNING, master_down)
    yield around(
        "the master (stopped for 4 s) and the agent (kill -9)", RUNNING, master_down_and_kill
    )
    yield around("the master (forgot all nodes)", RUNNING, forgotten)
    yield around("the master (gave the job away as stale)", RUNNING, requeue)


def node_cases() -> Iterator[Case]:
    during = {points.INPUT: "while the input was generated", "": RUNNING}
    for step, when in during.items():
        yield around("systemctl restart dbus", when, command("systemctl", "restart", "dbus"), step)
        yield around("systemctl daemon-reload", when, command("systemctl", "daemon-reload"), step)
        yield around("systemctl daemon-reexec", when, command("systemctl", "daemon-reexec"), step)
        yield around("the state directory (full for 1.5 s)", when, full_disk, step)
    yield around("systemctl restart of the agent", RUNNING, restart)
    yield stop_case("handback", "STOP_MODE=handback")
    yield stop_case("drain", "STOP_MODE=drain")
    yield stop_case("leave", "STOP_MODE=leave")


def order_cases() -> Iterator[Case]:
    yield around("the job (cancelled at the master)", RUNNING, cancel)
    yield around("the job (cancelled) and the agent (kill -9)", RUNNING, cancel_and_kill)
    yield around("the job (paused for 2 s)", RUNNING, pause)
    yield around("the job (paused for 3 s) and the agent (kill -9)", RUNNING, pause_and_kill)
    yield around("the node (drained and restarted)", RUNNING, drain)


def cases() -> list[Case]:
    """All of them."""
    groups = {
        "The agent dies": agent_cases(),
        "The master misbehaves": master_cases(),
        "The machine misbehaves": node_cases(),
        "Orders, and what comes in between": order_cases(),
    }
    return [replace(case, group=group) for group, made in groups.items() for case in made]
