"""Ten thousand requests against a real daemon: what it has in use stays what it was."""

from __future__ import annotations

import json
import time

import pytest

from bench.load import in_use, load, request
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching

REQUESTS, CONNECTIONS = 10_000, 64
GROWTH = 24 << 10
"""KiB that the daemon may have grown by after another ten thousand. One leaked kilobyte a request
is 10 MiB a round, so four rounds of that are seen; what the allocator keeps is not."""


@pytest.mark.soak
def test_ten_thousand_requests_leak_nothing(site: Site, appliance: Appliance) -> None:
    limits = {"rate": 1e6, "callback_rate": 1e6}
    site.write_config(api={"listen": f"127.0.0.1:{site.api}", "limits": limits})
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    with watching(site) as watcher:
        until(
            lambda: all(
                (vm.get("call") or {}).get("state") == "ACCEPTED"
                for vm in site.json("status", "-o", "json")["vms"]
            ),
            "both calls",
            60,
        )
        jobs = [vm["call"]["job_id"] for vm in site.json("status", "-o", "json")["vms"]]
        body = json.dumps({"status": "running", "bytes_transferred": 5}).encode()
        kinds = [
            request("list", "GET", "/api/v1/backups?limit=100"),
            request("changeid", "GET", "/api/v1/backups/changeid?vm_name=ctx-1"),
            request("one", "GET", f"/api/v1/backups/{jobs[0]}"),
            request("telemetry", "POST", f"/api/v1/telemetry/backup/{jobs[1]}", body),
        ]
        asked = kinds * (REQUESTS // len(kinds))

        def round_() -> None:
            found = load("127.0.0.1", site.api, asked, CONNECTIONS, 50)
            assert not found.broken, found.broken[:3]
            assert {status for _, status in found.statuses} == {200}
            time.sleep(3.0)  # for what was begun to be let go

        def calm() -> None:
            """Some that come one by one: a pool lets its idle threads go when it is used."""
            assert not load("127.0.0.1", site.api, kinds, 1).broken

        calm()
        idle = in_use(watcher.pid)
        round_()
        first = in_use(watcher.pid)
        for _ in range(4):
            round_()
        last = in_use(watcher.pid)
        assert last.fds <= first.fds + 2
        assert last.rss - first.rss < GROWTH, (first, last)

        def rested() -> bool:
            calm()
            return in_use(watcher.pid).threads <= idle.threads + 2

        until(rested, "the pool's threads to end, which rest for 10 s first", 60)
        assert len(site.servers()) == 2
