"""Handing work to the daemon that holds the hub: what is said over its Unix socket, both halves.

The daemon carries it out with the very code that a command would use, and tells each look and each
step; the command shows them as if they were its own. A frame is a length and MessagePack.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actual import Actual
from reconciler.core.desired import Desired
from reconciler.core.errors import Diagnostic, Exit, HostError, LockError, ReconcilerError
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan
from reconciler.core.saved import Promise
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds
from reconciler.execute import Step
from reconciler.host.files import Given, Text
from reconciler.loop import Desire, Outcome, Source, chosen, desire, pruned, source_of
from reconciler.orders import Approve, Cancel, Pause, Prove, Resolve, Resume, Retain, Retry, stopped

NAME: Final = "control.sock"
"""The socket in the state directory; who may enter that is who may order."""
VERSION: Final = 1
MOST: Final = 256 << 20
"""Bytes of a frame. The specs of 10,000 VMs have some MiB."""
HELLO: Final[Seconds] = 5.0
"""How long a daemon may take to say who it is."""


class Specs(Struct, frozen=True, kw_only=True, tag=True):
    """What the files say that a command has read."""

    texts: tuple[Text, ...]
    requests: tuple[Text, ...]
    scoped: bool
    given: Given
    """What lay around them."""
    prune: bool = False
    only: tuple[str, ...] | None = None
    """Some VMs of them; None: all."""
    chosen: tuple[str, ...] | None = None
    """The same, and the others are told to be untouched."""

    @classmethod
    def of(
        cls, source: Source, *, prune: bool = False, chosen: Collection[str] | None = None
    ) -> Specs:
        return cls(
            texts=source.texts,
            requests=source.requests,
            scoped=source.scoped,
            given=source.given or Given(),
            prune=prune,
            chosen=None if chosen is None else tuple(chosen),
        )

    def desire(self, settings: Settings, source: Source | None = None) -> Desire:
        """`source`: the same files, where they are parsed already."""
        if source is None:
            from reconciler.library import Library  # commands that only look need none

            library = Library(settings.specs, {}, given=self.given)
            source = source_of(
                self.texts, self.requests, settings, scoped=self.scoped, library=library
            )
        wanted = desire(source, settings)
        wanted = chosen(pruned(wanted) if self.prune else wanted, self.chosen)
        if self.only is None:
            return wanted
        names = self.only
        return lambda ledger: wanted(ledger).only(names)


class Stop(Struct, frozen=True, kw_only=True, tag=True):
    """An order to stop VMs."""

    vms: tuple[str, ...]
    kill_clients: bool = False

    def desire(self, settings: Settings) -> Desire:
        return lambda ledger: stopped(self.vms, ledger, settings, kill_clients=self.kill_clients)


Wish: TypeAlias = Specs | Stop
AnyOrder: TypeAlias = Approve | Cancel | Pause | Prove | Resolve | Resume | Retain | Retry


class Asked(Struct, frozen=True):
    """A wish, and what it means here."""

    wish: Wish
    desire: Desire
    drained: Seconds | None = None
    """How long the clients that are in the way were waited for already."""
    promise: Promise | None = None
    """It is what a saved plan says, and nothing else."""

    def __call__(self, ledger: Ledger) -> Desired:
        found = self.desire(ledger)
        return found if self.drained is None else replace(found, drained=self.drained)


class Apply(Struct, frozen=True, kw_only=True, tag=True):
    """Make a wish true."""

    wish: Wish
    settings: Mapping[str, Any]
    """Those that the command would have worked by."""
    command: str
    lock_timeout: Seconds
    impatient: bool = True
    order: bool = False
    drained: Seconds | None = None
    promise: Promise | None = None


class Carry(Struct, frozen=True, kw_only=True, tag=True):
    """Carry out an order about what is remembered."""

    order: AnyOrder
    settings: Mapping[str, Any]
    command: str
    lock_timeout: Seconds


class Answer(Struct, frozen=True, tag=True):
    """To a question."""

    yes: bool


class Halt(Struct, frozen=True, tag=True):
    """End what was begun, begin nothing."""


class Looked(Struct, frozen=True, tag=True):
    plan: Plan
    actual: Actual


class Question(Struct, frozen=True, tag=True):
    """Whether to do this."""

    plan: Plan


class Stepped(Struct, frozen=True, tag=True):
    step: Step


class Said(Struct, frozen=True, tag=True):
    """Something for the operator."""

    lines: tuple[str, ...]


class Done(Struct, frozen=True, tag=True):
    """How it ended. None: the answer was no."""

    plan: Plan | None = None
    steps: tuple[Step, ...] = ()
    interrupted: bool = False


class Failed(Struct, frozen=True, tag=True):
    """It could not be done."""

    message: str
    reason: str
    exit: Exit
    diagnostics: tuple[Diagnostic, ...] = ()


ToDaemon: TypeAlias = Apply | Carry | Answer | Halt
FromDaemon: TypeAlias = Looked | Question | Stepped | Said | Done | Failed


class RefusedError(HostError):
    """What the daemon answered."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message, failed.reason)
        self.exit = failed.exit  # type: ignore[misc]  # of this one refusal
        self.diagnostics = failed.diagnostics


_ENCODER: Final = msgspec.msgpack.Encoder()


