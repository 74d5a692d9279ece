"""The simulation finds bugs that are planted for it, by what they do to the world."""

from __future__ import annotations

import pytest

from tests.sim.engine import broken, script_of, shorten
from tests.sim.invariants import ALWAYS, APPLIED, QUIET
from tests.sim.planted import BUGS, WITHIN, Bug, the_post_is_sent_again_on_a_time_out


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__)
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bug.breaks <= {*ALWAYS, *APPLIED, *QUIET}
    with monkeypatch.context() as patch:
        bug.plant(patch)
        for seed in range(WITHIN):
            found = broken(script_of(seed))
            if found and found.invariant in bug.breaks:
                break
        else:
            pytest.fail(f"{WITHIN} lives went well with it")
    assert broken(script_of(seed)) is None, "the same life breaks something without it"


def test_what_a_planted_bug_needs_is_shown_without_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    the_post_is_sent_again_on_a_time_out(monkeypatch)
    failures = ((seed, broken(script_of(seed))) for seed in range(WITHIN))
    seed, found = next((seed, found) for seed, found in failures if found)
    short = shorten(script_of(seed), found.invariant)
    again = broken(short)
    assert again is not None
    assert again.invariant == found.invariant
    assert len(short.events) <= 3, short.to_json()
