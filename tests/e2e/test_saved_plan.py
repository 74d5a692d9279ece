"""A saved plan is applied as it was shown, once, or not at all; on real files and servers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inotify_simple import INotify, flags  # type: ignore[import-untyped]
from msgspec.structs import replace

from reconciler.cli.main import run
from reconciler.core import saved
from reconciler.host import lock, plans
from tests.core.builders import says
from tests.e2e import crashes
from tests.e2e.site import PASSWORD, Appliance, Site
from tests.e2e.watching import watching

MIB = 1 << 20
PLAN = "night.plan"


def at_once(site: Site, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that changes nothing, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(site.folder))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = run(list(arguments))
    signal.signal(signal.SIGTERM, before)
    said = out.getvalue() + err.getvalue()
    assert PASSWORD not in said
    assert "Traceback" not in said
    return code, out.getvalue(), err.getvalue()


def refused(site: Site, *words: str, code: int = 5) -> str:
    """What `apply FILE` says that must refuse and change nothing."""
    before = everything(site.folder)
    found, out, err = at_once(site, "apply", PLAN)
    assert found == code, out + err
    says(err, "nothing was changed" if code == 65 or words[0] != "applied at" else "", *words)
    assert everything(site.folder) == before
    return err


def everything(folder: Path, *but: Path) -> dict[str, tuple[Any, ...]]:
    """Every file and directory: how it is, and what is in it. What SQLite keeps beside a store
    that a crash left is its readers' too."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        if "appliance" in path.parts or path in but or path.name.endswith(("-shm", "-wal")):
            continue
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (stat.st_mode, stat.st_mtime_ns, stat.st_ctime_ns, content)
    return found


@contextlib.contextmanager
def bound(port: int) -> Iterator[None]:
    """Somebody who has a port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        yield


@contextlib.contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """A file with another word, for a while; then as it was."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        yield
    finally:
        path.write_text(text)


def test_a_plan_is_applied_as_it_was_shown_and_once(site: Site, appliance: Appliance) -> None:
    site.inventory({"ctx-1": {2000: MIB, 2001: MIB}})
    site.spec(site.vm("ctx-1", disks="inventory"))
    code, planned, said = at_once(site, "plan", "--out", PLAN)
    assert code == 0
    says(said, "saved to night.plan; until", "(1 h), once: reconciler apply night.plan")
    path = site.folder / PLAN
    assert path.stat().st_mode & 0o777 == 0o600
    assert PASSWORD not in path.read_text()
    assert not (site.folder / "state").exists()

    code, shown, said = at_once(site, "show", PLAN)
    assert (code, shown) == (0, planned)
    says(said, "made at", "by reconciler plan (", f"for hub {site.hub}", "not applied yet")
    assert json.loads(at_once(site, "show", PLAN, "-o", "json")[1])["saved"]["used"] is None

    text = site.run("apply", PLAN)
    assert text.startswith(planned)
    says(text, "5 steps done, 0 failed; 1 of 1 VM as declared")
    assert len(appliance.starts()) == 1
    assert {m.port for m in site.servers().values()} == set(site.ports[:2])

    err = refused(site, "applied at", "by reconciler apply (")
    says(err, "a plan is used once, whatever became of it", "reconciler plan --out night.plan")
    says(at_once(site, "show", PLAN)[2], "; applied at")
    used = json.loads(at_once(site, "show", PLAN, "-o", "json")[1])["saved"]["used"]
    says(used["who"], "reconciler apply (")


