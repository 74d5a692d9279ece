"""(Plan, host) → steps. Per VM in order, VMs side by side; it decides nothing.

Effects block, each within its own deadline, so they run in threads: one pool for VMs and one for
disks, the second bounding how many servers start at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, assert_never

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actions import (
    Action,
    Adopt,
    Conclude,
    Create,
    Dial,
    HangUp,
    Hold,
    Notify,
    Redial,
    Refuse,
    Release,
    Restart,
    Start,
    Stop,
    TakeOver,
    Wait,
    Witness,
)
from reconciler.core.actual import Server
from reconciler.core.backoff import jittered, pause, rest
from reconciler.core.call import (
    Answer,
    Call,
    CallEvent,
    CallState,
    Seal,
    doubt,
    due_call,
    judge,
    targets,
    verdict,
)
from reconciler.core.call_plan import NOT_AGAIN
from reconciler.core.desired import Export, Vm
from reconciler.core.errors import HostError, ReconcilerError
from reconciler.core.ledger import Archived, Lease
from reconciler.core.plan import Plan
from reconciler.core.settings import Secret, Settings
from reconciler.core.tunnel import Tunnel
from reconciler.core.tunnel_plan import TunnelPlan, came_up, failed, not_permitted
from reconciler.core.tunnel_seen import Dialled, Ssh
from reconciler.core.units import Port, Seconds
from reconciler.core.vm_plan import VmPlan

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Listener(Protocol):
    """A bound and listening socket."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Line(Protocol):
    """A connection to an SNA."""

    def preflight(self) -> None: ...
    def start(self, request: Mapping[str, str], password: Secret) -> Answer: ...


class Records(Protocol):
    """What is remembered; see host/store."""

    def hold(self, leases: Sequence[Lease], call: Call | None) -> None: ...
    def started(self, leases: Sequence[Lease], now: Seconds, *, again: bool = False) -> None: ...
    def release(self, leases: Sequence[Lease]) -> None: ...
    def remember(self, call: Call) -> None: ...
    def advance(
        self,
        call: Call,
        event: CallEvent,
        now: Seconds,
        *,
        archived: Iterable[Archived] = (),
        **changes: object,
    ) -> Call: ...
    def taint(self, call: Call) -> None: ...
    def dialled(self, found: Dialled) -> None: ...
    def hung_up(self, tunnel: str, part: str) -> None: ...


class Host(Protocol):
    """Everything outside that an action can touch; see hub.py."""

    @property
    def settings(self) -> Settings: ...
    @property
    def records(self) -> Records: ...
    @property
    def who(self) -> str: ...
    def now(self) -> Seconds: ...
    def reserve(self, port: Port) -> Listener: ...
    def claim(self, vm: Vm) -> None: ...
    def intend(self, vm: Vm, call: Call) -> None: ...
    def unintend(self, vm: Vm, call: Call) -> None: ...
    def taint(self, vm: Vm, call: Call) -> None: ...
    def create(self, export: Export, root: str) -> None: ...
    def start(self, export: Export, lease: Lease, listener: Listener) -> None: ...
    def look_again(self, server: Server, export: Export) -> Server | None: ...
    def stop(self, server: Server, *, kill_clients: bool) -> None: ...
    def silent(self, exports: Sequence[Export], ports: Mapping[int, Port]) -> list[str]: ...
    def sealed(self, exports: Sequence[Export], servers: Sequence[Server]) -> list[Seal]: ...
    def line(self, sna: str) -> AbstractContextManager[Line]: ...
    def password(self, vcenter: str) -> Secret: ...
    def dial(self, tunnel: Tunnel, part: str, argv: Sequence[str]) -> Ssh: ...
    def hang_up(self, ssh: Ssh) -> None: ...
    def refused(self, tunnel: Tunnel, part: str) -> list[Port]: ...


class Step(Struct, frozen=True):
    """How an action went."""

    action: Action
    ok: bool
    reason: str
    message: str
    call: Call | None = None
    """The call as it stands after this step, where the step was about the call."""
    took: float = 0.0
    """Seconds that it took."""


Emit: TypeAlias = Callable[[Step], None]


