"""Two kinds of picture, written by hand: dots with whiskers by tool, and lines by size.

An SVG like these is a few dozen elements. A plotting library would draw text as outlines or bring
its own sizes and fonts, changes its bytes with its version, and is one more thing to install.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

from bench.figures import number

WIDTH: Final = 840
"""As wide as GitHub shows a page's text, nearly."""
LETTER: Final = 8.6
"""Pixels of a letter, with room: a bold digit of the widest of FONTS' usual faces takes 8.2."""
TOP: Final = 62
ROW: Final = 28
HEIGHT: Final = 380
"""Of a picture of lines."""


@dataclass(frozen=True)
class Theme:
    """Colours on GitHub's pages."""

    name: str
    text: str
    faint: str
    grid: str
    ours: str
    other: str
    lines: tuple[str, ...]


LIGHT: Final = Theme(
    "light", "#1f2328", "#59636e", "#d1d9e0", "#0072b2", "#6e7781",
    ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#6e7781"),
)  # fmt: skip
DARK: Final = Theme(
    "dark", "#f0f6fc", "#9198a1", "#3d444d", "#56b4e9", "#9198a1",
    ("#56b4e9", "#e69f00", "#2fc99b", "#ee99cc", "#9198a1"),
)  # fmt: skip
"""Hues that people of any colour vision tell apart. Source: Okabe and Ito, Color Universal Design;
the dark ones are lighter. Lines differ by their marks and dashes too, and are named at their ends.
"""
DASHES: Final = ("", "7 4", "2 4", "9 3 2 3", "4 4")


@dataclass(frozen=True)
class Row:
    """One tool: its median, and how far its values went."""

    who: str
    low: float
    median: float
    high: float
    ours: bool = False


@dataclass(frozen=True)
class Line:
    """One line: where it goes, and what is written at its end."""

    who: str
    points: Sequence[tuple[float, float]]
    said: str


def dots(theme: Theme, title: str, axis: str, rows: Sequence[Row], mark: float | None) -> str:
    """Medians with whiskers on a logarithmic axis, the least first. `mark`: a target's place.

    Values are above 0. Bars would be wrong: on such an axis they have no beginning.
    """
    rows = sorted(rows, key=lambda row: (row.median, row.who))
    height = TOP + ROW * len(rows) + 46
    ends = [row.low for row in rows] + [row.high for row in rows] + ([mark] if mark else [])
    said = [spoken(row) for row in rows]
    left = 30 + LETTER * max(len(row.who) for row in rows)
    right = WIDTH - 34 - LETTER * max(map(len, said))
    scale = Scale.around(ends, left, right)
    bottom = TOP + ROW * len(rows)
    out = [text(16, 26, title, theme.text, size=17, weight="600")]
    for tick in scale.ticks():
        x = scale.at(tick)
        out.append(rule(x, TOP - 6, x, bottom, theme.grid))
        out.append(text(x, bottom + 18, short(tick), theme.faint, anchor="middle"))
    out.append(text((left + right) / 2, bottom + 37, axis, theme.faint, anchor="middle"))
    if mark:
        x = scale.at(mark)
        out.append(rule(x, TOP - 6, x, bottom, theme.text, dash="4 3"))
        out.append(text(x, TOP - 12, f"target ≤ {number(mark)}", theme.text, anchor="middle"))
    for place, row in enumerate(rows):
        y = TOP + ROW * place + ROW / 2
        colour, weight = (theme.ours, "600") if row.ours else (theme.other, "400")
        out.append(text(left - 14, y + 5, row.who, theme.text, anchor="end", weight=weight))
        low, high = scale.at(row.low), scale.at(row.high)
        out.append(rule(low, y, high, y, colour, width=2))
        out += [rule(x, y - 5, x, y + 5, colour, width=2) for x in (low, high)]
        out.append(circle(scale.at(row.median), y, 6, colour))
        out.append(text(right + 18, y + 5, said[place], theme.text, weight=weight))
    found = "; ".join(f"{row.who} {number(row.median)}" for row in rows)
    return picture(title, f"{axis}. Medians: {found}.", height, out)


def spoken(row: Row) -> str:
    """What stands at a row's end."""
    middle = number(row.median)
    return middle if row.low == row.high else f"{middle} ({number(row.low)}–{number(row.high)})"


