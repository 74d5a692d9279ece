"""Many requests over many connections, from one thread; and what a process has in use."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ANSWER = 60.0
"""Seconds for one answer, on a machine that is shared."""


class Asked(NamedTuple):
    """What is sent, whole."""

    kind: str
    data: bytes


def request(kind: str, method: str, path: str, body: bytes | None = None, token: str = "") -> Asked:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    if token:
        lines.append(f"Authorization: Bearer {token}")
    return Asked(kind, "\r\n".join([*lines, "", ""]).encode() + (body or b""))


class Load:
    """What came of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        """Kind → how long each answer took."""
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.broken: list[str] = []
        """Connections that ended without an answer."""
        self.took = 0.0

    def quantile(self, part: float, kind: str = "") -> float:
        """Seconds within which that part of all answers (or of a kind's) had come."""
        found = self.seconds[kind] if kind else [*itertools.chain(*self.seconds.values())]
        return sorted(found)[min(len(found) - 1, int(len(found) * part))]


def load(
    host: str, port: int, asked: Sequence[Asked], connections: int, abort_every: int = 0
) -> Load:
    """Ask all of it. `abort_every`: each n-th request is sent, and its answer not waited for."""
    found = Load()
    began = time.monotonic()
    asyncio.run(_all(host, port, enumerate(asked, 1), connections, abort_every, found))
    found.took = time.monotonic() - began
    return found


async def _all(
    host: str,
    port: int,
    asked: Iterator[tuple[int, Asked]],
    connections: int,
    abort_every: int,
    found: Load,
) -> None:
    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for number, (kind, data) in asked:
            began = time.monotonic()
            writer.write(data)
            if abort_every and number % abort_every == 0:
                writer.transport.abort()
                reader, writer = await asyncio.open_connection(host, port)
                continue
            try:
                status, closes = await asyncio.wait_for(_answer(reader), ANSWER)
            except (OSError, EOFError, TimeoutError) as error:
                found.broken.append(f"{kind}: {type(error).__name__}: {error}")
                closes = True
            else:
                found.seconds.setdefault(kind, []).append(time.monotonic() - began)
                found.statuses[kind, status] += 1
            if closes:
                writer.transport.abort()
                reader, writer = await asyncio.open_connection(host, port)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status of an answer, and whether the connection ends with it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
    await reader.readexactly(int(fields.get(b"content-length", b"0")))
    return int(head.split()[1]), fields.get(b"connection") == b"close"


class InUse(NamedTuple):
    """What a process has in use."""

    rss: int
    """KiB."""
    fds: int
    threads: int


def in_use(pid: int) -> InUse:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return InUse(
        int(status["VmRSS"].split()[0]),
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
    )
