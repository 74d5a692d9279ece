"""What a command that waits says of who takes the callbacks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.api import app
from reconciler.cli import hearing
from reconciler.cli.hearing import Ears, WaitingEars
from reconciler.core.settings import Settings
from reconciler.core.units import Endpoint
from reconciler.host.sockets import listening
from tests.core.builders import a_settings
from tests.e2e.site import until


@pytest.fixture
def settings(tmp_path: Path, endpoint: Endpoint) -> Settings:
    return replace(a_settings(), state=str(tmp_path), listen=endpoint)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(hearing, "say", found.append)
    return found


@pytest.fixture
def first(settings: Settings) -> Iterator[Ears]:
    """Another process of the same hub, which listens."""
    found = Ears(settings, "reconciler serve")
    found.open()
    yield found
    found.close()


def test_who_is_alone_listens_and_says_nothing(settings: Settings, said: list[str]) -> None:
    with WaitingEars(settings, "reconciler apply") as ears:
        assert ears.hears
        ears.listen()
    assert said == []


@pytest.mark.parametrize("broken", [False, True])
def test_the_same_hub_is_known_also_by_a_store_that_cannot_be_read(
    settings: Settings, said: list[str], first: Ears, broken: bool
) -> None:
    if broken:
        (Path(settings.state) / "state.db").write_bytes(b"this is no database" * 99)
    with WaitingEars(settings, "reconciler apply") as ears:
        assert ears.hears
        ears.listen()
    assert said == [f"callbacks are taken by {first.about}"]


def test_when_the_other_ends_the_callbacks_are_taken_over(
    settings: Settings, said: list[str], first: Ears
) -> None:
    with WaitingEars(settings, "reconciler apply") as ears:
        first.close()
        ears.listen()
        assert ears.hears
        assert said[1:] == [f"callbacks are taken here now, at {ears.endpoint}"]
        ears.listen()
    assert len(said) == 2


def test_another_hub_is_a_stranger_with_a_name(
    settings: Settings, said: list[str], first: Ears
) -> None:
    with WaitingEars(replace(settings, hub="hub-z"), "reconciler apply") as ears:
        assert not ears.hears
        ears.listen()
    (line,) = said
    assert "the reconciler of hub hub-a, pid " in line
    assert "callbacks are not heard" in line


def test_a_stranger_after_one_of_us_is_told(
    settings: Settings, said: list[str], first: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.api.about.ASK_TIMEOUT", 0.1)
    with WaitingEars(settings, "reconciler apply") as ears:
        first.close()
        with listening(settings.listen.host, settings.listen.port, "x"):
            ears.listen()
            assert not ears.hears
    assert [line.split(":")[0] for line in said] == [
        f"callbacks are taken by {first.about}", "warning",
    ]  # fmt: skip


def test_a_listener_that_breaks_is_told_once_and_kicks(
    settings: Settings, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()

    def broken(*_: object) -> None:
        assert started.wait(20)
        raise RuntimeError("a bug")

    monkeypatch.setattr(app, "create_app", broken)
    with WaitingEars(settings, "reconciler apply") as ears:
        assert ears.hears
        started.set()
        until(ears.kicked.is_set, "a kick")
        assert not ears.hears
        ears.listen()
        ears.listen()
    (line,) = said
    assert line.startswith("warning: cannot take callbacks at")
    assert "RuntimeError: a bug; callbacks are not heard" in line
