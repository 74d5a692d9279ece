"""A saved file costs what is in it, whatever lies beside it; it comes to what a whole look does."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler import source as module
from reconciler.core import desired, joined, spec_files
from reconciler.host import files
from reconciler.source import Source
from tests.host.watched import Site, spec, vm

NAMES = [f"ctx-{number}" for number in range(14)]


@pytest.fixture(autouse=True)
def nothing_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written long before they were read."""
    monkeypatch.setattr(module, "YOUNG", -(10**18))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path, prune=True)
    yield found
    found.close()


def some_text(dice: random.Random) -> str:
    """What somebody may write; mostly what is right."""
    one, other = dice.sample(NAMES, 2)
    run = f"r{dice.randrange(2)}"
    match dice.randrange(44):
        case 0:
            return f"vms:\n{vm(one, run, path=other)}"  # a clash, where the other is there
        case 1:
            return f"vms:\n{vm(one, run)}  - {{name: {other}, disk: []}}\n"
        case 2:
            return "vms: [" if dice.randrange(2) else "vms: []\n"
        case 3:
            return f"vms:\n{vm(one, run)}runs: [{{vm: {other}, run: r9, type: full}}]\n"
        case 4:
            return f"vms:\n  - {{name: '{{{{ \"{one}\" }}}}', state: absent}}\n"
        case 5:
            return spec(one, other, run=run)
        case 6:
            return f"vms:\n{vm(one, run, repository='nowhere')}"
        case 7 | 8:
            return f"runs: [{{vm: {one}, run: r9, type: full}}]\n"
        case _:
            return spec(one, run=run)


@pytest.mark.parametrize("seed", range(6))
def test_a_step_comes_to_what_a_whole_look_does(
    site: Site, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, taken = random.Random(seed), 0
    known = {name: {"vm": {"path": f"/DC1/vm/{name}"}, "disks": [{"key": 2000, "size": 1 << 30}]}
             for name in NAMES}  # fmt: skip
    inventory = tmp_path / "inventory.yaml"
    inventory.write_text(json.dumps({"vms": known}))
    settings, now = replace(site.settings, inventory=str(inventory)), site.now
    ours, whole = (
        Source(str(site.specs), settings, describe=lambda _: None) for _ in ("ours", "whole")
    )
    step = joined.step

    def counted(*arguments: object) -> object:
        nonlocal taken
        found = step(*arguments)  # type: ignore[arg-type]
        taken += found is not None
        return found

    monkeypatch.setattr(joined, "step", counted)
    (site.specs / "sub").mkdir()
    places = [site.specs / name for name in ("a.yaml", "b.yaml", "c.yaml", "sub/a.yaml", "d.yml")]
    site.reading = ours.read(site.ledger(), now)
    for number in range(90):
        place = dice.choice(places)
        if place.exists() and not dice.randrange(4):
            place.unlink()
        else:
            place.write_text(some_text(dice))
            os.utime(place, (number, number))  # two writes within one tick are told apart
        now += dice.choice([0.5, 3.0])
        ledger = site.ledger()
        found = ours.read(ledger, now, {str(place)})
        fresh = whole.read(ledger, now)
        assert ours._last is not None and whole._last is not None
        assert ours._last.found == whole._last.found
        assert found.digests == fresh.digests
        assert found.decision == fresh.decision
        assert found.revision == fresh.revision
        assert found.desired(ledger) == fresh.desired(ledger)
        assert found.specs == fresh.specs
        for name in NAMES:
            assert found.vm(name, ledger) == fresh.vm(name, ledger)
        found.note(site.store, "test", now)
        vms = {name: one.to_json() for name, one in found.desired(ledger).vms.items()}
        site.store.apply(site.settings.to_json(), vms, now)
    assert taken >= 10, "it was not always all files"


class Counts:
    """How often something was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, int] = {}
        for where, name in (
            (files, "read"),
            (files, "signature"),
            (files, "listing"),
            (spec_files, "read_file"),
            (desired, "_definite"),
        ):
            self.count(monkeypatch, where, name)

    def count(self, monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
        inner = getattr(where, name)

        def counted(*arguments: object, **more: object) -> object:
            self.found[name] = self.found.get(name, 0) + 1
            return inner(*arguments, **more)

        monkeypatch.setattr(where, name, counted)


@pytest.mark.parametrize("what", ["changed", "new", "removed"])
def test_a_saved_file_costs_what_is_in_it(tmp_path: Path, what: str) -> None:
    found = []
    for others in (5, 50):
        folder = tmp_path / f"{others}"
        folder.mkdir()
        site = Site(folder, prune=True)
        names = {f"rest-{n}.yaml": f"vms: [{{name: rest-{n}, state: absent}}]\n"
                 for n in range(others)}  # fmt: skip
        site.write({**names, "a.yaml": spec("ctx-1")})
        for path in site.specs.iterdir():
            os.utime(path, (1, 1))
        site.apply()
        site.write({"a.yaml": spec("ctx-1", run="r2")} if what == "changed" else
                   {"a.yaml": None} if what == "removed" else
                   {"b.yaml": spec("ctx-2")})  # fmt: skip
        moved = site.specs / ("b.yaml" if what == "new" else "a.yaml")
        ledger = site.ledger()
        with pytest.MonkeyPatch.context() as patch:
            counts = Counts(patch)
            reading = site.source.read(ledger, site.now + 1, {str(moved)})
            if what != "removed":
                reading.vm("ctx-2" if what == "new" else "ctx-1", ledger)
        assert reading.changed
        found.append(counts.found)
        site.close()
    assert found[0] == found[1]
    assert "listing" not in found[0]
    assert found[0].get("read_file", 0) == (0 if what == "removed" else 1)
