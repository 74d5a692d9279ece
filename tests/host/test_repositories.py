"""What a look asks of which repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler import repositories
from reconciler.core.actual import Identity, Server
from reconciler.core.call import CallState
from reconciler.core.desired import Desired, Vm
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Settings
from reconciler.host import images, patience, proc
from tests.core.builders import a_call, a_server, a_settings, a_vm, an_export, remembered, wanting

MIB = 1 << 20


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return a_settings(repositories={n: str(tmp_path / n) for n in ("near", "far")})


def vm_in(settings: Settings, repository: str, name: str = "ctx-1", run: str = "r1") -> Vm:
    root = settings.repositories[repository]
    export = an_export(name, run=run, image=f"{root}/{name}/2000/{run}.qcow2", size=MIB)
    return a_vm(name, run, repository=repository, root=root, exports=(export,))


def look(
    settings: Settings, *vms: Vm, ledger: Ledger | None = None, servers: tuple[Server, ...] = ()
) -> repositories.Found:
    desired: Desired = wanting(*vms, settings=settings)
    return repositories.look(settings, desired, ledger or remembered(), servers)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The roots that are asked anything."""
    found: set[str] = set()
    ask = patience.ask

    def noted(questions: dict[str, list[object]]) -> object:
        found.update(questions)
        return ask(questions)  # type: ignore[arg-type]

    monkeypatch.setattr(patience, "ask", noted)
    return found


def test_a_vm_asks_its_own_repository_alone(settings: Settings, asked: set[str]) -> None:
    vm = vm_in(settings, "near")
    server = a_server(vm.exports[0])
    look(settings, vm, servers=(server,))
    assert asked == {settings.repositories["near"]}


def test_a_server_whose_image_is_in_no_repository_may_be_claimed_in_any(
    settings: Settings, asked: set[str], tmp_path: Path
) -> None:
    vm = vm_in(settings, "near")
    image = str(tmp_path / "moved" / "r0.qcow2")
    look(settings, vm, servers=(a_server(an_export(run="r0", image=image)),))
    assert asked == {*settings.repositories.values(), str(tmp_path / "moved")}


def test_the_images_of_an_ended_run_are_looked_at_though_the_spec_names_other_disks(
    settings: Settings,
) -> None:
    before = vm_in(settings, "near")
    export = before.exports[0]
    images.create(export.image, MIB, before.root)
    other = replace(export, key=2001, image=export.image.replace("2000", "2001"))
    ledger = remembered(calls=[a_call(before, CallState.COMPLETED)])
    found = look(settings, replace(before, exports=(other,)), ledger=ledger)
    assert found.images[export.image].exists


def test_the_image_of_an_active_run_is_where_it_is_and_not_where_the_spec_is_now(
    settings: Settings,
) -> None:
    before = vm_in(settings, "near")
    export = before.exports[0]
    images.create(export.image, MIB, before.root)
    found = look(settings, vm_in(settings, "far"), ledger=remembered(calls=[a_call(before)]))
    assert found.images[export.image].outside is None
    assert found.images[export.image].format == "qcow2"


def test_the_space_of_other_runs_is_asked_where_somebody_wants_some(
    settings: Settings, asked: set[str]
) -> None:
    vm, other = vm_in(settings, "near"), vm_in(settings, "near", "ctx-2", "r2")
    away = vm_in(settings, "far", "ctx-3")
    ended = vm_in(settings, "near", "ctx-2", "r1")
    for one in (other, away, ended):
        images.create(one.exports[0].image, MIB, one.root)
    calls = [a_call(other), a_call(away), a_call(ended, CallState.COMPLETED)]
    found = look(settings, vm, ledger=remembered(calls=calls))
    assert found.others.keys() == {other.exports[0].image, ended.exports[0].image}
    assert asked == {vm.root}
    device = os.stat(vm.root).st_dev
    assert {one.device for one in found.others.values()} == {device}
    assert found.file_systems.keys() == {device}
    assert all(one.allocated > 0 for one in found.others.values())


def test_a_server_that_has_another_file_open_is_found(settings: Settings) -> None:
    vm = vm_in(settings, "near")
    export = vm.exports[0]
    images.create(export.image, MIB, vm.root)
    me = proc.identify(os.getpid())
    assert me is not None
    with open(export.image, "rb"):
        server = a_server(export, identity=me)
        assert look(settings, vm, servers=(server,)).detached == set()
        os.rename(export.image, f"{export.image}.away")
        assert look(settings, vm, servers=(server,)).detached == {me}
    other = a_server(an_export("ctx-9", image=export.image), identity=Identity(me.pid, 1))
    assert look(settings, vm, servers=(other,)).detached == set()  # out of scope


def test_claims_and_intents_are_found(settings: Settings) -> None:
    vm = vm_in(settings, "near")
    owner = images.Owner("state-9", "/var/lib/nine")
    images.claim(vm.root, vm.name, vm.run, owner)
    assert look(settings, vm).owners == {("ctx-1", "r1"): owner}
    due = remembered(calls=[a_call(vm, CallState.DUE)])
    assert look(settings, vm, ledger=due).intents == set()
    images.intend(vm.root, vm.name, vm.run, 1, "job")
    assert look(settings, vm, ledger=due).intents == {("ctx-1", "r1", 1)}
    accepted = remembered(calls=[a_call(vm)])
    assert look(settings, vm, ledger=accepted).intents == set()
    os.unlink(images.claim_path(vm.root, vm.name, vm.run))
    os.mkdir(images.claim_path(vm.root, vm.name, vm.run))
    assert "cannot read the claim" in look(settings, vm).troubles["ctx-1"]
