"""A VM that gets another name in the files is still the same VM, with the same servers."""

from __future__ import annotations

from tests.e2e.site import Appliance, Site


def test_a_renamed_vm_is_reported_and_neither_stopped_nor_asked_for_again(
    site: Site, appliance: Appliance
) -> None:
    path = {"path": "/DC/vm/pgtest1", "vcenter": "vc1"}
    site.spec(site.vm("ctx-1", [1 << 20, 1 << 20], vm=path))
    site.apply()
    pids = site.pids()
    site.spec(site.vm("ctx-9", [1 << 20, 1 << 20], vm=path))
    for arguments in ([], ["--prune"]):
        text = site.apply(*arguments, code=1)
        assert "this is VM ctx-1 under another name: both are /DC/vm/pgtest1 at vc1" in text
        assert "with the same disks; its run r1 is ACCEPTED" in text
        assert "reconciler stop ctx-1" in text
        assert site.pids() == pids
    assert len(appliance.starts()) == 1
    site.run("stop", "ctx-1", "--cancel-run", "--kill-clients", "-y")
    site.apply()
    assert {vm for vm, _ in site.pids()} == {"ctx-9"}
    assert len(appliance.starts()) == 2
