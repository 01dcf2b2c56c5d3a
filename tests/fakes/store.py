"""The demo master's memory: nodes, jobs and the rules by which they change.

Kept faithful where a worker can get hurt: the store that forgets capabilities, nodes that
lose their row, results without any check, retries without back-off, recovery by the clock.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from tests.fakes.shapes import (
    Data,
    RefusedError,
    facts,
    go_time,
    is_rfc3339,
    present,
    typed,
    without_blanks,
)

_QUEUES = {"live": 0, "default": 1, "batch": 2}
_PRIORITIES = {"high": 0, "medium": 1, "low": 2}
_ENGINES = ("auto", "ffmpeg", "gstreamer")
_GPU_CODECS = ("nvenc", "qsv", "videotoolbox")
# A failure that says one of these is queued again by the recovery, whatever its kind.
_CURABLE = (
    "connection refused", "timeout", "temporary failure", "network error", "no such host",
    "broken pipe", "connection reset", "node unavailable", "worker died", "stale",
)  # fmt: skip


class Store:
    """Everything the master knows. Every method may be called from any thread.

    ``dead_after``, ``live_stale`` and ``batch_stale`` are in seconds; ``clock`` is in seconds
    since 1970.
    """

    def __init__(
        self,
        *,
        max_retries: int = 3,
        dead_after: float = 90.0,
        live_stale: float = 300.0,
        batch_stale: float = 1800.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[str, Data] = {}
        self.nodes: dict[str, Data] = {}
        self.results: list[Data] = []
        self._beats: dict[str, float] = {}
        self._activity: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._max_retries = max_retries
        self._dead_after = dead_after
        self._live_stale = live_stale
        self._batch_stale = batch_stale
        self._clock = clock

    # Nodes

    def register(self, request: Data) -> tuple[int, Data]:
        """Identity is the address. A known node keeps what the store knew of it."""
        typed(request, address=str, type=str, cpu_threads=int, cpu_model=str, has_gpu=bool,
               gpu_type=str, gpu_capabilities=list, ram_total_bytes=int, labels=dict)  # fmt: skip
        address = request.get("address", "")
        with self.changed:
            now = self._now()
            known = next((n for n in self.nodes.values() if n["address"] == address), None)
            if known is not None and known["current_job_id"] is not None:
                known.update(status="available", last_heartbeat=now)
                self._beats[known["id"]] = self._clock()
                self.changed.notify_all()
                return 200, present({**known, **facts(request), "current_job_id": ""})
            if known is not None:
                del self.nodes[known["id"]]  # a row with NULL in it cannot be read
            node = {
                "id": str(uuid.uuid4()),
                "name": re.sub(r"^https?://", "", address).partition(":")[0],
                **facts(request),
                "status": "available",
                "last_heartbeat": now,
                "registered_at": now,
                "current_job_id": "",
            }
            self.nodes[node["id"]] = node
            self._beats[node["id"]] = self._clock()
            self.changed.notify_all()
            return 201, present(node)

    def heartbeat(self, node_id: str) -> None:
        """An offline node stays offline. Only the job taken last is kept fresh."""
        with self.changed:
            node = self._node(node_id)
            node["last_heartbeat"] = self._now()
            self._beats[node_id] = self._clock()
            job = self.jobs.get(node["current_job_id"] or "")
            if job is not None:
                self._touch(job)
            self.changed.notify_all()

    def node(self, node_id: str) -> Data:
        with self.changed:
            node = self._node(node_id)
            if node["current_job_id"] is None:
                raise RefusedError(500, "Failed to get node")
            return present(node)

    def node_list(self) -> Data:
        with self.changed:
            nodes = [present(n) for n in self.nodes.values() if n["current_job_id"] is not None]
            return {"count": len(nodes), "nodes": nodes or None}

    def remove_node(self, node_id: str) -> Data:
        with self.changed:
            if self._node(node_id)["status"] == "busy":
                raise RefusedError(400, "Cannot remove node while it is processing a job")
            del self.nodes[node_id]
            self.changed.notify_all()
            return {"node_id": node_id, "status": "removed"}

    # Jobs

    def submit(self, request: Data, extra: Mapping[str, Any] | None = None) -> Data:
        """``extra`` sets fields of the job that a request cannot, for tests."""
        typed(request, scenario=str, confidence=str, engine=str, classification=str,
               parameters=dict, queue=str, priority=str)  # fmt: skip
        engine = request.get("engine") or "auto"
        if engine not in _ENGINES:
            raise RefusedError(
                400, f"Invalid engine '{engine}'. Valid values: auto, ffmpeg, gstreamer"
            )
        with self.changed:
            job: Data = {
                "id": str(uuid.uuid4()),
                "sequence_number": len(self.jobs) + 1,
                "scenario": request.get("scenario", ""),
                "confidence": request.get("confidence", ""),
                "engine": engine,
                "parameters": request.get("parameters"),
                "status": "pending",
                "queue": request.get("queue") or "default",
                "priority": request.get("priority") or "medium",
                "created_at": self._now(),
                "retry_count": 0,
                **(extra or {}),
            }
            self.jobs[job["id"]] = job
            self.changed.notify_all()
            return without_blanks(job)

    def job_list(self) -> Data:
        with self.changed:
            jobs = [without_blanks(job) for job in reversed(self.jobs.values())]
            return {"count": len(jobs), "jobs": jobs or None}

    def look_up(self, key: str) -> Data:
        """The bug that matters: a key that begins with a number is taken for that number."""
        number = re.match(r"\s*[+-]?\d+", key)
        with self.changed:
            if number is not None and int(number[0]) > 0:
                wanted = int(number[0])
                jobs = (j for j in self.jobs.values() if j.get("sequence_number") == wanted)
                job = next(jobs, None)
            else:
                job = self.jobs.get(key)
            if job is None:
                raise RefusedError(404, "Job not found")
            return job

    def view(self, key: str) -> Data:
        with self.changed:
            job = self.look_up(key)
            node = self.nodes.get(job.get("node_id") or "")
            return without_blanks({**job, "node_name": node["name"] if node else ""})

    def logs(self, key: str) -> Data:
        with self.changed:
            job = self.look_up(key)
            error = job.get("error")
            logs = f"Error: {error}" if error else "No logs available for this job"
            return {"job_id": job["id"], "logs": logs}

    def next_job(self, node_id: str) -> Data | None:
        """By queue, priority and age. A GPU job at the head holds up nodes without one."""
        with self.changed:
            node = self.nodes.get(node_id)
            if node is None:
                raise RefusedError(500, "Failed to get next job")
            waiting = [j for j in self.jobs.values() if j["status"] in ("pending", "queued")]
            if not waiting:
                return None
            job = min(waiting, key=_rank)
            if _wants_gpu(job) and not node.get("has_gpu"):
                return None
            self._log(job, job["status"], "assigned")
            now = self._now()
            job.update(status="processing", node_id=node_id, started_at=now)
            self._started[job["id"]] = self._clock()
            self._touch(job)
            node.update(status="busy", current_job_id=job["id"])
            self.changed.notify_all()
            return without_blanks(job)

    def steer(self, key: str, action: str) -> Data:
        """Pause, resume or cancel. Nobody tells the worker."""
        allowed, target, said = {
            "pause": (("processing", "running"), "paused", "paused"),
            "resume": (("paused",), "processing", "resumed"),
            "cancel": (("pending", "queued", "processing", "paused"), "canceled", "canceled"),
        }[action]
        with self.changed:
            job = self.look_up(key)
            state = job["status"]
            if state not in allowed:
                raise RefusedError(
                    400, f"Failed to {action} job: cannot {action} job in status: {state}"
                )
            self._log(job, state, target)
            job["status"] = target
            if target == "canceled":
                job["completed_at"] = self._now()
                self._free(job, "")
            self.changed.notify_all()
            return {"job_id": job["id"], "status": said}

    def retry(self, key: str) -> Data:
        with self.changed:
            job = self.look_up(key)
            if job["status"] not in ("failed", "canceled"):
                raise RefusedError(400, "Only failed or canceled jobs can be retried")
            self._queue_again(job, job.get("error", ""))
            return {"job_id": job["id"], "retry_count": job["retry_count"], "status": "queued"}

    def result(self, result: Data) -> Data:
        """No check of owner or state: whatever is reported becomes true."""
        typed(result, job_id=str, node_id=str, status=str, progress=int, metrics=dict,
               analyzer_output=dict, error=str, logs=str, completed_at=str)  # fmt: skip
        if "completed_at" in result and not is_rfc3339(result["completed_at"]):
            raise RefusedError(400, "Invalid request body")
        with self.changed:
            job = self.jobs.get(result.get("job_id", ""))
            if job is None:
                raise RefusedError(500, "Failed to update job status")
            self.results.append(result)
            status = result.get("status", "")
            if result.get("error"):
                job["error"] = result["error"]
            if status == "failed" and job["retry_count"] < self._max_retries:
                self._free(job, None)
                self._queue_again(job, job.get("error", ""))
                return {
                    "max_retries": self._max_retries,
                    "retry": job["retry_count"],
                    "status": "retrying",
                }
            self._log(job, job["status"], status)
            job["status"] = status
            if status in ("completed", "failed"):
                job["completed_at"] = self._now()
                self._free(job, "")
            self.changed.notify_all()
            return {"status": "success"}

    # The scheduler

    def tick(self) -> None:
        """What the scheduler does every few seconds: recovery by the clock."""
        with self.changed:
            if not any(n["status"] == "available" for n in self.nodes.values()):
                for job in self.jobs.values():
                    if job["status"] == "pending":
                        job["status"] = "queued"
            now = self._clock()
            for node in self.nodes.values():
                readable = node["current_job_id"] is not None
                if readable and now - self._beats[node["id"]] > self._dead_after:
                    node["status"] = "offline"
                    self._recover(node)
            for job in self.jobs.values():
                self._judge_stale(job, now)
                curable = any(word in job.get("error", "") for word in _CURABLE)
                if job["status"] == "failed" and curable and job["retry_count"] < 3:
                    self._queue_again(job, job["error"])
            self.changed.notify_all()

    def _recover(self, node: Data) -> None:
        for job in self.jobs.values():
            mine = job.get("node_id") == node["id"]
            if mine and job["status"] in ("processing", "assigned"):
                self._queue_again(job, f"Reassigning from dead node: {node['id']}")
                node.update(status="available", current_job_id=None)

    def _judge_stale(self, job: Data, now: float) -> None:
        if job["status"] != "processing":
            return
        idle = now - self._activity[job["id"]]
        if job["queue"] == "live" and idle > self._live_stale:
            error = f"Live job stale - no activity for {idle:.1f}s"
        elif job["queue"] != "live" and now - self._started[job["id"]] > self._batch_stale:
            error = f"Batch job stale - exceeded {self._batch_stale:.0f}s timeout"
        else:
            return
        job.update(status="failed", error=error)

    def _queue_again(self, job: Data, error: str) -> None:
        self._log(job, job["status"], "pending")
        job.update(status="pending", retry_count=job["retry_count"] + 1, error=error, node_id="")
        self.changed.notify_all()

    def _free(self, job: Data, current: str | None) -> None:
        """The node of a job is free, though it may hold other jobs. None is SQL's NULL."""
        node = self.nodes.get(job.get("node_id") or "")
        if node is not None:
            node.update(status="available", current_job_id=current)

    def _touch(self, job: Data) -> None:
        job["last_activity_at"] = self._now()
        self._activity[job["id"]] = self._clock()

    def _log(self, job: Data, before: str, after: str) -> None:
        job.setdefault("state_transitions", []).append(
            {"from": before, "to": after, "timestamp": self._now()}
        )

    def _node(self, node_id: str) -> Data:
        try:
            return self.nodes[node_id]
        except KeyError:
            raise RefusedError(404, "Node not found") from None

    def _now(self) -> str:
        return go_time(self._clock())


def _rank(job: Data) -> tuple[int, int, int]:
    queue = _QUEUES.get(job["queue"], _QUEUES["default"])
    priority = _PRIORITIES.get(job["priority"], _PRIORITIES["medium"])
    return queue, priority, job["sequence_number"] or 0


def _wants_gpu(job: Data) -> bool:
    parameters = job.get("parameters") or {}
    codec = str(parameters.get("codec", ""))
    hwaccel = parameters.get("hwaccel", "none")
    return any(name in codec for name in _GPU_CODECS) or hwaccel != "none"