def lines(theme: Theme, title: str, x_axis: str, y_axis: str, given: Sequence[Line]) -> str:
    """Lines on two logarithmic axes, each named at its end. Values are above 0."""
    right, left, bottom = WIDTH - 250, 76, HEIGHT - 58
    across = Scale.around([x for line in given for x, _ in line.points], left, right)
    up = Scale.around([y for line in given for _, y in line.points], bottom, TOP)
    out = [text(16, 26, title, theme.text, size=17, weight="600")]
    out.append(text(16, TOP - 14, y_axis, theme.faint))
    for tick in across.ticks():
        x = across.at(tick)
        out.append(rule(x, TOP, x, bottom, theme.grid))
        out.append(text(x, bottom + 20, short(tick), theme.faint, anchor="middle"))
    for tick in up.ticks():
        y = up.at(tick)
        out.append(rule(left, y, right, y, theme.grid))
        out.append(text(left - 10, y + 5, short(tick), theme.faint, anchor="end"))
    out.append(text((left + right) / 2, bottom + 42, x_axis, theme.faint, anchor="middle"))
    names = apart([up.at(line.points[-1][1]) for line in given])
    for place, (line, name) in enumerate(zip(given, names, strict=True)):
        colour = theme.lines[place % len(theme.lines)]
        at = [(across.at(x), up.at(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        dash = DASHES[place % len(DASHES)]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dashed}/>'
        )
        out += [shape(place, x, y, colour) for x, y in at]
        end = at[-1]
        if abs(name - end[1]) > 1:
            out.append(rule(end[0] + 8, end[1], right + 14, name, theme.grid))
        out.append(text(right + 18, name - 2, line.who, colour, weight="600"))
        out.append(text(right + 18, name + 14, line.said, theme.faint, size=12))
    found = "; ".join(
        f"{line.who}: " + ", ".join(f"{short(x)}: {number(y)}" for x, y in line.points)
        for line in given
    )
    return picture(title, f"{y_axis} by {x_axis}. {found}.", HEIGHT, out)


def apart(wanted: Sequence[float], least: float = 34) -> list[float]:
    """Places of names: as near as may be to where they are wanted, and none over another."""
    order = sorted(range(len(wanted)), key=lambda one: wanted[one])
    found = list(wanted)
    for before, after in pairwise(order):
        found[after] = max(found[after], found[before] + least)
    over = found[order[-1]] - (HEIGHT - 58)
    if over > 0:
        for one in order:
            found[one] -= over
    return found


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis: from which value to which, on which pixels."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], begin: float, end: float) -> Scale:
        """One that holds all values, with a little room, and at least a threefold."""
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.06 * (high - low), (0.5 - (high - low)) / 2, 0.05)
        return cls(low - room, high + room, begin, end)

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values: powers of ten; with 2 and 5, or with all, where those are few."""
        for steps in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
            every = [
                step * 10.0**power
                for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                for step in steps
            ]
            inside = [one for one in every if self.low <= math.log10(one) <= self.high]
            if len(inside) >= 4:
                break
        return inside


def short(value: float) -> str:
    """A tick: `10,000`, `0.05`."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.10f}".rstrip("0")


# -- elements


def text(
    x: float, y: float, said: str, colour: str, *, size: int = 14, anchor: str = "start",
    weight: str = "400",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{escape(said)}</text>'
    )


def rule(
    x: float, y: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = ""
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dashed}/>'
    )


def circle(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def shape(place: int, x: float, y: float, colour: str) -> str:
    """A line's mark: circle, square, triangle, diamond."""
    if place % 4 == 0:
        return circle(x, y, 5, colour)
    points = (
        ((-5, -5), (5, -5), (5, 5), (-5, 5)),
        ((0, -6), (6, 5), (-6, 5)),
        ((0, -7), (7, 0), (0, 7), (-7, 0)),
    )[place % 4 - 1]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points)
    return f'<polygon points="{path}" fill="{colour}"/>'


def picture(title: str, described: str, height: float, elements: Sequence[str]) -> str:
    """The whole; without a ground of its own, so that it stands on the page's."""
    fonts = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
    return "\n".join(
        (
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
                f'width="{WIDTH}" height="{height:g}" role="img" aria-labelledby="title desc" '
                f'font-family="{fonts}">'
            ),
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(described)}</desc>',
            *elements,
            "</svg>\n",
        )
    )
