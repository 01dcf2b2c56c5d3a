"""Secrets, each marked, and where they are found while jobs run and afterwards.

Searched is what any local user can read, and what the worker writes or serves. What a command line
has to have (input URLs with their tokens, user and password of an RTMP server) is said below.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, Target, histories
from tests.attack.servers import Server
from tests.e2e.conftest import CONFIG, SERVICE, UNITS, WORK_DIR, parameters, running, sh, until
from tests.e2e.conftest import PROGRAM as WORKER
from tests.e2e.rtmp import RtmpServer
from tests.slowness import SLOWNESS

SECRETS = {
    "API key": "SECRETapikey0123456789",
    "stream key": "SECRETstreamkey",
    "stream key in a URL": "SECRETurlkey",
    "token of a stream": "SECRETstreamtoken",
    "RTMP password": "SECRETpassword",
    "token of an input": "SECRETinputtoken",
    "password of an input": "SECRETinputpassword",
}
ON_THE_COMMAND_LINE = {"RTMP password", "token of an input", "password of an input"}
"""Local users see these while the job runs: in the list of processes, and in the unit itself."""
USER = "12345"
LOG = Path("/var/log/ffmpeg-worker/worker.log")
CREDENTIAL = Path("/etc/ffmpeg-worker/master-api-key")

# Run as a user who is nobody in particular: what can be read of processes, and of what.
SCANNER = """
import os, pathlib, subprocess, sys
for entry in os.listdir("/proc"):
    if entry.isdigit():
        for name in ("cmdline", "environ", "comm", "status", "mountinfo", "cgroup", "maps"):
            try:
                sys.stdout.buffer.write(pathlib.Path("/proc", entry, name).read_bytes() + b"\\n")
            except OSError:
                pass
units = subprocess.run(["systemctl", "list-units", "--all", "--plain", "--no-legend", "ffmpeg*"],
                       capture_output=True, text=True).stdout
for unit in [line.split()[0] for line in units.splitlines()]:
    for command in (["systemctl", "show", "--all", unit], ["systemctl", "cat", unit],
                    ["systemctl", "status", "--full", "--lines=1000", unit]):
        sys.stdout.buffer.write(subprocess.run(command, capture_output=True).stdout)
for top in ("/run", "/var/lib/ffmpeg-worker", "/var/log", "/etc", "/tmp"):
    for folder, _, files in os.walk(top):
        for name in files:
            path = pathlib.Path(folder, name)
            try:
                if path.is_file() and path.stat().st_size < 10_000_000:
                    sys.stdout.buffer.write(bytes(path) + b"\\n" + path.read_bytes())
            except OSError:
                pass
