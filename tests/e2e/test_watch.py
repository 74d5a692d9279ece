"""The daemon: it heals, acts on what is saved, takes orders, ends in order, and takes over."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from reconciler.core.units import Port
from reconciler.host import nbd
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching


@pytest.fixture
def quick(site: Site, appliance: Appliance) -> Site:
    """A hub whose loop does not wait long."""
    site.write_config(loop={"resync": "1s"})
    return site


def answers(port: Port, name: str) -> bool:
    return nbd.handshake([nbd.Target("127.0.0.1", port, name)], 5.0)[0].answered


def own(text: str) -> list[str]:
    """What is said of this hub: other tests' servers come and go, and a daemon is heard by."""
    strange = ("not ours", "ctx-9: its run does not end")
    return [line for line in text.splitlines() if not line.startswith(strange)]


def settled(site: Site, *vms: str) -> None:
    """Every disk of these VMs answers, and the SNA has accepted their runs."""

    def there() -> bool:
        found = site.status()
        return all(
            vm in found
            and found[vm]["call"]
            and found[vm]["call"]["state"] == "ACCEPTED"
            and all(disk["ready"] for disk in found[vm]["disks"])
            for vm in vms
        )

    until(there, f"{vms} settled", 60)


def test_it_makes_a_directory_true_and_heals_what_ends(quick: Site, appliance: Appliance) -> None:
    quick.spec(quick.vm("ctx-1", (1 << 20, 1 << 20)))
    quick.real_starts = True
    with watching(quick) as daemon:
        settled(quick, "ctx-1")
        before = quick.servers()
        victim = next(one for one, mark in before.items() if mark.disk == 2001)
        port = before[victim].port
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: answers(port, "ctx-1-r1-disk1"), "healed")
        after = quick.servers()
        assert victim not in after
        assert sorted(m.port for m in after.values()) == sorted(m.port for m in before.values())
        until(lambda: quick.status()["ctx-1"]["disks"][1]["restarts"] == 1, "noted")
        assert len(appliance.starts()) == 1
        assert daemon.end() == 143
    assert quick.servers().keys() == after.keys(), "the servers stay"
    assert quick.changes() == []


