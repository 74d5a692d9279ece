"""Which VMs `serve` looks at, with which settings, and when it looks again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from msgspec.structs import replace

from reconciler import serving
from reconciler.core.call import CallState
from reconciler.core.desired import Vm
from reconciler.core.errors import ConfigError, Diagnostic, HostError, LockError, ReconcilerError
from reconciler.core.ledger import Applied, Lease, Ledger
from reconciler.core.plan import plan
from reconciler.core.settings import Appliance, QemuNbd, Settings
from reconciler.core.units import Endpoint
from reconciler.loop import Applier, Outcome
from reconciler.serving import Keeper, last_applied, merged, unfinished
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_restore,
    a_settings,
    a_vm,
    absent,
    remembered,
    seen,
    wanting,
)

S = CallState


def applied(*vms: Vm, settings: Settings | None = None, **changes: Any) -> Ledger:
    """A ledger in which those were applied last."""
    found = {vm.name: Applied(vm=vm.to_json(), generation=1, at=NOW) for vm in vms}
    return remembered(applied=found, settings=(settings or a_settings()).to_json(), **changes)


def lease_of(vm: Vm) -> Lease:
    return a_lease(vm.exports[0], 10100)


VM = a_vm()
ENDED = [S.COMPLETED, S.FAILED, S.CANCELLED]


@pytest.mark.parametrize(
    ("ledger", "open_"),
    [
        (applied(VM), True),  # asked for, and not a row yet: it waits for ports
        *[(applied(VM, calls=[a_call(VM, state)]), True) for state in S if state.active],
        (applied(VM, calls=[a_call(VM, S.DUE)]), True),
        (applied(VM, calls=[a_call(VM, S.REJECTED)]), False),  # a person is needed
        *[(applied(VM, calls=[a_call(VM, state)]), False) for state in ENDED],
        *[(applied(VM, calls=[a_call(VM, state)], leases=[lease_of(VM)]), True) for state in ENDED],
        (
            applied(
                replace(VM, release="keep"),
                calls=[a_call(VM, S.COMPLETED)],
                leases=[lease_of(VM)],
            ),
            False,
        ),
        (applied(a_vm(run="r2"), calls=[a_call(VM, S.ACCEPTED)]), True),
        (applied(a_vm(run="r2"), calls=[a_call(VM, S.COMPLETED)]), True),
        (applied(absent()), False),
        (applied(absent(), calls=[a_call(VM, S.ACCEPTED)]), True),
        (applied(absent(), leases=[lease_of(VM)]), True),
        (applied(a_restore()), False),
        (remembered(calls=[a_call(VM, S.ACCEPTED)]), False),  # nobody ever applied it
    ],
)
def test_a_vm_is_looked_at_until_its_run_is_over_and_its_ports_are_free(
    ledger: Ledger, open_: bool
) -> None:
    assert bool(unfinished(ledger)) is open_


def test_the_settings_are_those_that_were_applied_but_for_the_ways_to_secrets() -> None:
    was = a_settings(cache="writethrough", advertise="was.example")
    now = replace(
        a_settings(advertise="now.example"),
        qemu_nbd=QemuNbd(shared=99),
        snas={"site-a": Appliance(url="http://new", timeout=7.0)},
        listen=Endpoint("127.0.0.1", 9),
    )
    found = merged(now, applied(VM, settings=was))
    assert (found.advertise, found.qemu_nbd) == ("was.example", was.qemu_nbd)
    assert (found.snas, found.vcenters, found.listen) == (now.snas, now.vcenters, now.listen)


def test_settings_that_were_applied_meanwhile_make_the_look_void() -> None:
    ledger = applied(VM)
    wanted = last_applied(a_settings(), ledger.settings)
    assert set(wanted(ledger).vms) == {"ctx-1"}
    with pytest.raises(HostError, match="applied other settings just now"):
        wanted(replace(ledger, settings={**ledger.settings, "bind": "0.0.0.0"}))


@pytest.mark.parametrize("section", ["snas", "vcenters"])
def test_a_vm_whose_appliance_left_the_config_is_not_called_for_and_holds_up_no_other(
    section: str,
) -> None:
    settings = a_settings()
    gone: Settings = replace(settings, **{section: {}})
    other = a_vm("ctx-2")
    ledger = applied(VM, other, calls=[a_call(other, S.ACCEPTED)])
    found = last_applied(gone, ledger.settings)(ledger)
    assert set(found.vms) == {"ctx-2"}  # it was called for: its end needs neither
    (finding,) = found.diagnostics
    assert f"`{section}`, which the config does not have any more" in finding.summary
    assert plan(found, seen(), ledger, NOW).vms


# -- when it looks


class Fake:
    """Stands where the applier stands; `does` is what happens at each pass."""

    def __init__(self, *does: Callable[[], None]) -> None:
        self.settings = a_settings()
        self.stopping = threading.Event()
        self.does = list(does)
        self.passes = 0
        self.how: dict[str, object] = {}

    def apply(self, _wanted: object, **how: object) -> Outcome:
        self.passes += 1
        self.how = how
        action = self.does.pop(0) if self.does else nothing
        if not self.does:
            self.stopping.set()
        action()
        return Outcome(plan(wanting(VM), seen(), remembered(), NOW))


def fails(error: ReconcilerError) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def nothing() -> None:
    pass


@pytest.fixture
def ledgers(monkeypatch: pytest.MonkeyPatch) -> list[Ledger]:
    """What the store holds, look by look; the last stays."""
    found = [applied(VM)]
    monkeypatch.setattr(serving, "current", lambda _: found.pop(0) if len(found) > 1 else found[0])
    return found


def keeper(fake: Fake, said: list[str], **changes: Any) -> Keeper:
    values: dict[str, Any] = {"reload": lambda: quick(), "say": said.append, **changes}
    return Keeper(cast(Applier, fake), **values)


def quick(**changes: Any) -> Settings:
    """Settings with which it rests for a moment only."""
    sna = Appliance(url="http://x", poll=0.01)
    return replace(a_settings(), snas={"site-a": sna}, **changes)


def test_a_pass_that_fails_is_said_once_and_tried_again(ledgers: list[Ledger]) -> None:
    said: list[str] = []
    held = LockError("cannot change this hub: it is being changed by pid 7")
    fake = Fake(fails(held), fails(held), fails(HostError("no space")), nothing, fails(held))
    keeper(fake, said).run()
    assert fake.passes == 5
    assert [line for line in said if line.startswith("warning")] == [
        "warning: cannot change this hub: it is being changed by pid 7; looking again",
        "warning: no space; looking again",
        "warning: cannot change this hub: it is being changed by pid 7; looking again",
    ]


def test_an_error_inside_ends_it(ledgers: list[Ledger]) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        keeper(Fake(broken, nothing), []).run()


def test_it_ends_when_nobody_takes_callbacks_any_more(ledgers: list[Ledger]) -> None:
    fake = Fake(nothing, nothing)
    with pytest.raises(HostError, match="not any more"):
        keeper(fake, [], check=fails(HostError("not any more"))).run()
    assert fake.passes == 0


def test_a_kick_during_a_pass_is_not_lost(ledgers: list[Ledger]) -> None:
    """It rests for ever but for kicks, so the second pass is the kick's."""
    never = replace(quick(), snas={"site-a": Appliance(url="http://x", poll=threading.TIMEOUT_MAX)})
    fake = Fake()
    one = keeper(fake, [], reload=lambda: never)
    fake.does = [lambda: one.kick("ctx-1"), nothing]
    one.run()
    assert fake.passes == 2


