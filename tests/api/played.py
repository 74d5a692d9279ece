"""The API over a real store and real requests, with a desk that plays the daemon's part.

Nothing is started: what a daemon would have brought up is written into the store. The application
is asked without a network.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
from msgspec.structs import replace

from reconciler.api.about import ourselves
from reconciler.api.app import create_app
from reconciler.api.gate import WHO
from reconciler.asking import Desk
from reconciler.core.call import Call, CallEvent, due_call, targets
from reconciler.core.disk_plan import export_key
from reconciler.core.ledger import Archived, Lease
from reconciler.core.settings import Settings
from reconciler.host.store import Store
from reconciler.host.store.inbox import Inbox
from reconciler.loop import desire
from tests.core.builders import HUB, a_settings

BACKUPS: Final = "/api/v1/backups"
PORT: Final = 10100
PID: Final = 4711


class Answer(NamedTuple):
    status: int
    body: Any
    headers: Mapping[str, str]


class PlayedDesk(Desk):
    """As the daemon's: what is asked for is up at once, or not at all."""

    starts = ""
    up = True
    """Whether servers start."""
    waits = ""
    """What keeps a run from going on."""

    def __init__(self, settings: Callable[[], Settings], store: Store, now: Callable[[], float]):
        super().__init__(settings, {}, lambda _: None)
        self.store, self.now = store, now

    def standing(self, _call: Call) -> str:
        return self.waits

    def asked(self, vm: str) -> None:
        if self.up:
            self.bring_up(vm)

    def bring_up(self, name: str) -> None:
        """A VM's ports are leased, and its servers answer."""
        source, ledger = self.source(), self.store.ledger()
        vm = desire(source, self.settings)(ledger).vms[name]
        call = due_call(HUB, vm, self.now(), "reconciler watch")
        first = PORT + len(ledger.leases)
        leases = [
            Lease(
                hub=HUB,
                vm=one.vm,
                disk=one.key,
                run=one.run,
                attempt=one.attempt,
                port=first + one.position,
                since=self.now(),
            )
            for one in vm.exports
        ]
        self.store.apply(self.settings.to_json(), {name: vm.to_json()}, self.now())
        self.store.hold(leases, call)
        self.store.started(leases, self.now())

    def pids(self, calls: Sequence[Call]) -> Mapping[tuple[str, str, int], Mapping[int, int]]:
        return {
            call.key: {export.key: PID + export.position for export in call.exports}
            for call in calls
        }


class Played:
    """A hub with an inventory, and its API."""

    def __init__(self, folder: Path, *, plain: bool = False, **changes: Any) -> None:
        """`plain`: the desk is that of a process that starts nothing."""
        self.folder = folder
        self.clock = 1_800_000_000.0
        self.settings = a_settings(
            state=str(folder / "state"),
            repositories={"local": str(folder / "repository"), "far": str(folder / "far")},
            inventory=str(folder / "inventory.yaml"),
            **changes,
        )
        (folder / "state").mkdir()
        self.specs: dict[str, Any] = {"defaults": {"repository": "local"}}
        self.store = Store(folder / "state", HUB)
        self.inbox = Inbox(folder / "state")
        self.kicked: list[str] = []
        self.said: list[str] = []
        self.played = PlayedDesk(lambda: self.settings, self.store, self.now)
        self.desk = Desk(lambda: self.settings, {}, self.kicked.append) if plain else self.played
        self.closing = False
        self.app = create_app(
            self.inbox,
            ourselves(HUB, self.settings.state, "reconciler test"),
            self.kicked.append,
            self.said.append,
            desk=self.desk,
            closing=lambda: self.closing,
        )
        self.who = ""
        self.loop = asyncio.Runner()
        self.client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self._known), base_url="http://hub"
        )

    async def _known(self, scope: Any, receive: Any, send: Any) -> None:
        """As the guard would have it who knows who asks."""
        await self.app({**scope, **({WHO: self.who} if self.who else {})}, receive, send)

    def close(self) -> None:
        self.loop.run(self.client.aclose())
        self.loop.close()
        self.inbox.close()
        self.played.close()
        self.desk.close()
        self.store.close()

    def now(self) -> float:
        """Later each time."""
        self.clock += 1.0
        return self.clock

    def knows(self, **vms: Mapping[str, Any]) -> None:
        """What the inventory knows: `ctx_1={"name": "pgtest1", "disks": {2000: "1MiB"}}`."""
        known = {
            vm.replace("_", "-"): {
                "vm": {"path": f"/DC/{vm}", "vcenter": "vc1", "name": one.get("name")},
                "disks": [{"key": key, "size": size} for key, size in one["disks"].items()],
            }
            for vm, one in vms.items()
        }  # fmt: skip
        (self.folder / "inventory.yaml").write_text(json.dumps({"vms": known}))

    def declares(self, *vms: Mapping[str, Any]) -> None:
        (self.folder / "specs").mkdir(exist_ok=True)
        text = json.dumps({"vms": [{"repository": "local", **vm} for vm in vms]})
        (self.folder / "specs" / "vms.yaml").write_text(text)

    # -- asking

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        heads = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self.loop.run(
            self.client.request(method, path, content=content, headers=heads, timeout=60)
        )
        kind = answer.headers.get("content-type", "")
        found = answer.json() if kind.startswith("application/json") else answer.text
        return Answer(answer.status_code, found, answer.headers)

    def get(self, path: str = "", **headers: str) -> Answer:
        return self.ask("GET", f"{BACKUPS}{path}", **headers)

    def start(self, vm: str = "ctx-1", key: str = "", **changes: Any) -> Answer:
        body = {"vm_name": vm, "backup_type": "full", "repository_id": "local", **changes}
        body = {name: value for name, value in body.items() if value is not ...}
        return self.ask("POST", BACKUPS, body, **({"Idempotency_Key": key} if key else {}))

    # -- what the daemon does meanwhile

    def call(self, job: str) -> Call:
        return next(call for call in self.store.ledger().calls if call.job_id == job)

    def step(self, job: str, *events: CallEvent, **changes: Any) -> None:
        """Steps of a call; at its end its ports are given back."""
        for event in events:
            call = self.call(job)
            leases = {one.disk: one for one in self.store.ledger().of(call.vm)}
            more = dict(changes)
            if event is CallEvent.INTEND:
                ports = {key: lease.port for key, lease in leases.items()}
                more["targets"] = targets(call.exports, ports, "127.0.0.1")
            after = self.store.advance(call, event, self.now(), **more)
            if after.state.terminal:
                self.store.release([one for one in leases.values() if one.run == call.run])

    def accepted(self, job: str) -> None:
        self.step(job, CallEvent.INTEND, CallEvent.ACCEPT)

    def completed(self, job: str, allocated: int = 4096) -> None:
        """As a pass would end it whose every disk was reported."""
        call = self.call(job)
        kept = [
            Archived(job_id=job, position=one.position, size=one.size or 0, allocated=allocated,
                     digest="", at=self.now())
            for one in call.exports
        ]  # fmt: skip
        after = self.store.advance(call, CallEvent.END, self.now(), archived=kept)
        leases = {export_key(one) for one in after.exports}
        self.store.release([one for one in self.store.ledger().leases if one.key in leases])

    def past(self, vm: str, run: str, *events: CallEvent, **changes: Any) -> Call:
        """A run of long ago, straight in the ledger."""
        from tests.host.test_inbox import a_call

        call = replace(a_call(vm, run, hub=HUB, created=self.now(), changed=self.clock), **changes)
        self.store.hold([], call)
        for event in events:
            call = self.store.advance(call, event, self.now())
        return call
