"""Draw a bench's results and write them into docs/performance.md.

python -m bench.plots [--json FILE] [--docs FOLDER]

The results become FOLDER/performance/results.json, the pictures stand beside it, light and dark,
and what stands between the markers of FOLDER/performance.md is written anew. The same results give
the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import svg
from bench.figures import FLOOR, TOOL, Curve, Figure, Measured, Series, number, read, span, targets
from bench.svg import DARK, LIGHT, Line, Row, Theme

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "bench" / "results" / "latest.json"
FOLDER: Final = "performance"
"""Beside the page: pictures, and the results that they are drawn from."""
COLD: Final = "cold, to the last call"
_MARK: Final = re.compile(
    r"(?P<begin><!-- bench: (?P<name>[a-z0-9-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


@dataclass(frozen=True)
class Bars:
    """A picture by tool, of figures with one name."""

    name: str
    """Of the section of the page, and of the files."""
    title: str
    group: str
    figure: str
    ratio: bool = False
    """Whether ratios to the floor are drawn, not values."""
    mark: float | None = None
    """A target on the axis."""


BARS: Final = (
    Bars("cold", "A cold start of 100 disks, by the floor", "100 disks", COLD, True, 1.25),
    Bars("no-op", "Nothing to do on 100 disks: CPU", "100 disks", "no-op, CPU"),
    Bars("heal", "One of 100 servers died: until it answers again", "100 disks", "heal"),
    Bars("daemon-heal", "The daemon heals a server", "daemon", "heal"),
    Bars("idle", "Nothing happens: CPU in a minute", "", "idle", mark=0.1),
    Bars("idle-memory", "Nothing happens: memory", "", "idle, memory"),
)
"""An empty group: any, as supervisors are watched with 100 disks and the tool as a daemon."""


UNITS: Final = {
    "s": "seconds",
    "ms": "milliseconds",
    "CPU s": "CPU seconds",
    "CPU s/min": "CPU seconds in a minute",
    "MiB": "MiB, shared pages in parts",
}
"""A figure's unit → what is written at an axis."""


def figures_of(found: Measured, bars: Bars) -> list[Figure]:
    """Those who have such a figure."""
    return [
        one
        for one in found.figures
        if one.name == bars.figure and bars.group in ("", one.group) and one.values
    ]


def axis_of(found: Measured, bars: Bars) -> str:
    """What is written at the axis: as the figures say. Raises ValueError if they do not agree."""
    if bars.ratio:
        return "times the floor of the same round"
    units = {one.unit for one in figures_of(found, bars)}
    if len(units) != 1:
        raise ValueError(f"{bars.figure!r} is measured in {', '.join(sorted(units))}, not in one")
    return UNITS[units.pop()]


def rows_of(found: Measured, bars: Bars) -> list[Row]:
    """Those who have such a figure, each once."""
    rows: dict[str, Row] = {}
    for one in figures_of(found, bars):
        values = one.ratios if bars.ratio else one.values
        if bars.ratio and one.who == FLOOR:
            values = [1.0]
        values = [value for value in values if value > 0]  # below what the kernel counts
        if values:
            middle = Figure(one.group, one.name, one.who, values=values).median
            rows[one.who] = Row(one.who, min(values), middle, max(values), one.who == TOOL)
    return list(rows.values())


def by_disks(found: Measured) -> Curve | None:
    """How a cold start grows, ours and the floor, from the groups of disks."""
    series = []
    for who in (TOOL, FLOOR):
        points = [
            (float(one.group.split()[0]), one.median)
            for one in found.figures
            if (one.name, one.who) == (COLD, who)
            and one.values
            and re.fullmatch(r"\d+ disks?", one.group)
        ]
        series.append(Series(who, sorted(points)))
    if min(len(one.points) for one in series) < 2:
        return None
    return Curve("cold-by-disks", "A cold start by the number of disks", "disks", "seconds", series)


def curves_of(found: Measured) -> list[Curve]:
    """Every curve that can be drawn."""
    cold = by_disks(found)
    every = [*([cold] if cold else []), *found.curves]
    return [curve for curve in every if any(usable(one) for one in curve.series)]


def usable(series: Series) -> list[tuple[float, float]]:
    """Its points on logarithmic axes."""
    return [(x, y) for x, y in series.points if x > 0 and y > 0]


def drawn(found: Measured, theme: Theme) -> dict[str, str]:
    """Name → picture."""
    pictures = {}
    for bars in BARS:
        if rows := rows_of(found, bars):
            pictures[bars.name] = svg.dots(theme, bars.title, axis_of(found, bars), rows, bars.mark)
    for curve in curves_of(found):
        given = [Line(one.who, usable(one), exponent(one)) for one in curve.series if usable(one)]
        pictures[slug(curve.name)] = svg.lines(theme, curve.title, curve.x, curve.y, given)
    return pictures


