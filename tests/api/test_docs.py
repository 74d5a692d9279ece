"""Every curl line of the pages works as it stands; every answer that is shown has our fields."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel

from reconciler.api.models import JOB, Backup, Chain, ChangeId, Error, Health, Stats
from reconciler.core.call import CallEvent
from tests.api.played import Played
from tests.host.test_inbox import ACCEPTED, an_export

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"docs/api.md": 9, "README.md": 2}
"""Page → how many such lines it has at least."""


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def requests(page: str) -> Iterator[tuple[str, str, Any, dict[str, str]]]:
    """Method, path, body, headers of every curl line that needs no token and no socket."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[:1] != ["curl"] or "Bearer" in line or "--unix-socket" in line:
                continue
            method, body, headers = "GET", None, {}
            url = next(word for word in words if word.startswith("http"))
            for flag, value in pairwise(words):
                if flag == "-X":
                    method = value
                elif flag == "-d":
                    body = json.loads(value)
                elif flag == "-H":
                    name, _, text = value.partition(": ")
                    headers[name] = text
            split = urlsplit(url)
            yield method, f"{split.path}?{split.query}", body, headers


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    monkeypatch.chdir(tmp_path)
    found = Played(tmp_path)
    found.knows(ctx_123={"name": "pgtest1", "disks": {2000: "1MiB"}})
    found.declares({"name": "ctx-123", "disks": "inventory"})
    image = f"{tmp_path}/repository/ctx-123/2000/r0.qcow2"
    exports = (type(an_export("ctx-123", "r0", 0))(**{
        **an_export("ctx-123", "r0", 0).to_json(), "image": image
    }),)  # fmt: skip
    found.past("ctx-123", "r0", *ACCEPTED, CallEvent.END, job_id="before", exports=exports,
               display_name="pgtest1")  # fmt: skip
    yield found
    found.close()


@pytest.mark.parametrize("page", PAGES)
def test_every_curl_line_works_as_it_stands(hub: Played, page: str) -> None:
    asked = list(requests(page))
    assert len(asked) >= PAGES[page]
    for method, path, body, headers in asked:
        if JOB in path and not any(call.job_id == JOB for call in hub.store.ledger().calls):
            hub.past("ctx-123", "shown", *ACCEPTED, job_id=JOB)
        if path.split("?")[0].endswith("/events"):
            hub.store.advance(hub.call(JOB), CallEvent.END, hub.now())
        if method == "DELETE":
            assert hub.ask(method, path, body, **headers).status == 200, path
            with hub.store._write() as db:
                db.execute("UPDATE calls SET state = 'ACCEPTED' WHERE job_id = ?", (JOB,))
            continue
        status = hub.ask(method, path, body, **headers).status
        assert status in (200, 201), (method, path, status)


def test_what_is_shown_has_the_fields_that_there_are() -> None:
    shapes: dict[str, type[BaseModel]] = {
        "disk_results": Backup,
        "chain_id": Chain,
        "backup_job_id": ChangeId,
        "backup_count": Stats,
        "state_id": Health,
        "error": Error,
    }
    seen = set()
    for block in blocks("docs/api.md", "json"):
        value = json.loads(block)
        model = next(model for key, model in shapes.items() if key in value)
        found = model.model_validate(value)
        assert value.keys() <= found.model_dump().keys(), model
        seen.add(model)
    assert {Backup, ChangeId, Stats, Health, Error} <= seen


def test_every_field_of_a_backup_and_of_a_start_is_told() -> None:
    page = (ROOT / "docs/api.md").read_text()
    for name in Backup.model_fields:
        assert f'"{name}"' in page or f"`{name}`" in page, name
