"""The master's routes as methods: one request each, nothing retried here.

A job is addressed by its sequence number. Masters read ``/jobs/{…}`` as a number where it
begins with one, so most ids lead to another job or to none; whatever comes back is believed
only if it carries the id that was meant.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from worker.errors import ConfigError, JobUnknown, MasterRefused, MasterUnreachable, Unauthorized
from worker.master.answers import Answer, check, quotable
from worker.master.outages import unreachable
from worker.master.reception import NoCookies, compressed, put_location_aside, read
from worker.master.tls import Renewal, client_context
from worker.master.wire import (
    Job,
    JobResult,
    Node,
    NodeRegistration,
    ResultAnswer,
    bounded,
    encode,
)

logger = logging.getLogger(__name__)

# httpcore tries to import sniffio, which is not installed, twice in each request, and Python
# searches its path every time: a tenth of the agent's CPU. This entry makes the search short.
sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]

MOST_BYTES = 1024 * 1024
MOST_BYTES_OF_A_LIST = 32 * 1024 * 1024

NO_SUCH_ROUTE = frozenset({404, 405, 501})
"""Status of a MasterRefused (not JobUnknown) where a master lacks the route altogether."""
_HEARTBEAT_DEADLINE = 30.0
_AT_ONCE = 8
"""Requests about jobs and results. Heartbeats and polls must find a free connection."""
_READ_AS_NUMBER = re.compile(r"\s*[+-]?0*[1-9]")


class MasterClient:
    """A connection to the master, kept alive between requests.

    ``base_url``
        ``http://`` or ``https://``, host, perhaps a port and a path that all routes follow.
    ``api_key``
        Sent as ``Authorization: Bearer …`` and shown nowhere.
    ``ca``, ``cert``, ``key``, ``insecure``
        See :func:`worker.master.tls.client_context`.
    ``connect_timeout``, ``timeout``, ``deadline``
        Seconds: for a connection, for each read or write, and for a request as a whole. The
        master itself gives up after 30 s of reading or writing.
    ``transport``
        Stands in for the network, in tests.

    Proxy settings in the environment are ignored: a master is an internal service, and a
    proxy meant for the outer world should see neither its key nor its jobs.

    Every method may raise MasterUnreachable (no answer), Unauthorized (401, 403) and
    MasterRefused (any other answer that is no success, or is not the protocol).
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str | None = None,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        insecure: bool = False,
        connect_timeout: float = 10.0,
        timeout: float = 30.0,
        deadline: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        url = _checked_url(base_url)
        self._api_key = _checked_key(api_key)
        self._base = str(url).rstrip("/")
        self.peer = _host_and_port(url)
        self._deadline = deadline
        self._about_jobs = asyncio.Semaphore(_AT_ONCE)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        verify: ssl.SSLContext | bool = False
        self._renewal: Renewal | None = None
        if url.scheme == "https":
            verify = client_context(ca=ca, cert=cert, key=key, insecure=insecure)
            self._renewal = Renewal(verify, ca=ca, cert=cert, key=key)
        elif ca or cert or key:
            logger.warning("--ca, --cert and --key have no effect: MASTER_URL is no https:// URL")
        self._http = httpx.AsyncClient(
            headers=headers,
            verify=verify,
            transport=transport,
            trust_env=False,
            follow_redirects=False,
            cookies=NoCookies(),
            event_hooks={"response": [put_location_aside]},
            timeout=httpx.Timeout(timeout, connect=connect_timeout),
            # The master closes connections that were idle for 120 s; be first.
            limits=httpx.Limits(max_connections=16, keepalive_expiry=90.0),
        )

    def __repr__(self) -> str:
        return f"<MasterClient of {self.peer}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def register(self, registration: NodeRegistration) -> Node:
        """Tell the master what this machine is; it knows us by the address from then on."""
        answer = await self._ask("POST", "/nodes/register", encode(registration))
        data = answer.json()
        if isinstance(data, dict) and isinstance(data.get("node"), dict):
            data = data["node"]
        try:
            node = Node.model_validate(data)
            node.id.encode()
        except (ValidationError, UnicodeEncodeError):
            answer.refuse("has no usable node id")
        return node

    async def heartbeat(self, node_id: str) -> None:
        """Say that we are alive. Raises NodeUnknown if the master does not know the node."""
        await self._ask(
            "POST",
            f"/nodes/{_segment(node_id)}/heartbeat",
            deadline=min(_HEARTBEAT_DEADLINE, self._deadline),
        )

    async def next_job(self, node_id: str) -> Job | None:
        """Take the next job, if there is one; from then on it counts as ours.

        An unknown node gets a 500 here, which many a thing can be: a heartbeat tells.
        """
        answer = await self._ask("GET", f"/jobs/next?node_id={_segment(node_id)}")
        if not answer.body.strip():
            return None  # as with 204
        data = answer.json()
        if isinstance(data, dict) and "job" in data:
            data = data["job"]
        if not data:
            return None
        job = _job(data)
        if job is None:
            logger.error(
                "the master at %s handed out a job without a usable id, which can be neither "
                "run nor reported", self.peer,
            )  # fmt: skip
            answer.refuse("is no job with an id")
        return job

    async def job(self, job: Job) -> Job:
        """That job as the master sees it now. Raises JobUnknown if there is none."""
        addresses = [str(job.sequence_number)] if job.sequence_number else []
        if not _READ_AS_NUMBER.match(job.id):
            addresses.append(job.id)
        unknown: JobUnknown | None = None
        for address in addresses:
            try:
                async with self._about_jobs:
                    answer = await self._ask("GET", f"/jobs/{_segment(address)}")
            except JobUnknown as error:
                if address == job.id:
                    raise
                unknown = error
            except MasterRefused as error:
                if isinstance(error, Unauthorized) or error.status not in NO_SUCH_ROUTE:
                    raise
            else:
                data = answer.json()
                if isinstance(data, dict) and isinstance(data.get("job"), dict):
                    data = data["job"]
                found = _job(data)
                if found is not None and found.id == job.id:
                    return found
        return await self._job_in_list(job, unknown)

    async def jobs(
        self, wanted: Callable[[Job], bool] = lambda job: True, *, most: int = 100
    ) -> list[Job]:
        """Of the jobs that the master remembers the first ones that are wanted.

        Those without a usable id are left out. There may be any number of them, so it is not
        them all that are kept.
        """
        async with self._about_jobs:
            answer = await self._ask("GET", "/jobs", limit=MOST_BYTES_OF_A_LIST)
        found: list[Job] = []
        for data in answer.elements("jobs"):
            job = _job(data)
            if job is None:
                await asyncio.sleep(0)
            elif wanted(job):
                found.append(job)
                if len(found) == most:
                    break
        return found

    async def post_result(self, result: JobResult) -> ResultAnswer:
        """Report what became of a job, once. See :mod:`worker.master.delivery` for safety."""
        async with self._about_jobs:
            answer = await self._ask("POST", "/results", encode(result))
        if not answer.body.strip():
            return ResultAnswer(status="success")
        try:
            return ResultAnswer.model_validate(answer.json())
        except ValidationError:
            answer.refuse("is no JSON object")

    async def _job_in_list(self, job: Job, unknown: JobUnknown | None) -> Job:
        try:
            found = await self.jobs(lambda other: other.id == job.id, most=1)
        except MasterRefused as error:
            if unknown is not None and error.status in NO_SUCH_ROUTE:
                raise unknown from None
            raise
        if not found:
            raise unknown or JobUnknown(
                f"the master at {self.peer} has no job {quotable(job.id)}", 404
            )
        return found[0]

    async def _ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        limit: int = MOST_BYTES,
        deadline: float | None = None,
    ) -> Answer:
        """Send a request and return its answer, if that is a success."""
        name = quotable(f"{method} {path.partition('?')[0]}")
        deadline = deadline or self._deadline
        try:
            async with (
                asyncio.timeout(deadline),
                self._http.stream(
                    method,
                    self._base + path,
                    content=content,
                    headers={"Content-Type": "application/json"} if content is not None else {},
                ) as response,
            ):
                answer = Answer(
                    peer=self.peer,
                    request=name,
                    status=response.status_code,
                    headers=response.headers,
                    location=response.extensions.get("location", ""),
                    body=await read(response, limit),
                    secret=self._api_key,
                )
        except TimeoutError as error:
            raise MasterUnreachable(
                f"no complete answer from the master at {self.peer} to {name} within {deadline:g} s"
            ) from error
        except (httpx.RequestError, OSError) as error:
            if self._renewal is not None:
                self._renewal.look()
            # An alert of TLS 1.3 comes after the handshake, as an ssl.SSLError of its own.
            raise unreachable(error, self.peer, tls=self._base.startswith("https")) from error
        if compressed(response):
            answer.refuse("is compressed, which was not asked for")
        if len(answer.body) > limit:
            answer.refuse(f"is longer than {limit} bytes")
        logger.debug("%s: %d, %d bytes", name, answer.status, len(answer.body))
        check(answer)
        return answer


