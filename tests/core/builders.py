"""Short ways to say what a test is about; everything that is not said is ordinary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from msgspec.structs import replace

from reconciler.core import inventory_file, spec_files
from reconciler.core.actions import Action
from reconciler.core.actual import Actual, Handshake, Identity, Image, Server
from reconciler.core.call import Call, CallState, job_id
from reconciler.core.declared import Specs
from reconciler.core.desired import Desired, Export, Vm, build
from reconciler.core.document import Document, parse
from reconciler.core.errors import Diagnostic
from reconciler.core.inventory import Inventory
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.mark import Mark, argv
from reconciler.core.plan import Plan
from reconciler.core.settings import Appliance, QemuNbd, SecretRef, Settings, VCenter
from reconciler.core.units import Bytes, Port, PortRange, Seconds
from tests.fakes import START

HUB: Final = "hub-a"
ROOT: Final = "/backup"
GIB: Final[Bytes] = 1 << 30
NOW: Final[Seconds] = START


def a_settings(
    ports: str = "10100-10119",
    *,
    max_running: int = 8,
    reports_end: bool = False,
    remembers_jobs: bool = False,
    cache: str | None = None,
    **changes: Any,
) -> Settings:
    """One repository, one SNA, one vCenter."""
    sna = Appliance(
        url="http://127.0.0.1:9081",
        max_running=max_running,
        reports_end=reports_end,
        remembers_jobs=remembers_jobs,
    )
    values: dict[str, Any] = {
        "hub": HUB,
        "state": "/state",
        "repositories": {"local": ROOT},
        "ports": PortRange.parse(ports),
        "qemu_nbd": QemuNbd(cache=cache),
        "snas": {"site-a": sna},
        "vcenters": {"vc1": VCenter(host="vc", user="u", password=SecretRef("env", "P"))},
    }
    return Settings(**{**values, **changes})


def an_export(
    vm: str = "ctx-1", position: int = 0, run: str = "r1", attempt: int = 1, **changes: Any
) -> Export:
    """Disk 2000 at position 0, disk 2001 at position 1 and so on."""
    key = 2000 + position
    values: dict[str, Any] = {
        "vm": vm,
        "key": key,
        "position": position,
        "run": run,
        "attempt": attempt,
        "name": f"{vm}-{run}-disk{position}",
        "image": f"{ROOT}/{vm}/{key}/{run}.qcow2",
        "size": GIB,
    }
    return Export(**{**values, **changes})


def a_vm(name: str = "ctx-1", run: str = "r1", disks: int = 1, **changes: Any) -> Vm:
    """A VM that is to be exported for a backup."""
    values: dict[str, Any] = {
        "name": name,
        "exported": True,
        "repository": "local",
        "root": ROOT,
        "sna": "site-a",
        "display_name": name,
        "path": f"/DC1/vm/{name}",
        "vcenter": "vc1",
        "run": run,
        "exports": tuple(an_export(name, position, run) for position in range(disks)),
        **changes,
    }
    values.setdefault("request", f"{values['display_name']} {values['path']} {values['vcenter']}")
    return Vm(**values)


def absent(name: str = "ctx-1", **changes: Any) -> Vm:
    return Vm(name=name, exported=False, **changes)


def a_restore(name: str = "look", disks: int = 1, source: str = "ctx-1") -> Vm:
    """The run r1 of another VM, to be read."""
    exports = tuple(
        an_export(
            name,
            position,
            image=f"{ROOT}/{source}/{2000 + position}/r1.qcow2",
            name=f"{name}-r1-disk{position}",
            read_only=True,
        )
        for position in range(disks)
    )
    return a_vm(name, exports=exports, purpose="restore", sna="", path="", vcenter="")


def wanting(*vms: Vm, settings: Settings | None = None, **changes: Any) -> Desired:
    return Desired(settings=settings or a_settings(), vms={vm.name: vm for vm in vms}, **changes)


def a_call(vm: Vm | None = None, state: CallState = CallState.ACCEPTED, **changes: Any) -> Call:
    """The ledger's row of a VM's run."""
    vm = vm or a_vm()
    values: dict[str, Any] = {
        "hub": HUB,
        "vm": vm.name,
        "run": vm.run,
        "attempt": 1,
        "state": state,
        "sna": vm.sna,
        "type": vm.type,
        "request": vm.request,
        "exports": vm.exports,
        "created": NOW - 100,
        "changed": NOW - 50,
        **changes,
    }
    return Call(job_id=job_id(HUB, vm.name, values["run"], values["attempt"]), **values)


def a_lease(export: Export | None = None, port: Port = 10100, **changes: Any) -> Lease:
    export = export or an_export()
    values: dict[str, Any] = {
        "hub": HUB,
        "vm": export.vm,
        "disk": export.key,
        "run": export.run,
        "attempt": export.attempt,
        "port": port,
        "since": NOW - 100,
        "started": True,
    }
    return Lease(**{**values, **changes})


def a_server(export: Export | None = None, port: Port = 10100, **changes: Any) -> Server:
    """A server that runs as it should and answers."""
    export = export or an_export()
    mark = Mark(HUB, export.vm, export.key, export.run, export.attempt, port)
    values: dict[str, Any] = {
        "identity": Identity(4000 + port % 100, 1),
        "argv": argv(export, port, HUB, QemuNbd()),
        "mark": mark,
        "handshake": Handshake(export.size),
    }
    return Server(**{**values, **changes})


def an_image(export: Export | None = None, **changes: Any) -> Image:
    """An image as it is right after its creation."""
    export = export or an_export()
    values: dict[str, Any] = {
        "path": export.image,
        "exists": True,
        "format": "qcow2",
        "size": export.size or GIB,
        "backing": export.backing,
        "pristine": True,
    }
    return Image(**{**values, **changes})


def seen(servers: Iterable[Server] = (), images: Iterable[Image] = (), **changes: Any) -> Actual:
    return Actual(servers=tuple(servers), images={image.path: image for image in images}, **changes)


def remembered(leases: Iterable[Lease] = (), calls: Iterable[Call] = (), **changes: Any) -> Ledger:
    return Ledger(hub=HUB, state_id="state-1", leases=tuple(leases), calls=tuple(calls), **changes)


def brief(found: Plan | Iterable[Action]) -> list[tuple[str, int | None, str]]:
    """(kind, disk key, cause) of each action."""
    actions = found.actions if isinstance(found, Plan) else found
    return [(action.kind, action.disk, action.cause) for action in actions]


def only(found: Plan | Iterable[Action]) -> Action:
    """The one action."""
    actions = found.actions if isinstance(found, Plan) else tuple(found)
    (action,) = actions
    return action


def document(text: str, file: str = "vms.yaml") -> Document:
    """A text that can be read."""
    found, wrong = parse(text, file)
    assert not wrong, [str(one) for one in wrong]
    assert found is not None
    return found


def read(*texts: str) -> Specs:
    """Specs from files a.yaml, b.yaml and so on."""
    return spec_files.read([document(text, f"{chr(97 + n)}.yaml") for n, text in enumerate(texts)])


def known(text: str) -> Inventory:
    """An inventory that can be read."""
    found, wrong = inventory_file.read(document(text, "inventory.yaml"))
    assert found is not None, wrong
    return found


def desired(
    text: str,
    have: Inventory | str | None = None,
    *,
    settings: Settings | None = None,
    ledger: Ledger | None = None,
) -> Desired:
    """What a spec comes to."""
    knows = known(have) if isinstance(have, str) else have
    return build(read(text), knows, settings or a_settings(), ledger or remembered())


def lines(diagnostics: Iterable[Diagnostic]) -> list[str]:
    """`line:column severity: summary` of each."""
    return [
        (f"{one.place.line}:{one.place.column} " if one.place else "")
        + f"{one.severity}: {one.summary}"
        for one in diagnostics
    ]


def says(text: str, *words: str) -> None:
    """Every one of the words is in the text."""
    missing = [word for word in words if word not in text]
    assert not missing, f"{text!r} does not say {missing}"


def changed(vm: Vm, **changes: Any) -> Vm:
    """The same VM, its first disk changed."""
    first, *rest = vm.exports
    return replace(vm, exports=(replace(first, **changes), *rest))


def told(call: Call | None) -> Mapping[str, Any]:
    """State and reason of a call."""
    return {} if call is None else {"state": call.state, "reason": call.reason}
