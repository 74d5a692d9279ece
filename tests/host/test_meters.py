"""Figures: the names that others know, no label that grows without end, and alerts that fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from reconciler import __version__
from reconciler.core.actions import Dial, Notify, Restart, Start
from reconciler.core.call import CallEvent, CallState
from reconciler.core.desired import Export, Vm
from reconciler.core.ledger import Lease
from reconciler.core.tunnel import Tunnel
from reconciler.core.tunnel_seen import Dialled
from reconciler.execute import Step
from reconciler.meters import Meters
from tests.e2e.site import ROOT
from tests.host.test_store import call

NAMES: Final = """
workqueue_depth workqueue_adds_total workqueue_queue_duration_seconds
workqueue_work_duration_seconds workqueue_retries_total workqueue_unfinished_work_seconds
workqueue_longest_running_processor_seconds
reconciler_reconcile_total reconciler_reconcile_time_seconds reconciler_reconcile_errors_total
reconciler_max_concurrent_reconciles reconciler_active_workers
reconciler_exports reconciler_ports reconciler_vms reconciler_export_restarts_total
reconciler_export_start_seconds reconciler_call_total reconciler_calls_unknown
reconciler_prune_held reconciler_source_last_success_timestamp_seconds
reconciler_loop_heartbeat_timestamp_seconds reconciler_build_info
""".split()
RULES: Final = ROOT / "examples" / "alerts" / "reconciler.rules.yaml"
LABELS: Final = {"state", "ready", "result", "outcome", "version", "le", "sna"}
"""Every label: none is of a pid, a port, a path or a VM. An SNA is named in the config."""


def told(meters: Meters) -> dict[tuple[str, ...], float]:
    """(name, labels' values) → value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(meters.exposition().decode())
        for sample in family.samples
    }


def names(meters: Meters) -> set[str]:
    """As a rule names them: also of those that have no series yet."""
    text = meters.exposition().decode()
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def step(kind: str, ok: bool = True, reason: str = "Restarted", took: float = 0.25) -> Step:
    export = Export(vm="ctx-1", key=2000, position=0, run="r", attempt=1, name="n", image="/i",
                    size=512)  # fmt: skip
    lease = Lease(hub="h", vm="ctx-1", disk=2000, run="r", attempt=1, port=10100, since=1.0)
    about: dict[str, Any] = {
        "vm": "ctx-1", "disk": 2000, "cause": "c", "why": "w", "export": export, "lease": lease,
    }  # fmt: skip
    action = Start(**about) if kind == "start" else Restart(**about, server=None)
    return Step(action, ok, reason, "m", took=took)


def called(state: CallState | None) -> Step:
    made = None if state is None else call()
    if made is not None:
        made = type(made)(**{**{n: getattr(made, n) for n in made.__struct_fields__},
                             "state": state})  # fmt: skip
    target = Vm(name="ctx-1", exported=True)
    action = Notify(vm="ctx-1", cause="c", why="w", target=target)
    return Step(action, state is CallState.ACCEPTED, str(CallEvent.ACCEPT), "m", made)


def test_every_name_is_there_from_the_beginning() -> None:
    found = names(Meters())
    assert set(NAMES) <= found, set(NAMES) - found


def test_no_label_grows_without_end() -> None:
    meters = Meters()
    meters.stepped([step("start"), step("restart"), called(CallState.ACCEPTED)])
    text = meters.exposition().decode()
    used = {
        name
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for name in sample.labels
    }
    assert used <= LABELS
    assert "ctx-1" not in text and "10100" not in text