class Line:
    """One end of a conversation."""

    def __init__(self, sock: socket.socket, told: msgspec.msgpack.Decoder[Any]) -> None:
        self.sock, self._told = sock, told
        self._mutex = threading.Lock()

    def send(self, message: Struct) -> None:
        """Raises OSError if nobody listens any more."""
        data = _ENCODER.encode(message)
        with self._mutex:
            self.sock.sendall(struct.pack("!I", len(data)) + data)

    def readable(self, timeout: Seconds) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(max(0, round(timeout * 1000))))

    def receive(self) -> Any:
        """The next message; None: the other end is gone. Raises HostError if it makes no sense."""
        head = self._exactly(4)
        if head is None:
            return None
        (length,) = struct.unpack("!I", head)
        if length > MOST:
            raise HostError("cannot understand the other end: it sends too much at once")
        data = self._exactly(length)
        if data is None:
            return None
        try:
            return self._told.decode(data)
        except msgspec.MsgspecError as error:
            raise HostError(
                f"cannot understand the other end ({error}): the daemon and this command are of "
                "different versions; restart the daemon"
            ) from error

    def _exactly(self, size: int) -> bytes | None:
        found = bytearray()
        while len(found) < size:
            try:
                piece = self.sock.recv(min(1 << 20, size - len(found)))
            except ConnectionError:
                return None
            if not piece:
                return None
            found += piece
        return bytes(found)

    def close(self) -> None:
        self.sock.close()


@cache
def _decoder(said: Any) -> msgspec.msgpack.Decoder[Any]:
    """Who reads what one half says. Made where a daemon is spoken to: it takes 3 ms."""
    return msgspec.msgpack.Decoder(said)


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """The socket's path by a descriptor: a path in full may be longer than a socket's may be.

    Source: unix(7), sun_path has 108 bytes.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{NAME}"
    finally:
        os.close(fd)


def listening(directory: Path) -> socket.socket:
    """The daemon's end. Raises HostError. The caller holds the lock, so what is there is a rest."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(directory) as path:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)
            sock.bind(path)
            os.chmod(path, 0o600)
        sock.listen(16)
    except OSError as error:
        sock.close()
        raise HostError(
            f"cannot listen on {directory / NAME}: {error.strerror}; see to the rights there: "
            f"ls -la {directory}",
            "Storage",
        ) from error
    return sock


def permitted(sock: socket.socket) -> bool:
    """Whether who connected is who we are, or root. Source: unix(7), SO_PEERCRED."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two settings differ, without those that make no difference to the work."""
    keys = {*ours, *theirs} - {"listen"}  # a daemon keeps to its own until it is started again
    return sorted(key for key in keys if ours.get(key) != theirs.get(key))


def failed(error: ReconcilerError) -> Failed:
    """An error as it goes over the line."""
    return Failed(
        str(error),
        getattr(error, "reason", type(error).__name__),
        error.exit,
        getattr(error, "diagnostics", ()),
    )


class Remote:
    """A daemon that this command hands its work to; the interface is that of `Applier`."""

    WAIT: ClassVar[Seconds] = 0.1

    def __init__(
        self,
        line: Line,
        *,
        emit: Callable[[Step], None],
        looked: Callable[[Plan, Actual], None],
        say: Callable[[str], None],
        stopping: threading.Event,
    ) -> None:
        self.line, self.emit, self.looked, self.say = line, emit, looked, say
        self.stopping = stopping

    def apply(self, request: Apply, approved: Callable[[Plan], bool]) -> Outcome | None:
        """Raises RefusedError, HostError."""
        self.line.send(request)
        steps: list[Step] = []
        while True:
            message = self.next()
            match message:
                case Looked():
                    self.looked(message.plan, message.actual)
                case Question():
                    self.line.send(Answer(approved(message.plan)))
                case Stepped():
                    steps.append(message.step)
                    self.emit(message.step)
                case Said():
                    for line in message.lines:
                        self.say(line)
                case Done():
                    if message.plan is None:
                        return None
                    return Outcome(message.plan, list(message.steps), message.interrupted)
                case Failed():
                    raise RefusedError(message)

    def carry(self, request: Carry) -> list[str]:
        """What the daemon says of an order. Raises RefusedError, HostError."""
        self.line.send(request)
        said: list[str] = []
        while True:
            message = self.next()
            if isinstance(message, Failed):
                raise RefusedError(message)
            if isinstance(message, Said):
                said += message.lines
            if isinstance(message, Done):
                return said

    def next(self) -> FromDaemon:
        """The next word; a signal to us meanwhile is told on."""
        halted = False
        while not self.line.readable(self.WAIT):
            if self.stopping.is_set() and not halted:
                halted = True
                self.line.send(Halt())
        message = self.line.receive()
        if message is None:
            raise HostError(
                "the daemon that was doing this ended meanwhile; what it began is safe: see "
                "reconciler status, and do this again",
                "DaemonGone",
            )
        found: FromDaemon = message
        return found


def found(directory: Path) -> Line | None:
    """A line to the daemon that holds a state directory; None: there is none.

    Raises LockError if it is there and not ours to order.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(HELLO)
    try:
        with _short(directory) as path:
            sock.connect(path)
    except PermissionError as error:
        sock.close()
        raise LockError(
            f"cannot speak to the daemon of {directory}: {error.strerror}; run this as its user, "
            "or as root"
        ) from error
    except OSError:
        sock.close()  # no socket, or one that nobody listens on any more
        return None
    sock.settimeout(None)
    return Line(sock, _decoder(FromDaemon))


def accepted(sock: socket.socket) -> Line:
    """The daemon's end of a new conversation."""
    return Line(sock, _decoder(ToDaemon))


def until(deadline: Seconds, done: Callable[[], bool]) -> bool:
    """Whether something comes to be true in time."""
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True
