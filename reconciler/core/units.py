"""Quantities as people write them, and as programs use them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, TypeAlias

from msgspec import Struct

Seconds: TypeAlias = float
"""A span of time, or a moment as seconds since the epoch."""
Bytes: TypeAlias = int
Port: TypeAlias = int

SECTOR: Final[Bytes] = 512
"""qemu-nbd exports whole sectors and rounds a size up to them. Source: measured, qemu-nbd 7.2."""

_BINARY: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE: Final = re.compile(
    r"\s*(\d{1,24})(?:\.(\d{1,24}))?\s*(?:([KMGTP])(?:iB|B)?|B)?\s*", re.IGNORECASE | re.ASCII
)
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s*(ms|s|m|h|d)", re.ASCII)


def parse_size(text: str | int) -> Bytes:
    """Bytes from `40GiB`, `512M`, `1.5T` or a plain number. K, M, G… are powers of 1024.

    Decimal units (`40GB`) are refused, not guessed: half of the readers would be wrong by 7 %.
    Raises ValueError.
    """
    if isinstance(text, bool):
        raise ValueError(f"cannot read size {text!r}: write it like 40GiB")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"cannot use size {text}: it is negative")
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read size {text!r}: write it like 40GiB, 512MiB or 1048576")
    whole, fraction, unit = match.group(1), match.group(2), (match.group(3) or "").upper()
    if re.search(r"[KMGTP]B\s*$", text, re.IGNORECASE | re.ASCII):
        raise ValueError(
            f"cannot tell whether {text!r} means powers of 1000 or of 1024: "
            f"write {whole}{unit}iB for powers of 1024, or the number of bytes"
        )
    if fraction and not unit:
        raise ValueError(f"cannot use size {text!r}: bytes come whole")
    size = int(whole) * _BINARY[unit]
    if fraction:
        size += int(fraction) * _BINARY[unit] // 10 ** len(fraction)
    return size


def whole_sectors(size: Bytes) -> Bytes:
    """`size`, or the next multiple of a sector above it."""
    return -(-size // SECTOR) * SECTOR


def format_size(size: Bytes) -> str:
    """The shortest exact form with a binary unit, else one decimal: `40 GiB`, `1.5 MiB`."""
    for unit, factor in (("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= factor:
            if size % factor == 0:
                return f"{size // factor} {unit}"
            tenths = (size * 10 + factor // 2) // factor  # whole numbers: a float ends at 10^308
            return f"{tenths // 10}.{tenths % 10} {unit}"
    if size >= 1024 and size % 1024 == 0:
        return f"{size // 1024} KiB"
    return f"{size} bytes"


def parse_duration(text: str | int | float) -> Seconds:
    """Seconds from `10s`, `1h30m`, `250ms`, or a plain number of seconds. Raises ValueError."""
    if isinstance(text, bool):
        raise ValueError(f"cannot read duration {text!r}: write it like 10s or 1h30m")
    if isinstance(text, int | float):
        if not 0 <= text < 1e12:
            raise ValueError(f"cannot use duration {str(text)[:20]}: it is negative or endless")
        return float(text)
    compact = text.strip().lower()
    parts = list(_DURATION.finditer(compact))
    if not parts or "".join(part.group(0) for part in parts) != compact:
        bare = compact.isascii() and compact.isdigit() and len(compact) <= 12
        like = f"{compact}s, {compact}m or {compact}h" if bare else "10s, 5m or 1h30m"
        unit = " without a unit" if bare else ""
        raise ValueError(f"cannot read duration {text!r}{unit}: write it like {like}")
    return sum(float(part.group(1)) * _SECONDS[part.group(2)] for part in parts)


def parse_moment(text: str, now: Seconds) -> Seconds:
    """A moment after `now`: a span from it, such as `2h`, or `2026-11-26T06:00`, which is local
    time unless it says its zone. Raises ValueError."""
    try:
        moment = now + parse_duration(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip()).timestamp()
        except (ValueError, OverflowError, OSError) as error:
            raise ValueError(
                f"cannot read moment {text!r}: write it like 2h or 2026-11-26T06:00"
            ) from error
    if moment <= now:
        raise ValueError(f"cannot use {text}: {stamp(moment)} is not later than now, {stamp(now)}")
    try:
        stamp(moment)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"cannot use {text}: no calendar goes that far") from error
    return moment


def format_duration(seconds: Seconds) -> str:
    """A span for people, two units at most: `340 ms`, `12 s`, `3 min 20 s`, `2 h 5 min`, `4 d`."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))} ms"
    total = round(seconds)
    days, hours, minutes, rest = (
        total // 86400,
        total // 3600 % 24,
        total // 60 % 60,
        total % 60,
    )
    if days:
        return f"{days} d {hours} h" if hours else f"{days} d"
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    if minutes:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{rest} s"


def stamp(moment: Seconds) -> str:
    """RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PortRange(Struct, frozen=True):
    """The TCP ports that exports may use, both ends included."""

    first: Port
    last: Port

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __iter__(self) -> Iterator[Port]:
        return iter(range(self.first, self.last + 1))

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """From `10100-10200`. Raises ValueError."""
        match = re.fullmatch(r"\s*(\d{1,5})\s*-\s*(\d{1,5})\s*", text)
        if match is None:
            raise ValueError(f"cannot read port range {text!r}: write it like 10100-10200")
        first, last = int(match.group(1)), int(match.group(2))
        if not 1 <= first <= last <= 65535:
            raise ValueError(
                f"cannot use port range {text!r}: it must rise and stay within 1-65535"
            )
        return cls(first, last)


class Endpoint(Struct, frozen=True):
    """Where somebody listens: an IP address, or `localhost`, and a TCP port."""

    host: str
    port: Port

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Nobody outside this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """From `127.0.0.1:8082`, `localhost:8082` or `[::1]:8082`. Raises ValueError."""
        match = re.fullmatch(
            r"(\[[0-9A-Fa-f:]{2,39}\]|[A-Za-z0-9.-]{1,253}):(\d{1,5})", text, re.ASCII
        )
        if match is None:
            raise ValueError(f"cannot read {text!r}: write HOST:PORT, like 127.0.0.1:8082")
        host, port = match.group(1).strip("[]"), int(match.group(2))
        if host[0].isdigit() and "[" not in text:
            parts = host.split(".")
            if len(parts) != 4 or not all(part.isdigit() and int(part) < 256 for part in parts):
                raise ValueError(f"cannot use {host!r}: it is no IPv4 address like 127.0.0.1")
        if not 1 <= port <= 65535:
            raise ValueError(f"cannot use port {port}: it must be within 1-65535")
        return cls(host, port)


@lru_cache(maxsize=20_000)
def natural(text: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts ctx-2 before ctx-10."""
    parts = filter(None, re.split(r"(\d+)", text))
    return tuple(
        (0, int(part)) if part.isdecimal() and len(part) <= 18 else (1, part) for part in parts
    )
