"""What must be so in a life at any time, and what must be so when it is quiet.

Each is a sentence, which names it where it is broken, and a function that looks at the world.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from reconciler.core.actions import CHANGES
from reconciler.core.call import CallState, job_id, targets
from reconciler.core.disk_plan import export_key
from tests.core.builders import HUB
from tests.sim.life import NAMES, RUNS, Life, rank, strangers

RUN_OF: Final = {
    job_id(HUB, name, run, attempt): (name, run)
    for name in NAMES
    for run in RUNS
    for attempt in range(1, 100)
}
"""Job id → (VM, run), for more attempts than a life can have."""
Check: TypeAlias = Callable[[Life], None]


class Broken(AssertionError):  # noqa: N818 it says what is, as a sentence does
    """Something is as it must never be."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}" if what else invariant)
        self.invariant, self.what = invariant, what

    def __reduce__(self) -> tuple[type[Broken], tuple[str, str]]:
        return Broken, (self.invariant, self.what)


ALWAYS: Final[dict[str, Check]] = {}
APPLIED: Final[dict[str, Check]] = {}
QUIET: Final[dict[str, Check]] = {}


def always(sentence: str) -> Callable[[Check], Check]:
    def enter(check: Check) -> Check:
        ALWAYS[sentence] = check
        return check

    return enter


def when_applied(sentence: str) -> Callable[[Check], Check]:
    def enter(check: Check) -> Check:
        APPLIED[sentence] = check
        return check

    return enter


def when_quiet(sentence: str) -> Callable[[Check], Check]:
    def enter(check: Check) -> Check:
        QUIET[sentence] = check
        return check

    return enter


def check(life: Life) -> None:
    """At any time. Raises Broken."""
    _all_of(ALWAYS, life)


def check_applied(life: Life) -> None:
    """After an apply that came to its end, whatever was in its way. Raises Broken."""
    _all_of(APPLIED, life)


def check_quiet(life: Life) -> None:
    """After an apply that nothing was in the way of. Raises Broken."""
    check(life)
    check_applied(life)
    _all_of(QUIET, life)


def _all_of(checks: Mapping[str, Check], life: Life) -> None:
    for sentence, one in checks.items():
        try:
            one(life)
        except Broken:
            raise
        except AssertionError as error:
            raise Broken(sentence, str(error)) from error


# -- the one call


@always("a run is started once, and once more for each order of a person")
def started_once(life: Life) -> None:
    jobs = life.host.started()
    twice = [job for job, count in jobs.items() if count > 1]
    assert not twice, f"started more than once: {twice}"
    for (name, run), count in Counter(RUN_OF[job] for job in jobs).items():
        assert count <= 1 + life.resent[name, run], f"{name}, run {run}: {count} writers"


@always("no call is made before every disk of the VM answers")
def called_when_ready(life: Life) -> None:
    for site, sna in life.host.snas.items():
        for post in sna.posts[life.posts[site] :]:
            vm = life.asked[post.request["vm_name"]]
            assert post.silent == (), f"nothing answers at {post.silent}"
            wanted = tuple(export.key for export in vm.exports)
            assert post.disks == wanted, f"{vm.name}: {post.disks}, it has {wanted}"
            assert site == vm.sna, f"{site} was called for {vm.name}, which is {vm.sna}'s"
        life.posts[site] = len(sna.posts)


@always("nothing of a run is begun before its appliance has answered")
def begun_when_reached(life: Life) -> None:
    host = life.host
    there = {(lease.vm, lease.run) for lease in host.records.leases.values()}
    there |= {(name, run) for _, name, run in host.claims}
    there |= {(mark.vm, mark.run) for p in host.mine() if (mark := p.served.mark)}
    for name, run in there - life.begun:
        vm = life.asked.get(name)
        if vm and vm.run == run and not life.raced:
            answer = life.reached.get(vm.sna)
            assert answer is not None, f"{name}, run {run}: {vm.sna} was not asked"
            assert answer.well, f"{name}, run {run}: {vm.sna} does not answer"
    life.begun |= there


@always("the end of a run is its end")
def ended_for_good(life: Life) -> None:
    calls = life.host.records.calls
    for key, state in life.ended.items():
        now = calls[key].state if key in calls else None
        assert now is state, f"{key} was {state} and is {now}"
    life.ended.update({key: call.state for key, call in calls.items() if call.state.terminal})


@always("a run that lost writes is no backup")
def no_backup_without_its_writes(life: Life) -> None:
    for key in life.host.losses:
        call = life.host.records.calls.get(key)
        assert call is None or call.state is not CallState.COMPLETED, key


@always("a backup is what its appliance was told to write, as it was when the run ended")
def backups_are_what_was_written(life: Life) -> None:
    for key, call in life.host.records.calls.items():
        if call.state is not CallState.COMPLETED:
            continue
        told = [
            [pair.rpartition("/")[2] for pair in post.request["nbd_targets"].split(",")]
            for sna in life.snas
            for post in sna.posts
            if post.request["job_id"] == call.job_id
        ]
        have = [export.name for export in sorted(call.exports, key=lambda e: e.position)]
        # Where the record was lost, a disk that nothing tells of any more may be missing.
        same = have in told or (life.amnesia and any(set(have) <= set(one) for one in told))
        assert same or not told, f"{key}: its appliance was told {told}, its record says {have}"
        for export in call.exports:
            image = life.host.images.get(export.image)
            if image:
                was = life.backups.setdefault(export.image, image)
                assert image == was, f"{export.image} was {was}, and is {image}"


