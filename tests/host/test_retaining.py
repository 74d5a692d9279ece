"""Removal of backups: real images, a real store, and a crash on each side of every effect."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler import retaining
from reconciler.core.call import CallEvent, CallState
from reconciler.core.chains import chains_of
from reconciler.core.desired import Keep
from reconciler.core.errors import HostError
from reconciler.core.ledger import Archived
from reconciler.core.settings import Settings
from reconciler.host import effects, images, proc
from reconciler.host.effects import Effect, Side
from reconciler.host.store import Store, events
from tests.core.builders import HUB, a_call, a_settings, a_vm, an_export

MIB = 1 << 20
RUNS = (("f1", None), ("i1", "f1"), ("i2", "i1"), ("f2", None))


class Hub:
    """A repository with two chains of one disk, published by a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "repository"
        self.settings: Settings = a_settings(repositories={"local": str(self.root)})
        self.state = folder / "state"
        self.state.mkdir()
        self.store = Store(self.state, HUB)
        for at, (run, on) in enumerate(RUNS):
            self.publish(run, on, float(at + 1))
        vm = replace(a_vm(run="f2"), keep=Keep(full=1))
        self.store.apply({}, {"ctx-1": vm.to_json()}, 1.0)

    def image(self, run: str) -> Path:
        return self.root / "ctx-1" / "2000" / f"{run}.qcow2"

    def publish(self, run: str, on: str | None, at: float) -> None:
        path = str(self.image(run))
        below = str(self.image(on)) if on else None
        images.create(path, MIB, str(self.root), below)
        owner = images.Owner(self.store.state_id, str(self.state))
        images.claim(str(self.root), "ctx-1", run, owner)
        export = an_export(run=run, image=path, size=MIB, backing=below)
        vm = a_vm(run=run, exports=(export,), type="incremental" if on else "full")
        call = a_call(vm, CallState.ACCEPTED)
        self.store.remember(call)
        kept = Archived(job_id=call.job_id, position=0, size=MIB, allocated=0, digest="", at=at)
        self.store.advance(call, CallEvent.END, at, archived=[kept])

    def retain(self) -> list[str]:
        """As the command does it: what is shown, and then removed."""
        found = retaining.planned(self.settings, self.store.ledger(), ["ctx-1"], time.time())
        jobs = [b.call.job_id for one in found for b in (*one.unfinished, *one.going)]
        return retaining.carry_out(
            self.settings, self.store, ["ctx-1"], jobs, time.time(), "a test"
        )

    def there(self) -> list[str]:
        return sorted(path.stem for path in self.root.rglob("*.qcow2"))

    def marked(self) -> list[str]:
        chains = chains_of(self.store.ledger(), "ctx-1")
        return sorted(b.run for chain in chains for b in chain.backups if b.removed)

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    found = Hub(tmp_path)
    yield found
    found.close()


def test_a_chain_goes_from_its_end_and_what_is_known_of_it_stays(hub: Hub) -> None:
    said = hub.retain()
    assert [line.split(":")[0] for line in said] == [
        "removed run i2 of ctx-1",
        "removed run i1 of ctx-1",
        "removed run f1 of ctx-1",
    ]
    assert (hub.there(), hub.marked()) == (["f2"], ["f1", "i1", "i2"])
    assert hub.retain() == []
    claims = sorted(path.name for path in (hub.root / "ctx-1").glob(".claim-*"))
    assert claims == [".claim-f1", ".claim-f2", ".claim-i1", ".claim-i2"]
    assert {call.state for call in hub.store.ledger().runs("ctx-1")} == {CallState.COMPLETED}
    assert [one.reason for one in events(hub.state, "ctx-1")] == ["Removed"] * 3


class CrashError(BaseException):
    """The process ended in this moment."""


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("what", [Effect.FORGET, Effect.UNLINK])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_after_a_crash_what_is_not_marked_is_whole_and_the_next_pass_ends_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, what: Effect, side: Side, number: int
) -> None:
    seen = 0

    def crash(one: Effect, when: Side) -> None:
        nonlocal seen
        seen += (one, when) == (what, side)
        if seen == number:
            raise CrashError

    monkeypatch.setattr(effects, "hook", crash)
    with pytest.raises(CrashError):
        hub.retain()
    monkeypatch.setattr(effects, "hook", None)
    marked = hub.marked()
    assert set(hub.there()) >= {"f1", "i1", "i2", "f2"} - set(marked)
    for run in ("f2", *({"f1", "i1", "i2"} - set(marked))):
        check = ["qemu-img", "check", "-q", str(hub.image(run))]  # also opens what is below it
        assert subprocess.run(check, check=False).returncode == 0, run
    hub.retain()
    assert (hub.there(), hub.marked()) == (["f2"], ["f1", "i1", "i2"])
    assert hub.retain() == []


def put_another(hub: Hub) -> None:
    hub.image("i1").unlink()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(hub.image("i1")), "2M"],
                   check=True)  # fmt: skip


def lead_out(hub: Hub) -> None:
    elsewhere = hub.folder / "elsewhere.qcow2"
    hub.image("i1").rename(elsewhere)
    hub.image("i1").symlink_to(elsewhere)


def link(hub: Hub) -> None:
    kept = hub.image("i1").with_name("kept.qcow2")
    hub.image("i1").rename(kept)
    hub.image("i1").symlink_to(kept)


def claim_elsewhere(hub: Hub) -> None:
    path = images.claim_path(str(hub.root), "ctx-1", "i1")
    path.unlink()
    images.claim(str(hub.root), "ctx-1", "i1", images.Owner("another", "/there"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (put_another, "not the image that was published there"),
        (lead_out, "leads out of"),
        (link, "it is a symlink"),
        (claim_elsewhere, "claimed by state directory /there"),
    ],
)
def test_what_is_not_surely_ours_is_not_removed_nor_what_is_below_it(
    hub: Hub, harm: object, said: str
) -> None:
    assert callable(harm)
    harm(hub)
    with pytest.raises(HostError, match=said):
        hub.retain()
    assert hub.marked() == ["i2"], "what was built on it has gone before"
    assert {"f1", "f2"} <= set(hub.there())
    assert os.path.lexists(hub.image("i1"))


def test_an_image_that_somebody_has_open_is_not_removed(hub: Hub) -> None:
    with hub.image("i2").open("rb"):
        pass
    reader = subprocess.Popen(["tail", "-f", str(hub.image("i2"))], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not proc.users(str(hub.image("i2"))):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(HostError, match=f"tail .pid {reader.pid}. has it open"):
            hub.retain()
    finally:
        reader.kill()
        reader.wait(20)
    assert (hub.there(), hub.marked()) == (["f1", "f2", "i1", "i2"], [])
    hub.retain()
    assert hub.there() == ["f2"]


def test_what_was_not_shown_keeps_its_chain(hub: Hub) -> None:
    found = retaining.planned(hub.settings, hub.store.ledger(), ["ctx-1"], time.time())
    jobs = [backup.call.job_id for backup in found[0].going if backup.run != "i2"]
    said = retaining.carry_out(hub.settings, hub.store, ["ctx-1"], jobs, time.time(), "a test")
    assert (said, hub.there()) == ([], ["f1", "f2", "i1", "i2"])


def test_a_run_of_before_anything_was_kept_of_it_is_marked_too(hub: Hub) -> None:
    hub.store._db.execute("DELETE FROM archived")
    hub.retain()
    assert (hub.there(), hub.marked()) == (["f2"], ["f1", "i1", "i2"])
