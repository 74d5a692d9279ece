"""An accepted run that nobody hears of, or nobody works on: who looks is told, and what to type."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
from contextlib import closing

from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching
from tests.nbd_client import Client


def conditions(site: Site, vm: str = "ctx-1") -> dict[str, tuple[str, str]]:
    found = site.status()[vm]["conditions"]
    return {one["type"]: (one["status"], one["message"]) for one in found}


def accepted(site: Site, vm: str = "ctx-1") -> bool:
    found = site.status().get(vm)
    return bool(found and found["call"] and found["call"]["state"] == "ACCEPTED")


def test_a_daemon_that_was_killed_leaves_runs_unheard_and_everybody_says_so(
    site: Site, appliance: Appliance
) -> None:
    site.write_config(loop={"resync": "1s"})
    site.spec(site.vm("ctx-1"))
    with watching(site) as daemon:
        until(lambda: accepted(site), "accepted")
        assert "Unheard" not in conditions(site)
        explained = site.run("explain", "ctx-1")
        assert "kept true by pid" in explained
        assert "being changed" not in explained
        daemon.end(signal.SIGKILL)
        said = f"nothing listens on 127.0.0.1:{site.api}"
        assert said in conditions(site)["Unheard"][1]
        for command in (("status",), ("explain", "ctx-1"), ("plan",)):
            assert said in " ".join(site.run(*command, code=None).split())
        assert "nobody listens, and what an accepted run is to report is lost" in site.run("doctor")
        with closing(socket.create_server(("127.0.0.1", site.api))):
            told = f"pid {os.getpid()}) listens on 127.0.0.1:{site.api}, which is not of this hub"
            assert told in conditions(site)["Unheard"][1]
        with closing(sqlite3.connect(site.folder / "state" / "state.db")) as db, db:
            db.execute(
                "UPDATE meta SET value = json_remove(value, '$.listen') WHERE name = 'settings'"
            )
        assert "Unheard" not in conditions(site), "an older store does not say where it would be"


def test_a_daemon_asks_once_about_runs_that_were_accepted_before_it(
    site: Site, appliance: Appliance
) -> None:
    """Somebody is connected, and `stale_after` is far: nothing else makes it ask."""
    site.write_config(loop={"resync": "1s"})
    site.spec(site.vm("ctx-1"))
    site.apply()
    disk = site.status()["ctx-1"]["disks"][0]
    client = Client(disk["port"], disk["export"])
    with watching(site):
        said = until(
            lambda: "SNA site-a says: failed" in site.run("explain", "ctx-1"), "its word", 30
        )
        assert said
        assert conditions(site).get("Stale", ("",))[0] != "True", "somebody is still connected"
        client.close()
        until(lambda: conditions(site).get("Stale", ("",))[0] == "True", "that it is given up", 30)
        onward = json.loads(site.run("explain", "ctx-1", "-o", "json"))["next"]
        assert onward.startswith("reconciler resolve ctx-1 --failed --reason WHY")
        told = "Stale: SNA site-a says that it has failed"
        until(lambda: told in site.run("events", "ctx-1"), "the event", 30)
        appliance.end()
        until(lambda: "cannot be asked about it" in conditions(site)["Stale"][1], "it is gone", 30)
        assert "next: reconciler doctor --only sna; " in site.run("explain", "ctx-1")
        assert "cannot be asked about it" in " ".join(site.run("plan").split())
    assert len(appliance.starts()) == 1


def test_who_waits_for_a_run_that_does_not_end_is_told_what_to_type(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    said = site.run("apply", "-y", "--wait", "--timeout", "1s", code=124)
    assert "next: reconciler explain ctx-1" in said
    said = site.run("wait", "ctx-1", "--for", "Completed", "--timeout", "100ms", code=124)
    assert "next: reconciler explain ctx-1" in said


def test_a_run_that_is_asked_for_under_watch_is_no_surprise(
    site: Site, appliance: Appliance
) -> None:
    """Who watches may be quicker than who asked; neither is the run another than declared."""
    site.write_config(loop={"resync": "1s"})
    site.spec(site.vm("ctx-1"))
    with watching(site):
        until(lambda: accepted(site), "accepted")
        site.run("resolve", "ctx-1", "--failed", "--reason", "x", "-y")
        for number in range(3):
            run = f"n{number}"
            said = site.run("backup", "ctx-1", "--run", run, "--apply", "-y", code=None)
            assert "otherwise" not in said
            begun = f"run {run} was begun meanwhile by pid" in said
            assert begun or "it started the job" in said, said
            site.run("resolve", "ctx-1", "--failed", "--reason", "x", "-y")
        other = site.folder / "other.yaml"
        site.dump(other, {"vms": [site.vm("ctx-1", labels={"tier": "gold"})]})
        assert "declares ctx-1 otherwise" in site.run("apply", "-y", "-f", str(other), code=None)
        said = site.run("stop", "ctx-1", "-y", "--cancel-run")
        assert "would be started again at once: ctx-1" in said
        assert "reconciler resume ctx-1" in said


def test_the_death_of_a_server_under_a_client_is_an_event_that_warns(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    disk = site.status()["ctx-1"]["disks"][0]
    with closing(Client(disk["port"], disk["export"])) as client:
        client.write(1 << 16, b"x" * (1 << 16))
        site.kill(disk["pid"])
    site.apply(code=1)
    events = json.loads(site.run("events", "ctx-1", "-o", "json"))["events"]
    (died,) = [one for one in events if one["reason"] == "ServerDied"]
    assert (died["severity"], died["disk"]) == ("Warning", "2000")
    held = site.run("stop", "ctx-1", "-y", code=4)
    assert "--completed" not in held
    assert "reconciler resolve ctx-1 --failed --reason WHY" in held
    site.run("resolve", "ctx-1", "--failed", "--reason", "it died", "-y")


def test_a_command_that_stays_for_its_runs_hears_them(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    waiting = site.start("apply", "-y", "--wait")
    try:
        until(lambda: accepted(site), "accepted")
        # It takes the lock for a moment only, each time that it looks.
        assert not any("Unheard" in conditions(site) for _ in range(8))
    finally:
        waiting.send_signal(signal.SIGTERM)
        waiting.wait(30)
        for stream in (waiting.stdout, waiting.stderr):
            if stream:
                stream.close()
    assert "Unheard" in conditions(site)


def test_a_vm_that_is_declared_and_was_never_applied_is_explained(
    site: Site, appliance: Appliance
) -> None:
    site.write_config(loop={"resync": "1s"})
    site.spec(site.vm("ctx-1"))
    (site.specs / "new.yaml").write_text(
        json.dumps({"vms": [site.vm("ctx-new", backup={"run": "r1", "type": "incremental"})]})
    )
    with watching(site):
        until(lambda: accepted(site), "accepted")
        until(lambda: "no completed run" in site.run("plan", code=65), "its refusal")
        said = site.run("explain", "ctx-new")
        assert "ctx-new   never applied here" in said
        assert "new.yaml declares it" in said
        assert "kept true by pid" in said
        document = site.json("explain", "ctx-new")
        assert document["vm"] is None
        assert document["declared"]["file"].endswith("new.yaml")
    said = site.run("explain", "ctx-new")
    assert f"next: reconciler apply -f {site.specs}/new.yaml" in said
    said = site.run("explain", "ctx-none", code=64)
    assert "reconciler plan --vm ctx-none" in said
