"""The state directory full, read-only, locked, damaged, copied, lost and put back.

What cannot be written down is not done: no server, no call. What was done and could not be written
down is not done again.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from reconciler.host.store import state_id_of
from reconciler.host.store.schema import VERSION
from tests.e2e.site import ROOT, Appliance, Site, until
from tests.host.test_store_trouble import locked_by_another, overwrite
from tests.host.test_store_versions import put
from tests.mounts import fill, small

MIB = 1 << 20
LOOKS = (["plan"], ["status"], ["status", "-o", "json"], ["explain", "ctx-1"], ["state", "info"])


@pytest.fixture
def state(site: Site) -> Iterator[Path]:
    """The state directory, on a small file system of its own."""
    with small(site.folder / "state", "1m") as found:
        yield found


def running(site: Site) -> set[str]:
    return {vm for vm, _ in site.pids()}


def remount(state: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(state)], check=True)


# -- full, read-only


def test_nothing_is_begun_that_cannot_be_written_down(
    site: Site, appliance: Appliance, state: Path
) -> None:
    site.spec(site.vm("ctx-1"))
    filling = fill(state)
    for _ in range(2):
        text = site.apply(code=1)
        assert f"df {state}" in text
        assert running(site) == set()
        assert not site.image("ctx-1").exists()
    assert "Nothing was applied here yet" in site.run("status")
    assert ("ctx-1", "2000", "start") in site.changes()
    assert appliance.starts() == []
    filling.unlink()
    site.apply()
    assert len(appliance.starts()) == 1


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_can_be_looked_at_and_nothing_new_begins(
    site: Site, appliance: Appliance, state: Path, how: str
) -> None:
    (site.folder / "logs").mkdir()
    (state / "logs").symlink_to(site.folder / "logs")  # open files keep it from a remount
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = site.pids()
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    if how == "full":
        fill(state)
    else:
        remount(state, "ro")
    found = sorted(path.name for path in state.iterdir())
    for _ in range(2):
        text = site.apply(code=1)
        assert ("is full" if how == "full" else "Read-only file system") in text
        assert str(state) in text
    for look in LOOKS:
        site.run(*look)
    assert site.status()["ctx-1"]["call"]["state"] == "ACCEPTED"
    assert ("ctx-2", None, "call") in site.changes()
    assert site.pids() == before
    assert len(appliance.starts()) == 1
    if how == "full":
        (state / "filling").unlink()
    else:
        assert sorted(path.name for path in state.iterdir()) == found
        remount(state, "rw")
    site.apply()
    assert running(site) == {"ctx-1", "ctx-2"}
    assert len(appliance.starts()) == 2


def apply_with(site: Site, state: Path, effect: str, side: str) -> tuple[int, str]:
    """An apply in the middle of which the state directory's disk fills up."""
    module = ("tests.e2e.filling", str(state), effect, side)
    done = site.start("apply", "-y", module=module, PYTHONPATH=str(ROOT))
    out, err = done.communicate(timeout=120)
    assert "Traceback" not in err, err
    return done.returncode, out + err


@pytest.mark.parametrize(
    ("effect", "side"),
    [
        ("LEASE", "BEFORE"),
        ("LEASE", "AFTER"),
        ("STARTED", "BEFORE"),
        ("INTENT", "BEFORE"),
    ],
)
def test_a_disk_that_fills_up_before_the_intent_means_no_call(
    site: Site, appliance: Appliance, state: Path, effect: str, side: str
) -> None:
    site.spec(site.vm("ctx-1"))
    code, text = apply_with(site, state, effect, side)
    assert code == 1, text
    assert f"make room, then do this again: df {state}" in text
    assert appliance.starts() == []
    if (effect, side) == ("LEASE", "BEFORE"):
        assert running(site) == set()
        assert not site.image("ctx-1").exists()
    site.apply(code=1)
    assert appliance.starts() == []
    (state / "filling").unlink()
    site.apply()
    assert site.status()["ctx-1"]["call"]["state"] == "ACCEPTED"
    assert len(appliance.starts()) == 1
    assert len(site.servers()) == 1


@pytest.mark.parametrize(
    ("effect", "side", "remembers"), [("INTENT", "AFTER", True), ("ANSWER", "AFTER", False)]
)
def test_a_disk_that_fills_up_between_the_intent_and_the_answer_leaves_an_unknown_call(
    site: Site, appliance: Appliance, state: Path, effect: str, side: str, remembers: bool
) -> None:
    site.spec(site.vm("ctx-1"))
    code, text = apply_with(site, state, effect, side)
    assert code == 7, text
    assert "it started the job" in text
    assert "not written down: cannot write to the store" in text
    assert "the outcome of the call is not known for ctx-1" in text
    assert len(appliance.starts()) == 1
    if not remembers:
        appliance.misbehave("forget")
    assert site.status()["ctx-1"]["call"]["state"] == "INTENDED"
    assert "resolve ctx-1" in site.run("explain", "ctx-1")
    site.apply(code=1)
    assert len(appliance.starts()) == 1
    (state / "filling").unlink()
    site.apply(code=0 if remembers else 7)
    wanted = "ACCEPTED" if remembers else "UNKNOWN"
    assert site.status()["ctx-1"]["call"]["state"] == wanted
    site.apply(code=0 if remembers else 7)
    assert len(appliance.starts()) == 1
    assert len(site.servers()) == 1


