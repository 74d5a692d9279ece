"""Failures in a row → seconds to rest."""

from __future__ import annotations

import zlib
from typing import Final

from reconciler.core.units import Seconds

FIRST: Final[Seconds] = 2.0
LONGEST: Final[Seconds] = 300.0
"""A tunnel that is down for hours is asked about every five minutes."""
JITTER: Final = 0.1
"""How much longer a rest may be, as a part of it: so what failed together is tried one by one."""
CRASH_LOOP: Final = 5
"""Deaths in a row, each soon after the start, that are no accident any more."""


def pause(failures: int) -> Seconds:
    """2, 4, 8 … 300 s. 0 after no failure."""
    return _doubled(FIRST, failures)


def rest(deaths: int, *who: object) -> Seconds:
    """1, 2, 4 … 300 s, with jitter: how long a server lives at least if it is not to be waited for.

    0 after no death. `who`: what is rested; the same has the same jitter.
    """
    return jittered(_doubled(FIRST / 2, deaths), *who, deaths)


def jittered(seconds: Seconds, *who: object) -> Seconds:
    """Up to a tenth longer, for each another part of that; the same every time."""
    part = zlib.crc32(repr(who).encode()) / 0xFFFFFFFF
    return seconds * (1 + JITTER * part)


def _doubled(first: Seconds, times: int) -> Seconds:
    return float(min(LONGEST, first * 2 ** min(times - 1, 16))) if times > 0 else 0.0
