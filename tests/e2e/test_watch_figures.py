"""What a daemon says of itself over HTTP: that it moves, that it is ready, and its figures."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.site import Appliance, Site, until
from tests.e2e.test_watch import quick as quick  # the fixture
from tests.e2e.test_watch import settled
from tests.e2e.watching import watching


def get(site: Site, path: str) -> tuple[int, str, str]:
    """Status, body, content type."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{site.api}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), ""


def figures(site: Site) -> dict[tuple[str, str], float]:
    """(name, its one label's value) → value."""
    status, text, kind = get(site, "/metrics")
    assert status == 200 and kind.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, "".join(v for k, v in sample.labels.items() if k != "le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_figures_say_what_is_there_and_what_was_done(quick: Site, appliance: Appliance) -> None:
    quick.spec(quick.vm("ctx-1", (1 << 20, 1 << 20)), quick.vm("ctx-2"))
    with watching(quick) as daemon:
        settled(quick, "ctx-1", "ctx-2")
        assert get(quick, "/healthz")[:2] == (200, "ok\n")
        assert get(quick, "/readyz")[:2] == (200, "ok\n")
        until(lambda: figures(quick)["reconciler_exports", "ready"] == 3, "all ready")
        found = figures(quick)
        assert found["reconciler_call_total", "accepted"] == 2
        assert found["reconciler_ports", "leased"] == 3
        assert found["reconciler_ports", "free"] == 7
        assert found["reconciler_vms", "true"] == 2
        assert found["reconciler_calls_unknown", ""] == 0
        assert found["reconciler_export_start_seconds_count", ""] == 3
        assert found["reconciler_source_last_success_timestamp_seconds", ""] > 1e9
        os.kill(next(iter(quick.servers())).pid, signal.SIGKILL)
        until(lambda: figures(quick)["reconciler_export_restarts_total", ""] == 1, "counted")
        _, text, _ = get(quick, "/metrics")
        for word in ("ctx-1", str(quick.ports[0]), str(daemon.pid), str(quick.folder)):
            assert word not in text, "no VM, port, pid or path is in a series"
        quick.spec(quick.vm("ctx-1", (1 << 20, 1 << 20)))
        quick.spec(quick.vm("ctx-2", state="absent"), file="two.yaml")
        quick.run("resolve", "ctx-2", "--failed", "--reason", "test", "-y")
        until(lambda: figures(quick)["reconciler_exports", "ready"] == 2, "its series goes on")
        (quick.specs / "two.yaml").unlink()
        quick.spec(quick.vm("ctx-3", state="absent"))
        until(lambda: figures(quick)["reconciler_prune_held", ""] == 1, "ctx-1 is kept")
        (quick.specs / "vms.yaml").write_text("vms: [")
        until(lambda: "SourceUnreadable" in quick.run("events", code=None), "it is read")
        before = figures(quick)["reconciler_source_last_success_timestamp_seconds", ""]
        looks = figures(quick)["reconciler_loop_heartbeat_timestamp_seconds", ""]
        time.sleep(1.5)  # a resync reads it again
        after = figures(quick)
        assert after["reconciler_source_last_success_timestamp_seconds", ""] == before
        assert after["reconciler_loop_heartbeat_timestamp_seconds", ""] >= looks


def test_each_line_of_the_log_says_what_it_is_about(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1", (1 << 20, 1 << 20)))
    with watching(quick) as daemon:
        settled(quick, "ctx-1")
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    started = next(line for line in lines if line["message"] == "Started")
    assert started["vm"] == "ctx-1" and started["disk"] in ("2000", "2001")
    assert started["reconcile_id"] and started["level"] == "info" and started["timestamp"]
    assert started["run"] == "r1" and len(started["revision"]) == 12
    both = [line for line in lines if line["message"] == "Started"]
    assert [line["reconcile_id"] for line in both] == [started["reconcile_id"]] * 2
    (ready,) = (line for line in lines if line["message"] == "ready")
    assert "vm" not in ready and "reconcile_id" not in ready
    called = next(line for line in lines if line["message"] == "CallAccepted")
    assert called["run"] == "r1" and called["reconcile_id"] == started["reconcile_id"]
