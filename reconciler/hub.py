"""The real hub: does with the host adapters what the executor says."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from reconciler.core.actual import Handshake, Identity, Server
from reconciler.core.call import Call, Seal
from reconciler.core.desired import Export, Vm
from reconciler.core.disk_plan import export_key
from reconciler.core.errors import HostError
from reconciler.core.ledger import Lease
from reconciler.core.mark import argv
from reconciler.core.settings import Settings
from reconciler.core.tunnel import Tunnel
from reconciler.core.tunnel_seen import Ssh
from reconciler.core.units import Port, Seconds
from reconciler.host import images, nbd, patience, proc, processes, qemu_nbd, sockets
from reconciler.host.effects import Effect, effect
from reconciler.host.store import Store
from reconciler.look import HANDSHAKE, SETTLE, Observer
from reconciler.repositories import roots_of

if TYPE_CHECKING:
    from reconciler.dialling import Dialler

FLUSH: Final[Seconds] = 120.0
"""Deadline of a flush: what a server has not written yet is at most what the page cache holds."""
UNLOCK: Final[Seconds] = 3.0
"""A lock is gone with its process; a second is long."""
NOT_ENDED: Final = "its run is not ended"
MOMENT: Final[Seconds] = 0.005
"""How old an answer about connections may be."""
EFFECT: Final[Seconds] = 60.0
"""Deadline of a small file that is written to a repository. It takes 1 ms; on a disk that is busy
with a backup, its fsync waits for what was written before it, which can be many seconds."""
SPARE: Final[Seconds] = 10.0
"""For what `create` does beside qemu-img, which has a deadline of its own."""


class Hub(Observer):
    """One hub that can be looked at and acted on; made only by who holds the lock."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], store: Store, who: str
    ) -> None:
        super().__init__(settings, environment)
        self.records = store
        self.who = who
        self.started: dict[Identity, Port] = {}
        """The servers that this process started."""
        self._binary: str | None = None
        self._asking = threading.Lock()
        self._answered = 0.0
        self._connected: Counter[Port] = Counter()

    @cached_property
    def _dialler(self) -> Dialler:
        from reconciler.dialling import Dialler  # late: few hubs have tunnels

        return Dialler(self.settings, self.environment)

    def dial(self, tunnel: Tunnel, part: str, argv: Sequence[str]) -> Ssh:
        """Start the ssh of a connection and wait until it is let in. Raises HostError."""
        return self._dialler.dial(tunnel, part, argv)

    def hang_up(self, ssh: Ssh) -> None:
        """End an ssh. Raises HostError."""
        self._dialler.hang_up(ssh)

    def refused(self, tunnel: Tunnel, part: str) -> list[Port]:
        """The forwards that the hub's sshd does not permit."""
        return self._dialler.refused(tunnel, part)

    def reserve(self, port: Port) -> socket.socket:
        try:
            return sockets.reserve(self.settings.bind, port)
        except sockets.PortBusyError:
            self.unbindable.add(port)  # so that the next look knows, though nobody is seen there
            raise

    # What is done to a repository can hang with its storage. It is then given up, and may still
    # happen when the storage is back: each of the four says why that is safe.

    def claim(self, vm: Vm) -> None:
        """Claim the run for this state directory. Raises HostError.

        Given up, it may still appear, beside the run's row, which is in the ledger before it: what
        every claim looks like. It can only keep others from calling; we call when it returned.
        """
        owner = images.Owner(self.records.state_id, self.records.home)
        patience.do(
            f"claim run {vm.run} of {vm.name}",
            vm.root,
            lambda: images.claim(vm.root, vm.name, vm.run, owner),
            EFFECT,
        )

    def intend(self, vm: Vm, call: Call) -> None:
        """Note in the repository that the SNA is about to be called. Raises HostError.

        Given up, it may still appear although nobody was called: then the run becomes UNKNOWN, and
        a person says so. The other way round, a call without its intent, cannot be: nothing is sent
        before this returned. Nor does it take itself back when it comes late: by then another
        process may have intended, and called.
        """
        patience.do(
            f"note the intent of run {call.run} of {vm.name}",
            vm.root,
            lambda: images.intend(vm.root, vm.name, call.run, call.attempt, call.job_id),
            EFFECT,
        )

    def unintend(self, vm: Vm, call: Call) -> None:
        """Take the intent back. Raises HostError.

        This is the one that must not come late: another call of the attempt may have been intended
        meanwhile. So a removal that was given up is not begun any more (see images.unintend); and
        the call stays INTENDED or UNKNOWN in the ledger until the removal returned, so that this
        attempt is not called again before.
        """
        given_up = threading.Event()
        homes = [roots_of(self.settings, one.image)[-1] for one in call.exports]
        root = vm.root or next(iter(homes), "")
        patience.do(
            f"take back the intent of run {call.run} of {vm.name}",
            root,
            lambda: images.unintend(root, vm.name, call.run, call.attempt, given_up.is_set),
            EFFECT,
            given_up,
        )

    def taint(self, vm: Vm, call: Call) -> None:
        """Note in the repository that a server died under a client of this run. Raises HostError.

        The ledger knows it already, and can be lost. Given up, it may still appear, and is true.
        """
        homes = [roots_of(self.settings, one.image)[-1] for one in call.exports]
        root = vm.root or next(iter(homes), "")
        patience.do(
            f"note that a server of run {call.run} of {vm.name} died",
            root,
            lambda: images.taint(root, vm.name, call.run, call.attempt),
            EFFECT,
        )

    def create(self, export: Export, root: str) -> None:
        """Create an image. Raises HostError.

        Given up, it may still appear: empty, whole and of the size that was asked for, since it
        gets its name last. The next pass finds it as if it had been made in time, or refuses it if
        the spec has another size by then. qemu-img itself is ended before we give up.
        """
        size = export.size
        assert size is not None
        patience.do(
            f"create {export.image}",
            root,
            lambda: images.create(export.image, size, root, export.backing),
            images.CREATE_TIMEOUT + SPARE,
        )

    def log_of(self, export: Export) -> Path:
        return Path(self.settings.state) / "logs" / qemu_nbd.log_name(*export_key(export)[:3])

    def start(self, export: Export, lease: Lease, listener: sockets.Bound) -> None:
        """Start a server on its socket and wait for its handshake. Raises HostError."""
        options = self.settings.qemu_nbd
        if self._binary is None:
            self._binary = qemu_nbd.find(options.binary)
        if not (export.read_only or lease.started):  # it was swept before its first start
            root = roots_of(self.settings, export.image)[-1]
            patience.do("sweep", root, lambda: images.sweep(export.image), EFFECT)
        log = self.log_of(export)
        qemu_nbd.cap(log)
        before = qemu_nbd.log_size(log)
        line = argv(export, lease.port, self.settings.hub, options)
        pid = qemu_nbd.spawn(self._binary, line, listener, log)
        pidfd = os.pidfd_open(pid)  # our child, not reaped: the pid cannot be another's
        try:
            target = nbd.Target(self.probe_host, lease.port, export.name, pidfd)
            with effect(Effect.HANDSHAKE):
                answer = nbd.handshake([target], options.start_timeout)[0]
            wrong = self._wrong(export, pid, answer)
            identity = proc.identify(pid)
            if wrong is None and identity:
                self.answered[identity] = answer
                self.started[identity] = lease.port
                return
            wrong = wrong or "it ended"
            if identity:
                with processes.Handle(identity, proc.identify) as handle:
                    handle.end(options.stop_grace)
            status = processes.reap(pid)
        finally:
            os.close(pidfd)
        words = qemu_nbd.last_words(log, before if before <= qemu_nbd.log_size(log) else 0)
        if wrong == "it ended":
            wrong = processes.described(status)
        raise HostError(
            f"cannot serve {export.image} on {lease.port}: {wrong}"
            + self._lock_holder(export, words)
            + (f"; qemu-nbd said: {words.removeprefix('qemu-nbd: ')}" if words else "")
            + f" (log: {log})",
            "StartFailed",
        )

    def _wrong(self, export: Export, pid: int, answer: Handshake) -> str | None:
        """What speaks against a server that has just been started."""
        if not answer.answered:
            return answer.error
        if export.size is not None and answer.size != export.size:
            return f"it exports {answer.size} bytes, the disk has {export.size}"
        if answer.read_only != export.read_only:
            return f"it is {'read-only' if answer.read_only else 'writable'}, and should not be"
        # A VM that is called for is looked at once, at the barrier.
        return self._elsewhere([pid]) if export.read_only else None

    def _elsewhere(self, pids: Iterable[int]) -> str | None:
        """Where one of some servers listens besides its own socket, at descriptor 3."""
        extra = {}
        for pid in pids:
            for inode in proc.socket_inodes(pid) - {proc.listener_inode(pid)}:
                extra[inode] = pid
        for one in proc.tcp_sockets(established=False) if extra else ():
            if one.inode in extra:
                return f"pid {extra[one.inode]} also listens on {one.address}:{one.port}"
        return None

    def _lock_holder(self, export: Export, words: str) -> str:
        if "lock" not in words:
            return ""
        root = roots_of(self.settings, export.image)[-1]
        try:
            pids = patience.do("look", root, lambda: proc.openers(export.image), patience.QUIET)
        except HostError:
            pids = []  # the storage hangs: then nobody can say who it is
        who = ", ".join(f"{proc.name_of(pid)} (pid {pid})" for pid in pids)
        return (
            f"; the image is held by {who}" if who else "; the image is locked by another process"
        )

    def look_again(self, server: Server, export: Export) -> Server | None:
        """A second look at one server, before something is done to it. None: it is gone."""
        if proc.identify(server.pid) != server.identity:
            return None
        clients = self._clients(server.mark.port)
        target = nbd.Target(self.probe_host, server.mark.port, export.name)
        return replace(server, clients=clients, handshake=nbd.handshake([target], HANDSHAKE)[0])

    def measured(self, exports: Sequence[Export], servers: Sequence[Server]) -> list[Seal]:
        """The same as `sealed`, of a run of which a person says that it is complete.

        Its servers may be gone by then: what nobody has open needs no flush. Raises HostError.
        """
        served = {server.mark.disk for server in servers}
        up = [export for export in exports if export.key in served]
        found = self.sealed(up, servers) if up else []
        return found + [self._seal(export, None) for export in exports if export.key not in served]

    def sealed(self, exports: Sequence[Export], servers: Sequence[Server]) -> list[Seal]:
        """Flush and check the images of a run that nobody writes any more.

        After the flush, nothing that a client was told is written can be lost by the death of a
        server. Raises HostError if a client is connected, before or after, if a server is another
        than it was or has another file open, or if it cannot be done.
        """
        by_disk = {server.mark.disk: server for server in servers}
        ports = [server.mark.port for server in servers]
        self._left_alone(ports, NOT_ENDED)
        targets = [nbd.Target(self.probe_host, by_disk[e.key].mark.port, e.name) for e in exports]
        with effect(Effect.FLUSH):
            answers = nbd.handshake(targets, FLUSH, flush=True)
        for export, answer in zip(exports, answers, strict=True):
            if not answer.answered:
                raise HostError(
                    f"cannot flush disk {export.key} of {export.vm} on "
                    f"{by_disk[export.key].mark.port}: {answer.error}; {NOT_ENDED}",
                    "CannotFlush",
                )
        seals = [self._seal(export, by_disk[export.key]) for export in exports]
        self._left_alone(ports, NOT_ENDED)
        return seals

    def _seal(self, export: Export, server: Server | None) -> Seal:
        """What is in an image that was flushed, and whether it is whole. Raises HostError.

        `server`: who has it open; None: nobody has.

        It is read as a whole for its digest, some GiB in a second or some MiB, as its storage has
        it; others do not wait for that: it is done in the thread of its VM.
        """
        root = roots_of(self.settings, export.image)[-1]

        def seal() -> Seal:
            image = images.look(export.image, root)
            damage = images.check(export.image)
            asked = not damage and self.settings.digest(export.image) == "sha256"
            digest = images.digest(export.image) if asked else ""
            if server is None and (pids := proc.users(export.image)):
                raise HostError(
                    f"{proc.name_of(pids[0])} (pid {pids[0]}) has {export.image} open; {NOT_ENDED}",
                    "InUse",
                )
            if server and not proc.has_open(server.pid, export.image):
                raise HostError(
                    f"pid {server.pid} has another file open than the one at {export.image}; "
                    f"{NOT_ENDED}",
                    "ImageReplaced",
                )
            return Seal(
                key=export.key,
                image=export.image,
                empty=image.pristine,
                damage=damage,
                size=image.size,
                allocated=image.allocated,
                digest=digest,
            )

        reading = (export.size or 0) / images.SLOWEST
        deadline = images.CHECK_TIMEOUT + 10 + reading
        found = patience.do(f"check {export.image}", root, seal, deadline)
        # Last: what was flushed is still its.
        if server and proc.identify(server.pid) != server.identity:
            raise HostError(f"pid {server.pid} has ended; {NOT_ENDED}", "ProcessGone")
        return found

    def _left_alone(self, ports: Iterable[Port], otherwise: str) -> None:
        """Nobody is connected, but for a moment. Raises HostError."""
        deadline = time.monotonic() + SETTLE
        for port in ports:
            while clients := self._clients(port):
                if time.monotonic() > deadline:
                    many = f"{clients} clients are" if clients > 1 else "1 client is"
                    raise HostError(f"{otherwise}: {many} connected to port {port}", "InUse")
                time.sleep(0.02)

    def _clients(self, port: Port) -> int:
        """Connections to a port; many servers that stop at one moment share one question."""
        with self._asking:
            now = time.monotonic()
            if now - self._answered > MOMENT:
                self._connected = Counter(s.port for s in proc.tcp_sockets() if not s.listening)
                self._answered = now
            return self._connected[port]

    def stop(self, server: Server, *, kill_clients: bool) -> None:
        """End a server and wait until it is gone. Raises HostError if clients are connected."""
        if not kill_clients:
            self._left_alone([server.mark.port], "not stopped")
        try:
            with processes.Handle(server.identity, proc.identify) as handle, effect(Effect.STOP):
                handle.end(self.settings.qemu_nbd.stop_grace)
        except processes.Gone:
            return
        self._unlocked(server)

    def _unlocked(self, server: Server) -> None:
        """Wait until the image of a server that has ended is free. Raises HostError.

        Its lock goes with the process; who holds it now is somebody else.
        """
        image = server.argv[-1]
        if "--read-only" in server.argv:
            return
        root = roots_of(self.settings, image)[-1]

        def holders() -> list[str] | None:
            deadline = time.monotonic() + UNLOCK
            while images.locked(image):
                if time.monotonic() > deadline:
                    return [f"{proc.name_of(pid)} (pid {pid})" for pid in proc.openers(image)]
                time.sleep(0.02)
            return None

        who = patience.do(f"look at the lock of {image}", root, holders, UNLOCK + patience.QUIET)
        if who is not None:
            raise HostError(
                f"pid {server.pid} has ended, and {image} is still locked by "
                f"{', '.join(who) or 'another process'}; its port stays leased until it lets go",
                "ImageLocked",
            )

    def silent(self, exports: Sequence[Export], ports: Mapping[int, Port]) -> list[str]:
        """Which of the exports do not answer as they should; empty: every one does."""
        asked = [export for export in exports if export.key in ports]
        wrong = [f"disk {e.key} has no port" for e in exports if e.key not in ports]
        targets = [nbd.Target(self.probe_host, ports[e.key], e.name) for e in asked]
        for export, answer in zip(asked, nbd.handshake(targets, HANDSHAKE), strict=True):
            where = f"disk {export.key} on {ports[export.key]}"
            if not answer.answered:
                wrong.append(f"{where}: {answer.error}")
            elif export.size is not None and answer.size != export.size:
                wrong.append(f"{where} has {answer.size} bytes, not {export.size}")
        started = {one.pid for one, port in self.started.items() if port in ports.values()}
        stray = self._elsewhere(started)
        return [*wrong, stray] if stray else wrong
