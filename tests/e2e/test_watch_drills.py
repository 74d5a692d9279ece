"""What a daemon has to come through: kills under a copy, bad commits, many files, growth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from reconciler.host.store import read
from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until
from tests.e2e.test_copy_through_restart import MIB, PACED, fill, has_read
from tests.e2e.test_watch import answers, settled
from tests.e2e.test_watch import quick as quick  # the fixture
from tests.e2e.watching import watching


@pytest.mark.parametrize("mebibytes", [64, pytest.param(1024, marks=pytest.mark.soak)])
def test_a_copy_runs_through_kills_and_upgrades_of_the_daemon(
    quick: Site, appliance: Appliance, count: Callable[[str, int], None], mebibytes: int
) -> None:
    source, image = quick.folder / "source.raw", quick.image("ctx-1")
    fill(source, mebibytes)
    quick.spec(quick.vm("ctx-1", [mebibytes * MIB]))
    with watching(quick) as first:
        settled(quick, "ctx-1")
        pids = quick.pids()
        disk = quick.status()["ctx-1"]["disks"][0]
        uri = f"nbd://127.0.0.1:{disk['port']}/{disk['export']}"
        copy = subprocess.Popen([*PACED, str(source), uri])
        quick.others.append(copy)
        until(lambda: has_read(copy.pid, 0.2, source), "a fifth of it", 120)
        first.process.kill()  # while bytes flow
        copy.send_signal(signal.SIGSTOP)  # so that it stays in the middle, however slow this is
        first.process.wait(20)
        assert not has_read(copy.pid, 0.9, source)
    with watching(quick) as second:
        assert quick.pids() == pids, "taken over in the first pass"
        assert quick.status()["ctx-1"]["disks"][0]["clients"] > 0
        assert second.end() == 143
    with watching(quick):
        copy.send_signal(signal.SIGCONT)
        assert copy.wait(300) == 0
        assert quick.pids() == pids
        status = quick.status()["ctx-1"]
        assert (status["call"]["state"], status["call"]["tainted"]) == ("ACCEPTED", False)
        assert [one["restarts"] for one in status["disks"]] == [0]
        quick.run("resolve", "ctx-1", "--completed", "--reason", "the copy has ended", "-y")
        until(lambda: not quick.servers(), "released", 60)
    assert len(appliance.starts()) == 1
    assert crashes.same_bytes(source, str(image))
    source.unlink()
    image.unlink()
    count("kills of watch under a copy", 2)


def test_two_hundred_files_saved_at_once_are_one_pass_each(quick: Site) -> None:
    """Each VM is looked at for what is wanted last, and nothing is begun twice."""
    quick.spec(file="zero.yaml")
    with watching(quick):
        for number in range(200):
            name = f"ctx-{number}"
            temporary = quick.specs / f".{name}"
            quick.dump(temporary, {"vms": [{"name": name, "state": "absent"}]})
            temporary.rename(quick.specs / f"{name}.yaml")

        def declared() -> int:
            ledger = read(quick.folder / "state")
            return len(ledger.declared) if ledger else 0

        until(lambda: declared() == 200, "all of them", 60)
        source = quick.json("status")["source"]
    times = quick.run("events", "-n", "500").count("RevisionRead")
    assert times <= 6, f"{times} readings of what was saved within a second: {source}"


def test_a_bad_commit_takes_nothing_down(quick: Site, appliance: Appliance) -> None:
    """Six of eight VMs leave at once: held until that very revision is approved."""
    quick.write_config(loop={"resync": "1s", "prune": True})
    names = [f"ctx-{number}" for number in range(8)]
    for name in names:
        quick.spec(quick.vm(name, backup={"run": "r1"}), file=f"{name}.yaml")
    with watching(quick):
        settled(quick, *names)
        before = quick.servers()
        for name in names[:6]:
            (quick.specs / f"{name}.yaml").unlink()
        held = until(
            lambda: (
                [
                    c
                    for c in quick.status()["ctx-0"]["conditions"]
                    if c["type"] == "PruneHeld" and c["reason"] == "TooMany"
                ]
                or None
            ),
            "held",
            60,
        )
        assert quick.servers() == before
        revision = held[0]["message"].split("reconciler approve ")[1].split()[0].rstrip(";,.")
        quick.run("approve", revision)
        # Their runs are active: what is approved goes when nobody writes any more.
        until(
            lambda: any(c["reason"] == "RunActive" for c in quick.status()["ctx-0"]["conditions"]),
            "held by its run",
            60,
        )
        assert quick.servers() == before
        quick.run("resolve", "ctx-0", "--failed", "--reason", "test", "-y")
        until(lambda: not any(m.vm == "ctx-0" for m in quick.servers().values()), "gone", 60)


@pytest.mark.parametrize("cycles", [16, pytest.param(1000, marks=pytest.mark.soak)])
def test_heals_leave_nothing_behind(quick: Site, appliance: Appliance, cycles: int) -> None:
    """No descriptor, thread, child or socket more after many heals than after a few."""
    quick.write_config(loop={"resync": "1s", "healthy_after": "1ms"})
    quick.spec(*(quick.vm(f"ctx-{number}") for number in range(8)))
    with watching(quick) as daemon:
        settled(quick, *(f"ctx-{number}" for number in range(8)))

        def heal(count: int) -> None:
            done = 0
            while done < count:
                for identity, mark in list(quick.servers().items()):
                    quick.kill(identity.pid)
                    name = f"{mark.vm}-r1-disk0"
                    until(lambda m=mark, n=name: answers(m.port, n), "healed", 60)  # type: ignore[misc]
                    done += 1

        def held() -> tuple[int, int]:
            """Descriptors and children."""
            children = subprocess.run(
                ["ps", "--ppid", str(daemon.pid), "-o", "pid="], capture_output=True, text=True
            ).stdout.split()
            return len(os.listdir(f"/proc/{daemon.pid}/fd")), len(children)

        heal(16)
        until(lambda: quick.changes() == [], "at rest", 60)
        before = held()
        heal(cycles)
        until(lambda: quick.changes() == [], "at rest", 60)
        after = held()
        assert after[0] <= before[0] + 4, "descriptors"
        assert after[1] <= before[1] + 2, "children, zombies among them"
    assert len(appliance.starts()) == 8


def test_a_yaml_bomb_is_told_and_changes_nothing(quick: Site) -> None:
    quick.spec(quick.vm("ctx-1"), file="good.yaml")
    with watching(quick) as daemon:
        settled(quick, "ctx-1")
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
        (quick.specs / "bomb.yaml").write_text("\n".join([*lines, "vms: *a11", ""]))
        quick.spec(quick.vm("ctx-2"), file="more.yaml")
        settled(quick, "ctx-2")
        status = json.loads(json.dumps(quick.status()))
        assert status["ctx-1"]["call"]["state"] == "ACCEPTED"
        with open(f"/proc/{daemon.pid}/status") as file:
            rss = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        assert rss < 300 * 1024, f"{rss} KiB"
