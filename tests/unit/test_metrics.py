from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_parse
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.unit.clock import Clock
from worker import __version__
from worker.errors import Reason
from worker.telemetry.host import HostUsage, parse_cpu, parse_meminfo
from worker.telemetry.metrics import Metrics

DASHBOARD = {
    "ffrtmp_worker_cpu_usage": "gauge",
    "ffrtmp_worker_memory_bytes": "gauge",
    "ffrtmp_worker_active_jobs": "gauge",
    "ffrtmp_worker_heartbeats_total": "counter",
    "ffrtmp_worker_uptime_seconds": "gauge",
    "ffrtmp_worker_has_gpu": "gauge",
    "ffrtmp_worker_input_generation_duration_seconds": "gauge",
    "ffrtmp_worker_input_file_size_bytes": "gauge",
    "ffrtmp_worker_total_inputs_generated": "counter",
    "ffrtmp_worker_nvenc_available": "gauge",
    "ffrtmp_worker_qsv_available": "gauge",
    "ffrtmp_worker_vaapi_available": "gauge",
    "ffrtmp_job_input_bytes_total": "counter",
    "ffrtmp_job_output_bytes_total": "counter",
    "ffrtmp_job_last_input_bytes": "gauge",
    "ffrtmp_job_last_output_bytes": "gauge",
    "ffrtmp_job_last_bandwidth_mbps": "gauge",
    "ffrtmp_worker_bandwidth_utilization": "gauge",
    "ffrtmp_worker_jobs_completed_total": "counter",
    "ffrtmp_worker_jobs_failed_total": "counter",
    "ffrtmp_worker_jobs_sla_compliant_total": "counter",
    "ffrtmp_worker_jobs_sla_violation_total": "counter",
    "ffrtmp_worker_sla_compliance_rate": "gauge",
    "ffrtmp_worker_jobs_canceled_total": "counter",
    "ffrtmp_worker_jobs_canceled_graceful_total": "counter",
    "ffrtmp_worker_jobs_canceled_forceful_total": "counter",
    "ffrtmp_worker_discovered_processes_total": "counter",
    "ffrtmp_worker_active_attachments": "gauge",
}


def values(metrics: Metrics) -> dict[str, float]:
    """By name, with the labels but node_id behind it."""
    text = metrics.render()[0].decode()
    found = {}
    for family in parse(text):
        for sample in family.samples:
            assert sample.labels.pop("node_id") == "node-1:9091"
            found[sample.name + "".join(f" {v}" for v in sample.labels.values())] = sample.value
    return found


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("node-1", 9091, slots=4)


def test_names_types_and_label_that_dashboards_query(metrics: Metrics) -> None:
    lines = metrics.render()[0].decode().splitlines()
    for name, kind in DASHBOARD.items():
        assert f"# TYPE {name} {kind}" in lines
        assert [one for one in lines if one.startswith(f'{name}{{node_id="node-1:9091"}} ')]
    shown = {line.split()[2] for line in lines if line.startswith("# TYPE ffrtmp_")}
    assert shown == set(DASHBOARD)
    assert not [line for line in lines if "_created" in line]


def test_openmetrics_where_asked_for(metrics: Metrics) -> None:
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family.type for family in open_parse(body.decode())}  # type: ignore[no-untyped-call]
    assert families["ffrtmp_worker_heartbeats"] == "counter"
    assert families["ffrtmp_worker_total_inputs_generated"] == "unknown"
    assert metrics.render()[1].startswith("text/plain; version=0.0.4")


def test_a_new_worker(metrics: Metrics) -> None:
    found = values(metrics)
    assert found["ffrtmp_worker_active_jobs"] == 0
    assert found["ffrtmp_worker_sla_compliance_rate"] == 100
    assert found["ffrtmp_worker_has_gpu"] == 0
    assert found["ffmpeg_worker_slots"] == 4
    assert found["ffmpeg_worker_master_up"] == 0
    assert found[f"ffmpeg_worker_build_info {__version__}"] == 1
    assert "ffmpeg_worker_disk_used_ratio" not in found
    for reason in Reason:
        assert found[f"ffmpeg_worker_job_failures_total {reason}"] == 0


