"""Figures, from measurements to the table and the file.

This machine's speed changes by the minute, so no time means anything by itself: whatever is to
be compared runs in turns, chunk by chunk, and the figure is the median of the ratios of the
chunks that ran next to each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_HEAD = ("benchmark", "figure", "round", "value", "unit", "at_most")


@dataclass
class Figure:
    """One line of the table: the median counts. ``most`` is the target, if there is one."""

    benchmark: str
    name: str
    unit: str
    values: Sequence[float]
    most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool:
        return self.most is None or self.median <= self.most

    def row(self) -> str:
        low, high = min(self.values), max(self.values)
        spread = (
            f"{low:9.3f} {high:9.3f} {len(self.values):4}" if len(self.values) > 1 else " " * 24
        )
        text = f"  {self.name:54} {self.median:10.3f} {self.unit:6} {spread}"
        if self.most is not None:
            text += f"  at most {self.most:g}: {'reached' if self.reached else 'NOT REACHED'}"
        return text.rstrip()


@dataclass
class Bench:
    """What a benchmark gets: how much to do, where to put files, where to tell its figures."""

    quick: bool
    folder: Path
    """Its own, empty at the start, writable for the service and for jobs too."""
    dbus_fast: Path | None = None
    """Where dbus-fast is installed."""
    name: str = ""
    figures: list[Figure] = field(default_factory=list)

    def pick(self, full: T, quick: T) -> T:
        """How many, how long: in earnest, or only to see that the benchmark works."""
        return quick if self.quick else full

    def begin(self, name: str, title: str) -> None:
        self.name = name
        print(f"\n{name}: {title}")
        print(f"  {'':54} {'median':>10} {'':6} {'min':>9} {'max':>9} {'n':>4}", flush=True)

    def add(
        self, name: str, values: Sequence[float] | float, unit: str, *, most: float | None = None
    ) -> None:
        """A figure, from one measurement or many."""
        many = [values] if isinstance(values, int | float) else list(values)
        figure = Figure(self.name, name, unit, many, most)
        self.figures.append(figure)
        print(figure.row(), flush=True)

    def compare(
        self,
        name: str,
        values: Mapping[str, Sequence[float]],
        ours: str,
        other: str,
        *,
        most: float | None = None,
    ) -> None:
        """The paired ratios of two contenders of ``in_turns``."""
        pairs = zip(values[ours], values[other], strict=True)
        self.add(f"{name}: {ours} / {other}", [a / b for a, b in pairs], "x", most=most)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def write(self, path: Path) -> None:
        """All measurements, one a line, tab-separated."""
        lines = ["\t".join(_HEAD)]
        for f in self.figures:
            most = "" if f.most is None else f"{f.most:g}"
            lines += (
                f"{f.benchmark}\t{f.name}\t{number}\t{value:.9g}\t{f.unit}\t{most}"
                for number, value in enumerate(f.values, 1)
            )
        path.write_text("\n".join(lines) + "\n")


def in_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[T]]:
    """Run each contender once a round, each round in another order."""
    names = list(contenders)
    if warm_up:
        for contender in contenders.values():
            contender()
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(contenders[name]())
    return results
