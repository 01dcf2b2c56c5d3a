"""A master that is hostile, or broken: it can waste its own jobs, and nothing else.

Each case is one answer, or a stream of them, in the place of a good one. Meanwhile heartbeats go
on, memory stays small, and when the master behaves again jobs are run.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.attack.conftest import MEDIA, Target
from tests.e2e.conftest import job_units, parameters, until
from tests.slowness import SLOWNESS

KEY = "key-of-the-master-0123456789"
MOST_MB = 150
GROWTH_MB = 20
MANY = 1500
CHUNK = b"x" * 65536

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Passes requests on to the demo master, but for those with an answer of their own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Front

    def do_GET(self) -> None:
        front = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = f"{self.command} {self.path.partition('?')[0]}"
        front.seen.append((time.monotonic(), route, dict(self.headers)))
        for part, answer in front.answers.items():
            if part in route:
                answer(self)
                return
        connection = http.client.HTTPConnection("127.0.0.1", front.behind)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, {"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            data = response.read()
        self.reply(data, response.status)

    do_POST = do_GET  # noqa: N815

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def endless(self, chunk: bytes, head: bytes = b"", pause: float = 0, **headers: str) -> None:
        """Until nobody listens any more."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.close_connection = True
        self.wfile.write(head)
        while not self.server.stopped.wait(pause):
            self.wfile.write(chunk)
            self.server.sent += len(chunk)

    def log_message(self, *args: object) -> None:
        pass


class Front(ThreadingHTTPServer):
    """What the worker takes for its master. ``answers``: by a part of method and path."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: int = 0) -> None:
        self.behind = behind
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[float, str, dict[str, str]]] = []
        self.stopped = threading.Event()
        self.sent = 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.port: int = self.server_address[1]

    def __enter__(self) -> Front:
        threading.Thread(target=self.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The worker hangs up on what is too long; that is what is tested."""

    def asked(self, part: str) -> int:
        return sum(part in route for _, route, _ in self.seen)

    def more_than(self, part: str, count: int) -> bool:
        return self.asked(part) > count

    def beats(self) -> list[float]:
        return [moment for moment, route, _ in self.seen if "heartbeat" in route]


@pytest.fixture(scope="module")
def front(standing: Target) -> Iterator[Front]:
    with Front(standing.port) as front:
        url = f"http://127.0.0.1:{front.port}"
        with standing.configured(MASTER_URL=url, MASTER_API_KEY=KEY, LOG_LEVEL="info"):
            yield front