def test_whatever_moved_is_named_and_changes_nothing(
    site: Site, appliance: Appliance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site.inventory({"ctx-1": {2000: MIB}, "ctx-2": {2000: MIB}})
    site.spec(site.vm("ctx-1", disks="inventory"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    specs, inventory = site.specs / "vms.yaml", site.folder / "inventory.yaml"
    path = site.folder / PLAN
    good = path.read_bytes()

    with edited(specs, '"r1"', '"r2"'):
        refused(site, "specs/vms.yaml was edited since (line 12)", '12:     "run": "r2"',
                "- ctx-1 disk 2000: start: serve as ctx-1-r1-disk0 on",
                "+ ctx-1 disk 2000: start: serve as ctx-1-r2-disk0 on")  # fmt: skip
    with edited(specs, "{\n", "{  # a comment\n"):
        assert "ctx-1 disk" not in refused(site, "specs/vms.yaml was edited since (line 1")
    (site.specs / "more.yaml").write_text("vms: []\n")
    refused(site, "specs/more.yaml is read too, which was not there")
    (site.specs / "more.yaml").unlink()
    shutil.move(specs, site.folder / "aside")
    refused(site, "no *.yaml or *.yml is there")
    shutil.move(site.folder / "aside", specs)

    text = inventory.read_text()
    site.inventory({"ctx-1": {2000: MIB, 2002: 10 * MIB}, "ctx-2": {2000: MIB}})
    refused(site, "the inventory has another disk for ctx-1: 2002 (10 MiB)",
            "+ ctx-1 disk 2002: create: create 10 MiB qcow2")  # fmt: skip
    site.inventory({"ctx-1": {2000: MIB}, "ctx-2": {2000: 2 * MIB}})
    refused(site, "the inventory has another size for disk 2000 of ctx-2: 2 MiB")
    inventory.write_text(text)

    config = site.folder / "reconciler.yaml"
    with edited(config, '"stop_grace"', '"shared": 3, "stop_grace"'):
        refused(site, "another config: qemu_nbd.shared was 10, and is 3")
    with edited(config, site.hub, "hub-b"):
        refused(site, f"another hub: it was made for hub {site.hub}, and this is hub hub-b")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with edited(config, '"state"', json.dumps(str(elsewhere))):
        refused(site, "another config: state was")

    plan = saved.load(good, PLAN)
    plans.write(path, saved.dump(replace(plan, expires=time.time() - 1)), saved.is_saved)
    refused(site, "it has expired: it was good until")
    path.write_bytes(good.replace(b'"expires": 1', b'"expires": 2'))
    refused(site, "it is not as it was written", code=65)
    path.write_bytes(good[: len(good) // 2])
    refused(site, "it is no saved plan, or only a part of one", code=65)
    path.write_text("vms: []\n")
    refused(site, "it is no saved plan", code=65)
    assert at_once(site, "apply", "nothing.plan")[0] == 1

    assert site.servers() == {}
    path.write_bytes(good)
    says(site.run("apply", PLAN), "3 steps done, 0 failed")  # as nothing of it was used up


def test_a_port_and_a_server_that_moved_are_named_and_strangers_elsewhere_are_not(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    _, planned, _ = at_once(site, "plan", "--out", PLAN, "-o", "json")
    assert [one["vm"] for one in json.loads(planned)["changes"]] == ["ctx-2"] * 3
    with bound(site.ports[1]):
        text = site.run("apply", PLAN, code=5)
        says(text, f"port {site.ports[1]} was taken by pid {os.getpid()} (",
             f"- ctx-2 disk 2000: start: serve as ctx-2-r1-disk0 on {site.ports[1]}",
             f"+ ctx-2 disk 2000: start: serve as ctx-2-r1-disk0 on {site.ports[2]}",
             "nothing was changed")  # fmt: skip
    (pid,) = site.pids().values()
    with bound(site.ports[9]):  # in nobody's way
        before = saved.load((site.folder / PLAN).read_bytes(), PLAN)
        site.kill(pid)
        text = site.run("apply", PLAN, code=5)
        says(text, f"server pid {pid} of ctx-1 disk 2000 has ended", "- ctx-1 as declared",
             "+ ctx-1 disk 2000: restart")  # fmt: skip
        assert f"port {site.ports[9]}" not in text
        assert site.servers() == {}
        site.run("resolve", "ctx-1", "--failed", "--reason", "its server was killed", "-y")
        # Another plan may take the place of one of ours, whatever became of that.
        assert at_once(site, "plan", "--vm", "ctx-2", "--out", PLAN)[0] == 0
        assert saved.load((site.folder / PLAN).read_bytes(), PLAN).id != before.id
    site.run("apply", PLAN)  # and the stranger that is gone is in nobody's way either
    assert list(site.pids()) == [("ctx-2", 2000)]


def test_what_moves_while_another_has_the_hub_is_seen_when_that_is_done(
    site: Site, appliance: Appliance
) -> None:
    path = site.spec(site.vm("ctx-1"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    state = site.folder / "state"
    state.mkdir()
    with lock.held(state / "lock", "a test", 5):
        process = site.start("apply", PLAN)
        assert process.stderr is not None
        says(process.stderr.readline(), "waiting for")
        path.write_text(path.read_text().replace('"r1"', '"r2"'))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    says(err, "specs/vms.yaml was edited since (line 17)", "nothing was changed")
    assert site.servers() == {}
    assert appliance.starts() == []


def race(site: Site) -> list[str]:
    """Two applies of one plan at once: what they say, the one that did it first."""
    return ends_of([site.start("apply", PLAN) for _ in range(2)])


def ends_of(both: list[subprocess.Popen[str]]) -> list[str]:
    ends = [(one.communicate(timeout=60), one) for one in both]
    codes = sorted(one.returncode for _, one in ends)
    assert codes == [0, 5], ends
    return [out + err for (out, err), _ in sorted(ends, key=lambda end: end[1].returncode)]


def test_of_two_applies_at_once_one_does_it(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    state = site.folder / "state"
    state.mkdir()
    with lock.held(state / "lock", "a test", 5):  # until both have seen that it is good
        both = [site.start("apply", PLAN) for _ in range(2)]
        for one in both:
            assert one.stderr is not None
            says(one.stderr.readline(), "waiting for")
    _, loser = ends_of(both)
    says(loser, "it was applied at", "by reconciler apply (")
    assert len(appliance.starts()) == 1
    assert len(site.servers()) == 1


def test_a_daemon_applies_it_once_too(site: Site, appliance: Appliance) -> None:
    urgent = site.folder / "urgent.yaml"
    site.dump(urgent, {"vms": [site.vm("ctx-1")]})
    with watching(site, "--allow-empty"):
        code, planned, _ = at_once(site, "plan", "-f", "urgent.yaml", "--out", PLAN)
        assert code == 0
        with edited(urgent, '"r1"', '"r2"'):
            refused(site, "urgent.yaml was edited since (line 17)")
        with bound(site.ports[0]):
            text = site.run("apply", PLAN, code=5)
            says(text, f"port {site.ports[0]} was taken by pid {os.getpid()}")
        assert site.servers() == {}
        winner, loser = race(site)
        assert winner.startswith(planned)
        says(loser, "it was applied at", "by reconciler apply (")
        assert len(appliance.starts()) == 1
        assert [mark.port for mark in site.servers().values()] == [site.ports[0]]
        refused(site, "applied at")


def test_a_crash_after_the_use_was_noted_has_used_it(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    # A port is bound before anything else is done.
    crashes.crash(site, ("--at", "BIND:before:1"), ("apply", PLAN))
    assert site.servers() == {}
    says(refused(site, "applied at"), "for what is left make a new plan")
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    site.run("apply", PLAN)
    assert len(appliance.starts()) == 1


def test_it_does_what_it_promised_and_nothing_that_comes_up_meanwhile(
    site: Site, appliance: Appliance
) -> None:
    """A call that is refused is not tried again; what could not be done is not done otherwise."""
    appliance.misbehave("refuse")
    site.spec(site.vm("ctx-1"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    text = site.run("apply", PLAN, code=None)
    appliance.behave()
    says(text, "failed")
    refused(site, "applied at")


def test_who_waits_stays_until_the_runs_have_ended(site: Site, ending: Appliance) -> None:
    ending.source("ctx-1", 2000, os.urandom(MIB))
    site.spec(site.vm("ctx-1"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    says(site.run("apply", PLAN, "--wait", "--timeout", "60s"), "disk flushed and checked")
    assert site.servers() == {}
    assert site.status()["ctx-1"]["call"]["state"] == "COMPLETED"


def test_nothing_is_saved_of_what_is_wrong_nor_over_what_is_not_ours(site: Site) -> None:
    site.appliance_at("http://127.0.0.1:1")
    path = site.spec(site.vm("ctx-1"), {"name": "ctx-2", "state": "nonsense"})
    code, out, err = at_once(site, "plan", "--out", PLAN)
    assert code == 65
    says(out + err, f"not saved to {PLAN}")
    assert not (site.folder / PLAN).exists()
    assert at_once(site, "plan", "--out", PLAN, "--vm", "ctx-1")[0] == 0
    for other in (str(path), "/dev/null", "reconciler.yaml"):
        before = everything(site.folder)
        code, out, err = at_once(site, "plan", "--vm", "ctx-1", "--out", other)
        assert (code, out) == (1, ""), other
        says(err, "what is there is no saved plan, and stays")
        assert everything(site.folder) == before
    for wrong in (["--expires", "1h"], ["--out", PLAN, "--expires", "0s"],
                  ["-f", "-", "--out", PLAN]):  # fmt: skip
        assert at_once_with_input(site, "plan", *wrong) == 64, wrong
    for option in (["-f", "specs"], ["--prune"], ["-l", "a=b"], ["--vm", "x"], ["-e", "a=b"]):
        assert at_once(site, "apply", PLAN, *option)[0] == 64, option


def at_once_with_input(site: Site, *arguments: str) -> int:
    process = site.start(*arguments)
    process.communicate(timeout=60)
    return process.returncode


def test_it_is_applied_from_anywhere(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    assert at_once(site, "plan", "--out", PLAN)[0] == 0
    away = site.folder / "away"
    away.mkdir()
    config = str(site.folder / "reconciler.yaml")
    before = site.folder
    site.folder = away
    site.run("--config", config, "apply", f"../{PLAN}")
    site.folder = before
    assert site.status()["ctx-1"]["call"]["state"] == "ACCEPTED"


# -- `plan` changes nothing


def rows(path: Path) -> dict[str, list[Any]]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in names}


def test_plan_writes_nothing_but_the_file_that_is_asked_for(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", labels={"tier": "gold"}))
    site.apply()
    site.spec(site.vm("ctx-1", labels={"tier": "gold"}), site.vm("ctx-2"))
    out = site.folder / "plans" / PLAN
    out.parent.mkdir()
    before, known = everything(site.folder), rows(site.folder / "state" / "state.db")
    there = (site.listening(), site.servers(), len(appliance.log_lines("start")))
    folders = [p for p in (site.folder, *site.folder.rglob("*")) if p.is_dir()]
    written = (flags.CREATE | flags.MODIFY | flags.ATTRIB | flags.DELETE | flags.MOVED_TO
               | flags.MOVED_FROM | flags.CLOSE_WRITE)  # fmt: skip
    with INotify() as watch:
        named = {watch.add_watch(p, written): p for p in folders if "appliance" not in p.parts}
        for options in ([], ["--diff"], ["--prune"], ["-o", "json"], ["-l", "tier=gold"]):
            assert at_once(site, "plan", *options)[0] == 0
        for command in (["diff"], ["validate"], ["status", "--vm", "ctx-*"]):
            at_once(site, *command)
        assert watch.read(timeout=0) == []
        assert at_once(site, "plan", "--out", str(out))[0] == 0
        at_once(site, "show", str(out))
        assert {named[event.wd] for event in watch.read(timeout=0)} == {out.parent}
    assert os.listdir(out.parent) == [PLAN]
    assert everything(site.folder, out, out.parent) == {
        name: found for name, found in before.items() if name != str(out.parent)
    }
    assert rows(site.folder / "state" / "state.db") == known
    assert (site.listening(), site.servers(), len(appliance.log_lines("start"))) == there


def test_summary_exit_code_and_text_are_of_one_plan(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    for more, changes in (([], True), (["ctx-1"], False)):
        if more:
            site.apply()
        for command in (["plan", "--detailed-exitcode"], ["diff"]):
            code, out, _ = at_once(site, *command, "-o", "json")
            document = json.loads(out)
            counted = dict.fromkeys(document["summary"], 0)
            for one in document["changes"]:
                counted[one["action"]] += 1
            assert document["summary"] == counted
            said = any(counted[kind] for kind in counted if kind not in ("wait", "hold", "refuse"))
            assert (code == 2) is said is changes
            text = at_once(site, *command)[1].splitlines()[-1]
            assert text.startswith("Plan: 1 to create, 1 to start" if changes else "No changes: ")


# -- which VMs


def test_vms_are_chosen_by_name_and_label(site: Site, appliance: Appliance) -> None:
    gold, silver = {"tier": "gold"}, {"tier": "silver"}
    site.spec(site.vm("ctx-1", labels=gold), site.vm("ctx-2", labels=silver), site.vm("db-1"))
    site.spec({"name": "ctx-9", "state": "nonsense"}, file="wrong.yaml")

    def vms(*options: str, code: int = 0) -> list[str]:
        found, out, err = at_once(site, "plan", "-o", "json", *options)
        assert found == code, out + err
        document = json.loads(out)
        names = list(dict.fromkeys(one["vm"] for one in document["changes"]))
        rest = {"ctx-1", "ctx-2", "db-1"} - set(names)
        assert rest <= set(document["untouched"])
        return names

    assert vms(code=65) == ["ctx-1", "ctx-2", "db-1"]
    assert vms("--vm", "ctx-1") == ["ctx-1"]
    assert vms("--vm", "ctx-[12]", "--vm", "db-1") == ["ctx-1", "ctx-2", "db-1"]
    assert vms("--vm", "ctx-*", code=65) == ["ctx-1", "ctx-2"]
    # Of ctx-9 not even the labels can be read: it may be meant.
    assert vms("-l", "tier=gold", code=65) == ["ctx-1"]
    assert vms("-l", "tier=gold", "--vm", "ctx-[12]") == ["ctx-1"]
    assert at_once(site, "validate", "--vm", "ctx-1")[0] == 0
    assert at_once(site, "validate", "--vm", "ctx-9")[0] == 65
    assert at_once(site, "diff", "--vm", "db-1")[0] == 2
    for wrong, said in (
        (["--vm", "ctx-3"], "there is no VM 'ctx-3' here; did you mean ctx-"),
        (["--vm", "web-*"], "there is no VM 'web-*' here (there are: ctx-1, ctx-2, ctx-9, db-1)"),
        (["--vm", "ctx-1", "--vm", "bd-1"], "did you mean db-1"),
        (["-l", "tier=bronze", "--vm", "db-1"], "no VM of these has the labels 'tier=bronze'"),
        (["-l", "a=b=c"], "cannot read the selector"),
    ):
        code, _, err = at_once(site, "plan", *wrong)
        assert code == 64, err
        says(err, said)

    # Nobody knows whom a file declares that cannot be read at all.
    (site.specs / "broken.yaml").write_text("vms: [\n")
    assert vms("--vm", "ctx-1", code=65) == ["ctx-1"]
    says(at_once(site, "plan", "--vm", "ctx-7")[2], "it may be in what cannot be read: specs/bro")
    (site.specs / "broken.yaml").unlink()

    says(site.apply("--vm", "ctx-*", "-l", "tier=gold", code=65), "1 of 1 VM as declared")
    says(site.apply("--vm", "db-1", "--vm", "ctx-2"), "untouched, as this is about others: ctx-1")
    assert {vm for vm, _ in site.pids()} == {"ctx-1", "ctx-2", "db-1"}
    assert at_once(site, "status", "-l", "tier!=gold", "-o", "name")[1].split() == ["ctx-2", "db-1"]
    assert at_once(site, "status", "--vm", "ctx-*", "-o", "name")[1].split() == ["ctx-1", "ctx-2"]
    assert at_once(site, "status", "-l", "tier=gold", "-o", "name")[1].split() == ["ctx-1"]
    assert at_once(site, "status", "-l", "tier=bronze")[0] == 64


def test_prune_takes_down_what_is_chosen(site: Site, appliance: Appliance) -> None:
    appliance.misbehave("sickens")
    site.spec(*(site.vm(f"ctx-{n}", labels={"tier": "gold"} if n == 3 else {}) for n in (1, 2, 3)))
    site.apply(code=None)  # nothing can be called, so nothing protects the servers
    assert len(site.servers()) == 3
    site.spec(site.vm("ctx-1"))

    def stopped(*options: str) -> set[str]:
        _, out, _ = at_once(site, "plan", "--prune", "-o", "json", *options)
        return {one["vm"] for one in json.loads(out)["changes"] if one["action"] == "stop"}

    assert stopped() == {"ctx-2", "ctx-3"}
    assert stopped("--vm", "ctx-2") == {"ctx-2"}
    assert stopped("--vm", "ctx-1") == set()
    assert stopped("-l", "tier=gold") == {"ctx-3"}
    assert at_once(site, "plan", "--vm", "ctx-2")[0] == 64  # no spec names it
    assert at_once(site, "plan", "--prune", "--vm", "ctx-2", "--out", PLAN)[0] == 0
    site.run("apply", PLAN)
    assert set(site.pids()) == {("ctx-1", 2000), ("ctx-3", 2000)}


def test_a_daemon_is_told_which_vms_are_meant(site: Site, appliance: Appliance) -> None:
    """And what lies around their specs is what lies there for the command, not for the daemon."""
    home, aside = site.folder, site.folder / "aside"
    (aside / "group_vars").mkdir(parents=True)
    (aside / "group_vars" / "all.yaml").write_text("night: r7\n")
    run: dict[str, Any] = {"backup": {"run": "{{ night | default('r1') }}"}, "groups": ["all"]}
    site.dump(aside / "urgent.yaml", {"vms": [site.vm("ctx-1", **run), site.vm("ctx-2", **run)]})
    config = ("--config", str(home / "reconciler.yaml"))
    with watching(site, "--allow-empty"):
        site.folder = aside
        text = site.apply(*config, "-f", "urgent.yaml", "--vm", "ctx-2", "--diff")
        site.folder = home
        says(text, "untouched, as this is about others: ctx-1", "+ --shared 10")
        assert [(mark.vm, mark.run) for mark in site.servers().values()] == [("ctx-2", "r7")]


def test_a_restart_shows_what_is_other(site: Site, appliance: Appliance) -> None:
    appliance.misbehave("sickens")
    site.spec(site.vm("ctx-1"))
    site.apply(code=None)
    site.write_config(qemu_nbd={"shared": 3})
    text = at_once(site, "diff", "--diff")[1]
    says(text, "-/+ disk 2000   restart", "- --shared 10", "+ --shared 3")
    assert "--persistent" not in text
    process = site.start("apply", "-y", "--diff", "-o", "json")
    steps = {one["action"]: one for one in json.loads(process.communicate(timeout=60)[0])["steps"]}
    assert "3" in steps["restart"]["after"]["server"]["argv"]
    assert "10" in steps["restart"]["before"]["server"]["argv"]


def test_who_is_as_declared_is_only_counted(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    site.apply()
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"), site.vm("ctx-3"))
    out = at_once(site, "plan")[1]
    says(out, "2 other VMs are as declared")
    plain = [line for line in out.splitlines() if "warning" not in line and "; next:" not in line]
    assert not any(name in line for line in plain for name in ("ctx-1", "ctx-2"))
