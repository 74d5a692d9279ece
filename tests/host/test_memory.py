"""The writer's ledger after any writes is what a fresh reading says, and costs what has moved."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from reconciler.core.call import CallEvent, CallState, ImpossibleStepError
from reconciler.core.ledger import Declaration, Lease, Ledger, Pause
from reconciler.core.tunnel_seen import Dialled
from reconciler.host.store import Event, Store, StoreError, read
from reconciler.host.store.inbox import Inbox
from tests.host.test_inbox import a_call, put

VMS = [f"ctx-{number}" for number in range(6)]


def something(store: Store, inbox: Inbox, dice: random.Random, now: float) -> None:
    """One of all that is ever written."""
    vm, run = dice.choice(VMS), f"r{dice.randrange(3)}"
    lease = Lease(hub="h", vm=vm, disk=2000, run=run, attempt=1, port=VMS.index(vm), since=now)
    calls = list(store.ledger().calls)
    call = dice.choice(calls) if calls else a_call(vm, run, job_id=f"{vm}-{run}")
    match dice.randrange(17):
        case 0:
            store.hold([lease], a_call(vm, run, job_id=f"{vm}-{run}", created=now, changed=now))
        case 1:
            store.advance(call, dice.choice(list(CallEvent)), now)
        case 2:
            store.taint(call)
        case 3:
            store.apply({"now": now}, {vm: {"vm": vm, "at": now}}, now)
        case 4:
            store.declare(
                {"revision": {"digest": f"{now}"}},
                [Declaration(vm=vm, file="f", revision="r", at=now)],
                [dice.choice(VMS)],
            )
        case 5:
            store.failures([dice.choice(VMS)], {vm: ("why", f"{now}")} if now % 2 else {})
        case 6:
            store.transitions({(vm, dice.choice(["Ready", "Stalled"])): ("True", f"{now}")}, now)
        case 7:
            store.release(store.ledger().of(vm))
        case 8:
            store.pause([Pause(vm=vm, reason="r", since=now)])
        case 9:
            store.resume([vm])
        case 10:
            inbox.report(call.job_id, dice.randrange(2), f"change-{dice.randrange(2)}", 1, now)
        case 11:
            inbox.telemetry(call.job_id, now, status="running", percent=now % 100)
        case 12:
            store.another_attempt(call, now, "why")
        case 13:
            store.started([lease], now, again=True)
        case 14:
            store.sightings({call.job_id: 5}, [one.job_id for one in calls[:1]], now)
        case 15:
            store.dialled(Dialled(tunnel="tunnel/t", part="p", up=now))
        case _:
            store.record([Event(vm=vm, reason="r", message="m")], "who", now)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_remembered_is_what_is_there(
    store: Store, inbox: Inbox, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    before: list[tuple[Ledger, Ledger]] = []
    for number in range(150):
        try:
            something(store, inbox, dice, float(number + 10))
        except (ImpossibleStepError, StoreError):
            continue  # a step that cannot be taken, or a port that is another's
        fresh, known = read(tmp_path), store.ledger()
        assert fresh is not None
        for name in Ledger.__struct_fields__:
            assert getattr(known, name) == getattr(fresh, name), (number, name)
        for vm in VMS:
            assert known.runs(vm) == fresh.runs(vm)
            assert known.version_of(vm) == fresh.version_of(vm)
            assert (known.active(vm), known.of(vm)) == (fresh.active(vm), fresh.of(vm))
        before.append((known, fresh))
    assert len(before) > 100
    assert all(known == fresh for known, fresh in before), "an older reading is as it was"


def at_rest(store: Store, vms: int) -> None:
    """So many VMs whose only run is over."""
    names = [f"rest-{number}" for number in range(vms)]
    for name in names:
        put(store, a_call(name), CallEvent.INTEND, CallEvent.ACCEPT, CallEvent.END)
    store.apply({}, {name: {"exported": False} for name in names}, 1.0)
    store.declare({}, [Declaration(vm=one, file="f", revision="r", at=1.0) for one in names])
    store.transitions({(name, "Ready"): ("False", "Absent") for name in names}, 1.0)


def rows_read(store: Store, monkeypatch: pytest.MonkeyPatch, write: str) -> int:
    """Lines of the store that are read after a write of one kind."""
    call = put(store, a_call("ctx-1"), CallEvent.INTEND, CallEvent.ACCEPT)
    with contextlib.closing(Inbox(store.path.parent)) as inbox:
        inbox.report(call.job_id, 0, "change-0", 1, 5.0)
        store.ledger()
        count = 0

        def counted(_cursor: object, row: object) -> object:
            nonlocal count
            count += 1
            return row

        monkeypatch.setattr(store._db, "row_factory", counted)
        match write:
            case "a step":
                store.advance(call, CallEvent.END, 6.0)
            case "a word":
                inbox.telemetry(call.job_id, 6.0, percent=5)
            case "a report":
                inbox.report(call.job_id, 1, "change-1", 1, 6.0)
            case "a server":
                store.hold([Lease(hub="h", vm="ctx-1", disk=2000, run="r1", attempt=1, port=1,
                                  since=1.0)], None)  # fmt: skip
            case _:
                store.apply({}, {"ctx-1": {"exported": True}}, 6.0)
                store.transitions({("ctx-1", "Ready"): ("True", "Ready")}, 6.0)
                store.declare({}, [Declaration(vm="ctx-1", file="f", revision="r", at=6.0)])
        ledger = store.ledger()
    found = ledger.latest("ctx-1", "r1")
    assert found is not None
    assert found.state is (CallState.COMPLETED if write == "a step" else CallState.ACCEPTED)
    return count


@pytest.mark.parametrize("write", ["a step", "a word", "a report", "a server", "what is wanted"])
def test_a_write_is_read_again_alone(tmp_path: Path, write: str) -> None:
    found = []
    for vms in (5, 50):
        folder = tmp_path / f"{vms}"
        folder.mkdir()
        store = Store(folder, "h")
        at_rest(store, vms)
        with pytest.MonkeyPatch.context() as patch:
            found.append(rows_read(store, patch, write))
        store.close()
    assert found[0] == found[1] > 0


def test_what_another_writer_wrote_is_there(store: Store, tmp_path: Path) -> None:
    """None writes beside us while we hold the lock; if one ever does, it is not overlooked."""
    lease = Lease(hub="h", vm="ctx-1", disk=2000, run="r", attempt=1, port=1, since=1.0)
    store.hold([lease], a_call("ctx-1", "r", job_id="j"))
    assert [one.port for one in store.ledger().leases] == [1]
    other = Store(tmp_path, "h")
    other.release([lease])
    assert store.ledger().leases == ()
    store.hold([lease], None)
    assert [one.port for one in other.ledger().leases] == [1]
    other.close()
