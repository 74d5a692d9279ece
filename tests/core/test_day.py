"""A day of a hub in virtual time: resyncs, back-offs, their resets, a pause."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from reconciler.core.call import CallState
from reconciler.core.ledger import Pause
from reconciler.core.plan import Plan
from reconciler.core.settings import Loop
from reconciler.core.units import Seconds
from reconciler.execute import Step
from tests.core.builders import a_settings, a_vm, wanting
from tests.fakes import START, FakeHost, Process, Reply, one_pass, planned

HOUR: Final[Seconds] = 3600.0
DAY: Final[Seconds] = 24 * HOUR
NOON: Final[Seconds] = START + DAY / 2


class Day:
    """A hub whose VMs are looked at when something ends, when a wait is over, and every resync."""

    def __init__(self, *names: str) -> None:
        self.host = FakeHost(a_settings(loop=Loop(resync=120.0)))  # a day of 30 s takes longer
        self.desired = wanting(*(a_vm(name) for name in names))
        self.resync = self.host.settings.loop.resync
        self.lives: dict[str, Callable[[Seconds], Seconds]] = {}
        """VM → how long a server of it lives that is started at some moment."""
        self.deaths: list[tuple[Seconds, str, Process]] = []
        self.known: set[int] = set()
        self.steps: dict[str, list[tuple[Seconds, Step]]] = defaultdict(list)
        self.looks = 0

    def run(self, until: Seconds) -> None:
        host = self.host
        while host.clock < until:
            found = self.look()
            times = [host.clock + self.resync, until]
            times += [one.again_at for one in found.vms if one.again_at]
            times += [self.deaths[0][0]] if self.deaths else []
            host.clock = max(host.clock + 0.001, min(times))
            while self.deaths and self.deaths[0][0] <= host.clock:
                _, _, process = heapq.heappop(self.deaths)
                if process.identity in host.processes:
                    host.kill(process)

    def look(self) -> Plan:
        """What is to be done after it."""
        self.looks += 1
        steps: list[Step] = []
        found = one_pass(self.host, self.desired, steps=steps)
        for step in steps:
            self.steps[step.action.vm].append((self.host.clock, step))
        for process in self.host.processes.values():
            mark = process.served.mark
            assert mark
            if process.identity.pid not in self.known and mark.vm in self.lives:
                self.known.add(process.identity.pid)
                end = self.host.clock + self.lives[mark.vm](self.host.clock)
                heapq.heappush(self.deaths, (end, mark.vm, process))
        return planned(self.host, self.desired) if steps else found

    def of(self, vm: str, reason: str) -> Sequence[Seconds]:
        """When a step of a VM had this outcome."""
        return [when for when, step in self.steps[vm] if step.reason == reason]


def per_hour(times: Sequence[Seconds]) -> Mapping[int, int]:
    found: dict[int, int] = defaultdict(int)
    for when in times:
        found[int((when - START) // HOUR)] += 1
    return found


def test_a_day_of_crashes_back_offs_and_resets() -> None:
    day = Day("calm", "loops", "stumbles", "mended")
    day.lives = {
        "loops": lambda _: 0.5,  # whatever is done
        "stumbles": lambda _: 2 * HOUR,
        "mended": lambda now: 1.0 if now < NOON else DAY,  # until somebody repairs it
    }
    day.run(START + DAY)

    assert day.of("calm", "Restarted") == []
    assert day.looks < DAY / day.resync + 1000  # no busy loop

    loops = day.of("loops", "Restarted")
    gaps = [two - one for one, two in pairwise(loops)]
    least = [min(300, 2**n) for n in range(len(gaps))]
    assert all(a <= b <= a * 1.1 + 0.01 for a, b in zip(least, gaps, strict=True))
    assert all(9 <= count <= 13 for hour, count in per_hour(loops).items() if hour)  # for ever

    stumbles = day.of("stumbles", "Restarted")
    assert len(stumbles) == 11  # each at once: it had lived
    assert all(abs((when - START) % (2 * HOUR)) < 1 for when in stumbles)

    mended = [when for when in day.of("mended", "Restarted") if when >= NOON - 330]
    assert len([when for when in mended if when >= NOON]) <= 1
    assert max(mended) <= NOON + 330
    (lease,) = day.host.records.ledger().of("mended")
    assert lease.started

    calls = day.host.started()
    assert sorted(calls.values()) == [1, 1, 1, 1]  # a call each, whatever died


def test_a_call_that_cannot_be_delivered_all_night_is_made_once_in_the_morning() -> None:
    day = Day("ctx-1")
    (sna,) = day.host.snas.values()
    sna.script.extend([Reply.DOWN] * 200)
    day.run(START + 8 * HOUR)
    tries = day.of("ctx-1", "CallNothingSent")
    assert 95 <= len(tries) <= 110  # 2, 4, 8 … then every five minutes or a little more
    gaps = [two - one for one, two in pairwise(tries)]
    assert gaps[0] >= 2
    assert min(gaps[10:]) >= 300
    assert max(gaps) <= 330.01
    sna.script.clear()
    day.run(START + 9 * HOUR)
    call = day.host.records.ledger().latest("ctx-1", "r1")
    assert call
    assert call.state is CallState.ACCEPTED
    assert (call.failures, call.retry_at) == (0, 0)
    assert list(day.host.started().values()) == [1]


def test_a_tunnel_that_is_down_all_night_costs_nothing_and_the_run_begins_in_the_morning() -> None:
    day = Day("ctx-1")
    (sna,) = day.host.snas.values()
    sna.down = True
    day.run(START + 8 * HOUR)
    assert day.steps["ctx-1"] == []
    assert (day.host.claims, day.host.processes, day.host.records.leases) == ({}, {}, {})
    assert not any(image.exists for image in day.host.images.values())
    sna.down = False
    day.run(START + 9 * HOUR)
    assert list(day.host.started().values()) == [1]


def test_a_paused_night_changes_nothing_and_ends_by_itself() -> None:
    day = Day("ctx-1")
    day.run(START + HOUR)
    until = START + 6 * HOUR
    day.host.records.pauses = {
        "ctx-1": Pause(vm="ctx-1", reason="night", since=START + HOUR, until=until)
    }
    for process in list(day.host.processes.values()):
        day.host.kill(process)
    day.run(until - 1)
    assert day.of("ctx-1", "Restarted") == []
    day.run(until + HOUR)
    (back,) = day.of("ctx-1", "Restarted")
    assert 0 <= back - until <= 1  # at once, and not at the next resync by chance
    assert len(day.host.processes) == 1
