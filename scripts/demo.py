"""`make demo`: the main job, end to end, on a real systemd, for people to watch.

On a machine that systemd runs, everything happens there: the worker is installed, shown and
removed again. Elsewhere a private systemd is booted in namespaces, and nothing outside changes.
Exit status 0 only if every job ended as it should.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import trustme

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fakes.master import FakeMaster, server_context  # noqa: E402
from tests.fakes.shapes import Data  # noqa: E402

CONFIG = Path("/etc/ffmpeg-worker/config.env")
API_KEY = "demo-key"
BOLD, PLAIN = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")


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
                "duration": 10,
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
        {"scenario": "ingest", "parameters": {"input": "/srv/media/missing.mp4"}},
        "failed",
        "input_error",
    ),
)


def main() -> int:
    if os.geteuid() != 0:
        print("demo: run this as root: it installs a service and starts units.", file=sys.stderr)
        return 1
    if "--here" in sys.argv[1:]:
        return Demo().run()
    if Path("/run/systemd/system").is_dir():
        if CONFIG.exists():
            print(
                f"demo: {CONFIG} exists, so a worker is installed on this machine already; "
                "the demo would change it. Run it on another machine.",
                file=sys.stderr,
            )
            return 1
        try:
            return Demo().run()
        finally:
            sh(str(ROOT / "scripts/install.sh"), "--uninstall", "--purge")
    headline("This machine is not run by systemd: booting one in namespaces")
    bed = [sys.executable, str(ROOT / "tests/bed/bed.py"), "run", "--"]
    return subprocess.run([*bed, sys.executable, __file__, "--here"], check=False).returncode


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
                log = Log()
                try:
                    return self.play(master)
                finally:
                    sh("systemctl", "stop", "ffmpeg-worker.service")
                    log.stop()

    def install(self, master: FakeMaster, ca: Path) -> None:
        headline("Installing the worker: scripts/install.sh")
        show(str(ROOT / "scripts/install.sh"), "--wheels", str(ROOT / "build/wheels"))
        trusted = CONFIG.parent / "master.crt"
        trusted.write_bytes(ca.read_bytes())
        settings = {
            "MASTER_URL": master.url,
            "MASTER_API_KEY": API_KEY,
            "MAX_CONCURRENT_JOBS": "2",
            "POLL_INTERVAL": "1s",
        }
        lines = [
            line
            for line in CONFIG.read_text().splitlines()
            if line.partition("=")[0] not in settings
        ]
        lines += [f"{key}={value}" for key, value in settings.items()]
        CONFIG.write_text("\n".join([*lines, f"MASTER_CA={trusted}", ""]))

    def play(self, master: FakeMaster) -> int:
        headline("Starting ffmpeg-worker.service; it registers with the demo master over TLS")
        sh("systemctl", "start", "ffmpeg-worker.service")
        node = master.wait_for(lambda: next(iter(master.store.nodes.values()), None), 60, "a node")
        time.sleep(1.5)  # the status line is up to date within a second
        show("systemctl", "status", "--no-pager", "--lines=0", "ffmpeg-worker.service")
        print(f"\nThe master's record of it: {describe(node)}\n")

        first, *others = SHOWPIECES
        headline(f"Job 1: {first.title}")
        jobs = [(first, master.submit(first.request))]
        unit = f"ffmpeg-job-{jobs[0][1]['id']}.service"
        wait_until_active(unit)
        show("systemctl", "status", "--no-pager", "--lines=3", "ffmpeg-job-*")
        headline("systemd-cgtop, while it runs")
        cgtop()
        headline("Five more jobs")
        jobs += [(piece, master.submit(piece.request)) for piece in others]
        for _, job in jobs:
            master.wait(job["id"], timeout=300)
        return self.conclude(master, jobs)

    def conclude(self, master: FakeMaster, jobs: list[tuple[Showpiece, Data]]) -> int:
        time.sleep(0.5)  # for the log to be read to its end: this is a show
        headline("What became of them")
        print(f"{'job':46} {'status':10} {'reason':15} {'CPU':>7} {'memory':>8} {'wall':>7}")
        wrong = 0
        for piece, job in jobs:
            result = next(r for r in master.results if r["job_id"] == job["id"])
            metrics = result.get("metrics", {})
            reason = metrics.get("failure_reason", "")
            good = (result["status"], reason) == (piece.status, piece.reason)
            wrong += not good
            print(
                f"{piece.title:46} {result['status']:10} {reason:15} "
                f"{figure(metrics.get('cpu_seconds'), 1, ' s')} "
                f"{figure(metrics.get('memory_peak_bytes'), 2**20, ' MB', 0)} "
                f"{figure(metrics.get('processing_time_seconds'), 1, ' s')}"
                + ("" if good else f"   should have been {piece.status} {piece.reason}")
            )
        print()
        for _, job in jobs:
            if error := master.job(job["id"]).get("error"):
                print(f"  {error}")
        left = sh("systemctl", "list-units", "--all", "--plain", "--no-legend", "ffmpeg-job-*")
        if left.strip():
            wrong += 1
            print(f"\nUnits that should be gone:\n{left}")
        print(f"\n{BOLD}{'All as it should be.' if not wrong else f'{wrong} wrong.'}{PLAIN}")
        return 1 if wrong else 0


class Log:
    """The worker's journal, printed as it comes."""

    def __init__(self) -> None:
        self._journal = subprocess.Popen(
            ["journalctl", "--follow", "--lines=0", "--output=cat", "--unit=ffmpeg-worker.service"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._print)
        self._thread.start()

    def _print(self) -> None:
        assert self._journal.stdout is not None
        for line in self._journal.stdout:
            print(f"  | {line}", end="", flush=True)

    def stop(self) -> None:
        self._journal.terminate()
        self._journal.wait()
        self._thread.join()


def describe(node: Data) -> str:
    keys = ("name", "type", "cpu_threads", "cpu_model", "has_gpu", "status", "labels")
    return ", ".join(f"{key} {node[key]}" for key in keys if key in node)


def wait_until_active(unit: str) -> None:
    deadline = time.monotonic() + 60
    while sh("systemctl", "is-active", unit).strip() != "active":
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: {unit} did not start within a minute")
        time.sleep(0.1)
    time.sleep(2)  # let it encode a little, so that there is something to see


def cgtop() -> None:
    """The second picture: the first one has no rates yet."""
    text = sh(
        "systemd-cgtop", "--batch", "--iterations=2", "--delay=2", "--depth=4", "ffmpeg.slice"
    )
    pictures = [part for part in text.split("\n\n") if part.strip()]
    rows = [line.split() for line in pictures[-1].splitlines()] if pictures else []
    if not rows:
        print(text)
        return
    width = max(len(row[0]) for row in rows)
    for group, *figures in [
        ["Control Group", "Tasks", "%CPU", "Memory", "Input/s", "Output/s"],
        *rows,
    ]:
        print(f"{group:{width}}", *(f"{value:>8}" for value in figures))
    if all(row[2] == "-" for row in rows):
        print("(No %CPU: this kernel has cpu and cpuacct apart, where cgtop finds no figures.)")


def figure(value: float | None, unit: float, suffix: str, digits: int = 2) -> str:
    text = "-" if value is None else f"{value / unit:.{digits}f}{suffix}"
    return text.rjust(8 if unit > 1 else 7)


def headline(text: str) -> None:
    print(f"\n{BOLD}== {text}{PLAIN}", flush=True)


def show(*argv: str, lines: int | None = None) -> None:
    """Run a command, and print it and what it says."""
    print(f"$ {' '.join(shorten(argv))}")
    text = sh(*argv).rstrip()
    print("\n".join(text.splitlines()[:lines]), flush=True)


def shorten(argv: Iterable[str]) -> list[str]:
    return [word.removeprefix(f"{ROOT}/") for word in argv]


def sh(*argv: str) -> str:
    """What a command prints, of both streams."""
    environment = os.environ | {"SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": "", "COLUMNS": "120"}
    return subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    ).stdout


if __name__ == "__main__":
    sys.exit(main())
