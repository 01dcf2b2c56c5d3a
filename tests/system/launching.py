"""Units as the launcher's tests start them."""

from __future__ import annotations

from pathlib import Path

from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, slice_name, unit_name

SLEEP = ("/bin/sleep", "60")


async def close_clean(launcher: Launcher) -> None:
    """A test is over: no unit of a job is left."""
    left = await launcher.leftovers()
    for name in left:  # a test that failed does not spoil the next
        await launcher.stop_and_reap(name)
    await launcher.close()
    assert left == []


class Jobs:
    """Makes launches that differ in what a test is about only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def launch(
        self, *argv: str, job: str = "one", queue: str = "default", **options: object
    ) -> Launch:
        limits = {
            name: options.pop(name)
            for name in (
                "cpu_percent",
                "memory_bytes",
                "runtime_sec",
                "file_bytes",
                "tasks_max",
                "cpu_weight",
            )
            if name in options
        }
        return Launch(
            unit=unit_name(job, Step.MAIN),
            description=f"test job {job}",
            argv=argv,
            slice=slice_name(queue),
            limits=UnitLimits(**limits),  # type: ignore[arg-type]
            stdout=self.folder / f"{job}.out",
            stop_timeout_sec=2,
            **options,  # type: ignore[arg-type]
        )
