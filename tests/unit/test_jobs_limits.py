from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from worker.errors import JobError, Reason
from worker.jobs.capabilities import TYPICAL
from worker.jobs.limits import resolve_limits
from worker.jobs.spec import Limits
from worker.systemd.launch import DeviceLimit

DEFAULTS = Limits(cpu_percent=200, memory_mb=2048, disk_mb=5000, timeout_sec=3600)


def resolve(job: object = None, parameters: Any = None, wrapper: object = None) -> Limits:
    return resolve_limits(
        job, {"resource_limits": parameters}, wrapper, DEFAULTS, replace(TYPICAL, cpus=8)
    )[0]


def test_defaults_where_nobody_speaks() -> None:
    assert resolve() == DEFAULTS
    assert resolve({"max_cpu_percent": None}, {}, {"cpu_max": "", "cpu_weight": 0}) == DEFAULTS


def test_each_field_comes_from_the_first_place_that_names_it() -> None:
    limits = resolve(
        {"max_cpu_percent": 50},
        {"max_cpu_percent": 60, "max_memory_mb": 100.0},
        {"cpu_max": "max", "memory_max_mb": 300, "cpu_weight": 10_000},
    )
    assert limits == Limits(50, 100, 5000, 3600, cpu_weight=10_000)


def test_only_the_value_that_counts_is_judged() -> None:
    assert resolve({"timeout_sec": 5}, {"timeout_sec": "soon"}).timeout_sec == 5


@pytest.mark.parametrize(
    ("cpu_max", "percent"),
    [
        ("50000 100000", 50),
        ("150000 100000", 150),
        ("1001 100000", 2),
        ("max", 800),
        ("max 50000", 800),
        ("25000", 25),
        (" 200000   100000 ", 200),
    ],
)
def test_cpu_max(cpu_max: str, percent: int) -> None:
    assert resolve(wrapper={"cpu_max": cpu_max}).cpu_percent == percent


def test_io_max() -> None:
    text = "8:16 rbps=2097152 wiops=120 wbps=max"
    assert resolve(wrapper={"io_max": text}).io == DeviceLimit("8:16", 2097152, None, None, 120)
    assert resolve(wrapper={"io_max": "8:16 rbps=max"}).io is None


def test_limits_above_the_node_are_lowered_and_noted() -> None:
    limits, notes = resolve_limits(
        {"max_cpu_percent": 6400, "max_memory_mb": 10**6},
        {},
        None,
        DEFAULTS,
        replace(TYPICAL, cpus=2, memory_bytes=2**30),
    )
    assert (limits.cpu_percent, limits.memory_mb) == (200, 1024)
    assert notes == (
        "CPU limit lowered from 6400 % to 200 %, all that this node has",
        "memory limit lowered from 1000000 MB to 1024 MB, all that this node has",
    )


@pytest.mark.parametrize(
    "field", ["max_cpu_percent", "max_memory_mb", "max_disk_mb", "timeout_sec"]
)
@pytest.mark.parametrize(
    "value", [0, -1, True, "200", 1.5, float("nan"), float("inf"), 10**40, 1e300, [], {}]
)
def test_wrong_values_name_field_and_value(field: str, value: object) -> None:
    with pytest.raises(JobError) as caught:
        resolve(parameters={field: value})
    assert caught.value.reason is Reason.USER_ERROR
    assert caught.value.message.startswith(f"parameters.resource_limits.{field} = ")
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "wrapper",
    [{"cpu_max": v} for v in (5, "0 100000", "fast", "1 2 3", "50000 5", "-1 100000", "1e5 100000")]
    + [{"cpu_weight": v} for v in (-1, 10_001, "100", True)]
    + [{"memory_max_mb": v} for v in (-1, "1", 0.5)]
    + [{"io_max": v} for v in (1, "8 rbps=1", "8:0 rbps=0", "8:0 x=1", "8:0 rbps=1 rbps=2", " ")]
    + [{"io_max": "8:0 rbps=" + "9" * 19}, [], "max", 3],
)
def test_wrong_wrapper_constraints(wrapper: object) -> None:
    with pytest.raises(JobError, match="wrapper_constraints") as caught:
        resolve(wrapper=wrapper)
    assert caught.value.reason is Reason.USER_ERROR


@pytest.mark.parametrize("value", ["x", 1, [1], True])
def test_limits_that_are_no_object(value: object) -> None:
    with pytest.raises(JobError, match="must be an object"):
        resolve(job=value)
    with pytest.raises(JobError, match="must be an object"):
        resolve(parameters=value)
