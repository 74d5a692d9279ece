"""The one command that goes on from where a VM stands."""

from __future__ import annotations

from typing import Final

from reconciler.core.appliances import UNREACHABLE, next_of
from reconciler.core.call import Call, ending, resolving
from reconciler.core.desired import Vm
from reconciler.core.guards import cancelling
from reconciler.core.ledger import Ledger
from reconciler.core.parents import PARENTS
from reconciler.core.plan import Plan
from reconciler.core.vm_plan import VmPlan, new_run

_STORAGE: Final = frozenset(
    {
        "RepositoryFull",
        "RepositoryReadOnly",
        "SpaceShort",
        "StorageHangs",
        "StorageUnreadable",
    }
)
"""Causes that are mended at the storage, by no edit of a spec."""


def next_command(one: VmPlan, plan: Plan, reason: str, requests: str, ledger: Ledger) -> str:
    """The one command that goes on from here. `requests`: the directory of what `backup` wrote."""
    vm, name = one.vm, one.name
    known = ledger.declared.get(name)
    declared = known is not None and not known.gone
    watched = "" if ledger.source.get("fetch") else ledger.source.get("directory", "")
    actions = plan.actions
    causes = {action.cause for action in actions}
    specs = "".join(f" -f {file}" for file in spec_files(vm, requests))
    apply = f"reconciler apply{specs}"
    place = vm.place if vm.run_place.startswith(f"{requests}/") else vm.run_place or vm.place
    another = f"{new_run(name)} --apply{specs}"
    if not place.startswith(f"{requests}/"):
        another += f"; or write another `run:` into {place or 'the spec'}, then {apply}"
    if "CallUnknown" in causes and one.call:
        return f"look at the appliance, then {resolving(one.call)}"
    if "Paused" in causes:
        why = next(action.why for action in actions if action.cause == "Paused")
        return why.rpartition("to go on: ")[2]
    if "ClaimedElsewhere" in causes:
        return "work in the state directory that is named above, or move it away if it is not used"
    if "Renamed" in causes:
        return f"write the old name into {vm.place or 'the spec'}, or reconciler stop OLD-NAME"
    if "CallRejected" in causes:
        return f"mend what it says, then reconciler retry {name} and {apply}"
    if causes & _STORAGE:
        return f"see to that storage, as said above, then {apply}"
    if causes & PARENTS:
        return f"{new_run(name)} --type full --apply{specs}; see reconciler chain {name}"
    if any(action.kind == "hold" for action in actions):
        return "see what holds it, above; nothing is destroyed meanwhile"
    if "RunChanged" in causes:
        return f"put back what was asked for, or {another}"
    if any(action.kind == "refuse" for action in actions):
        return f"edit {vm.place or 'the spec'}, then {apply}"
    unreachable = next((action for action in one.actions if action.cause == UNREACHABLE), None)
    if unreachable:
        return f"{next_of(unreachable.why)}; then {apply}"
    if "PortPoolExhausted" in causes:
        return f"reconciler status, for who has the ports; then {apply} --wait, or widen `ports:`"
    if plan.changes:
        return apply
    follows = apply if "RunActive" in causes else another
    """What comes after the active run: the run that waits for it, or a new one."""
    if one.call and one.tainted_run:
        return (
            f"let the appliance end; when it has, or is silent: {ending(one.call)}, then "
            f"{follows}; to end it now: {cancelling(name, declared=declared)}"
        )
    if one.call and one.stale and one.stale_cause != "NoTelemetry":
        return given_up(one, follows, declared=declared)
    if one.unheard:
        return f"reconciler watch{f' {watched}' if watched else ''} (or reconciler serve)"
    if one.call and one.stale:
        return silent(one.call, declared=declared)
    if "RunActive" in causes and one.call:
        return f"let run {one.call.run} end, then {apply}"
    if any(action.kind == "wait" for action in actions):
        return apply
    if reason in ("RunFailed", "RunCancelled"):
        return another
    if reason == "Completed":
        return f"nothing; for another backup: {another}"
    return "nothing"


def given_up(one: VmPlan, follows: str, *, declared: bool) -> str:
    """What goes on from a run that nobody seems to work on any more."""
    call = one.call
    assert call is not None
    match one.stale_cause:
        case "ApplianceFailed":
            return f"reconciler resolve {one.name} --failed --reason WHY, then {follows}"
        case "ApplianceCompleted":
            return (
                "see whether every disk has arrived whole; then reconciler resolve "
                f"{one.name} --completed --reason WHY (or --failed)"
            )
        case "ApplianceGone":
            return f"reconciler doctor --only sna; {silent(call, declared=declared)}"
        case _:
            return silent(call, declared=declared)


def silent(call: Call, *, declared: bool) -> str:
    """What goes on from a run of which nothing is known but that it is silent."""
    return (
        f"look at the appliance; when its run is over: {ending(call)}; to end it unfinished: "
        f"{cancelling(call.vm, declared=declared)}"
    )


def spec_files(vm: Vm, requests: str) -> list[str]:
    """What `-f` has to name so that a VM is what it is; requests are read without being named."""
    files = [place.rsplit(":", 2)[0] for place in (vm.place, vm.run_place) if place]
    return [file for file in dict.fromkeys(files) if not file.startswith(f"{requests}/")]
