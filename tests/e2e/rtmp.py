"""A real RTMP server (nginx with its RTMP module), and a viewer who counts the pictures."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.slowness import SLOWNESS

# scripts/setup.sh unpacks the packages there, where the machine does not have them installed.
UNPACKED = Path(__file__).parents[2] / "build/nginx"
PREFIX = UNPACKED if UNPACKED.is_dir() else Path("/")
NGINX = PREFIX / "usr/sbin/nginx"
MODULE = PREFIX / "usr/lib/nginx/modules/ngx_rtmp_module.so"
CONFIG = """\
load_module {module};
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 64; }}
rtmp {{
    access_log off;
    server {{
        listen 127.0.0.1:{port};
        application live {{
            live on;
            record all;
            record_path {folder};
            record_suffix .recorded.flv;
        }}
        application closed {{
            live on;
            deny publish all;
        }}
    }}
}}
"""


class RtmpServer:
    """nginx in ``folder`` on a port of the loopback, while the context is entered.

    ``live`` takes every stream and records it; ``closed`` takes none; there is nothing else.
    """

    def __init__(self, folder: Path, port: int = 1935) -> None:
        self.port = port
        self._folder = folder
        self._nginx: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if not MODULE.exists():
            pytest.fail(f"{MODULE} is missing: run `make setup`")
        config = self._folder / "nginx.conf"
        config.write_text(CONFIG.format(module=MODULE, folder=self._folder, port=self.port))
        command = (str(NGINX), "-p", str(self._folder), "-e", "stderr", "-c", str(config))
        self._nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10 * SLOWNESS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except ConnectionRefusedError:
                assert self._nginx.poll() is None, "nginx has ended"
                assert time.monotonic() < deadline, "nginx does not listen"
                time.sleep(0.02)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does; may be repeated."""
        assert self._nginx is not None
        self._nginx.kill()
        self._nginx.wait()

    def url(self, name: str, application: str = "live") -> str:
        return f"rtmp://127.0.0.1:{self.port}/{application}/{name}"

    def recorded(self, name: str) -> Path:
        """All that came in of a stream."""
        return self._folder / f"{name}.recorded.flv"


class Viewer:
    """Joins a stream (before or after it begins), and plays ``frames`` pictures of it."""

    def __init__(self, url: str, frames: int) -> None:
        self._ffmpeg = subprocess.Popen(
            [
                *("ffmpeg", "-nostdin", "-v", "error", "-rw_timeout", f"{20 * SLOWNESS:.0f}000000"),
                # By default it gathers five seconds of a stream before it shows anything.
                *("-analyzeduration", "500000", "-i", url),
                *("-map", "0:v", "-frames:v", str(frames), "-f", "framemd5", "-"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def played(self) -> int:
        """How many different pictures were seen, when all have been, or no more come."""
        text, _ = self._ffmpeg.communicate(timeout=30 * SLOWNESS)
        assert self._ffmpeg.returncode == 0
        sums = {line.split(",")[-1] for line in text.splitlines() if not line.startswith("#")}
        return len(sums)

    def close(self) -> None:
        self._ffmpeg.kill()
        self._ffmpeg.communicate()
