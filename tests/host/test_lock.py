"""Waiting for the lock: who has it is told if that lasts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from reconciler.core.errors import LockError
from reconciler.host import lock
from reconciler.host.lock import Holder, held


@pytest.mark.parametrize(("patience", "told"), [(0.0, True), (600.0, False)])
def test_a_short_wait_is_not_worth_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float, told: bool
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", patience)
    path = tmp_path / "lock"
    heard: list[Holder | None] = []
    tried, got = threading.Event(), threading.Event()

    def wait() -> None:
        tried.set()
        with held(path, "second", 60.0, heard.append):
            got.set()

    waiter = threading.Thread(target=wait)
    with held(path, "first", 0.0):
        waiter.start()
        assert tried.wait(20)
        while told and not heard:
            assert not got.wait(0.01)
    assert got.wait(20)
    waiter.join(20)
    assert [one.command for one in heard if one] == (["first"] if told else [])


def test_who_holds_it_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        held(path, "first", 0.0),
        pytest.raises(LockError, match=r"\(first\)"),
        held(path, "second", 0.0),
    ):
        pass
    assert lock.holder(path) is None
