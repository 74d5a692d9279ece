"""SIGKILL before and after every effect of every scenario; the next commands make it whole.

The points are not listed here: each scenario is run once to its end, and every effect that it came
by is a point, on both its sides, as often as it came.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from reconciler.core.call import CallState
from reconciler.host.effects import Effect, Side
from tests.crashing import Point
from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until
from tests.ports import Dealer

MIB: Final = 1 << 20
KEYS: Final = (2000, 2001, 2002)
APPLY: Final = ("apply", "-y")
PARTS: Final = 4
"""A scenario's points are dealt to that many tests, so that they can run side by side."""


@dataclass
class World:
    """What a scenario prepares: a hub, its appliance, and the VM `pg` or the VMs `pg` and `web`."""

    site: Site
    appliance: Appliance
    api: int
    """Port on which `apply --wait` listens to the appliance's client."""

    def fill(self, *vms: str, keys: Sequence[int] = KEYS) -> None:
        """Source disks for the appliance to copy."""
        for vm in vms:
            for key in keys:
                self.appliance.source(vm, key, os.urandom(MIB))

    def spec(self, **changes: object) -> None:
        self.site.spec(self.site.vm("pg", [MIB] * 3, **changes))

    def apply(self, code: int | None = 0) -> None:
        """…and wait until the appliance has done what it was asked for."""
        self.site.apply(code=code)
        crashes.copies_ended(self.appliance)

    def resolve(self, answer: str) -> None:
        self.site.run("resolve", "pg", answer, "--reason", "a test", "-y")


@dataclass(frozen=True)
class Scenario:
    """A state of the world, the command that is to die in it, and what must come of that."""

    prepare: Callable[[World], None]
    command: Sequence[str] = APPLY
    again: Sequence[str] = ()
    """What is typed after the crash; empty: the same."""
    finish: Callable[[World], None] = lambda _: None
    """What is left to say when all has been done again."""
    runs: Mapping[str, tuple[str, Sequence[int]]] = field(
        default_factory=lambda: {"pg": ("r1", KEYS)}
    )
    """VM → (run, disks) that are served in the end."""
    began: Mapping[str, int] = field(default_factory=lambda: {"pg-r1": 1})
    """How often the appliance has begun each run in the end."""
    states: frozenset[CallState] = frozenset({CallState.ACCEPTED})
    tainted: bool = False
    copied: bool = True
    """Every image of the newest run holds the bytes of its source in the end."""
    heard: bool = False
    """The appliance's client reports to the hub."""
    mended: bool = True
    """The appliance behaves again after the crash."""


def first(world: World) -> None:
    world.fill("pg")
    world.spec()


def heal(world: World) -> None:
    """A server died; nobody has written yet, as there was nothing to copy."""
    world.spec()
    world.apply()
    world.site.kill(world.site.pids()["pg", 2001])


def heal_written(world: World) -> None:
    """A server died after a client had written: the run is lost, and must never look good."""
    world.fill("pg")
    world.spec()
    world.apply()
    world.site.kill(world.site.pids()["pg", 2001])


def stop(world: World) -> None:
    world.spec()
    world.apply()
    world.resolve("--completed")
    world.site.spec({"name": "pg", "state": "absent"})


def cancel(world: World) -> None:
    world.spec()
    world.apply()


def second_run(world: World) -> None:
    world.fill("pg")
    world.spec()
    world.apply()
    world.resolve("--completed")
    world.site.reported("pg")
    world.spec(backup={"run": "r2", "type": "incremental"})


def hangs(mode: str) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        first(world)
        world.site.appliance_at(world.appliance.url, timeout="500ms")
        world.appliance.misbehave(mode, 1)

    return prepare


def forgets(world: World) -> None:
    """The job runs, and the appliance does not know it when asked."""
    first(world)
    world.appliance.misbehave("forget")


def refuses(world: World) -> None:
    first(world)
    world.appliance.misbehave("refuse", 1)


def side_by_side(world: World) -> None:
    world.fill("pg", "web", keys=KEYS[:2])
    world.site.spec(world.site.vm("pg", [MIB] * 2), world.site.vm("web", [MIB] * 2))


def end_of_a_run(world: World) -> None:
    world.fill("pg")
    world.spec()
    world.site.appliance_at(world.appliance.url, reports_end=True)
    world.apply()


def witnessed(world: World) -> None:
    """UNKNOWN, and the appliance knows the job."""
    hangs("hang-after")(world)
    world.apply(code=7)


def denied(world: World) -> None:
    """UNKNOWN, and an appliance that remembers its jobs does not know it."""
    hangs("hang-before")(world)
    world.apply(code=7)
    world.site.appliance_at(world.appliance.url, remembers_jobs=True)


def another_attempt(world: World) -> None:
    hangs("hang-before")(world)
    world.apply(code=7)
    world.resolve("--resend")


def not_in_the_ledger(world: World) -> None:
    """The servers run, and their leases are gone."""
    first(world)
    world.apply()
    with sqlite3.connect(world.site.folder / "state" / "state.db") as db:
        db.execute("DELETE FROM leases")
    db.close()


