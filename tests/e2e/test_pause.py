"""pause and resume: what is left alone, by whom, until when."""

from __future__ import annotations

from tests.core.builders import says
from tests.e2e.site import Appliance, Site, until


def test_a_paused_vm_is_left_alone_and_goes_on_when_it_is_resumed(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    site.apply()
    said = site.run("pause", "ctx-1", "--reason", "disk swap", "--until", "2h")
    says(said, "ctx-1 is paused until 20", "disk swap", "reconciler resume ctx-1")
    for pid in site.pids().values():
        site.kill(pid)
    says(site.apply(code=4), "disk swap", "by reconciler pause (")
    assert {vm for vm, _ in site.pids()} == {"ctx-2"}
    said = site.run("explain", "ctx-1")
    says(said, "! VM: nothing is changed", "disk swap", "next: reconciler resume ctx-1")
    assert site.run("resume", "ctx-1") == "ctx-1 is resumed\n"
    site.apply()
    assert {vm for vm, _ in site.pids()} == {"ctx-1", "ctx-2"}
    site.run("pause", "--all", "--reason", "new kernel")
    says(site.run("status"), "Paused: every VM was paused", "new kernel")
    site.run("stop", "-y", "--cancel-run", "ctx-1")
    assert {vm for vm, _ in site.pids()} == {"ctx-2"}
    assert len(appliance.starts()) == 2


def test_a_pause_needs_a_vm_a_reason_and_a_time_to_come(site: Site) -> None:
    pause = ("pause", "ctx-1", "--reason", "x")
    says(site.run(*pause, "--all", code=64), "name VMs, or --all")
    says(site.run(*pause, "--until", "2020-01-01T06:00", code=64), "--until: ", "not later")


def test_a_daemon_leaves_a_paused_vm_alone(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    daemon = site.start("watch", str(site.specs))
    try:
        until(lambda: len(appliance.starts()) == 2, "the first pass", 60)
        site.run("wait", "ctx-1", "ctx-2", "--for", "Ready", "--timeout", "60s")
        site.run("pause", "ctx-1", "--reason", "disk swap")  # by the daemon
        before = site.pids()
        for pid in (before["ctx-1", 2000], before["ctx-2", 2000]):  # the second is healed later
            site.kill(pid)
        until(lambda: site.pids().get(("ctx-2", 2000), 0) not in (0, *before.values()), "a heal")
        assert ("ctx-1", 2000) not in site.pids()
        site.run("resume", "ctx-1")
        site.run("wait", "ctx-1", "ctx-2", "--for", "Ready", "--timeout", "60s")
    finally:
        daemon.terminate()
        out, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 143, out + err
    assert len(appliance.starts()) == 2
