"""What all files of a directory say together, and the step from there when a few of them moved.

A saved file costs what is in it: only its own VMs are worked out, and whether they clash with any
other is asked of an index. Whatever is not plain (an error, a name or a disk that another VM has,
runs, tunnels in what moved) is left to who reads all files together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.declared import Found as Said
from reconciler.core.declared import Specs
from reconciler.core.desired import Desired, Vm, build
from reconciler.core.inventory import Inventory
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Settings
from reconciler.core.source import Found

Key: TypeAlias = tuple[str, ...]
"""A thing that only one VM may have."""


class Taken:
    """Who has what only one VM may have: a place in vCenter, an export name, an image."""

    def __init__(self, vms: Iterable[Vm] = ()) -> None:
        self._of: dict[str, frozenset[Key]] = {}
        self._by: dict[Key, set[str]] = {}
        for vm in vms:
            self.put(vm)

    def put(self, vm: Vm) -> None:
        self.drop(vm.name)
        self._of[vm.name] = keys = frozenset(_keys(vm))
        for key in keys:
            self._by.setdefault(key, set()).add(vm.name)

    def drop(self, name: str) -> None:
        for key in self._of.pop(name, ()):
            names = self._by[key]
            names.discard(name)
            if not names:
                del self._by[key]

    def alone(self, vm: Vm) -> bool:
        """Whether nobody else has anything that this VM is to have, be it only to read it."""
        return all(self._by.get(key, {vm.name}) == {vm.name} for key in _keys(vm))

    @property
    def identities(self) -> frozenset[tuple[str, str]]:
        """(vCenter, path) of all that is to be exported; see `source.identities`."""
        return frozenset((key[1], key[2]) for key in self._by if key[0] == "place")


def _keys(vm: Vm) -> Iterator[Key]:
    if vm.exported and vm.path:
        yield "place", vm.vcenter, vm.path
    for export in vm.exports:
        yield "name", export.name
        yield "image", export.image
        if export.backing:
            yield "image", export.backing


class Joined(Struct, frozen=True, kw_only=True):
    """What all files say together."""

    specs: Specs
    found: Found
    errors: Mapping[str, str]
    digests: Mapping[str, str]
    """VM → digest of all that is written about it."""
    taken: Taken
    """Of what can be done; it goes on to the next of these."""
    plain: bool
    """Nothing is wrong anywhere."""


class Moved(Struct, frozen=True):
    """One file that was read again."""

    name: str
    """As it is called below the directory."""
    before: Said | None
    """What it said; None: it was not there."""
    now: Said | None


def is_plain(specs: Specs, found: Found, built: Desired) -> bool:
    """Whether a step can be taken from there."""
    return not (
        found.errors
        or found.unread
        or found.trouble
        or specs.diagnostics
        or specs.refused
        or specs.unread
        or built.failed
        or built.stale
    )


def step(
    last: Joined,
    moved: Sequence[Moved],
    said: Iterable[Said],
    inventory: Inventory | None,
    settings: Settings,
    ledger: Ledger,
) -> Joined | None:
    """What is said now, but for its digests; None: that takes reading all files together.

    `said`: what every file says now, in reading order. `last.taken` is used up.
    """
    if not last.plain or not all(map(_plain, moved)):
        return None
    known = last.specs.by_name
    gone = {one.spec.name for file in moved if file.before for one in file.before.vms}
    fresh = {one.spec.name: one for file in moved if file.now for one in file.now.vms}
    many = sum(len(file.now.vms) for file in moved if file.now)
    if len(fresh) != many or any(name in known and name not in gone for name in fresh):
        return None  # declared twice
    if any(last.specs.asked(name) for name in gone - fresh.keys()):
        return None  # the inventory may bring it in
    by_name = {**known, **fresh}
    for name in gone - fresh.keys():
        del by_name[name]
    specs = last.specs.with_vms(tuple(chain.from_iterable(one.vms for one in said)), by_name)
    built = build(specs.only(fresh.keys()), inventory, settings, ledger)
    if built.failed:
        return None
    for name in gone:
        last.taken.drop(name)
    for vm in built.vms.values():
        if not last.taken.alone(vm):
            return None
        last.taken.put(vm)
    named = dict(last.found.named)
    for name in gone - fresh.keys():
        del named[name]
    for file in moved:
        if file.now:
            named |= dict.fromkeys((one.spec.name for one in file.now.vms), file.name)
    identities = last.taken.identities
    return replace(last, specs=specs, found=replace(last.found, named=named, identities=identities))


def _plain(file: Moved) -> bool:
    return all(
        not (one.runs or one.tunnels or one.diagnostics or one.refused or one.lost)
        for one in (file.before, file.now)
        if one is not None
    )
