"""How long to rest after failures in a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.backoff import LONGEST, pause


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [
        (-1, 0),
        (0, 0),
        (1, 2),
        (2, 4),
        (3, 8),
        (7, 128),
        (8, 256),
        (9, 300),
        (10, 300),
        (10**9, 300),
    ],
)
def test_each_failure_doubles_the_rest_up_to_five_minutes(failures: int, seconds: float) -> None:
    assert pause(failures) == seconds


@given(st.integers(0, 10**6))
def test_one_more_failure_never_shortens_the_rest(failures: int) -> None:
    assert pause(failures) <= pause(failures + 1) <= LONGEST
