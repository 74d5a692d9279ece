"""Tunnels on a real sshd and a real ssh, between two hosts with addresses of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.site import Site, until
from tests.e2e.watching import watching
from tests.lab import Lab, laboratory, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path / "lab") as found:
        yield found


def tunnel(site: Site) -> dict[str, Any]:
    (found,) = site.json("status")["tunnels"]
    assert isinstance(found, dict)
    return found


def ready(site: Site) -> tuple[str, str]:
    """(status, reason) of the tunnel's `Ready`."""
    found = next(c for c in tunnel(site)["conditions"] if c["type"] == "Ready")
    return found["status"], found["reason"]


def test_a_backup_of_five_disks_goes_through_the_tunnel(lab: Lab, tmp_path: Path) -> None:
    hub, sna = lab.hub(tmp_path / "hub"), lab.sna(tmp_path / "sna", split=True)
    data = {2000 + n: bytes([n + 1]) * 65536 * 16 for n in range(5)}
    hub.spec(hub.vm("ctx-1", sizes=[1 << 20] * 5))
    for key, text in data.items():
        path = tmp_path / "appliance" / "sources" / "ctx-1" / f"{key}.raw"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    with lab.appliance(tmp_path / "appliance") as appliance, watching(sna), watching(hub):
        until(lambda: ready(sna) == ("True", "Healthy"), "a healthy tunnel", 30)
        until(lambda: hub.status()["ctx-1"]["call"]["state"] == "COMPLETED", "the backup", 60)
        found = tunnel(sna)
        assert [row["listening"] for row in found["connections"]] == [1, 101]
    assert len(appliance.starts()) == 1
    for key, text in data.items():
        raw = hub.folder / f"{key}.raw"
        image = hub.image("ctx-1", key)
        lab.output(lab.hub_ns, "qemu-img", "convert", "-O", "raw", str(image), str(raw))
        assert raw.read_bytes() == text
