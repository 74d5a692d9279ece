"""Which run of a VM counts: its own `backup:`, or what `runs:` ask for beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.declared import (
    Asked,
    CheckedBackup,
    CheckedRun,
    CheckedVm,
    Declared,
    Specs,
)
from reconciler.core.errors import Diagnostic, nearest
from reconciler.core.inventory import Inventory
from reconciler.core.ledger import Ledger


class Chosen(Struct, frozen=True):
    """Every VM with the run that counts, and what is wrong with the rest."""

    vms: tuple[Declared, ...]
    diagnostics: tuple[Diagnostic, ...]
    untouched: tuple[str, ...]
    """VMs of which a run is asked for, and that are not what this is about."""


def choose(specs: Specs, inventory: Inventory | None, ledger: Ledger) -> Chosen:
    """The run of every VM: of `backup:` and the newest entry of `runs:`, the one that counts.

    An entry may also bring in a VM that only the inventory knows. One whose run has ended asks
    for nothing: what it would be refused for is not said.
    """
    entries = newest(specs.runs)
    inside = {one.spec.vm for one in specs.runs if not one.aside}
    vms: list[Declared] = []
    wrong: list[Diagnostic] = []
    untouched: list[str] = []
    for own in specs.vms:
        entry = entries.pop(own.spec.name, None)
        if entry and unfit(own):
            if ended(ledger, entry.spec):
                entry = None
            else:
                wrong.append(_unfit(own, entry))
                continue
        one = with_entry(own, entry, ledger) if entry else own
        unsure = _unsure(one, specs, ledger)
        if unsure:
            wrong.append(unsure)
        else:
            vms.append(one)
    for name, entry in entries.items():
        if name in specs.refused:
            continue  # what is wrong with its declaration is said there
        if entry.aside and name not in inside:
            if not ended(ledger, entry.spec):
                untouched.append(name)
            continue
        unknown = _unknown(entry, specs, inventory)
        if not unknown:
            vms.append(_from_inventory(entry))
        elif not ended(ledger, entry.spec):
            wrong.append(unknown)
    return Chosen(tuple(vms), (*wrong, *superseded(specs.runs, ledger)), tuple(untouched))


def newest(runs: Iterable[Asked]) -> dict[str, Asked]:
    """VM → its entry that counts among the entries: the last in reading order."""
    found: dict[str, Asked] = {}
    for one in runs:
        found.pop(one.spec.vm, None)
        found[one.spec.vm] = one
    return found


def with_entry(own: Declared, entry: Asked, ledger: Ledger) -> Declared:
    """A declared VM with the run that counts: an entry's, unless that is behind the VM's own."""
    backup = own.spec.backup
    if backup and not _before(backup, entry.spec, ledger):
        return own
    one = entry.spec
    asked = CheckedBackup(run=one.run, type=one.type, fallback=one.fallback)
    return replace(own, spec=replace(own.spec, backup=asked), entry=entry)


def _before(own: CheckedBackup, entry: CheckedRun, ledger: Ledger) -> bool:
    """Whether an entry counts before a VM's own `backup`.

    It does until its run has ended; then what was written into the spec since has its turn. Where
    both have ended, it is the later one that shows how the VM stands.
    """
    entrys, owns = ledger.latest(entry.vm, entry.run), ledger.latest(entry.vm, own.run)
    if not (entrys and entrys.state.terminal):
        return True
    if not (owns and owns.state.terminal):
        return False
    return entrys.created >= owns.created


def ended(ledger: Ledger, asked: CheckedRun) -> bool:
    """Whether nothing more happens to the run that is asked for."""
    call = ledger.latest(asked.vm, asked.run)
    return call is not None and call.state.terminal


def superseded(runs: Sequence[Asked], ledger: Ledger) -> tuple[Diagnostic, ...]:
    """A warning for each run that will never be asked for: a newer entry has had its turn."""
    last = newest(runs)
    found = []
    for one in runs:
        newer, name = last[one.spec.vm], one.spec.vm
        if newer.spec.run == one.spec.run or not ended(ledger, newer.spec):
            continue
        if not ended(ledger, one.spec):
            summary = (
                f"the run {one.spec.run} of {name} is not asked for: the newer entry for "
                f"{newer.spec.run} ({newer.place('run')}) supersedes it, and has ended; remove the "
                "one that is not meant"
            )
            found.append(Diagnostic("warning", summary, one.place("run"), name, rule="superseded"))
    return tuple(found)


def unfit(own: Declared) -> str:
    """Why no run of a declared VM can be asked for; empty: it can."""
    if own.spec.state == "absent":
        return f"its spec says `state: absent` ({own.place('state')})"
    if own.spec.purpose != "backup":
        return f"its spec says `for: restore` ({own.place('for')}), which makes no backup"
    return ""


def _unfit(own: Declared, entry: Asked) -> Diagnostic:
    summary = (
        f"a run of {entry.spec.vm} is asked for, but {unfit(own)}: remove one of the two; nothing "
        "of this VM is changed"
    )
    return Diagnostic("error", summary, entry.place("vm"), entry.spec.vm, rule="contradiction")


def _unsure(one: Declared, specs: Specs, ledger: Ledger) -> Diagnostic | None:
    """A file that cannot be read may hold the entry of the run that was applied."""
    name, backup = one.spec.name, one.spec.backup
    applied = ledger.applied.get(name)
    if applied is None or not backup or one.spec.state == "absent":
        return None
    run, place = str(applied.vm.get("run", "")), str(applied.vm.get("run_place", ""))
    file = place.rsplit(":", 2)[0]
    if not place or file not in specs.unread or run == backup.run:
        return None
    call = ledger.latest(name, run)
    if call and call.state.terminal:
        return None
    summary = (
        f"VM {name}: the run {run} was asked for at {place}, and {file} cannot be read now: "
        "mend it; nothing of this VM is changed meanwhile"
    )
    return Diagnostic("error", summary, one.place("backup"), name, rule="unreadable")


def _unknown(entry: Asked, specs: Specs, inventory: Inventory | None) -> Diagnostic | None:
    """Why an entry cannot bring in a VM that nobody declares; None: the inventory knows it."""
    name = entry.spec.vm
    known = inventory.names if inventory else ()
    if name in known and not specs.unread:
        return None
    if name in known:
        rule = "unreadable"
        summary = (
            f"the run {entry.spec.run} is asked for a VM {name} that no spec declares, and "
            f"{', '.join(sorted(specs.unread))} cannot be read and may declare it: mend that first"
        )
    else:
        rule = "unknown-name"
        names = {*known, *(one.spec.name for one in specs.vms), *specs.refused}
        unknown = "no inventory can be read"
        if inventory:
            unknown = "the inventory does not know it"
            unknown += f" ({inventory.stale})" if inventory.stale else ""
        summary = (
            f"there is no VM {name!r}: no spec that is read here declares it, and {unknown}"
            f"{nearest(name, names)}"
        )
    return Diagnostic("error", summary, entry.place("vm"), name, rule=rule)


def _from_inventory(entry: Asked) -> Declared:
    """As if `{name: VM, disks: inventory, backup: …}` were written where the entry is."""
    asked = entry.spec
    backup = CheckedBackup(run=asked.run, type=asked.type, fallback=asked.fallback)
    written = CheckedVm(name=asked.vm, disks="inventory", backup=backup)
    return Declared(written, entry.document, entry.path, entry)
