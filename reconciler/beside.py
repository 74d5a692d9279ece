"""What a daemon works with and tells: a source that is watched, and those who are told.

Protocols and a base that does nothing; see daemon.py for who uses them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from reconciler.core.actual import Actual
from reconciler.core.desired import Desired
from reconciler.core.errors import Diagnostic
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan
from reconciler.core.queue import Item
from reconciler.core.source import Revision
from reconciler.core.status import Condition
from reconciler.core.units import Seconds
from reconciler.execute import Step
from reconciler.host.store import Store

if TYPE_CHECKING:
    from reconciler.core.declared import Specs
    from reconciler.core.inventory import Inventory


class Reading(Protocol):
    """What a source says, as it was read last."""

    @property
    def revision(self) -> Revision: ...
    @property
    def specs(self) -> Specs: ...
    @property
    def inventory(self) -> Inventory | None: ...
    @property
    def vms(self) -> Collection[str]: ...
    @property
    def again(self) -> Seconds | None:
        """When it is to be read again by the clock alone."""
        ...

    @property
    def source(self) -> Mapping[str, Any]: ...
    @property
    def diagnostics(self) -> Sequence[Diagnostic]: ...
    @property
    def digests(self) -> Mapping[str, str]:
        """VM → another one where something else is desired of it."""
        ...

    def digest_of(self, name: str) -> str: ...
    def version_of(self, name: str) -> object: ...
    def desired(self, ledger: Ledger) -> Desired: ...
    def vm(self, name: str, ledger: Ledger) -> Desired: ...
    def note(self, store: Store, who: str, now: Seconds) -> bool: ...


class Source(Protocol):
    """A watched directory."""

    def watched(self) -> list[str]: ...
    def read(self, ledger: Ledger, now: Seconds, paths: Collection[str] | None = None) -> Reading:
        """`paths`: the only files that may have moved since; None: anything may have."""
        ...


class Watch(Protocol):
    """Tells when something in some directories has changed."""

    def fileno(self) -> int: ...
    def arm(self, paths: Collection[str]) -> None: ...
    def drain(self) -> bool: ...
    def files(self) -> set[str] | None:
        """The files that were written, made or removed since this was asked; None: it may be more
        than files."""
        ...

    def close(self) -> None: ...


class Observers:
    """Who is told what the loop does. Told from any thread; does nothing by itself."""

    def said(self, event: str, **fields: Any) -> None:
        """A line of the log: a constant message, and its fields."""

    def reached(self, sna: str, well: bool | None) -> None:
        """An SNA was asked whether it is well; None: it was not, and nobody wants to know now."""

    def stepped(self, step: Step) -> None:
        """An action was carried out."""

    def added(self, depth: int) -> None:
        """A VM was put into the queue."""

    def began(self, item: Item, waited: Seconds, depth: int) -> None:
        """A look begins, in this thread, after that long in the queue."""

    def ended(self, vm: str, result: str, took: Seconds, steps: Collection[Step]) -> None:
        """A look is over: `success`, `requeue_after` (it is looked at again) or `error`."""

    def handed(self, steps: Collection[Step]) -> None:
        """A command's work is done."""

    def looked(
        self,
        planned: Plan,
        actual: Actual,
        ledger: Ledger,
        found: Mapping[str, Sequence[Condition]],
    ) -> None:
        """What a whole look found: VM → its conditions."""

    def noted(
        self,
        store: Store,
        planned: Plan,
        found: Mapping[str, Sequence[Condition]],
        now: Seconds,
    ) -> None:
        """How some VMs stand after a look: VM → its conditions."""

    def gone(self, store: Store, names: Collection[str], now: Seconds) -> None:
        """Of some VMs nothing is wanted any more."""

    def sourced(self, ok_at: Seconds | None, revision: str) -> None:
        """The source was read; None: not well. `revision`: what people call what was read."""

    def ready(self, counts: str) -> None:
        """Every VM was looked at once."""

    def beat(self, counts: str, working: Collection[Seconds]) -> None:
        """The loop moves; `working`: for how long each look goes on."""

    def reloading(self) -> None:
        """The config is read again."""

    def reloaded(self) -> None:
        """It was, and taken or not."""

    def ending(self) -> None:
        """The end has begun."""