def memory_mb(target: Target, what: str = "VmRSS") -> float:
    """Of the agent; VmHWM is the most that it ever was."""
    status = Path(f"/proc/{target.worker.show('MainPID')}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def attacked(standing: Target, front: Front, route: str, answer: Answer) -> Iterator[None]:
    """While the master answers so; afterwards all is well, and was all the time."""
    begun, asked = time.monotonic(), front.asked(route)
    front.answers[route] = answer
    until(lambda: front.asked(route) > asked, 60, f"{route} is not asked")
    try:
        yield
    finally:
        front.answers.clear()
    if "heartbeat" not in route:
        beats = [begun, *(beat for beat in front.beats() if beat > begun), time.monotonic()]
        gaps = [after - before for before, after in pairwise(beats)]
        assert max(gaps) < 3 * SLOWNESS, "heartbeats are on time"
    assert memory_mb(standing, "VmHWM") < MOST_MB
    works(standing)


def works(standing: Target) -> None:
    result = standing.run(parameters(input=f"{MEDIA}/in.mp4"), timeout=60)
    assert result["status"] == "completed", result
    assert job_units() == []


def _json(text: str) -> Answer:
    return lambda handler: handler.reply(text.encode())


_LABELS = json.dumps({"job": {"id": "x", "labels": {f"l{n}": n for n in range(1_000_000)}}})
_BOMB = gzip.compress(gzip.compress(bytes(200_000_000)))
LONG: dict[str, Answer] = {
    "100 MB": lambda handler: handler.reply(b"[" * 100_000_000),
    "without end": lambda handler: handler.endless(CHUNK),
    "spaces without end": lambda handler: handler.endless(b" " * 65536, b'{"job":'),
    "headers without end": lambda handler: handler.endless(CHUNK, x="y" * 60_000),
    "a million labels": _json(_LABELS),
    "lists in lists": _json("[" * 500_000),
    "objects in objects": _json('{"job":' * 100_000),
    "a text without an end": _json('{"job": "' + "\\" * 900_000),
    "a gzip bomb": lambda handler: handler.reply(_BOMB, Content_Encoding="gzip"),
    "two codings": lambda handler: handler.reply(_BOMB, Content_Encoding="gzip, gzip"),
    "a bomb for brotli": lambda handler: handler.reply(_BOMB, Content_Encoding="br"),
}


def test_answers_that_are_too_long(standing: Target, front: Front) -> None:
    """To the question for a job, to a registration, to a heartbeat and to a report."""
    routes = ("GET /jobs/next", "heartbeat")
    for number, answer in enumerate(LONG.values()):
        with attacked(standing, front, routes[number % 2], answer):
            pass
    assert front.sent < 100_000_000, "what is too long is not read to its end"
    standing.unharmed()


def test_reports_that_are_answered_with_too_much(standing: Target, front: Front) -> None:
    """The report arrives, whatever is said of it, and is not lost when it does not."""
    for answer in (LONG["without end"], LONG["a gzip bomb"]):
        asked = front.asked("POST /results")
        front.answers["POST /results"] = answer
        job_id = standing.master.submit(parameters(input=f"{MEDIA}/in.mp4"))["id"]
        until(partial(front.more_than, "POST /results", asked), 60)
        front.answers.clear()
        standing.master.wait(job_id, 60)
    assert memory_mb(standing, "VmHWM") < MOST_MB
    works(standing)
    standing.unharmed()


def test_redirects_are_not_followed(standing: Target, front: Front) -> None:
    """So nobody else gets the key, nor anything else."""
    with Front() as other:
        for status in (301, 302, 303, 307, 308):
            place = f"http://127.0.0.1:{other.port}/jobs/next"

            def answer(handler: Handler, status: int = status, place: str = place) -> None:
                handler.reply(b"", status, Location=place, Refresh=f"0; {place}")

            route = "GET /jobs/next" if status != 307 else "heartbeat"
            with attacked(standing, front, route, answer):
                pass
        assert other.seen == []
    keys = {headers.get("Authorization") for _, _, headers in front.seen}
    assert keys == {f"Bearer {KEY}"}, "to the master itself it is given"
    standing.unharmed()


GARBAGE = (
    *("", "null", "[]", "{}", "true", "1", '"x"', "nul", "\x00", "<html>", '{"job": []}'),
    *('{"job": 1}', '{"job": {}}', '{"job": {"id": null}}', '{"job": {"id": 7}}'),
    *('{"job": {"id": ""}}', '{"job": {"id": ["x"]}}', '{"job": {"id": "\\ud800"}}'),
    '{"job": {"id": "' + "x" * 2000 + '"}}',
)


def test_answers_of_wrong_types(standing: Target, front: Front) -> None:
    """The same garbage for everything that is asked."""
    texts = iter(GARBAGE * 20)

    def answer(handler: Handler) -> None:
        handler.reply(next(texts, "").encode())

    for route in ("heartbeat", "GET /jobs/next"):
        with attacked(standing, front, route, answer):
            begun = len(front.seen)
            until(partial(front.more_than, "", begun + 3))
    standing.unharmed()


def test_slow_answers(standing: Target, front: Front) -> None:
    """A byte now and then holds up what was asked, and nothing else."""
    asked, beats = front.asked("GET /jobs/next"), len(front.beats())
    front.answers["GET /jobs/next"] = lambda handler: handler.endless(b" ", pause=0.2)
    until(lambda: front.asked("GET /jobs/next") > asked)
    until(lambda: len(front.beats()) >= beats + 4, name="no heartbeats meanwhile")
    assert front.asked("GET /jobs/next") == asked + 1, "it still waits"
    front.answers.clear()
    front.stopped.set()
    until(lambda: front.asked("GET /jobs/next") > asked + 1, 60)
    front.stopped.clear()
    works(standing)
    standing.unharmed()


def test_the_same_job_a_thousand_times(standing: Target, front: Front) -> None:
    """It is run once, and not once more while it runs or when its report is out."""
    job = {"id": "again", "scenario": "x", "parameters": {"input": f"{MEDIA}/in.mp4"}}
    made = standing.master.submit({"scenario": "x"}, {"id": "again", "status": "processing"})
    text = json.dumps({"job": {**job, "retry_count": 0, "created_at": made["created_at"]}})
    served = [0]

    def answer(handler: Handler) -> None:
        served[0] += 1
        handler.reply(text.encode())

    with attacked(standing, front, "GET /jobs/next", answer):
        standing.master.wait("again", 60)
        until(lambda: served[0] >= 20, 60)
    told = [result for result in standing.master.results if result["job_id"] == "again"]
    assert {result["status"] for result in told} == {"completed"}
    log = standing.worker.log()
    assert log.count("ffmpeg-job-again.service: Process started") == 1
    standing.unharmed()


def test_a_job_a_thousand_times_under_new_numbers(standing: Target, front: Front) -> None:
    """Each is an acceptance of its own, that fails at once: the record of it stays small."""
    standing.master.submit({"scenario": "x"}, {"id": "anew", "status": "processing"})
    served = [0]

    def answer(handler: Handler) -> None:
        served[0] += 1
        job = {"id": "anew", "retry_count": served[0], "parameters": {"codec": "-"}}
        handler.reply(json.dumps({"job": job}).encode())

    at_first = memory_mb(standing)
    with attacked(standing, front, "GET /jobs/next", answer):
        until(lambda: served[0] >= 1000, 120, "the jobs are not asked for")
    assert memory_mb(standing) < at_first + GROWTH_MB
    standing.unharmed()


def test_jobs_without_end(standing: Target, front: Front) -> None:
    """Each with an id of its own and parameters of some size, fails at once: 1,500 of them."""
    served = [0]

    def answer(handler: Handler) -> None:
        served[0] += 1
        padding = {f"p{number}": "x" * 100 for number in range(20)}
        job = {"id": f"n-{served[0]}", "parameters": {"codec": "-", **padding}}
        handler.reply(json.dumps({"job": job}).encode())

    def known(handler: Handler) -> None:
        job = {"id": handler.path.rpartition("/")[2], "status": "processing"}
        handler.reply(json.dumps(job).encode())

    front.answers["GET /jobs/n-"] = known
    front.answers["POST /results"] = _json('{"status": "success"}')
    at_first = memory_mb(standing)
    begun = time.monotonic()
    front.answers["GET /jobs/next"] = answer
    until(lambda: served[0] >= MANY, 120, "the jobs are not asked for")
    front.answers.pop("GET /jobs/next")
    beats = [begun, *(beat for beat in front.beats() if beat > begun), time.monotonic()]
    gaps = [after - before for before, after in pairwise(beats)]
    assert max(gaps) < 3 * SLOWNESS, "heartbeats are on time"
    until(lambda: front.asked("POST /results") >= MANY, 60, "the reports do not come")
    # Nothing is left that the master behind has never heard of.
    undelivered = "ffmpeg_worker_undelivered_results"
    until(lambda: standing.worker.metric(undelivered) == 0, 60, "reports are left")
    front.answers.clear()
    assert memory_mb(standing) < at_first + GROWTH_MB
    works(standing)
    standing.unharmed()


def test_results_for_others(standing: Target, front: Front) -> None:
    """What the master says of one job is not believed of another."""
    running = {
        "scenario": "320x180p30-h264",
        "parameters": {"duration": 60, "preset": "placebo", "resource_limits": {"timeout_sec": 5}},
    }
    told = json.dumps({"id": "another", "status": "canceled"}).encode()
    job_id = standing.master.submit(running)["id"]
    number = standing.master.job(job_id)["sequence_number"]
    front.answers[f"GET /jobs/{number}"] = lambda handler: handler.reply(told)
    front.answers[f"GET /jobs/{job_id}"] = lambda handler: handler.reply(told)
    until(lambda: front.asked(f"GET /jobs/{number}") >= 2, 60)
    front.answers.clear()
    standing.master.wait(job_id, 60)
    [result] = [one for one in standing.master.results if one["job_id"] == job_id]
    assert result["metrics"]["failure_reason"] == "timeout", result
    works(standing)
    standing.unharmed()
