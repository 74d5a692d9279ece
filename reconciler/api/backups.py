"""The Backup API: asking for runs of whole VMs, seeing how they stand, ending them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Final, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from msgspec.structs import replace

from reconciler.api.answers import error
from reconciler.api.bodies import body
from reconciler.api.gate import WHO
from reconciler.api.models import Backup, BackupType, Chain, Start, Stats, Status
from reconciler.api.streams import Streams
from reconciler.api.views import STATES, answers, repository_of, view
from reconciler.asking import WHERE, Booked, Desk, RefusedError, Why, Wish
from reconciler.core.call import Call, CallState
from reconciler.core.chains import chains_of
from reconciler.core.errors import HostError, nearest
from reconciler.core.settings import Settings, below
from reconciler.core.units import Seconds, stamp
from reconciler.host.store.listing import Filter, Shown

T = TypeVar("T")

ANSWER: Final[Seconds] = 10.0
"""How long a run that was asked for is waited for: servers answer within 0.3 s as a rule, and who
asks may have a deadline of its own, 30 s in the field."""
LOOK: Final[Seconds] = 0.05
"""Between two looks at it. One look is a few rows by their keys."""
PLACES: Final = 8
"""Requests of a kind that are worked on at a time, each in a thread. Those that hang on storage
take none of the callbacks' threads."""
PATIENCE: Final[Seconds] = 10.0
"""How long a request waits for such a place."""
MOST: Final = 1000
"""Runs on one page."""
NOBODY: Final = "the API"
"""Who asks, where nobody has said who they are."""
_BEYOND: Final = 1 << 62

_STATUS: Final[Mapping[Why, int]] = {
    Why.UNKNOWN: 404,
    Why.INVALID: 400,
    Why.ACTIVE: 409,
    Why.OTHER: 422,
    Why.ENDED: 409,
    Why.HELD: 409,
}

Id = Annotated[str, Path(description="As the answer to the start has it.", max_length=255)]
Name = Annotated[str | None, Query(description="A VM context, or a VM's name in vCenter.")]
Repository = Annotated[str | None, Query(description="A name in the hub's config.")]


class Places:
    """Threads for work that may take long, apart from everybody else's."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._threads: anyio.CapacityLimiter | None = None

    async def __call__(self, work: Callable[[], T]) -> T:
        """Have it done. Raises HostError if it does not get its turn, and what the work raises."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self._free.acquire()
        except TimeoutError:
            raise HostError(
                "too much is asked at once, or the storage of the state directory is slow; ask "
                "again in a moment",
                "Busy",
            ) from None
        try:
            self._threads = self._threads or anyio.CapacityLimiter(math.inf)
            return await anyio.to_thread.run_sync(work, limiter=self._threads)
        finally:
            self._free.release()


