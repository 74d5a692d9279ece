"""What a daemon counts, for Prometheus. Names are controller-runtime's where the meaning is theirs.

No pid, port, path, VM or run is a label: a series lasts as long as what it counts.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from reconciler import __version__
from reconciler.core.actions import Dial, Redial
from reconciler.core.actual import Actual
from reconciler.core.call import CallState
from reconciler.core.disk_plan import export_key
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan
from reconciler.core.tunnel import PREFIX
from reconciler.core.units import Seconds
from reconciler.execute import Step

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
QUICK: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Bounds of histograms in seconds: a heal takes 15 ms, an SNA may take 30 s."""
EXPORTS: Final = ("ready", "not_ready")
PORTS: Final = ("leased", "foreign", "free")
CALLS: Final = tuple(str(state) for state in CallState)


class Meters:
    """Counters and gauges of one daemon; methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=r)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=r)

        def times(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=QUICK, registry=r)

        self.depth = gauge("workqueue_depth", "VMs that wait for a look")
        self.adds = counter("workqueue_adds_total", "VMs put into the queue")
        self.retries = counter("workqueue_retries_total", "Looks that follow one that failed")
        self.queued = times("workqueue_queue_duration_seconds", "From kick to look")
        self.worked = times("workqueue_work_duration_seconds", "Duration of a look")
        self.unfinished = gauge(
            "workqueue_unfinished_work_seconds", "For how long looks that go on have, together"
        )
        self.longest = gauge(
            "workqueue_longest_running_processor_seconds", "For how long the longest look goes on"
        )
        self.active = gauge("reconciler_active_workers", "Looks that go on")
        self.most = gauge("reconciler_max_concurrent_reconciles", "Looks at a time")
        self.reconciled = counter("reconciler_reconcile_total", "Looks by how they ended", "result")
        self.errors = counter("reconciler_reconcile_errors_total", "Looks that failed")
        self.times = times("reconciler_reconcile_time_seconds", "Duration of a look")
        self.vms = gauge("reconciler_vms", "VMs that are kept true", "ready")
        self.exports = gauge("reconciler_exports", "Disks that are to be exported", "state")
        self.ports = gauge("reconciler_ports", "Ports of the range", "state")
        self.restarts = counter("reconciler_export_restarts_total", "Servers started again")
        self.starts = times("reconciler_export_start_seconds", "From the start to the handshake")
        self.calls = counter("reconciler_call_total", "Calls to SNAs by their outcome", "outcome")
        self.open_calls = gauge("reconciler_calls", "Calls that have not ended", "state")
        self.oldest = gauge(
            "reconciler_oldest_run_timestamp_seconds",
            "When the run that has gone on for longest was called for; 0: none goes on",
        )
        self.appliances = gauge(
            "reconciler_appliance_up",
            "Whether an SNA was well when it was asked last, before a run began",
            "sna",
        )
        self.tunnels = gauge(
            "reconciler_tunnel_up",
            "Whether a tunnel was healthy when it was looked at last",
            "tunnel",
        )
        self.dials = counter(
            "reconciler_tunnel_dial_total", "Connections of tunnels that were dialled", "outcome"
        )
        self.unknown = gauge("reconciler_calls_unknown", "Calls whose outcome is not known")
        self.stale = gauge(
            "reconciler_runs_stale", "Accepted runs of which nothing was heard for stale_after"
        )
        self.held = gauge("reconciler_prune_held", "VMs gone from the source that are kept up")
        self.paused = gauge("reconciler_paused", "VMs that a person has paused")
        self.crashing = gauge(
            "reconciler_crash_loops", "VMs with a server that dies again and again"
        )
        self.source = gauge(
            "reconciler_source_last_success_timestamp_seconds", "When the source was read well last"
        )
        self.heartbeat = gauge(
            "reconciler_loop_heartbeat_timestamp_seconds", "When the loop moved last"
        )
        build = gauge("reconciler_build_info", "The version, as a label", "version")
        build.labels(__version__).set(1)
        for one in ("success", "requeue_after", "error"):
            self.reconciled.labels(one)
        for one in CALL_OUTCOMES:
            self.calls.labels(one)
        for one in ("success", "failure"):
            self.dials.labels(one)

    def added(self, depth: int) -> None:
        """A VM was put into the queue."""
        self.adds.inc()
        self.depth.set(depth)

    def began(self, waited: Seconds, depth: int) -> None:
        self.queued.observe(waited)
        self.depth.set(depth)
        self.active.inc()

    def ended(self, result: str, took: Seconds, steps: Collection[Step]) -> None:
        """A look is over; `result` is `success`, `requeue_after` or `error`."""
        self.active.dec()
        self.worked.observe(took)
        self.times.observe(took)
        self.reconciled.labels(result).inc()
        if result == "error":
            self.errors.inc()
            self.retries.inc()
        self.stepped(steps)

    def reached(self, sna: str, well: bool | None) -> None:
        """An SNA was asked whether it is well; None: it was not, and nobody wants to know now."""
        if well is None:
            with suppress(KeyError):
                self.appliances.remove(sna)
        else:
            self.appliances.labels(sna).set(well)

    def tunnel(self, name: str, healthy: bool | None) -> None:
        """A tunnel was looked at; None: nothing is wanted of it any more."""
        name = name.removeprefix(PREFIX)
        if healthy is None:
            with suppress(KeyError):
                self.tunnels.remove(name)
        else:
            self.tunnels.labels(name).set(healthy)

    def stepped(self, steps: Collection[Step]) -> None:
        """What was done, by a look or by a command."""
        for step in steps:
            if isinstance(step.action, Dial | Redial):
                self.dials.labels("success" if step.ok else "failure").inc()
                continue
            if step.action.kind == "restart" and step.ok and step.reason == "Restarted":
                self.restarts.inc()
            if step.action.kind in ("start", "restart") and step.ok and step.took:
                self.starts.observe(step.took)
            if step.action.kind == "call" and step.call is not None:
                self.calls.labels(_outcome(step)).inc()

    def looked(
        self,
        planned: Plan,
        actual: Actual,
        ledger: Ledger,
        ready: Mapping[str, bool],
        held: int = 0,
    ) -> None:
        """What a whole look found. `ready`: VM → whether it is. `held`: those that are gone from
        the source and stay up."""
        tally = Tally(ready.values())
        for name, is_ready in (("true", True), ("false", False)):
            self.vms.labels(name).set(tally[is_ready])
        well = {s.mark.key for s in actual.servers if s.handshake and s.handshake.answered}
        wanted = [export for one in planned.vms for export in one.vm.exports if one.ports]
        up = sum(export_key(export) in well for export in wanted)
        self.exports.labels("ready").set(up)
        self.exports.labels("not_ready").set(len(wanted) - up)
        leased = len({lease.port for lease in ledger.leases})
        foreign = len(actual.listeners)
        self.ports.labels("leased").set(leased)
        self.ports.labels("foreign").set(foreign)
        self.ports.labels("free").set(max(0, len(planned.ports) - leased - foreign))
        states = Tally(call.state for call in ledger.open)
        for state in (s for s in CallState if not s.terminal):
            self.open_calls.labels(state.lower()).set(states[state])
        active = [call.called or call.created for call in ledger.open if call.state.active]
        self.oldest.set(min(active, default=0.0))
        self.unknown.set(states[CallState.UNKNOWN])
        causes = [{action.cause for action in one.actions} for one in planned.vms]
        self.paused.set(sum("Paused" in found for found in causes))
        self.crashing.set(sum("CrashLoop" in found for found in causes))
        self.stale.set(sum(bool(one.stale) for one in planned.vms))
        self.held.set(held)

    def sourced(self, ok_at: Seconds | None) -> None:
        """The source was read; None: not well."""
        if ok_at is not None:
            self.source.set(ok_at)

    def beat(self, working: Collection[Seconds], most: int) -> None:
        """The loop moves; `working`: for how long each look goes on."""
        self.heartbeat.set(time.time())
        self.unfinished.set(sum(working))
        self.longest.set(max(working, default=0.0))
        self.most.set(most)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


CALL_OUTCOMES: Final = ("accepted", "rejected", "nothing_sent", "unknown")


def _outcome(step: Step) -> str:
    assert step.call is not None
    state = step.call.state
    if state is CallState.DUE:
        return "nothing_sent"
    return str(state).lower() if state in (CallState.ACCEPTED, CallState.REJECTED) else "unknown"
