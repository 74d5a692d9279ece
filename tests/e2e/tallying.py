"""Runs a command line, and writes down how often each pass of a daemon does what costs: a program.

    python tallying.py FILE watch …

FILE gets a line of JSON per pass: `of` (`resync`, `look`), `vm`, and the counts: of what the thread
of the pass does itself.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reconciler import daemon
from reconciler.core.queue import Item
from reconciler.execute import Step
from reconciler.host import nbd, patience, proc, qemu_nbd

mine = threading.local()


def tell(what: str, times: int = 1) -> None:
    if (counts := getattr(mine, "counts", None)) is not None:
        counts[what] += times


def counted(where: Any, name: str, what: str) -> None:
    real = getattr(where, name)

    def told(*arguments: Any, **options: Any) -> Any:
        tell(what)
        return real(*arguments, **options)

    setattr(where, name, told)


def each(where: Any, name: str, what: str, many: Callable[[Any], int]) -> None:
    """The same, by how much is asked at once."""
    real = getattr(where, name)

    def told(first: Any, *arguments: Any, **options: Any) -> Any:
        tell(what, many(first))
        return real(first, *arguments, **options)

    setattr(where, name, told)


def connect(*arguments: Any, real: Any = sqlite3.connect, **options: Any) -> sqlite3.Connection:
    found: sqlite3.Connection = real(*arguments, **options)

    def told(statement: str) -> None:
        if statement.startswith("BEGIN IMMEDIATE"):
            tell("commits")
        elif statement.startswith("SELECT"):
            tell("questions to the store")

    found.set_trace_callback(told)
    return found


def main(file: Path, line: Sequence[str]) -> None:
    sqlite3.connect = connect  # type: ignore[assignment]
    counted(proc, "processes", "passes over /proc")
    counted(proc, "tcp_sockets", "questions to the kernel for sockets")
    counted(qemu_nbd, "spawn", "servers started")
    counted(threading.Thread, "start", "threads started")
    each(nbd, "handshake", "handshakes", len)
    each(patience, "ask", "roots asked", len)
    resync, at = daemon.Daemon.resync, daemon.Daemon._look_at
    mutex = threading.Lock()

    def passed(of: str, vm: str, work: Callable[[], Any]) -> Any:
        mine.counts = Counter()
        try:
            return work()
        finally:
            counts, mine.counts = mine.counts, None
            with mutex, file.open("a") as out:
                print(json.dumps({"of": of, "vm": vm, **counts}), file=out)

    def one(self: daemon.Daemon, item: Item, steps: list[Step]) -> Any:
        return passed("look", item.name, lambda: at(self, item, steps))

    daemon.Daemon.resync = lambda self: passed("resync", "", lambda: resync(self))  # type: ignore[method-assign]
    daemon.Daemon._look_at = one  # type: ignore[method-assign]
    from reconciler.cli.main import run

    sys.exit(run(list(line)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
