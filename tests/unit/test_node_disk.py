from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from worker.node import disk
from worker.node.disk import DiskUsage


def test_root_s_reserve_counts_as_neither_used_nor_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = SimpleNamespace(f_frsize=4096, f_bsize=1, f_blocks=1000, f_bfree=300, f_bavail=250)
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    found = disk.usage(Path("/x"))
    assert found == DiskUsage(total=1000 * 4096, used=700 * 4096, available=250 * 4096)
    assert found.used_ratio == pytest.approx(700 / 950)


def test_a_file_system_without_size_is_full() -> None:
    assert DiskUsage(0, 0, 0).used_ratio == 1.0


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert disk.usage(tmp_path).total > 0
    with pytest.raises(FileNotFoundError):
        disk.usage(tmp_path / "none")
