"""Asking for runs: which VMs are meant, what comes of it, and the file that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.call import CallState
from reconciler.core.declared import MAX_WHO, CheckedRun, Declared, Specs
from reconciler.core.desired import Desired, Vm
from reconciler.core.document import parse
from reconciler.core.errors import Diagnostic
from reconciler.core.inventory import Inventory
from reconciler.core.ledger import Ledger
from reconciler.core.names import meant
from reconciler.core.runs import choose, unfit
from reconciler.core.selector import Selector
from reconciler.core.spec_files import read
from reconciler.core.units import Bytes
from reconciler.core.vm_plan import new_run

# -- who is meant


class Selection(Struct, frozen=True):
    """The VMs that a selector means."""

    names: tuple[str, ...]
    left_out: Mapping[str, str]
    """VM → why no run of it can be asked for, although its labels match."""


def select(specs: Specs, selector: Selector) -> Selection:
    """The declared VMs whose labels match."""
    found = [one for one in specs.vms if selector.matches(one.spec.labels)]
    return Selection(
        names=tuple(one.spec.name for one in found if not unfit(one)),
        left_out={one.spec.name: why for one in found if (why := unfit(one))},
    )


def labels(specs: Specs) -> list[str]:
    """Every label that a declared VM has, as `key=value`."""
    pairs = {(key, value) for one in specs.vms for key, value in one.spec.labels.items()}
    return [f"{key}={value}" for key, value in sorted(pairs)]


def named_vm(name: str, specs: Specs, inventory: Inventory | None) -> list[str]:
    """The VM contexts that a name may mean: the context itself, else a VM's name in vCenter."""
    there = inventory.names if inventory else ()
    every = {*(one.spec.name for one in specs.vms), *specs.refused, *there}
    return meant(name, every, shown_names(specs, inventory))


def shown_names(specs: Specs, inventory: Inventory | None) -> dict[str, str]:
    """VM context → its name in vCenter; what a spec says counts before the inventory."""
    known = inventory.vms if inventory else {}
    names = {name: one.vm.name for name, one in known.items()}
    names |= {one.spec.name: one.spec.vm.name for one in specs.vms if one.spec.vm.name}
    return {vm: name for vm, name in names.items() if name}


# -- what comes of it


class Verdict(Struct, frozen=True):
    """What comes of asking for a run of one VM."""

    said: str
    write: bool = False
    """It is a request to be written down; else there is nothing to do, or it is refused."""
    refused: bool = False


def weigh(
    asked: Sequence[CheckedRun], specs: Specs, inventory: Inventory | None, ledger: Ledger
) -> list[Verdict]:
    """What comes of asking for each of these runs."""
    counts = {one.spec.name: one for one in choose(specs, inventory, ledger).vms}
    return [considered(one, counts.get(one.vm), ledger) for one in asked]


def considered(asked: CheckedRun, now: Declared | None, ledger: Ledger) -> Verdict:
    """What comes of asking for a run; `now` has the run that counts of that VM without it."""
    vm, run = asked.vm, asked.run
    call = ledger.latest(vm, run)
    changed = call is not None and call.type != asked.type and not call.fallback
    if (
        call is None
        or call.state is CallState.DUE
        or (call.state is CallState.REJECTED and changed)  # a change arms it again
    ):
        counts = now.spec.backup if now else None
        wanted = (run, asked.type, asked.fallback)
        if counts and (counts.run, counts.type, counts.fallback) == wanted:
            return Verdict(f"run {run} of {vm} is asked for already{_turn(asked, now, ledger)}")
        return Verdict(f"run {run} of {vm} is asked for{_turn(asked, now, ledger)}", write=True)
    if call.state is CallState.REJECTED:
        said = (
            f"cannot ask for run {run} of {vm} again: SNA {call.sna}: {call.message}; when that "
            f"is mended: reconciler retry {vm}"
        )
        return Verdict(said, refused=True)
    if changed:
        said = (
            f"cannot ask for run {run} of {vm} as {asked.type}: it was asked for as {call.type}, "
            f"and is {call.state}; for another run: {new_run(vm)}"
        )
        return Verdict(said, refused=True)
    if call.state is CallState.COMPLETED:
        said = f"run {run} of {vm} is COMPLETED already; for another run: {new_run(vm)}"
        return Verdict(said)
    if call.state.terminal:
        why = f": {call.message}" if call.message else ""
        said = (
            f"cannot ask for run {run} of {vm} again: it is {call.state}{why}; for another run: "
            f"{new_run(vm)}"
        )
        return Verdict(said, refused=True)
    hint = f"; see: reconciler explain {vm}" if call.state is CallState.UNKNOWN else ""
    return Verdict(f"run {run} of {vm} is asked for already: it is {call.state}{hint}")


