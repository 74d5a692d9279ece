"""Passes: read, look, plan, execute; again while it helps. No decisions about exports."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actions import CHANGES, Action, Conclude, Hold, Notify, Restart
from reconciler.core.actual import Actual, Server
from reconciler.core.appliances import UNREACHABLE
from reconciler.core.backoff import CRASH_LOOP
from reconciler.core.call import Call, CallState, Report
from reconciler.core.call_plan import sighted
from reconciler.core.desired import Desired, build
from reconciler.core.disk_plan import LOOPS, export_key
from reconciler.core.errors import ConfigError, Diagnostic, Exit, HostError
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan, plan
from reconciler.core.saved import Basis, Promise, done, elsewhere, observed, out_of_time
from reconciler.core.settings import Settings
from reconciler.core.source import without_the_rest
from reconciler.core.status import Condition, conditions
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.tunnel_status import conditions as tunnel_conditions
from reconciler.core.units import Seconds
from reconciler.core.vm_plan import VmPlan
from reconciler.execute import Emit, Step, execute, resting
from reconciler.host import files, lock
from reconciler.host.qemu_nbd import close_inherited, log_name, tidy
from reconciler.host.store import EVENT_DAYS, Event, Store, WrongHubError, read
from reconciler.hub import Hub
from reconciler.look import Observer

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from reconciler.core.declared import Found as Said
    from reconciler.core.declared import Specs
    from reconciler.core.document import Document
    from reconciler.core.inventory import Inventory
    from reconciler.core.variables import Variable
    from reconciler.host.files import Given
    from reconciler.library import Beside, Library
    from reconciler.readings import Readings

PASSES: Final = 4
"""Passes of one apply: each repeats only what the one before made possible."""
BETWEEN: Final[Seconds] = 0.2
UNSURE: Final = (CallState.UNKNOWN, CallState.INTENDED)
"""States of a call whose outcome is not known when nobody is making it."""


def load_settings(config: str | None, environment: Mapping[str, str]) -> Settings:
    """The configuration that holds here. Raises ConfigError."""
    from reconciler import readings

    path = files.config_path(config, environment)
    base = os.getcwd()
    if path is None:
        text = None
    else:
        text = files.read(path)
        if text.error:
            raise ConfigError([Diagnostic("error", text.error, rule="unreadable")])
        base = os.path.dirname(os.path.abspath(path))

    def work() -> Settings:
        from reconciler.core.config import settings
        from reconciler.core.document import parse

        document = None
        if text:
            document, wrong = parse(text.text, text.file)
            if wrong:
                raise ConfigError(wrong)
        return settings(
            document,
            environment,
            base=base,
            cwd=os.getcwd(),
            host_name=os.uname().nodename,
            root=os.geteuid() == 0,
        )

    try:
        return readings.settings(environment, path, text.text if text else None, work)
    except ConfigError as error:
        if text:
            error.sources[text.file] = text.text
        raise


class Source(Struct, frozen=True):
    """What was written: specs and inventory, read once."""

    specs: Specs
    inventory: Inventory | None
    texts: tuple[files.Text, ...] = ()
    """The spec files."""
    requests: tuple[files.Text, ...] = ()
    """The files that ask for runs."""
    scoped: bool = False
    """It is about the VMs of these files, and what else is asked for stays as it is."""
    given: Given | None = None
    """What was read around them."""
    remember: Callable[[], None] = lambda: None
    """Writes down what the inventory said, for a time when it cannot be read. The caller holds the
    hub. Raises HostError."""
    explained: tuple[Variable, ...] | None = None
    """The variables of the VM that was asked about, if a spec declares it."""
    inventory_text: files.Text | None = None
    """The inventory, if it is a file."""

    @property
    def lines(self) -> dict[str, str]:
        """File → its text, for whoever shows what is wrong with it."""
        beside = (*self.given.extra, *self.given.texts.values()) if self.given else ()
        known = [self.inventory_text] if self.inventory_text else []
        return {one.file: one.text for one in (*beside, *self.texts, *self.requests, *known)}

    def readings(self) -> Mapping[str, files.Text]:
        """All that it was made of: file, or `$VARIABLE` of the environment → what that said.

        Two sources of the same readings and the same inventory say the same.
        """
        given = self.given or files.Given()
        found = {text.file: text for text in (*self.texts, *self.requests, *given.extra)}
        found |= given.texts
        for name, value in given.variables.items():
            error = f"the variable {name} is not set" if value is None else ""
            found[f"${name}"] = files.Text(f"${name}", value or "", error)
        return found


def load_source(
    paths: Sequence[str],
    settings: Settings,
    *,
    asking: bool = False,
    extra: Sequence[files.Text] = (),
    explain: str = "",
) -> Source:
    """Every spec below the paths, what is asked for beside them, and the inventory.

    No paths: the specs are where they usually are, and every request counts; else only those of
    VMs that the paths name. `asking`: a run is about to be asked for, which is enough without
    specs. `extra`: variables over all others. `explain`: a VM whose variables are to be told.
    Findings are in `specs.diagnostics`. Raises NothingNamed, HostError.
    """
    from reconciler.library import Library
    from reconciler.readings import Readings

    texts, requests = files.texts_of(paths, settings.requests, asking=asking)
    library = Library(settings.specs, os.environ, extra=extra)
    known = Readings(settings, paths, os.environ, extra) if not explain else None
    source = source_of(
        texts, requests, settings, scoped=bool(paths), library=library, explain=explain, known=known
    )
    if known:
        known.write()
    return source


def source_of(
    texts: Sequence[files.Text],
    requests: Sequence[files.Text],
    settings: Settings,
    *,
    scoped: bool,
    library: Library,
    explain: str = "",
    known: Readings | None = None,
) -> Source:
    """What some files say, with the inventory as it is now. `known`: what was read before."""
    from reconciler.core.declared import join
    from reconciler.inventories import reader_of

    reader = reader_of(settings)
    answer = reader.read(pipe=library.closed is None, known=known)
    inventory = answer.inventory
    library.inventory = inventory if inventory and inventory.readable else None
    library.specs = [text.file for text in texts]
    wrong: list[Diagnostic] = []
    unread: set[str] = set()
    found: list[Said] = []
    for aside, text in [(False, text) for text in texts] + [(True, text) for text in requests]:
        beside = None if aside else library.around(text)
        said = known.found(text, beside, aside=aside) if known else None
        if said is None:
            said, problems = _read(text, beside, aside=aside, scoped=scoped, explain=explain)
            wrong += problems
            if said is None:
                unread.add(text.file)
                continue
            if known:
                known.note(text, said, beside, aside=aside)
        found.append(said)
    wrong += answer.diagnostics
    specs = join(found)
    specs = replace(specs, diagnostics=(*wrong, *specs.diagnostics), unread=specs.unread | unread)
    told = next((one.explained for one in found if one.explained is not None), None)
    return Source(
        specs,
        inventory,
        tuple(texts),
        tuple(requests),
        scoped,
        library.given,
        reader.remember,
        told,
        reader.text,
    )


def _read(
    text: files.Text, beside: Beside | None, *, aside: bool, scoped: bool, explain: str
) -> tuple[Said | None, list[Diagnostic]]:
    """What a file says, one that asks for runs if `aside`; None: it could not be read."""
    from reconciler.core import spec_files  # late: the models of all that may be written

    documents, wrong = parse_all([text])
    if not documents:
        return None, wrong
    if aside:
        return spec_files.read_request(documents[0], aside=scoped), wrong
    return spec_files.read_file(documents[0], beside, explain=explain), wrong


def parse_all(texts: Iterable[files.Text]) -> tuple[list[Document], list[Diagnostic]]:
    """The files that can be read, and what is wrong with the others."""
    from reconciler.core.document import parse

    documents: list[Document] = []
    wrong: list[Diagnostic] = []
    for text in texts:
        if text.error:
            wrong.append(Diagnostic("error", text.error))
            continue
        document, findings = parse(text.text, text.file)
        wrong.extend(findings)
        if document:
            documents.append(document)
    return documents, wrong


def empty_ledger(settings: Settings) -> Ledger:
    """What is remembered before anything was."""
    return Ledger(hub=settings.hub, state_id="")


def current(settings: Settings) -> Ledger:
    """The ledger as it is, read without the lock. Raises StoreError, ConfigError."""
    directory = Path(settings.state)
    holder = lock.holder(directory / "lock")
    ledger = read(directory)
    if ledger and holder:
        ledger = replace(ledger, busy=str(holder))
    if ledger and ledger.hub != settings.hub:
        raise ConfigError([Diagnostic("error", _other_hub(settings, ledger.hub))])
    return ledger or empty_ledger(settings)


def _other_hub(settings: Settings, known: str) -> str:
    return (
        f"cannot use {settings.state} for hub {settings.hub!r}: it belongs to hub {known!r}, whose "
        f"servers carry that name; write `hub: {known}`, or use another state directory"
    )


Desire = Callable[[Ledger], Desired]
"""What should be true, given what is remembered."""


def desire(source: Source, settings: Settings) -> Desire:
    """What the files ask for."""
    return lambda ledger: build(source.specs, source.inventory, settings, ledger)


def pruned(inner: Desire) -> Desire:
    """The same, and what was applied once and is gone from the files is to be absent."""
    return lambda ledger: without_the_rest(inner(ledger), ledger)


def chosen(inner: Desire, names: Collection[str] | None) -> Desire:
    """The same, about some VMs; the others are told to be untouched. None: about all."""
    return inner if names is None else lambda ledger: inner(ledger).chosen(names)


def dry_run(settings: Settings, wanted: Desire, environment: Mapping[str, str]) -> Plan:
    """The plan, and nothing else: no lock, no file, no port, no row. Raises HostError."""
    return rehearsed(settings, wanted, environment).plan


def rehearsed(settings: Settings, wanted: Desire, environment: Mapping[str, str]) -> Basis:
    """The same, with what it rests on."""
    ledger = current(settings)
    desired = wanted(ledger)
    # Who types `apply` next is not made to wait for a back-off, so the plan does not say so.
    ledger = without_backoff(ledger)
    eyes = Observer(settings, environment)
    actual = eyes.look(desired, ledger)
    now = eyes.now()
    return Basis.of(plan(desired, actual, ledger, now), actual, ledger, now)


@dataclass(slots=True)
class Outcome:
    """How an apply ended: the last plan, and every step of every pass."""

    plan: Plan
    steps: list[Step] = field(default_factory=list)
    interrupted: bool = False

    def calls(self) -> Mapping[str, Call]:
        """VM → its call as the last step left it, or as the last plan saw it."""
        found = {vm.name: vm.call for vm in self.plan.vms if vm.call}
        found.update({step.action.vm: step.call for step in self.steps if step.call})
        return found

    def exit_code(self) -> Exit:
        """The one number; where several apply: 65, 7, 4, 3, 1."""
        if self.plan.failed:
            return Exit.INVALID
        values = set(self.verdicts().values())
        for code in (Exit.UNKNOWN, Exit.HELD):
            if code in values:
                return code
        if values <= {Exit.OK}:
            return Exit.OK
        return Exit.PARTIAL if values & {Exit.OK, Exit.PARTIAL} else Exit.ERROR

    def verdicts(self) -> Mapping[str, Exit]:
        """How each VM stands: OK, UNKNOWN, HELD, PARTIAL (it waits) or ERROR."""
        calls = self.calls()
        failed: dict[str, set[str]] = {}
        for step in self.steps:
            if not step.ok and step.reason != "PortTaken":
                failed.setdefault(step.action.vm, set()).add(step.reason)
        return {
            one.name: _verdict(one, calls.get(one.name), failed.get(one.name, set()))
            for one in self.plan.all
        }


def _verdict(one: VmPlan | TunnelPlan, call: Call | None, failed: Collection[str]) -> Exit:
    kinds = {action.kind for action in one.actions}
    if call and call.state in UNSURE:
        return Exit.UNKNOWN
    if one.lost_run:
        return Exit.ERROR
    if "hold" in kinds or "InUse" in failed:
        return Exit.HELD
    if failed or "refuse" in kinds:
        return Exit.ERROR
    return Exit.PARTIAL if one.waits else Exit.OK


@dataclass(slots=True)
class Applier:
    """Applies a desire to this hub: the lock, the store, and passes until nothing more helps."""

    settings: Settings
    environment: Mapping[str, str]
    emit: Emit
    command: str = "reconciler apply"
    lock_timeout: Seconds = 120.0
    waiting: Callable[[lock.Holder | None], None] = lambda _: None
    looked: Callable[[Plan, Actual], None] = lambda _plan, _actual: None
    """Told of every look, before anything is done about it."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set by a signal: what has begun is ended in order, nothing new is begun."""
    executing: bool = False
    disks: ThreadPoolExecutor | None = None
    """Who starts and stops servers; None: threads of the apply's own."""
    tidies: bool = True
    """Looks after the servers' logs at its end."""
    remember: Callable[[], None] = lambda: None
    """Writes down what is to be known later, under the lock."""

    def hub(self, store: Store, /) -> Hub:
        """Eyes and hands for one apply."""
        close_inherited()
        return Hub(self.settings, self.environment, store, self.command)

    def remembered(self, store: Store, *, impatient: bool) -> Ledger:
        ledger = store.ledger()
        return without_backoff(ledger) if impatient else ledger

    def planned(
        self, desired: Desired, actual: Actual, remembered: Callable[[], Ledger], now: Seconds
    ) -> Plan:
        """The plan of one pass."""
        return plan(desired, actual, remembered(), now)

    def finished(self) -> AbstractContextManager[None]:
        """Around an apply, whatever becomes of it."""
        return nullcontext()

    @contextmanager
    def locked(self) -> Iterator[Path]:
        """The state directory, under the lock. Raises LockError, HostError."""
        directory = state_directory_of(self.settings)
        with lock.held(directory / "lock", self.command, self.lock_timeout, self.waiting):
            yield directory

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The store, under the lock. Raises LockError, HostError, ConfigError."""
        with self.locked() as directory:
            try:
                store = Store(directory, self.settings.hub)
            except WrongHubError as error:
                raise ConfigError([Diagnostic("error", str(error))]) from error
            try:
                yield store
            finally:
                store.close()

    def apply(
        self,
        wanted: Desire,
        *,
        approved: Callable[[Plan], bool] = lambda _: True,
        impatient: bool = True,
        order: bool = False,
        note: bool = True,
        promise: Promise | None = None,
    ) -> Outcome | None:
        """Make it true. None: `approved` said no to what it would do. Raises ReconcilerError.

        `impatient`: an operator is asking, so a back-off does not make them wait. `order`: what is
        wanted is no spec but an order; it becomes what was applied only where it was carried out.
        `note`: what is wanted is what was applied last, from now on; not so, if it was that before.
        `promise`: exactly this plan is carried out, or StalePlanError is raised and nothing is.
        """
        steps: list[Step] = []
        with self.opened() as store, self.finished(), _unknown_told(steps):
            if promise and not promise.begun:
                self.refuse_used(store, promise)
            hub = self.hub(store)
            done_before: set[str] = set()
            failed: set[str] = set()
            heard: dict[str, Report] = {}
            told: set[Told] = set()
            for number in range(PASSES):
                remembered = partial(self.remembered, store, impatient=impatient and not number)
                ledger = remembered()
                desired = wanted(ledger)
                # An SNA is asked once: a call that went wrong just now is not explained away.
                actual = hub.look(desired, ledger, ask=not number)
                heard = ended_by_word(ledger, actual, desired.vms) if not number else heard
                actual = replace(actual, reports=heard) if number else actual
                fresh = promise is not None and not promise.begun and not number
                if not fresh and not number:
                    self.note_inventory()
                if not fresh:
                    self.note_clients(store, desired, ledger, actual, hub.now())
                    self.note_words(store, desired, ledger, actual, hub.now())
                planned = self.planned(desired, actual, remembered, hub.now())
                if promise and not fresh:
                    planned = promise.kept(planned, done_before)
                self.looked(planned, actual)
                if promise and fresh:
                    self.refuse_moved(promise, planned, actual, ledger, hub.now())
                if not number:
                    if not approved(planned):
                        return None
                    if promise and fresh:
                        self.spend(store, promise, hub.now())
                        self.note_inventory()
                        self.note_clients(store, desired, ledger, actual, hub.now())
                    if note and not order:
                        self.note(store, desired, ledger)
                todo = worth(planned, failed)
                if not todo.all or number == PASSES - 1 or self.stopping.is_set():
                    # Nothing is done about it any more: what stands in the way is written all the
                    # same, as it is news to who reads the events in the morning.
                    self.write_down(store, hub, planned, (), told)
                    break
                if number and self.stopping.wait(BETWEEN if starting(todo) else 0):
                    break
                self.executing = True
                try:
                    steps_now = execute(
                        todo,
                        hub,
                        self.emit,
                        parallel=self.parallel(),
                        kill_clients=desired.kill_clients,
                        stopping=self.stopping,
                        disks=self.disks,
                    )
                finally:
                    self.executing = False
                steps += steps_now
                if promise:
                    done_before |= done(planned, [one.action for one in steps_now if one.ok])
                self.write_down(store, hub, planned, steps_now, told)
                failed |= resting(steps_now)
            outcome = Outcome(planned, steps, self.stopping.is_set())
            if order:
                verdicts = outcome.verdicts()
                fine = {n: v for n, v in desired.vms.items() if verdicts.get(n) is Exit.OK}
                tunnels = {n: v for n, v in desired.tunnels.items() if verdicts.get(n) is Exit.OK}
                self.note(store, replace(desired, vms=fine, tunnels=tunnels), ledger)
            self.note_failures(store, outcome, ledger)
            ledger = store.ledger()
            self.note_conditions(store, planned, actual, ledger, hub.now())
            if self.tidies:
                self.tidy(ledger, actual, hub.now())
            return outcome

    def note_inventory(self) -> None:
        """What the inventory says now is for a time when something else is broken too."""
        with suppress(HostError):
            self.remember()

    def refuse_used(self, store: Store, promise: Promise) -> None:
        """Raises StalePlanError if a saved plan was applied before, or is of something else."""
        saved = promise.saved
        if use := store.used(saved.id):
            raise promise.used(use.at, use.who)
        moved = elsewhere(saved, self.settings.hub, store.state_id, self.settings.to_json())
        moved += out_of_time(saved, time.time())
        if moved:
            raise promise.stale(moved)

    def refuse_moved(
        self, promise: Promise, planned: Plan, actual: Actual, ledger: Ledger, now: Seconds
    ) -> None:
        """Raises StalePlanError if a saved plan is not what would be done now."""
        moved = observed(promise.saved.basis, Basis.of(planned, actual, ledger, now))
        if moved:
            raise promise.stale(moved)

    def spend(self, store: Store, promise: Promise, now: Seconds) -> None:
        """The one use of a saved plan, on the disk before anything is done. Raises StalePlanError
        if another was quicker, or the time is over."""
        saved = promise.saved
        if moved := out_of_time(saved, now):
            raise promise.stale(moved)
        if before := store.use(saved.id, saved.expires, self.command, now):
            raise promise.used(before.at, before.who)

    def tidy(self, ledger: Ledger, actual: Actual, now: Seconds) -> None:
        """Keep the servers' logs from growing without end."""
        keep = {lease.key for lease in ledger.leases}
        keep |= {export_key(e) for c in ledger.open if c.state.active for e in c.exports}
        keep |= {server.mark.key for server in actual.servers}
        names = {log_name(*key[:3]) for key in keep}
        if actual.lines:
            from reconciler.dialling import log_name as tunnel_log

            names |= {tunnel_log(line.mark.tunnel, line.mark.part) for line in actual.lines}
        tidy(Path(self.settings.state) / "logs", names, now - EVENT_DAYS * 86400)

    def parallel(self) -> int:
        """Servers started at once. Four per core: more gains nothing, measured on two cores."""
        return self.settings.qemu_nbd.parallel or min(32, 4 * (os.cpu_count() or 1))

    def unnoted(self, desired: Desired, ledger: Ledger) -> dict[str, Mapping[str, Any]]:
        """VM → what is wanted of it, where that is not what was applied last."""
        vms = {name: vm.to_json() for name, vm in desired.vms.items()}
        return {
            name: vm
            for name, vm in vms.items()
            if name not in ledger.applied or ledger.applied[name].vm != vm
        }

    def note(self, store: Store, desired: Desired, ledger: Ledger) -> None:
        changed = self.unnoted(desired, ledger)
        settings = self.settings.to_json()
        if changed or ledger.settings != settings:
            store.apply(settings, changed, time.time())
        tunnels = {name: one.to_json() for name, one in desired.tunnels.items()}
        known = ledger.tunnels
        fresh = {n: one for n, one in tunnels.items() if n not in known or known[n].vm != one}
        if fresh:
            store.apply_tunnels(fresh, time.time())

    def note_clients(
        self, store: Store, desired: Desired, ledger: Ledger, actual: Actual, now: Seconds
    ) -> None:
        """Who is connected, as far as a later look has to know it."""
        busy = {server.mark.key for server in actual.servers if server.clients}
        fresh = [one for one in ledger.leases if one.key in busy and not one.clients_seen]
        if fresh:
            store.clients_seen(fresh)
        unsure = {c.job_id: c for c in ledger.open if c.state in UNSURE}
        found = {
            job: sighted(call, actual) for job, call in unsure.items() if call.vm in desired.vms
        }
        seen = {job: taken for job, taken in found.items() if taken is not None}
        known = ledger.sightings.keys()
        gone = {job for job in known if job not in unsure or (job in found and job not in seen)}
        if gone or seen.keys() - known:
            store.sightings(seen, gone, now)

    def note_words(
        self, store: Store, desired: Desired, ledger: Ledger, actual: Actual, now: Seconds
    ) -> None:
        """What SNAs say, for who looks and does not ask. How far they are is told by telemetry."""
        jobs = [call.job_id for vm in desired.vms if (call := ledger.active(vm))]
        said = {j: replace(actual.reports[j], percent=None) for j in jobs if j in actual.reports}
        known = ledger.words
        fresh = {j: r for j, r in said.items() if j not in known or known[j].report != r}
        if fresh:
            store.words(fresh, now)

    def write_down(
        self, store: Store, hub: Hub, planned: Plan, steps: Sequence[Step], told: set[Told]
    ) -> None:
        """What happened, and what stands in the way, as events. `told`: what stood in the way of an
        earlier pass, which is not written twice; what is written now is put into it."""
        runs = {vm.name: vm.vm.run for vm in planned.vms}
        standing = [
            one
            for one in self.standing(planned)
            # That an SNA cannot be reached is told when it begins: see note_conditions.
            if one.cause != UNREACHABLE and told_of(one) not in told
        ]
        told.update(map(told_of, standing))
        events = [
            Event(
                vm=step.action.vm,
                disk=step.action.disk,
                run=runs.get(step.action.vm, ""),
                severity="Normal" if step.ok else "Warning",
                reason=step.reason,
                message=step.message,
            )
            for step in steps
        ]
        events += [
            Event(
                vm=action.vm,
                disk=action.disk,
                run=runs.get(action.vm, ""),
                severity="Warning",
                reason=action.cause,
                message=action.why,
            )
            for action in standing
        ]
        events += [
            Event(
                vm=step.action.vm,
                disk=step.action.disk,
                run=runs.get(step.action.vm, ""),
                severity="Warning",
                reason="CrashLoop",
                message=LOOPS,
            )
            for step in steps
            if isinstance(step.action, Restart) and step.action.lease.deaths >= CRASH_LOOP
        ]
        events += [
            Event(
                vm=step.action.vm,
                disk=step.action.disk,
                run=runs.get(step.action.vm, ""),
                severity="Warning",
                reason="ServerDied",
                message="its server died under a client: acknowledged writes may be gone, and "
                "the run can only fail",
            )
            for step in steps
            if isinstance(step.action, Restart) and step.action.taints
        ]
        events += [
            Event(
                vm=step.action.vm, run=call.run, severity="Warning", reason=reason, message=message
            )
            for step in steps
            if (call := step.call)
            for reason, message in doubts(step.action, call)
        ]
        if events:
            store.record(events, self.command, hub.now())

    def standing(self, planned: Plan) -> Iterable[Action]:
        """What stands in the way, as far as it is to be written down."""
        return (one for one in planned.actions if one.kind in ("hold", "refuse", "wait"))

    def note_failures(self, store: Store, outcome: Outcome, ledger: Ledger) -> None:
        """What could not be done, for `status`, which cannot see it by looking."""
        found: dict[str, tuple[str, str]] = {}
        verdicts = outcome.verdicts()
        scope = [one.name for one in outcome.plan.all]
        for step in outcome.steps:
            if not step.ok and verdicts.get(step.action.vm) is not Exit.OK:
                found[step.action.vm] = (step.reason, step.message)
        for action in outcome.plan.actions:
            if action.kind == "refuse" or action.cause == UNREACHABLE:
                found.setdefault(action.vm, (action.cause, action.why))
        known = {vm: why for vm, why in ledger.failures.items() if vm in scope}
        if found != known:
            store.failures(scope, found)

    def note_conditions(
        self, store: Store, planned: Plan, actual: Actual, ledger: Ledger, now: Seconds
    ) -> dict[str, Sequence[Condition]]:
        """When each condition came to be what it is, read by `status`; VM → its conditions."""
        servers: dict[str, list[Server]] = defaultdict(list)
        for server in actual.servers:
            servers[server.mark.vm].append(server)
        found = {
            one.name: conditions(one, replace(actual, servers=tuple(servers[one.name])), ledger)
            for one in planned.vms
        }
        found |= {one.name: tunnel_conditions(one, actual, ledger) for one in planned.tunnels}
        moved = {}
        for name, some in found.items():
            for condition in some:
                key, value = (name, condition.type), (condition.status, condition.reason)
                known = ledger.transitions.get(key)
                if not known or known[:2] != value:
                    moved[key] = value
        if moved:
            store.transitions(moved, now)
        silent = [
            Event(vm=one.name, run=run, severity="Warning", reason="Stale", message=one.stale)
            for one in planned.vms
            if one.stale and (one.name, "Stale") in moved
            for run in [one.call.run if one.call else ""]
        ]
        waiting = [
            Event(vm=one.name, run=one.vm.run, severity="Warning", reason=UNREACHABLE,
                  message=action.why)
            for one in planned.vms
            if moved.get((one.name, "Ready")) == ("False", UNREACHABLE)
            for action in one.actions
            if action.cause == UNREACHABLE
        ]  # fmt: skip
        if silent or waiting:
            store.record([*silent, *waiting], self.command, now)
        return dict(found)