def execute(
    plan: Plan,
    host: Host,
    emit: Emit,
    *,
    parallel: int = 8,
    kill_clients: bool = False,
    stopping: threading.Event | None = None,
    disks: ThreadPoolExecutor | None = None,
) -> list[Step]:
    """Do what the plan says and tell how each step went. Nothing of it is raised.

    `disks`: who starts and stops servers, where several plans are carried out at once; its size
    bounds them together.
    """
    steps: list[Step] = []
    mutex = threading.Lock()

    def tell(step: Step) -> None:
        with mutex:
            steps.append(step)
            emit(step)

    vms_to_do = [vm for vm in plan.vms if vm.actions]
    tunnels = [one for one in plan.tunnels if one.actions]
    stop = stopping or threading.Event()
    if not (vms_to_do or tunnels):
        return steps
    from concurrent.futures import ThreadPoolExecutor  # late: it loads twelve modules

    with contextlib.ExitStack() as stack:
        if disks is None:
            disks = stack.enter_context(ThreadPoolExecutor(parallel, "disk"))
        todo = [_OneVm(vm, host, tell, disks, stop, kill_clients).run for vm in vms_to_do]
        todo += [_OneTunnel(one, host, tell, stop).run for one in tunnels]
        if len(todo) == 1:  # no other is to be done beside it, so it needs no thread of its own
            todo[0]()
        elif todo:
            vms = stack.enter_context(ThreadPoolExecutor(max(parallel, 1), "vm"))
            for job in [vms.submit(run) for run in todo]:
                job.result()
    return steps


class _Of:
    """The actions about one thing."""

    def __init__(self, host: Host, tell: Emit, stopping: threading.Event) -> None:
        self.host, self.tell, self.stopping = host, tell, stopping
        self.records = host.records

    def attempt(self, action: Action, effect: Callable[[Action], Step | None]) -> bool:
        """One action; what fails is told, not raised. False if it failed.

        That a run has failed is bad news, and well noted: what follows from it is done.
        """
        began = self.host.now()
        try:
            step = effect(action)
        except HostError as error:
            step = Step(action, False, error.reason, str(error))
        except ReconcilerError as error:
            step = Step(action, False, type(error).__name__, str(error))
        if step is None:
            return True
        step = replace(step, took=max(0.0, self.host.now() - began))
        self.tell(step)
        return step.ok or concluded(step)


class _OneTunnel(_Of):
    """One tunnel's actions: what ends, then what is dialled; a part does not wait for another."""

    def __init__(self, plan: TunnelPlan, host: Host, tell: Emit, stopping: threading.Event) -> None:
        super().__init__(host, tell, stopping)
        self.plan = plan

    def run(self) -> None:
        good = True
        for action in self.plan.actions:
            if isinstance(action, HangUp):
                good &= self.attempt(action, self.perform)
        for action in self.plan.actions:
            if isinstance(action, Dial | Redial | TakeOver) and good:
                if self.stopping.is_set():
                    return
                self.attempt(action, self.perform)

    def perform(self, action: Action) -> Step:
        match action:
            case HangUp():
                self.host.hang_up(action.ssh)
                self.records.hung_up(action.vm, action.ssh.mark.part)
                return Step(action, True, "HungUp", f"pid {action.ssh.pid} has ended")
            case TakeOver():
                return self.take_over(action)
            case Dial() | Redial():
                return self.dial(action)
            case _:
                raise AssertionError(action)

    def take_over(self, action: TakeOver) -> Step:
        ssh, now = action.ssh, self.host.now()
        found = Dialled(
            tunnel=action.vm,
            part=action.part,
            up=now - ssh.age,
            pid=ssh.pid,
            started=ssh.started,
        )
        refused = self.host.refused(action.tunnel, action.part)
        if refused:
            found = not_permitted(found, action.tunnel, refused, now)
        self.records.dialled(found)
        return Step(action, True, "Adopted", f"pid {ssh.pid}")

    def dial(self, action: Dial | Redial) -> Step:
        host, after = self.host, self.host.settings.loop.healthy_after
        if isinstance(action, Redial) and action.ssh:
            host.hang_up(action.ssh)
        try:
            ssh = host.dial(action.tunnel, action.part, action.argv)
        except HostError as error:
            self.records.dialled(failed(action, error.reason, str(error), host.now(), after))
            raise
        refused = host.refused(action.tunnel, action.part)
        found = came_up(action, ssh, refused, host.now(), after)
        self.records.dialled(found)
        if refused:
            return Step(action, False, found.reason, found.message)
        reason = "Dialled" if isinstance(action, Dial) else "DialledAgain"
        before = "" if isinstance(action, Dial) else f"; before: {action.why}"
        return Step(action, True, reason, f"pid {ssh.pid}: {action.connection()}{before}")