def _turn(asked: CheckedRun, now: Declared | None, ledger: Ledger) -> str:
    """When a run has its turn, and what becomes of the one that would have had it."""
    said = ""
    counts = now.spec.backup if now else None
    waiting = ledger.latest(asked.vm, counts.run) if counts else None
    if counts and counts.run != asked.run and (not waiting or waiting.state is CallState.DUE):
        own = now is not None and now.entry is None
        said += (
            f", before {counts.run}, which its spec asks for and which comes after it"
            if own
            else f", in place of {counts.run}, which was not called"
        )
    active = ledger.active(asked.vm)
    if active and active.run != asked.run:
        said += f"; it has its turn when run {active.run}, which is {active.state}, has ended"
    return said


def under_way(vm: str, specs: Specs, inventory: Inventory | None, ledger: Ledger) -> str:
    """The run of a VM that is asked for and has not ended; empty: there is none.

    One that was refused has ended for who asked: what asks for it again is `retry`, or a change.
    """
    active = ledger.active(vm)
    if active:
        return active.run
    for one in choose(specs.only((vm,)), inventory, ledger).vms:
        if one.spec.backup and not unfit(one):
            call = ledger.latest(vm, one.spec.backup.run)
            if call is None or call.state is CallState.DUE:
                return one.spec.backup.run
    return ""


def with_requests(specs: Specs, texts: Mapping[str, str]) -> Specs:
    """The same, and what these files of requests (file → text) ask for."""
    documents = [found for file, text in texts.items() if (found := parse(text, file)[0])]
    new = read([], documents)
    return replace(
        specs,
        runs=(*specs.runs, *new.runs),
        diagnostics=(*specs.diagnostics, *new.diagnostics),
    )


def problems(desired: Desired, files: Collection[str]) -> list[Diagnostic]:
    """What keeps VMs from being what is asked for. `files` are not written yet: no line in them
    can be looked at."""
    return [
        replace(one, place=None) if one.place and one.place.file in files else one
        for one in desired.diagnostics
        if one.severity == "error"
    ]


# -- its words


def rendered(asked: CheckedRun, when: str, command: str = "reconciler backup") -> str:
    """The file of a request. Values are quoted: none is read as a number, a boolean, a template."""
    more = f"    policy: {_quoted(asked.policy)}\n" if asked.policy else ""
    if asked.tags:
        more += "    tags:\n"
    for name, value in asked.tags.items():
        more += f"      {json.dumps(name, ensure_ascii=False)}: {_quoted(value)}\n"
    return (
        f"# Written by `{command}`, {when}. A newer request of this VM replaces it.\n"
        "# It asks for nothing once the run has ended, and may be deleted then.\n"
        "runs:\n"
        f"  - vm: {json.dumps(asked.vm)}\n"
        f"    run: {json.dumps(asked.run)}\n"
        f"    type: {json.dumps(asked.type)}\n"
        + (f"    fallback: {json.dumps(asked.fallback)}\n" if asked.fallback else "")
        + f"    by: {json.dumps(asked.by, ensure_ascii=False)}\n"
        + more
    )


def _quoted(text: str) -> str:
    """A text as it stands in a file: what looks like an expression in it is none."""
    plain = text.replace("{", "{{ '{' }}") if "{{" in text else text
    return json.dumps(plain, ensure_ascii=False)


def one_line(who: str) -> str:
    """Who asked, as it can be written down, whatever the environment says of it."""
    plain = "".join(char if char.isprintable() else "?" for char in who)
    return plain.replace("{", "(")[:MAX_WHO]


def keyed(vm: str, key: str) -> str:
    """The run that a client means by a key of its own: the same again for the same key."""
    import hashlib  # late: only who asks by a key

    return f"api-{hashlib.sha256(json.dumps([vm, key]).encode()).hexdigest()[:16]}"


_PLACEHOLDER: Final = re.compile(r"{([^{}]*)}")


def named(pattern: str, values: Mapping[str, str]) -> str:
    """A run's name from a pattern such as `nightly-{date}`. Raises ValueError."""

    def value(match: re.Match[str]) -> str:
        word = match.group(1)
        if word not in values:
            known = " and ".join(f"{{{one}}}" for one in values)
            raise ValueError(f"cannot use {match.group(0)} in the name of a run: write {known}")
        return values[word]

    return _PLACEHOLDER.sub(value, pattern)


def unlike(declared: Vm, applied: Vm, requests: str) -> bool:
    """Whether what was applied of a VM is not what is declared of it, wherever that is written.

    A run that a request asks for is no difference: who watches reads the request in a moment, too.
    `requests`: the directory of the requests.
    """
    declared, applied = (replace(one, place="") for one in (declared, applied))
    if not applied.run_place.startswith(f"{requests}/"):
        return replace(declared, run_place="") != replace(applied, run_place="")
    return _without_run(declared) != _without_run(applied)


def _without_run(vm: Vm) -> tuple[Vm, list[tuple[int, int, Bytes | None]]]:
    rest = replace(
        vm, run="", type="", fallback="", fell_back="", exports=(), asked="", policy="", tags={},
        run_place="",
    )  # fmt: skip
    return rest, [(one.key, one.position, one.size) for one in vm.exports]