def test_a_client_waits_through_a_restart_instead_of_being_refused(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1"))
    with watching(quick):
        settled(quick, "ctx-1")
        ((identity, mark),) = quick.servers().items()
        for _ in range(5):
            quick.kill(identity.pid)
            with socket.create_connection(("127.0.0.1", mark.port), 5) as early:
                early.settimeout(20)
                assert early.recv(8) == b"NBDMAGIC"
            ((identity, _),) = until(
                lambda pid=identity.pid: {  # type: ignore[misc]
                    k: v for k, v in quick.servers().items() if k.pid != pid
                },
                "the next server",
            ).items()


def test_the_next_daemon_takes_over_what_runs_and_heals_it(
    quick: Site, appliance: Appliance
) -> None:
    quick.spec(*(quick.vm(f"ctx-{number}", (1 << 20, 1 << 20)) for number in range(3)))
    with watching(quick) as first:
        settled(quick, "ctx-0", "ctx-1", "ctx-2")
        before = quick.servers()
        first.process.kill()
        first.process.wait(10)
    with watching(quick):
        assert quick.servers() == before
        victim, mark = next(iter(before.items()))
        quick.kill(victim.pid)
        # Its socket was fetched: nobody is refused.
        with socket.create_connection(("127.0.0.1", mark.port), 5) as early:
            early.settimeout(20)
            assert early.recv(8) == b"NBDMAGIC"
        settled(quick, mark.vm)
    assert len(appliance.starts()) == 3


def test_a_saved_file_is_acted_on_and_a_broken_one_holds(quick: Site, appliance: Appliance) -> None:
    quick.spec(quick.vm("ctx-1"), file="one.yaml")
    with watching(quick):
        settled(quick, "ctx-1")
        new = quick.specs / ".two.yaml.tmp"
        quick.dump(new, {"vms": [quick.vm("ctx-2")]})
        new.rename(quick.specs / "two.yaml")
        settled(quick, "ctx-2")
        before = quick.servers()
        (quick.specs / "one.yaml").write_text("vms: [{name: ctx-1, state")
        new.write_text(json.dumps({"vms": [quick.vm("ctx-3")]}))
        new.rename(quick.specs / "three.yaml")
        settled(quick, "ctx-3")
        assert before.items() <= quick.servers().items()
        until(
            lambda: any(
                c["type"] == "SourceUnreadable" and "one.yaml" in c["message"]
                for c in quick.status()["ctx-1"]["conditions"]
            ),
            "the condition",
        )
    assert len(appliance.starts()) == 3


def test_apply_goes_through_the_daemon_and_says_what_it_says_without(
    quick: Site, appliance: Appliance
) -> None:
    quick.spec(quick.vm("ctx-1"), file="kept.yaml")
    other = quick.folder / "other.yaml"
    quick.dump(other, {"vms": [quick.vm("ctx-9", (1 << 20, 1 << 20))]})
    with watching(quick):
        settled(quick, "ctx-1")
        out = quick.run("apply", "-y", "-f", str(other))
        assert "1 call" in out or "call" in out
        assert "1 of 1 VM as declared" in out
        again = quick.run("apply", "-y", "-f", str(other))
        found = quick.json("apply", "-y", "-f", str(other))
        settled(quick, "ctx-9")
    assert "No changes" in again
    assert found["vms"][0]["name"] == "ctx-9"
    alone = quick.run("apply", "-y", "-f", str(other))
    assert own(alone) == own(again), "the same without a daemon"
    assert len(appliance.starts()) == 2


def test_a_signal_to_an_apply_that_was_handed_over_ends_what_it_began(
    quick: Site, appliance: Appliance
) -> None:
    appliance.misbehave("hang-before")
    quick.appliance_at(appliance.url, timeout="4s")
    quick.spec(file="kept.yaml")
    other = quick.folder / "other.yaml"
    quick.dump(other, {"vms": [quick.vm("ctx-9")]})
    with watching(quick, "--allow-empty"):
        command = quick.start("apply", "-y", "-f", str(other))
        until(lambda: quick.servers() or None, "its server")
        command.send_signal(signal.SIGTERM)
        _, err = command.communicate(timeout=60)
        assert command.returncode == 143, err


def test_what_a_person_stops_stays_down_until_it_is_resumed(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1"))
    with watching(quick):
        settled(quick, "ctx-1")
        held = quick.run("stop", "ctx-1", "-y", code=4)
        assert "paused" not in held, "nothing was stopped"
        out = quick.run("stop", "ctx-1", "--cancel-run", "-y")
        assert "paused" in out and "reconciler resume ctx-1" in out
        until(lambda: not quick.servers(), "stopped")


def test_a_bad_config_is_refused_and_the_old_one_kept(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1"))
    good = (quick.folder / "reconciler.yaml").read_text()
    with watching(quick) as daemon:
        settled(quick, "ctx-1")
        (quick.folder / "reconciler.yaml").write_text("ports: {range: nonsense}\n")
        os.kill(daemon.pid, signal.SIGHUP)
        until(lambda: daemon.said("the config was not taken"), "a refusal")
        (quick.folder / "reconciler.yaml").write_text(good)
        assert "asked pid" in quick.run("reload")
        until(lambda: daemon.said("the config was taken"), "taken")
        settled(quick, "ctx-1")


def test_two_daemons_are_one_too_many(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1"))
    with watching(quick) as daemon:
        settled(quick, "ctx-1")
        out = quick.run("watch", "--lock-timeout", "1s", code=6)
        assert f"pid {daemon.pid}" in out
        out = quick.run("serve", "--lock-timeout", "1s", code=6)
        assert f"pid {daemon.pid}" in out


def test_a_run_ends_by_its_callbacks_and_its_servers_go(quick: Site, appliance: Appliance) -> None:
    data = os.urandom(1 << 20)
    appliance.source("ctx-1", 2000, data)
    quick.spec(quick.vm("ctx-1"))
    with watching(quick) as daemon:
        url = f"http://127.0.0.1:{quick.api}/api/v1/backups/"
        until(lambda: appliance.starts(), "the call")
        job = appliance.starts()[0]["job_id"]
        settled(quick, "ctx-1")
        body = json.dumps({"change_id": "52 3c/7", "disk_id": 0, "bytes_transferred": len(data)})
        request = urllib.request.Request(f"{url}{job}/complete", body.encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200
        until(lambda: quick.status()["ctx-1"]["call"]["state"] == "COMPLETED", "the end", 60)
        until(lambda: not quick.servers(), "released")
        assert not quick.listening(), "no socket is kept"
        assert daemon.end() == 143


def test_a_run_of_which_nothing_is_heard_is_told_and_left_alone(
    quick: Site, appliance: Appliance
) -> None:
    quick.spec(quick.vm("ctx-1"))
    url = f"http://127.0.0.1:{quick.api}/metrics"

    def figure(value: int) -> bool:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return f"\nreconciler_runs_stale {value}.0\n" in answer.read().decode()

    with watching(quick) as daemon:
        until(lambda: figure(1), "that it is stale", 60)
        stands = quick.status()["ctx-1"]
        stale = next(one for one in stands["conditions"] if one["type"] == "Stale")
        # It has no disks to copy, and says so when it is asked, although it was accepted.
        assert (stale["status"], stale["reason"]) == ("True", "ApplianceFailed")
        assert "there is no source disk" in stale["message"]
        assert "1 of 1 servers answer, clients are connected to 0 of 1 disks" in stale["message"]
        assert stands["call"]["state"] == "ACCEPTED"
        quick.run("resolve", "ctx-1", "--failed", "--reason", "it says so", "-y")
        until(lambda: figure(0), "that it is not any more", 60)
        assert quick.run("events", "ctx-1").count("Stale") == 1
        assert daemon.end() == 143


def test_what_stands_in_the_way_is_an_event_though_nothing_was_done(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1"))
    repository = quick.folder / "repository"

    def times(reason: str) -> list[int]:
        found = quick.json("events", "ctx-1")["events"]
        return [one["count"] for one in found if one["reason"] == reason]

    with watching(quick):
        settled(quick, "ctx-1")
        quick.spec(quick.vm("ctx-1", (1 << 20, 1 << 20)))  # by a save
        until(lambda: times("RunChanged") == [1], "that it is told")
        quick.spec(quick.vm("ctx-1"))
        until(lambda: quick.changes() == [], "that it is as it was")
        ((identity, mark),) = quick.servers().items()
        with socket.create_connection(("127.0.0.1", mark.port), 5) as client:
            assert client.recv(8) == b"NBDMAGIC"
            os.kill(identity.pid, signal.SIGSTOP)  # nothing tells of that but a look at everything
            try:
                until(lambda: times("NoAnswerInUse") == [1], "that it is told", 40)
            finally:
                os.kill(identity.pid, signal.SIGCONT)
        until(lambda: quick.changes() == [], "that it answers again")
        aside = repository.rename(quick.folder / "aside")
        until(lambda: times("ImageReplaced") == [1], "that it is told")
        time.sleep(2.2)  # two looks
        assert times("ImageReplaced") == [1], "once, and not with every look"
        aside.rename(repository)


def test_a_silent_appliance_and_dead_storage_hold_nobody_else_up(
    quick: Site, appliance: Appliance
) -> None:
    """An SNA that falls silent, once runs have begun, keeps VMs busy; another heals meanwhile."""

    def well_once() -> None:
        client, _ = mute.accept()
        with client:
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(50)
        threading.Thread(target=well_once, daemon=True).start()
        sna = {"url": f"http://127.0.0.1:{mute.getsockname()[1]}", "timeout": "30s"}
        config = quick.config["snas"] | {"mute": sna}
        quick.write_config(snas=config)
        quick.spec(quick.vm("ctx-1", sna="site-a"))
        with watching(quick) as daemon:
            settled(quick, "ctx-1")
            quick.spec(*(quick.vm(f"ctx-{n}", sna="mute") for n in (2, 3, 4)), file="mute.yaml")
            until(lambda: len(quick.servers()) == 4, "their servers")
            ((identity, mark),) = [
                (one, mark) for one, mark in quick.servers().items() if mark.vm == "ctx-1"
            ]
            began = time.monotonic()
            os.kill(identity.pid, signal.SIGKILL)
            until(lambda: answers(mark.port, "ctx-1-r1-disk0"), "healed")
            assert time.monotonic() - began < 25, "it waited for an appliance of others"
            daemon.process.kill()


def test_the_state_directory_may_have_a_long_name(
    quick: Site, appliance: Appliance, tmp_path: Path
) -> None:
    """A Unix socket's path may have 107 bytes; a state directory's more."""
    quick.write_config(state=str(tmp_path / ("d" * 100) / ("e" * 50)))
    quick.spec(quick.vm("ctx-1"))
    with watching(quick):
        settled(quick, "ctx-1")
        assert "No changes" in quick.run("apply", "-y")
    assert len(appliance.starts()) == 1
