"""What a bench found: figures with their single values, curves, and how they are shown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

FORMAT_VERSION: Final = "2.0"
TOOL: Final = "reconciler"
FLOOR: Final = "floor"

Tell: TypeAlias = Callable[[str], None]


@dataclass
class Figure:
    """One thing measured of one of those who do the work."""

    group: str
    """Under which heading, like `100 disks`."""
    name: str
    """What is measured, like `cold`."""
    who: str
    unit: str = "s"
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """To the floor of the same round; empty where there is none."""
    note: str = ""
    """Why there are no values, or what to know of them."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


@dataclass(frozen=True)
class Series:
    """One line of a curve."""

    who: str
    points: list[tuple[float, float]]

    @property
    def exponent(self) -> float | None:
        """By which power of x it grows: least squares over the logarithms."""
        usable = [(math.log(x), math.log(y)) for x, y in self.points if x > 0 and y > 0]
        if len({x for x, _ in usable}) < 2:
            return None
        return statistics.linear_regression(*zip(*usable, strict=True)).slope


@dataclass(frozen=True)
class Curve:
    """How something grows."""

    name: str
    title: str
    x: str
    y: str
    series: list[Series]


@dataclass(frozen=True)
class Measured:
    """What one part of the bench found."""

    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def __add__(self, other: Measured) -> Measured:
        return Measured(self.figures + other.figures, self.curves + other.curves)

    def find(self, group: str, name: str, who: str) -> Figure | None:
        """A figure that has values."""
        wanted = (group, name, who)
        for one in self.figures:
            if (one.group, one.name, one.who) == wanted and one.values:
                return one
        return None


@dataclass(frozen=True)
class Target:
    """What was wanted, and whether it is so."""

    said: str
    found: float
    limit: float

    @property
    def met(self) -> bool:
        return self.found <= self.limit

    def __str__(self) -> str:
        word = "met" if self.met else "missed"
        return f"{self.said}: {self.found:.3g}, wanted ≤ {self.limit:.3g}: {word}"


def targets(found: Measured, group: str = "100 disks") -> list[Target]:
    """The targets for which there are figures."""
    wanted: list[Target] = []
    cold = found.find(group, "cold, to the last call", TOOL)
    if cold and cold.ratio:
        wanted.append(Target("cold, to the last call, by the floor", cold.ratio, 1.25))
    ours = found.find(group, "no-op, CPU", TOOL)
    ansible = [
        one.median
        for one in found.figures
        if (one.group, one.name) == (group, "no-op, CPU")
        and one.who.startswith("ansible")
        and one.values
    ]
    if ours and ansible:
        wanted.append(Target("no-op, CPU by the best Ansible's", ours.median / min(ansible), 1 / 6))
    pyinfra = found.find(group, "no-op, CPU", "pyinfra")
    if ours and pyinfra:
        wanted.append(Target("no-op, CPU by pyinfra's", ours.median / pyinfra.median, 1 / 2))
    heal = found.find("daemon", "heal", TOOL)
    if heal and heal.ratio:
        wanted.append(Target("heal by the daemon, by a bare start", heal.ratio, 1.2))
    idle = found.find("daemon", "idle", TOOL)
    if idle:
        wanted.append(Target("idle with accepted runs, CPU s/min", idle.median, 0.1))
    return wanted


def table(found: Measured) -> str:
    """The figures for people: medians, and the least and greatest in brackets."""
    head = ("", "who", "median (least–greatest)", "by the floor", "n")
    rows: list[tuple[str, ...]] = [head]
    for group in dict.fromkeys(one.group for one in found.figures):
        rows.append((f"{group}:", "", "", "", ""))
        inside = [one for one in found.figures if one.group == group]
        for name in dict.fromkeys(one.name for one in inside):
            title = f"  {name}"
            for one in (figure for figure in inside if figure.name == name):
                rows.append((title, *_cells(one)))
                title = ""
    lines = aligned(rows)
    for curve in found.curves:
        lines += ["", f"{curve.title} ({curve.y} by {curve.x}):"]
        for series in curve.series:
            points = ", ".join(f"{x:g}: {y:.3g}" for x, y in series.points)
            grows = f"; exponent {series.exponent:.2f}" if series.exponent is not None else ""
            lines.append(f"  {series.who}: {points}{grows}")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(one: Figure) -> tuple[str, ...]:
    if not one.values:
        return (one.who, one.note or "not measured", "", "")
    unit = "" if one.unit == "s" else f" {one.unit}"
    ratio = span(one.ratios) if one.ratios else ""
    return (one.who, f"{span(one.values)}{unit}", ratio, str(len(one.values)))


def span(values: Sequence[float]) -> str:
    """`median (least–greatest)`, three digits that count."""
    low, middle, high = (number(v) for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def document(facts: Mapping[str, object], runs: int, found: Measured) -> dict[str, Any]:
    """Everything, every single value included."""
    curves = [
        {
            "name": curve.name,
            "title": curve.title,
            "x": curve.x,
            "y": curve.y,
            "series": [
                {"who": one.who, "points": one.points, "exponent": one.exponent}
                for one in curve.series
            ],
        }
        for curve in found.curves
    ]
    wanted = [{**asdict(one), "met": one.met} for one in targets(found)]
    return {
        "format_version": FORMAT_VERSION,
        "machine": dict(facts),
        "runs": runs,
        "figures": [asdict(one) for one in found.figures],
        "curves": curves,
        "targets": wanted,
    }


def read(path: Path) -> tuple[dict[str, Any], Measured]:
    """What `write` wrote: the machine's facts among the rest, and the figures. Raises OSError,
    ValueError."""
    value = json.loads(path.read_text())
    if value.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: its format is {value.get('format_version')!r}, not {FORMAT_VERSION}"
        )
    curves = [
        Curve(
            one["name"],
            one["title"],
            one["x"],
            one["y"],
            [Series(s["who"], [(x, y) for x, y in s["points"]]) for s in one["series"]],
        )
        for one in value["curves"]
    ]
    return value, Measured([Figure(**one) for one in value["figures"]], curves)


def write(path: Path, facts: Mapping[str, object], runs: int, found: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = document(facts, runs, found)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


class Rounds:
    """Collects what rounds find, by name and by who."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._figures: dict[tuple[str, str], Figure] = {}

    def add(
        self, name: str, who: str, value: float, floor: float | None = None, unit: str = "s"
    ) -> None:
        """One value; `floor`: that of the same round."""
        key = (name, who)
        one = self._figures.setdefault(key, Figure(self.group, name, who, unit))
        one.values.append(value)
        if floor:
            one.ratios.append(value / floor)

    def absent(self, name: str, who: str, why: str) -> None:
        """There is no such figure, and why."""
        self._figures.setdefault((name, who), Figure(self.group, name, who, note=why))

    def measured(self) -> Measured:
        names = list(dict.fromkeys(name for name, _ in self._figures))
        ordered: Iterable[Figure] = (
            one for name in names for (other, _), one in self._figures.items() if other == name
        )
        return Measured(list(ordered))