def test_jobs(metrics: Metrics) -> None:
    for _ in range(5):
        metrics.job_started()
    metrics.job_finished(
        None, sla_compliant=True, input_bytes=1000, output_bytes=500, bandwidth_mbps=20.0
    )
    metrics.job_finished(Reason.TIMEOUT, sla_compliant=False, input_bytes=10)
    metrics.job_finished(Reason.USER_ERROR, sla_compliant=True)
    metrics.job_finished(Reason.USER_ERROR)
    found = values(metrics)
    assert found["ffrtmp_worker_active_jobs"] == 1
    assert found["ffrtmp_worker_jobs_completed_total"] == 1
    assert found["ffrtmp_worker_jobs_failed_total"] == 3
    assert found["ffmpeg_worker_job_failures_total user_error"] == 2
    assert found["ffmpeg_worker_job_failures_total timeout"] == 1
    assert found["ffrtmp_worker_jobs_sla_compliant_total"] == 2
    assert found["ffrtmp_worker_jobs_sla_violation_total"] == 1
    assert found["ffrtmp_worker_sla_compliance_rate"] == pytest.approx(66.67, abs=0.01)
    assert found["ffrtmp_job_input_bytes_total"] == 1010
    assert found["ffrtmp_job_output_bytes_total"] == 500
    # of the last completed job, not of those that failed after it
    assert found["ffrtmp_job_last_input_bytes"] == 1000
    assert found["ffrtmp_job_last_output_bytes"] == 500
    assert found["ffrtmp_job_last_bandwidth_mbps"] == 20
    assert found["ffrtmp_worker_bandwidth_utilization"] == 2


def test_bandwidth_utilization_ends_at_100(metrics: Metrics) -> None:
    metrics.job_started()
    metrics.job_finished(None, bandwidth_mbps=5000.0)
    assert values(metrics)["ffrtmp_worker_bandwidth_utilization"] == 100


def test_cancelled_jobs(metrics: Metrics) -> None:
    for graceful in (True, True, False):
        metrics.job_started()
        metrics.job_cancelled(graceful=graceful)
    found = values(metrics)
    assert found["ffrtmp_worker_jobs_canceled_total"] == 3
    assert found["ffrtmp_worker_jobs_canceled_graceful_total"] == 2
    assert found["ffrtmp_worker_jobs_canceled_forceful_total"] == 1
    assert found["ffrtmp_worker_active_jobs"] == 0


def test_inputs_node_and_encoders(metrics: Metrics) -> None:
    metrics.input_generated(1.5, 4096)
    metrics.input_generated(2.5, 8192)
    metrics.heartbeat()
    metrics.set_master_up(True)
    metrics.set_undelivered(3)
    metrics.set_disk_used(0.25)
    metrics.set_encoders({"libx264", "h264_nvenc", "hevc_vaapi"}, has_gpu=True)
    found = values(metrics)
    # this parser, unlike Prometheus, gives every counter the ending
    assert found["ffrtmp_worker_total_inputs_generated_total"] == 2
    assert found["ffrtmp_worker_input_generation_duration_seconds"] == 2.5
    assert found["ffrtmp_worker_input_file_size_bytes"] == 8192
    assert found["ffrtmp_worker_heartbeats_total"] == 1
    assert found["ffmpeg_worker_master_up"] == 1
    assert found["ffmpeg_worker_undelivered_results"] == 3
    assert found["ffmpeg_worker_disk_used_ratio"] == 0.25
    assert found["ffrtmp_worker_has_gpu"] == 1
    assert found["ffrtmp_worker_nvenc_available"] == 1
    assert found["ffrtmp_worker_qsv_available"] == 0
    assert found["ffrtmp_worker_vaapi_available"] == 1


