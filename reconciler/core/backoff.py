"""Failures in a row → seconds to rest."""

from __future__ import annotations

from typing import Final

from reconciler.core.units import Seconds

FIRST: Final[Seconds] = 2.0
LONGEST: Final[Seconds] = 300.0
"""A tunnel that is down for hours is asked about every five minutes."""


def pause(failures: int) -> Seconds:
    """2, 4, 8 … 300 s. 0 after no failure."""
    if failures <= 0:
        return 0.0
    return float(min(LONGEST, FIRST * 2 ** min(failures - 1, 16)))
