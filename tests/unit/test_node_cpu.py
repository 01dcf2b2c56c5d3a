from __future__ import annotations

import os
import platform

import pytest

from worker.node.cpu import cpu_model, go_arch, usable_cpus


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        (
            "processor\t: 0\nvendor_id\t: AMD\nmodel name\t: AMD EPYC  7B13\nmodel\t: 1\n",
            "AMD EPYC 7B13",
        ),
        ("processor: 0\nCPU implementer: 0x41\nCPU part: 0xd0c\n", "ARM Neoverse-N1"),
        ("processor: 0\nCPU implementer: 0x41\nCPU part: 0xabc\n", "ARM part 0xabc"),
        ("processor: 0\nCPU implementer: 0x41\nCPU part: 0xd08\nModel: Pi 4\n", "ARM Cortex-A72"),
        ("CPU implementer: 0x51\nCPU part: 0x800\nHardware\t: Qualcomm X\n", "Qualcomm X"),
        ("processor: 0\ncpu\t\t: POWER9, altivec\n", "POWER9, altivec"),
    ],
)
def test_models(cpuinfo: str, model: str) -> None:
    assert cpu_model(cpuinfo) == model


def test_a_model_that_is_not_named_is_the_architecture() -> None:
    assert cpu_model("") == platform.machine()


@pytest.mark.parametrize(
    ("machine", "name"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "riscv64")]
)
def test_go_names(machine: str, name: str) -> None:
    assert go_arch(machine) == name


def test_the_cpus_of_pid_1_count(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {1: {0, 1, 2, 3}, 0: {0}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: sets[pid])
    assert usable_cpus() == 4


def test_our_own_where_pid_1_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def affinity(pid: int) -> set[int]:
        if pid == 1:
            raise PermissionError
        return {0, 1}

    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    assert usable_cpus() == 2