def exponent(series: Series) -> str:
    """What is written at the end of a line."""
    grows = series.exponent
    return f"grows by the power of {grows:.2f}" if grows is not None else ""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# -- the page


def sections(document: Mapping[str, Any], found: Measured) -> dict[str, str]:
    """Name of a marker → what stands there."""
    said = {"facts": facts(document), "targets": wanted(found), "groups": groups(found)}
    for bars in BARS:
        if rows := rows_of(found, bars):
            said[bars.name] = shown(bars.name, bars.title) + table(
                ("", axis_of(found, bars)), [(row.who, _cell(row)) for row in sorted_rows(rows)]
            )
    for curve in curves_of(found):
        said[slug(curve.name)] = shown(slug(curve.name), curve.title) + grown(curve)
    known = {bars.name for bars in BARS} | {"cold-by-disks"}
    more = [slug(curve.name) for curve in found.curves if slug(curve.name) not in known]
    said["curves"] = "\n".join(said[name] for name in more if name in said)
    return said


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.median, row.who))


def _cell(row: Row) -> str:
    return span([row.low, row.median, row.high])


def shown(name: str, title: str) -> str:
    """A picture on a page, by what the page's reader has set."""
    path = f"{FOLDER}/{name}"
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">\n'
        f'  <img alt="{title}" src="{path}-light.svg">\n'
        "</picture>\n\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def grown(curve: Curve) -> str:
    """A curve's points."""
    places = sorted({x for one in curve.series for x, _ in one.points})
    rows = []
    for one in curve.series:
        at = dict(one.points)
        cells = [number(at[x]) if x in at else "" for x in places]
        grows = one.exponent
        rows.append((one.who, *cells, "" if grows is None else f"{grows:.2f}"))
    head = (f"{curve.y} by {curve.x}", *(svg.short(x) for x in places), "exponent")
    return table(head, rows)


def facts(document: Mapping[str, Any]) -> str:
    """The machine, and how many rounds."""
    rows = [("rounds", str(document["runs"]))]
    for name, value in document["machine"].items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        elif isinstance(value, float):
            value = number(value)
        rows.append((name.replace("_", " "), str(value)))
    return table(("what", "here"), rows)


def wanted(found: Measured) -> str:
    """The targets, and whether they are met."""
    rows = [
        (one.said, f"≤ {number(one.limit)}", number(one.found), "met" if one.met else "missed")
        for one in targets(found)
    ]
    return table(("target", "wanted", "found", ""), rows) if rows else ""


def groups(found: Measured) -> str:
    """Every figure."""
    out = []
    for group in dict.fromkeys(one.group for one in found.figures):
        rows = [
            (
                one.name,
                one.who,
                f"{span(one.values)} {one.unit}" if one.values else one.note or "not measured",
                span(one.ratios) if one.ratios else "",
            )
            for one in found.figures
            if one.group == group
        ]
        head = ("figure", "who", "median (least–greatest)", "by the floor")
        summary = f"<summary>{group}: every figure</summary>"
        out.append(f"<details>{summary}\n\n{table(head, rows)}\n</details>\n")
    return "\n".join(out)


def filled(page: str, said: Mapping[str, str]) -> str:
    """The page with what stands between its markers written anew."""

    def one(match: re.Match[str]) -> str:
        body = said.get(match["name"]) or "Not measured in this run.\n"
        return f"{match['begin']}\n{body}\n{match['end']}"

    return _MARK.sub(one, page)


def files(docs: Path, document: Mapping[str, Any], found: Measured) -> dict[Path, str]:
    """What the page and its pictures are to be."""
    page = docs / "performance.md"
    written = {page: filled(page.read_text(), sections(document, found))}
    for theme in (LIGHT, DARK):
        for name, picture in drawn(found, theme).items():
            written[docs / FOLDER / f"{name}-{theme.name}.svg"] = picture
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="default docs/")
    options = parser.parse_args(arguments)
    try:
        document, found = read(options.json)
    except (OSError, json.JSONDecodeError, ValueError) as error:
        print(f"cannot draw {options.json}: {error}; run: make bench", file=sys.stderr)
        return 1
    folder = options.docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    if options.json.resolve() != kept.resolve():
        shutil.copyfile(options.json, kept)
    written = files(options.docs, document, found)
    for path in folder.glob("*.svg"):
        if path not in written:
            path.unlink()
    for path, content in written.items():
        path.write_text(content)
    print(f"{options.docs / 'performance.md'}: {len(written) - 1} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
