"""A VM by its name in vCenter: who looks may say it, who changes something is told the context."""

from __future__ import annotations

import pytest

from reconciler.core.errors import UsageError
from reconciler.core.names import hint, meant, resolved
from tests.e2e.site import Appliance, Site

SHOWN = {"ctx-1": "pgtest1", "ctx-2": "db", "ctx-3": "db", "db2": "ctx-1"}


def test_a_context_comes_before_a_name_and_a_name_must_be_of_one_vm() -> None:
    known = (*SHOWN, "ctx-4")
    assert [resolved(one, known, SHOWN) for one in ("ctx-1", "pgtest1", "no")] == [
        "ctx-1", "ctx-1", "no",
    ]  # fmt: skip
    assert meant("db", known, SHOWN) == ["ctx-2", "ctx-3"]
    assert meant("", known, {"ctx-1": ""}) == []
    with pytest.raises(UsageError, match="'db' may be any of ctx-2, ctx-3; name the VM context"):
        resolved("db", known, SHOWN)
    assert hint("pgtest1", known, SHOWN) == "; did you mean 'ctx-1' (pgtest1)?"
    assert hint("db", known, SHOWN).startswith("; ctx-2, ctx-3 are called so in vCenter")
    assert hint("ctx-44", known, SHOWN) == "; did you mean 'ctx-4'?"
    assert hint("else", known, SHOWN) == ""


def test_who_looks_may_say_the_name_and_who_changes_something_is_told_the_context(
    site: Site, appliance: Appliance
) -> None:
    known = {
        context: {
            "vm": {"name": name, "path": f"/DC/vm/{context}", "vcenter": "vc1"},
            "disks": [{"key": 2000, "size": 1 << 20}],
        }
        for context, name in (("ctx-1", "pgtest1"), ("ctx-2", "db"), ("ctx-3", "db"))
    }
    site.dump(site.folder / "inventory.yaml", {"vms": known})
    site.write_config(inventory={"file": "inventory.yaml"})
    said = site.run("backup", "pgtest1", "--run", "r1", code=64)
    assert "did you mean 'ctx-1' (pgtest1)?" in said
    assert "ctx-2, ctx-3 are called so in vCenter" in site.run(
        "backup", "db", "--run", "r1", code=64
    )
    site.run("backup", "ctx-1", "ctx-2", "ctx-3", "--run", "r1")
    site.apply(code=3)  # two of one name are not backed up at a time
    for command in (["explain"], ["status"], ["history"], ["events"], ["chain"]):
        assert "ctx-1" in site.run(*command, "pgtest1"), command
        said = site.run(*command, "db", code=64)
        assert "'db' may be any of ctx-2, ctx-3; name the VM context" in said, command
    assert site.json("explain", "pgtest1")["vm"]["name"] == "ctx-1"
    assert "ctx-1 is Ready" in site.run("wait", "pgtest1", "--for", "Ready", "--timeout", "20s")
    for changing in (
        ["stop", "-y", "pgtest1"],
        ["pause", "pgtest1", "--reason", "x"],
        ["resume", "pgtest1"],
        ["retry", "pgtest1"],
        ["resolve", "pgtest1", "--failed", "--reason", "x", "-y"],
        ["retain", "pgtest1"],
        ["restore-test", "pgtest1"],
    ):
        said = site.run(*changing, code=64)
        assert "did you mean 'ctx-1' (pgtest1)?" in said, changing
    assert set(site.pids()) == {("ctx-1", 2000), ("ctx-2", 2000), ("ctx-3", 2000)}
