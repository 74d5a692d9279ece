#!/usr/bin/env python3
"""Whether the tool has become dearer: medians of ratios, beside those of bench/baseline.json.

python -m bench.guard [--runs 5] [--update]

CPU seconds alone, each by that of `python -c 'import click'` right beside it: by the clock, a busy
machine would cry wolf. More than 25 % above the baseline is an error, and exit 1; more than 25 %
below it, the baseline can be written anew. It takes about half a minute and needs no peers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.bench import APPLIED, COMMANDS, Round, learned
from bench.clients import Appliance
from bench.figures import Rounds, aligned, number
from bench.hubs import IMPORT_CLICK, Floor, Site
from bench.workplace import HERE, BenchError, Took, carried_out, reconciler, timed, told, workplace

BASELINE: Final = HERE / "baseline.json"
FORMAT_VERSION: Final = "1.0"
TOLERANCE: Final = 1.25
"""How many times the baseline a median may be."""
DISKS: Final = 20
BESIDE: Final = 3
"""Starts of `import click` before and after a round; the least counts, as nothing makes it less."""
PROFILE: Final = "make bench ARGS='--disks 100 --profile'"


def measured(runs: int) -> dict[str, list[float]]:
    """What is guarded → its ratio in each round. Raises BenchError."""
    found: dict[str, list[float]] = {}
    with workplace() as root:
        site = Site(root / "site", DISKS, reconciler(), Appliance())
        floor = Floor(site, learned(site))
        for number_ in range(runs):
            told(f"round {number_ + 1} of {runs}")
            for name, cpu in a_round(site, floor).items():
                found.setdefault(name, []).append(cpu)
    return found


def a_round(site: Site, floor: Floor) -> dict[str, float]:
    """Everything once, by `import click`."""
    clicks = [timed(IMPORT_CLICK, site.root).cpu for _ in range(BESIDE)]
    seen = Round(site, floor, Rounds("")).ours()
    spent = {name: took.cpu for name, took in seen.items() if isinstance(took, Took)}
    site.fresh()
    spent |= {f"{line}, nothing applied": site.run(*line.split()).cpu for line in COMMANDS}
    site.apply()
    spent |= {f"{line}, applied": site.run(*line.split()).cpu for line in APPLIED}
    site.stop()
    clicks += [timed(IMPORT_CLICK, site.root).cpu for _ in range(BESIDE)]
    least = min(clicks)
    return {name: cpu / least for name, cpu in spent.items()}


def judged(
    baseline: Mapping[str, float], found: Mapping[str, Sequence[float]]
) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """Rows of a table; what has become dearer, and what cheaper, than the baseline allows."""
    rows: list[tuple[str, ...]] = [("", "baseline", "now", "by it")]
    dearer, cheaper = [], []
    for name in sorted({*baseline, *found}):
        if name not in found or name not in baseline:
            where = "not measured any more" if name not in found else "not in the baseline"
            dearer.append(name)
            rows.append((name, where, "", ""))
            continue
        before, now = baseline[name], statistics.median(found[name])
        rows.append((name, number(before), number(now), f"{now / before:.2f}"))
        if now > before * TOLERANCE:
            dearer.append(name)
        elif now * TOLERANCE < before:
            cheaper.append(name)
    return rows, dearer, cheaper


def read(path: Path) -> dict[str, float]:
    """The ratios of a baseline. Raises BenchError."""
    try:
        value = json.loads(path.read_text())
        if value["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {value['format_version']!r}, not {FORMAT_VERSION}")
        return {str(name): float(ratio) for name, ratio in value["ratios"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"cannot read {path}: {error}; write it: --update") from error


def write(path: Path, found: Mapping[str, Sequence[float]]) -> None:
    """A baseline of the medians."""
    ratios = {name: round(statistics.median(values), 2) for name, values in sorted(found.items())}
    value = {"format_version": FORMAT_VERSION, "by": "import click, CPU", "ratios": ratios}
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds, default 5")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help=f"default {BASELINE}")
    parser.add_argument("--update", action="store_true", help="write the baseline anew")
    options = parser.parse_args(arguments)
    return carried_out(lambda: whole(options))


def whole(options: argparse.Namespace) -> int:
    """Measure, then judge or write. Raises BenchError."""
    baseline = {} if options.update else read(options.baseline)
    found = measured(options.runs)
    if options.update:
        write(options.baseline, found)
        print(f"{options.baseline}: {len(found)} ratios, of {options.runs} rounds")
        return 0
    rows, dearer, cheaper = judged(baseline, found)
    print("\n".join(aligned(rows)))
    if cheaper:
        print(f"\ncheaper than the baseline: {', '.join(cheaper)}; tighten it: --update")
    for name in dearer:
        told(f"error: {name}: dearer than the baseline allows; where it goes: {PROFILE}")
    return 1 if dearer else 0


if __name__ == "__main__":
    sys.exit(main())
