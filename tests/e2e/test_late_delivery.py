"""A first attempt's POST that was held up on its way, and arrives after `--resend`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until
from tests.proxy import Proxy

MIB: Final = 1 << 20
KEYS: Final = (2000, 2001)


@pytest.fixture
def proxy(site: Site, appliance: Appliance) -> Iterator[Proxy]:
    """What stands between the hub and its appliance."""
    found = Proxy(appliance.port)
    site.appliance_at(found.url, timeout="1s")
    yield found
    found.close()


def digest(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.soak)])
def test_a_late_first_post_finds_no_export_and_changes_no_byte(
    site: Site, appliance: Appliance, proxy: Proxy, seconds: int
) -> None:
    for key in KEYS:
        appliance.source("ctx-1", key, os.urandom(MIB))
    proxy.keep = True
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    assert "CallUnknown" in site.apply(code=7)
    assert appliance.starts() == []
    site.run("resolve", "ctx-1", "--resend", "--reason", "its log shows nothing", "-y")
    proxy.keep = False
    site.apply()
    (second,) = appliance.starts()
    assert "ctx-1-r1-a2-disk0" in second["nbd_targets"]
    assert [end["status"] for end in crashes.copies_ended(appliance)] == ["completed"]
    copied = {key: appliance.sources / f"{key}.copied" for key in KEYS}
    images = [site.image("ctx-1", key, "r1-a2") for key in KEYS]
    for key in KEYS:  # what a second writer would bring is other than what is there
        (appliance.sources / "ctx-1" / f"{key}.raw").rename(copied[key])
        appliance.source("ctx-1", key, os.urandom(MIB))
    before = [digest(image) for image in images]
    pids = site.pids()

    time.sleep(seconds)
    assert b" 200 " in proxy.deliver().split(b"\r\n")[0]
    first = appliance.starts()[1]
    assert first["job_id"] != second["job_id"]
    assert "ctx-1-r1-disk0" in first["nbd_targets"]
    until(lambda: len(appliance.log_lines("end")) == 2, "the end of the late writer")
    late = appliance.log_lines("end")[1]
    assert (late["job_id"], late["status"]) == (first["job_id"], "failed")
    assert [disk["phase"] for disk in late["disks"]] == ["failed", "failed"]
    assert [digest(image) for image in images] == before
    assert site.pids() == pids

    site.apply()
    assert crashes.plan(site) == []
    assert crashes.calls(site)["ctx-1"].job_id == second["job_id"]
    site.run("resolve", "ctx-1", "--completed", "--reason", "its log", "-y")
    site.apply()
    for key, image in zip(KEYS, images, strict=True):
        assert crashes.same_bytes(copied[key], str(image))
        assert not crashes.same_bytes(appliance.sources / "ctx-1" / f"{key}.raw", str(image))
