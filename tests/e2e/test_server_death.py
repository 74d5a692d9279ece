"""A server that dies under a client: what is lost, what is served again, what the run is worth."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until
from tests.nbd_client import Client

MIB: Final = 1 << 20
BLOCK: Final = 1 << 16
"""Bytes of one write: a qcow2 cluster."""
ENOUGH: Final = 64


def block(number: int) -> bytes:
    """What is written at block `number`; never zeros."""
    return number.to_bytes(4) * (BLOCK // 4)


class Writer(threading.Thread):
    """Writes one block after the other until the server is gone."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.acknowledged = 0
        self.ended: OSError | None = None

    def run(self) -> None:
        try:
            for number in itertools.count(1):
                self.client.write(number * BLOCK, block(number))
                self.acknowledged = number
        except OSError as error:
            self.ended = error


def disk_of(site: Site, key: int = 2000) -> dict[str, Any]:
    disks = crashes.status(site)["ctx-1"]["disks"]
    found: dict[str, Any] = next(disk for disk in disks if disk["key"] == str(key))
    return found


def call_of(site: Site) -> tuple[str, str, bool]:
    """State, reason, and whether acknowledged writes may be gone."""
    call = crashes.calls(site)["ctx-1"]
    return str(call.state), call.reason, call.tainted


@pytest.mark.parametrize("cache", [None, "writethrough"])
def test_what_was_acknowledged_and_not_flushed_dies_with_the_server(
    site: Site, appliance: Appliance, count: Callable[[str, int], None], cache: str | None
) -> None:
    if cache:
        site.write_config(qemu_nbd={"cache": cache})
    site.spec(site.vm("ctx-1", [1 << 30]))
    site.apply()
    before = disk_of(site)
    writer = Writer(Client(before["port"], before["export"]))
    writer.start()
    until(lambda: writer.acknowledged >= ENOUGH, "some writes")
    site.kill(before["pid"])
    writer.join(30)
    writer.client.close()
    assert isinstance(writer.ended, OSError)  # an error of its own, and no hang
    site.apply(code=0 if cache else 1)
    after = disk_of(site)
    assert after["port"] == before["port"]
    assert after["ready"]
    with Client(after["port"], after["export"]) as reader:
        numbers = range(1, writer.acknowledged + 1)
        missing = [n for n in numbers if reader.read(n * BLOCK, BLOCK) != block(n)]
    assert call_of(site)[2] is (cache is None)
    assert bool(missing) is (cache is None)
    crashes.check_images(site)  # and nothing in the image tells of it
    how = cache or "the default cache"
    count(f"writes acknowledged before a kill -9 of the server, {how}", writer.acknowledged)
    count(f"…of these missing afterwards, {how}", len(missing))


def backing_of(image: Path) -> str | None:
    line = ["qemu-img", "info", "-U", "--output=json", str(image)]
    found = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
    backing: str | None = found.get("backing-filename")
    return backing


def test_a_run_whose_server_was_killed_under_its_writer_fails_and_the_next_works(
    site: Site, ending: Appliance
) -> None:
    for key in (2000, 2001):
        ending.source("ctx-1", key, os.urandom(MIB))
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply("--wait", "--timeout", "60s")
    site.reported("ctx-1")
    ending.end()
    ending.start("--slow", "20")  # seconds in which its clients stay connected, half-way
    site.appliance_at(ending.url)
    site.spec(site.vm("ctx-1", [MIB, MIB], backup={"run": "r2", "type": "incremental"}))
    site.apply()
    until(lambda: disk_of(site)["clients"] > 0, "a client")
    before, other = disk_of(site), disk_of(site, 2001)
    site.kill(before["pid"])
    assert "ServerDied" in site.apply(code=1)
    after = disk_of(site)
    assert (after["port"], after["ready"], after["restarts"]) == (before["port"], True, 1)
    assert disk_of(site, 2001)["pid"] == other["pid"]
    assert crashes.condition(site, "ctx-1", "Ready") == ("False", "ServerDied")
    end = crashes.copies_ended(ending)[-1]
    assert [(one["key"], one["phase"]) for one in end["disks"]] == [
        ("2000", "failed"), ("2001", "completed"),
    ]  # fmt: skip
    assert end["disks"][0]["error"]  # nbdcopy said so, and did not hang
    site.appliance_at(ending.url, reports_end=True)
    site.apply(code=1)
    assert call_of(site) == ("FAILED", "ServerDied", True)
    assert site.servers() == {}

    disks = [
        {"key": 2000 + n, "size": MIB, "backing": f"ctx-1/{2000 + n}/r2.qcow2"} for n in (0, 1)
    ]
    backup = {"run": "r3", "type": "incremental"}
    site.spec(site.vm("ctx-1", disks=disks, backup=backup))
    assert "which is FAILED and so not a backup" in site.apply(code=65)
    ending.end()
    ending.start()
    site.spec(site.vm("ctx-1", [MIB, MIB], backup=backup))
    site.apply("--wait", "--timeout", "60s")
    assert call_of(site)[0] == "COMPLETED"
    for key in (2000, 2001):
        image = site.image("ctx-1", key, "r3")
        assert backing_of(image) == "r1.qcow2"
        assert crashes.same_bytes(ending.sources / "ctx-1" / f"{key}.raw", str(image))
    assert [crashes.run_of(one) for one in ending.starts()] == ["ctx-1-r1", "ctx-1-r2", "ctx-1-r3"]


def test_a_run_that_its_appliance_calls_complete_is_failed_if_a_server_died(
    site: Site, ending: Appliance
) -> None:
    for key in (2000, 2001):
        ending.source("ctx-1", key, os.urandom(MIB))
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    (end,) = crashes.copies_ended(ending)
    assert end["status"] == "completed"
    site.kill(disk_of(site, 2001)["pid"])
    assert "a server died under a client" in site.apply(code=1)
    assert call_of(site)[:2] == ("FAILED", "ServerDied")
    site.spec(site.vm("ctx-1", [MIB, MIB], backup={"run": "r2", "type": "incremental"}))
    assert "no completed run to build an incremental on" in site.apply(code=65)
    site.spec(site.vm("ctx-1", [MIB, MIB], backup={"run": "r2"}))
    site.apply("--wait", "--timeout", "60s")
    assert call_of(site)[0] == "COMPLETED"
