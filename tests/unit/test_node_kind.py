from __future__ import annotations

from pathlib import Path

import pytest

from worker.node.kind import node_type


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


@pytest.mark.parametrize(
    ("chassis", "kind"),
    [
        ("3", "desktop"),
        ("35", "desktop"),
        ("10", "laptop"),
        ("31", "laptop"),
        ("17", "server"),
        ("23", "server"),
        ("1", "server"),
        ("nonsense", "server"),
    ],
)
def test_chassis(tmp_path: Path, chassis: str, kind: str) -> None:
    write(tmp_path / "class/dmi/id/chassis_type", chassis + "\n")
    assert node_type(tmp_path) == kind


def test_nothing_known_is_a_server(tmp_path: Path) -> None:
    assert node_type(tmp_path) == "server"


def test_a_battery_of_its_own_makes_a_laptop(tmp_path: Path) -> None:
    write(tmp_path / "class/power_supply/AC/type", "Mains\n")
    assert node_type(tmp_path) == "server"
    write(tmp_path / "class/power_supply/mouse/type", "Battery\n")
    write(tmp_path / "class/power_supply/mouse/scope", "Device\n")
    assert node_type(tmp_path) == "server"
    write(tmp_path / "class/power_supply/BAT0/type", "Battery\n")
    assert node_type(tmp_path) == "laptop"


def test_a_desktop_with_a_battery_is_still_one(tmp_path: Path) -> None:
    write(tmp_path / "class/dmi/id/chassis_type", "3\n")
    write(tmp_path / "class/power_supply/ups/type", "Battery\n")
    assert node_type(tmp_path) == "desktop"
