"""What the service's surroundings are changed with: drop-ins, and code that runs inside of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.conftest import SERVICE, UNITS, sh


@contextlib.contextmanager
def drop_in(text: str) -> Iterator[None]:
    """Lines for the service's [Service] section, in force for what is started inside."""
    path = UNITS / f"{SERVICE}.d/test.conf"
    path.parent.mkdir()
    path.write_text(f"[Service]\n{text}\n")
    sh("systemctl", "daemon-reload")
    try:
        yield
    finally:
        sh("systemctl", "stop", SERVICE, check=False)
        path.unlink()
        path.parent.rmdir()
        sh("systemctl", "daemon-reload")


def inside(folder: Path, code: str) -> str:
    """A PYTHONPATH with which the service runs the code before its own (site(3))."""
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)
