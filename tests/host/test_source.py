"""The watched directory on a real file system: bad commits destroy nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler import inventories
from reconciler.core.call import CallEvent, CallState
from reconciler.core.errors import HostError
from reconciler.core.plan import plan
from reconciler.core.settings import Limit
from reconciler.core.status import by_type, conditions
from reconciler.host import files
from reconciler.host.git import Commit
from reconciler.host.store import events
from reconciler.orders import Approve
from reconciler.source import Source
from tests.core.builders import a_call, a_lease, a_server, brief, says, seen
from tests.host.watched import Site, spec, vm


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    found.close()


@pytest.fixture
def pruning(tmp_path: Path) -> Iterator[Site]:
    """A site that removes what is gone."""
    found = Site(tmp_path, prune=True)
    yield found
    found.close()


BROKEN: dict[str, str | bytes] = {
    "half-written": spec("ctx-1")[:-30],
    "binary garbage": os.urandom(512) + b"\xff\x00",
    "empty": "",
    "cut before the first key": "vm",
    "a template that fails": "vms:\n  - {name: '{{ nothing }}', state: absent}\n",
    "a loop that fails": "vms:\n  - {loop: '{{ nothing }}', name: ctx-1}\n",
    "conflict": "<<<<<<< HEAD\n" + spec("ctx-1"),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_read_keeps_its_vms(pruning: Site, text: str | bytes) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2"), "b.yaml": spec("ctx-3")})
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    site.write({"a.yaml": text, "b.yaml": spec("ctx-3", "ctx-4", run="r2")})
    for _ in range(3):  # however often it is read
        vms = site.apply()
        assert {name: one.run for name, one in vms.items()} == {
            "ctx-1": "r1",
            "ctx-2": "r1",
            "ctx-3": "r2",  # everything else goes on
            "ctx-4": "r2",
        }
    assert site.held() == {"ctx-1": "SourceUnreadable", "ctx-2": "SourceUnreadable"}
    says(site.message("ctx-1"), str(site.specs / "a.yaml"))
    site.watch()  # the daemon starts anew, and knows it from the store alone
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3", "ctx-4"}
    site.write({"a.yaml": spec("ctx-1", run="r2")})
    assert site.apply()["ctx-1"].run == "r2"
    assert site.held() == {"ctx-2": "Unconfirmed"}


def test_a_vm_with_an_error_is_kept_and_its_neighbours_go_on(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    site.write({"a.yaml": "vms:\n" + vm("ctx-1", "r2") + "  - {name: ctx-2, disk: []}\n"})
    vms = site.apply()
    assert (vms["ctx-1"].run, vms["ctx-2"].run) == ("r2", "r1")
    says(site.message("ctx-2"), "a.yaml:3:", "disk")
    assert site.held() == {"ctx-2": "SourceUnreadable"}


def test_an_error_that_only_the_ledger_can_mend_is_looked_at_again(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1")})
    vms = site.apply()
    look = "vms: [{name: look, for: restore, of: {vm: ctx-1, run: r1}}]\n"
    site.write({"a.yaml": spec("ctx-1", run="r2"), "b.yaml": look})
    assert site.exported() == {"ctx-1"}
    site.store.hold([], a_call(vms["ctx-1"], CallState.DUE))
    (call,) = site.ledger().runs("ctx-1")
    for step in (CallEvent.INTEND, CallEvent.ACCEPT, CallEvent.END):
        call = site.store.advance(call, step, site.now)
    assert site.exported() == {"ctx-1", "look"}


def test_what_was_never_applied_is_a_diagnostic(site: Site) -> None:
    site.write({"a.yaml": "vms:\n  - {name: ctx-2, disk: []}\n"})
    assert site.apply() == {}
    assert site.held() == {}
    assert site.reading is not None
    assert site.reading.diagnostics


@pytest.mark.parametrize("what", ["an image", "a vCenter path"])
def test_two_vms_that_clash_both_stay(site: Site, what: str) -> None:
    """Neither sees the other when it is read alone."""
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    other = vm("ctx-2").replace("vm/ctx-2", "vm/ctx-1")
    if what == "an image":
        other = vm("ctx-2").replace("key: 2000", "key: 2000, image: ctx-1/2000/r1.qcow2")
    site.write({"b.yaml": "vms:\n" + other})
    assert site.exported() == {"ctx-1"}
    assert site.held() == {"ctx-1": "SourceUnreadable"}


def test_a_vm_that_moved_out_of_a_file_that_cannot_be_read_waits(site: Site) -> None:
    """The file may still declare it: then it would be declared twice."""
    site.write({"a.yaml": spec("ctx-1"), "b.yaml": spec("ctx-2")})
    site.exported()
    site.write({"a.yaml": "half", "b.yaml": spec("ctx-2", "ctx-1", run="r2")})
    for _ in range(3):
        vms = site.apply()
        assert (vms["ctx-1"].run, vms["ctx-2"].run) == ("r1", "r2")
    site.write({"a.yaml": "vms: []\n"})
    assert site.apply()["ctx-1"].run == "r2"
    assert site.held() == {}


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe that nobody writes into": lambda d: os.mkfifo(d / "b.yaml"),
    "a symlink to nothing": lambda d: (d / "b.yaml").symlink_to("nowhere"),
    "a symlink to itself": lambda d: (d / "b.yaml").symlink_to("b.yaml"),
    "a device": lambda d: (d / "b.yaml").symlink_to("/dev/zero"),
    "a name that is no text": lambda d: (Path(os.fsdecode(os.fsencode(d) + b"/\xff.yaml"))).touch(),
    "a folder whose name is no text": lambda d: os.mkdir(os.fsencode(d) + b"/\xff"),
}


@pytest.mark.parametrize("act", ODD.values(), ids=ODD.keys())
def test_an_odd_file_is_told_and_hurts_nobody(pruning: Site, act: Callable[[Path], object]) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    act(site.specs)
    site.write({"a.yaml": spec("ctx-1", run="r2")})
    for _ in range(3):
        vms = site.apply()
        assert (vms["ctx-1"].run, vms["ctx-2"].run) == ("r2", "r1")
    assert site.held() == {"ctx-2": "SourceUnreadable"}  # it may be declared there
    assert site.ledger().source["unread"]


def test_folders_may_be_deeper_than_pythons_stack(site: Site) -> None:
    at = os.open(site.specs, os.O_RDONLY)
    for _ in range(1_200):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    try:
        site.write({"d/d/a.yaml": spec("ctx-1")})
        assert site.exported() == {"ctx-1"}
    finally:
        subprocess.run(["rm", "-rf", str(site.specs)], check=True)  # Python's own cannot


def test_one_of_fifty_files_is_broken(pruning: Site) -> None:
    site = pruning
    names = [f"ctx-{n}" for n in range(50)]
    site.write({f"{name}.yaml": spec(name) for name in names})
    assert site.exported() == set(names)
    assert site.source.parsed == 50
    site.write({f"{name}.yaml": spec(name, run="r2") for name in names})
    site.write({"ctx-7.yaml": spec("ctx-7", run="r2")[:-9]})
    vms = site.apply()
    assert {name for name, one in vms.items() if one.run == "r2"} == set(names) - {"ctx-7"}
    assert site.held() == {"ctx-7": "SourceUnreadable"}


def test_a_folder_that_cannot_be_looked_into_keeps_its_vms(
    pruning: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1"), "sub/b.yaml": spec("ctx-2")})
    site.exported()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path == str(site.specs / "sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)  # root may look into every real one
    assert site.exported() == {"ctx-1", "ctx-2"}
    assert site.exported() == {"ctx-1", "ctx-2"}
    assert site.held() == {"ctx-2": "SourceUnreadable"}
    says(site.message("ctx-2"), "sub", "Permission denied")


# -- the directory as a whole


def emptied(site: Site) -> None:
    for one in site.specs.iterdir():
        one.unlink()


def gone(site: Site) -> None:
    shutil.rmtree(site.specs)


def dangling(site: Site) -> None:
    shutil.rmtree(site.specs)
    site.specs.symlink_to("nowhere")


def a_file(site: Site) -> None:
    shutil.rmtree(site.specs)
    site.specs.touch()


GONE = [emptied, gone, dangling, a_file]


@pytest.mark.parametrize("act", GONE)
def test_a_directory_that_is_not_believed_changes_nothing(
    pruning: Site, act: Callable[[Site], None]
) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    before = site.apply()
    revision = site.ledger().source["revision"]
    act(site)
    for _ in range(3):
        assert site.apply() == before
    site.watch()
    assert site.apply() == before
    assert set(site.held().values()) == {"EmptySource"}
    assert site.ledger().source["revision"] == revision  # what holds is what was read last
    assert site.ledger().source["unread_since"]
    if site.specs.is_symlink() or site.specs.is_file():
        site.specs.unlink()
    site.write({"a.yaml": spec("ctx-1", "ctx-2", run="r2")})
    assert {one.run for one in site.apply().values()} == {"r2"}  # it is back
    assert site.held() == {}
    assert not site.ledger().source["unread_since"]


def test_an_empty_directory_may_be_meant_once(pruning: Site) -> None:
    """Then what is gone is still removed by the rules only: two readings, and not too many."""
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2", "ctx-3")})
    site.exported()
    emptied(site)
    site.watch(allow_empty=True)
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    assert set(site.held().values()) == {"Unconfirmed"}
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    assert set(site.held().values()) == {"TooMany"}
    site.write({"a.yaml": spec("ctx-1", "ctx-2", "ctx-3")})
    site.exported()
    emptied(site)
    site.exported()
    assert set(site.held().values()) == {"EmptySource"}  # it was meant once


def test_a_missing_directory_is_never_meant(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    shutil.rmtree(site.specs)
    site.watch(allow_empty=True)
    assert site.exported() == {"ctx-1"}
    assert site.held() == {"ctx-1": "EmptySource"}


def test_a_directory_that_comes_later_is_read_then(site: Site) -> None:
    shutil.rmtree(site.specs)
    assert site.apply() == {}
    site.write({"a.yaml": spec("ctx-1")})
    assert site.exported() == {"ctx-1"}


def test_a_swapped_symlink_is_one_reading(tmp_path: Path) -> None:
    """As git-sync does it. File names stay what they are below the link."""
    site = Site(tmp_path)
    shutil.rmtree(site.specs)
    for revision, run in (("rev-1", "r1"), ("rev-2", "r2")):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "a.yaml").write_text(spec("ctx-1", "ctx-2", run=run))
    site.specs.symlink_to("rev-1")
    assert {one.run for one in site.apply().values()} == {"r1"}
    (tmp_path / "next").symlink_to("rev-2")
    os.replace(tmp_path / "next", site.specs)
    assert {one.run for one in site.apply().values()} == {"r2"}
    assert {one.file for one in site.ledger().declared.values()} == {"a.yaml"}
    site.close()


# -- removal


def test_what_is_gone_stays_where_removal_is_not_wanted(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    site.write({"a.yaml": spec("ctx-1")})
    for _ in range(3):
        assert site.exported() == {"ctx-1", "ctx-2"}
    assert site.held() == {"ctx-2": "PruneDisabled"}
    says(site.message("ctx-2"), "reconciler stop ctx-2", "prune: true")
    assert site.reading is not None
    assert site.reading.again is None


def test_what_is_gone_is_removed_after_two_equal_readings(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2", "ctx-3")})
    site.exported()
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    assert site.held() == {"ctx-3": "Unconfirmed"}
    assert site.reading is not None
    assert site.reading.again == site.now + 2
    assert site.exported(1.9) == {"ctx-1", "ctx-2", "ctx-3"}  # too soon
    vms = site.apply(0.1)
    assert not vms["ctx-3"].exported
    assert vms["ctx-3"].order == "no spec declares it any more"
    assert site.held() == {}
    site.apply()
    assert set(site.ledger().declared) == {"ctx-1", "ctx-2"}  # nothing is left of it
    assert set(site.apply()) == {"ctx-1", "ctx-2"}


def test_another_reading_in_between_begins_anew(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2", "ctx-3")})
    site.exported()
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    site.write({"b.yaml": "half"})
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    assert site.held() == {"ctx-3": "SourceUnreadable"}
    site.write({"b.yaml": None})
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    assert site.held() == {"ctx-3": "Unconfirmed"}
    assert site.exported() == {"ctx-1", "ctx-2"}


def test_a_restart_in_between_counts_what_was_read_before(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2", "ctx-3")})
    site.exported()
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    site.watch()
    assert site.exported() == {"ctx-1", "ctx-2"}


def test_too_many_are_held_until_exactly_that_revision_is_approved(pruning: Site) -> None:
    """30 of 100 VMs deleted in one commit."""
    site = pruning
    names = [f"ctx-{n}" for n in range(100)]
    site.write({f"{name}.yaml": spec(name) for name in names})
    site.exported()
    site.write({f"{name}.yaml": None for name in names[:30]})
    for _ in range(3):
        assert site.exported() == set(names)
    assert site.held() == dict.fromkeys(sorted(names[:30]), "TooMany")
    assert site.reading is not None
    revision = site.reading.revision.name
    says(site.message("ctx-1"), "30 of 100", "at most 25", f"reconciler approve {revision}")
    with pytest.raises(HostError) as refusal:
        Approve(revision="0123456789ab").carry_out(site.store, "me", site.now, site.eyes)
    says(str(refusal.value), revision, "30 VMs")
    for guess in ("", revision[:3]):
        with pytest.raises(HostError):
            Approve(revision=guess).carry_out(site.store, "me", site.now, site.eyes)
    Approve(revision=revision, reason="moved").carry_out(site.store, "me", site.now, site.eyes)
    site.write({"ctx-30.yaml": None})  # another revision: it is not what was approved
    site.exported()
    assert site.exported() == set(names)
    assert "approved" not in site.ledger().source
    assert site.reading.revision.name != revision
    Approve(revision=site.reading.revision.digest).carry_out(site.store, "me", site.now, site.eyes)
    assert site.exported() == set(names[31:])
    assert site.held() == {}
    assert [one.reason for one in events(site.state, "", 3)].count("Approved")
    site.write({"ctx-31.yaml": None, "ctx-32.yaml": None})
    site.exported()
    assert site.exported() == set(names[33:])
    with pytest.raises(HostError, match="no revision waits"):
        Approve(revision=revision).carry_out(site.store, "me", site.now, site.eyes)


def test_a_number_may_be_the_cap(tmp_path: Path) -> None:
    site = Site(tmp_path, prune=True, max_delete=Limit(count=1))
    site.write({"a.yaml": spec("ctx-1", "ctx-2", "ctx-3")})
    site.exported()
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    assert site.exported() == {"ctx-1", "ctx-2", "ctx-3"}
    site.close()


def test_only_what_the_directory_declared_is_removed(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    vms = site.apply()
    by_hand = {**vms["ctx-2"].to_json(), "name": "ctx-9", "place": "/elsewhere/x.yaml:1:1"}
    site.store.apply(site.settings.to_json(), {"ctx-9": by_hand}, site.now)
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    vms = site.apply()
    assert not vms["ctx-2"].exported
    assert "ctx-9" not in vms


def test_a_vm_under_another_name_is_not_removed(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    vms = site.apply()
    lease = a_lease(vms["ctx-2"].exports[0])
    site.store.hold([lease], None)
    renamed = vm("new").replace("vm/new", "vm/ctx-2")
    site.write({"a.yaml": "vms:\n" + vm("ctx-1") + renamed})
    site.exported()
    assert site.exported() == {"ctx-1", "ctx-2", "new"}
    assert site.held() == {"ctx-2": "Renamed"}
    assert site.reading is not None
    desired = site.reading.desired(site.ledger())
    planned = plan(desired, seen(), site.ledger(), site.now)
    by_name = {one.name: [action.cause for action in one.actions] for one in planned.vms}
    assert by_name["new"] == ["Renamed"]


@pytest.mark.parametrize("why", ["protected", "in use", "its run is active"])
def test_what_may_not_be_stopped_is_held_by_the_planner(pruning: Site, why: str) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1") + vm("ctx-2", protect=str(why == "protected").lower())})
    vms = site.apply()
    export = vms["ctx-2"].exports[0]
    site.store.hold([a_lease(export)], a_call(vms["ctx-2"], CallState.DUE))
    if why == "its run is active":
        call = next(iter(site.ledger().runs("ctx-2")))
        call = site.store.advance(call, CallEvent.INTEND, site.now)
        site.store.advance(call, CallEvent.ACCEPT, site.now)
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    assert site.exported() == {"ctx-1"}
    server = a_server(export, clients=2 if why == "in use" else 0)
    cause = {"protected": "Protected", "in use": "InUse"}.get(why, "RunActive")
    for _ in range(2):  # it stays to be removed
        site.apply()
        assert site.reading is not None
        ledger = site.ledger()
        desired, actual = site.reading.vm("ctx-2", ledger), seen([server])
        planned = plan(desired, actual, ledger, site.now)
        assert brief(planned) == [("hold", 2000, cause)]
        (one,) = planned.vms
        held = by_type(conditions(one, actual, ledger))["PruneHeld"]
        assert (held.status, held.reason) == ("True", cause)


def test_a_vm_that_is_written_again_is_not_removed(pruning: Site) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    assert site.ledger().declared["ctx-2"].gone
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    assert site.exported() == {"ctx-1", "ctx-2"}
    assert not site.ledger().declared["ctx-2"].gone


def test_a_run_that_changes_while_the_old_one_is_active_waits(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1")})
    vms = site.apply()
    export = vms["ctx-1"].exports[0]
    site.store.hold([a_lease(export)], a_call(vms["ctx-1"], CallState.DUE))
    (call,) = site.ledger().runs("ctx-1")
    call = site.store.advance(call, CallEvent.INTEND, site.now)
    site.store.advance(call, CallEvent.ACCEPT, site.now)
    site.write({"a.yaml": spec("ctx-1", run="r2")})
    assert site.apply()["ctx-1"].run == "r2"
    assert site.reading is not None
    ledger = site.ledger()
    planned = plan(site.reading.vm("ctx-1", ledger), seen([a_server(export)]), ledger, site.now)
    assert [cause for kind, _, cause in brief(planned) if kind == "wait"] == ["RunActive"]
    assert not [kind for kind, *_ in brief(planned) if kind in ("stop", "call", "release")]


# -- inventory and requests


def test_without_its_inventory_what_has_begun_goes_on_and_nothing_begins(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.yaml"
    good = "vms:\n  ctx-1: {vm: {path: /DC1/vm/x}, disks: [{key: 2000, size: 1GiB}]}\n"
    inventory.write_text(good)
    site = Site(tmp_path)
    site.settings = replace(site.settings, inventory=str(inventory))
    site.watch()
    asks = "vms:\n  - {name: ctx-1, disks: inventory, backup: {run: RUN}}\n"
    site.write({"a.yaml": asks.replace("RUN", "r1"), "b.yaml": spec("ctx-2")})
    vms = site.apply()
    export = vms["ctx-1"].exports[0]
    site.store.hold([a_lease(export)], a_call(vms["ctx-1"], CallState.DUE))
    (call,) = site.ledger().runs("ctx-1")
    site.store.advance(call, CallEvent.INTEND, site.now)

    def planned() -> list[tuple[str, int | None, str]]:
        ledger = site.ledger()
        assert site.reading is not None
        desired = site.reading.desired(ledger)
        return brief(plan(desired, seen([a_server(export)]), ledger, site.now))

    inventory.write_text("vms: [")
    for restarted in (False, True):  # the last good answer survives a restart
        if restarted:
            inventories.forget()
            site.watch()
        vms = site.apply()
        assert vms["ctx-1"].exports == (export,)
        assert ("refuse", None, "InventoryStale") in planned()  # ctx-2
        assert not {kind for kind, *_ in planned()} & {"create", "start", "call", "stop"}
        told = site.ledger().source["inventory"]
        assert told["since"]
        says(told["error"], "inventory.yaml:2:1: cannot read")
    inventory.write_text(good)
    site.apply()
    assert site.ledger().source["inventory"]["error"] == ""
    assert ("create", 2000, "ImageMissing") in planned()
    site.close()


def test_an_inventory_that_was_never_read_gives_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.settings = replace(site.settings, inventory=str(tmp_path / "inventory.yaml"))
    site.watch()
    site.write({"a.yaml": "vms:\n  - {name: ctx-1, disks: inventory, backup: {run: r1}}\n"})
    assert site.apply() == {}
    assert site.reading is not None
    found = "\n".join(str(one) for one in site.reading.desired(site.ledger()).diagnostics)
    says(found, "VM ctx-1: its disks come from the inventory", "it was never read", "No such file")
    site.close()


def test_what_backup_asks_for_is_read_beside_it(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    requests = Path(site.settings.requests)
    requests.mkdir()
    (requests / "ctx-1.yaml").write_text("runs: [{vm: ctx-1, run: r2}]\n")
    reading = site.read()
    assert reading.changed
    assert site.apply()["ctx-1"].run == "r2"
    (requests / "ctx-1.yaml").write_text("runs: [{vm")
    assert site.apply()["ctx-1"].run == "r2"
    assert site.held() == {"ctx-1": "SourceUnreadable"}


# -- what a reading costs, and when it is one


@pytest.mark.parametrize("many", [500, pytest.param(5_000, marks=pytest.mark.soak)])
def test_of_many_files_only_the_changed_is_parsed(site: Site, many: int) -> None:
    names = [f"ctx-{n}" for n in range(many)]
    for name in names:
        (site.specs / f"{name}.yaml").write_text(f"vms: [{{name: {name}, state: absent}}]\n")
    reading = site.read()
    assert (site.source.parsed, len(reading.vms)) == (many, many)
    before = {name: reading.digest_of(name) for name in reading.vms}
    assert not site.read().changed
    site.write({"ctx-77.yaml": "vms: [{name: ctx-77, state: absent, protect: true}]\n"})
    reading = site.read()
    assert site.source.parsed == many + 1
    assert reading.changed
    assert [n for n in names if reading.digest_of(n) != before[n]] == ["ctx-77"]
    assert reading.vm("ctx-77", site.ledger()).vms["ctx-77"].protect


def test_a_file_that_is_only_touched_is_not_parsed_again(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1")})
    site.read()
    os.utime(site.specs / "a.yaml")
    assert not site.read().changed
    assert site.source.parsed == 1


def test_nothing_is_written_down_twice(site: Site) -> None:
    site.write({"a.yaml": spec("ctx-1")})
    site.apply()
    reading = site.source.read(site.ledger(), site.now + 99)
    assert not reading.changed
    assert not reading.note(site.store, "test", site.now + 99)


def test_the_same_size_within_a_tick_is_seen(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is young when it is read is read once more: its signature may not tell."""
    site.write({"a.yaml": spec("ctx-1", run="r1")})
    frozen = files.signature(str(site.specs / "a.yaml"))
    monkeypatch.setattr("reconciler.host.files.signature", lambda _: frozen)
    site.apply()
    site.write({"a.yaml": spec("ctx-1", run="r2")})
    assert site.apply()["ctx-1"].run == "r2"


