"""Many requests at once leave nothing behind: no connection, task, thread, descriptor or place."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from bench.load import Asked, Load, load, request
from reconciler.api.backups import PLACES
from reconciler.core.access import Access, Scope
from reconciler.core.settings import ApiLimits
from reconciler.core.units import Endpoint
from tests.api.guests import TOKENS, Door, doors, keys
from tests.e2e.site import until
from tests.host.test_inbox import ACCEPTED, a_call, put
from tests.ports import Dealer

REQUESTS, CONNECTIONS = 500, 16


def mixture(job: str) -> list[Asked]:
    """What is asked of a hub, properly and not."""
    client, reader = TOKENS[Scope.CALLBACK], TOKENS[Scope.READ]
    telemetry = json.dumps({"status": "running", "bytes_transferred": 5}).encode()
    return [
        request("health", "GET", "/api/v1/health"),
        request("changeid", "GET", "/api/v1/backups/changeid?vm_name=ctx-1", token=client),
        request("telemetry", "POST", f"/api/v1/telemetry/backup/{job}", telemetry, client),
        request("list", "GET", "/api/v1/backups", token=reader),
        request("one", "GET", f"/api/v1/backups/{job}", token=reader),
        request("nowhere", "GET", "/api/v1/nowhere", token=reader),
        request("unknown", "GET", "/api/v1/nowhere", token="nobodys-0123456789abcdef"),
        request("large", "POST", f"/api/v1/telemetry/backup/{job}", b" " * 70_000, client),
        request("broken", "GET", "/ /"),
    ]


def test_what_many_ask_at_once_leaves_nothing_behind(tmp_path: Path, dealer: Dealer) -> None:
    limits = ApiLimits(rate=1e6, callback_rate=1e6, body=65_536, concurrency=4)
    access = Access(keys=keys(), callbacks_closed=True, uid=os.geteuid())
    with doors(tmp_path, lambda: Endpoint("127.0.0.1", dealer.deal(1)[0])) as door:
        here: Door = door(access=access, limits=limits, local=True)
        app, server = here.app, here.listener._server
        assert server
        job = put(here.store, a_call(), *ACCEPTED).job_id
        kinds = mixture(job)
        asked = (kinds * (REQUESTS // len(kinds) + 1))[:REQUESTS]

        def ask(many: list[Asked]) -> Load:
            return load(here.endpoint.host, here.endpoint.port, many, CONNECTIONS, 10)

        ask(asked[:100])  # threads are started, tables are filled
        until(lambda: not server.server_state.connections, "every connection to end")
        fds = len(os.listdir("/proc/self/fd"))
        threads = threading.active_count()
        found = ask(asked)
        assert not found.broken
        assert {kind: {s for k, s in found.statuses if k == kind} for kind, _ in kinds} == {
            "health": {200},
            "changeid": {200},
            "telemetry": {200},
            "list": {200},
            "one": {200},
            "nowhere": {404},
            "unknown": {401},
            "large": {413},
            "broken": {400},
        }
        assert sum(found.statuses.values()) == REQUESTS - REQUESTS // 10
        state = server.server_state
        until(lambda: not state.connections and not state.tasks, "every task to end")
        assert here.listener.crowd is not None
        assert len(here.listener.crowd) == 0
        assert {place._value for place in app._places.values()} == {limits.concurrency}
        assert {len(meter) for meter in app._meters.values()} <= {0, 1, 2}
        assert len(os.listdir("/proc/self/fd")) <= fds
        # A pool may have as many as there are places: callbacks, those who watch, and lists.
        assert threading.active_count() <= threads + 2 * limits.concurrency + PLACES
        assert not here.said
