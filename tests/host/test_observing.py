"""What the daemon tells systemd, line by line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from reconciler.cli.observing import Told
from reconciler.host import systemd
from reconciler.host.store import Store, StoreError


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []

    def notify(*said: str) -> bool:
        lines.extend(said)
        return True

    monkeypatch.setattr(systemd, "notify", notify)
    yield lines
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def test_who_does_not_move_does_not_say_that_it_lives(heard: list[str]) -> None:
    told = Told()
    told.ready("1 VMs, 1 exports")
    told.beat("1 VMs, 1 exports", ())
    assert heard == [
        "READY=1",
        "STATUS=1 VMs, 1 exports",
        "WATCHDOG=1",
        "STATUS=1 VMs, 1 exports",
    ]
    heard.clear()
    told.trouble = lambda: "no resync for 600 s"
    told.beat("1 VMs, 1 exports", ())
    assert heard == ["STATUS=no resync for 600 s"]


def test_a_config_that_is_read_again_makes_nobody_ready(heard: list[str]) -> None:
    told = Told()
    told.reloading()
    told.reloaded()
    assert heard[0] == "RELOADING=1" and heard[1].startswith("MONOTONIC_USEC=")
    assert "READY=1" not in heard
    told.ready("")
    heard.clear()
    told.reloading()
    told.reloaded()
    assert heard[-1] == "READY=1"


def test_a_store_that_fails_keeps_nobody_from_healing(
    heard: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    from reconciler.core.settings import Notify
    from reconciler.notifier import Notifier

    class Broken:
        hub = "h"

        def notices(self) -> None:
            raise StoreError("cannot read the store", "Store")

    store: Store = Broken()  # type: ignore[assignment]
    told = Told()
    told.notifier = Notifier(store, lambda: Notify(url="http://a"), lambda: None, print)
    told.gone(store, ["ctx-1"], 1.0)
    assert "cannot note who is to be told" in capfd.readouterr().err
