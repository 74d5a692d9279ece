"""Tunnels as text for people; light, as `status` is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from reconciler.cli import options, tables
from reconciler.core.actual import Actual
from reconciler.core.ledger import Ledger
from reconciler.core.plan import FORMAT_VERSION, Plan
from reconciler.core.status import by_type
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.tunnel_seen import TunnelSeen
from reconciler.core.tunnel_status import conditions, tunnel_json
from reconciler.core.units import format_duration, stamp
from reconciler.host import store


def status_lines(
    tunnels: Sequence[Mapping[str, Any]], *, colour: bool, width: int | None, wide: bool
) -> list[str]:
    """A block per tunnel: how it stands, and a line per connection."""
    rows = []
    for one in tunnels:
        ready = _ready(one)
        up = sum(line["listening"] == line["forwards"] for line in one["connections"])
        rows.append(
            [
                f"tunnel/{one['name']}",
                one["hub"],
                "Ready" if ready["status"] == "True" else "NotReady",
                ready["reason"],
                f"{up}/{len(one['connections'])}" if one["connections"] else "-",
            ]
        )
    lines = tables.table(rows, ["TUNNEL", "HUB", "READY", "REASON", "UP"], width)
    out = [tables.paint(lines[0], None, colour, bold=True)]
    for line, one in zip(lines[1:], tunnels, strict=True):
        ready = _ready(one)
        good = ready["status"] == "True"
        out.append(tables.paint(line, "green" if good else "yellow", colour))
        if not good or wide:
            out.append(f"    {ready['message']}")
        out += [
            f"    {tables.kept_line(told['type'], told['reason'], told['message'])}"
            for told in one["conditions"]
            if told["type"] in tables.KEPT
        ]
        out += [f"    {_connection(row)}" for row in one["connections"]]
    return out


def _ready(one: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(c for c in one["conditions"] if c["type"] == "Ready")
    return found


def _connection(row: Mapping[str, Any]) -> str:
    if row["pid"] is None:
        said = f"{row['part']:<8} not connected"
        if row["failures"]:
            said += f"   {row['failures']} failure{'s' * (row['failures'] != 1)} in a row"
        return said + (f"   next try {row['nextTry']}" if row["nextTry"] else "")
    clients = f"{row['clients']} client{'s' * (row['clients'] != 1)}"
    said = (
        f"{row['part']:<8} pid {row['pid']:<8} {row['listening']}/{row['forwards']} forwards   "
        f"{clients}"
    )
    if row["restarts"]:
        said += f"   {row['restarts']} restart{'s' * (row['restarts'] != 1)}"
    return said + (f"   up since {row['upSince']}" if row["upSince"] else "")


def header(one: TunnelPlan) -> str:
    """`tunnel/hub-a   tunnel@hub:443   102 forwards, 9081 back`"""
    tunnel = one.tunnel
    if not tunnel.up:
        return f"{one.name}   down"
    reach = tunnel.reach
    split = ", split" if tunnel.split else ""
    return (
        f"{one.name}   {tunnel.target}   forwards {reach.ports} and {reach.api}, "
        f"{reach.reverse} back to {tunnel.appliance}{split}"
    )


def show(
    plan: Plan, actual: Actual, ledger: Ledger, now: float, holder: str, state: Path, output: str
) -> None:
    """`explain tunnel/NAME`."""
    (one,) = plan.tunnels
    found = by_type(conditions(one, actual, ledger))
    ready = found["Ready"]
    known = ledger.transitions.get((one.name, "Ready"))
    began = known[2] if known and known[0] == ready.status else now
    events = store.events(state, one.name, 5)
    if output == "json":
        from reconciler.cli.telling import to_json

        options.print_json(
            {
                "format_version": FORMAT_VERSION,
                "hub": plan.hub,
                "tunnel": tunnel_json(one, actual, ledger, now),
                "since": stamp(began),
                "actions": plan.to_json()["changes"],
                "changed_by": holder or None,
                "events": [to_json(event) for event in events],
                "next": next_command(one, ready.reason),
            }
        )
        return
    click.echo(header(one))
    good = "ready" if ready.status == "True" else "not ready"
    click.echo(f"  {good}: {ready.reason}, for {format_duration(now - began)}")
    click.echo(f"    {ready.message}")
    for kept in (found[kind] for kind in tables.KEPT if kind in found):
        click.echo(f"  {tables.kept_line(kept.type, kept.reason, kept.message)}")
    for row in tunnel_json(one, actual, ledger, now)["connections"]:
        click.echo(f"  {_connection(row)}")
    for check in actual.tunnels.get(one.name, TunnelSeen()).checks:
        said = "--" if check.skipped else "no" if check.reason else "ok"
        click.echo(f"  {said}: {check.message}")
    for action in one.actions:
        click.echo(f"  {tables.SYMBOL[action.kind]:>3} {action.what()}: {action.why}")
    if holder:
        click.echo(f"  {tables.kept_by(holder)}")
    if events:
        click.echo("  last events:")
        for event in events:
            ago = format_duration(max(0.0, now - event.last))
            times = f" (×{event.count})" if event.count > 1 else ""
            click.echo(f"    {ago} ago: {event.reason}: {event.message}{times}")
    click.echo(f"next: {next_command(one, ready.reason)}")


_ON_HUB = frozenset({"ReverseRefused", "ForwardRefused", "AuthenticationFailed"})


def next_command(one: TunnelPlan, reason: str) -> str:
    """The one command that goes on from here."""
    tunnel, name = one.tunnel, one.tunnel.name
    file = tunnel.place.rsplit(":", 2)[0]
    apply = f"reconciler apply{f' -f {file}' if file else ''}"
    if reason == "Paused":
        return f"reconciler resume {one.name}"
    if reason in ("HostKeyUnknown", "HostKeyMismatch"):
        over = reason == "HostKeyMismatch" or any("--replace" in a.why for a in one.actions)
        return f"reconciler tunnel trust {name}{' --replace' * over}; then {apply}"
    if reason in _ON_HUB:
        return f"on the hub: reconciler doctor --only tunnel; then {apply}"
    if reason == "TunnelSilent":
        return "nothing, if the link is down; else on the hub: reconciler doctor"
    if reason == "HubApiSilent":
        return "on the hub: reconciler status, and systemctl status reconciler"
    if reason == "ExportSilent":
        return "on the hub: reconciler status, and reconciler doctor --only tunnel"
    if reason == "ApplianceSilent":
        return f"start the appliance's own service at {tunnel.appliance}"
    if reason == "LocalPortBusy":
        return f"end the process that is named above, then {apply}"
    if reason == "HubUnresolved":
        return f"getent hosts {tunnel.host}; mend the name, then {apply}"
    if reason == "HubUnreachable":
        return f"ssh-keyscan -T 5 -p {tunnel.port} {tunnel.host}; when it answers: {apply}"
    if reason in (
        "IdentityUnusable",
        "LocalPortUnusable",
        "SshMissing",
        "SshUsage",
        "NoCommonCipher",
        "TokenRefused",
        "TokenUnreadable",
    ):
        return f"mend what it says, then {apply}"
    if reason == "InUse":
        return f"nothing; or reconciler stop {one.name} --kill-clients"
    if one.actions:
        return apply
    return "nothing"


def plan_rows(one: TunnelPlan) -> list[tuple[str, str, str, str]]:
    """A row of the plan per action: symbol, subject, what, why."""
    return [
        (
            tables.SYMBOL[action.kind],
            getattr(action, "part", "tunnel"),
            action.what(),
            action.why,
        )
        for action in one.actions
    ]