class _OneVm(_Of):
    """One VM's actions: what ends goes first, then what comes up, then the call."""

    def __init__(
        self,
        plan: VmPlan,
        host: Host,
        tell: Emit,
        disks: ThreadPoolExecutor,
        stopping: threading.Event,
        kill_clients: bool,
    ) -> None:
        super().__init__(host, tell, stopping)
        self.plan, self.disks, self.kill_clients = plan, disks, kill_clients
        self.claimed: Call | None = None
        """The run's row, once it and its claim are on the disk."""
        self.up: list[Start | Restart] = []
        """What was brought up; noted in one commit for the whole VM."""
        self.down: list[Lease] = []
        """Leases of what was stopped."""
        self.concluded: set[tuple[str, str, int]] = set()
        """Calls that came to their end here."""

    def run(self) -> None:
        early: list[Action] = []
        rising: list[Create | Start | Restart] = []
        notify: Notify | None = None
        for action in self.plan.actions:
            if isinstance(action, Create | Start | Restart):
                rising.append(action)
            elif isinstance(action, Notify):
                notify = action
            else:
                early.append(action)
        ended = [action for action in early if not isinstance(action, Stop)]
        stops = [action for action in early if isinstance(action, Stop)]
        good = True
        for action in ended:
            done = self.attempt(action, self.perform)
            if isinstance(action, Conclude) and action.call.key not in self.concluded:
                return  # what was to end has not: its servers stay
            good &= done
        good &= self.side_by_side(stops, self.perform)
        if stops and self.down:
            good &= self.noted(stops[0], lambda: self.records.release(self.down))
        if not good or self.stopping.is_set():
            return
        if rising and not self.rise(rising):
            return
        if notify and not self.stopping.is_set():
            self.attempt(notify, self.notify)

    def side_by_side(
        self, actions: Sequence[Action], effect: Callable[[Action], Step | None]
    ) -> bool:
        if len(actions) == 1:
            return self.attempt(actions[0], effect)
        jobs = [self.disks.submit(self.attempt, action, effect) for action in actions]
        results = [job.result() for job in jobs]  # all of them, also when one failed
        return all(results)

    def perform(self, action: Action) -> Step | None:
        """Everything but what brings servers up and the call."""
        now = self.host.now()
        match action:
            case Wait() | Refuse():
                return None
            case Hold():
                if action.call and action.remember:
                    self.records.remember(action.call)
                if action.call and action.event:
                    said = action.why.split(NOT_AGAIN)[0]
                    self.records.advance(action.call, action.event, now, message=said)
                return None
            case Witness():
                call = self.closed_gap(action.call)
                if action.event is CallEvent.DENY:
                    self.host.unintend(self.plan.vm, call)
                call = self.records.advance(call, action.event, now, message=action.why)
                return Step(action, True, action.cause, action.why, call)
            case Conclude():
                return self.conclude(action)
            case Stop():
                self.host.stop(action.server, kill_clients=self.kill_clients)
                if action.lease:
                    self.down.append(action.lease)
                gone = f"pid {action.server.pid} stopped, port {action.server.mark.port} released"
                return Step(action, True, "Stopped", gone)
            case Release():
                self.records.release([action.lease])
                return Step(action, True, "Released", f"port {action.lease.port} released")
            case Adopt():
                self.records.hold([action.lease], None)
                self.records.started([action.lease], now - action.server.age)
                return Step(action, True, "Adopted", f"{action.what()}: {action.why}")
            case (
                Create()
                | Start()
                | Restart()
                | Notify()
                | Dial()
                | Redial()
                | TakeOver()
                | HangUp()
            ):
                raise AssertionError(f"{action.kind} has its own way")
            case _:
                assert_never(action)

    def closed_gap(self, call: Call) -> Call:
        """A call that we ended in the middle of is one whose outcome is unknown."""
        if call.state is not CallState.INTENDED:
            return call
        return self.records.advance(call, CallEvent.CRASH, self.host.now())

    def conclude(self, action: Conclude) -> Step:
        """The end of a run; published only when what was written is on the disk and whole."""
        event, why, cause = action.event, action.why, action.cause
        now = self.host.now()
        kept: list[Archived] = []
        changes: dict[str, Any] = {}
        if event is CallEvent.END:
            seals = self.host.sealed(action.call.exports, action.servers)
            event, found = verdict(action.call.type, seals)
            why = f"{why}; {found}" if event is CallEvent.END else found
            cause = cause if event is CallEvent.END else str(event)
            now = self.host.now()
        if event is CallEvent.END:
            kept = archived(action.call, seals, now)
            changes["doubt"] = doubt(action.call.exports, seals, action.told)
        call = self.closed_gap(action.call)
        call = self.records.advance(call, event, now, message=why, archived=kept, **changes)
        self.concluded.add(call.key)
        return Step(action, event is CallEvent.END, cause, why, call)

    # -- coming up

    def rise(self, actions: Sequence[Create | Start | Restart]) -> bool:
        """All ports or none, then the claim, then images and servers side by side."""
        serving = [action for action in actions if not isinstance(action, Create)]
        creating = {action.disk: action for action in actions if isinstance(action, Create)}
        listeners: dict[int | None, Listener] = {}
        try:
            try:
                for action in serving:
                    if not (isinstance(action, Restart) and action.server):
                        listeners[action.disk] = self.host.reserve(action.lease.port)
                # A restart on its own port needs no word of that: its lease is on the disk since
                # before its first start, and a crash in between leaves what it would have left.
                new = [
                    action.lease
                    for action in serving
                    if not (isinstance(action, Restart) and action.leased)
                ]
                due = self.due()
                if new or due:
                    self.records.hold(new, due)
                if due:
                    self.host.claim(self.plan.vm)
                self.claimed = due
            except HostError as error:
                self.tell(Step(replace(serving[0], disk=None), False, error.reason, str(error)))
                return False

            def one(action: Action) -> Step | None:
                create = creating.get(action.disk)
                if create and not self.attempt(create, self.create):
                    return _skipped(action)
                return self.serve(action, listeners)

            good = self.side_by_side(serving, one)
            good &= self.note_up()
        finally:
            for listener in listeners.values():
                listener.close()
        return good

    def note_up(self) -> bool:
        """What came up, in one commit; a crash before it is found by looking."""
        now = self.host.now()
        for again in (False, True):
            up = [one for one in self.up if isinstance(one, Restart) is again]
            leases = [rested(one.lease, now) for one in up]
            note = partial(self.records.started, leases, now, again=again)
            if up and not self.noted(up[0], note):
                return False
        return True

    def noted(self, action: Action, note: Callable[[], None]) -> bool:
        """Write something down about a step that was done; False, and told, if it cannot be."""
        try:
            note()
        except HostError as error:
            self.tell(Step(replace(action, disk=None), False, error.reason, str(error)))
            return False
        return True

    def due(self) -> Call | None:
        """The run's row in the ledger before anything of it exists: DUE."""
        vm, call = self.plan.vm, self.plan.call
        if vm.purpose != "backup" or (call and call.state is not CallState.DUE):
            return None
        return due_call(self.host.settings.hub, vm, self.host.now(), self.host.who)

    def create(self, action: Action) -> Step:
        assert isinstance(action, Create)
        self.host.create(action.export, self.plan.vm.root)
        made = action.what().replace("create", "created", 1)
        return Step(action, True, "Created", f"{made} {action.export.image}")

    def serve(self, action: Action, listeners: dict[int | None, Listener]) -> Step:
        assert isinstance(action, Start | Restart)
        if self.stopping.is_set():
            return Step(action, False, "Interrupted", "not started: we are asked to end")
        if isinstance(action, Restart):
            recovered = self.make_way(action)
            if recovered:
                return recovered
            if action.server:
                listeners[action.disk] = self.host.reserve(action.lease.port)
        self.host.start(action.export, action.lease, listeners[action.disk])
        self.up.append(action)
        word = "Restarted" if isinstance(action, Restart) else "Started"
        return Step(action, True, word, f"{action.export.name} answers on {action.lease.port}")

    def make_way(self, action: Restart) -> Step | None:
        """Before a restart: note the loss; look a second time at a server that still runs."""
        if action.server:
            again = self.host.look_again(action.server, action.export)
            if again and again.clients:
                raise HostError(
                    f"not restarted: {again.clients} clients are connected to port "
                    f"{action.lease.port}",
                    "InUse",
                )
            fine = again and again.handshake and again.handshake.answered
            if fine and action.cause == "NoAnswer":
                return Step(action, True, "Recovered", f"pid {action.server.pid} answers again")
        if action.taints and self.plan.call:
            self.records.taint(self.plan.call)
            self.host.taint(self.plan.vm, self.plan.call)
        if action.server:
            self.host.stop(action.server, kill_clients=False)
        return None

    # -- the call

    def notify(self, action: Action) -> Step:
        """The barrier, the preflight, the intent on disk, the POST, the answer on disk."""
        assert isinstance(action, Notify)
        vm, ports = action.target, self.plan.ports
        silent = self.host.silent(vm.exports, ports)
        if silent:
            return Step(action, False, "NotReady", f"no call: {'; '.join(silent)}")
        call, due = self.plan.call, self.claimed or self.due()
        if due:
            if not self.claimed:
                self.records.hold([], due)
                self.host.claim(vm)
            call = replace(due, failures=call.failures) if call else due
        assert call is not None
        if call.state is CallState.REJECTED:
            call = self.records.advance(call, CallEvent.REARM, self.host.now(), message="")
            call = replace(
                call,
                sna=vm.sna,
                type=vm.type,
                fallback=vm.fell_back,
                exports=vm.exports,
                request=vm.request,
                display_name=vm.display_name,
                path=vm.path,
                vcenter=vm.vcenter,
            )
            self.records.hold([], call)
        password = self.host.password(vm.vcenter)
        vcenter = self.host.settings.vcenters[vm.vcenter]
        request = {
            "job_id": call.job_id,
            "vm_name": vm.display_name,
            "vcenter_host": vcenter.host,
            "vcenter_user": vcenter.user,
            "vm_path": vm.path,
            "nbd_targets": targets(vm.exports, ports, self.host.settings.advertise),
            "backup_type": vm.type,
            # The client asks the hub per disk; a marker that is not empty is enough.
            "previous_change_id": "ask-hub" if vm.type == "incremental" else "",
        }
        intended = False
        try:
            with self.host.line(vm.sna) as line:
                line.preflight()
                call = self.records.advance(
                    call, CallEvent.INTEND, self.host.now(), targets=request["nbd_targets"]
                )
                intended = True
                self.host.intend(vm, call)
                answer = line.start(request, password)
        except HostError as error:  # of a step before the POST, which itself raises nothing
            answer = Answer(False, error=str(error))
            # An intent that hangs cannot be taken back now. If it appears later, the run becomes
            # UNKNOWN; if not, it is DUE, as it should be.
            intended = intended and error.reason != "StorageHangs"
        return self.answered(action, call, answer, intended=intended)

    def answered(self, action: Notify, call: Call, answer: Answer, *, intended: bool) -> Step:
        """Write down what came of the call; where the SNA did not act, take the intent back first.

        `intended`: there is, or may be, an intent that can be taken back.
        """
        event, message = judge(answer, call.job_id)
        now = self.host.now()
        changes: dict[str, Any] = {"message": message}
        if event is CallEvent.NOTHING_SENT:
            failures = call.failures + 1
            wait = jittered(pause(failures), call.vm, failures)
            changes |= {"failures": failures, "retry_at": now + wait}
        else:
            changes |= {"failures": 0, "retry_at": 0.0}
        try:
            if intended and event in (CallEvent.NOTHING_SENT, CallEvent.REJECT):
                self.host.unintend(action.target, call)
            call = self.records.advance(call, event, now, **changes)
        except HostError as error:  # what is written down is the intent: to the next, it is unknown
            said = f"SNA {call.sna}: {message}, job {call.job_id}; not written down: {error}"
            return Step(action, False, error.reason, said, call)
        ok = event is CallEvent.ACCEPT
        reason = "CallAccepted" if ok else f"Call{event}"
        text = f"SNA {call.sna}: {message}, job {call.job_id}"
        return Step(action, ok, reason, text, call)