def test_what_was_done_is_counted() -> None:
    meters = Meters()
    meters.added(3)
    meters.began(0.5, 2)
    assert told(meters)["reconciler_active_workers",] == 1
    meters.ended("error", 2.0, [step("start"), step("restart"), step("restart", ok=False)])
    meters.ended("success", 2.0, [step("restart", reason="Recovered")])
    found = told(meters)
    assert found["workqueue_adds_total",] == 1
    assert found["workqueue_depth",] == 2
    assert found["workqueue_queue_duration_seconds_sum",] == 0.5
    assert found["workqueue_work_duration_seconds_sum",] == 4.0
    assert found["reconciler_reconcile_total", "error"] == 1
    assert found["reconciler_reconcile_errors_total",] == 1
    assert found["workqueue_retries_total",] == 1
    assert found["reconciler_export_restarts_total",] == 1
    assert found["reconciler_build_info", __version__] == 1


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (CallState.ACCEPTED, "accepted"),
        (CallState.REJECTED, "rejected"),
        (CallState.DUE, "nothing_sent"),
        (CallState.UNKNOWN, "unknown"),
        (CallState.INTENDED, "unknown"),
        (None, ""),
    ],
)
def test_calls_are_counted_by_what_came_of_them(state: CallState | None, outcome: str) -> None:
    meters = Meters()
    meters.stepped([called(state)])
    found = {k[1]: v for k, v in told(meters).items() if k[0] == "reconciler_call_total" and v}
    assert found == ({outcome: 1.0} if outcome else {})


# -- the example alerts


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_name_figures_that_there_are(tmp_path: Path) -> None:
    """Promtool checks how a rule is written, not whether its figures exist."""
    from reconciler.textfile import write

    write(tmp_path / "a.prom", "h", 0, {}, [], 1.0)
    applied = re.findall(r"^# TYPE (\S+)", (tmp_path / "a.prom").read_text(), re.MULTILINE)
    known = names(Meters()) | {"up", *applied}
    for rule in rules():
        used = re.findall(r"\b(?:reconciler|workqueue)_\w+", rule["expr"])
        assert used or "up{" in rule["expr"], rule
        assert set(used) <= known, rule["alert"]


def test_alerts_are_written_as_prometheus_reads_them() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found)
    for rule in found:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule
        assert re.fullmatch(r"Reconciler[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"[0-9]+[smhd]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")
        for text in rule["annotations"].values():
            known = r"\{\{ \$(labels\.(instance|sna|tunnel)|value( \| humanize\w*)?) \}\}"
            left = re.sub(known, "", text)
            assert "{{" not in left and "$" not in left, rule["alert"]


def test_label_values_in_alerts_are_ones_that_are_told() -> None:
    from reconciler import meters

    known = {"not_ready": meters.EXPORTS, "free": meters.PORTS, "false": ("true", "false")}
    for rule in rules():
        for name, value in re.findall(r'\b(state|ready)="(\w+)"', rule["expr"]):
            assert value in known[value], (name, value)


def test_an_sna_has_a_figure_while_somebody_wants_to_know() -> None:
    meters = Meters()
    key = ("reconciler_appliance_up", "site-a")
    assert key not in told(meters)
    for well, value in ((False, 0.0), (True, 1.0), (False, 0.0)):
        meters.reached("site-a", well)
        assert told(meters)[key] == value
    for _ in range(2):
        meters.reached("site-a", None)
        assert key not in told(meters)


def test_a_tunnel_has_a_figure_while_it_is_wanted_and_its_dials_are_no_starts_of_exports() -> None:
    meters = Meters()
    key = ("reconciler_tunnel_up", "hub-a")
    meters.tunnel("tunnel/hub-a", True)
    assert told(meters)[key] == 1
    meters.tunnel("tunnel/hub-a", None)
    meters.tunnel("tunnel/hub-a", None)
    assert key not in told(meters)
    known = Dialled(tunnel="tunnel/hub-a", part="whole")
    tunnel = Tunnel(name="hub-a")
    dial = Dial(
        vm="tunnel/hub-a", cause="", why="", tunnel=tunnel, part="whole", argv=(), known=known
    )
    meters.stepped([Step(dial, True, "", "", took=2.0), Step(dial, False, "", "", took=2.0)])
    found = told(meters)
    assert found["reconciler_tunnel_dial_total", "success"] == 1
    assert found["reconciler_tunnel_dial_total", "failure"] == 1
    assert found["reconciler_export_start_seconds_count",] == 0
