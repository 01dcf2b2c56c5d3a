"""Server, desktop or laptop: what the chassis says (SMBIOS, "System Enclosure or Chassis")."""

from __future__ import annotations

from pathlib import Path

_LAPTOP = frozenset({8, 9, 10, 11, 14, 30, 31, 32})
_DESKTOP = frozenset({3, 4, 5, 6, 7, 13, 15, 16, 24, 34, 35, 36})


def node_type(sys: Path = Path("/sys")) -> str:
    """``server``, ``desktop`` or ``laptop``.

    What says nothing of itself is a server: virtual machines mostly do not.
    """
    try:
        chassis = int(_text(sys / "class/dmi/id/chassis_type"))
    except ValueError:
        chassis = 0
    if chassis in _LAPTOP or (chassis not in _DESKTOP and _has_battery(sys)):
        return "laptop"
    return "desktop" if chassis in _DESKTOP else "server"


def _has_battery(sys: Path) -> bool:
    """A battery of the machine's own, not that of a mouse (scope ``Device``)."""
    try:
        supplies = list((sys / "class/power_supply").iterdir())
    except OSError:
        return False
    return any(
        _text(supply / "type") == "Battery" and _text(supply / "scope") != "Device"
        for supply in supplies
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
