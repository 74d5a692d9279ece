"""Waiting for the lock: who has it is told if that lasts."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

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

    def sleep(seconds: float) -> None:
        tried.set()
        time.sleep(seconds)

    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=sleep)
    monkeypatch.setattr(lock, "time", clock)

    def wait() -> None:
        with held(path, "second", 60.0, heard.append):
            got.set()

    waiter = threading.Thread(target=wait)
    with held(path, "first", 0.0):
        waiter.start()
        assert tried.wait(20)  # it has tried, and was told whatever it is told of that
    assert got.wait(20)
    waiter.join(20)
    assert [one.command for one in heard if one] == (["first"] if told else [])
