"""Taking callbacks while a command stays, and saying who takes them instead."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from reconciler.api.about import Holder, holder, ourselves
from reconciler.api.gate import Gate
from reconciler.api.listener import Listener
from reconciler.cli import options
from reconciler.core.errors import HostError
from reconciler.core.settings import Settings
from reconciler.host.sockets import PortBusyError
from reconciler.host.store.inbox import Inbox

if TYPE_CHECKING:
    from reconciler.api.probes import Vital
    from reconciler.asking import Desk


def say(text: str) -> None:
    """A line on stderr, from any thread."""
    options.say(text, err=True)


class Ears:
    """The callbacks of one hub, into its store. `kicked` is set when a VM is worth a look."""

    def __init__(
        self,
        settings: Settings,
        command: str,
        *,
        kick: Callable[[str], None] | None = None,
        ended: Callable[[], None] | None = None,
        vital: Vital | None = None,
        given: socket.socket | None = None,
        say: Callable[[str], None] = say,
        local: bool = True,
        desk: Callable[[], Desk] | None = None,
    ) -> None:
        """`kick`: told which VM is worth a look. `ended`: told if callbacks are taken no more.
        `given`: a socket that listens already. `local`: listen on the Unix socket too.
        `desk`: makes who is asked for runs."""
        self.vital, self.given, self.say, self.local = vital, given, say, local
        self.settings = settings
        self.endpoint = settings.listen
        self.gate: Gate | None = None
        self._desk = desk or self.desk
        self._warned, self._fresh = "", settings
        self._kick, self._ended = kick, ended
        self.inbox = Inbox(Path(settings.state))
        self.about = ourselves(settings.hub, settings.state, command)
        self.kicked = threading.Event()
        self.listener: Listener | None = None

    def kick(self, vm: str) -> None:
        self.kicked.set()
        if self._kick:
            self._kick(vm)

    def ended(self) -> None:
        self.kicked.set()
        if self._ended:
            self._ended()

    def open(self) -> None:
        """Take callbacks from now on. Raises PortBusyError, HostError."""
        self.gate = Gate.of(self.settings, os.environ)
        self.listener = Listener(
            self.endpoint,
            self.inbox,
            self.about,
            kick=self.kick,
            say=self.say,
            ended=self.ended,
            vital=self.vital,
            given=self.given,
            gate=self.gate,
            local=self.settings.api_socket if self.local else "",
            desk=self._desk,
        )

    def desk(self) -> Desk:
        """Who is asked for runs, where this process starts no servers."""
        from reconciler.asking import Desk  # in the thread: the first call does not wait for it

        return Desk(lambda: self._fresh, os.environ, self.kick)

    def renew(self, fresh: Settings) -> None:
        """Take the tokens and the certificate of a config that was read again."""
        self._fresh = fresh
        if self.gate is None:
            return
        said = ""
        try:
            self.gate.renew(fresh, os.environ)
        except HostError as error:
            said = f"{error}; going on with the tokens and the certificate as they were"
        was, now = self.settings.api, fresh.api
        fixed = ("socket", "group", "limits")
        moved = [name for name in fixed if getattr(was, name) != getattr(now, name)]
        if bool(was.tls) != bool(now.tls):
            moved.append("tls")
        if moved and not said:
            said = f"{', '.join(moved)} of `api` changed in the config; that takes a restart"
        if said and said != self._warned:
            self.say(f"warning: {said}")
        self._warned = said

    @property
    def said(self) -> str:
        """What a person should know of who may come in; empty: nothing."""
        return self.gate.sentence() if self.gate else ""

    def close(self) -> None:
        if self.listener:
            self.listener.close()
        self.inbox.close()

    def taken(self) -> tuple[Holder, bool]:
        """Who has our address, and whether that one writes what it hears into our store."""
        found, us = holder(self.endpoint, self.settings.api_socket), self.about
        with contextlib.suppress(HostError):  # then the directories are compared
            identity = self.inbox.identity()
            us = replace(us, state_id=identity.state_id if identity else "")
        return found, bool(found.about and found.about.same_state(us))


class WaitingEars(Ears):
    """Where callbacks cannot be taken, a command that only waits says so once and goes on."""

    def __init__(self, settings: Settings, command: str) -> None:
        super().__init__(settings, command, local=False)
        self.others: Holder | None = None
        """Who takes the callbacks of our store instead."""
        self._told = ""
        self._directory: int | None = None
        """A descriptor of the state directory, by which others see whose callbacks we take."""

    def __enter__(self) -> WaitingEars:
        self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    @property
    def hears(self) -> bool:
        """What the appliances' clients say comes into our store."""
        return bool(self.listener and not self.listener.failure) or self.others is not None

    def listen(self) -> None:
        """Take the address, also when who had it has let go of it."""
        if self._directory is None:
            with contextlib.suppress(FileNotFoundError):  # before the first apply there is none
                self._directory = os.open(self.settings.state, os.O_PATH | os.O_DIRECTORY)
        try:
            if self.listener:
                self.listener.check()
            elif busy := self.busy():
                if self.others or not self._told:
                    self.look_who(busy)
            else:
                self.others = None
                if self._told:
                    self.tell(f"callbacks are taken here now, at {self.endpoint}")
        except HostError as error:
            self.tell(f"warning: {error}; callbacks are not heard")

    def busy(self) -> PortBusyError | None:
        """Take the address; what is said if another has it."""
        try:
            self.open()
        except PortBusyError as busy:
            return busy
        return None

    def look_who(self, busy: PortBusyError) -> None:
        """Say who has our address."""
        found, same = self.taken()
        if same and found.about:
            self.others = found
            self.tell(f"callbacks are taken by {found.about}")
        else:
            self.others = None
            self.tell(
                f"warning: {busy}: {found.what} does; callbacks are not heard, so end that, or set "
                "`api: {listen: …}` in the config"
            )

    def tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            say(text)
