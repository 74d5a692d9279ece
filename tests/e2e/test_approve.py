"""A revision that takes away too much: what people see of it, and the command that lets it."""

from __future__ import annotations

import time
from pathlib import Path

from reconciler.core.settings import Settings
from reconciler.host.store import Store
from reconciler.loop import load_settings
from reconciler.source import Reading, Source
from tests.core.builders import says
from tests.e2e.site import Appliance, Site


def read(site: Site, settings: Settings, later: float) -> Reading:
    """What the directory says, written down as a daemon does."""
    store = Store(Path(settings.state), settings.hub)
    try:
        source = Source(str(site.specs), settings)
        reading = source.read(store.ledger(), time.time() + later)
        reading.note(store, "test", time.time() + later)
        return reading
    finally:
        store.close()


def test_a_revision_that_removes_too_much_waits_for_a_person(
    site: Site, appliance: Appliance
) -> None:
    site.write_config(loop={"prune": True, "max_delete": 1})
    settings = load_settings(str(site.folder / "reconciler.yaml"), {})
    everyone = [site.vm(f"ctx-{n}") for n in range(3)]
    site.spec(*everyone)
    site.apply()
    read(site, settings, 0)
    site.spec(everyone[0])
    read(site, settings, 1)
    name = read(site, settings, 10).revision.name

    text = site.run("status")
    says(text, f"source: {site.specs} at {name}", f"2 removals wait: reconciler approve {name}")
    says(text, "PruneHeld: TooMany")
    document = site.json("status")
    source = document["source"]
    assert source["revision"] == name
    assert source["waiting"] == {"revision": name, "vms": ["ctx-1", "ctx-2"]}
    assert (source["commit"], source["unread"], source["git"]) == (None, [], None)
    held = [one for one in document["vms"][1]["conditions"] if one["type"] == "PruneHeld"]
    assert [(one["status"], one["reason"]) for one in held] == [("True", "TooMany")]
    says(site.run("explain", "ctx-1"), "PruneHeld: TooMany", f"reconciler approve {name}")

    text = site.run("approve", "0123456789ab", code=1)
    says(text, f"the one that waits is {name}", "2 VMs (ctx-1, ctx-2)")
    text = site.run("approve", name, "--reason", "they moved to hub-b")
    says(text, f"revision {name} may take away: ctx-1, ctx-2")
    assert read(site, settings, 20).decision.removed == {"ctx-1", "ctx-2"}
    assert "PruneHeld" not in site.run("status")
    says(site.run("approve", name, code=1), "no revision waits")

    (site.specs / "vms.yaml").write_text("vms: [")
    read(site, settings, 30)
    text = site.run("status")
    says(text, "not readable since", "vms.yaml:2:1: cannot", "    SourceUnreadable: /")
