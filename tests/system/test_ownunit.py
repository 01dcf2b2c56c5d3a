"""A service that says why it was told to stop, and the ways there are to tell it."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lingering import User, lingering_user
from tests.slowness import SLOWNESS

ROOT = Path(__file__).parents[2]
NAME = "ffmpeg-worker-test-own.service"
OTHER = "ffmpeg-worker-test-other.service"
PROGRAM = """\
import asyncio, signal, sys, time
from worker.systemd.bus import Bus
from worker.systemd.ownunit import stop_reason
from worker.telemetry.notify import Notifier

async def main(user, answers):
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    bus = Bus(user=user)
    await bus.connect()
    Notifier().ready()
    await told.wait()
    begun = time.monotonic()
    reason = await stop_reason(bus)
    with open(answers, "a") as file:
        print(reason, time.monotonic() - begun, file=file)
    await bus.close()

asyncio.run(main(sys.argv[1] == "user", sys.argv[2]))
"""
UNIT = """\
[Unit]
After=dbus.socket dbus.service
{dependency}

[Service]
Type=notify
Environment=PYTHONPATH={root} PYTHONDONTWRITEBYTECODE=1
ExecStart={python} {program} {whose} {answers}
"""
OTHER_UNIT = """\
[Service]
ExecStart=/bin/sleep infinity
"""


class Service:
    """The service, in the system's manager or in a user's."""

    def __init__(self, folder: Path, user: User | None = None, dependency: str = "") -> None:
        self._user = user
        self.answers = folder / "answers"
        self._units = user.runtime_dir / "systemd/user" if user else Path("/run/systemd/system")
        program = folder / "program.py"
        program.write_text(PROGRAM)
        self._install(
            NAME,
            UNIT.format(
                dependency=dependency,
                root=ROOT,
                python=sys.executable,
                program=program,
                whose="user" if user else "system",
                answers=self.answers,
            ),
        )
        self._install(OTHER, OTHER_UNIT)
        self.systemctl("daemon-reload")
        self.systemctl("start", *([OTHER] if dependency else []), NAME)

    def _install(self, name: str, text: str) -> None:
        self._units.mkdir(parents=True, exist_ok=True)
        (self._units / name).write_text(textwrap.dedent(text))

    def systemctl(self, *words: str) -> str:
        command = ["systemctl", *words]
        if self._user:
            variables = [f"XDG_RUNTIME_DIR={self._user.runtime_dir}"]
            switch = ["setpriv", f"--reuid={self._user.uid}", "--clear-groups", "env", *variables]
            command = [*switch, "systemctl", "--user", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOWNESS)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def kill(self, *command: str) -> None:
        """Have it killed by a command that does not wait for its end, and wait for that."""
        pid = int(self.systemctl("show", "-P", "MainPID", NAME))
        process = os.pidfd_open(pid)
        try:
            subprocess.run([word.format(pid=pid) for word in command], check=True)
            assert select.select([process], [], [], 20 * SLOWNESS)[0], "it does not end"
        finally:
            os.close(process)

    def reasons(self) -> list[str]:
        """What the service has said so far, each in time."""
        lines = [line.split() for line in self.answers.read_text().splitlines()]
        assert all(float(seconds) < 2.5 * SLOWNESS for _, seconds in lines)
        return [reason for reason, _ in lines]

    def remove(self) -> None:
        self.systemctl("stop", NAME, OTHER)
        for name in (NAME, OTHER):
            (self._units / name).unlink()
        self.systemctl("daemon-reload")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.remove()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("restart", NAME), "restart"),
        (("try-restart", NAME), "restart"),
        (("reload-or-restart", NAME), "restart"),
        (("stop", NAME), "stop"),
    ],
)
def test_orders_to_the_service_manager(
    service: Service, words: tuple[str, ...], reason: str
) -> None:
    service.systemctl(*words)
    assert service.reasons() == [reason]


def test_another_target_is_isolated(service: Service) -> None:
    service.kill("systemctl", "isolate", "default.target")
    assert service.reasons() == ["stop"]


@pytest.mark.parametrize(
    "command",
    [
        ("kill", "{pid}"),
        ("systemctl", "kill", "--kill-whom=main", NAME),
    ],
)
def test_signals(service: Service, command: tuple[str, ...]) -> None:
    service.kill(*command)
    assert service.reasons() == ["signal"]


@pytest.mark.parametrize(
    ("dependency", "verb", "reason"),
    [
        ("PartOf", "restart", "restart"),
        ("PartOf", "stop", "stop"),
        ("BindsTo", "stop", "stop"),
        ("Requires", "restart", "restart"),
    ],
)
def test_what_comes_from_another_unit(
    tmp_path: Path, dependency: str, verb: str, reason: str
) -> None:
    service = Service(tmp_path, dependency=f"{dependency}={OTHER}\nAfter={OTHER}")
    service.systemctl(verb, OTHER)
    assert service.reasons() == [reason]
    service.remove()


def test_the_bus_restarts_at_the_same_moment(service: Service) -> None:
    """As when one upgrade brings both."""
    subprocess.run(["systemctl", "kill", "--signal=KILL", "dbus.service"], check=True)
    service.systemctl("restart", NAME)
    assert service.reasons() == ["restart"]


def test_in_a_users_manager_that_ends() -> None:
    with lingering_user("own") as user:
        folder = user.home / "own"
        folder.mkdir()
        shutil.chown(folder, user.uid)
        service = Service(folder, user)
        service.systemctl("restart", NAME)
        service.systemctl("stop", NAME)
        service.systemctl("start", NAME)
        service.kill("kill", "{pid}")
        service.systemctl("start", NAME)
        subprocess.run(["systemctl", "stop", user.manager], check=True)
        assert service.reasons() == ["restart", "stop", "signal", "shutdown"]
