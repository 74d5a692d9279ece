"""Free space → which runs may begin. Every run that writes is reckoned with before it has written.

A run is reckoned to need, per disk, what the disk's last full image takes, at least `min_free` of
its repository, and never more than the disk's size; an overlay `min_free` at most. What it takes
already is not counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from reconciler.core.actual import Actual, FileSystem, Image
from reconciler.core.desired import Export
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Settings
from reconciler.core.units import Bytes, natural

FULL: Final[Bytes] = 16 << 20
"""A file system with less is full for who copies into it: `nbdcopy` has 64 requests of 256 KiB on
the way at once. Source: nbdcopy(1), --requests and --request-size."""
MOST: Final = 3
"""Other runs that are named one by one."""


class Need(Struct, frozen=True):
    """What a run needs of one file system, beyond what it takes already."""

    least: Bytes = 0
    """What it is reckoned to need."""
    full: Bytes = 0
    """What it needs if its disks become full."""


Needs = Mapping[int, Need]
"""File system (st_dev) → need."""


def earlier(ledger: Ledger, vms: Iterable[str]) -> Mapping[tuple[str, int], Export]:
    """(VM, disk key) → that disk in the newest completed full run of the VM."""
    found: dict[tuple[str, int], Export] = {}
    for vm in vms:
        runs = (ledger.latest(vm, run) for run in reversed(ledger.completed_runs(vm)))
        full = next((call for call in runs if call and call.type == "full"), None)
        found |= {(vm, export.key): export for export in (full.exports if full else ())}
    return found


def writing(ledger: Ledger) -> set[str]:
    """The VMs of which an SNA may be writing a run."""
    return {call.vm for call in ledger.open if call.state.active}


def needed(export: Export, *, least: Bytes, taken: Bytes, before: Bytes) -> Need:
    """What one disk still needs.

    `least`: its repository's `min_free`; `taken`: what its image takes; `before`: what its last
    full image takes.
    """
    size = export.size or 0
    wanted = least if export.backing else max(least, before)
    return Need(max(0, min(size, wanted) - taken), max(0, size - taken))


class Room:
    """The free space of one plan: who is reckoned with, and what is left for the next."""

    def __init__(
        self, settings: Settings, actual: Actual, ledger: Ledger, vms: Iterable[str]
    ) -> None:
        self._settings, self._actual = settings, actual
        self._systems = actual.file_systems
        self._before = earlier(ledger, {*writing(ledger), *vms}) if self._systems else {}
        self._held: dict[str, Needs] = {}
        """VM → what it is reckoned with."""
        self._sums: dict[int, Need] = {}
        """Device → what all of them need together."""
        self._others: dict[int, str] = {}
        """Device → for whom it is reserved, in words; until that changes."""

    def needs(self, exports: Iterable[Export]) -> Needs:
        """What some disks need; one whose file system is not known is not judged."""
        found: dict[int, Need] = {}
        for export in exports:
            image = self._image(export.image)
            if image is None or image.device not in self._systems:
                continue
            last = self._before.get((export.vm, export.key))
            before = self._image(last.image) if last else None
            one = needed(
                export,
                least=self._settings.least_free(export.image),
                taken=image.allocated,
                before=before.allocated if before else 0,
            )
            so_far = found.get(image.device, Need())
            found[image.device] = Need(so_far.least + one.least, so_far.full + one.full)
        return found

    def _image(self, path: str) -> Image | None:
        return self._actual.images.get(path) or self._actual.others.get(path)

    def reserve(self, vm: str, exports: Iterable[Export]) -> None:
        """Reckon with a run that is active, whether there is room or not."""
        self._hold(vm, self.needs(exports) if self._systems else {})

    def take(self, vm: str, exports: Iterable[Export]) -> tuple[str, str] | None:
        """Reckon with a run that wants to begin; (cause, why) if it cannot: it takes nothing."""
        needs = self.needs(exports)
        for device, need in needs.items():
            system = self._systems[device]
            if system.read_only:
                return "RepositoryReadOnly", _read_only(system)
            if need.least > self.left(device):
                return "SpaceShort", self._short(device, need)
        self._hold(vm, needs)
        return None

    def give_back(self, vm: str) -> None:
        """It does not begin after all."""
        self._hold(vm, {})
        del self._held[vm]

    def _hold(self, vm: str, needs: Needs) -> None:
        for sign, some in ((-1, self._held.get(vm, {})), (1, needs)):
            for device, need in some.items():
                so_far = self._sums.get(device, Need())
                self._sums[device] = Need(
                    so_far.least + sign * need.least, so_far.full + sign * need.full
                )
                self._others.pop(device, None)
        self._held[vm] = needs

    def left(self, device: int) -> Bytes:
        """What nobody is reckoned with; 0 if the active runs need more than there is."""
        return max(0, self._systems[device].free - self._sum(device))

    def _sum(self, device: int) -> Bytes:
        return self._sums.get(device, Need()).least

    def _short(self, device: int, need: Need) -> str:
        system = self._systems[device]
        reserved = self._others.get(device)
        if reserved is None:
            others = [vm for vm, needs in self._held.items() if needs.get(device, Need()).least]
            for_whom = f"{at_most(self._sum(device))} of it reserved for {_named(others)}"
            reserved = self._others[device] = f", {for_whom}" if others else ""
        return (
            f"the run needs about {at_most(need.least)} on {system.mount}, which has "
            f"{at_least(system.free)} free{reserved}: free some (df -h {system.mount}); where it "
            "is `min_free` of the repository that asks for so much, lower that in the config"
        )

    def unsure(self, vm: str) -> str:
        """What could still fill up the file systems of a run that is reckoned with; empty: no."""
        for device in self._held.get(vm, ()):
            system = self._systems[device]
            full = self._sums[device].full
            if full > system.free:
                return (
                    f"{system.mount} has {at_least(system.free)} free; the disks that are written "
                    f"to it now need {at_most(full)} if they become full"
                )
        return ""

    def suffering(self, vm: str, run: str) -> tuple[str, str] | None:
        """(cause, why) for which an active run cannot be written any further."""
        for device, need in self._held.get(vm, {}).items():
            system = self._systems[device]
            if system.read_only:
                return "RepositoryReadOnly", f"{_read_only(system)}; run {run} cannot be written"
            if need.full and system.free < FULL:
                return "RepositoryFull", (
                    f"{system.mount} has {at_least(system.free)} free, so writes of run {run} "
                    f"fail: free some (df -h {system.mount}); its servers then go on as they are, "
                    "but a client that was told of the failure may have given up"
                )
        return None


def _read_only(system: FileSystem) -> str:
    return (
        f"{system.mount} is mounted read-only: see dmesg for why, then "
        f"mount -o remount,rw {system.mount}"
    )


def _named(vms: Sequence[str]) -> str:
    names = sorted(vms, key=natural)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def at_least(size: Bytes) -> str:
    """Two digits, rounded down: what is free changes all the time, and its text should not."""
    return _rounded(size, math.floor, 1.0)


def at_most(size: Bytes) -> str:
    """Two digits, rounded up."""
    return _rounded(size, math.ceil, 0.95)


def _rounded(size: Bytes, how: Callable[[float], int], smallest: float) -> str:
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        number = size / factor
        if number >= smallest:
            step = 10.0 ** (math.floor(math.log10(max(1.0, number))) - 1)
            return f"{round(how(number / step) * step, 1):g} {unit}"
    return "nothing" if size == 0 else f"{size} bytes"
