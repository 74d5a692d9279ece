"""Asking for runs, whoever asks: a command, or somebody at the API. It writes requests, no more;
what follows from them is for `apply` and `watch`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct, field
from msgspec.structs import replace
from pydantic import ValidationError

from reconciler.core import requests as asking
from reconciler.core.call import Call, CallState, due_call, job_id
from reconciler.core.declared import Asked, CheckedRun, Specs
from reconciler.core.desired import Desired, Vm
from reconciler.core.errors import (
    Diagnostic,
    HostError,
    InputError,
    LockError,
    ReconcilerError,
    nearest,
)
from reconciler.core.findings import finding
from reconciler.core.ledger import Ledger
from reconciler.core.mark import Served, parse
from reconciler.core.runs import newest
from reconciler.core.settings import Settings
from reconciler.core.spec import checked_run
from reconciler.core.spec_files import read_request
from reconciler.core.units import Seconds, stamp
from reconciler.host import files, lock, proc, requests
from reconciler.host.files import requested
from reconciler.host.store import StoreError
from reconciler.host.store.listing import Listing
from reconciler.library import YOUNG
from reconciler.look import Observer
from reconciler.loop import Applier, Source, current, desire, load_source, parse_all
from reconciler.orders import Cancel, stopped

WHERE: Final = "/api/v1/backups/"
"""What stands before a `backup_id` in the path of a backup."""
LOCK: Final[Seconds] = 5.0
"""How long somebody at the API waits for another who asks, or who changes the hub."""


# -- for anybody


def ask(
    asked: Sequence[CheckedRun],
    source: Source,
    ledger: Ledger,
    settings: Settings,
    now: Seconds,
    lock_timeout: Seconds,
    command: str,
) -> tuple[Source, Sequence[asking.Verdict]]:
    """Write down what is to be written, all or nothing.

    What is asked for with it, and what came of each. Raises HostError, InputError, LockError; then
    nothing is.
    """
    weighed = weigh(asked, source, ledger, settings, now, command)
    if weighed.texts:
        folder = Path(settings.requests)
        requests.prepare(folder)
        with lock.held(folder / ".lock", command, lock_timeout):
            requests.write(folder, weighed.texts)
        source = replace(weighed.source, requests=tuple(requested(settings.requests)))
        return source, weighed.verdicts
    return weighed.source, weighed.verdicts


class Weighed(Struct, frozen=True):
    """What comes of asking, before it is written down."""

    source: Source
    """With what is asked for."""
    verdicts: Sequence[asking.Verdict]
    texts: Mapping[str, str]
    """VM → its request, where there is one to be written."""
    vms: Mapping[str, Vm]
    """What would be wanted of those VMs."""


def weigh(
    asked: Sequence[CheckedRun],
    source: Source,
    ledger: Ledger,
    settings: Settings,
    now: Seconds,
    command: str,
) -> Weighed:
    """What comes of asking for some runs. Raises HostError, InputError if one is refused."""
    verdicts = asking.weigh(asked, source.specs, source.inventory, ledger)
    refused = [verdict.said for verdict in verdicts if verdict.refused]
    if refused:
        raise HostError("\nerror: ".join(refused))
    folder = Path(settings.requests)
    texts = {
        one.vm: asking.rendered(one, stamp(now), command)
        for one, verdict in zip(asked, verdicts, strict=True)
        if verdict.write
    }
    wrote = {str(requests.path(folder, vm)): text for vm, text in texts.items()}
    source = replace(source, specs=asking.with_requests(source.specs, wrote))
    desired = desire(source, settings)(ledger).only(texts.keys())
    wrong = asking.problems(desired, wrote.keys())
    if wrong:
        raise findings(wrong, {**source.lines, **wrote})
    return Weighed(source, verdicts, texts, desired.vms)


def findings(diagnostics: Sequence[Diagnostic], sources: Mapping[str, str]) -> InputError:
    """The error, with the lines that it is about."""
    error = InputError(diagnostics)
    error.sources.update(sources)
    return error


# -- for somebody at the API

_FIELDS: Final[Mapping[str, str]] = {
    "not-a-backup": "ask with `backup_type` full; with `fallback` full it would be full by itself",
}
"""Rule of a finding about a request that is not written yet → the fields of it that help."""


def told(diagnostics: Iterable[Diagnostic]) -> str:
    """Some findings for who writes fields, not files; those with a place are about the specs."""
    found = map(finding, diagnostics)
    return "; ".join(
        f"{one.place}: {_sentence(one.summary, one.help)}"
        if one.place
        else _sentence(one.summary, _FIELDS.get(one.rule, one.help))
        for one in found
    )


def _sentence(summary: str, helps: str) -> str:
    return f"{summary}; {helps}" if helps else summary


class Wish(Struct, frozen=True, kw_only=True):
    """A run of one VM that somebody asks for."""

    vm: str
    """Its context, or its name in vCenter."""
    type: str
    repository: str
    who: str
    fallback: str | None = None
    """What it is where no incremental can be made; None: then it is refused."""
    policy: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    """What the client will say again when it repeats this; empty: it will not."""


class Why(Enum):
    """Why a run cannot be asked for, or ended."""

    UNKNOWN = auto()
    """There is no such VM, or run, or it has no disks."""
    INVALID = auto()
    """What is asked for cannot be, or the VM's spec cannot be used."""
    ACTIVE = auto()
    """Another run of the VM has not ended."""
    OTHER = auto()
    """The key is of another request."""
    ENDED = auto()
    """The run has ended already."""
    HELD = auto()
    """Something keeps it as it is."""