@always("an appliance works on no more runs than it may")
def within_max_running(life: Life) -> None:
    if life.amnesia or life.raced:
        return
    calls = life.host.records.calls.values()
    for site, count in Counter(call.sna for call in calls if call.state.active).items():
        assert count <= life.settings.snas[site].max_running, f"{site}: {count}"


@always("the ports of an active run are those that its appliance was told")
def ports_stay(life: Life) -> None:
    if life.amnesia or life.raced:
        return
    records = life.host.records
    for key, call in records.calls.items():
        if call.state.active:
            ports = {e.key: records.leases[export_key(e)].port for e in call.exports}
            now = targets(call.exports, ports, "127.0.0.1")
            assert now == records.targets[key], f"told {records.targets[key]}, now {now}"


# -- ports and servers


@always("a port is leased once, from the range, and to the server that has it")
def ports_are_ours(life: Life) -> None:
    leases = life.host.records.leases
    leased = Counter(lease.port for lease in leases.values())
    assert all(count == 1 for count in leased.values()), leased
    assert all(port in life.settings.ports for port in leased), leased
    for process in life.host.mine():
        mark = process.served.mark
        assert mark is not None
        assert process.port == mark.port in life.settings.ports, process
        lease = leases.get(mark.key)
        same = lease is None or lease.port == mark.port
        assert same or life.amnesia or life.raced, (lease, mark)


@always("a server has a lease for as long as it lives")
def leased_while_it_lives(life: Life) -> None:
    if life.amnesia or life.raced:
        return
    for process in life.host.mine():
        mark = process.served.mark
        assert mark and mark.key in life.host.records.leases, f"{mark} has none"


@always("a server that is in use is not stopped without an order")
def nobody_is_cut_off(life: Life) -> None:
    calls, at_work = life.host.records.calls, life.at_work()
    for one in life.host.ended:
        mark = one.mark
        if mark is None or mark.hub != HUB:
            continue  # a stranger; see below
        assert one.clients == 0 or life.order, f"{one.clients} clients of {mark}"
        call = calls.get((mark.vm, mark.run, mark.attempt))
        over = call is not None and call.state.terminal
        writing = job_id(HUB, mark.vm, mark.run, mark.attempt) in at_work and not over
        if not life.stale:  # the lock is what keeps a plan from being older than the ledger
            in_use = one.answered and (one.active or writing)
            assert not in_use, f"a run is written through {mark}"
    life.host.ended.clear()


@always("what is not ours is left alone")
def strangers_are_left_alone(life: Life) -> None:
    now = strangers(life.host)
    assert now == life.foreign, f"there was {life.foreign}, there is {now}"
    for path, image in life.files.items():
        assert life.host.images.get(path) == image, f"{path} was touched"
        served = [p for p in life.host.mine() if p.argv[-1] == path and not p.detached]
        assert not served, f"somebody's {path} is served"


@always("a writer finds its own attempt or nothing")
def writers_find_their_own(life: Life) -> None:
    for process in life.host.mine():
        mark = process.served.mark
        assert mark is not None
        if process.writes and not process.served.starting:
            others = [
                p.served.mark
                for p in life.host.mine()
                if p is not process and p.argv[-1] == process.argv[-1] and p.writes
            ]
            assert not others, f"{process.argv[-1]} is written through {mark} and {others}"


# -- when all that stood in the way is gone


@when_quiet("one apply is enough")
def one_apply_is_enough(life: Life) -> None:
    if life.mixed:
        return
    desired, ledger = life.desired(), life.host.records.ledger()
    left = [a for a in life.plan(desired, ledger).actions if a.kind in CHANGES]
    assert not left, [(a.vm, a.disk, a.kind, a.cause, a.why) for a in left]


@when_quiet("there is exactly what is wanted: servers, ports and leases")
def exactly_what_is_wanted(life: Life) -> None:
    if life.mixed:
        return
    host, desired = life.host, life.desired()
    planned = life.plan(desired, host.records.ledger())
    refused = {action.vm for action in planned.actions if action.kind == "refuse"}
    for vm in desired.vms.values():
        wanted = Counter(export_key(export) for export in life.wanted(vm))
        there = Counter(mark.key for p in life.of(vm.name) if (mark := p.served.mark))
        call = host.records.ledger().active(vm.name)
        unsure = call is not None or vm.name in refused
        if (call and not vm.exported) or (unsure and life.amnesia):
            # What is there is kept; what is not there may not be known of.
            assert all(count == 1 for count in there.values()), there
        else:
            assert there == wanted, f"{vm.name}: {dict(there)}, wanted {dict(wanted)}"
            leases = {key for key in host.records.leases if key[0] == vm.name}
            assert leases == set(wanted), f"{vm.name}: leases {leases}, wanted {set(wanted)}"


@when_applied("a VM holds all of its ports or none")
def no_hoarders(life: Life) -> None:
    """A run that nothing serves yet must not keep a port from others."""
    if life.host.unreadable:
        return  # then nothing of a VM is changed
    for vm in life.desired().vms.values():
        if not life.of(vm.name) and not life.host.records.ledger().active(vm.name):
            have = rank(life.host, life.desired())[vm.name]
            assert len(have) in (0, len(vm.exports)), (vm.name, have)
