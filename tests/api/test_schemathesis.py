"""The OpenAPI document against what is answered: by a generator that tries what it allows and what
it does not, with a token and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from reconciler.core.access import ALL, Access, key
from reconciler.core.call import CallEvent
from reconciler.core.settings import ApiLimits
from reconciler.core.units import Endpoint
from tests.api.guests import Door, doors
from tests.host.test_inbox import ACCEPTED, a_call, put
from tests.ports import Dealer

pytest.importorskip("schemathesis", reason="it needs a newer rich than the oldest that we allow")

CONFIG: Final = Path(__file__).with_name("schemathesis.toml")
TOKEN: Final = "all-0123456789abcdef"
LIMITS: Final = ApiLimits(rate=1e6, callback_rate=1e6)
DEADLINE: Final = 900.0


def tried(door: Door, folder: Path, *arguments: str, token: str = "", known: str = "") -> None:
    """`known`: a job, so that not everything is about what is not there."""
    text = CONFIG.read_text()
    if known:
        names = {"path.backup_id": known, "path.job_id": known, "query.vm_name": "ctx-1"}
        lines = [f'"{name}" = "{value}"' for name, value in names.items()]
        text = "\n".join([text, "[parameters]", *lines, ""])
    (folder / "schemathesis.toml").write_text(text)
    document = door.ask("GET", "/openapi.json", token=TOKEN).body
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json"]
    command += ["--url", f"http://{door.endpoint}", "--checks", "all", "--no-color"]
    command += ["--header", f"Authorization: Bearer {token}"] if token else []
    found = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    assert found.returncode == 0, found.stdout
    assert f"Tested: {len(operations(document))}" in found.stdout, found.stdout
    assert not any("bug" in line for line in door.said), door.said


def operations(document: dict[str, dict[str, dict[str, object]]]) -> list[tuple[str, str]]:
    return [(path, method) for path, one in document["paths"].items() for method in one]


CASES: Final = [
    pytest.param("open", "", id="open"),
    pytest.param("closed", TOKEN, id="with a token"),
    pytest.param("closed", "", id="without its token"),
]


def opened(folder: Path, kind: str) -> Access:
    if kind == "open":
        return Access(uid=os.geteuid())
    keys = (key("all", TOKEN, ALL),)
    return Access(keys=keys, callbacks_closed=True, uid=os.geteuid())


@pytest.mark.soak
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("kind", "token"), CASES)
def test_every_answer_is_as_documented_whatever_is_asked(
    tmp_path: Path,
    dealer: Dealer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    token: str,
    known: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    with doors(tmp_path, lambda: Endpoint("127.0.0.1", dealer.deal(1)[0])) as door:
        here = door(access=opened(tmp_path, kind), limits=LIMITS)
        job = put(here.store, a_call(), *ACCEPTED).job_id
        tried(here, tmp_path, "-n", "100", token=token, known=job if known else "")


def test_answers_are_as_documented(
    tmp_path: Path, dealer: Dealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form: what a document of this shape usually gets wrong, with a token and without,
    at one listener."""
    monkeypatch.chdir(tmp_path)
    with doors(tmp_path, lambda: Endpoint("127.0.0.1", dealer.deal(1)[0])) as door:
        here = door(access=opened(tmp_path, "closed"), limits=LIMITS)
        job = put(here.store, a_call(), *ACCEPTED, CallEvent.END).job_id  # its events end too
        phases = ("--phases", "examples,coverage,fuzzing", "--seed", "1")
        tried(here, tmp_path, "-n", "3", *phases, token=TOKEN, known=job)
        here.gate.access = opened(tmp_path, "open")
        tried(here, tmp_path, "-n", "2", "--phases", "fuzzing", "--seed", "1")
