"""Plans in files: made, read, and compared with what is there now."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import click
from msgspec import Struct

from reconciler.cli import options
from reconciler.core.errors import HostError
from reconciler.core.ledger import Ledger
from reconciler.core.saved import (
    Basis,
    Promise,
    Saved,
    edited,
    elsewhere,
    is_saved,
    known,
    load,
    observed,
    out_of_time,
    restocked,
)
from reconciler.core.saved import Reading as Kept
from reconciler.core.saved import dump as dumped
from reconciler.core.selector import Choice
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds
from reconciler.handover import Asked, Specs
from reconciler.host import plans, store
from reconciler.host.files import NothingNamed
from reconciler.loop import Source, current, load_source, rehearsed


class Question(Struct, frozen=True, kw_only=True):
    """What was typed: which specs, and which VMs of them."""

    files: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    prune: bool = False
    patterns: tuple[str, ...] = ()
    selector: str | None = None

    def source(self, settings: Settings, *, bare: bool = False) -> Source:
        """`bare`: there may be no spec at all. Raises UsageError, HostError, NothingNamed."""
        extra = options.extra_texts(self.extra)
        return load_source(self.files, settings, asking=bare, extra=extra)

    def chosen(self, source: Source, settings: Settings) -> tuple[str, ...] | None:
        """The VMs that are meant; None: all. Raises UsageError where a name means none."""
        try:
            choice = Choice.read(self.patterns, self.selector)
            if not choice:
                return None
            gone = current(settings) if self.prune else None
            return tuple(choice.of(labels(source, gone), unreadable(source)))
        except ValueError as error:
            raise click.UsageError(str(error)) from error

    def rehearsed(self, source: Source, names: Sequence[str] | None, settings: Settings) -> Basis:
        """The plan, and what it rests on. Raises HostError."""
        wish = Specs.of(source, prune=self.prune, chosen=names)
        return rehearsed(settings, wish.desire(settings, source), os.environ)


def labels(source: Source, pruned: Ledger | None) -> dict[str, dict[str, str] | None]:
    """VM → its labels, of all that specs declare; None: they cannot be read. `pruned`: also of all
    that was applied once and is gone from them."""
    specs = source.specs
    found: dict[str, dict[str, str] | None] = {}
    for name, applied in pruned.applied.items() if pruned else ():
        found[name] = dict(applied.vm.get("labels") or {})
    found |= {one.spec.vm: {} for one in specs.runs if not one.aside}
    found |= {one.spec.name: dict(one.spec.labels) for one in specs.vms}
    found |= {one.subject: {} for one in specs.tunnels}
    return found | dict.fromkeys(specs.refused)


def unreadable(source: Source) -> str:
    """What to say where a VM is not found, if it may be where nothing could be read."""
    unread = sorted(source.specs.unread)
    return f"; it may be in what cannot be read: {', '.join(unread)}" if unread else ""


# -- making one


def refuse_out(path: Path, source: Source) -> None:
    """Raises HostError if something else is there, UsageError if specs cannot be read again."""
    plans.refuse_other(path, is_saved)
    for text in (*source.texts, *source.requests):
        if not os.path.isfile(text.file):
            raise click.UsageError(
                f"cannot save a plan of {text.file}: it is no file that can be read again when the "
                "plan is applied; write it into one"
            )


def save(
    path: Path,
    question: Question,
    source: Source,
    chosen: Sequence[str] | None,
    settings: Settings,
    basis: Basis,
    lasts: Seconds,
) -> Saved:
    """Write a plan down. Raises HostError."""
    now, id_ = time.time(), os.urandom(16).hex()
    saved = Saved(
        id=id_,
        made=now,
        expires=now + lasts,
        who=options.who("reconciler plan"),
        hub=settings.hub,
        state_id=current(settings).state_id,
        settings=settings.to_json(),
        folder=os.getcwd(),
        files=question.files,
        extra=question.extra,
        prune=question.prune,
        patterns=question.patterns,
        selector=question.selector or "",
        chosen=None if chosen is None else tuple(chosen),
        readings={name: Kept.of(text, id_) for name, text in source.readings().items()},
        inventory=known(source.inventory.facts() if source.inventory else None),
        basis=basis,
    )
    plans.write(path, dumped(saved), is_saved)
    return saved


def use_of(saved: Saved) -> store.Use | None:
    """When and by whom it was applied; None: it was not, or that cannot be known here."""
    with contextlib.suppress(HostError):
        return store.use_of_plan(Path(str(saved.settings.get("state"))), saved.id)
    return None


# -- applying one


def read(path: Path) -> Promise:
    """Raises HostError, UnreadablePlanError."""
    return Promise(saved=load(plans.read(path), str(path)), file=str(path))


class Renewed:
    """What a saved plan is about, as it is now."""

    def __init__(self, promise: Promise, settings: Settings) -> None:
        self.promise, self.settings = promise, settings
        self.source: Source
        """As it was read first; see `asked`."""
        saved = promise.saved
        self.question = Question(
            files=saved.files,
            extra=saved.extra,
            prune=saved.prune,
            patterns=saved.patterns,
            selector=saved.selector or None,
        )

    def asked(self) -> Asked:
        """What it wants, read anew. Raises StalePlanError, HostError."""
        promise, settings = self.promise, self.settings
        saved = promise.saved
        foreign = elsewhere(saved, settings.hub, saved.state_id, settings.to_json())
        if saved.hub != settings.hub:
            raise promise.stale(foreign)
        directory = Path(settings.state)
        if use := store.use_of_plan(directory, saved.id):
            raise promise.used(use.at, use.who)
        state_id = current(settings).state_id
        moved = elsewhere(saved, settings.hub, state_id, settings.to_json())
        moved += out_of_time(saved, time.time())
        source, changed = self.read()
        moved += changed
        if source is None:
            raise promise.stale(moved)
        self.source = source
        wish = Specs.of(source, prune=saved.prune, chosen=saved.chosen)
        wanted = wish.desire(settings, source)
        if moved:  # all that can be said is said at once
            moved += observed(saved.basis, rehearsed(settings, wanted, os.environ))
            raise promise.stale(moved)
        return Asked(wish, wanted, promise=promise)

    def recheck(self) -> None:
        """Whether what was read is still so, now that nobody else changes the hub. Raises
        StalePlanError."""
        _, moved = self.read()
        if moved:
            raise self.promise.stale(moved)

    def read(self) -> tuple[Source | None, list[str]]:
        """All that specs and inventory say now, and what of it is not as it was."""
        saved = self.promise.saved
        try:
            with contextlib.chdir(saved.folder):
                source = self.question.source(self.settings)
        except (NothingNamed, click.UsageError) as error:
            return None, [str(error)]
        except FileNotFoundError:
            return None, [f"the directory {saved.folder}, where it was made, is gone"]
        quotable = {text.file for text in (*source.texts, *source.requests)}
        moved = edited(saved, source.readings(), quotable)
        moved += restocked(saved, known(source.inventory.facts() if source.inventory else None))
        return source, moved
