"""How long to rest after failures in a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.backoff import LONGEST, jittered, pause, rest


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


@pytest.mark.parametrize(
    ("deaths", "seconds"), [(0, 0), (1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (10**9, 300)]
)
def test_a_server_rests_for_as_long_as_it_died_often_and_up_to_a_tenth_longer(
    deaths: int, seconds: float
) -> None:
    assert seconds <= rest(deaths, "ctx-1", 2000) <= seconds * 1.1


def test_jitter_is_the_same_for_the_same_and_spreads_what_failed_together() -> None:
    found = {jittered(100.0, f"ctx-{number}", 2000) for number in range(50)}
    assert found == {jittered(100.0, f"ctx-{number}", 2000) for number in range(50)}
    assert len(found) == 50
    assert max(found) - min(found) > 5