def test_attachments_that_come_and_go(metrics: Metrics) -> None:
    found = []
    for names in ([], ["a", "b"], {"a", "b"}, ["b", "c"], [], ["a"]):
        metrics.set_attached(names)
        now = values(metrics)
        active = now["ffrtmp_worker_active_attachments"]
        found.append((active, now["ffrtmp_worker_discovered_processes_total"]))
    # the last one was let go and attached anew
    assert found == [(0, 0), (2, 2), (2, 2), (2, 3), (0, 3), (1, 4)]


def test_unit_starts_as_a_histogram(metrics: Metrics) -> None:
    for seconds in (0.005, 0.05, 0.06, 60.0):
        metrics.unit_started(seconds)
    found = values(metrics)
    name = "ffmpeg_worker_unit_start_seconds"
    assert found[f"{name}_bucket 0.01"] == 1
    assert found[f"{name}_bucket 0.05"] == 2
    assert found[f"{name}_bucket 0.1"] == 3
    assert found[f"{name}_bucket 5.0"] == 3
    assert found[f"{name}_bucket +Inf"] == 4
    assert found[f"{name}_count"] == 4
    assert found[f"{name}_sum"] == pytest.approx(60.115)


def test_uptime() -> None:
    clock = Clock(100.0)
    metrics = Metrics("node-1", 9091, clock=clock)
    clock.now += 42
    assert values(metrics)["ffrtmp_worker_uptime_seconds"] == 42


def test_threads_lose_no_count(metrics: Metrics) -> None:
    def work() -> None:
        for _ in range(1000):
            metrics.job_started()
            metrics.job_finished(None)
            metrics.heartbeat()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = values(metrics)
    assert found["ffrtmp_worker_jobs_completed_total"] == 4000
    assert found["ffrtmp_worker_heartbeats_total"] == 4000
    assert found["ffrtmp_worker_active_jobs"] == 0


# the host

MEMINFO = "MemTotal:       1000 kB\nMemFree:  100 kB\nMemAvailable:    400 kB\nHugePages_Total: 0\n"


def test_parse_stat() -> None:
    assert parse_cpu("cpu  10 1 9 70 10 2 3 5 8 8\ncpu0 1 1 1 1\n") == (30, 110)
    assert parse_cpu("cpu 1 2 3 4") == (6, 10)
    assert parse_cpu("cpu a b c d") is None
    assert parse_cpu("") is None


def test_parse_meminfo() -> None:
    assert parse_meminfo(MEMINFO) == {
        "MemTotal": 1024000,
        "MemFree": 102400,
        "MemAvailable": 409600,
    }


def test_cpu_use_is_that_between_two_scrapes(tmp_path: Path) -> None:
    clock = Clock(100.0)
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 0 900 0 0 0 0 0 0\n")
    host = HostUsage(tmp_path, clock)
    clock.now += 5
    stat.write_text("cpu 125 0 0 975 0 0 0 0 0 0\n")
    assert host.cpu_percent() == 25
    clock.now += 0.5  # a second scraper, too soon for a figure of its own
    stat.write_text("cpu 225 0 0 975 0 0 0 0 0 0\n")
    assert host.cpu_percent() == 25
    clock.now += 0.6
    assert host.cpu_percent() == 100
    clock.now += 5
    assert host.cpu_percent() == 0
    stat.write_text("cpu 225 0 0 990 -5 0 0 0 0 0\n")
    clock.now += 5
    assert host.cpu_percent() is None


def test_memory_in_use(tmp_path: Path) -> None:
    host = HostUsage(tmp_path)
    assert host.memory_used_bytes() is None
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert host.memory_used_bytes() == 600 * 1024


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    found = values(Metrics("node-1", 9091, host=HostUsage(tmp_path)))
    assert "ffrtmp_worker_cpu_usage" not in found
    assert "ffrtmp_worker_memory_bytes" not in found
    assert "ffrtmp_worker_uptime_seconds" in found