class RefusedError(HostError):
    """Nothing was written down."""

    def __init__(self, why: Why, message: str, job_id: str = "") -> None:
        super().__init__(message, why.name.capitalize())
        self.why, self.job_id = why, job_id


class Booked(Struct, frozen=True):
    """A run that is asked for."""

    call: Call
    """As the ledger has it, or will have it."""
    again: bool
    """It was asked for before, with the same key."""


class Desk:
    """What a process that starts no servers can do for who asks at the API."""

    starts: str = (
        "what it asks for is written down; reconciler apply or reconciler watch makes it true, as "
        "this process starts no servers"
    )
    """Why no server will answer soon; empty: this process starts them."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        environment: Mapping[str, str],
        kick: Callable[[str], None],
    ) -> None:
        self._settings, self.environment, self.kick = settings, environment, kick
        self.listing = Listing(Path(settings().state))
        self._requests: dict[str, tuple[int, files.Signature, tuple[Asked, ...]]] = {}
        """File → when it was read, in ns, what it looked like, and what it asks for."""
        self._bares: dict[str, tuple[Asked, Call]] = {}
        """VM → its entry that counts, and the run that it asks for, as the ledger will have it."""

    def close(self) -> None:
        """Nobody asks any more."""
        self.listing.close()

    @property
    def settings(self) -> Settings:
        """The config as it is now."""
        return self._settings()

    # -- what differs from process to process

    def ledger(self) -> Ledger:
        """What is remembered now. Raises HostError."""
        return current(self.settings)

    def source(self) -> Source:
        """What the specs, the requests and the inventory say now. Raises HostError."""
        return load_source((), self.settings, asking=True)

    def standing(self, _call: Call) -> str:
        """What a run that was not called yet waits for, or why it cannot be; empty: nothing that
        is known."""
        return self.starts

    def pids(self, calls: Sequence[Call]) -> Mapping[tuple[str, str, int], Mapping[int, int]]:
        """The servers of some runs: the run's key → disk key → pid."""
        seen = ((one, served) for one in proc.processes() if (served := parse(one.argv)))
        ours = ((one, served) for one, served in seen if _is_of(served, self.settings.hub))
        return pids_of(ours, calls)

    def wanted(self) -> Sequence[Call]:
        """Runs that are wanted and that no request asks for, as the ledger would have them."""
        return ()

    def asked(self, vm: str) -> None:
        """A request of a VM was written."""
        self.kick(vm)

    def carry_out(self, order: Cancel, who: str) -> None:
        """End a run, and stop its servers. Raises ReconcilerError."""
        applier = Applier(
            self.settings, self.environment, lambda _: None, command=who, lock_timeout=LOCK
        )
        with applier.opened() as store:
            order.carry_out(store, who, time.time(), Observer(self.settings, self.environment))
            ledger = store.ledger()
        if order.leaves(ledger):
            applier.apply(partial(self.gone, order), order=True)

    def gone(self, order: Cancel, ledger: Ledger) -> Desired:
        """Nothing of a run's VM is to be there any more."""
        return stopped(order.vms, ledger, self.settings, kill_clients=order.kill_clients)

    # -- asking

    def book(self, wish: Wish) -> Booked:
        """Ask for a run of a VM, unless that was done before. Raises RefusedError, HostError."""
        settings = self.settings
        wish = replace(wish, who=asking.one_line(wish.who))
        folder = Path(settings.requests)
        requests.prepare(folder)
        with lock.held(folder / ".lock", wish.who, LOCK):
            booked = self._book(wish, settings, folder)
        if not booked.again:
            self.asked(booked.call.vm)
        return booked

    def _book(self, wish: Wish, settings: Settings, folder: Path) -> Booked:
        source, ledger = self.source(), self.ledger()
        name = self._vm(wish, source, ledger)
        source = replace(source, specs=self._fresh(source.specs.only((name,)), name))
        run = asking.keyed(name, wish.key) if wish.key else f"api-{secrets.token_hex(6)}"
        known = ledger.latest(name, run) if wish.key else None
        if known and known.state is not CallState.DUE:
            return Booked(self._same(wish, known, source), again=True)
        entry = newest(source.specs.runs).get(name)
        other = asking.under_way(name, source.specs, source.inventory, ledger)
        if wish.key and other == run and entry and entry.spec.run == run:
            call = self._call_of(entry.spec, source, ledger)
            return Booked(self._same(wish, call, source), again=True)
        if other:
            raise self._under_way(name, other, ledger)
        try:
            asked = checked_run(
                vm=name,
                run=run,
                type=wish.type,
                fallback=wish.fallback,
                by=wish.who,
                policy=wish.policy,
                tags=wish.tags,
            )
            weighed = weigh([asked], source, ledger, settings, time.time(), wish.who)
        except ValidationError as error:
            raise RefusedError(Why.INVALID, str(error.errors()[0]["msg"])) from error
        except InputError as error:
            raise RefusedError(Why.INVALID, told(error.diagnostics)) from error
        vm = weighed.vms.get(name)
        if vm is None or not vm.exports:
            raise RefusedError(Why.INVALID, "; ".join(one.said for one in weighed.verdicts))
        self._of_repository(wish, vm.repository, name)
        requests.write(folder, weighed.texts)
        return Booked(due_call(settings.hub, vm, time.time(), wish.who), again=False)

    def _under_way(self, vm: str, run: str, ledger: Ledger) -> RefusedError:
        """That a run of a VM has not ended: how it stands, and what gets past it."""
        job = job_id(self.settings.hub, vm, run, ledger.attempt(vm, run))
        call = ledger.latest(vm, run)
        call = call or next((one for one in self.pending() if one.job_id == job), None)
        said = (
            f"cannot ask for a run of {vm}: its run {run} has not ended; its backup_id is {job}; "
        )
        if call is None:
            said += "it is pending, as the VM's spec asks for it: `reconciler apply` begins it"
        elif call.state is CallState.DUE:
            standing = self.standing(call)
            said += "it is pending" + (f", and waits: {standing}" if standing else "")
            said += f"; `DELETE {WHERE}{job}` gives it up"
        else:
            said += f"it is {call.state}" + (f": {call.message}" if call.message else "")
            said += f"; `GET {WHERE}{job}` shows how far it is"
        return RefusedError(Why.ACTIVE, said, job)

    def _vm(self, wish: Wish, source: Source, ledger: Ledger) -> str:
        """The context of the VM that is meant. Raises RefusedError, HostError."""
        specs, inventory = source.specs, source.inventory
        settings = self.settings
        if wish.repository not in settings.repositories:
            names = ", ".join(sorted(settings.repositories))
            hint = nearest(wish.repository, settings.repositories)
            raise RefusedError(
                Why.INVALID,
                f"there is no repository {wish.repository!r} (the config has: {names}){hint}",
            )
        found = asking.named_vm(wish.vm, specs, inventory)
        if len(found) > 1:
            raise RefusedError(
                Why.INVALID,
                f"{wish.vm!r} may be any of {', '.join(sorted(found))}; name the VM context",
            )
        if not found and wish.key and ledger.latest(wish.vm, asking.keyed(wish.vm, wish.key)):
            return wish.vm  # it has gone since; what was asked for then is answered all the same
        if not found:
            unread = ", ".join(sorted(specs.unread))
            if unread or (inventory and not inventory.readable):
                what = unread or (inventory.told() if inventory else "")
                said = f"cannot tell whether there is a VM {wish.vm!r}: cannot read {what}"
                raise HostError(said, "NotReady")
            every = (*(one.spec.name for one in specs.vms), *(inventory.names if inventory else ()))
            raise RefusedError(
                Why.UNKNOWN,
                f"there is no VM {wish.vm!r}: no spec declares it, and no inventory knows it"
                f"{nearest(wish.vm, every)}",
            )
        (name,) = found
        if name in specs.refused:
            wrong = [one for one in specs.diagnostics if one.vm in ("", name)]
            raise RefusedError(Why.INVALID, told(wrong))
        known = inventory.vms.get(name) if inventory else None
        listed = next((one.spec.disks for one in specs.vms if one.spec.name == name), "inventory")
        if known and not known.disks and listed == "inventory":
            raise RefusedError(Why.UNKNOWN, f"the inventory knows no disks of the VM {name}")
        return name

    def _fresh(self, specs: Specs, vm: str) -> Specs:
        """The same with the request of a VM as it is now."""
        path = str(requests.path(Path(self.settings.requests), vm))
        others = tuple(one for one in specs.runs if one.document.file != path)
        return replace(specs, runs=(*others, *self._entries(path, files.signature(path))))

    def _of_repository(self, wish: Wish, repository: str, vm: str) -> None:
        if wish.repository != repository:
            raise RefusedError(
                Why.INVALID,
                f"the images of {vm} are kept in the repository {repository!r}, as its spec and "
                f"the config say, not in {wish.repository!r}",
            )

    def _same(self, wish: Wish, call: Call, source: Source) -> Call:
        """The run of a key, if it is what is asked for now. Raises RefusedError."""
        image = call.exports[0].image if call.exports else ""
        entry = newest(source.specs.runs).get(call.vm)
        # Of a run that stayed incremental, only the request still knows what it was to be else.
        known = entry.spec.fallback if entry and entry.spec.run == call.run else wish.fallback
        was = {
            "backup_type": ("incremental" if call.fallback else call.type, wish.type),
            "fallback": ("full" if call.fallback else known, wish.fallback),
            "repository_id": (self.settings.repository_of(image), wish.repository),
            "policy_id": (call.policy, wish.policy),
            "tags": (tags_of(call), dict(wish.tags)),
        }
        moved = [name for name, (before, now) in was.items() if before != now]
        if image == "":
            moved = [name for name in moved if name != "repository_id"]
        if moved:
            raise RefusedError(
                Why.OTHER,
                f"this Idempotency-Key was used for run {call.run} of {call.vm} with another "
                f"{', '.join(moved)}: use a new key for another request",
                call.job_id,
            )
        return call

    # -- what is asked for and not in the ledger yet

    def pending(self) -> list[Call]:
        """Runs that are asked for, as the ledger will have them; it may have some by now. Raises
        HostError."""
        there = files.listing(self.settings.requests).files
        entries = [one for path, seen in there.items() for one in self._entries(path, seen)]
        for path in self._requests.keys() - there.keys():
            self._requests.pop(path, None)
        bares = {}
        for vm, one in newest(entries).items():
            # Most are of runs that ended long ago, and every list asks for all of them.
            kept = self._bares.get(vm)
            if kept is None or kept[0] is not one:
                kept = (one, self._bare(one.spec, there[one.document.file][3] / 1e9))
            bares[vm] = kept
        self._bares = bares
        found = {call.job_id: call for _, call in bares.values()}
        return [*found.values(), *(one for one in self.wanted() if one.job_id not in found)]

    def _entries(self, path: str, seen: files.Signature) -> tuple[Asked, ...]:
        """What a file asks for; parsed again only if it may have moved."""
        known = self._requests.get(path)
        if known and known[1] == seen and max(seen[3:]) < known[0] - YOUNG:
            return known[2]
        now = time.time_ns()
        documents, _ = parse_all([files.read(path, pipe=False)]) if any(seen) else ([], [])
        found = tuple(one for document in documents for one in read_request(document).runs)
        self._requests[path] = (now, seen, found)
        return found

    def detailed(self, calls: Sequence[Call]) -> list[Call]:
        """The same pending runs with their disks, where they can be told."""
        bare = [call.vm for call in calls if not call.exports]
        if not bare:
            return list(calls)
        try:
            source, ledger = self.source(), self.ledger()
        except ReconcilerError:
            return list(calls)  # who asks is told of the runs all the same
        source = replace(source, specs=source.specs.only(bare))
        vms = desire(source, self.settings)(ledger).vms
        return [self._with_disks(call, vms.get(call.vm)) for call in calls]

    def _with_disks(self, call: Call, vm: Vm | None) -> Call:
        if call.exports or vm is None or vm.run != call.run or not vm.exports:
            return call
        return due_call(call.hub, vm, call.created, call.who)

    def _call_of(self, asked: CheckedRun, source: Source, ledger: Ledger) -> Call:
        known = ledger.latest(asked.vm, asked.run)
        if known:
            return known
        vm = desire(source, self.settings)(ledger).vms.get(asked.vm)
        if vm and vm.run == asked.run and vm.exports:
            return due_call(self.settings.hub, vm, time.time(), asked.by)
        return self._bare(asked, time.time())

    def _bare(self, asked: CheckedRun, when: Seconds) -> Call:
        """A run of which nothing is known but that it is asked for."""
        return Call(
            hub=self.settings.hub,
            vm=asked.vm,
            run=asked.run,
            attempt=1,
            state=CallState.DUE,
            sna="",
            type=asked.type,
            request="",
            job_id=job_id(self.settings.hub, asked.vm, asked.run, 1),
            exports=(),
            created=when,
            changed=when,
            who=asked.by,
            policy=asked.policy,
            tags=json.dumps(dict(asked.tags), sort_keys=True),
        )

    # -- ending

    def cancel(self, call: Call, who: str) -> None:
        """End a run by order, whatever its appliance does, and stop what is ours of it. Raises
        RefusedError, and then nothing was done; HostError."""
        order = Cancel(vms=(call.vm,), kill_clients=True, call=call)
        try:
            self.carry_out(order, who)
        except (StoreError, LockError):
            raise
        except ReconcilerError as error:
            raise RefusedError(Why.HELD, str(error), call.job_id) from error


def _is_of(served: Served, hub: str) -> bool:
    return served.mark is not None and served.mark.hub == hub


def pids_of(
    ours: Iterable[tuple[proc.Process, Served]], calls: Sequence[Call]
) -> Mapping[tuple[str, str, int], Mapping[int, int]]:
    """Which of our servers are of some runs; those in the act of starting are none yet."""
    found: dict[tuple[str, str, int], dict[int, int]] = {call.key: {} for call in calls}
    for process, served in ours:
        mark = served.mark
        if mark and not served.starting and (mark.vm, mark.run, mark.attempt) in found:
            found[mark.vm, mark.run, mark.attempt][mark.disk] = process.identity.pid
    return found


def tags_of(call: Call) -> dict[str, str]:
    """The tags of a run."""
    found: dict[str, str] = json.loads(call.tags)
    return found
