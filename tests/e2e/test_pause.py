"""pause and resume: what is left alone, by whom, until when."""

from __future__ import annotations

from tests.core.builders import says
from tests.e2e.site import Appliance, Site


def test_a_paused_vm_is_left_alone_and_goes_on_when_it_is_resumed(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    site.apply()
    said = site.run("pause", "ctx-1", "--reason", "disk swap", "--until", "2h")
    says(said, "ctx-1 is paused until 20", "disk swap", "reconciler resume ctx-1")
    assert site.condition("ctx-1", "Paused")[:2] == ("True", "Paused")
    assert site.condition("ctx-1", "Ready")[:2] == ("True", "Converged")
    assert site.condition("ctx-2", "Paused")[0] == "False"
    says(
        site.run("explain", "ctx-1"),
        "! VM: nothing is changed",
        "disk swap",
        "next: reconciler resume",
    )
    says(site.run("status"), "Paused: Paused", "by reconciler pause (")
    for pid in site.pids().values():
        site.kill(pid)
    says(site.apply(code=4), "disk swap")
    assert {vm for vm, _ in site.pids()} == {"ctx-2"}
    assert site.condition("ctx-1", "Ready")[:2] == ("False", "Paused")
    assert site.run("resume", "ctx-1") == "ctx-1 is resumed\n"
    assert site.run("resume", "ctx-1") == "ctx-1 was not paused\n"
    site.apply()
    assert {vm for vm, _ in site.pids()} == {"ctx-1", "ctx-2"}
    assert len(appliance.starts()) == 2
    past = site.run("explain", "ctx-1")
    says(past, "Paused: paused until 20", "Resumed: by order")


def test_all_are_paused_and_stop_is_carried_out_all_the_same(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.run("pause", "--all", "--reason", "new kernel")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))  # also what comes later
    says(site.apply(code=4), "new kernel", "reconciler resume --all")
    assert {vm for vm, _ in site.pids()} == {"ctx-1"}
    says(site.run("resume", "ctx-1", code=1), "every VM is paused", "new kernel", "--all")
    site.run("pause", "ctx-1", "--reason", "mine")
    says(site.run("resume", "ctx-1"), "ctx-1 is resumed", "every VM is paused")
    site.run("stop", "-y", "--cancel-run", "ctx-1")
    assert site.pids() == {}
    assert site.run("resume", "--all") == "every VM is resumed\n"
    assert site.run("resume", "--all") == "no VM was paused\n"


def test_what_cannot_be_meant_is_refused(site: Site) -> None:
    site.write_config(snas={"site-a": {"url": "http://127.0.0.1:9"}})
    site.spec(site.vm("ctx-1"))
    site.apply(code=1)
    for arguments, words in (
        (["pause", "ctx-2", "--reason", "x"], ["no VM 'ctx-2'", "did you mean 'ctx-1'?"]),
        (["pause", "--reason", "x"], ["name VMs, or --all"]),
        (["pause", "ctx-1", "--reason", " "], ["say why"]),
        (["pause", "ctx-1", "--reason", "x", "--until", "2020-01-01T06:00"], ["not later"]),
        (["pause", "ctx-1", "--reason", "x", "--until", "soon"], ["cannot read moment 'soon'"]),
    ):
        says(site.run(*arguments, code=64), *words)
    assert site.condition("ctx-1", "Paused")[0] == "False"
