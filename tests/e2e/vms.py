"""A live VM for one test, and its backups through a real hub."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reconciler.core.call import Call, CallState
from tests.e2e.crashes import calls
from tests.e2e.site import ROOT, Appliance, Site, until

SOURCE = ROOT / "examples" / "node-appliance" / "source.py"


class Vm:
    """A VM whose disks are live. `pause`: how long its guest rests after each record that it
    writes, in seconds; None: it writes nothing."""

    def __init__(self, folder: Path, sizes: Mapping[int, int], pause: float | None = None) -> None:
        self.folder, self.sizes, self.pause = folder, dict(sizes), pause
        self.daemon = 0
        """The pid of its storage daemon; 0: it does not run."""
        self.start()

    def start(self) -> None:
        disks = [f"--disk={key}={size}" for key, size in self.sizes.items()]
        line = [sys.executable, str(SOURCE), str(self.folder), *disks]
        line += [] if self.pause is None else ["--write", f"--pause={self.pause}"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if "are live" not in said:
            self.end()
            raise AssertionError(f"no VM in {self.folder}: {said!r}")
        self.daemon = int(said.rpartition(" ")[2])

    @property
    def socket(self) -> Path:
        return self.folder / "nbd"

    def end(self) -> str:
        """End it in order; the last line that it said."""
        self.process.terminate()
        out, _ = self.process.communicate(timeout=60)
        self.daemon = 0  # it has waited for it
        return out.strip()

    def kill(self) -> None:
        """End it as a power cut does."""
        self.process.kill()
        if self.daemon:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.daemon, signal.SIGKILL)
        self.process.communicate(timeout=20)
        until(lambda: not Path(f"/proc/{self.daemon}/exe").exists(), "the end of the VM")
        self.daemon = 0  # its number may be another's now


@contextlib.contextmanager
def living(folder: Path, sizes: Mapping[int, int], pause: float | None = None) -> Iterator[Vm]:
    found = Vm(folder, sizes, pause)
    try:
        yield found
    finally:
        found.kill()


def ask(
    site: Site, vm: str, sizes: Mapping[int, int], run: str, kind: str = "full", **changes: Any
) -> None:
    """Write down that this run of a VM is wanted: a daemon begins with it."""
    disks = [{"key": key, "size": size} for key, size in sizes.items()]
    backup = {"run": run, "type": kind}
    site.spec(site.vm(vm, disks=disks, backup=backup, **changes), file=f"{vm}.yaml")


def ended(site: Site, vm: str, run: str) -> Call:
    """The call of a run, once it is over."""

    def over() -> Call | None:
        call = calls(site).get(vm)
        return call if call and call.run == run and call.state.terminal else None

    return until(over, f"the end of {run} of {vm}", 120.0)


def completed(site: Site, vm: str, run: str) -> None:
    call = ended(site, vm, run)
    assert call.state is CallState.COMPLETED, call.message


def content(site: Site, vm: str, key: int, run: str) -> bytes:
    """What a published image and all that it builds on hold."""
    raw = site.folder / "restored.raw"
    line = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"]
    subprocess.run([*line, str(site.image(vm, key, run)), str(raw)], check=True)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def lines(appliance: Appliance, event: str, number: int) -> dict[str, Any]:
    """The appliance's log line of this event and of this number, from 0, once it is there."""

    def there() -> dict[str, Any] | None:
        found = appliance.log_lines(event)
        return found[number] if len(found) > number else None

    return until(there, f"{event} {number} in the log", 60.0)


def moved(appliance: Appliance, number: int) -> dict[int, int]:
    """Disk key → bytes that went over in the appliance's job of this number, from 0."""
    disks = lines(appliance, "end", number)["disks"]
    return {int(disk["key"]): disk["bytes_transferred"] for disk in disks}
