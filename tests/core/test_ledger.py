"""The calls of a hub: all of them are there, and few of them are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.call import Call, CallState
from reconciler.core.ledger import Calls, Head, head_of
from tests.core.builders import a_call, a_vm, remembered

S = CallState


def a_run(
    vm: str, run: str, state: CallState = S.COMPLETED, attempt: int = 1, at: float = 1.0
) -> Call:
    return replace(a_call(a_vm(vm, run=run), state), attempt=attempt, changed=at)


NIGHTS: Final = [
    *(a_run(f"ctx-{vm}", f"r{night}", at=float(night)) for night in range(6) for vm in range(3)),
    a_run("ctx-0", "r6", S.CANCELLED, at=6.0),
    a_run("ctx-1", "r6", S.FAILED, at=6.0),
    a_run("ctx-0", "r6", S.ACCEPTED, attempt=2, at=7.0),
    a_run("ctx-2", "r6", S.DUE, at=6.0),
]


class Shelf:
    """Where calls are loaded from, one by one noted."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self.there = {call.key: call for call in calls}
        self.asked: list[tuple[str, str, int]] = []

    def load(self, heads: Sequence[Head]) -> list[Call]:
        self.asked += [head[:3] for head in heads]
        return [self.there[head[:3]] for head in heads]

    def calls(self) -> Calls:
        return Calls([head_of(call) for call in self.there.values()], self.load)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(NIGHTS)


def test_a_look_loads_open_calls_and_the_newest_of_each_vm(shelf: Shelf) -> None:
    calls = shelf.calls()
    calls.warm(shelf.load)
    assert sorted(shelf.asked) == [
        ("ctx-0", "r6", 1), ("ctx-0", "r6", 2), ("ctx-1", "r5", 1),
        ("ctx-1", "r6", 1), ("ctx-2", "r5", 1), ("ctx-2", "r6", 1),
    ]  # fmt: skip
    ledger = replace(remembered(), calls=calls)
    assert [call.key for call in ledger.open] == [("ctx-0", "r6", 2), ("ctx-2", "r6", 1)]
    assert ledger.completed_runs("ctx-1") == ["r0", "r1", "r2", "r3", "r4", "r5"]
    assert len(shelf.asked) == 6


def test_a_call_is_loaded_once_and_when_it_is_asked_for(shelf: Shelf) -> None:
    ledger = replace(remembered(), calls=shelf.calls())
    for _ in range(2):
        found = ledger.latest("ctx-1", "r2")
        assert found == shelf.there["ctx-1", "r2", 1]
    assert shelf.asked == [("ctx-1", "r2", 1)]
    assert ledger.latest("ctx-1", "r99") is None
    assert ledger.latest("ctx-9", "r2") is None


def test_all_calls_are_there(shelf: Shelf) -> None:
    calls = shelf.calls()
    assert len(calls) == len(NIGHTS)
    assert shelf.asked == []
    assert calls[-1] == NIGHTS[-1]
    assert calls[2:4] == NIGHTS[2:4]
    assert list(calls) == NIGHTS
    assert calls == tuple(NIGHTS)
    assert calls != NIGHTS[1:]
    with pytest.raises(IndexError):
        calls[len(NIGHTS)]
    assert len(shelf.asked) == len(NIGHTS)


def test_a_ledger_of_values_answers_as_one_that_loads(shelf: Shelf) -> None:
    lazy, plain = replace(remembered(), calls=shelf.calls()), remembered(calls=NIGHTS)
    assert lazy == plain
    for vm in ("ctx-0", "ctx-1", "ctx-2", "ctx-9"):
        assert lazy.runs(vm) == plain.runs(vm) == [call for call in NIGHTS if call.vm == vm]
        assert lazy.active(vm) == plain.active(vm)
        for run in ("r0", "r6"):
            assert lazy.latest(vm, run) == plain.latest(vm, run)
            assert lazy.attempt(vm, run) == plain.attempt(vm, run)
    assert plain.attempt("ctx-0", "r6") == 2


def test_a_call_is_put_in_the_place_of_itself(shelf: Shelf) -> None:
    before = replace(remembered(), calls=shelf.calls())
    ended = a_run("ctx-2", "r6", S.COMPLETED, at=9.0)
    new = a_run("ctx-9", "r0", S.DUE)
    after = before.put([ended, new])
    assert [call.key for call in after.open] == [("ctx-0", "r6", 2), ("ctx-9", "r0", 1)]
    assert after.completed_runs("ctx-2")[-1] == "r6"
    assert after.latest("ctx-2", "r6") == ended
    assert len(after.calls) == len(NIGHTS) + 1
    assert [call.key for call in before.open] == [("ctx-0", "r6", 2), ("ctx-2", "r6", 1)]


calls_of_a_hub = st.lists(
    st.builds(
        a_run,
        st.sampled_from(["ctx-0", "ctx-1"]),
        st.sampled_from(["r0", "r1", "r2"]),
        st.sampled_from(list(CallState)),
        st.integers(1, 3),
        st.integers(0, 9).map(float),
    ),
    unique_by=lambda call: call.key,
    max_size=12,
)


@given(calls_of_a_hub)
def test_what_is_asked_of_a_ledger_is_what_its_calls_say(calls: list[Call]) -> None:
    ledger = replace(remembered(), calls=Shelf(calls).calls())
    assert list(ledger.open) == [call for call in calls if not call.state.terminal]
    for vm in ("ctx-0", "ctx-1"):
        own = [call for call in calls if call.vm == vm]
        active = [call for call in own if call.state.active]
        assert ledger.active(vm) == (active[0] if active else None)
        done = [call for call in own if call.state is S.COMPLETED]
        assert sorted(ledger.completed_runs(vm)) == sorted(call.run for call in done)
        for run in ("r0", "r1", "r2"):
            attempts = [call for call in own if call.run == run]
            newest = max(attempts, key=lambda call: call.attempt, default=None)
            assert ledger.latest(vm, run) == newest
