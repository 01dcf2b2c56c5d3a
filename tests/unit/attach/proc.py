"""A /proc for those that look at the processes of a machine."""

from __future__ import annotations

from pathlib import Path

HOME = "/system.slice/other.service"


class Proc:
    """A /proc of made-up processes; one that is born anew has another start time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.births = 100
        (folder / "self/ns").mkdir(parents=True)
        self._namespaces("self", "host")

    def add(
        self,
        pid: int,
        parent: int = 1,
        *,
        name: str = "ffmpeg",
        state: str = "S",
        flags: int = 0x400000,
        cgroup: str = HOME,
        world: str = "host",
        owner: int | None = None,
    ) -> None:
        self.births += 1
        place = self.folder / str(pid)
        (place / "ns").mkdir(parents=True, exist_ok=True)
        numbers = f"{state} {parent} 1 1 0 -1 {flags} {'0 ' * 12}{self.births} 0 0"
        (place / "stat").write_bytes(f"{pid} ({name}) {numbers}\n".encode())
        (place / "status").write_text(f"Name:\tx\nTgid:\t{owner or pid}\nRssAnon:\t    2048 kB\n")
        self._namespaces(str(pid), world)
        self.move(pid, cgroup)

    def move(self, pid: int, cgroup: str) -> None:
        (self.folder / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")

    def end(self, pid: int) -> None:
        (self.folder / str(pid) / "stat").unlink()

    def _namespaces(self, process: str, world: str) -> None:
        for kind in ("pid", "cgroup"):
            link = self.folder / process / "ns" / kind
            link.unlink(missing_ok=True)
            link.symlink_to(f"{kind}:[{world}]")