def restore(world: World) -> None:
    end_of_a_run(world)
    world.apply()
    world.site.spec({"name": "look", "for": "restore", "of": {"vm": "pg", "run": "r1"}})


def by_its_clients_word(world: World) -> None:
    first(world)
    world.site.write_config(api={"listen": f"127.0.0.1:{world.api}"})


def unheard(world: World) -> None:
    """A client that found nobody to report to does not come again: a person says that it ended."""
    if crashes.calls(world.site)["pg"].state is CallState.ACCEPTED:
        crashes.copies_ended(world.appliance)
        world.resolve("--completed")
        world.apply()


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "first backup": Scenario(first),
    "heal": Scenario(heal, copied=False),
    "heal after a write": Scenario(heal_written, tainted=True),
    "stop": Scenario(stop, runs={}, states=frozenset({CallState.COMPLETED}), copied=False),
    "cancel": Scenario(
        cancel,
        ("stop", "pg", "-y", "--cancel-run"),
        runs={},
        states=frozenset({CallState.CANCELLED}),
        copied=False,
    ),
    "second run": Scenario(second_run, runs={"pg": ("r2", KEYS)}, began={"pg-r1": 1, "pg-r2": 1}),
    "hang after": Scenario(hangs("hang-after")),
    "hang before": Scenario(hangs("hang-before")),
    "forgets": Scenario(forgets, mended=False),
    "refuses": Scenario(refuses),
    "side by side": Scenario(
        side_by_side,
        runs={"pg": ("r1", KEYS[:2]), "web": ("r1", KEYS[:2])},
        began={"pg-r1": 1, "web-r1": 1},
    ),
    "end of a run": Scenario(end_of_a_run, runs={}, states=frozenset({CallState.COMPLETED})),
    "by its client's word": Scenario(
        by_its_clients_word,
        ("apply", "-y", "--wait"),
        again=APPLY,
        finish=unheard,
        runs={},
        states=frozenset({CallState.COMPLETED}),
        heard=True,
    ),
    "witnessed": Scenario(witnessed),
    "denied": Scenario(denied),
    "another attempt": Scenario(another_attempt),
    "not in the ledger": Scenario(not_in_the_ledger),
    "restore": Scenario(
        restore, runs={"look": ("r1", KEYS)}, states=frozenset({CallState.COMPLETED})
    ),
}
COUNTED: Final = "crash points × sides"


class Sweep:
    """One world after another in the same folder, ports and appliance."""

    def __init__(self, folder: Path, ports: range, appliance: Appliance) -> None:
        self.folder, self.appliance = folder, appliance
        self.ports, self.api = ports[:-1], ports[-1]
        self.heard = False
        self.numbers = iter(range(1_000_000))

    def world(self, scenario: Scenario) -> World:
        folder = self.folder / f"{self.folder.name[-20:]}-{next(self.numbers)}"
        folder.mkdir()
        site = Site(folder, self.ports)
        site.config["qemu_nbd"] = {"start_timeout": "10s", "stop_grace": "1s"}
        site.appliance_at(self.appliance.url)
        self.listen(scenario.heard)
        self.appliance.misbehave("none")
        self.appliance.log.write_text("")
        shutil.rmtree(self.appliance.sources)
        self.appliance.sources.mkdir()
        world = World(site, self.appliance, self.api)
        scenario.prepare(world)
        return world

    def listen(self, heard: bool) -> None:
        """Let the appliance's client report to the hub, or to nobody."""
        if heard is not self.heard:
            self.appliance.end()
            self.appliance.start(*(("--hub", f"http://127.0.0.1:{self.api}") if heard else ()))
            self.heard = heard

    def leave(self, world: World) -> None:
        crashes.copies_ended(self.appliance)
        world.site.clean_up()
        shutil.rmtree(world.site.folder)

    def points(self, scenario: Scenario) -> list[Point]:
        world = self.world(scenario)
        try:
            return crashes.record(world.site, scenario.command)
        finally:
            self.leave(world)

    def survive(self, scenario: Scenario, options: Sequence[str]) -> None:
        """Die there, go on, and look at everything."""
        world = self.world(scenario)
        try:
            self.die_and_go_on(scenario, world, options)
        finally:
            self.leave(world)

    def die_and_go_on(self, scenario: Scenario, world: World, options: Sequence[str]) -> None:
        site, appliance = world.site, world.appliance
        before = site.servers()
        crashes.crash(site, options, scenario.command)
        if scenario.mended:
            appliance.misbehave("none")
        left = site.servers()
        self.not_called_again(scenario, world)
        crashes.recover(site, appliance, scenario.again or scenario.command)
        scenario.finish(world)
        self.whole(scenario, world)
        # What ran before the crash or was left by it, and is wanted, was not touched by anybody.
        after = site.servers()
        expected = crashes.wanted(site, scenario.runs)
        for identity, mark in {**before, **left}.items():
            assert identity in after or mark.key not in expected, f"{mark} was restarted"

    def whole(self, scenario: Scenario, world: World) -> None:
        """The world is what the scenario leads to."""
        expected = crashes.wanted(world.site, scenario.runs)
        crashes.check(world.site, world.appliance, expected, scenario.began)
        newest = crashes.calls(world.site)
        assert {call.state for call in newest.values()} == scenario.states
        assert {call.tainted for call in newest.values()} == {scenario.tainted}
        if scenario.copied:
            self.compare(world)

    def not_called_again(self, scenario: Scenario, world: World) -> None:
        """A call that we died in is unknown, or known by a witness; the same attempt, either way.

        That its appliance was not asked a second time, its log tells in the end.
        """
        before = crashes.calls(world.site)
        intended = [vm for vm, call in before.items() if call.state is CallState.INTENDED]
        if not intended or world.site.config["snas"]["site-a"].get("remembers_jobs"):
            return
        world.site.run(*(scenario.again or scenario.command), code=None)
        after = crashes.calls(world.site)
        for vm in intended:
            assert after[vm].state in (CallState.UNKNOWN, CallState.ACCEPTED)
            assert after[vm].job_id == before[vm].job_id

    def compare(self, world: World) -> None:
        """Every disk has arrived whole: the run was begun only when all of them answered."""
        assert {end["status"] for end in crashes.copies_ended(world.appliance)} == {"completed"}
        served = {mark.key: mark.port for mark in world.site.servers().values()}
        for call in crashes.calls(world.site).values():
            for export in call.exports:
                source = world.appliance.sources / call.vm / f"{export.key}.raw"
                port = served.get((call.vm, export.key, call.run, call.attempt))
                where = f"nbd://127.0.0.1:{port}/{export.name}" if port else export.image
                assert crashes.same_bytes(source, where, "raw" if port else "qcow2"), where