# -- locked


def test_a_store_that_another_process_locks_is_waited_for_and_then_it_is_named(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    before = site.pids()
    with locked_by_another(site.folder / "state" / "state.db", "BEGIN EXCLUSIVE") as pid:
        site.run("status")
        text = site.apply(code=6)
        assert f"(pid {pid}) for 10 s; end that, then do this again" in text
        assert site.pids() == before
        assert len(appliance.starts()) == 1
    site.apply()
    assert len(appliance.starts()) == 2


# -- damaged, strange


@pytest.mark.parametrize("how", ["the header", "a page", "a directory", "newer"])
def test_a_store_that_cannot_be_believed_starts_nothing_and_is_put_back_from_a_copy(
    site: Site, appliance: Appliance, how: str
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = site.pids()
    backup = site.folder / "backup.db"
    site.run("state", "backup", str(backup))
    path = site.folder / "state" / "state.db"
    if how == "the header":
        overwrite(path, 0, 4096)
    elif how == "a page":
        overwrite(path, 8 * 4096, 4096)
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    for command in (["apply", "-y"], ["retry", "ctx-1"]):
        text = site.run(*command, code=1)
        assert str(path) in text
        assert site.pids() == before
    if how in ("the header", "a page"):
        assert "`reconciler state restore FILE`" in text
    if how != "a page":  # which page it is decides whether a look has to read it
        for look in (["status"], ["plan"], ["state", "info"]):
            assert str(path) in site.run(*look, code=1)
    assert len(appliance.starts()) == 1
    site.run("state", "restore", str(backup), "-y")
    site.apply()
    assert site.pids().items() >= before.items()
    assert len(appliance.starts()) == 2


def test_damage_in_what_is_seldom_read_is_found_before_anything_is_written(
    site: Site, appliance: Appliance
) -> None:
    """A page of an index of old events is in the way of nobody, until it is written to."""
    site.spec(site.vm("ctx-1"))
    site.apply()
    path = site.folder / "state" / "state.db"
    with closing(sqlite3.connect(path)) as db:
        page = db.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'events_by_age'"
        ).fetchone()[0]
    overwrite(path, (page - 1) * 4096, 4096)
    site.run("status")
    assert "malformed" in site.run("state", "info", code=1)
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    assert "it is damaged" in site.apply(code=1)
    assert running(site) == {"ctx-1"}


def test_an_empty_store_is_a_lost_one_and_calls_nobody_twice(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    appliance.misbehave("forget")
    path = site.folder / "state" / "state.db"
    path.write_bytes(b"")
    assert "Nothing was applied here yet" in site.run("status")
    site.apply(code=7)
    assert site.status()["ctx-1"]["call"]["state"] == "UNKNOWN"
    assert len(appliance.starts()) == 1


def test_a_store_of_an_older_version_is_looked_at_without_a_change(site: Site) -> None:
    (site.folder / "state").mkdir()
    path = put(1, site.folder / "state")
    before = path.read_bytes()
    found = site.status()
    assert found["ctx-1"]["call"]["state"] == "ACCEPTED"
    assert found["ctx-1"]["call"]["tainted"] is True
    assert found["ctx-8"]["call"]["state"] == "UNKNOWN"
    assert "its log does not know the job" in site.run("explain", "ctx-2")
    assert "schema      1" in site.run("state", "info")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state.db"]


# -- copied, moved


def test_a_copied_state_directory_is_refused_and_a_moved_one_is_not(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    first, second = site.folder / "state", site.folder / "second"
    claim = (site.folder / "repository" / "ctx-1" / ".claim-r1").read_text()
    assert claim == f"{state_id_of(first)}\n{first}\n"
    before = site.pids()
    shutil.copytree(first, second)
    site.write_config(state="second")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    text = site.apply(code=1)
    assert f"cannot use {second}: it is a copy of {first}, which is still there" in text
    assert f"RECONCILER_STATE={first}" in text
    assert site.pids() == before
    site.run("apply", "-y", RECONCILER_STATE=str(first))
    shutil.rmtree(second)
    first.rename(second)
    site.apply()
    assert len(appliance.starts()) == 2
    assert site.pids().items() >= before.items()


# -- backup and restore


def test_a_restored_store_calls_nobody_twice(site: Site, ending: Appliance) -> None:
    """Of the run that the copy does not know, its claim tells; of another attempt, its intent."""
    for vm in ("ctx-1", "ctx-2"):
        ending.source(vm, 2000, os.urandom(MIB))
    ending.misbehave("sickens")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    site.apply(code=1)
    ending.misbehave("none")
    site.spec(site.vm("ctx-1"))
    site.apply("--wait", "--timeout", "60s")
    copy = site.folder / "copy.db"
    assert "1 COMPLETED, 1 DUE" in site.run("state", "backup", str(copy)).replace("\n", " ")
    # since then: another run of the first, and the call of the second
    site.spec(site.vm("ctx-1", backup={"run": "r2"}), site.vm("ctx-2"))
    site.apply("--wait", "--timeout", "60s")
    assert len(ending.starts()) == 3
    ending.misbehave("forget")
    text = site.run("state", "restore", str(copy), "-y")
    assert "3 COMPLETED" in text
    assert "1 COMPLETED, 1 DUE" in text
    assert "held as UNKNOWN" in text
    aside = next(site.folder.glob("state/state.db.before-restore-*"))
    assert f"what was there is in {aside}" in text
    for _ in range(2):
        text = site.apply(code=7)
        assert text.count("CallUnknown") >= 2
        assert len(ending.starts()) == 3
    for vm in ("ctx-1", "ctx-2"):
        assert site.status()[vm]["call"]["state"] == "UNKNOWN"
        assert f"reconciler resolve {vm} --accepted" in site.run("explain", vm)
    assert "3 COMPLETED" in site.run("state", "info", str(aside))
    # the person looks, says what they know, and all is well
    for vm in ("ctx-1", "ctx-2"):
        site.run("resolve", vm, "--failed", "--reason", "the copy is older than its end", "-y")
    ending.misbehave("none")
    site.spec(*(site.vm(vm, backup={"run": "r3"}) for vm in ("ctx-1", "ctx-2")))
    site.apply("--wait", "--timeout", "60s")
    assert len(ending.starts()) == 5


def test_the_state_is_backed_up_while_an_apply_is_at_work(site: Site, ending: Appliance) -> None:
    for number in range(3):
        ending.source(f"ctx-{number}", 2000, os.urandom(MIB))
    site.spec(*(site.vm(f"ctx-{number}") for number in range(3)))
    process = site.start("apply", "-y", "--wait", "--timeout", "60s")
    copies = 0
    until(lambda: (site.folder / "state" / "state.db").exists() or None, "a store")
    while process.poll() is None:
        out = site.run("state", "backup", "copy.db", "--force", code=None)
        if "no store yet" not in out:
            copies += 1
            assert "integrity   ok" in site.run("state", "info", "copy.db")
    process.communicate()
    assert process.returncode == 0
    assert copies


def test_what_is_in_the_state_directory(site: Site, appliance: Appliance) -> None:
    assert "There is no store" in site.run("state", "info")
    assert "there is no store yet" in site.run("state", "backup", "b.db", code=1)
    site.spec(site.vm("ctx-1"))
    site.apply()
    found = site.json("state", "info")
    path = site.folder / "state" / "state.db"
    assert found["path"] == str(path)
    assert (found["hub"], found["state_id"]) == (site.hub, state_id_of(path.parent))
    assert (found["home"], found["schema"]) == (str(path.parent), VERSION)
    assert (found["calls"], found["leases"]) == ({"ACCEPTED": 1}, 1)
    assert (found["integrity"], found["busy"]) == ("ok", None)
    assert found["events"] >= 3
    text = site.run("state", "info")
    for words in ("calls       1 ACCEPTED", "leases      1", "integrity   ok", str(path)):
        assert words in text


def test_a_backup_and_a_restore_say_what_they_will_not_do(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.run("state", "backup", "b.db")
    assert "add --force" in site.run("state", "backup", "b.db", code=1)
    site.run("state", "backup", "b.db", "--force")
    assert "that is the store itself" in site.run(
        "state", "backup", "state/state.db", "--force", code=1
    )
    assert "add -y to restore this" in site.run("state", "restore", "b.db", code=64)
    assert "there is no store in it" in site.run("state", "restore", "no.db", "-y", code=1)
    assert not list(site.folder.glob("state/*before-restore*"))
    hub = site.hub
    site.write_config(hub="another-hub")
    text = site.run("state", "restore", "b.db", "-y", code=78)
    assert f"write `hub: {hub}`" in text
    site.write_config(hub=hub)
    site.run("state", "restore", "b.db", "-y", "--config", "reconciler.yaml")
    site.apply()
    assert len(appliance.starts()) == 1
