"""The real command, stopped dead at one of its effects; run in a process of its own.

    python -m tests.crashing --at SPAWN:after:2 -- apply -y
        SIGKILL at the second such moment
    python -m tests.crashing --hold 2 -- apply -y
        SIGKILL when the second server has been spawned, which is held before its exec
    python -m tests.crashing --record FILE -- apply -y
        no SIGKILL: write the moments down

A moment that does not come is a command that ends as it would have.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from reconciler.cli.main import run
from reconciler.host import effects
from reconciler.host.effects import Effect, Side

_STAT_STATE: Final = 2
"""Index of a process's state in /proc/PID/stat, where its name has no blank. Source: proc(5)."""


class Point(NamedTuple):
    """The n-th time that an effect of one command begins or has happened."""

    effect: Effect
    side: Side
    number: int

    def __str__(self) -> str:
        return f"{self.effect.name}:{self.side}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Point:
        """Raises ValueError, KeyError."""
        name, side, number = text.split(":")
        return cls(Effect[name], Side(side), int(number))


def die() -> NoReturn:
    """End this process as a pulled plug does: no handler, no `finally`, no other thread."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:  # the signal is on its way to this thread too
        time.sleep(1)


class Crasher:
    """Counts every effect, remembers them in their order, and dies at one."""

    def __init__(self, at: Point | None) -> None:
        self.at = at
        self.seen: list[Point] = []
        self._counts: Counter[tuple[Effect, Side]] = Counter()
        self._mutex = threading.Lock()

    def __call__(self, effect: Effect, side: Side) -> None:
        with self._mutex:  # held while dying: no other effect begins meanwhile
            self._counts[effect, side] += 1
            point = Point(effect, side, self._counts[effect, side])
            self.seen.append(point)
            if point == self.at:
                die()


def hold_spawns(number: int) -> None:
    """Stop the n-th server between its spawn and its exec, and die."""
    spawn: Any = os.posix_spawn
    counter = itertools.count(1)
    mutex = threading.Lock()

    def held(*arguments: Any, **options: Any) -> int:
        with mutex:
            if next(counter) != number:
                pid: int = spawn(*arguments, **options)
                return pid
            while True:
                pid = spawn(*arguments, **options)
                os.kill(pid, signal.SIGSTOP)
                os.waitpid(pid, os.WUNTRACED)
                stopped = Path(f"/proc/{pid}/stat").read_text().split()[_STAT_STATE] == "T"
                if stopped and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sh\0-c\0"):
                    die()
                os.kill(pid, signal.SIGKILL)  # it was too quick: that is a server already
                os.waitpid(pid, 0)

    os.posix_spawn = held


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crashing")
    parser.add_argument("--at", type=Point.parse)
    parser.add_argument("--hold", type=int)
    parser.add_argument("--record", type=Path)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    crasher = Crasher(options.at)
    effects.hook = crasher
    if options.hold:
        hold_spawns(options.hold)
    code = run(options.command)
    if options.record:
        options.record.write_text("".join(f"{point}\n" for point in crasher.seen))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
