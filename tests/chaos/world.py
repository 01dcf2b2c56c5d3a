"""Master, node and jobs together: what a run of the suite acts on and takes its notes in."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.chaos import points
from tests.chaos.master import ENDED, ChaosMaster
from tests.chaos.node import OUTPUTS, ChaosError, Node, sh, until
from tests.chaos.points import FOLDER, Point
from tests.fakes.shapes import RefusedError
from tests.slowness import SLOWNESS

Kind = Literal["generated", "file", "long", "silent", "large", "bad", "missing"]
KINDS: tuple[Kind, ...] = ("generated", "file", "long", "silent", "large", "bad", "missing")
LONG_SEC = 15.0
"""Of video: with a fifth of a core, some three seconds of work."""
STORM_WEIGHTS = (4, 4, 5, 2, 2, 1, 1)


@dataclass(frozen=True)
class Job:
    """``output`` has ``seconds`` of video if the job completes. A ``bad`` one never does."""

    id: str
    kind: Kind
    output: Path | None
    seconds: float
    bad: bool


@dataclass(frozen=True)
class Observation:
    """A fault on purpose, at a known step of a job. ``at`` is in Unix time."""

    who: str
    when: str
    job: str
    at: float
    group: str
    over: bool = False
    """The transcode had ended by then."""


@dataclass
class World:
    master: ChaosMaster
    node: Node
    rng: random.Random
    jobs: dict[str, Job] = field(default_factory=dict)
    group: str = ""
    """What is being tried: a heading of the report."""
    observations: list[Observation] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    """All that were made: when, and what."""
    deaths: list[float] = field(default_factory=list)
    """When an agent ended (Unix times)."""
    problems: list[str] = field(default_factory=list)
    stops: list[tuple[float, float]] = field(default_factory=list)
    """When the agent was told to stop and to end its jobs, and when it had (Unix times)."""

    def __post_init__(self) -> None:
        small, medium = FOLDER / "small.mp4", FOLDER / "medium.mp4"
        for path, seconds, size in ((small, 1, "160x120"), (medium, LONG_SEC, "640x360")):
            source = f"testsrc2=size={size}:rate=20:duration={seconds}"
            command = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", source]
            command += ["-preset", "ultrafast", "-pix_fmt", "yuv420p", str(path)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (FOLDER / "garbage.mp4").write_bytes(b"this is no video\n" * 1000)

    # --- jobs

    def submit(self, kind: Kind) -> Job:
        number = len(self.jobs)
        output: Path | None = OUTPUTS / f"{number}.mp4"
        scenario, seconds, parameters = "160x120p10-h264", 1.0, dict[str, Any]()
        match kind:
            case "generated":
                parameters = {"duration": 1}
            case "silent":
                parameters, output = {"duration": 1}, None
            case "large":
                scenario, seconds = "640x360p30-h264", 4.0
                parameters = {"duration": 4}
            case "file":
                parameters = {"input": str(FOLDER / "small.mp4")}
            case "long":
                limits = {"max_cpu_percent": 20}
                seconds = LONG_SEC
                parameters = {"input": str(FOLDER / "medium.mp4"), "resource_limits": limits}
            case "bad":
                parameters = {"input": str(FOLDER / "garbage.mp4")}
            case "missing":
                parameters = {"input": str(FOLDER / "nothing.mp4")}
        if output is not None:
            parameters["output"] = str(output)
        bad = kind in ("bad", "missing")
        request = {"scenario": scenario, "parameters": parameters}
        with self.master.changed:
            name = self.master.submit(request, **({"retries": 1} if bad else {}))
            job = self.jobs[name] = Job(name, kind, output, seconds, bad)
        return job

    def wait(self, job: Job, timeout: float = 60.0) -> bool:
        """Until the job has ended. False, and a problem on the list, if it does not."""
        return self._wait(
            lambda: self.master.state(job.id)["status"] in ENDED, timeout, f"job {job.id} to end"
        )

    def wait_for_state(self, job: Job, state: str, timeout: float = 30.0) -> bool:
        return self._wait(
            lambda: self.master.state(job.id)["status"] == state, timeout, f"job {job.id} {state}"
        )

    def wait_for_poll(self, since: float | None = None, timeout: float = 60.0) -> bool:
        """Until the agent has asked for a job after ``since`` (Unix time; now)."""
        begun = since or time.time()
        store = self.master.store
        return self._wait(lambda: store.polled_at > begun, timeout, "the agent asks for jobs")

    def wait_for_unit(self, job: Job, step: str = "", timeout: float = 30.0) -> bool:
        """Until the unit of a job's step runs."""
        unit = f"ffmpeg-job-{job.id}{f'-{step}' if step else ''}.service"
        return self._poll(
            lambda: self.node.show("SubState", unit) == "running", timeout, f"{unit} to run"
        )

    def wait_until_gone(self, job: Job, timeout: float = 30.0) -> bool:
        """Until systemd has no unit of the job."""
        pattern = f"ffmpeg-job-{job.id}*"
        return self._poll(
            lambda: not sh("systemctl", "list-units", "--all", "--no-legend", pattern),
            timeout, f"{pattern} to be gone",
        )  # fmt: skip

    def wait_for_end(self, timeout: float = 120.0) -> bool:
        """Until all jobs have ended and nothing of them is left."""
        if not self._wait(lambda: not self.master.open_jobs(), timeout, "all jobs to end"):
            return False
        return self._poll(lambda: not self.node.left(), 12, "nothing to be left")

    def _wait(self, what: Callable[[], bool], timeout: float, name: str) -> bool:
        with self.master.changed:
            if self.master.changed.wait_for(what, timeout * SLOWNESS):
                return True
        self.problems.append(f"waited for {timeout:g} s: {name}")
        return False

    def _poll(self, what: Callable[[], bool], timeout: float, name: str) -> bool:
        try:
            until(what, timeout, name)
        except ChaosError as error:
            self.problems.append(f"waited: {error}")
            return False
        return True

    # --- faults

    def did(self, what: str) -> float:
        """Note a fault that was made now."""
        now = time.time()
        self.faults.append((now, what))
        return now

    def kill(self) -> float:
        at = self.node.kill()
        self.faults.append((at, "kill -9 of the agent"))
        self.deaths.append(at)
        return at

    def arm(self, point: Point, job: Job | None = None) -> None:
        points.arm(point, job.id if job else points.ANY)

    def wait_until_fired(self, point: Point, timeout: float = 40.0) -> float | None:
        """When the agent died of the order (Unix time)."""
        if not self._poll(
            lambda: points.fired() is not None, timeout, f"the agent to die at {point.name}"
        ):
            points.disarm()
            return None
        return self.collect(point)

    def collect(self, point: Point) -> float | None:
        """Note the death that was ordered, if it has come."""
        at = points.fired()
        if at is not None:
            points.disarm()
            self.faults.append((at, f"kill -9 of the agent {point.text}"))
            self.deaths.append(at)
        return at

    def steer(self, job: str, action: str) -> bool:
        """Cancel, pause or resume a job at the master; False if its state does not allow it."""
        try:
            self.master.steer(job, action)
        except RefusedError:
            return False
        return True

    def stop(self) -> None:
        """systemctl stop, by which jobs may be ended."""
        begun = time.time()
        self.node.stop()
        self.stops.append((begun, time.time()))
        self.deaths.append(time.time())

    def restart(self) -> None:
        """systemctl restart, over which jobs run on."""
        self.node.restart()
        self.deaths.append(time.time())

    def observe(self, who: str, when: str, job: Job, at: float, *, over: bool = False) -> None:
        self.observations.append(Observation(who, when, job.id, at, self.group, over))
