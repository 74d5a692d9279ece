"""What people would use instead, each in an environment of its own and as well tuned as we could.

Each does the same work as the floor: the very command lines of the servers, images that exist, an
NBD handshake with every export, a health check and one POST for each VM, and a second run that does
nothing. `call.py` makes the calls for those who have no notion of them.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from bench.clients import handshake
from bench.hubs import Floor
from bench.workplace import HERE, Took, end, servers, timed, until

CACHE: Final = HERE / ".peers"
"""Where peers are installed; not in Git, and kept from run to run."""
CALL: Final = HERE / "peers" / "call.py"


HEALTHY: Final = 1.2
"""Seconds after which a server counts as one that was up: one that dies earlier is left down for a
second by most supervisors."""


class Unavailable(Exception):  # noqa: N818 an outcome
    """A peer cannot be had here, and why."""


class Peer:
    """One way to have the same exports and calls."""

    name: ClassVar[str]
    supervises: ClassVar[bool] = False
    """It starts a server again by itself."""
    slow: ClassVar[bool] = False
    """A round takes more than 20 s, so fewer are made."""

    def __init__(self) -> None:
        self.home = CACHE / type(self).__name__.lower()

    def install(self) -> str:
        """Make it be there; its version. Raises Unavailable."""
        raise NotImplementedError

    def prepare(self, floor: Floor) -> None:
        """Write its files, which nobody times: they are what specs are to the tool."""

    def cold(self, floor: Floor) -> Took:
        """Every export answers and every VM is called for."""
        raise NotImplementedError

    def again(self, floor: Floor) -> Took:
        """The same command with nothing to do."""
        raise NotImplementedError

    def heal(self, floor: Floor) -> float:
        """From the death of a server, or the start of the command that finds it, to its answer."""
        first = floor.site.disks[0]
        dead = next(pid for pid, argv in servers().items() if first.export in argv)
        end([dead], signal.SIGKILL)
        began = time.monotonic()
        self.again(floor)
        handshake(first.port, first.export)
        return time.monotonic() - began

    def stop(self, floor: Floor) -> float:
        """Every server is gone, and what supervised them."""
        return floor.stop()

    def supervisors(self) -> list[int]:
        """The processes that live on beside the servers."""
        return []


class Supervisor(Peer):
    """One that keeps servers up: the calls are made by who started it."""

    supervises = True

    def start(self, floor: Floor) -> None:
        raise NotImplementedError

    def cold(self, floor: Floor) -> Took:
        began = time.monotonic()
        self.start(floor)
        for vm in floor.site.vms:
            floor.site.call(vm)
        return Took(time.monotonic() - began, 0.0, began, "")

    def heal(self, floor: Floor) -> float:
        first = floor.site.disks[0]
        time.sleep(HEALTHY)
        dead = next(pid for pid, argv in servers().items() if first.export in argv)
        began = time.monotonic()
        os.kill(dead, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{dead}/exe").exists(), "the end of a server")
        handshake(first.port, first.export)
        return time.monotonic() - began


def environment(path: str | Path = "") -> dict[str, str]:
    """What a peer is started with: nothing of ours."""
    usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    home = os.environ.get("HOME", "/root")
    return {"PATH": f"{path}:{usual}" if path else usual, "LC_ALL": "C.UTF-8", "HOME": home}


def run(argv: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Its output. Raises Unavailable, with what it said last, if it fails."""
    try:
        done = subprocess.run(
            [str(word) for word in argv],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            cwd=cwd,
            # What is installed keeps its bytecode beside it, not in this bench's workplace.
            env={k: v for k, v in os.environ.items() if k != "PYTHONPYCACHEPREFIX"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise Unavailable(f"{shlex.join(map(str, argv[:3]))} …: {last[0][:200]}")
    return done.stdout.strip()


def venv(home: Path, *packages: str) -> Path:
    """The bin of an environment that has some packages. Raises Unavailable."""
    binaries = home / "bin"
    mark = home / ".has"
    wanted = "\n".join(packages)
    if not mark.exists() or mark.read_text() != wanted:
        run([sys.executable, "-m", "venv", home])
        pip = "-m pip install -q --disable-pip-version-check".split()
        run([binaries / "python", *pip, *packages])
        mark.write_text(wanted)
    return binaries


def job(floor: Floor) -> Path:
    """What `call.py` is to do, as a file."""
    site = floor.site
    path = site.root / "job.json"
    value: Mapping[str, object] = {
        "url": site.appliance.url,
        "done": str(site.root / "called"),
        "vms": {
            vm: {
                "exports": [[disk.port, disk.export] for disk in disks],
                "request": site.request(vm),
            }
            for vm, disks in site.vms.items()
        },
    }
    path.write_text(json.dumps(value))
    return path


def commands(floor: Floor) -> dict[str, str]:
    """Export name → the command line of its server, for a shell."""
    exports = [disk.export for disk in floor.site.disks]
    lines = [shlex.join(["qemu-nbd", *line]) for line in floor.lines]
    return dict(zip(exports, lines, strict=True))


__all__ = [
    "CALL",
    "Peer",
    "Supervisor",
    "Unavailable",
    "commands",
    "environment",
    "job",
    "run",
    "timed",
    "until",
    "venv",
]