def _job(data: object) -> Job | None:
    """A job, if it can be named when it is reported."""
    if not isinstance(data, Mapping):
        return None
    try:
        job = Job.model_validate(data)
        job.id.encode()
    except (ValidationError, UnicodeEncodeError):
        return None
    return bounded(job)


def _segment(text: str) -> str:
    """``text`` as one segment of a path: dots alone would climb, and slashes would branch."""
    quoted = quote(text, safe="")
    return quoted.replace(".", "%2E") if quoted in {".", ".."} else quoted


def _checked_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as error:
        raise ConfigError(f"MASTER_URL: is no URL: {error}") from error
    if url.userinfo:
        raise ConfigError("MASTER_URL: must not hold a user name or password; use MASTER_API_KEY")
    named = re.fullmatch(rb"[A-Za-z0-9._:-]+", url.raw_host) is not None
    if url.scheme not in {"http", "https"} or not named or url.query or url.fragment:
        raise ConfigError(
            f"MASTER_URL {text!r}: expected is http://HOST[:PORT][/PATH] or https://…"
        )
    return url


def _checked_key(key: str | None) -> str | None:
    if key is None or key == "":
        return None
    if key != key.strip() or not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "MASTER_API_KEY: holds a character that a header cannot carry (a line end, a space "
            "at an end, or one outside ASCII)"
        )
    return key


def _host_and_port(url: httpx.URL) -> str:
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{host}:{url.port or (443 if url.scheme == 'https' else 80)}"