Told = tuple[str, int | None, str]
"""VM, disk, cause: what stands in the way of something."""


def told_of(action: Action) -> Told:
    return action.vm, action.disk, action.cause


def doubts(action: Action, call: Call) -> Iterator[tuple[str, str]]:
    """(reason, message) of what is to be said of a call although all went well."""
    if isinstance(action, Notify) and call.fallback:
        yield "FellBack", f"run {call.run} is full instead of incremental: {call.fallback}"
    if isinstance(action, Conclude) and call.doubt:
        yield "Implausible", f"run {call.run}: {call.doubt}"


def state_directory_of(settings: Settings) -> Path:
    """The state directory, made where it is missing. Raises HostError."""
    directory = Path(settings.state)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot use the state directory {directory}: {error.strerror}; run as a user who "
            "may write there, or set `state:` in the config (or RECONCILER_STATE)",
            "Storage",
        ) from error
    return directory


class UnknownOutcomeError(HostError):
    """The record failed while calls were out whose outcome is therefore not known."""

    exit: ClassVar[Exit] = Exit.UNKNOWN


@contextmanager
def _unknown_told(steps: Sequence[Step]) -> Iterator[None]:
    """A pass that cannot go on says of which calls the outcome is not known by then."""
    try:
        yield
    except HostError as error:
        last = {step.action.vm: step.call for step in steps if step.call}
        unknown = [vm for vm, call in last.items() if call.state in UNSURE]
        if not unknown:
            raise
        raise UnknownOutcomeError(
            f"{error}; the outcome of the call is not known for {', '.join(sorted(unknown))}: when "
            f"that is mended, reconciler explain {min(unknown)}",
            error.reason,
        ) from error