class BackupApi:
    """The routes."""

    def __init__(self, desk: Desk, closing: Callable[[], bool]) -> None:
        """`closing`: whether the process is about to end."""
        self.desk, self.listing, self.closing = desk, desk.listing, closing
        self._asking, self._reading = Places(PLACES), Places(PLACES)
        self.streams = Streams(desk.listing, self._reading, closing)

    # -- asking for a run

    async def start(
        self,
        request: Request,
        asked: Annotated[Start, Depends(body(Start))],
        idempotency_key: Annotated[
            str | None,
            Header(
                min_length=1,
                max_length=255,
                description="Repeat a request with the same key, and it is the same backup.",
            ),
        ] = None,
    ) -> Response:
        """Ask for a backup of a whole VM.

        Answers when every disk is served, or after 10 s with 202 and a place to look. With an
        `Idempotency-Key` it may be repeated, after a crash too.
        """
        wish = Wish(
            vm=asked.vm_name,
            type=asked.backup_type,
            fallback=asked.fallback,
            repository=asked.repository_id,
            who=who(request),
            policy=asked.policy_id or "",
            tags=asked.tags or {},
            key=idempotency_key or "",
        )
        booked = await self._asking(partial(self.desk.book, wish))
        return await self._answering(request, booked)

    async def _answering(self, request: Request, booked: Booked) -> Response:
        """The run, as soon as its servers answer; else as it is when the time is over."""
        place = {"Location": f"{WHERE}{booked.call.job_id}"}
        end = asyncio.get_running_loop().time() + ANSWER
        while True:
            found, stands = await self._reading(partial(self._look, booked.call))
            if answers(found):
                return JSONResponse(found.to_json(), 201, place)
            over = asyncio.get_running_loop().time() >= end or self.closing()
            if stands or over or await request.is_disconnected():
                return JSONResponse(found.to_json(), 202, place)
            await asyncio.sleep(LOOK)

    def _look(self, call: Call) -> tuple[Backup, str]:
        """A run as it is now, and what keeps it from going on."""
        shown = self.listing.find(call.job_id) or _only_asked(call)
        (found,) = self._views([shown])
        return found, self.desk.standing(shown.call) if found.status == "pending" else ""

    # -- seeing

    async def page(
        self,
        vm_name: Name = None,
        vm_context_id: Annotated[str | None, Query(description="A VM context.")] = None,
        repository_id: Repository = None,
        status: Status | None = None,
        backup_type: BackupType | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST, description="Of one page.")] = 100,
        offset: Annotated[int, Query(ge=0, le=_BEYOND, description="Runs to leave out.")] = 0,
    ) -> Response:
        """Runs, the newest first; those that are only asked for before them."""
        which = Filter(
            vm=vm_context_id,
            name=vm_name,
            type=backup_type,
            states=STATES[status] if status else None,
        )
        found = await self._reading(partial(self._page, which, repository_id, limit, offset))
        return JSONResponse(found)

    def _page(
        self, which: Filter, repository: str | None, limit: int, offset: int
    ) -> dict[str, object]:
        which = _inside(which, repository, self.desk.settings)
        first = self._pending(which, repository)
        there = first[offset : offset + limit]
        rest = limit - len(there)
        shown, total = self.listing.page(which, rest, max(0, offset - len(first)))
        found = self._views([*map(_only_asked, there), *shown])
        return {"backups": [one.to_json() for one in found], "total": len(first) + total}

    async def one(self, backup_id: Id) -> Response:
        """One run as it is now."""
        found = await self._reading(partial(self._one, backup_id))
        return JSONResponse(found.to_json())

    def _one(self, backup_id: str) -> Backup:
        (found,) = self._views([self._found(backup_id)])
        return found

    def _found(self, backup_id: str) -> Shown:
        """Raises RefusedError, HostError."""
        shown = self.listing.find(backup_id)
        if shown:
            return shown
        for call in self.desk.pending():
            if call.job_id == backup_id:
                return _only_asked(self.desk.detailed([call])[0])
        raise RefusedError(Why.UNKNOWN, f"this hub knows no backup {backup_id[:80]!r}")

    async def chain(
        self,
        vm_name: Annotated[str, Path(description="A VM context, or a VM's name in vCenter.")],
        disk_id: Annotated[int, Query(ge=0, le=_BEYOND, description="Position of the disk.")] = 0,
    ) -> Response:
        """The newest chain of a disk: what is needed to restore it, and what was built on it."""
        found = await self._reading(partial(self._chain, vm_name, disk_id))
        return JSONResponse(found)

    def _chain(self, name: str, position: int) -> dict[str, object]:
        vms = self.listing.vms(name)
        if len(vms) > 1:
            said = f"{name[:80]!r} may be any of {', '.join(vms)}; name the VM context"
            raise RefusedError(Why.INVALID, said)
        if not vms:
            raise RefusedError(Why.UNKNOWN, f"this hub has no backup of a VM {name[:80]!r}")
        ledger, (vm,) = self.desk.ledger(), vms
        keys = {
            export.key
            for call in ledger.runs(vm)
            for export in call.exports
            if export.position == position
        }
        chains = [one for key in keys for one in chains_of(ledger, vm, key) if one.kept]
        if not chains:
            said = f"there is no completed backup of a disk at position {position} of {vm}"
            raise RefusedError(Why.UNKNOWN, said)
        chain = max(chains, key=lambda one: one.newest)
        shown = [found for b in chain.kept if (found := self.listing.find(b.call.job_id))]
        full, newest = chain.full.call, chain.kept[-1].call
        return Chain(
            chain_id=f"{full.job_id}.disk{position}",
            vm_context_id=vm,
            vm_name=newest.display_name or vm,
            disk_id=position,
            repository_id=repository_of(newest, self.desk.settings),
            full_backup_id=full.job_id,
            backups=[],
            total_size_bytes=chain.allocated,
            backup_count=len(chain.kept),
        ).model_dump() | {"backups": [one.to_json() for one in self._views(shown)]}

    async def stats(self, vm_name: Name = None, repository_id: Repository = None) -> Response:
        """What the completed backups come to whose images are kept."""
        which = _inside(Filter(name=vm_name), repository_id, self.desk.settings)
        found = await self._reading(partial(self.listing.totals, which))
        stats = Stats(
            backup_count=found.count,
            total_size_bytes=found.size,
            last_backup_at=stamp(found.last) if found.last else None,
        )
        return JSONResponse(stats.model_dump())

    async def events(
        self,
        backup_id: Id,
        last_event_id: Annotated[
            str | None, Header(description="The last event that is known; the next ones follow.")
        ] = None,
    ) -> Response:
        """Follow a run: its events and its state, as server-sent events, until it has ended.

        `log` has an event of the run, with its number as `id`; `status` has the run as it is now,
        whenever its state or its progress has moved; `end` is the last, with the run as it ended.
        """
        shown = await self._reading(partial(self._found, backup_id))
        number = int(last_event_id) if last_event_id and last_event_id.isdigit() else 0
        return self.streams.follow(
            partial(self._one, shown.call.job_id), shown.call, min(number, _BEYOND)
        )

    # -- ending

    async def cancel(self, request: Request, backup_id: Id) -> Response:
        """End a backup by order: its servers are stopped, whoever is connected to them.

        The appliance cannot be told: what writes for it fails as its servers are gone.
        """
        found = await self._asking(partial(self._cancel, backup_id, who(request)))
        return JSONResponse(found.to_json())

    def _cancel(self, backup_id: str, who: str) -> Backup:
        call = self._found(backup_id).call
        if call.state.terminal:
            said = f"cannot cancel run {call.run} of {call.vm}: it is {call.state} already"
            raise RefusedError(Why.ENDED, said, call.job_id)
        self.desk.cancel(call, who)
        return self._one(backup_id)

    # -- all of them

    def _pending(self, which: Filter, repository: str | None) -> list[Call]:
        """Runs that are only asked for, of those that are meant; the newest first."""
        if which.states is not None and which.states != STATES["pending"]:
            return []
        asked = self.desk.pending()
        known = self.listing.known([call.job_id for call in asked])
        calls = [
            call
            for call in asked
            if call.job_id not in known
            and which.vm in (None, call.vm)
            and which.type in (None, call.type)
        ]
        calls = [
            call
            for call in self.desk.detailed(calls)
            if which.name in (None, call.vm, call.display_name)
            and repository in (None, repository_of(call, self.desk.settings))
        ]
        return sorted(calls, key=lambda call: (call.created, call.job_id), reverse=True)

    def _views(self, shown: Sequence[Shown]) -> list[Backup]:
        up = [one.call for one in shown if one.leases]
        pids = self.desk.pids(up) if up else {}
        settings, now = self.desk.settings, time.time()
        return [
            view(
                one,
                settings,
                pids.get(one.call.key, {}),
                self.desk.standing(one.call) if one.call.state is CallState.DUE else "",
                now,
            )
            for one in shown
        ]


def who(request: Request) -> str:
    """Who asks, for the run and its events."""
    return str(request.scope.get(WHO, NOBODY))


def refused(_: Request, problem: Exception) -> JSONResponse:
    """What cannot be done, and why."""
    assert isinstance(problem, RefusedError)
    place = {"Location": f"{WHERE}{problem.job_id}"} if problem.job_id else None
    return error(_STATUS[problem.why], str(problem), place)


def _only_asked(call: Call) -> Shown:
    return Shown(call=call, telemetry=None, reports={}, leases=())


def _inside(which: Filter, repository: str | None, settings: Settings) -> Filter:
    """The same in one repository. Raises RefusedError."""
    if repository is None:
        return which
    root = settings.repositories.get(repository)
    if root is None:
        names = ", ".join(sorted(settings.repositories))
        raise RefusedError(
            Why.OTHER,
            f"repository_id: there is no repository {repository[:80]!r} (the config has: {names})"
            f"{nearest(repository, settings.repositories)}",
        )
    inner = (one for one in settings.repositories.values() if below(root, one))
    return replace(which, inside=root, outside=tuple(inner))