def test_files_that_move_while_they_are_read_are_read_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 files are saved while the first are read: what comes of it is one of the two states."""
    names = [f"ctx-{n}" for n in range(200)]
    site.write({f"{name}.yaml": spec(name) for name in names})
    read, count = files.read, 0

    def saving(path: str, *, pipe: bool) -> files.Text:
        nonlocal count
        count += 1
        if count == 100:
            site.write({f"{name}.yaml": spec(name, run="r2") for name in names})
        return read(path, pipe=pipe)

    monkeypatch.setattr("reconciler.host.files.read", saving)
    reading = site.read()
    assert {one.run for one in reading.desired(site.ledger()).vms.values()} == {"r2"}
    assert reading.again is None


def test_files_that_never_rest_are_no_clean_reading(
    pruning: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = pruning
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    site.exported()
    read, count = files.read, 0

    def saving(path: str, *, pipe: bool) -> files.Text:
        nonlocal count
        count += 1
        site.write({"a.yaml": spec("ctx-1") + f"# {count}\n"})
        return read(path, pipe=pipe)

    monkeypatch.setattr("reconciler.host.files.read", saving)
    site.write({"a.yaml": spec("ctx-1")})
    for _ in range(3):
        assert site.exported() == {"ctx-1", "ctx-2"}
    assert count < 30
    assert site.reading is not None
    assert site.reading.again is not None
    assert 0 < site.reading.again - site.now < 1


def test_a_yaml_bomb_is_a_clear_error(site: Site) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{two}: &{two} [{','.join([f'*{one}'] * 10)}]")
    site.write({"a.yaml": spec("ctx-1")})
    site.exported()
    site.write({"bomb.yaml": "\n".join(lines), "a.yaml": spec("ctx-1", run="r2")})
    assert site.apply()["ctx-1"].run == "r2"
    assert site.reading is not None
    says(str(site.reading.diagnostics[0]), "bomb.yaml", "values", "aliases")


# -- revisions


def test_a_revision_has_a_digest_of_names_and_contents(site: Site) -> None:
    seen_before = set()
    for files_ in (
        {"a.yaml": spec("ctx-1")},
        {"a.yaml": spec("ctx-2")},
        {"b.yaml": spec("ctx-2"), "a.yaml": None},
        {"b.yaml": b"\xff"},
    ):
        site.write(files_)
        seen_before.add(site.read().revision.digest)
    assert len(seen_before) == 4
    site.write({"a.yaml": spec("ctx-1"), "b.yaml": None})
    assert site.read().revision.digest in seen_before


def test_git_is_asked_when_something_moved_and_while_it_is_dirty(site: Site) -> None:
    dirty = Commit(commit="a" * 40, author="Jane", subject="one", dirty=True)
    answers = [dirty, dirty, Commit(commit="b" * 40, author="Jane", subject="two")]
    site.source = Source(str(site.specs), site.settings, describe=lambda _: answers.pop(0))
    site.write({"a.yaml": spec("ctx-1")})
    revision = site.read().revision
    assert (revision.dirty, revision.name) == (True, revision.digest[:12])
    assert site.read().revision.dirty
    assert site.read().revision.name == "b" * 12
    assert site.read().revision.name == "b" * 12  # nothing moved, and nobody is asked
    assert site.ledger().source["revision"]["commit"] == "b" * 40
    assert site.ledger().source["revision"]["subject"] == "two"


def test_a_work_tree_tells_its_commit(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.source = Source(str(site.specs), site.settings)
    site.write({"a.yaml": spec("ctx-1")})
    assert not site.read().revision.commit
    environment = {
        **os.environ,
        **{
            f"GIT_{who}_{what}": "jane"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        },
    }
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=site.specs, env=environment, check=True)
    os.utime(site.specs / "a.yaml")
    revision = site.read().revision
    assert (revision.author, revision.subject, revision.dirty) == ("jane", "first", False)
    assert revision.name == revision.commit[:12]
    site.write({"a.yaml": spec("ctx-1", "ctx-2")})
    revision = site.read().revision
    assert revision.dirty
    assert revision.name == revision.digest[:12]
    site.close()


def test_what_lies_beside_the_specs_is_watched_and_read_with_them(site: Site) -> None:
    text = spec("ctx-1", "ctx-2").replace("run: r1", "run: '{{ run }}'")
    site.write({"a.yaml": text, "group_vars/all.yaml": "run: r1", "b.yaml": spec("ctx-3")})
    assert {name: one.run for name, one in site.apply().items()} == {
        "ctx-1": "r1",
        "ctx-2": "r1",
        "ctx-3": "r1",
    }
    assert str(site.specs / "group_vars") in site.source.watched()
    before, parsed = site.read().revision, site.source.parsed
    assert not site.read().changed
    assert site.source.parsed == parsed
    site.write({"host_vars/ctx-2.yaml": "run: r2"})
    assert {name: one.run for name, one in site.apply().items()} == {
        "ctx-1": "r1",
        "ctx-2": "r2",
        "ctx-3": "r1",
    }
    assert site.read().revision != before


def test_a_broken_file_beside_the_specs_keeps_the_vms_that_need_it(site: Site) -> None:
    text = "vms:\n" + vm("ctx-1") + vm("ctx-2").replace("r1", "'{{ run }}'")
    site.write({"a.yaml": text, "host_vars/ctx-2.yaml": "run: r1"})
    assert site.exported() == {"ctx-1", "ctx-2"}
    site.write({"a.yaml": text.replace("run: r1", "run: r2"), "host_vars/ctx-2.yaml": "run: ["})
    vms = site.apply()
    assert (vms["ctx-1"].run, vms["ctx-2"].run) == ("r2", "r1")
    assert site.held() == {"ctx-2": "SourceUnreadable"}
    says(site.message("ctx-2"), "host_vars/ctx-2.yaml:2:1")


def test_what_is_kept_is_not_called_with_fewer_disks_than_there_are(site: Site) -> None:
    """A spec is broken, its run is still due, and meanwhile the VM got another disk."""
    path = site.specs.parent / "inventory.yaml"
    known = "vms: {ctx-1: {vm: {path: /DC1/vm/ctx-1}, disks: [{key: 2000, size: 1GiB}]}}"
    path.write_text(known)
    site.settings = replace(site.settings, inventory=str(path))
    site.watch()
    site.write({"a.yaml": spec("ctx-1")})
    site.apply()
    site.write({"a.yaml": spec("ctx-1")[:-30]})
    assert not site.read().desired(site.ledger()).outdated
    path.write_text(known.replace("1GiB}", "1GiB}, {key: 2001, size: 1GiB}"))
    wanted = site.read().desired(site.ledger())
    says(wanted.outdated["ctx-1"], "2000 (1 GiB); the inventory knows 2000 (1 GiB), 2001 (1 GiB)")
    assert wanted.outdated == site.read().vm("ctx-1", site.ledger()).outdated
    (action,) = plan(wanted, seen(), site.ledger(), site.now).actions
    assert (action.kind, action.cause) == ("refuse", "InventoryMismatch")
    export = wanted.vms["ctx-1"].exports[0]
    begun = a_call(wanted.vms["ctx-1"], CallState.ACCEPTED)
    ledger = replace(site.ledger(), leases=(a_lease(export),)).put([begun])
    found = plan(wanted, seen([a_server(export)]), ledger, site.now)
    assert "InventoryMismatch" not in {cause for _, _, cause in brief(found)}
