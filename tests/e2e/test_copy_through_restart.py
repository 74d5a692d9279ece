"""A copy that runs on while the reconciler is killed under it, and killed again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until

MIB: Final = 1 << 20
CHUNK: Final = 16 * MIB
PACED: Final = ("nbdcopy", "--requests=1", "--request-size=16384", "--flush")
"""Small steps, so that there is time to be in the middle."""


def fill(path: Path, mebibytes: int) -> None:
    """A source disk without a hole in it."""
    with path.open("wb") as file:
        for _ in range(mebibytes * MIB // CHUNK):
            file.write(os.urandom(CHUNK))


def has_read(pid: int, share: float, path: Path) -> bool:
    """Whether a copy is that far. Source: proc(5), /proc/PID/io, rchar."""
    read = int(Path(f"/proc/{pid}/io").read_text().split()[1])
    return read > share * path.stat().st_size


def kill_waiting(site: Site, middle: Callable[[], bool]) -> None:
    """SIGKILL an `apply --wait` that has done its work, once `middle` is so."""
    waiting = site.start("apply", "-y", "--wait")
    until(lambda: crashes.has_lock(site, waiting.pid) and middle(), "the middle")
    waiting.kill()
    waiting.communicate(timeout=60)
    assert waiting.returncode == -signal.SIGKILL


@pytest.mark.parametrize("mebibytes", [64, pytest.param(512, marks=pytest.mark.soak)])
def test_a_copy_runs_through_kills_of_the_reconciler(
    site: Site, appliance: Appliance, count: Callable[[str, int], None], mebibytes: int
) -> None:
    source, image = site.folder / "source.raw", site.image("ctx-1")
    fill(source, mebibytes)
    site.spec(site.vm("ctx-1", [mebibytes * MIB]))
    waiting = site.start("apply", "-y", "--wait")
    until(lambda: bool(appliance.starts()) and site.pids(), "the call")
    pids = site.pids()
    disk = crashes.status(site)["ctx-1"]["disks"][0]
    uri = f"nbd://127.0.0.1:{disk['port']}/{disk['export']}"
    copy = subprocess.Popen([*PACED, str(source), uri])
    site.others.append(copy)
    until(lambda: has_read(copy.pid, 0.2, source), "a fifth of it")
    waiting.kill()  # while bytes flow
    copy.send_signal(signal.SIGSTOP)  # so that it stays in the middle, however slow the machine is
    waiting.communicate(timeout=60)
    assert not has_read(copy.pid, 0.9, source)
    site.apply()
    assert crashes.status(site)["ctx-1"]["disks"][0]["clients"] > 0
    kill_waiting(site, lambda: True)
    copy.send_signal(signal.SIGCONT)
    kill_waiting(site, lambda: copy.poll() is not None or has_read(copy.pid, 0.7, source))
    site.apply()
    assert copy.wait(120) == 0
    assert site.pids() == pids
    assert len(appliance.starts()) == 1
    status = crashes.status(site)["ctx-1"]
    assert (status["call"]["state"], status["call"]["tainted"]) == ("ACCEPTED", False)
    assert [one["restarts"] for one in status["disks"]] == [0]
    site.run("resolve", "ctx-1", "--completed", "--reason", "the copy has ended", "-y")
    site.apply()
    assert site.servers() == {}
    assert crashes.same_bytes(source, str(image))
    source.unlink()
    image.unlink()  # half a gibibyte each
    count("SIGKILLs of apply --wait under a copy", 3)
    count("MiB that were copied through them", mebibytes)
