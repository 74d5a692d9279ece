"""What can happen in a life: one function each, in one table.

An event is its name and two small numbers, which say to whom and how. To add one, write its
function here: the engine draws it, shrinks it and replays it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from msgspec.structs import replace

from reconciler.core.actions import Restart, Stop
from reconciler.core.call import Call, CallEvent, CallState, job_id
from reconciler.core.desired import Desired, Vm
from reconciler.core.settings import QemuNbd
from reconciler.core.vm_plan import incomplete
from tests.core.builders import HUB, ROOT, a_vm, absent
from tests.fakes import Process, Reply
from tests.sim.invariants import check_applied, check_quiet
from tests.sim.life import RESYNC, RUNS, SITES, STRANGERS, Life, Saved, move_in, vm_of
from tests.sim.life import strangers as all_strangers

Event: TypeAlias = tuple[str, int, int]
"""What happens, and two numbers below MOST that say to whom and how."""
MOST: Final = 60
NEWS_AT_ONCE: Final = 4
"""How many applies may each hear of a call, by asking, what the one before could not."""
Happens: TypeAlias = Callable[[Life, int, int], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of event."""

    happens: Happens
    weight: int
    """How often, against the others."""
    by: str
    """`operator`: needs the lock; `end`: ends who holds it; `world`: asks nobody."""


EVENTS: Final[dict[str, Kind]] = {}


def event(weight: int, by: str = "world") -> Callable[[Happens], Happens]:
    """Enter a function into the table."""

    def enter(happens: Happens) -> Happens:
        EVENTS[happens.__name__] = Kind(happens, weight, by)
        return happens

    return enter


def happen(life: Life, what: Event) -> None:
    """Let one event happen; who needs the lock waits until it is free."""
    name, i, j = what
    kind = EVENTS[name]
    if kind.by == "end" and life.pending:
        life.crash()
    elif kind.by == "operator" and life.pending and life.world.lock:
        life.finish()
    elif kind.by == "operator" and life.pending:
        life.stale = True
    kind.happens(life, i, j)


# -- what people write


@event(5)
def declare(life: Life, i: int, j: int) -> None:
    name = life.name(i)
    changes: dict[str, Any] = {"sna": SITES[name]}
    if j % 5 == 4:
        changes["release"] = "keep"
    if j % 7 == 6:
        changes["protect"] = True
    life.edit({**life.vms, name: vm_of(name, RUNS[j % len(RUNS)], **changes)})


@event(1)
def make_absent(life: Life, i: int, j: int) -> None:
    life.edit({**life.vms, life.name(i): absent(life.name(i))})


@event(1)
def forget_a_vm(life: Life, i: int, j: int) -> None:
    life.edit({name: vm for name, vm in life.vms.items() if name != life.name(i)})


@event(2)
def edit(life: Life, i: int, j: int) -> None:
    """The same run, but with other disks, another path or another appliance."""
    vm = life.vms.get(life.name(i))
    if vm and vm.exported:
        sna = vm.sna if j % 4 else ("site-a" if vm.sna == "site-b" else "site-b")
        disks, path = 1 + j % 3, f"/{'ab'[i % 2]}/{vm.name}"
        life.edit({**life.vms, vm.name: a_vm(vm.name, vm.run, disks, path=path, sna=sna)})


@event(1)
def change_the_options(life: Life, i: int, j: int) -> None:
    cache = "writethrough" if i % 2 else None
    life.settings = replace(life.settings, qemu_nbd=QemuNbd(cache=cache))
    life.host.settings = life.settings


# -- what people do


@event(7, "operator")
def apply(life: Life, i: int, j: int) -> None:
    life.apply()
    check_applied(life)


