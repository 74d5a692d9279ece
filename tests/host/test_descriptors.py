"""Open files: as many as there may be, and a word where those are too few for the ports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from reconciler import daemon
from reconciler.beside import Observers
from reconciler.core.descriptors import files_for, more_files
from reconciler.daemon import Daemon
from tests.core.builders import a_settings

RAISED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 99))
from reconciler.host.processes import all_files
print([all_files(), *resource.getrlimit(resource.RLIMIT_NOFILE)])
"""


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    said = subprocess.run([sys.executable, "-c", RAISED], capture_output=True, check=True)
    assert json.loads(said.stdout) == [99, 99, 99]


class Told(Observers):
    def __init__(self) -> None:
        self.words: list[tuple[str, dict[str, Any]]] = []

    def said(self, event: str, **fields: Any) -> None:
        self.words.append((event, fields))


@pytest.mark.parametrize("spare", [-1, 0])
def test_too_few_for_the_ports_are_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    settings = a_settings()
    need = files_for(len(settings.ports))
    monkeypatch.setattr(daemon, "all_files", lambda: need + spare)
    told = Told()
    found = Daemon(settings, {}, source=None, watch=None, reload=None, observers=told)  # type: ignore[arg-type]
    found._count_files()
    if spare < 0:
        ((event, fields),) = told.words
        assert event.startswith("cannot have as many open files")
        assert str(need) in fields["error"] and str(need - 1) in fields["error"]
        assert fields["help"] == more_files(len(settings.ports))
    else:
        assert told.words == []
