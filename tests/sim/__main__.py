"""`python -m tests.sim`: live many lives, or look at one; see engine.py."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.sim.engine import Script, Total, broken, live_many, script_from, script_of, told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many")
    parser.add_argument("--from", type=int, default=0, metavar="SEED", dest="first")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--show", type=int, metavar="SEED", help="print what a seed draws")
    parser.add_argument("--script", metavar="FILE", help="live a script; `-` is stdin")
    options = parser.parse_args(arguments)
    if options.show is not None:
        print(script_of(options.show).to_json())
        return 0
    if options.script:
        text = sys.stdin.read() if options.script == "-" else Path(options.script).read_text()
        return one(script_from(json.loads(text)))
    return many(options.first, options.seeds, options.jobs)


def one(script: Script) -> int:
    """Live a script as it is."""
    found = broken(script)
    print(f"breaks: {found}" if found else "it breaks nothing")
    return 1 if found else 0


def many(first: int, count: int, jobs: int) -> int:
    """Live the seeds; the shortened script of the first that fails."""
    total, began = Total(), time.monotonic()
    for part in live_many(first, count, jobs):
        total.add(part)
        rate = total.seeds / (time.monotonic() - began)
        if sys.stderr.isatty():
            print(f"\r{total.seeds} of {count} seeds, {rate:.0f}/s ", end="", file=sys.stderr)
        if total.failed:
            break
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{total}, {total.seeds / (time.monotonic() - began):.0f} seeds/s")
    for seed, found in total.failed:
        print(told(script_of(seed), found))
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