class Rests(threading.Event):
    """Ends the work when somebody rests without a kick."""

    def __init__(self, stopping: threading.Event) -> None:
        super().__init__()
        self.stopping, self.rests = stopping, 0

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            self.rests += 1
            self.stopping.set()
        return self.is_set()


def test_a_kick_is_worth_one_look(ledgers: list[Ledger]) -> None:
    fake = Fake()
    kicked = Rests(fake.stopping)
    one = keeper(fake, [], kicked=kicked)
    fake.does = [lambda: one.kick("ctx-1"), *[nothing] * 9]
    for name in ("ctx-1", "ctx-2", "ctx-1"):
        one.kick(name)  # before it begins: the first look serves them all
    one.run()
    assert kicked.rests == 1
    assert fake.passes == 3  # the first, the kick's, and the one after the rest


def test_what_is_finished_takes_no_lock_and_is_looked_for_again(ledgers: list[Ledger]) -> None:
    done = applied(VM, calls=[a_call(VM, S.COMPLETED)])
    ledgers[:] = [remembered(), done, done, applied(VM)]
    fake = Fake(nothing)
    keeper(fake, []).run()
    assert (fake.passes, len(ledgers)) == (1, 1)
    assert fake.how == {"impatient": False, "note": False}


def test_what_stands_in_the_way_is_said_when_it_is_news(ledgers: list[Ledger]) -> None:
    said: list[str] = []
    fake = Fake(nothing, nothing, nothing)
    stuck = wanting(VM, settings=a_settings("10100-10100"))
    both = replace(stuck, vms={**stuck.vms, "ctx-2": a_vm("ctx-2")})
    apply = fake.apply

    def one(wanted: object, **how: object) -> Outcome:
        apply(wanted, **how)
        return Outcome(plan(both if fake.passes != 2 else wanting(VM), seen(), remembered(), NOW))

    fake.apply = one  # type: ignore[method-assign, assignment]
    keeper(fake, said).run()
    assert len(said) == 1
    assert said[0].startswith("ctx-2: wait: PortPoolExhausted: ")


def test_a_config_that_cannot_be_read_leaves_it_as_it_was(ledgers: list[Ledger]) -> None:
    said: list[str] = []
    broken = ConfigError([Diagnostic("error", "half a file")])
    turns: list[Settings | ConfigError] = [quick(), broken, broken, quick()]

    def reload() -> Settings:
        turn = turns.pop(0)
        if isinstance(turn, ConfigError):
            raise turn
        return turn

    fake = Fake(nothing, nothing, nothing, nothing)
    keeper(fake, said, reload=reload).run()
    assert fake.passes == 4
    assert said == ["warning: error: half a file; going on with the config as it was"]


def test_what_a_restart_takes_is_said_and_does_not_change_under_it(ledgers: list[Ledger]) -> None:
    said: list[str] = []
    turns = [quick(), quick(hub="other", listen=Endpoint("127.0.0.1", 9))]
    one = keeper(Fake(nothing, nothing), said, reload=lambda: turns.pop(0))
    one.run()
    assert said == ["warning: hub, listen changed in the config; that takes a restart"]
    assert one._config is not None
    assert (one._config.hub, one._config.listen) == ("hub-a", a_settings().listen)


def test_without_a_config_there_is_nothing_to_go_on_with(ledgers: list[Ledger]) -> None:
    broken = ConfigError([Diagnostic("error", "no such file")])
    said: list[str] = []
    fake = Fake(nothing)
    one = keeper(fake, said, reload=cast(Callable[[], Settings], fails(broken)))
    with pytest.raises(ConfigError):
        one.look()
    assert fake.passes == 0