@event(6, "operator")
def apply_and_crash(life: Life, i: int, j: int) -> None:
    """Early or late: one call takes some 12 steps, a first apply of all VMs some 100."""
    life.burning((i // 4, i, 2 * i)[j % 3], life.apply)


@event(5, "operator")
def one_looks(life: Life, i: int, j: int) -> None:
    """And has not acted yet."""
    if not life.pending:
        life.begin()


@event(3)
def who_looked_acts(life: Life, i: int, j: int) -> None:
    if life.pending and j % 4 == 0:
        life.burning((i // 4, i, 2 * i)[j % 3], life.finish)
    else:
        life.finish()


@event(1)
def who_looked_is_killed(life: Life, i: int, j: int) -> None:
    if life.pending:
        life.crash()


@event(2, "operator")
def another_applies_what_was_declared_before(life: Life, i: int, j: int) -> None:
    """An operator whose copy of the files is an edit behind."""
    life.apply(life.before)


@event(3, "operator")
def resolve(life: Life, i: int, j: int) -> None:
    """A person says what became of a call, as reconciler/cli/calls.py lets them."""
    calls = [call for call in life.host.records.calls.values() if call.state.active]
    if not calls:
        return
    call = calls[i % len(calls)]
    answer = (
        CallEvent.SAY_ACCEPTED,
        CallEvent.RESEND,
        CallEvent.SAY_COMPLETED,
        CallEvent.SAY_FAILED,
    )[j % 4]
    if answer is CallEvent.SAY_COMPLETED and (
        call.tainted
        or _is_incomplete(life, call)
        or not any(call.job_id in sna.started for sna in life.snas)
    ):
        return
    if answer is CallEvent.SAY_ACCEPTED and call.state is CallState.ACCEPTED:
        return
    if answer is CallEvent.RESEND and any(p.clients for p in life.of(call.vm)):
        return
    records, now = life.host.records, life.host.now()
    if call.state is CallState.INTENDED:
        call = records.advance(call, CallEvent.CRASH, now)
    if answer is CallEvent.SAY_COMPLETED:
        _flush(life, {call.job_id})
    if j >= MOST // 2:
        _end_the_job(life, call)
    if answer is CallEvent.RESEND:
        life.host.take_over(call)
        records.another_attempt(call, now, "by order")
        life.resent[call.vm, call.run] += 1
    else:
        records.advance(call, answer, now)


def _is_incomplete(life: Life, call: Call) -> bool:
    ledger = life.host.records.ledger()
    desired = life.desired({call.vm: absent(call.vm)})
    actual = life.host.look(desired, ledger)
    return incomplete(desired, actual, ledger, life.host.now(), call) != ""


def _end_the_job(life: Life, call: Call) -> None:
    """A person sees to it that the appliance does not work on it."""
    for sna in life.snas:
        sna.late = [job for job in sna.late if job != call.job_id]
        life.over.add(call.job_id)
        if call.job_id in sna.jobs:
            sna.jobs[call.job_id] = "failed"


@event(1, "operator")
def retry(life: Life, i: int, j: int) -> None:
    calls = [
        call
        for call in life.host.records.calls.values()
        if call.state in (CallState.REJECTED, CallState.DUE)
    ]
    if calls:
        now = life.host.now()
        life.host.records.advance(calls[i % len(calls)], CallEvent.REARM, now, retry_at=0.0)


@event(2, "operator")
def stop(life: Life, i: int, j: int) -> None:
    """`reconciler stop`, with --kill-clients and --cancel-run or without; see cli/applying.py."""
    name, kill, cancel = life.name(i), bool(j % 2), bool(j // 2 % 2)
    vm = life.vms.get(name)
    gone = Vm(name=name, exported=False, protect=bool(vm and vm.protect), order="by order")
    call = life.host.records.ledger().active(name)
    if cancel and call:
        desired = life.desired({name: gone}, kill_clients=kill)
        if _refused_early(life, desired):
            return
        now = life.host.now()
        if call.state is CallState.INTENDED:
            call = life.host.records.advance(call, CallEvent.CRASH, now)
        life.host.records.advance(call, CallEvent.CANCEL, now)
    life.order = kill
    life.apply({name: gone}, kill_clients=kill)
    life.order = False


def _refused_early(life: Life, desired: Desired) -> bool:
    """Whether the servers could not be stopped anyway, so that the run is not cancelled."""
    planned = life.plan(desired, life.host.records.ledger())
    if any(a.kind == "refuse" or a.cause == "Protected" for a in planned.actions):
        return True
    return not desired.kill_clients and any(p.clients for vm in desired.vms for p in life.of(vm))


# -- what becomes of servers and their clients


def _aimed_at(life: Life) -> list[Process]:
    """The servers that who has looked is about to stop or to restart."""
    actions = life.planned.actions if life.planned else ()
    aims = [a.server for a in actions if isinstance(a, Stop | Restart) and a.server]
    there = [life.host.processes.get(server.identity) for server in aims]
    return [process for process in there if process]


@event(4)
def a_server_dies(life: Life, i: int, j: int) -> None:
    process = life.one(i)
    if process:
        life.host.kill(process)


@event(2)
def a_server_dies_and_its_pid_is_anothers(life: Life, i: int, j: int) -> None:
    """At its worst between a look and what is done about it."""
    targets = _aimed_at(life)
    process = targets[i % len(targets)] if targets else life.one(i)
    if process:
        life.host.kill(process)
        port = process.port if j % 2 and process.port is not None else 20000 + i
        move_in(life.host, STRANGERS[1 + j % 2], port, pid=process.identity.pid)
        life.foreign = all_strangers(life.host)


@event(4)
def clients_come_and_go(life: Life, i: int, j: int) -> None:
    """They write only where an appliance was told to."""
    process = life.one(i)
    mark = process.served.mark if process else None
    if process and mark and not process.served.starting:
        process.clients = (0, 2, 2, 10)[j % 4]
        job = job_id(HUB, mark.vm, mark.run, mark.attempt)
        if process.clients and job in life.at_work():
            life.write(process)


@event(4)
def the_writers_connect(life: Life, i: int, j: int) -> None:
    sna = life.sna(i)
    for job in sorted(life.at_work() & set(sna.started)):
        life.connect(job, sna)


@event(1)
def a_server_falls_silent(life: Life, i: int, j: int) -> None:
    process = life.one(i)
    if process:
        process.silent = not process.silent


@event(1)
def a_server_will_not_start(life: Life, i: int, j: int) -> None:
    life.host.failing ^= {(life.name(i), 2000 + j % 2)}


# -- strangers, and what people do with files


@event(2)
def a_stranger_comes(life: Life, i: int, j: int) -> None:
    move_in(life.host, STRANGERS[j % 3], 10100 + i % 5)
    life.foreign = all_strangers(life.host)


@event(1)
def a_port_is_taken_by_nobody_who_is_seen(life: Life, i: int, j: int) -> None:
    life.host.unseen ^= {10100 + i % 5}


@event(1)
def the_strangers_leave(life: Life, i: int, j: int) -> None:
    life.leave()


@event(1)
def a_file_is_in_the_way(life: Life, i: int, j: int) -> None:
    """Somebody's own file, at a path where an image of a later run would be."""
    vm = life.vms.get(life.name(i))
    paths = [export.image for export in vm.exports] if vm else []
    path = paths[j % len(paths)] if paths else ""
    if path and path not in life.host.images and path not in life.moved:
        life.host.put(path, 1 << 30, pristine=False)
        life.files[path] = life.host.images[path]


@event(1)
def an_image_is_moved_away(life: Life, i: int, j: int) -> None:
    process = life.one(i)
    image = life.host.images.get(process.argv[-1]) if process else None
    if process and image and not process.served.starting:
        life.moved[image.path] = image
        life.host.move_away(process)


@event(1)
def the_storage_comes_and_goes(life: Life, i: int, j: int) -> None:
    where = ROOT if j % 2 else "vcenter vc1"
    if not life.host.unreadable.pop(where, ""):
        life.host.unreadable[where] = "no such file or directory"


# -- the appliances


@event(6)
def the_next_answer_will_be(life: Life, i: int, j: int) -> None:
    life.sna(j).script.append(list(Reply)[i % len(Reply)])


@event(2)
def an_appliance_restarts(life: Life, i: int, j: int) -> None:
    if j % 2:
        life.wake()
    life.sna(i).forget()


@event(1)
def an_appliance_cannot_be_asked(life: Life, i: int, j: int) -> None:
    life.sna(i).deaf = not life.sna(i).deaf


@event(3)
def a_tunnel_comes_and_goes(life: Life, i: int, j: int) -> None:
    life.sna(i).down = not life.sna(i).down


@event(5)
def an_appliance_ends_its_jobs(life: Life, i: int, j: int) -> None:
    """Well or not; its writers flush what they wrote, and leave or stay connected."""
    sna = life.sna(i)
    life.wake()
    sna.jobs = dict.fromkeys(sna.jobs, "completed" if j % 3 else "failed")
    _flush(life, sna.started, leave=i < MOST // 2)


@event(4)
def a_client_reports(life: Life, i: int, j: int) -> None:
    """That a disk has arrived, or every one, or only how far it is; it may be connected still."""
    calls = {call.job_id: call for call in life.host.records.calls.values()}
    known = [job for sna in life.snas for job in sna.started if job in calls]
    if not known:
        return
    job = known[i % len(known)]
    call = calls[job]
    if call.state.terminal:
        return  # written down as an event, and nothing else
    positions = [export.position for export in call.exports]
    if j % 4 == 0 or not positions:
        life.host.records.word(job)
        return
    for position in positions if j % 4 == 1 else [positions[j % len(positions)]]:
        life.host.records.report(job, position)
    if life.host.records.reports[job].keys() >= set(positions):
        life.over.add(job)
    for process in life.host.mine():
        mark = process.served.mark
        if mark and job_id(HUB, mark.vm, mark.run, mark.attempt) == job and j % 2:
            process.clients = 0


def _flush(life: Life, jobs: Collection[str], *, leave: bool = True) -> None:
    """The writers of some jobs are at their end."""
    life.over |= set(jobs)
    for process in life.host.mine():
        mark = process.served.mark
        if mark and job_id(HUB, mark.vm, mark.run, mark.attempt) in jobs:
            process.unflushed = False
            process.clients = 0 if leave else process.clients


# -- time, and what is remembered


@event(2)
def time_passes(life: Life, i: int, j: int) -> None:
    life.wake()
    life.host.clock += RESYNC


@event(1, "end")
def the_state_is_lost(life: Life, i: int, j: int) -> None:
    life.forget()
    life.host.lose_state()


@event(1, "operator")
def the_ledger_is_saved(life: Life, i: int, j: int) -> None:
    records = life.host.records
    life.saved = Saved(records, dict(records.calls), dict(records.leases), dict(records.targets))


@event(1, "end")
def an_older_ledger_comes_back(life: Life, i: int, j: int) -> None:
    """Somebody restores the state directory from a backup of it."""
    saved = life.saved
    if saved is None:
        return
    life.forget()
    life.mixed = True
    life.host.records = saved.records
    saved.records.calls, saved.records.leases = dict(saved.calls), dict(saved.leases)
    saved.records.targets = dict(saved.targets)


@event(1, "operator")
def quiet_comes(life: Life, i: int, j: int) -> None:
    """All that stood in the way goes; then one apply is enough."""
    quiet(life)


def quiet(life: Life) -> None:
    """Raises Broken."""
    life.finish()
    life.calm()
    for _ in range(NEWS_AT_ONCE):
        life.apply()
        if not life.hears_news():
            break
    check_quiet(life)
