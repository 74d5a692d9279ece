"""Telling somebody: what a look found becomes messages in the store, and a thread sends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from reconciler.core.actual import Actual
from reconciler.core.backoff import pause
from reconciler.core.errors import HostError, ReconcilerError
from reconciler.core.ledger import Ledger
from reconciler.core.notices import Seen, bodies, turn
from reconciler.core.plan import Plan
from reconciler.core.settings import Notify, Secret
from reconciler.core.status import conditions
from reconciler.core.units import Seconds
from reconciler.host import webhook
from reconciler.host.store import Store
from reconciler.host.store.outbox import Letter

OLD: Final[Seconds] = 86400.0
"""A message that could not be sent for a day is news no more."""
LAST: Final[Seconds] = 2.0
"""For a message that is on its way when we end; if it is late, it is sent again by the next."""


def seen(planned: Plan, actual: Actual, ledger: Ledger) -> dict[str, Seen]:
    """What a look found, as notices are made of it."""
    return {
        one.name: Seen(
            one.call.run if one.call and one.call.state.active else one.vm.run,
            conditions(one, actual, ledger),
        )
        for one in planned.vms
    }


def note_notices(
    store: Store, found: Mapping[str, Seen], now: Seconds, gone: Collection[str] = ()
) -> bool:
    """Take note of what a look changes about the troubles that somebody is told of.

    `gone`: VMs of which nothing is wanted any more. True: there are new messages. Raises
    StoreError.
    """
    changes = turn(found, store.notices(), now, gone)
    if not changes:
        return False
    texts = bodies(changes, hub=store.hub, now=now)
    store.notify(changes, texts, now)
    return bool(texts)


class Notifier:
    """Sends what waits in the store, oldest first, in a thread of its own."""

    def __init__(
        self,
        store: Store,
        notify: Callable[[], Notify],
        secret: Callable[[], Secret | None],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`notify`: the settings as they are now. `secret`: the one to sign with; raises HostError.
        `say`: told once when messages do not arrive, and once when they do again."""
        self.store, self.notify, self.secret, self.say = store, notify, secret, say
        self.failure: BaseException | None = None
        self._kicked = threading.Event()
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._guarded, name="notifier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def kick(self) -> None:
        """There is a new message, or another place to send it to."""
        self._kicked.set()

    def close(self) -> None:
        """End; what is left waits for the next who starts."""
        self._stopping.set()
        self._kicked.set()
        if self._thread.is_alive():
            self._thread.join(LAST)

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as failure:  # what supervises us has to know
            self.failure = failure

    def _run(self) -> None:
        rest: Seconds | None = 0.0
        while not self._stopping.is_set():
            self._kicked.clear()  # before looking, so that no kick is lost
            try:
                rest = self.send(time.time())
            except ReconcilerError as error:
                self._say_once(str(error))
                rest = pause(4)
            if rest is None or rest > 0:
                self._kicked.wait(rest)

    def send(self, now: Seconds) -> Seconds | None:
        """Send the oldest message, if it is time. Until when to rest; None: until the next kick.

        In order: one that does not arrive holds up those behind it. Raises HostError.
        """
        notify = self.notify()
        letters = self.store.outbox(1) if notify.url else []
        if not letters:
            return None
        (letter,) = letters
        if now - letter.created > OLD:
            self.store.given_up(letter.id, "it could not be sent for a day", now)
            return 0.0
        if letter.next > now:
            return min(letter.next - now, pause(99))  # a clock that was put back is not waited for
        try:
            webhook.post(notify, letter.body, self.secret(), now)
        except HostError as error:
            return self._not_taken(letter, error, now)
        self.store.sent(letter.id)
        if self._failing:
            self._failing = False
            self.say("messages arrive again")
        return 0.0

    def _not_taken(self, letter: Letter, error: HostError, now: Seconds) -> Seconds:
        self._say_once(str(error))
        if isinstance(error, webhook.NotTakenError) and error.useless:
            self.store.given_up(letter.id, str(error), now)
            return 0.0
        rest = pause(letter.tries + 1)
        self.store.failed(letter.id, str(error), now + rest)
        return rest

    def _say_once(self, text: str) -> None:
        if not self._failing and not self._stopping.is_set():
            self._failing = True
            self.say(text)