def ended_by_word(ledger: Ledger, actual: Actual, vms: Iterable[str]) -> dict[str, Report]:
    """What SNAs say of some VMs' runs that were accepted before this look: it holds for all of an
    apply.

    A run whose end is reported may need a server mended first, which takes a pass.
    """
    active = [call for vm in vms if (call := ledger.active(vm))]
    accepted = [call.job_id for call in active if call.state is CallState.ACCEPTED]
    return {job: actual.reports[job] for job in accepted if job in actual.reports}


def without_backoff(ledger: Ledger) -> Ledger:
    """The same ledger with every rest over."""
    leases = tuple(replace(one, rest=0.0) if one.rest else one for one in ledger.leases)
    dialled = {key: replace(one, rest=-1.0) for key, one in ledger.dialled.items()}
    ledger = replace(ledger, leases=leases, dialled=dialled)
    return ledger.put(replace(call, retry_at=0.0) for call in ledger.open if call.retry_at)


def worth(planned: Plan, failed: Collection[str]) -> Plan:
    """The VMs of a plan that a pass can do something about; those that failed rest."""

    def moves(one: VmPlan | TunnelPlan) -> bool:
        return any(
            action.kind in CHANGES
            or action.cause == "Starting"
            or (isinstance(action, Hold) and (action.event or action.remember))
            for action in one.actions
        )

    return replace(
        planned,
        vms=tuple(one for one in planned.vms if one.name not in failed and moves(one)),
        tunnels=tuple(one for one in planned.tunnels if one.name not in failed and moves(one)),
    )


def starting(planned: Plan) -> bool:
    """Whether a server is in the act of starting, so that looking again at once is too soon."""
    return any(action.cause == "Starting" for action in planned.actions)
