"""The loop that keeps a hub true: kicks come in, each says which VM is worth a look, no more.

One thread waits for everything that the kernel tells (an ended server, a saved file, a signal, a
connection) and hands VMs to workers, which look, plan and execute as `apply` does. Whatever has to
wait for something outside does so in a thread of its own, so that no VM waits for another's storage
or appliance. A thread that ends unasked ends the process, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from reconciler.beside import Observers, Reading, Source, Watch
from reconciler.core.actions import Action
from reconciler.core.actual import Actual, Server
from reconciler.core.ahead import ahead, asked_since, waits_to_reach
from reconciler.core.appliances import Health, trouble
from reconciler.core.backoff import pause
from reconciler.core.call import Call, CallState, Report
from reconciler.core.descriptors import files_for, more_files
from reconciler.core.desired import Desired, Vm
from reconciler.core.errors import Diagnostic, Exit, HostError, ReconcilerError
from reconciler.core.inquiries import Inquiries
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan, news, plan
from reconciler.core.queue import Item, Priority, Queue
from reconciler.core.requests import unlike
from reconciler.core.settings import Settings
from reconciler.core.source import read_well, stale_told
from reconciler.core.standing import Standing, Trait
from reconciler.core.status import Condition
from reconciler.core.tunnel import PREFIX, Tunnel
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.units import Seconds
from reconciler.core.views import asleep, remembered
from reconciler.core.views import views as views_of
from reconciler.core.vm_plan import VmPlan
from reconciler.execute import Step
from reconciler.host import lock
from reconciler.host.processes import all_files, few_arenas
from reconciler.host.qemu_nbd import close_inherited
from reconciler.host.store import Store, WrongHubError
from reconciler.hub import Hub
from reconciler.keeping import Dials, Hands, Roster, Sockets
from reconciler.look import Observer, questions
from reconciler.loop import Applier, Outcome, state_directory_of, worth
from reconciler.reaching import Reach

if TYPE_CHECKING:
    pass

WORKERS: Final = 8
"""Looks at a time. Each is mostly waiting; more than four per core gain nothing."""
STUCK: Final[Seconds] = 1.0
"""A look that takes longer waits for something outside, and another may begin beside it."""
MOST_WORKERS: Final = 128
SLICE: Final = 100
"""VMs that one look of a resync is about, so that a kick never waits for all of them."""
QUIET: Final[Seconds] = 0.02
"""How long a directory has to be quiet before it is read: many files are saved one by one."""
RESTLESS: Final[Seconds] = 1.0
"""It is read after this long at the latest, quiet or not."""
SWITCH: Final[Seconds] = 0.0005
"""How long a thread that works keeps the others from it; Python's own default is 5 ms."""
CLIENTS_LEAVE: Final[Seconds] = 1.0
"""Between two looks at a VM whose clients hold a change, or the end of its run."""
RESYNC_LATE: Final[Seconds] = 120.0
"""A resync of many VMs, on storage that hangs, takes a while."""
LAST: Final[Seconds] = 60.0
"""How long the end waits for what was begun; a start or a call is over by then."""


class Ended(HostError):  # noqa: N818 a verdict, not a fault
    """A thread of ours ended unasked."""


