"""Who waits for what is known by name, and is what looking at all plans would say."""

from __future__ import annotations

import random

from reconciler.core.actions import Wait
from reconciler.core.standing import Standing, Trait
from reconciler.core.vm_plan import VmPlan
from tests.core.builders import absent

CAUSES = ("SnaBusy", "PortPoolExhausted", "ApplianceUnreachable", "BackOff", None)


def a_plan(name: str, cause: str | None, ports: int, *, asks: bool) -> VmPlan:
    wait = (Wait(vm=name, cause=cause, why="w"),) if cause else ()
    taken = {2000 + number: 10100 + number for number in range(ports)}
    return VmPlan(name=name, vm=absent(name), actions=wait, ports=taken, asks=asks)


def test_it_is_what_a_look_at_all_says() -> None:
    dice, found, plans = random.Random(1), Standing(), dict[str, VmPlan]()
    for _ in range(300):
        name = f"ctx-{dice.randrange(6)}"
        if dice.random() < 0.3:
            found.pop(name)
            plans.pop(name, None)
        else:
            one = a_plan(name, dice.choice(CAUSES), dice.randrange(4), asks=dice.random() < 0.5)
            found.put(one)
            plans[name] = one
        assert {one.name: one for one in found.values()} == plans
        assert (len(found), found.exports) == (
            len(plans),
            sum(len(one.ports) for one in plans.values()),
        )
        for trait in Trait:
            fresh = Standing()
            for one in plans.values():
                fresh.put(one)
            names = {one.name for one in fresh.those(trait)}
            assert {one.name for one in found.those(trait)} == names
            assert found.count(trait) == len(names)
    busy = {one.name for one in plans.values() if any(a.cause == "SnaBusy" for a in one.actions)}
    assert {one.name for one in found.those(Trait.FOR_SNA)} == busy
    assert {one.name for one in found.those(Trait.ASKS)} == {
        one.name for one in plans.values() if one.asks
    }
