"""The recorded conversations, over a real store, with the daemon's part played."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.api.played import Played
from tests.conversations import Conversation, cases

CASES = cases()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    monkeypatch.chdir(tmp_path)
    found = Played(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("name", CASES)
def test_a_conversation(hub: Played, name: str) -> None:
    case = CASES[name]
    hub.knows(ctx_1=case["vm"])
    hub.declares({"name": "ctx-1", "disks": "inventory"})

    def ask(method: str, path: str, body: object, headers: Mapping[str, str]) -> tuple[int, Any]:
        answer = hub.ask(method, path, body, **headers)
        return answer.status, answer.body

    def until(job: str, status: str) -> None:
        {"running": hub.accepted, "completed": hub.completed}[status](job)

    Conversation(case, "ctx-1", ask, until, looked=lambda _: None).play()