class Work(Applier):
    """An apply inside the daemon: its store, its threads, its knowledge of who works beside."""

    def __init__(
        self,
        daemon: Daemon,
        emit: Callable[[Step], None],
        *,
        asks: bool = False,
        command: str = "",
        calm: Actual | None = None,
    ) -> None:
        """`asks`: the SNAs are asked now; else what they were heard to say last counts. `calm`: see
        keeping.Hands."""
        super().__init__(daemon.settings, daemon.environment, emit, disks=daemon.disks)
        self.command = command or daemon.command
        self.daemon, self.asks, self.calm = daemon, asks, calm
        self.looked = daemon.remember
        self.stopping = daemon.stopping
        self.flying: set[str] = set()
        self.tidies = False  # a resync does that, once for all

    @contextmanager
    def opened(self) -> Iterator[Store]:
        yield self.daemon.store

    def hub(self, _store: Store, /) -> Hub:
        self.hands = self.daemon.hands(self.command, asks=self.asks, calm=self.calm)
        return self.hands

    def planned(
        self, desired: Desired, actual: Actual, remembered: Callable[[], Ledger], now: Seconds
    ) -> Plan:
        found = None
        if self.hands.narrow:
            # A heal takes nothing that others could take too; if there is more to it, it is planned
            # again beside the others.
            found = plan(desired, actual, remembered().only(desired.vms.keys()), now)
            if any(action.kind not in ("restart", "wait", "hold") for action in found.actions):
                self.hands.narrow = False
                actual = self.hands.look(desired, remembered())
                found = None
        found = found or self.daemon.planned(desired, actual, remembered, now, fly=True)
        self.flying.update(desired.vms)
        return found

    def note_conditions(
        self, store: Store, planned: Plan, actual: Actual, ledger: Ledger, now: Seconds
    ) -> dict[str, Sequence[Condition]]:
        found = super().note_conditions(store, planned, actual, ledger, now)
        self.daemon.observers.noted(store, planned, found, now)
        return found

    @contextmanager
    def finished(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.daemon.landed(self.flying)

    def note_clients(
        self, store: Store, desired: Desired, ledger: Ledger, actual: Actual, now: Seconds
    ) -> None:
        if not self.hands.narrow:  # else they are those of an earlier look, and noted since then
            super().note_clients(store, desired, ledger, actual, now)

    def parallel(self) -> int:
        return self.daemon.at_once

    def standing(self, planned: Plan) -> Iterable[Action]:
        return self.daemon.news(planned)


class Daemon:
    """Keeps one hub true until it is told to end. `run` returns the exit code."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        *,
        source: Callable[[Settings], Source],
        watch: Callable[[], Watch],
        reload: Callable[[], Settings],
        observers: Observers,
        command: str = "reconciler watch",
        lock_timeout: Seconds = 120.0,
    ) -> None:
        self.settings, self.environment = settings, environment
        self.make_source, self.make_watch, self.reload = source, watch, reload
        self.observers, self.command, self.lock_timeout = observers, command, lock_timeout
        self.stopping = threading.Event()
        self.kept = Sockets()
        self.planning = threading.Lock()
        """Plans are made one after the other, so that no two give away one port or place."""
        self.flights: dict[str, VmPlan] = {}
        """VM → the plan that is being carried out for it."""
        self.last = Standing()
        """VM → its plan as it was seen last."""
        self.tunnels: dict[str, TunnelPlan] = {}
        """The same of tunnels: `tunnel/NAME` → its plan."""
        self.reading: Reading | None = None
        self.reports: dict[str, Report] = {}
        self.reach = Reach(self._health_of, self._reached, observers.reached)
        """Whether the SNAs are well for which runs are to begin."""
        self.unread = threading.Event()
        """The source is to be read."""
        self.whole = True
        """All of the source is to be looked at, not only the files that were heard of."""
        self.due = threading.Event()
        """A resync is to be made."""
        self.first: set[str] | None = None
        """What the first pass has not looked at yet; None: it has not begun."""
        self.ready = False
        self._mutex = threading.RLock()
        self._queue = Queue()
        self._idle: list[queue.SimpleQueue[Item | None]] = []
        """Where workers without work wait for some, each by itself: of several that wait at one
        place, a second one is woken too, and it takes the interpreter from the first."""
        self._workers = 0
        self._failures: dict[str, int] = {}
        self._looks: dict[str, int] = defaultdict(int)
        """VM → how often it was looked at: what a slower look saw before is not believed."""
        self._impatient: set[str] = set()
        self._wanted: dict[str, tuple[object, Desired]] = {}
        self._at_rest: dict[str, tuple[object, VmPlan, Sequence[Condition]]] = {}
        """VM → what was seen of it when nothing was to be done, that plan, and its conditions."""
        self._asleep: dict[str, object] = {}
        """VM of which nothing is there or wanted → all that this depends on, as it was then."""
        self._calm: dict[str, tuple[Seconds, Actual]] = {}
        """VM → when nothing was to be done about it, and what was seen."""
        self._resyncs = 0
        self._resynced = self._beaten = time.monotonic()
        self._polls: dict[str, Seconds] = {}
        self._polling: set[str] = set()
        self._inquiries = Inquiries()
        self._poll_at: Seconds = 0.0
        """When SNAs are to be asked next; 0: that is to be reckoned anew, as something moved."""
        self._inherited: set[str] | None = None
        """Jobs that were accepted before we began, and that their SNA was not asked about since: it
        may have said while nobody listened how they ended. None: we have only begun."""
        self._failure: BaseException | None = None
        self._over = False
        self._main = 0
        """The thread that runs the loop."""
        self._signals: list[int] = []
        self._readers: dict[int, Callable[[int], None]] = {}

    # -- kicks, from any thread

    def kick(self, vm: str, priority: Priority = Priority.CRASHED) -> None:
        """Look at a VM."""
        with self._mutex:
            self._queue.forget_timer(vm) if priority is Priority.CHANGED else None
            if priority is Priority.CHANGED:
                self._impatient.add(vm)
                self._failures.pop(vm, None)
            added = self._queue.add(vm, priority, time.monotonic())
            depth = len(self._queue)
        if added:
            self.observers.added(depth)
        if threading.get_ident() != self._main:  # which hands it out when it has done what it does
            self.wake()

    def reread(self) -> None:
        """Look at all of the source, whatever was heard of it."""
        self.whole = True
        self.unread.set()

    def wake(self) -> None:
        """The main thread has something to look at."""
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End in order: what was begun is ended, nothing new is begun."""
        self.stopping.set()
        self.unread.set()
        self.due.set()
        self.wake()

    # -- the life of the process

    def run(self) -> int:
        """Keep the hub true. Raises ReconcilerError if it cannot begin, or cannot go on."""
        close_inherited()  # once: what we open ourselves goes on to no server
        with ExitStack() as stack:
            directory = state_directory_of(self.settings)
            stack.enter_context(
                lock.held(directory / "lock", self.command, self.lock_timeout, self._waiting)
            )
            try:
                self.store = Store(directory, self.settings.hub)
            except WrongHubError as error:
                from reconciler.core.errors import ConfigError

                raise ConfigError([Diagnostic("error", str(error))]) from error
            stack.callback(self.store.close)
            # While a resync works, a heal has to get the interpreter's lock twenty times.
            sys.setswitchinterval(SWITCH)
            few_arenas()
            self._count_files()
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._wake)
            self._epoll = stack.enter_context(select.epoll())
            self.roster = Roster(self.settings, self._watch_pidfd, self._unwatch)
            stack.callback(self.roster.close)
            self.dials = Dials(self.settings.hub, self._watch_ssh, self._unwatch)
            stack.callback(self.dials.close)
            stack.callback(self.kept.close)
            self.at_once = self._parallel()
            self.disks = ThreadPoolExecutor(self.at_once, "disk")
            stack.callback(self.disks.shutdown, wait=False)
            self.watch = self.make_watch()
            stack.callback(self.watch.close)
            self.source = self.make_source(self.settings)
            self.listen(self._wake, self._woken)
            self.listen(self.watch.fileno(), self._saved)
            stack.enter_context(self._signals_taken())
            stack.enter_context(self.attached())
            readers = [
                self.thread("source", self._read_for_ever),
                self.thread("resync", self._resync_for_ever),
            ]
            self._loop()
            self._end(readers)
        if self._failure:
            raise self._failure
        return Exit.INTERRUPTED if signal.SIGINT in self._signals else Exit.TERMINATED

    def _count_files(self) -> None:
        """Say it now, and not when the last of them is open, if there may be too few open files."""
        ports, may = len(self.settings.ports), all_files()
        if may < files_for(ports):
            self.observers.said(
                "cannot have as many open files as the port range needs",
                error=f"this process may have {may}, and {ports} exports need {files_for(ports)}",
                help=more_files(ports),
            )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """What lives as long as the loop beside it: a hook for who has more to serve."""
        yield

    def _parallel(self) -> int:
        return self.settings.qemu_nbd.parallel or min(32, 4 * (os.cpu_count() or 1))

    def _waiting(self, holder: lock.Holder | None) -> None:
        self.observers.said("waiting for another who is changing this hub", holder=str(holder))

    def listen(self, fd: int, reader: Callable[[int], None]) -> None:
        """Tell `reader` in the main thread when a descriptor is readable."""
        self._readers[fd] = reader
        self._epoll.register(fd, select.EPOLLIN)

    def unlisten(self, fd: int) -> None:
        """Not any more."""
        if self._readers.pop(fd, None):
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(fd)

    def _watch_pidfd(self, fd: int) -> None:
        self.listen(fd, self._server_ended)

    def _unwatch(self, fd: int) -> None:
        self.unlisten(fd)

    def _watch_ssh(self, fd: int) -> None:
        self.listen(fd, self._ssh_ended)

    def thread(
        self, name: str, body: Callable[[], None], *, may_end: bool = False
    ) -> threading.Thread:
        """A thread of ours. If it fails, or ends before we do and may not, so do we."""

        def guarded() -> None:
            try:
                body()
                if not (self.stopping.is_set() or may_end):
                    raise Ended(f"the thread {name!r} ended by itself")
            except BaseException as error:
                self.fail(error)

        found = threading.Thread(target=guarded, name=name, daemon=True)
        found.start()
        return found

    def fail(self, error: BaseException) -> None:
        """We cannot go on."""
        if self._failure is None and not self._over:  # then only what is left behind can fail
            self._failure = error
        self.stop()

    @contextmanager
    def _signals_taken(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)
            self.wake()

        taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {one: signal.signal(one, note) for one in taken}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    # -- the main thread

    def _loop(self) -> None:
        beaten = 0.0
        self._main = threading.get_ident()
        while not self.stopping.is_set():
            now = time.monotonic()
            self._heed_signals()
            self._dispatch(now)
            self._poll_snas(now)
            self._poll_health(now)
            self._beaten = now
            if now - beaten >= self.beat_every and not self.alive():
                beaten = now
                self.observers.beat(self.counts(), self.working())
            for fd, _ in self._epoll.poll(self._rest(now, beaten)):
                if reader := self._readers.get(fd):
                    reader(fd)

    beat_every: Seconds = 10.0
    """How often the loop says that it moves."""

    def _rest(self, now: Seconds, beaten: Seconds) -> Seconds:
        """Until something is due by the clock alone."""
        if self._signals and self._signals[-1] == signal.SIGHUP:
            return 0.0
        with self._mutex:
            times = [beaten + self.beat_every, self._poll_at]
            if (reach_at := self.reach.next_at()) is not None:
                times.append(reach_at)
            if (next_at := self._queue.next_at()) is not None:
                times.append(next_at)
            if len(self._queue):
                times.append(now + STUCK / 2)  # one of those at work may have got stuck by then
        return max(0.0, min(times) - now)

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals[0]
            if number != signal.SIGHUP:
                if self.stopping.is_set():
                    return
                self.observers.said("ending", signal=signal.Signals(number).name)
                self.observers.ending()
                self.stop()
                return
            del self._signals[0]
            self.reconfigure()

    def _woken(self, fd: int) -> None:
        os.eventfd_read(fd)

    def _server_ended(self, fd: int) -> None:
        vm = self.roster.ended(fd)
        if vm:
            self.kick(vm, Priority.CRASHED)

    def _ssh_ended(self, fd: int) -> None:
        tunnel = self.dials.ended(fd)
        if tunnel:
            self.kick(tunnel, Priority.CRASHED)

    def _saved(self, _fd: int) -> None:
        if self.watch.drain():
            self.unread.set()

    def _dispatch(self, now: Seconds) -> None:
        """Give waiting VMs to workers, as many as move at a time."""
        while True:
            with self._mutex:
                working = len(self._queue.working)
                moving = working - self._queue.stuck(now, STUCK)
                if moving >= WORKERS or working >= MOST_WORKERS or self.stopping.is_set():
                    return
                item = self._queue.take(now)
                if item is None:
                    return
                if self._idle:
                    jobs = self._idle.pop()
                else:
                    self._workers += 1
                    jobs = queue.SimpleQueue()
                    self.thread("worker", partial(self._work_for_ever, jobs), may_end=True)
            jobs.put(item)

    # -- workers

    def _work_for_ever(self, jobs: queue.SimpleQueue[Item | None]) -> None:
        while (item := jobs.get()) is not None:
            began = time.monotonic()
            self.observers.began(item, began - item.since, len(self._queue))
            steps: list[Step] = []
            try:
                result = self._look_at(item, steps)
            finally:
                with self._mutex:
                    self._queue.done(item.name)
                    spare = len(self._idle) >= WORKERS  # of a time when many looks were stuck
                    if spare:
                        self._workers -= 1
                    else:
                        self._idle.append(jobs)
            self.observers.ended(item.name, result, time.monotonic() - began, steps)
            if self.first:
                self._looked_first(item.name)
            self.wake()
            if spare:
                return

    def _look_at(self, item: Item, steps: list[Step]) -> str:
        """One look at one VM, and what follows from it: `success`, `requeue_after`, `error`."""
        name = item.name
        with self._mutex:
            impatient = name in self._impatient
            self._impatient.discard(name)

        def emit(step: Step) -> None:
            steps.append(step)
            self.observers.stepped(step)

        work = Work(self, emit, calm=self._calm_look(item))
        try:
            outcome = work.apply(
                lambda ledger: self.wanted(ledger, [name]),
                impatient=impatient,
                note=self.is_declared(name),
            )
        except ReconcilerError as error:
            self.observers.said("a look failed", vm=name, error=str(error))
            self._again_after_failure(name)
            return "error"
        except Exception as error:  # one VM's trouble is not the others'
            self.observers.said(
                "a look failed: this is a bug", vm=name, error=f"{type(error).__name__}: {error}"
            )
            self._again_after_failure(name)
            return "error"
        assert outcome is not None
        return self.settled(outcome, {name})

    def settled(self, outcome: Outcome, names: Collection[str]) -> str:
        """After an apply of some VMs: when they are looked at again, and who else is."""
        for vm in outcome.plan.vms:
            self._noted(vm)
        self.tunnels |= {one.name: one for one in outcome.plan.tunnels}
        self.forget_gone(names, {one.name for one in outcome.plan.all})
        if any(step.ok for step in outcome.steps):
            self._kick_waiting()
            self._drop_sockets()
        failed = {step.action.vm for step in outcome.steps if not step.ok}
        result = "success"
        for one in outcome.plan.all:
            if one.name in failed and outcome.verdicts()[one.name] is not Exit.OK:
                self._again_after_failure(one.name)
                result = "error"
            else:
                with self._mutex:
                    self._failures.pop(one.name, None)
                if self._again(one):
                    result = "requeue_after" if result == "success" else result
        return result

    def forget_gone(self, names: Collection[str], there: Collection[str]) -> None:
        """VMs of which nothing is wanted any more."""
        gone = set(names) - set(there)
        if gone:
            self.observers.gone(self.store, gone, time.time())
        for name in gone:
            with self._mutex:
                self.last.pop(name)
            self.tunnels.pop(name, None)
            self._wanted.pop(name, None)
            self._at_rest.pop(name, None)
            self._asleep.pop(name, None)

    def _noted(self, one: VmPlan) -> None:
        with self._mutex:
            self.last.put(one)
            self._looks[one.name] += 1
            self._poll_at = 0.0

    def _again_after_failure(self, name: str) -> None:
        with self._mutex:
            self._failures[name] = count = self._failures.get(name, 0) + 1
            self._queue.add_at(name, time.monotonic() + pause(count), Priority.CRASHED)

    def _again(self, one: VmPlan | TunnelPlan) -> bool:
        """Set the timer of a VM that goes on by itself at some time."""
        now, wall = time.monotonic(), time.time()
        times = []
        again_at = one.again_at
        if again_at > wall:
            times.append(now + again_at - wall)
        causes = {action.cause for action in one.actions}
        if "Starting" in causes:
            times.append(now + 0.2)
        if causes & {"InUse", "DrainTimedOut", "ClientsConnected"}:
            times.append(now + CLIENTS_LEAVE)
        if isinstance(one, VmPlan) and waits_to_reach(one) and not self.reach.unwell(one.vm.sna):
            times.append(now)  # it was well again before anybody could be told that this one waits
        if times:
            with self._mutex:
                self._queue.add_at(one.name, min(times), Priority.CRASHED)
        return bool(times)

    def _kick_waiting(self) -> None:
        """Something was given back: who waits for a place looks again, longest waiting first."""
        with self._mutex:
            waiting = self.last.those(Trait.FOR_A_PLACE)
        for one in sorted(waiting, key=asked_since):
            self.kick(one.name, Priority.CRASHED)

    def _drop_sockets(self) -> None:
        """A socket is kept as long as its port is somebody's."""
        with self.planning:
            leased = {lease.port for lease in self.store.ledger().leases}
            for one in self.flights.values():
                leased.update(one.ports.values())
            self.kept.keep(leased)

    # -- for who works beside the loop

    def reserve(self, names: Iterable[str]) -> bool:
        """No worker looks at these VMs until they are freed; False: one does just now."""
        with self._mutex:
            return self._queue.reserve(names)

    def free(self, names: Iterable[str]) -> None:
        with self._mutex:
            self._queue.free(names)
        self.wake()

    def busy(self) -> list[str]:
        """The VMs that are being worked on."""
        with self._mutex:
            return sorted(self._queue.working)

    def differing(self, names: Collection[str]) -> list[str]:
        """VMs that the watched directory declares, and not as they were applied last."""
        ledger = self.store.ledger()
        declared = [name for name in names if self.is_declared(name)]
        wanted = self.wanted(ledger, declared).vms
        known = {n: Vm.from_json(ledger.applied[n].vm) for n in wanted if n in ledger.applied}
        requests = self.settings.requests
        return sorted(name for name, vm in known.items() if unlike(wanted[name], vm, requests))

    # -- what is wanted, and what is planned

    def remember(self, planned: Plan, actual: Actual) -> None:
        """Of VMs that are at rest, what was seen is where the next look starts if one crashes."""
        now = time.monotonic()
        self.dials.note(actual.lines)
        calm = {one.name for one in planned.vms if not one.actions}
        servers = tuple(server for server in actual.servers if server.mark.vm in calm)
        # Without the others, which a look sees too: kept for each of them, that is their square.
        seen = replace(actual, servers=servers, others={}, file_systems={})
        for one in planned.vms:
            if one.actions:
                self._calm.pop(one.name, None)
            else:
                self._calm[one.name] = (now, seen)
        for server in servers:
            if not self.kept.has(server.mark.port):
                self._fetch(server)

    def _fetch(self, server: Server) -> None:
        """Keep a copy of the socket of a server that runs well, and that we did not start."""
        pidfd = self.roster.pidfd(server.identity)
        if pidfd is not None and server.listening and not server.starting:
            with contextlib.suppress(OSError):  # it ends just now
                self.kept.fetch(pidfd, server.mark.port)

    def _calm_look(self, item: Item) -> Actual | None:
        """What was seen of a VM when all was well, if that is no older than a resync."""
        found = self._calm.pop(item.name, None)
        if found is None or item.priority is not Priority.CRASHED:
            return None
        when, actual = found
        return actual if time.monotonic() - when < 1.5 * self.settings.loop.resync else None

    def hands(
        self,
        command: str,
        *,
        asks: bool = False,
        reach: Callable[[Collection[str]], Mapping[str, Health]] | None = None,
        calm: Actual | None = None,
    ) -> Hands:
        """Eyes and hands. `asks`: the SNAs are asked now; else what they were heard to say counts.
        `reach`: tells whether some SNAs are well, where that is not to ask any that is not known.
        """
        return Hands(
            self.settings,
            self.environment,
            self.store,
            command,
            roster=self.roster,
            kept=self.kept,
            reports=None if asks else self.reports,
            reach=reach or (self.reach.now if asks else self.reach.of),
            calm=calm,
        )

    def is_declared(self, name: str) -> bool:
        """The watched directory speaks of this VM."""
        return self.reading is not None and name in self.reading.vms

    def managed(self, ledger: Ledger) -> set[str]:
        """The VMs that are kept true: those of the directory, and what was applied by hand."""
        declared = set(self.reading.vms) if self.reading else set()
        by_hand = {
            name
            for name, applied in ledger.applied.items()
            if applied.vm.get("exported") or ledger.of(name)
        }
        active = {call.vm for call in ledger.open if call.state.active}
        tunnels = {name for name, one in ledger.tunnels.items() if one.vm.get("up")}
        return declared | by_hand | tunnels | (active & ledger.applied.keys())

    def wanted(self, ledger: Ledger, names: Iterable[str]) -> Desired:
        """What should be true of some VMs."""
        vms: dict[str, Vm] = {}
        tunnels: dict[str, Tunnel] = {}
        diagnostics: list[Diagnostic] = []
        for name in names:
            one = self._wanted_of(name, ledger)
            vms |= one.vms
            tunnels |= one.tunnels
            diagnostics += one.diagnostics
        stale = stale_told(self.reading.source) if self.reading else ""
        return Desired(
            settings=self.settings,
            vms=vms,
            tunnels=tunnels,
            diagnostics=tuple(diagnostics),
            stale=stale,
        )

    def _wanted_of(self, name: str, ledger: Ledger) -> Desired:
        """What should be true of one VM; worked out anew when that may have changed."""
        reading = self.reading
        assert reading is not None
        version = (
            reading.version_of(name),
            self.settings,
            ledger.version_of(name),
        )
        known = self._wanted.get(name)
        if known and known[0] == version:
            return known[1]
        found = Desired(settings=self.settings, vms={})
        if name in reading.vms:
            found = reading.vm(name, ledger)
        elif name in ledger.applied:
            found = replace(found, vms={name: Vm.from_json(ledger.applied[name].vm)})
        elif name in ledger.tunnels:
            found = replace(found, tunnels={name: Tunnel.from_json(ledger.tunnels[name].vm)})
        self._wanted[name] = (version, found)
        return found

    def planned(
        self,
        desired: Desired,
        actual: Actual,
        remembered: Callable[[], Ledger],
        now: Seconds,
        *,
        fly: bool,
    ) -> Plan:
        """A plan that knows what the others are about to do. `fly`: it will be carried out."""
        with self.planning:
            others = [one for name, one in self.flights.items() if name not in desired.vms]
            ledger = remembered()
            ledger = ahead(ledger, others, self._older(desired, ledger), now)
            found = plan(desired, actual, ledger, now)
            if fly:
                self.flights |= {one.name: one for one in found.vms if one.actions}
            return found

    def _older(self, desired: Desired, ledger: Ledger) -> list[VmPlan]:
        """Who waits for a place at an SNA and has done so for longer than these VMs."""
        with self._mutex:
            waiting = [one for one in self.last.those(Trait.FOR_SNA) if one.name not in desired.vms]
        if not waiting:
            return []
        calls = [ledger.latest(vm.name, vm.run) for vm in desired.vms.values()]
        since = min((call.created for call in calls if call), default=float("inf"))
        return [one for one in waiting if asked_since(one)[0] < since]

    def landed(self, names: Iterable[str]) -> None:
        """Their plans are carried out, or given up."""
        with self.planning:
            for name in names:
                self.flights.pop(name, None)

    def news(self, planned: Plan) -> list[Action]:
        """What stands in the way and did not when we looked last."""
        before = {one.name: known for one in planned.vms if (known := self.last.get(one.name))}
        return news(planned, {**before, **self.tunnels})

    # -- the source

    def _read_for_ever(self) -> None:
        self.unread.set()
        while not self.stopping.is_set():  # asked again here: to settle drops what stop() set
            again = self.reading.again if self.reading else None
            if not self.unread.wait(None if again is None else max(0.05, again - time.time())):
                self.whole = True  # it is the clock that asks for another look
            if self.stopping.is_set():
                return
            self._settle()
            self.read()

    def _settle(self) -> None:
        """Wait until the directory is quiet: a save is often many."""
        last = time.monotonic() + RESTLESS
        while self.reading and time.monotonic() < last:
            self.unread.clear()
            if not self.unread.wait(QUIET):
                return
        self.unread.clear()

    def read(self) -> None:
        """Read the source, and look at every VM of which it says something new."""
        paths = None if self.whole or self.reading is None else self.watch.files()
        if paths is None:
            self.whole = False
            watched = self.source.watched()
            try:  # before reading: what comes meanwhile is seen
                self.watch.arm(watched)
            except HostError as error:  # then a resync finds what is saved
                self.observers.said("cannot watch all of the source", error=str(error))
        try:
            before, ledger = self.reading, self.store.ledger()
            reading = self.source.read(ledger, time.time(), paths)
            reading.note(self.store, self.command, time.time())
            if paths is None and self.source.watched() != watched:
                self.reread()  # there is more to be watched before it is read
        except HostError as error:
            self.observers.said("cannot read the source", error=str(error))
            if self.reading is None:
                raise
            return
        self.reading = reading
        good = read_well(reading.source) and not any(
            one.severity == "error" for one in reading.diagnostics
        )
        self.observers.sourced(
            time.time() if good else None, reading.source.get("revision", {}).get("name", "")
        )
        if before is None:
            self.due.set()
            return
        now, was = reading.digests, before.digests
        changed = [name for name, digest in now.items() if was.get(name, "") != digest]
        for name in sorted((*changed, *(name for name in was if name not in now))):
            self.kick(name, Priority.CHANGED)

    # -- the resync

    def _resync_for_ever(self) -> None:
        while not self.stopping.is_set():
            self.due.wait(self.settings.loop.resync if self.reading else None)
            if self.stopping.is_set():
                return
            self.due.clear()
            if self.reading:
                self.resync()

    def resync(self) -> None:
        """A whole look: at every process once, and at every VM, in slices."""
        if self.first is not None:
            self.reread()  # what no event tells of, such as a remote file system's files
        moved = self.roster.look()
        for vm in moved if self.first is not None else ():
            self.kick(vm, Priority.CRASHED)
        self._resyncs += 1
        managed = self.managed(self.store.ledger())
        # What is asked through a tunnel may have to be waited for: each has a worker of its own.
        tunnels = {name for name in managed if name.startswith(PREFIX)}
        if self.first is None:
            self.first = set(managed)
        for name in sorted(tunnels):
            self.kick(name, Priority.RESYNC)
        plans: list[Plan] = []
        seen: list[Actual] = []
        sleeping = self._sleeping(managed)
        names = iter(sorted(managed - tunnels - sleeping.keys()))
        found = {name: conditions for name, (_, conditions) in sleeping.items()}
        # Where all are asleep, a look at none of them, as what is around them is told all the same.
        while (chunk := list(islice(names, SLICE))) or (sleeping and not plans):
            planned, actual = self.survey(chunk, found)
            plans.append(planned)
            seen.append(actual)
            if self.stopping.is_set():
                return
        self._resynced = time.monotonic()
        if plans:
            at_rest = [one for one, _ in sleeping.values()]
            looked = (one for some in plans for one in some.vms)
            whole = replace(plans[-1], vms=(*looked, *at_rest))
            servers = {one.identity: one for look in seen for one in look.servers if one.handshake}
            all_seen = replace(seen[-1], servers=tuple(servers.values()))
            self.observers.looked(whole, all_seen, self.store.ledger(), found)
        if not self.ready and not self.first:
            self._looked_first("")

    def survey(
        self, names: Collection[str], found: dict[str, Sequence[Condition]]
    ) -> tuple[Plan, Actual]:
        """Look at some VMs at once, and put those of which something is to be done in the queue.

        What was planned and seen; `found` is added to: VM → its conditions.
        """
        with self._mutex:
            before = {name: self._looks[name] for name in names}
            names = [name for name in names if name not in self._queue.working]
        work = Work(self, lambda _: None)
        ledger = self.store.ledger()
        desired = self.wanted(ledger, names)
        for name in names:
            if self.first and name not in desired.vms:
                self._looked_first(name)  # an error in its spec, and it was never applied
        # Nobody is asked here: a run that may begin is looked at by a worker, which asks.
        work.hands = hands = self.hands(self.command, reach=self.reach.known)
        hands.answered.update(self.roster.answers(self._resyncs))
        actual = hands.look(desired, ledger)
        self.roster.note_answers(one for one in actual.servers if one.mark.vm in desired.vms)
        now = hands.now()
        views = views_of(self.settings, desired, actual, ledger, self.reports, now)
        same = [name for name in desired.vms if self._is_as_it_was(name, views[name])]
        moved = desired.only(desired.vms.keys() - set(same))
        planned = self.planned(moved, actual, self.store.ledger, now, fly=False)
        with self._mutex:
            calm = [
                one
                for one in planned.vms
                if self._looks[one.name] == before[one.name] and one.name not in self._queue.working
            ]
        planned = replace(planned, vms=tuple(calm))
        desired = desired.only({one.name for one in calm})
        work.note_clients(self.store, desired, ledger, actual, now)
        todo = {one.name for one in worth(planned, ()).vms}
        unsure = set(work.unnoted(desired, ledger)) if self.ready else set(desired.vms)
        unsure = {name for name in unsure if self.is_declared(name)}
        # Where nothing is to be done and nothing stands in the way, a worker finds no more.
        plain = {one.name for one in calm if not one.actions and one.name not in ledger.failures}
        kicked = todo | (unsure - plain)
        if unsure & plain:
            work.note(self.store, desired.only(unsure & plain), ledger)
        left = tuple(one for one in calm if one.name not in kicked)
        work.write_down(self.store, hands, replace(planned, vms=left, tunnels=()), (), set())
        for one in calm:
            if one.name in kicked:
                self.kick(one.name, Priority.RESYNC)
                continue
            self._noted(one)
            self._again(one)
            if self.first:
                self._looked_first(one.name)
        rest = replace(planned, vms=tuple(one for one in calm if one.name not in todo))
        fresh = work.note_conditions(self.store, rest, actual, self.store.ledger(), now)
        for one in rest.vms:
            if not one.actions:
                self._at_rest[one.name] = (views[one.name], one, fresh[one.name])
                self._asleep.pop(one.name, None)
                if asleep(one, ledger):
                    self._asleep[one.name] = self._memory(one.name, ledger, now)
        still = [self._at_rest[name] for name in same]
        found |= fresh | {one.name: conditions for _, one, conditions in still}
        at_rest = tuple(one for _, one, _ in still)
        self.remember(replace(rest, vms=(*rest.vms, *at_rest)), actual)
        work.tidy(self.store.ledger(), actual, now)
        return replace(planned, vms=(*planned.vms, *at_rest)), actual

    def _memory(self, name: str, ledger: Ledger, now: Seconds) -> object:
        """All that the plan of a VM depends on of which nothing is there."""
        reading = self.reading
        written = reading.version_of(name) if reading else None
        return written, self.settings, remembered(name, ledger, now)

    def _sleeping(
        self, managed: Collection[str]
    ) -> Mapping[str, tuple[VmPlan, Sequence[Condition]]]:
        """The VMs of which nothing was there or wanted at the last look, and of which nothing has
        been written or seen since; each with its plan and its conditions."""
        if not self.ready:
            return {}
        ledger, now = self.store.ledger(), time.time()
        awake = {served.mark.vm for _, served in self.roster.ours() if served.mark}
        return {
            name: self._at_rest[name][1:]
            for name, memory in list(self._asleep.items())
            if name in managed
            and name not in awake
            and name in self._at_rest
            and memory == self._memory(name, ledger, now)
        }

    def _is_as_it_was(self, name: str, view: object) -> bool:
        """Nothing was to be done about a VM, and all that this depends on is as it was then.

        The same inputs make the same plan, so it is not made again: 100 VMs at rest cost a look and
        no more.
        """
        known = self._at_rest.get(name)
        return known is not None and self.ready and known[0] == view

    def _looked_first(self, name: str) -> None:
        with self._mutex:
            if self.first is None or self.ready:
                return
            self.first.discard(name)
            if self.first:
                return
            self.ready = True
            self._poll_at = 0.0
        self.observers.ready(self.counts())
        self.due.set()  # so that the figures are of what the first pass made of it

    # -- the appliances

    def _poll_snas(self, now: Seconds) -> None:
        """Ask each SNA for which it is time, in a thread of its own.

        Who is to be asked is reckoned when a VM was looked at, and with each beat; not with each
        turn of the loop, which a heal has some of.
        """
        if now < self._poll_at:
            return
        self._poll_at = now + self.beat_every  # what moves from here on sets it back
        if not self.ready:
            return
        ledger = self.store.ledger()
        with self._mutex:
            if self._inherited is None:
                accepted = (call for call in ledger.open if call.state is CallState.ACCEPTED)
                self._inherited = {call.job_id for call in accepted}
            snas = self.settings.snas
            asking = [one.call for one in self.last.those(Trait.ASKS) if one.call]
            jobs = {call.job_id for call in asking}
            asked = questions(self.settings, ledger, also=jobs | self._inherited)
            # Only the word of an SNA that ends nothing can wait.
            self._inquiries.keep(
                call.job_id
                for call in asking
                if call.sna in snas and not snas[call.sna].reports_end
            )
            for sna in [sna for sna in self._polls if sna not in asked]:
                del self._polls[sna]
            for sna, calls in asked.items():
                times = [(self._inquiries.again_at(call.job_id), call) for call in calls]
                when = max(self._polls.get(sna, 0.0), min(at for at, _ in times))
                if sna in self._polling:
                    continue  # it is reckoned again when it has answered
                if when > now:
                    self._poll_at = min(self._poll_at, when)
                    continue
                poll = snas[sna].poll
                self._polls[sna] = now + poll
                self._polling.add(sna)
                due = [call for at, call in times if at <= now]
                threading.Thread(
                    target=self._ask, args=(sna, due, poll), name=f"sna {sna}", daemon=True
                ).start()

    def _poll_health(self, now: Seconds) -> None:
        """Ask each SNA for which runs wait whether it is well again, when it is time."""
        when = self.reach.next_at()
        if when is None or when > now:
            return
        with self._mutex:
            waiting = {one.vm.sna for one in self.last.those(Trait.TO_REACH)}
        for sna in self.reach.take(waiting):
            self.thread(f"health {sna}", partial(self._poll_one, sna), may_end=True)

    def _poll_one(self, sna: str) -> None:
        self.reach.poll(sna)
        self.wake()

    def _health_of(self, names: Collection[str]) -> Mapping[str, Health]:
        return Observer(self.settings, self.environment).healths(names)

    def _reached(self, sna: str, health: Health) -> None:
        """It is well again, or not well in another way: who waits for it looks again."""
        if health.well:
            self.observers.said("an SNA is well again", sna=sna)
        else:
            found = self.settings.snas.get(sna)
            why = trouble(sna, found.url if found else "", health)
            self.observers.said("cannot reach an SNA", sna=sna, error=why)
        with self._mutex:
            waiting = [one for one in self.last.those(Trait.TO_REACH) if one.vm.sna == sna]
        for one in sorted(waiting, key=asked_since):
            self.kick(one.name, Priority.CRASHED)

    def _ask(self, sna: str, calls: Collection[Call], poll: Seconds) -> None:
        try:
            found = self.hands(self.command, asks=True).asked(sna, list(calls))
            now = time.monotonic()
            for call in calls:
                report = found.get(call.job_id)
                if report is None:
                    continue
                if report.known is not None and self._inherited:
                    self._inherited.discard(call.job_id)
                before = self.reports.get(call.job_id)
                self.reports[call.job_id] = report
                with self._mutex:
                    stale_after = self.settings.loop.stale_after
                    self._inquiries.answered(call.job_id, report, now, poll, stale_after)
                if call.state is not CallState.ACCEPTED or report != before:
                    self.kick(call.vm, Priority.CRASHED)
            open_jobs = {call.job_id for call in self.store.ledger().open}
            for job in self.reports.keys() - open_jobs:
                self.reports.pop(job, None)
        except ReconcilerError as error:
            self.observers.said("cannot ask an SNA", sna=sna, error=str(error))
        except BaseException as error:
            self.fail(error)
        finally:
            with self._mutex:
                self._polling.discard(sna)
                self._poll_at = 0.0
            self.wake()

    # -- for people

    def working(self) -> list[Seconds]:
        """For how long each look goes on."""
        now = time.monotonic()
        with self._mutex:
            return self._queue.durations(now)

    def alive(self) -> str:
        """Why we should be ended; empty: we move."""
        if self._failure:
            return f"{type(self._failure).__name__}: {self._failure}"
        silent = time.monotonic() - self._beaten
        if silent > 3 * self.beat_every + 10:
            return f"the loop has not moved for {silent:.0f} s"
        late = time.monotonic() - self._resynced
        if self.ready and late > 3 * self.settings.loop.resync + RESYNC_LATE:
            return f"no resync for {late:.0f} s"
        return ""

    def counts(self) -> str:
        """The state of the hub in a few words."""
        with self._mutex:
            words = [f"{len(self.last)} VMs", f"{self.last.exports} exports"]
            waiting, held = self.last.count(Trait.WAITS), self.last.count(Trait.HELD)
        words += [f"{waiting} waiting"] if waiting else []
        words += [f"{held} held"] if held else []
        return ", ".join(words)

    def reconfigure(self) -> None:
        """Take the config as it is now, if it can be used; else keep the old one and say so."""
        self.observers.reloading()
        try:
            self._take_config()
        finally:
            self.observers.reloaded()

    def _take_config(self) -> None:
        try:
            fresh = self.reload()
        except ReconcilerError as error:
            self.observers.said("the config was not taken; going on with the old", error=str(error))
            return
        was = self.settings
        moved = [n for n in ("hub", "state", "listen") if getattr(was, n) != getattr(fresh, n)]
        if moved:
            self.observers.said("this takes a restart", changed=", ".join(moved))
        self.settings = replace(fresh, hub=was.hub, state=was.state, listen=was.listen)
        self.source = self.make_source(self.settings)
        self.reach.forget()
        self.roster.binary = None
        self.observers.said("the config was taken")
        self.reread()
        for name in self.managed(self.store.ledger()):
            self.kick(name, Priority.CHANGED)

    # -- the end

    def _end(self, readers: Sequence[threading.Thread]) -> None:
        """Wait for what was begun; what it uses is closed after that."""
        self.stop()
        deadline = time.monotonic() + LAST
        while time.monotonic() < deadline:
            with self._mutex:
                if not self._queue.working:
                    break
            time.sleep(0.02)
        with self._mutex:
            left = sorted(self._queue.working)
        if left:
            self.observers.said("not waited for any longer", vms=", ".join(left))
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        self._over = True
        with self._mutex:
            for jobs in self._idle:
                jobs.put(None)
