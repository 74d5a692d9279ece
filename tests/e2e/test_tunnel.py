"""Tunnels on a real sshd and a real ssh, between two hosts with addresses of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.crashes import crash
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


def test_a_saved_plan_dials_what_it_says_once_and_nothing_else(lab: Lab, tmp_path: Path) -> None:
    sna = lab.sna(tmp_path / "sna")
    lab.answering()
    sna.run("plan", "--out", "plan.json")
    sna.run("apply", "plan.json")
    assert ready(sna) == ("True", "Healthy")
    assert "used" in sna.run("apply", "plan.json", code=5)
    lab.tunnel(sna, split=True)
    sna.run("plan", "--out", "split.json")
    lab.tunnel(sna, split=True, ciphers=["aes128-ctr"])
    said = sna.run("apply", "split.json", code=5)
    assert "tunnel/hub-a" in said
    assert [row["part"] for row in tunnel(sna)["connections"]] == ["whole"]


def test_an_apply_that_dies_after_it_dialled_leaves_one_connection(
    lab: Lab, tmp_path: Path
) -> None:
    sna = lab.sna(tmp_path / "sna")
    lab.answering()
    crash(sna, ["--at", "DIAL:after:1"], ["apply", "-y"])
    (before,) = [pid for pid in lab.pids(lab.sna_ns) if is_tunnel(pid)]
    until(lambda: "Starting" not in sna.apply(code=None) and ready(sna)[0] == "True", "adoption")
    assert [pid for pid in lab.pids(lab.sna_ns) if is_tunnel(pid)] == [before]
    sna.run("stop", "-y", "tunnel/hub-a")
    assert not [pid for pid in lab.pids(lab.sna_ns) if is_tunnel(pid)]


def is_tunnel(pid: int) -> bool:
    try:
        return b"RECONCILER_TUNNEL" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_what_cannot_be_read_any_more_keeps_the_tunnel_as_it_was(lab: Lab, tmp_path: Path) -> None:
    sna = lab.sna(tmp_path / "sna")
    lab.answering()
    spec = sna.specs / "tunnel.yaml"
    good = spec.read_text()
    with watching(sna):
        until(lambda: ready(sna) == ("True", "Healthy"), "a healthy tunnel")
        before = tunnel(sna)["connections"][0]["pid"]
        for text, told in (
            (good.replace('"keepalive"', '"keepaliv"'), "keepaliv"),
            ("tunnels: [", "tunnel.yaml"),
        ):
            spec.write_text(text)
            until(lambda: told in sna.run("explain", "tunnel/hub-a"), f"{told} in explain")  # noqa: B023
            assert tunnel(sna)["connections"][0]["pid"] == before
            assert ready(sna) == ("True", "Healthy")
            spec.write_text(good)
            until(lambda: "SourceUnreadable" not in sna.run("status"), "the good spec")
        spec.unlink()
        sna.run("wait", "tunnel/hub-a", "--for", "Ready", "--timeout", "20s")
        assert tunnel(sna)["connections"][0]["pid"] == before
        sna.run("stop", "-y", "tunnel/hub-a")
        sna.run("wait", "tunnel/hub-a", "--for", "Absent", "--timeout", "20s")
