"""SIGKILL at random moments, again and again; whatever is left is taken up and made whole."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest

from reconciler.core.call import CallState
from reconciler.core.units import Seconds
from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until
from tests.ports import Dealer

MIB: Final = 1 << 20
SETTLE_EVERY: Final = 50
PASS: Final[Seconds] = 0.3
"""What an apply takes from the lock to its end, about: the kill comes somewhere in it."""
DISKS: Final[Mapping[str, int]] = {"pg": 3, "web": 2}


class Storm:
    """`pg` ends a run and is asked for the next, over and over; the run of `web` goes on, and its
    servers are healed. Nobody writes: there is nothing to copy, so pg's runs fail at once."""

    def __init__(self, site: Site, appliance: Appliance, seed: int) -> None:
        self.site, self.appliance = site, appliance
        self.random = random.Random(seed)
        self.runs = dict.fromkeys(DISKS, 1)
        self.killed: dict[str, int] = {"apply": 0, "server": 0}
        ends = {"url": appliance.url, "timeout": "2s", "poll": "100ms", "reports_end": True}
        goes_on = {**ends, "reports_end": False}
        site.write_config(snas={"ends": ends, "goes-on": goes_on})
        self.spec()

    def spec(self) -> None:
        vms = [
            self.site.vm(
                name,
                [MIB] * disks,
                sna="ends" if name == "pg" else "goes-on",
                backup={"run": f"r{self.runs[name]}"},
            )
            for name, disks in DISKS.items()
        ]
        self.site.spec(*vms)

    def round(self) -> None:
        """Perhaps a server dies; then an apply begins, and dies."""
        servers = sorted(self.site.servers(), key=lambda one: one.pid)
        if servers and self.random.random() < 0.4:
            with contextlib.suppress(ProcessLookupError):  # a killed apply's stop may end it
                self.site.kill(self.random.choice(servers).pid)
            self.killed["server"] += 1
        process = self.site.start("apply", "-y")
        if self.random.random() < 0.9:
            until(
                lambda: crashes.has_lock(self.site, process.pid) or process.poll() is not None,
                "the lock",
            )
        time.sleep(self.random.uniform(0, PASS))
        process.kill()
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in out + err, out + err
        self.killed["apply"] += process.returncode == -signal.SIGKILL
        self.go_on()

    def go_on(self) -> None:
        """What a person does: say what the appliance's log says, ask for the next run."""
        for vm, call in crashes.calls(self.site).items():
            if call.state is CallState.UNKNOWN:
                known = any(one["job_id"] == call.job_id for one in self.appliance.starts())
                answer = "--accepted" if known else "--resend"
                # Refused while another attempt's server has a client; it is said again later.
                self.site.run("resolve", vm, answer, "--reason", "its log", "-y", code=None)
            elif call.state.terminal and call.run == f"r{self.runs[vm]}":
                self.runs[vm] += 1
                self.spec()

    def settle(self) -> None:
        """Leave it alone, let an operator apply, and look at everything."""
        crashes.recover(self.site, self.appliance)
        newest = crashes.calls(self.site)
        assert newest["pg"].state is CallState.FAILED, newest["pg"]
        assert newest["web"].state is CallState.ACCEPTED, newest["web"]
        assert not any(call.tainted for call in newest.values())
        web = {"web": (f"r{self.runs['web']}", range(2000, 2000 + DISKS["web"]))}
        began = {f"{vm}-r{run}": 1 for vm, last in self.runs.items() for run in range(1, last + 1)}
        crashes.check(self.site, self.appliance, crashes.wanted(self.site, web), began)
        self.site.run("resolve", "web", "--completed", "--reason", "a test", "-y")
        for vm in DISKS:
            self.runs[vm] += 1
        self.spec()


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(1, 6), *(pytest.param(seed, 250, marks=pytest.mark.soak) for seed in range(2, 6))],
)
def test_kills_at_random_moments(
    tmp_path: Path, dealer: Dealer, count: Callable[[str, int], None], seed: int, kills: int
) -> None:
    site = Site(tmp_path, dealer.deal(20))
    appliance = Appliance(tmp_path / "appliance")
    storm = Storm(site, appliance, seed)
    rounds = 0
    try:
        while storm.killed["apply"] < kills:
            rounds += 1
            storm.round()
            if rounds % SETTLE_EVERY == 0:
                storm.settle()
        storm.settle()
    except BaseException as error:
        error.add_note(f"seed {seed}, round {rounds}, {storm.killed} (pid {os.getpid()})")
        raise
    finally:
        site.clean_up()
        appliance.end()
    count("SIGKILLs of an apply at a random moment", storm.killed["apply"])
    count("SIGKILLs of a server in between", storm.killed["server"])
