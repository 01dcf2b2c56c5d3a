"""What is counted, for Prometheus.

The ``ffrtmp_…`` names, and their label ``node_id``, are those that existing dashboards query;
the ``ffmpeg_worker_…`` ones are added. All values are read at one moment under one lock, so that
a scrape never sees half of a job's end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.exposition import choose_encoder

from worker import __version__
from worker.errors import Reason
from worker.telemetry.host import HostUsage

START_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds. A unit start is some 15 ms bare and some 65 ms in a full sandbox."""
_REFERENCE_MBPS = 1000.0
"""What 100 % of ffrtmp_worker_bandwidth_utilization has always meant."""
_OLD_COUNTER = "ffrtmp_worker_total_inputs_generated"


class Metrics:
    """Counts what is reported to it. Every method may be called from any thread."""

    def __init__(
        self,
        node_name: str,
        port: int,
        *,
        slots: int = 1,
        host: HostUsage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``slots``: how many jobs may run at a time."""
        self._labels = {"node_id": f"{node_name}:{port}"}
        self._host = host or HostUsage(clock=clock)
        self._clock = clock
        self._born = clock()
        self._lock = threading.Lock()
        self._slots = slots
        self._active = 0
        self._heartbeats = 0
        self._inputs = 0
        self._last_input_seconds = 0.0
        self._last_input_size = 0
        self._has_gpu = False
        self._encoders: frozenset[str] = frozenset()
        self._input_bytes = self._output_bytes = 0
        self._last_input_bytes = self._last_output_bytes = 0
        self._last_mbps = 0.0
        self._completed = 0
        self._failed = dict.fromkeys((str(reason) for reason in Reason), 0)
        self._sla_met = self._sla_missed = 0
        self._cancelled_graceful = self._cancelled_forceful = 0
        self._starts = [0] * (len(START_BUCKETS) + 1)
        self._start_seconds = 0.0
        self._undelivered = 0
        self._master_up = False
        self._disk_used: float | None = None
        self._attached: frozenset[str] = frozenset()
        self._discovered = 0
        self.registry = CollectorRegistry()
        self.registry.register(self)

    # what happens to jobs: each job_started() is followed by exactly one of the two others

    def job_started(self) -> None:
        with self._lock:
            self._active += 1

    def job_finished(
        self,
        reason: Reason | None,
        *,
        sla_compliant: bool | None = None,
        input_bytes: int | None = None,
        output_bytes: int | None = None,
        bandwidth_mbps: float | None = None,
    ) -> None:
        """``reason`` None: completed. ``sla_compliant`` None: the job does not count for the SLA.

        The bytes are the sizes of the job's files, None where there are none.
        """
        with self._lock:
            self._active -= 1
            if reason is None:
                self._completed += 1
            else:
                self._failed[reason] += 1
            if sla_compliant is not None:
                self._sla_met += sla_compliant
                self._sla_missed += not sla_compliant
            self._input_bytes += input_bytes or 0
            self._output_bytes += output_bytes or 0
            if reason is None:
                self._last_input_bytes = input_bytes or 0
                self._last_output_bytes = output_bytes or 0
                self._last_mbps = bandwidth_mbps or 0.0

    def job_cancelled(self, *, graceful: bool) -> None:
        """``graceful``: it ended by SIGTERM, without SIGKILL."""
        with self._lock:
            self._active -= 1
            self._cancelled_graceful += graceful
            self._cancelled_forceful += not graceful

    def input_generated(self, seconds: float, size_bytes: int) -> None:
        """A test input was made in so many seconds."""
        with self._lock:
            self._inputs += 1
            self._last_input_seconds = seconds
            self._last_input_size = size_bytes

    def unit_started(self, seconds: float) -> None:
        """From asking systemd for a unit to its start job being done."""
        with self._lock:
            self._start_seconds += seconds
            self._starts[sum(seconds > bound for bound in START_BUCKETS)] += 1

    # what happens to the node

    def heartbeat(self) -> None:
        """The master took a heartbeat."""
        with self._lock:
            self._heartbeats += 1

    def set_master_up(self, up: bool) -> None:
        """Whether the last request got an answer that the protocol knows."""
        with self._lock:
            self._master_up = up

    def set_undelivered(self, count: int) -> None:
        """Results that the master has not taken yet."""
        with self._lock:
            self._undelivered = count

    def set_disk_used(self, ratio: float) -> None:
        """Of the work directory's file system, 0 to 1."""
        with self._lock:
            self._disk_used = ratio

    def set_attached(self, names: Iterable[str]) -> None:
        """The scopes that hold attached processes now; those not seen the last time are new."""
        attached = frozenset(names)
        with self._lock:
            self._discovered += len(attached - self._attached)
            self._attached = attached

    def set_encoders(self, encoders: Iterable[str], *, has_gpu: bool) -> None:
        """Encoders that encoded a frame on this machine."""
        with self._lock:
            self._encoders = frozenset(encoders)
            self._has_gpu = has_gpu

    # what is shown

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type, in the best format that the Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        body: bytes = encode(self.registry)
        # prometheus_client would call a counter of this name …_total; OpenMetrics forbids it
        name = _OLD_COUNTER.encode()
        return body.replace(b"# TYPE %s untyped\n" % name, b"# TYPE %s counter\n" % name), str(
            content_type
        )

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry then does not collect just to learn the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        cpu, memory = self._host.cpu_percent(), self._host.memory_used_bytes()
        with self._lock:
            yield from list(self._dashboard(cpu, memory))
            yield from list(self._own())

    def _dashboard(self, cpu: float | None, memory: int | None) -> Iterator[Metric]:
        sla_jobs = self._sla_met + self._sla_missed
        cancelled = self._cancelled_graceful + self._cancelled_forceful
        gauges: list[tuple[str, str, float | None]] = [
            ("worker_cpu_usage", "Use of the host's CPUs since the last scrape, percent", cpu),
            ("worker_memory_bytes", "Memory of the host that is in use", memory),
            ("worker_active_jobs", "Jobs running now", self._active),
            ("worker_uptime_seconds", "Time since the worker started", self._clock() - self._born),
            ("worker_has_gpu", "1 if a hardware encoder works", self._has_gpu),
            (
                "worker_input_generation_duration_seconds",
                "Time the last generated input took",
                self._last_input_seconds,
            ),
            (
                "worker_input_file_size_bytes",
                "Size of the last generated input",
                self._last_input_size,
            ),
            ("job_last_input_bytes", "Input of the last completed job", self._last_input_bytes),
            ("job_last_output_bytes", "Output of the last completed job", self._last_output_bytes),
            (
                "job_last_bandwidth_mbps",
                "Input and output of the last completed job over its run time, Mbit/s",
                self._last_mbps,
            ),
            (
                "worker_bandwidth_utilization",
                "The last completed job's bandwidth as percent of 1000 Mbit/s, at most 100",
                min(100.0, 100.0 * self._last_mbps / _REFERENCE_MBPS),
            ),
            (
                "worker_sla_compliance_rate",
                "Jobs within the SLA, percent of those that count for it (100 before the first)",
                100.0 * self._sla_met / sla_jobs if sla_jobs else 100.0,
            ),
            (
                "worker_active_attachments",
                "Foreign processes under limits of ours",
                len(self._attached),
            ),
        ]
        gauges += [
            (
                f"worker_{family}_available",
                f"1 if an encoder of {family.upper()} encoded a frame",
                any(encoder.endswith(f"_{family}") for encoder in self._encoders),
            )
            for family in ("nvenc", "qsv", "vaapi")
        ]
        counters: list[tuple[str, str, float]] = [
            ("worker_heartbeats_total", "Heartbeats that the master took", self._heartbeats),
            ("job_input_bytes_total", "Input of all finished jobs", self._input_bytes),
            ("job_output_bytes_total", "Output of all finished jobs", self._output_bytes),
            ("worker_jobs_completed_total", "Jobs that completed", self._completed),
            ("worker_jobs_failed_total", "Jobs that failed", sum(self._failed.values())),
            ("worker_jobs_sla_compliant_total", "Jobs within the SLA", self._sla_met),
            ("worker_jobs_sla_violation_total", "Jobs outside the SLA", self._sla_missed),
            ("worker_jobs_canceled_total", "Jobs that were cancelled", cancelled),
            (
                "worker_jobs_canceled_graceful_total",
                "Cancelled jobs that ended by SIGTERM",
                self._cancelled_graceful,
            ),
            (
                "worker_jobs_canceled_forceful_total",
                "Cancelled jobs that needed SIGKILL",
                self._cancelled_forceful,
            ),
            (
                "worker_discovered_processes_total",
                "Foreign processes seen under limits of ours",
                self._discovered,
            ),
        ]
        for name, help_text, value in gauges:
            if value is not None:
                yield self._one(GaugeMetricFamily, f"ffrtmp_{name}", help_text, value)
        for name, help_text, value in counters:
            yield self._one(CounterMetricFamily, f"ffrtmp_{name}", help_text, value)
        yield self._one(UnknownMetricFamily, _OLD_COUNTER, "Inputs generated", self._inputs)

    def _own(self) -> Iterator[Metric]:
        gauges: list[tuple[str, str, float | None]] = [
            ("slots", "Jobs that may run at a time", self._slots),
            ("undelivered_results", "Results the master has not taken yet", self._undelivered),
            ("master_up", "1 if the master answered the last request", self._master_up),
            ("disk_used_ratio", "Of the work directory's file system", self._disk_used),
        ]
        for name, help_text, value in gauges:
            if value is not None:
                yield self._one(GaugeMetricFamily, f"ffmpeg_worker_{name}", help_text, value)
        failures = CounterMetricFamily(
            "ffmpeg_worker_job_failures",
            "Jobs that failed, by reason",
            labels=["node_id", "reason"],
        )
        for reason, count in self._failed.items():
            failures.add_metric([self._labels["node_id"], reason], count)
        yield failures
        total, buckets = 0, []
        for bound, count in zip((*map(str, START_BUCKETS), "+Inf"), self._starts, strict=True):
            total += count
            buckets.append((bound, total))
        starts = HistogramMetricFamily(
            "ffmpeg_worker_unit_start_seconds",
            "From asking systemd for a unit to its start",
            labels=list(self._labels),
        )
        starts.add_metric(list(self._labels.values()), buckets, self._start_seconds)
        yield starts
        build = InfoMetricFamily("ffmpeg_worker_build", "This program", labels=list(self._labels))
        build.add_metric(list(self._labels.values()), {"version": __version__})
        yield build

    def _one(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily | UnknownMetricFamily],
        name: str,
        help_text: str,
        value: float,
    ) -> Metric:
        metric = family(name, help_text, labels=list(self._labels))
        metric.add_metric(list(self._labels.values()), value)
        return metric
