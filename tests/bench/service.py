"""ffmpeg-worker.service under measurement, and the ffmpeg stand-ins it can be given."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests import accounts
from tests.fakes.master import FakeMaster

ROOT = Path(__file__).parents[2]
UNITS = Path("/run/systemd/system")
SERVICE = "ffmpeg-worker.service"
PROGRAM = ROOT / ".venv/bin/ffmpeg-worker"
PYTHON = ROOT / ".venv/bin/python"
METRICS_PORT = 19092
BARE_IMPORTS = "import dbus_next, httpx, pydantic, prometheus_client, pyudev"
_CONFIG = Path("/run/ffmpeg-worker-bench.env")
_FILES = "/tmp /var/tmp"
"""Where benchmarks keep theirs."""
_DROP_IN = UNITS / f"{SERVICE}.d" / "bench.conf"
# The project is read-only here: without it, every start would compile all modules again. The path
# is set where this benchmark itself runs with another D-Bus library.
CACHE = {
    "PYTHONPYCACHEPREFIX": "/tmp/ffmpeg-worker-bench-cache",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
}


def sh(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def install() -> None:
    """The slices and the service as shipped, but for where program and configuration lie."""
    accounts.ensure()
    UNITS.mkdir(parents=True, exist_ok=True)
    for unit in (ROOT / "units").glob("*.slice"):
        shutil.copy(unit, UNITS)
    text = (ROOT / "units" / SERVICE).read_text()
    text = text.replace("/usr/local/bin/ffmpeg-worker", str(PROGRAM))
    text = text.replace("/etc/ffmpeg-worker/config.env", str(_CONFIG))
    (UNITS / SERVICE).write_text(text)
    sh("systemctl", "daemon-reload")
    # Now, as what compiles a module keeps five megabytes more than what only imports it. (pip
    # compiles what it installs.) Some modules are imported late, so the service has to run.
    words: list[str | Path] = [PYTHON, "-W", "ignore", "-c", BARE_IMPORTS]
    subprocess.run(words, env=os.environ | CACHE, cwd="/", check=True)
    with FakeMaster() as master, Service(master):
        master.wait_for_request("GET /jobs/next", 1)


class Service:
    """Runs while the context is entered, registered with ``master``.

    ``programs`` is a folder to look for ffmpeg and ffprobe in before all others, ``command``
    what to execute instead of the program, ``environment`` more variables than are given to all.
    The other arguments are configuration keys.
    """

    def __init__(
        self,
        master: FakeMaster,
        *,
        programs: Path | None = None,
        command: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
        **config: object,
    ) -> None:
        self._master = master
        settings = {
            "MASTER_URL": master.url,
            "NODE_NAME": "bench",
            "METRICS_PORT": METRICS_PORT,
            "METRICS_ADDR": "127.0.0.1",
            "STOP_GRACE": "0s",
            "INPUT_DIRS": _FILES.replace(" ", ":"),
            "OUTPUT_DIRS": _FILES.replace(" ", ":"),
            "OUTPUT_OWNER": "root",
            **config,
        }
        self._config = "".join(f"{key}={value}\n" for key, value in settings.items())
        path = os.environ["PATH"]
        path = f"{programs}:{path}" if programs else path
        variables = {"PATH": path, **CACHE, **environment}
        lines = [f"Environment={key}={value}" for key, value in variables.items()]
        lines.append(f"ReadWritePaths={_FILES}")
        if command:
            lines += ["ExecStart=", f"ExecStart={command}"]
        self._drop_in = "\n".join(["[Service]", "Restart=no", *lines, ""])
        self.pid = 0

    def __enter__(self) -> Service:
        _CONFIG.write_text(self._config)
        _DROP_IN.parent.mkdir(exist_ok=True)
        _DROP_IN.write_text(self._drop_in)
        sh("systemctl", "daemon-reload")
        sh("systemctl", "start", SERVICE)
        self.pid = int(sh("systemctl", "show", SERVICE, "-p", "MainPID", "--value"))
        try:
            self._master.wait_for(lambda: bool(self._master.store.nodes), 60, "registration")
        except BaseException:
            print(sh("journalctl", "--no-pager", "-n", "30", "-o", "cat", "-u", SERVICE))
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc_info: object) -> None:
        sh("systemctl", "stop", SERVICE)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the process with all its threads, to the nanosecond."""
        return cpu_seconds(self.pid)

    def scrape(self) -> float:
        """Seconds that GET /metrics took."""
        connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=10)
        begun = time.perf_counter()
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        answer.read()
        seconds = time.perf_counter() - begun
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"/metrics answered {answer.status}")
        return seconds


def cpu_seconds(pid: int) -> float:
    # The id of another process's CPU clock, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime((~pid << 3) | 2)


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident and proportional set size, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return _kb("VmRSS", status) / 1024, _kb("Pss", rollup) / 1024


def _kb(name: str, text: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no {name} in:\n{text}")
    return int(found[1])


def make_media(path: Path, *, seconds: float, size: str = "160x120", rate: int = 10) -> Path:
    """A test video."""
    source = f"testsrc2=size={size}:rate={rate}:duration={seconds}"
    sh("ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", source, "-preset", "ultrafast",
       "-pix_fmt", "yuv420p", path)  # fmt: skip
    return path


_STAND_IN = """\
#!/bin/sh
# Not ffmpeg: answers what the agent asks at its start, and then {what}.
case " $* " in
*" -encoders "*) echo " V....D libx264  h264"; exit ;;
*" -hwaccels "*) exit ;;
*" -f null "*) echo frame=1; exit ;;
esac
for last; do :; done
{work}
"""
_PROGRESS = """\
frame={0}\nfps=30.00\nstream_0_0_q=28.0\nbitrate=1000.0kbits/s\ntotal_size={0}000\n\
out_time_us={0}0000\nout_time_ms={0}0000\nout_time=00:00:00.{0:06}\ndup_frames=0\n\
drop_frames=0\nspeed=1.00x\nprogress=continue\n"""


def quick_programs(folder: Path, media: Path) -> Path:
    """An ffmpeg that copies a finished video, and an ffprobe that knows what is in it."""
    from worker.jobs.ffmpeg import probe_command

    answer = _programs_folder(folder) / "answer.json"
    answer.write_text(sh(*probe_command(shutil.which("ffprobe") or "ffprobe", media)))
    work = f'echo progress=end; exec cp {media} "${{last#file:}}"'
    return _programs(folder, "copies a file", work, f"exec cat {answer}")


def endless_programs(folder: Path) -> Path:
    """An ffmpeg that has run for minutes, by its output, and never ends by itself."""
    told = _programs_folder(folder) / "progress.txt"
    told.write_text("".join(map(_PROGRESS.format, range(100))))
    return _programs(folder, "sleeps", f"cat {told}; exec sleep 100000", "exit 1")


def _programs_folder(folder: Path) -> Path:
    """Jobs see what lies in the folder of their programs."""
    path = folder / "programs"
    path.mkdir(exist_ok=True)
    return path


def _programs(folder: Path, what: str, work: str, probe: str) -> Path:
    path = _programs_folder(folder)
    for name, text in (
        ("ffmpeg", _STAND_IN.format(what=what, work=work)),
        ("ffprobe", f"#!/bin/sh\n{probe}\n"),
    ):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    return path
