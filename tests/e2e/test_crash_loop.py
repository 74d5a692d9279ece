"""A server that ends again and again, on a real hub: what is remembered of it, and shown."""

from __future__ import annotations

import time
from contextlib import closing

from msgspec.structs import replace

from reconciler.host.store import Store
from tests.core.builders import says
from tests.e2e.site import Appliance, Site


def test_a_crash_loop_is_shown_with_its_next_try_and_a_person_does_not_wait(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    for deaths in (4, 5):  # what a daemon would have written in some minutes
        with closing(Store(site.folder / "state", site.hub)) as store:
            (lease,) = store.ledger().leases
            now = time.time()
            store.started([replace(lease, deaths=deaths, rest=now + 300)], now)
        site.kill(site.pids()["ctx-1", 2000])
        assert site.condition("ctx-1", "Stalled")[:2] == ("True", "CrashLoop")
        assert site.condition("ctx-1", "Ready")[:2] == ("False", "CrashLoop")
        says(site.run("explain", "ctx-1"), "disk 2000: wait until 20", "again and again")
        site.apply()
        with closing(Store(site.folder / "state", site.hub)) as store:
            (lease,) = store.ledger().leases
            assert lease.deaths == deaths + 1
            assert now + 2**deaths < lease.rest < time.time() + 2**deaths * 1.1
    loops = [one for one in site.json("events")["events"] if one["reason"] == "CrashLoop"]
    assert [(one["disk"], one["count"], one["severity"]) for one in loops] == [
        ("2000", 2, "Warning")
    ]
