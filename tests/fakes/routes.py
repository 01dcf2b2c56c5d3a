"""The demo master's routes: which request does what to the store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.fakes.shapes import Data, RefusedError
from tests.fakes.store import Store


@dataclass
class Call:
    """A request: the variable parts of its path, its query, its body."""

    parts: list[str]
    query: dict[str, str]
    body: bytes

    def json(self) -> Data:
        try:
            data = json.loads(self.body)
        except ValueError:
            raise RefusedError(400, "Invalid request body") from None
        if not isinstance(data, dict):
            raise RefusedError(400, "Invalid request body")
        return data


def _next_job(store: Store, call: Call) -> tuple[int, object]:
    if not call.query.get("node_id"):
        raise RefusedError(400, "node_id parameter is required")
    return 200, {"job": store.next_job(call.query["node_id"])}


def _heartbeat(store: Store, call: Call) -> tuple[int, object]:
    store.heartbeat(call.parts[0])
    return 200, ""


def _submit(store: Store, call: Call) -> tuple[int, object]:
    return 201, store.submit(call.json())


def _no_tenants(store: Store, call: Call) -> tuple[int, object]:
    raise RefusedError(501, "Tenant management not yet implemented")


_Action = Callable[[Store, Call], tuple[int, object]]
ROUTES: list[tuple[str, re.Pattern[str], _Action]] = [
    (route.split()[0], re.compile(route.split()[1]), action)
    for route, action in {
        "GET /health": lambda store, call: (200, {"status": "healthy"}),
        "POST /nodes/register": lambda store, call: store.register(call.json()),
        "GET /nodes": lambda store, call: (200, store.node_list()),
        "POST /nodes/([^/]+)/heartbeat": _heartbeat,
        "GET /nodes/([^/]+)": lambda store, call: (200, store.node(call.parts[0])),
        "DELETE /nodes/([^/]+)": lambda store, call: (200, store.remove_node(call.parts[0])),
        "POST /jobs": _submit,
        "GET /jobs": lambda store, call: (200, store.job_list()),
        "GET /jobs/next": _next_job,
        "GET /jobs/(?!next$)([^/]+)": lambda store, call: (200, store.view(call.parts[0])),
        "GET /jobs/([^/]+)/logs": lambda store, call: (200, store.logs(call.parts[0])),
        "POST /jobs/([^/]+)/retry": lambda store, call: (200, store.retry(call.parts[0])),
        "POST /jobs/([^/]+)/(pause|resume|cancel)": (
            lambda store, call: (200, store.steer(call.parts[0], call.parts[1]))
        ),
        "POST /results": lambda store, call: (200, store.result(call.json())),
        "GET /tenants(?:/.*)?": _no_tenants,
        "POST /tenants(?:/.*)?": _no_tenants,
    }.items()
]
