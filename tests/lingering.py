"""A user with a service manager of its own, made as docs/operations.md has it.

For tests inside the test bed only: the user is a real one.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slowness import SLOWNESS

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / ".venv/bin/ffmpeg-worker"
NEEDED = {
    "libpam-systemd": "*/security/pam_systemd.so",
    "dbus-user-session": "systemd/user/dbus.socket",
}
"""Debian's packages, and what of them is below /lib."""


@dataclass(frozen=True)
class User:
    home: Path
    uid: int

    @property
    def runtime_dir(self) -> Path:
        return Path(f"/run/user/{self.uid}")

    @property
    def manager(self) -> str:
        """The unit of this user's service manager."""
        return f"user@{self.uid}.service"

    def start(
        self, *words: str, environment: dict[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        """ffmpeg-worker as this user, in an environment as bare as a login gives.

        An empty variable in ``environment`` takes that variable away. ``options`` are Popen's.
        """
        variables = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
            **environment,
        }
        return subprocess.Popen(
            [PROGRAM, *words],
            user=self.uid,
            group=pwd.getpwuid(self.uid).pw_gid,
            extra_groups=[],
            cwd=self.home,
            env={name: value for name, value in variables.items() if value},
            stdin=subprocess.DEVNULL,
            text=True,
            **options,
        )

    def worker(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The same, until it has ended, with what it said."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(*words, environment=environment, **pipes) as process:
            output, errors = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, output, errors)


@contextlib.contextmanager
def lingering_user(name: str) -> Iterator[User]:
    """A new user whose manager runs; removed with all that it runs."""
    missing = [package for package, file in NEEDED.items() if not list(Path("/lib").glob(file))]
    assert not missing, f"install {' and '.join(missing)}"
    _run("useradd", "--create-home", "--shell", "/bin/sh", name)
    entry = pwd.getpwnam(name)
    user = User(Path(entry.pw_dir), entry.pw_uid)
    try:
        # A bus that was killed and came back does not know logind, which runs on, any more.
        _run("systemctl", "try-restart", "systemd-logind.service")
        _run("loginctl", "enable-linger", name)
        # a job of systemd's, so this returns when the manager is up
        _run("systemctl", "start", user.manager)
        _wait_for_the_bus(user)
        yield user
    finally:
        _run("loginctl", "disable-linger", name)
        _run("systemctl", "stop", user.manager)
        subprocess.run(["userdel", "--remove", name], capture_output=True)


def _wait_for_the_bus(user: User) -> None:
    """A manager that is up may not have its name on the bus yet."""
    address = f"--address=unix:path={user.runtime_dir}/bus"
    command = ["busctl", address, "status", "org.freedesktop.systemd1"]
    deadline = time.monotonic() + 20 * SLOWNESS
    while True:
        done = subprocess.run(command, user=user.uid, capture_output=True, text=True)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, f"no manager on the bus: {done.stderr}"
        time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command} gave {done.returncode}: {done.stdout}{done.stderr}"
