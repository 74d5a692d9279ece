"""Who may ask for what, and how often."""

from __future__ import annotations

import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.access import (
    ALL,
    OPERATORS,
    SCOPES,
    Access,
    Caller,
    Meter,
    Peer,
    Scope,
    forbidden,
    key,
    sentence,
)

READER = key("reader", "r" * 16, [Scope.READ])
CLIENT = key("client", "c" * 16, [Scope.CALLBACK])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 15, "it has 15 characters, and 16 are the least"),
        ("", "it has 0 characters"),
        ("correct horse battery", "characters that no client can send"),
        ("pässword-pässword", "characters that no client can send"),
        ("x" * 16 + "\n", "characters that no client can send"),
        ("=" * 16, "characters that no client can send"),
    ],
)
def test_a_token_that_cannot_be_used(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        key("a", text, ALL)
    assert not text or text not in str(refusal.value)


@pytest.mark.parametrize("text", ["x" * 16, "AZaz09-._~+/AZaz==", "0" * 4096])
def test_a_token_is_kept_as_a_digest(text: str) -> None:
    one = key("a", text, ALL)
    assert text not in repr(one)
    assert Access(keys=(one,)).holder(text.encode()) == Caller("token a", ALL)


@pytest.mark.parametrize("presented", [b"", b"r" * 15, b"r" * 17, b"R" * 16, b"\xff" * 16])
def test_what_is_not_the_whole_token_is_nobodys(presented: bytes) -> None:
    assert Access(keys=(READER, CLIENT)).holder(presented) is None
    assert Access().holder(presented) is None


def test_every_token_is_compared_whichever_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def counted(one: Any, other: Any) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    known = Access(keys=(READER, CLIENT))
    for presented in (b"r" * 16, b"c" * 16, b"nobody's"):
        compared.clear()
        known.holder(presented)
        assert compared == [READER.digest, CLIENT.digest]


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (Access(), set()),
        (Access(keys=(READER,)), {Scope.READ, Scope.OPERATE}),
        (Access(keys=(READER, CLIENT), callbacks_closed=True), set(SCOPES)),
        (Access(keys=(READER,), loopback=False), set(Scope)),
        (Access(loopback=False), set(Scope)),
    ],
)
def test_who_has_to_say_who_they_are(known: Access, asked: set[Scope]) -> None:
    assert {one for one in Scope if known.asks(one)} == asked


def test_a_token_may_what_its_scopes_say_and_watch() -> None:
    for one in SCOPES:
        caller = Caller("token a", frozenset({one}))
        assert {needed for needed in Scope if caller.may(needed)} == {one, Scope.WATCH}
    assert "needs the scope operate, and token a has callback, read" in forbidden(
        Caller("token a", frozenset({Scope.READ, Scope.CALLBACK})), Scope.OPERATE
    )


@pytest.mark.parametrize(
    ("peer", "scopes"),
    [
        (Peer(0, "root"), ALL),
        (Peer(7, "hub"), ALL),
        (Peer(8, "ann", frozenset({8, 50})), OPERATORS),
        (Peer(8, "ann", frozenset({8})), frozenset()),
        (Peer(50, "", frozenset()), frozenset()),
    ],
)
def test_who_comes_by_the_socket(peer: Peer, scopes: frozenset[Scope]) -> None:
    found = Access(uid=7, group=50).peer(peer)
    assert found.scopes == scopes
    assert found.who == f"uid {peer.uid}{f' ({peer.name})' if peer.name else ''} by the socket"
    if peer.uid == 8:
        assert Access(uid=7).peer(peer).scopes == frozenset()


def test_what_there_is_to_say_of_an_address() -> None:
    said = sentence(loopback=True, tokens=False, callbacks_closed=False)
    assert "no token is asked for" in said
    said = sentence(loopback=True, tokens=True, callbacks_closed=False)
    assert "callbacks are taken without a token" in said
    assert sentence(loopback=True, tokens=True, callbacks_closed=True) == ""
    assert sentence(loopback=False, tokens=True, callbacks_closed=False) == ""


def test_a_meter_lets_a_burst_through_and_then_its_rate() -> None:
    meter = Meter(10.0, burst=3.0)
    assert [meter.take("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.1)]
    assert meter.take("b", 0.0) == 0.0  # another's are another's
    assert meter.take("a", 0.05) == pytest.approx(0.05)
    assert meter.take("a", 0.1) == 0.0
    assert [meter.take("a", 100.0) for _ in range(4)][:3] == [0.0, 0.0, 0.0]  # no more than that
    assert meter.take("a", 100.0) > 0.0


def test_a_meter_keeps_only_so_many_in_mind() -> None:
    meter = Meter(1.0, burst=1.0, most=10)
    for number in range(1000):
        meter.take(number, float(number) / 1000)
    assert len(meter) == 10
    assert meter.take(999, 1.0) > 0.0  # who came last is among them
    assert meter.take(0, 1.0) == 0.0


@given(st.lists(st.floats(min_value=0, max_value=5), max_size=60))
def test_nobody_gets_more_than_the_rate_and_the_burst(steps: list[float]) -> None:
    meter, now, passed = Meter(2.0, burst=4.0), 0.0, 0
    for step in steps:
        now += step
        passed += meter.take("a", now) == 0.0
    assert passed <= 4.0 + 2.0 * now + 1e-6