"""


def seen_by_a_user() -> str:
    """All that a local user without any rights can read that has to do with the worker."""
    command = ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "--inh-caps=-all"]
    done = subprocess.run(
        [*command, "/usr/bin/python3", "-c", SCANNER], capture_output=True, cwd="/", timeout=60
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(errors="replace")
    assert "ffmpeg-worker" in text, "it does see something"
    return text


def found(text: str) -> set[str]:
    return {name for name, secret in SECRETS.items() if secret in text}


@pytest.fixture(scope="module")
def guarded(standing: Target) -> Iterator[Target]:
    """With the API key where it is best kept."""
    CREDENTIAL.parent.mkdir(exist_ok=True)
    CREDENTIAL.write_text(SECRETS["API key"] + "\n")
    CREDENTIAL.chmod(0o600)
    standing.master.api_key = SECRETS["API key"]
    # As systemd has them on a machine: what it mounts for a service, the service sees.
    sh("mount", "--make-rshared", "/")
    try:
        with standing.configured():
            yield standing
            CREDENTIAL.unlink()
            standing.master.api_key = None
    finally:
        sh("mount", "--make-rprivate", "/")


def jobs(server: RtmpServer, http: Server) -> dict[str, dict[str, Any]]:
    limits = {"resource_limits": {"timeout_sec": 60}}
    live = {"output_mode": "rtmp", "duration": 4 * SLOWNESS, **limits}
    url = f"127.0.0.1:{server.port}/live"
    key, password = SECRETS["stream key in a URL"], SECRETS["RTMP password"]
    page = f"127.0.0.1:{http.port}/hang?token={SECRETS['token of an input']}"
    return {
        "a key": parameters(**live, rtmp_url=f"rtmp://{url}", stream_key=SECRETS["stream key"]),
        "a URL": parameters(
            **live,
            rtmp_url=f"rtmp://user:{password}@{url}/{key}?t={SECRETS['token of a stream']}",
        ),
        "an input": parameters(
            **limits, input=f"http://user:{SECRETS['password of an input']}@{page}"
        ),
    }


@pytest.fixture(scope="module")
def told(guarded: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Jobs with secrets, completed and failed ones; what is seen of them meanwhile."""
    target = guarded
    seen: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("rtmp")
    with RtmpServer(folder) as server, Server() as http:
        for name, job in jobs(server, http).items():
            http.hold.clear()
            job_id = target.master.submit(job)["id"]
            unit = running(job_id)
            if name == "an input":
                until(lambda: http.seen, name="the input is not asked for")
            seen[name] = seen_by_a_user()
            properties = sh("busctl", "--json=short", "call", "org.freedesktop.systemd1",
                            f"/org/freedesktop/systemd1/unit/{bus_name(unit)}",
                            "org.freedesktop.DBus.Properties", "GetAll", "s", "")  # fmt: skip
            seen[f"properties of {name}"] = properties
            sh("systemctl", "is-active", unit)  # else that was not what is seen while it runs
            http.hold.set()
            target.master.wait(job_id, 60)
        refused = target.master.submit(
            parameters(
                output_mode="rtmp", rtmp_url=f"rtmp://127.0.0.1:1/live/{SECRETS['stream key']}"
            )
        )
        target.master.wait(refused["id"], 60)
        for field in ("rtmp_url", "input", "stream_key", "output"):  # each of them an error
            wrong = parameters(output_mode="rtmp" if "r" in field[:2] else "file")
            wrong["parameters"][field] = "rtmp://user:{RTMP password}@h/live/{stream key}\n".format(
                **SECRETS
            )
            target.master.wait(target.master.submit(wrong)["id"], 60)
    target.take_note()
    return seen


def bus_name(unit: str) -> str:
    return "".join(char if char.isalnum() else f"_{ord(char):02x}" for char in unit)


def test_what_local_users_see_while_jobs_run(told: dict[str, Any]) -> None:
    assert found(told["a key"]) == set()
    assert found(told["properties of a key"]) == set()
    assert found(told["a URL"]) == {"RTMP password"}
    assert found(told["properties of a URL"]) == {"RTMP password"}
    inputs = {"token of an input", "password of an input"}
    assert found(told["an input"]) == found(told["properties of an input"]) == inputs
    assert found("".join(told.values())) == ON_THE_COMMAND_LINE


def test_what_is_left_when_jobs_are_over(guarded: Target, told: dict[str, Any]) -> None:
    results = guarded.master.results
    assert {result["status"] for result in results} == {"completed", "failed"}
    assert found(json.dumps(results)) == set()
    assert found(LOG.read_text()) == set()
    for path in ("/metrics", "/ready", "/health", f"/{SECRETS['API key']}"):
        assert found(guarded.worker.get(path)[1]) == set(), path
    assert found(seen_by_a_user()) == set()
    sh("journalctl", "--sync")
    everything = subprocess.run(
        ["journalctl", "-b", "-o", "export", "--all"], capture_output=True, check=True
    ).stdout.decode(errors="replace")
    # journald notes the command line of whoever writes, as it is.
    of_its_own = [line for line in everything.splitlines() if not line.startswith("_CMDLINE=")]
    assert found("\n".join(of_its_own)) == set()
    lines = "\n".join(line for line in everything.splitlines() if line.startswith("_CMDLINE="))
    assert found(lines) <= ON_THE_COMMAND_LINE
    guarded.unharmed()


def test_the_history_shows_no_secrets(guarded: Target, told: dict[str, Any]) -> None:
    """The ledger has them, for a job must be begun again; what is printed of it has not."""
    command = (str(WORKER), "history", "--config", str(CONFIG))
    assert found(sh(*command)) == set()
    assert found(sh(*command, "--json")) == set()
    assert found(histories(result["job_id"] for result in guarded.master.results)) == set()


