"""What a daemon's passes do is exactly so much: a resync by the servers there are, a heal by none.

Each server is asked for a handshake in one of four resyncs, so four are counted together.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import tallying
from tests.e2e.site import Appliance, Site, until

TURNS = 4
RESYNCS = {
    "passes over /proc": TURNS,
    "questions to the kernel for sockets": TURNS,
    "questions to the store": 7 * TURNS,
    "roots asked": TURNS,
    "threads started": TURNS,  # which asks the root
}
"""Of four resyncs of a hub at rest, beside a handshake for each server; nothing is committed."""
HEAL = {
    "servers started": 1,
    "handshakes": 1,
    "commits": 2,  # it is up; what happened
    "roots asked": 2,  # about the image of the server that died; about all, when the next is up
    "threads started": 2,
    "questions to the kernel for sockets": 1,
    "questions to the store": 9,
}
"""Of the look that heals a server of a VM with one disk, whatever else is there."""


@contextlib.contextmanager
def tallied(site: Site) -> Iterator[Path]:
    """A daemon whose passes are written to a file."""
    file = site.folder / "tally"
    file.touch()
    line = [sys.executable, tallying.__file__, str(file), "watch", str(site.specs)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RECONCILER_")}
    with subprocess.Popen(
        line,
        cwd=site.folder,
        env={**environment, "HOME": str(site.folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as daemon:
        try:
            yield file
        finally:
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(60) == 143


def passes(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def at_rest(file: Path) -> Counter[str] | None:
    """What the newest four resyncs did, if those before did as much, and nothing else was done."""
    found = passes(file)[-2 * TURNS :]
    if len(found) < 2 * TURNS or any(one["of"] != "resync" for one in found):
        return None
    counts = [Counter({k: v for k, v in one.items() if k not in ("of", "vm")}) for one in found]
    before, after = (sum(some, Counter[str]()) for some in (counts[:TURNS], counts[TURNS:]))
    return after if before == after else None


@pytest.mark.parametrize("vms", [4, 8])
def test_a_resync_and_a_heal_do_exactly_so_much(site: Site, appliance: Appliance, vms: int) -> None:
    site.write_config(loop={"resync": "250ms"})
    site.spec(*(site.vm(f"ctx-{number}") for number in range(vms)))
    with tallied(site) as file:
        until(lambda: len(appliance.starts()) == vms, "every call", 60)
        resyncs = until(lambda: at_rest(file), "rest", 60)
        assert resyncs == Counter({**RESYNCS, "handshakes": vms})
        before = len(passes(file))
        site.kill(site.pids()["ctx-0", 2000])
        healed = until(
            lambda: [one for one in passes(file)[before:] if one.get("servers started")] or None,
            "a heal",
        )
        assert healed == [{"of": "look", "vm": "ctx-0", **HEAL}]