def archived(call: Call, seals: Sequence[Seal], now: Seconds) -> list[Archived]:
    """What is kept of the disks of a run that is published."""
    found = {one.key: one for one in seals}
    return [
        Archived(
            job_id=call.job_id,
            position=export.position,
            size=found[export.key].size,
            allocated=found[export.key].allocated,
            digest=found[export.key].digest,
            at=now,
        )
        for export in call.exports
    ]


def rested(lease: Lease, now: Seconds) -> Lease:
    """The lease of a server that came up now: if it dies young, it is left down until its rest."""
    span = rest(lease.deaths, lease.vm, lease.disk)
    return replace(lease, rest=now + span if span else 0.0)


def concluded(step: Step) -> bool:
    """Whether a step noted the end of a run, be it a good or a bad one."""
    return isinstance(step.action, Conclude) and step.call is not None


def resting(steps: Iterable[Step]) -> set[str]:
    """The VMs that failed at something: they wait for its cause to go away.

    A lost race for a port is planned anew instead, and the VM of a run that failed goes on.
    """
    return {
        step.action.vm
        for step in steps
        if not step.ok and step.reason != "PortTaken" and not concluded(step)
    }


def _skipped(action: Action) -> Step:
    return Step(action, False, "Skipped", "not served: its image could not be created")