def test_who_may_read_what(guarded: Target, told: dict[str, Any]) -> None:
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm", "control.sock", "jobs"):
        path = WORK_DIR / name
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (0, 0), name
        assert status.st_mode & 0o077 == 0, f"{name} {status.st_mode:o}"
    assert WORK_DIR.stat().st_mode & 0o777 == 0o711
    assert LOG.stat().st_mode & 0o007 == 0
    agent = guarded.worker.show("MainPID")
    given = Path("/run/credentials", SERVICE)
    assert found((given / "master-api-key").read_text()) == {"API key"}
    assert given.stat().st_mode & 0o077 == 0
    assert found(Path(f"/proc/{agent}/environ").read_text()) == set()
    assert found(Path(f"/proc/{agent}/cmdline").read_text()) == set()
    guarded.unharmed()


# --- where the key comes from


def start(target: Target, **config: str) -> str:
    """The service with that configuration; the log of its start."""
    target.worker.stop()
    settings = {"MASTER_URL": target.master.url, "METRICS_PORT": "0", **config}
    CONFIG.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    target.worker.cursor()
    sh("systemctl", "start", SERVICE, check=False)
    return target.worker.log()


@pytest.fixture
def keyed(standing: Target) -> Iterator[Target]:
    """With a master that wants a key; the worker is as the test before has left it."""
    standing.master.api_key = SECRETS["API key"]
    yield standing
    standing.master.api_key = None
    sh("systemctl", "reset-failed", SERVICE, check=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api.key"
    path.write_text(SECRETS["API key"] + "\n")
    path.chmod(0o600)
    return path


def test_the_key_in_a_file_of_its_own(keyed: Target, key_file: Path) -> None:
    beats = len(keyed.master.seen("POST /nodes/*/heartbeat"))
    log = start(keyed, MASTER_API_KEY_FILE=str(key_file))
    keyed.master.wait_for_request("POST /nodes/*/heartbeat", beats + 1)
    assert found(log + keyed.worker.log()) == set()
    agent = keyed.worker.show("MainPID")
    assert found(Path(f"/proc/{agent}/environ").read_text()) == set()
    assert found(seen_by_a_user()) == set()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_file_that_others_can_read_is_refused(
    keyed: Target, key_file: Path, mode: int
) -> None:
    key_file.chmod(mode)
    start(keyed, MASTER_API_KEY_FILE=str(key_file))
    until(lambda: keyed.worker.show("ActiveState") == "failed")
    log = keyed.worker.log()
    assert "must be for its owner alone: chmod 600 it" in log
    assert keyed.worker.show("ExecMainStatus") == "2", "it does not try again"
    assert found(log) == set()


def test_the_key_of_somebody_else_is_refused(keyed: Target, key_file: Path) -> None:
    os.chown(key_file, int(USER), int(USER))
    start(keyed, MASTER_API_KEY_FILE=str(key_file))
    until(lambda: keyed.worker.show("ActiveState") == "failed")
    assert "must be owned by root" in keyed.worker.log()


def test_the_key_as_a_flag_works_and_is_warned_of(keyed: Target) -> None:
    folder = UNITS / f"{SERVICE}.d"
    folder.mkdir()
    drop_in = folder / "key.conf"
    drop_in.write_text(
        f"[Service]\nExecStart=\nExecStart={WORKER} --api-key={SECRETS['API key']}\n"
    )
    try:
        sh("systemctl", "daemon-reload")
        beats = len(keyed.master.seen("POST /nodes/*/heartbeat"))
        start(keyed)
        keyed.master.wait_for_request("POST /nodes/*/heartbeat", beats + 1)
        log = keyed.worker.log()
        assert "every local user can see the key in the list of processes" in log
        assert found(log) == set()
        assert found(seen_by_a_user()) == {"API key"}, "so the warning is right"
    finally:
        drop_in.unlink()
        folder.rmdir()
        sh("systemctl", "daemon-reload")


def test_a_key_in_the_environment_stays_there(keyed: Target) -> None:
    beats = len(keyed.master.seen("POST /nodes/*/heartbeat"))
    log = start(keyed, MASTER_API_KEY=SECRETS["API key"])
    CONFIG.chmod(0o600)
    keyed.master.wait_for_request("POST /nodes/*/heartbeat", beats + 1)
    assert found(log) == set()
    assert found(seen_by_a_user()) == set()
    job_id = keyed.master.submit(parameters(input=f"{MEDIA}/in.mp4"))["id"]
    keyed.master.wait(job_id)
    assert found(json.dumps(keyed.master.results)) == set()
