"""`make demo`: the main job, end to end, on a real systemd, for people to watch.

On a machine that systemd runs, everything happens there: the worker is installed, shown and
removed again. Elsewhere a private systemd is booted in namespaces, and nothing outside changes.
Exit status 0 only if every job ended as it should.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import trustme
from demo_screen import BOLD, PLAIN, Log, cgtop, cut, figure, headline, sh, show, wrapped

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fakes.master import FakeMaster, server_context  # noqa: E402
from tests.fakes.shapes import Data  # noqa: E402

INSTALL = str(ROOT / "scripts/install.sh")
SERVICE = "ffmpeg-worker.service"
CONFIG = Path("/etc/ffmpeg-worker/config.env")
# What the demo makes, and removes when it is over: never what somebody else has made.
OURS = (
    CONFIG.parent,
    Path("/opt/ffmpeg-worker"),
    Path("/var/lib/ffmpeg-worker"),
    Path("/var/log/ffmpeg-worker"),
    Path("/usr/local/bin/ffmpeg-worker"),
    Path("/etc/systemd/system", SERVICE),
    Path("/etc/logrotate.d/ffmpeg-worker"),
    Path("/etc/sysusers.d/ffmpeg-worker.conf"),
    Path("/etc/tmpfiles.d/ffmpeg-worker.conf"),
)
API_KEY = "demo-key"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Showpiece:
    """A job of the demo and how it should end."""

    title: str
    request: Data
    status: str
    reason: str = ""


SHOWPIECES = (
    Showpiece(
        "a transcode under half a core",
        {
            "scenario": "720p30-h264",
            "parameters": {
                "duration": 20,
                "bitrate": "2M",
                "preset": "medium",
                "resource_limits": {"max_cpu_percent": 50, "timeout_sec": 300},
            },
        },
        "completed",
    ),
    Showpiece(
        "a live job, H.265",
        {
            "scenario": "640x360p30-h265",
            "queue": "live",
            "priority": "high",
            "parameters": {"duration": 5, "resource_limits": {"timeout_sec": 120}},
        },
        "completed",
    ),
    Showpiece(
        "a job that needs more memory than it may have",
        {
            "scenario": "1080p30-h264",
            "parameters": {"duration": 5, "resource_limits": {"max_memory_mb": 64}},
        },
        "failed",
        "resource_error",
    ),
    Showpiece(
        "a job that takes longer than it may",
        {
            "scenario": "1080p60-h265",
            "queue": "batch",
            "parameters": {
                "duration": 5,
                "preset": "slow",
                "resource_limits": {"timeout_sec": 3},
            },
        },
        "failed",
        "timeout",
    ),
    Showpiece(
        "a job with a codec nobody knows",
        {"scenario": "720p30-h264", "parameters": {"codec": "betamax"}},
        "failed",
        "user_error",
    ),
    Showpiece(
        "a job whose input is not there",
        {"scenario": "ingest", "parameters": {"input": "/var/lib/ffmpeg-worker/media/missing.mp4"}},
        "failed",
        "input_error",
    ),
)


def main() -> int:
    if os.geteuid() != 0:
        print("demo: run this as root: it installs a service and starts units.", file=sys.stderr)
        return 1
    for number in SIGNALS:
        signal.signal(number, interrupted)
    if "--here" in sys.argv[1:]:
        return watched()
    if not Path("/run/systemd/system").is_dir():
        headline("This machine is not run by systemd: booting one in namespaces")
        bed = [sys.executable, str(ROOT / "tests/bed/bed.py"), "run", "--"]
        os.execv(sys.executable, [*bed, sys.executable, __file__, "--here"])
    for path in OURS:
        if path.exists() or path.is_symlink():
            print(
                f"demo: {path} exists, so a worker is or was installed on this machine, and the "
                "demo would replace and remove it. Run it on another machine.",
                file=sys.stderr,
            )
            return 1
    try:
        return watched()
    finally:
        do_not_disturb()
        headline("Removing the worker: scripts/install.sh --uninstall --purge")
        sh(INSTALL, "--uninstall", "--purge")
        sh("userdel", "ffmpeg-worker")  # with its group; install.sh leaves both to the operator


def watched() -> int:
    try:
        return Demo().run()
    except TimeoutError as error:
        print(f"demo: {error}; the log above may say why.", file=sys.stderr)
        return 1


class Demo:
    def run(self) -> int:
        show("systemctl", "--version", lines=1)
        with tempfile.TemporaryDirectory() as folder:
            authority = trustme.CA()
            ca, certificate = Path(folder, "ca.pem"), Path(folder, "master.pem")
            authority.cert_pem.write_to_path(str(ca))
            authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
                str(certificate)
            )
            tls = server_context(certificate)
            # Without retries, so that each job is seen once.
            with FakeMaster(api_key=API_KEY, tls=tls, tick=5, max_retries=0) as master:
                self.install(master, ca)
                log = Log(SERVICE)
                try:
                    jobs = self.play(master)
                    listing = ("--all", "--plain", "--no-legend", "ffmpeg-job-*")
                    left = sh("systemctl", "list-units", *listing).strip()
                finally:
                    do_not_disturb()
                    headline(f"Stopping {SERVICE}")
                    sh("systemctl", "stop", SERVICE)
                    log.stop()
                return self.conclude(master, jobs, left)

    def install(self, master: FakeMaster, ca: Path) -> None:
        headline("Installing the worker: scripts/install.sh")
        if show(INSTALL, "--wheels", str(ROOT / "build/wheels")):
            raise SystemExit("demo: the worker could not be installed, see above.")
        trusted = CONFIG.parent / "master.crt"
        trusted.write_bytes(ca.read_bytes())
        settings = {
            "MASTER_URL": master.url,
            "MASTER_API_KEY": API_KEY,
            "MAX_CONCURRENT_JOBS": "2",
            "POLL_INTERVAL": "1s",
            "METRICS_PORT": "0",  # the port may be taken on a machine that does other work, too
        }
        lines = [
            line
            for line in CONFIG.read_text().splitlines()
            if line.partition("=")[0] not in settings
        ]
        lines += [f"{key}={value}" for key, value in settings.items()]
        CONFIG.write_text("\n".join([*lines, f"MASTER_CA={trusted}", ""]))

    def play(self, master: FakeMaster) -> list[tuple[Showpiece, Data]]:
        headline(f"Starting {SERVICE}; it registers with the demo master over TLS")
        if show("systemctl", "start", SERVICE):
            raise SystemExit("demo: the service did not start, see above.")
        node = master.wait_for(
            lambda: next(iter(master.store.nodes.values()), None), 60, "no worker has registered"
        )
        time.sleep(1.5)  # the status line is up to date within a second
        show("systemctl", "status", "--no-pager", "--lines=0", SERVICE)
        print("\nThe master's record of it:")
        for key in ("name", "type", "cpu_model", "cpu_threads", "has_gpu", "status", "labels"):
            value = node.get(key, "-")
            pairs = value.items() if isinstance(value, dict) else [(key, value)]
            for name, text in pairs:
                print(cut(f"  {name:16} {text}"))

        first, *others = SHOWPIECES
        headline(f"Job demo-1: {first.title}")
        jobs = [(first, submit(master, 1, first))]
        wait_until_active("ffmpeg-job-demo-1.service")
        show("systemctl", "status", "--no-pager", "--lines=3", "ffmpeg-job-*")
        headline("systemd-analyze security: what its sandbox leaves open, of 10")
        for unit in ("ffmpeg-job-demo-1.service", SERVICE):
            print(cut(sh("systemd-analyze", "security", "--no-pager", unit).splitlines()[-1]))
        headline("systemd-cgtop, while it runs")
        cgtop()
        headline("Five more jobs: demo-2 to demo-6")
        jobs += [(piece, submit(master, number, piece)) for number, piece in enumerate(others, 2)]
        for _, job in jobs:
            master.wait(job["id"], timeout=300)
        return jobs

    def conclude(self, master: FakeMaster, jobs: list[tuple[Showpiece, Data]], left: str) -> int:
        headline("What became of them")
        print(
            f"{'job':7} {'what it is':46} {'status':10} {'reason':14} "
            f"{'CPU':>7} {'memory':>7} {'wall':>7}"
        )
        wrong = 0
        for piece, job in jobs:
            result = next((r for r in master.results if r["job_id"] == job["id"]), {})
            status = result.get("status", "unreported")
            metrics = result.get("metrics", {})
            reason = metrics.get("failure_reason", "")
            good = (status, reason) == (piece.status, piece.reason)
            wrong += not good
            print(
                f"{job['id']:7} {piece.title:46} {status:10} {reason:14} "
                f"{figure(metrics.get('cpu_seconds'), 1, 's', 1)} "
                f"{figure(metrics.get('memory_peak_bytes'), 2**20, 'MB', 0)} "
                f"{figure(metrics.get('processing_time_seconds'), 1, 's', 1)}"
            )
            if not good:
                print(f"        ^ should have been: {piece.status} {piece.reason}".rstrip())
        print()
        for _, job in jobs:
            if error := master.job(job["id"]).get("error"):
                print(wrapped(f"{job['id']}: {error}"))
        if left:
            wrong += 1
            print(f"\nUnits that should be gone:\n{left}")
        print(f"\n{BOLD}{'All as it should be.' if not wrong else f'{wrong} wrong.'}{PLAIN}")
        return 1 if wrong else 0


def interrupted(number: int, _frame: FrameType | None) -> None:
    """End by the way of all the cleaning up."""
    raise SystemExit(128 + number)


def do_not_disturb() -> None:
    """What follows is the cleaning up, which nobody should break off."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def submit(master: FakeMaster, number: int, piece: Showpiece) -> Data:
    """Under an id that is easy on the eye; a real master makes longer ones."""
    return master.submit(piece.request, {"id": f"demo-{number}"})


def wait_until_active(unit: str) -> None:
    deadline = time.monotonic() + 60
    while sh("systemctl", "is-active", unit).strip() != "active":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{unit} did not start within a minute")
        time.sleep(0.1)
    time.sleep(2)  # let it encode a little, so that there is something to see


if __name__ == "__main__":
    sys.exit(main())
