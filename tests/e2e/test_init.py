"""`reconciler init`: what it writes works as it stands, and nothing is ever overwritten."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from reconciler.core.errors import HostError
from reconciler.host import fresh
from reconciler.loop import load_settings, load_source
from tests.e2e.site import Appliance, Site

NEW = ["inventory.yaml", "reconciler.yaml", "specs/first.yaml"]


def files(folder: Path) -> list[str]:
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())


@pytest.fixture
def new(site: Site) -> Path:
    """Where a hub is to be."""
    folder = site.folder / "new"
    folder.mkdir()
    site.folder = folder
    return folder


def test_what_it_writes_is_valid_and_planned(site: Site, new: Path) -> None:
    out = site.run("init")
    assert files(new) == NEW
    settings = load_settings(str(new / "reconciler.yaml"), {})
    source = load_source([str(new / "specs")], settings)
    assert not source.specs.failed
    assert source.inventory and list(source.inventory.vms) == ["ctx-1"]
    assert "1 VM valid, 0 errors, 0 warnings." in site.run("validate")
    plan = site.run("plan")
    assert "cannot read the secret file" in plan  # what is missing yet, and where it belongs
    assert str(new / "password") in plan
    steps = re.findall(r"^  (?:reconciler|edit|cd|\(umask) .*$", out, re.MULTILINE)
    assert any("EDIT 1" in step for step in steps)
    assert any("EDIT 2" in step for step in steps)
    for number, name in ((1, "reconciler.yaml"), (2, "inventory.yaml")):
        assert f"EDIT {number} of 2" in (new / name).read_text()


def test_two_edits_and_the_password_make_a_backup(
    site: Site, new: Path, appliance: Appliance
) -> None:
    (new / "reconciler.yaml").unlink()  # of the fixture
    site.run("init", "--hub", site.hub)
    path = new / "reconciler.yaml"
    text = path.read_text().replace("vcenter.example", "vc.example")
    text = text.replace("http://127.0.0.1:9081", appliance.url)  # our own appliance and ports
    path.write_text(text.replace("10100-10200", f"{site.ports[0]}-{site.ports[-1]}"))
    path = new / "inventory.yaml"
    path.write_text(path.read_text().replace("40GiB", "1MiB"))
    (new / "password").write_text("s3cret-of-the-vcenter\n")
    assert " failed" not in site.run("doctor", "--only", "sna,secrets,inventory,ports")
    site.apply()
    assert [one["vm_path"] for one in appliance.starts()] == ["/DC1/vm/web1"]


def test_nothing_is_overwritten_and_nothing_is_half_written(site: Site, new: Path) -> None:
    (new / "inventory.yaml").write_text("mine\n")
    out = site.run("init", code=1)
    assert "inventory.yaml is there already" in out
    assert files(new) == ["inventory.yaml"]
    assert (new / "inventory.yaml").read_text() == "mine\n"
    (new / "inventory.yaml").unlink()
    (new / "specs").write_text("a file\n")
    out = site.run("init", code=1)
    assert "specs" in out
    assert files(new) == ["specs"]


def test_another_directory_is_made_and_named_in_what_to_type_next(site: Site, new: Path) -> None:
    out = site.run("init", "a hub")
    assert files(new / "a hub") == NEW
    assert "cd 'a hub'" in out
    out = site.run("init", "b", RECONCILER_CONFIG="/etc/x.yaml")
    assert "unset RECONCILER_CONFIG" in out
    assert "--hub" in site.run("init", "c", "--hub", "a b", code=64)


def test_a_name_that_is_taken_meanwhile_takes_back_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    link = os.link

    def raced(source: Path, target: Path) -> None:
        if target == second:
            second.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", raced)
    with pytest.raises(fresh.Exists, match="b is there already; nothing was written"):
        fresh.write({first: "1", second: "2"})
    assert files(tmp_path) == ["b"]
    assert second.read_text() == "theirs"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match="No space left on device; nothing was written"):
        fresh.write({tmp_path / "a": "1"})
    assert files(tmp_path) == []
