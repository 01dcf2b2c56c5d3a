"""One property of a unit, as StartTransientUnit takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Property:
    """One property: its name, its D-Bus type, its value."""

    name: str
    signature: str
    value: object
    optional: bool = False
    """The unit may be started without it, where systemd does not know it."""
