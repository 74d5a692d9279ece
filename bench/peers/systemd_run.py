"""systemd-run: a transient unit for each server, where systemd runs."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from bench.hubs import Floor
from bench.peers import Supervisor, Unavailable, run, until
from bench.workplace import PARALLEL, Took, timed

PREFIX = f"bench-{os.getpid()}"


class SystemdRun(Supervisor):
    """Units of the system's manager, with names of this process; stopped by their names."""

    name = "systemd-run"

    def install(self) -> str:
        if not Path("/run/systemd/system").is_dir():
            raise Unavailable("systemd is not what runs this machine")
        if os.geteuid() != 0:
            raise Unavailable("it takes root")
        return run(["systemd-run", "--version"]).split()[1]

    def units(self, floor: Floor) -> list[str]:
        return [f"{PREFIX}-{disk.export}.service" for disk in floor.site.disks]

    def start(self, floor: Floor) -> None:
        words = []
        for unit, line in zip(self.units(floor), floor.lines, strict=True):
            words += [f"--unit={unit}", "--property=Restart=always", "qemu-nbd", *line]
        size = len(words) // len(floor.lines)
        feed = "".join(f"{word}\0" for word in words).encode()
        many = ["xargs", "-0", "-P", str(PARALLEL), "-n", str(size), "systemd-run", "--quiet"]
        subprocess.run(many, input=feed, check=True)

    def again(self, floor: Floor) -> Took:
        return timed(["systemctl", "is-active", "--quiet", *self.units(floor)], floor.site.root)

    def stop(self, floor: Floor) -> float:
        began = time.monotonic()
        subprocess.run(["systemctl", "stop", *self.units(floor)], check=True)
        ports = {str(disk.port) for disk in floor.site.disks}
        until(lambda: not ports & set(run(["ss", "-Hltn"]).split()), "the end of the units")
        return time.monotonic() - began
