"""runit: a directory per service, a runsv per service, one runsvdir over them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

from bench.hubs import Floor
from bench.peers import Supervisor, Unavailable, commands, environment, run, until
from bench.workplace import Took, children, servers, timed


class Runit(Supervisor):
    """Debian's package, unpacked; the system's own services are not touched."""

    name = "runit"

    def install(self) -> str:
        self.bin = self.home / "usr" / "bin"
        if not (self.bin / "runsvdir").exists():
            self.home.mkdir(parents=True, exist_ok=True)
            if shutil.which("apt-get") is None:
                raise Unavailable("no apt-get: runit is taken from Debian's package")
            run(["apt-get", "download", "-q", "runit"], cwd=self.home)
            for package in self.home.glob("runit_*.deb"):
                run(["dpkg-deb", "-x", package, self.home])
        if not (self.bin / "runsvdir").exists():
            raise Unavailable("Debian's package has no runsvdir")
        packages = sorted(self.home.glob("runit_*.deb"))
        return packages[-1].name.split("_")[1] if packages else "unknown"

    def prepare(self, floor: Floor) -> None:
        self.services = floor.site.root / "services"
        shutil.rmtree(self.services, ignore_errors=True)
        for export, line in commands(floor).items():
            folder = self.services / export
            folder.mkdir(parents=True)
            script = folder / "run"
            script.write_text(f"#!/bin/sh\nexec {line} 2>/dev/null\n")
            script.chmod(0o755)
        # runsvdir waits for a second where one was added in this one; these were there before.
        os.utime(self.services, (time.time() - 10, time.time() - 10))

    def start(self, floor: Floor) -> None:  # noqa: ARG002
        self.process = subprocess.Popen(
            [str(self.bin / "runsvdir"), "-P", str(self.services)],
            env=environment(self.bin),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def again(self, floor: Floor) -> Took:
        names = [str(self.services / export) for export in commands(floor)]
        line = [str(self.bin / "sv"), "status", *names]
        return timed(line, floor.site.root, environment(self.bin))

    def stop(self, floor: Floor) -> float:  # noqa: ARG002
        began = time.monotonic()
        self.process.send_signal(signal.SIGHUP)
        self.process.wait()
        until(lambda: not self.supervisors() and not servers(), "the end of runit's services")
        return time.monotonic() - began

    def supervisors(self) -> list[int]:
        words = ("runsvdir", "runsv")
        return [pid for pid, argv in children().items() if argv[0].rsplit("/", 1)[-1] in words]
