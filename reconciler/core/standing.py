"""How VMs stood when they were looked at last, by what somebody has to know of them at once.

Most VMs of a hub are at rest. Who asks which of them wait for something does not look at them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Final

from reconciler.core.ahead import waits_for_a_place, waits_for_sna, waits_to_reach
from reconciler.core.vm_plan import VmPlan


class Trait(Enum):
    """What is asked for; see `core/ahead.py`."""

    FOR_A_PLACE = auto()
    """It can go on when another VM gives something back."""
    FOR_SNA = auto()
    """It is ready to be called for, but for a place at its SNA."""
    TO_REACH = auto()
    """Its run begins when its SNA answers again."""
    ASKS = auto()
    """Its SNA is to be asked about its call."""
    WAITS = auto()
    HELD = auto()
    """Something stands in the way that does not go by itself."""


_TRAITS: Final[dict[Trait, Callable[[VmPlan], bool]]] = {
    Trait.FOR_A_PLACE: waits_for_a_place,
    Trait.FOR_SNA: waits_for_sna,
    Trait.TO_REACH: waits_to_reach,
    Trait.ASKS: lambda one: one.asks,
    Trait.WAITS: lambda one: any(action.kind == "wait" for action in one.actions),
    Trait.HELD: lambda one: any(action.kind in ("hold", "refuse") for action in one.actions),
}


class Standing:
    """VM → its plan as it was seen last. Who uses it from several threads has a lock."""

    def __init__(self) -> None:
        self._plans: dict[str, VmPlan] = {}
        self._with: dict[Trait, dict[str, VmPlan]] = {trait: {} for trait in Trait}
        self.exports = 0
        """Ports of all of them together."""

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, name: str) -> VmPlan | None:
        return self._plans.get(name)

    def values(self) -> Iterable[VmPlan]:
        return self._plans.values()

    def put(self, one: VmPlan) -> None:
        """It was looked at."""
        before = self._plans.get(one.name)
        self.exports += len(one.ports) - (len(before.ports) if before else 0)
        self._plans[one.name] = one
        for trait, has in _TRAITS.items():
            if has(one):
                self._with[trait][one.name] = one
            else:
                self._with[trait].pop(one.name, None)

    def pop(self, name: str) -> None:
        """Nothing is wanted of it any more."""
        before = self._plans.pop(name, None)
        if before is None:
            return
        self.exports -= len(before.ports)
        for some in self._with.values():
            some.pop(name, None)

    def those(self, trait: Trait) -> list[VmPlan]:
        """The VMs of which something is true."""
        return list(self._with[trait].values())

    def count(self, trait: Trait) -> int:
        return len(self._with[trait])
