"""The daemon's half of a hand-over: one conversation per command, each in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from reconciler import orders
from reconciler.core.errors import Exit, HostError, LockError, ReconcilerError, UsageError
from reconciler.core.ledger import Pause
from reconciler.core.plan import Plan
from reconciler.core.queue import Priority
from reconciler.core.units import Seconds
from reconciler.daemon import Daemon, Work
from reconciler.execute import Step
from reconciler.handover import (
    Answer,
    Apply,
    Asked,
    Carry,
    Done,
    Halt,
    Line,
    Looked,
    Question,
    Said,
    Stepped,
    Stop,
    accepted,
    differences,
    failed,
    listening,
    permitted,
    until,
)
from reconciler.host.store import Event
from reconciler.look import Observer
from reconciler.orders import Approve, Cancel, Resume

SILENT: Final[Seconds] = 30.0
"""How long who connects may say nothing."""
ANSWER: Final[Seconds] = 3600.0
"""How long a person may think about a question. Other VMs are kept true meanwhile."""


class Reception:
    """Takes conversations for a daemon."""

    def __init__(self, daemon: Daemon) -> None:
        """Raises HostError."""
        self.daemon = daemon
        self._sock = listening(Path(daemon.settings.state))
        self._sock.setblocking(False)
        self._open: set[Conversation] = set()
        daemon.listen(self._sock.fileno(), self._come)

    def _come(self, _fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._sock.accept()
            sock.setblocking(True)
            if not permitted(sock):
                sock.close()
                return
            conversation = Conversation(self.daemon, accepted(sock))
            self._open.add(conversation)
            threading.Thread(
                target=self._hold, args=(conversation,), name="command", daemon=True
            ).start()

    def _hold(self, conversation: Conversation) -> None:
        try:
            conversation.run()
        finally:
            self._open.discard(conversation)

    def close(self) -> None:
        """Nobody comes any more; what is being done is ended in order."""
        self.daemon.unlisten(self._sock.fileno())
        self._sock.close()
        for conversation in list(self._open):
            conversation.halt.set()
        until(time.monotonic() + SILENT, lambda: not self._open)


class Conversation:
    """One command's."""

    def __init__(self, daemon: Daemon, line: Line) -> None:
        self.daemon, self.line = daemon, line
        self.halt = threading.Event()
        """What was begun is ended, nothing new is begun."""
        self._answers: list[bool] = []
        self._asking = threading.Event()
        self._over = False

    def run(self) -> None:
        """Never raises."""
        with contextlib.closing(self.line):
            try:
                if not self.line.readable(SILENT):
                    return
                request = self.line.receive()
                if isinstance(request, Apply | Carry):
                    self.take(request)
            except OSError:
                return  # nobody is there any more; what was begun is ended
            except HostError as error:
                self.say(failed(error))

    def take(self, request: Apply | Carry) -> None:
        listener = threading.Thread(target=self._listen, name="command", daemon=True)
        listener.start()
        try:
            self.same_settings(request.settings)
            if isinstance(request, Apply):
                self.apply(request)
            else:
                self.carry(request)
        except ReconcilerError as error:
            self.say(failed(error))
        except Exception as error:
            self.daemon.observers.said(
                "a command failed: this is a bug", error=f"{type(error).__name__}: {error}"
            )
            told = f"this is a bug: {type(error).__name__}: {error}; see the daemon's log"
            self.say(failed(HostError(told, "Bug")))
        finally:
            self._over = True

    def same_settings(self, theirs: Any) -> None:
        """Raises HostError if the command would work by another config than we do."""
        wrong = differences(self.daemon.settings.to_json(), theirs)
        if wrong:
            raise HostError(
                f"cannot hand this to the daemon: its config differs in {', '.join(wrong)}; if the "
                "file was changed, have it read again: reconciler reload; else name the same "
                "--config",
                "OtherConfig",
            )

    def say(self, message: Any) -> None:
        """Tell the command; who has gone meanwhile is not told."""
        try:
            self.line.send(message)
        except OSError:
            self.halt.set()

    def _listen(self) -> None:
        """Answers to questions, and orders to halt; who goes away halts."""
        while not self._over:
            try:
                if not self.line.readable(0.2):
                    continue
                message = self.line.receive()
            except (OSError, ValueError, HostError):
                message = None
            if isinstance(message, Answer):
                self._answers.append(message.yes)
                self._asking.set()
            elif message is None or isinstance(message, Halt):
                self.halt.set()
                self._asking.set()
                if message is None:
                    return

    def approved(self, planned: Plan) -> bool:
        self.say(Question(planned))
        self._asking.wait(ANSWER)
        return bool(self._answers) and self._answers[-1]

    @contextmanager
    def reserved(self, names: Collection[str], timeout: Seconds) -> Iterator[None]:
        """Some VMs for us alone. Raises LockError."""
        daemon = self.daemon
        told = [""]

        def have() -> bool:
            return daemon.reserve(names) or self.halt.is_set()

        if not until(time.monotonic() + timeout, have):
            told[0] = ", ".join(sorted(set(names) & set(daemon.busy())))
            raise LockError(
                f"cannot change {told[0] or 'these VMs'}: the daemon is at work on them for longer "
                f"than {timeout:g} s; see reconciler events {min(names, default='')}"
            )
        try:
            yield
        finally:
            daemon.free(names)

    def apply(self, request: Apply) -> None:
        wanted = Asked(request.wish, request.wish.desire(self.daemon.settings), request.drained)
        named = wanted(self.daemon.store.ledger())
        names = {*named.vms, *named.tunnels}
        with self.reserved(names, request.lock_timeout):
            work = Work(self.daemon, self.stepped, asks=True, command=request.command)
            work.stopping = self.halt
            work.looked = lambda planned, actual: self.say(Looked(planned, actual))
            outcome = work.apply(
                wanted,
                approved=self.approved,
                impatient=request.impatient,
                order=request.order,
                promise=request.promise,
            )
            if outcome is None:
                self.say(Done())
                return
            if isinstance(request.wish, Stop):
                done = [vm for vm, code in outcome.verdicts().items() if code is Exit.OK]
                self.pause(done, request.command)
            self.daemon.settled(outcome, names)
        self.daemon.observers.handed(outcome.steps)
        self.warn_of_declared(request, names)
        self.say(Done(outcome.plan, tuple(outcome.steps), outcome.interrupted))
        for name in names:
            self.daemon.kick(name, Priority.CRASHED)

    def stepped(self, step: Step) -> None:
        self.daemon.observers.stepped(step)
        self.say(Stepped(step))

    def pause(self, vms: Collection[str], who: str) -> None:
        """What the directory wants up and a person stops is left alone, or it would be started
        again before they look up."""
        declared = sorted(filter(self.daemon.is_declared, vms))
        if not declared:
            return
        now = time.time()
        reason = "stopped by order of reconciler stop"
        self.daemon.store.pause(
            [Pause(vm=vm, reason=reason, since=now, who=who) for vm in declared]
        )
        events = [Event(vm=vm, reason="Paused", message=reason) for vm in declared]
        self.daemon.store.record(events, who, now)
        names = " ".join(declared)
        told = (
            f"paused, as they would be started again at once: {names}; to have that: "
            f"reconciler resume {names}"
        )
        self.say(Said((told,)))

    def warn_of_declared(self, request: Apply, names: Collection[str]) -> None:
        """The directory has the last word on what it declares."""
        if isinstance(request.wish, Stop):
            return
        other = self.daemon.differing(names)
        if other:
            told = (
                f"warning: the watched directory declares {', '.join(other)} otherwise, and makes "
                "that true again now: change it there"
            )
            self.say(Said((told,)))

    def carry(self, request: Carry) -> None:
        order, daemon = request.order, self.daemon
        with self.reserved(order.vms, request.lock_timeout):
            if self.halt.is_set():
                raise UsageError("interrupted before anything was done")
            eyes = Observer(daemon.settings, daemon.environment)
            lines = order.carry_out(daemon.store, request.command, time.time(), eyes)
        if isinstance(order, Approve):
            daemon.reread()
        every = isinstance(order, orders.Pause | Resume) and order.every
        names = daemon.managed(daemon.store.ledger()) if every else order.vms
        if not isinstance(order, Cancel):  # the stop that follows is who looks
            for name in names:
                daemon.kick(name, Priority.CHANGED)
        self.say(Said(tuple(lines)))
        self.say(Done())