@pytest.fixture
def sweep(tmp_path: Path, dealer: Dealer) -> Iterator[Sweep]:
    appliance = Appliance(tmp_path / "appliance")
    yield Sweep(tmp_path, dealer.deal(11), appliance)
    appliance.end()


def middle(points: Sequence[Point]) -> list[Point]:
    """Each effect and side once: the middle one of its occurrences."""
    often = Counter((point.effect, point.side) for point in points)
    return [p for p in points if p.number == (often[p.effect, p.side] + 1) // 2]


Count = Callable[[str, int], None]


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.soak) for part in (1, 2, 3))]
)
def test_every_effect_of_a_first_backup_once_on_both_sides(
    sweep: Sweep, count: Count, part: int
) -> None:
    scenario = SCENARIOS["first backup"]
    every = middle(sweep.points(scenario))
    # Parts 0 and 2 together have each effect once, now before and now after it; so have 1 and 3.
    points = [point for at, point in enumerate(every) if (at // 2 + at) % 2 == part % 2]
    points = points[part // 2 :: 2]
    for point in points:
        sweep.survive(scenario, ("--at", str(point)))
    count(COUNTED, len(points))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_point_of_every_scenario(sweep: Sweep, count: Count, name: str, part: int) -> None:
    scenario = SCENARIOS[name]
    points = sweep.points(scenario)[part::PARTS]
    for point in points:
        sweep.survive(scenario, ("--at", str(point)))
    count(COUNTED, len(points))


@pytest.mark.soak
def test_every_effect_is_in_a_scenario(sweep: Sweep) -> None:
    seen = {
        (point.effect, point.side)
        for scenario in SCENARIOS.values()
        for point in sweep.points(scenario)
    }
    # Backups are removed by no apply: tests/host/test_retaining.py crashes there.
    elsewhere = {Effect.FORGET, Effect.UNLINK}
    assert seen == {(effect, side) for effect in {*Effect} - elsewhere for side in Side}


@pytest.mark.parametrize("goes_on", [False, True], ids=["for ever", "for a while"])
@pytest.mark.parametrize("number", [2, pytest.param(1, marks=pytest.mark.soak),
                                    pytest.param(3, marks=pytest.mark.soak)])  # fmt: skip
def test_a_server_that_was_spawned_and_has_not_begun_to_serve(
    sweep: Sweep, count: Count, number: int, goes_on: bool
) -> None:
    scenario = SCENARIOS["first backup"]
    world = sweep.world(scenario)
    site = world.site
    try:
        site.write_config(qemu_nbd={"start_timeout": "2m", "stop_grace": "200ms"})
        crashes.crash(site, ("--hold", str(number)), scenario.command)
        (held,) = crashes.starting(site)
        if goes_on:
            os.kill(held, signal.SIGCONT)
            until(lambda: not crashes.starting(site), "its exec")
        else:
            # In the act of starting for no longer than start_timeout, it is waited for.
            assert f"pid {held} is starting" in site.apply(code=3)
            assert crashes.starting(site) == [held]
            site.write_config(qemu_nbd={"start_timeout": "3s", "stop_grace": "200ms"})
            until(lambda: "StartStuck" in str(crashes.plan(site)), "that it is given up")
        crashes.recover(site, world.appliance)
        sweep.whole(scenario, world)
        assert (held in {one.pid for one in site.servers()}) is goes_on
    finally:
        sweep.leave(world)
    count(COUNTED, 1)
