"""A demo master over HTTP: the protocol as the real one speaks it, bugs and traps included.

In tests::

    with FakeMaster(api_key="secret") as master:
        job = master.submit({"scenario": "720p30-h264"})
        master.fault("POST /results", "lose")
        ...
        master.wait(job["id"], timeout=30)

and as a program, ``python tests/fakes/master.py --port 8080``, which prints its URL when it
is ready. Unlike the real one's, its cancel works.
"""

from __future__ import annotations

import argparse
import fnmatch
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

if __package__ in (None, ""):  # started as a program
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fakes.server import Fault, Kind, Request, Server
from tests.fakes.shapes import Data
from tests.fakes.store import Store
from tests.slowness import SLOWNESS

T = TypeVar("T")

ENDED = ("completed", "failed", "canceled")


class FakeMaster:
    """A master on ``host``; port 0 takes a free one. Runs while the context is entered.

    ``tls`` makes it speak TLS, see :func:`server_context`. ``tick`` is the time in seconds
    between two runs of the scheduler, 0 for never (tests call ``store.tick()``). The other
    arguments go to :class:`tests.fakes.store.Store`.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tick: float = 0.0,
        **rules: Any,
    ) -> None:
        self.api_key = api_key
        self.tls = tls
        self.store = Store(**rules)
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self.released = threading.Event()
        self._faults: list[Fault] = []
        self._stopped = threading.Event()
        self._tick = tick
        self._server = Server((host, port), self)
        self._threads: list[threading.Thread] = []
        self.host = host
        self.port: int = self._server.server_address[1]

    @property
    def url(self) -> str:
        """What a worker has as MASTER_URL."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def results(self) -> list[Data]:
        """All reports that were taken, in order."""
        return self.store.results

    def __enter__(self) -> Self:
        targets: list[Callable[[], object]] = [lambda: self._server.serve_forever(0.02)]
        if self._tick:
            targets.append(self._schedule)
        for target in targets:
            thread = threading.Thread(target=target)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        if self.errors and exc_info[1] is None:
            raise AssertionError("the demo master itself failed") from self.errors[0]

    def close(self) -> None:
        """Stop, and close all connections."""
        self._stopped.set()
        self.released.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def submit(self, request: Data, extra: Mapping[str, Any] | None = None) -> Data:
        """A new job, as POST /jobs makes it. ``extra`` sets any other field of it."""
        return self.store.submit(dict(request), extra)

    def job(self, job_id: str) -> Data:
        """The job as it stands now."""
        with self.store.changed:
            return dict(self.store.jobs[job_id])

    def wait(self, job_id: str, timeout: float = 30.0, status: tuple[str, ...] = ENDED) -> Data:
        """The job, once it is in one of these states. Raises TimeoutError after ``timeout`` s."""
        return self.wait_for(
            lambda: job if (job := self.job(job_id))["status"] in status else None,
            timeout,
            f"job {job_id}: {'/'.join(status)}",
        )

    def wait_for(
        self, what: Callable[[], T | None], timeout: float, name: str = "a condition"
    ) -> T:
        """What ``what()`` returns, once that is true; asked after each change."""
        with self.store.changed:
            value = self.store.changed.wait_for(what, timeout * SLOWNESS)
        if not value:
            raise TimeoutError(f"{name}: not within {timeout:g} s")
        return value

    def wait_for_request(self, route: str, count: int = 1, timeout: float = 30.0) -> list[Request]:
        """The requests to a route (as in ``fault``), once ``count`` of them have come."""

        def enough() -> list[Request] | None:
            seen = self.seen(route)
            return seen if len(seen) >= count else None

        return self.wait_for(enough, timeout, f"{count} x {route}")

    def fault(self, route: str, kind: Kind, **options: Any) -> None:
        """Let a route fail. ``route`` is METHOD and path, ``*`` matches anything in it."""
        with self.store.changed:
            self._faults.append(Fault(route, kind, **options))

    def clear_faults(self) -> None:
        """All is well from now on; requests that hang are let go."""
        with self.store.changed:
            self._faults.clear()
        self.released.set()

    def seen(self, route: str) -> list[Request]:
        """The requests to a route (as in ``fault``), in order."""
        with self.store.changed:
            return [r for r in self.requests if fnmatch.fnmatchcase(f"{r.method} {r.path}", route)]

    def take_fault(self, request: Request) -> Fault | None:
        """Note the request; the fault that is due for it, if one is."""
        with self.store.changed:
            self.requests.append(request)
            self.store.changed.notify_all()
            name = f"{request.method} {request.path}"
            for fault in self._faults:
                if fault.count > 0 and fnmatch.fnmatchcase(name, fault.route):
                    fault.count -= 1
                    return fault
        return None

    def _schedule(self) -> None:
        while not self._stopped.wait(self._tick):
            self.store.tick()


def server_context(
    cert: Path, key: Path | None = None, client_ca: Path | None = None
) -> ssl.SSLContext:
    """TLS as the real master has it; with ``client_ca`` clients must show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="A demo master for ffmpeg-worker.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the API key")
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--client-ca", type=Path, help="demand client certificates of this CA")
    parser.add_argument("--max-retries", type=int, default=3)
    parser.add_argument("--dead-after", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--tick", type=float, default=5.0, metavar="SECONDS")
    options = parser.parse_args()
    key_file: Path | None = options.api_key_file
    tls = None
    if options.tls_cert:
        tls = server_context(options.tls_cert, options.tls_key, options.client_ca)
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before there are threads: they inherit it
    with FakeMaster(
        api_key=key_file.read_text().strip() if key_file else None,
        tls=tls,
        host=options.host,
        port=options.port,
        tick=options.tick,
        max_retries=options.max_retries,
        dead_after=options.dead_after,
    ) as master:
        print(master.url, flush=True)
        signal.sigwait(stop)


if __name__ == "__main__":
    main()
