"""pm2: one daemon, one application for each server."""

from __future__ import annotations

import json
import shutil
import time

from bench.hubs import Floor
from bench.peers import Supervisor, Unavailable, environment, run, until
from bench.workplace import Took, children, servers, timed


class Pm2(Supervisor):
    """From the npm registry, in a folder of its own; logs go nowhere."""

    name = "pm2"

    def install(self) -> str:
        self.bin = self.home / "node_modules" / ".bin"
        if not (self.bin / "pm2").exists():
            if shutil.which("npm") is None:
                raise Unavailable("no npm")
            self.home.mkdir(parents=True, exist_ok=True)
            run(["npm", "install", "--silent", "--no-fund", "--no-audit", "pm2"], cwd=self.home)
        package = self.home / "node_modules" / "pm2" / "package.json"
        return str(json.loads(package.read_text())["version"])

    def prepare(self, floor: Floor) -> None:
        self.root = floor.site.root / "pm2"
        self.root.mkdir(exist_ok=True)
        apps = [
            {
                "name": disk.export,
                "script": shutil.which("qemu-nbd"),
                "args": line,
                "interpreter": "none",
                "exec_mode": "fork",
                "out_file": "/dev/null",
                "error_file": "/dev/null",
            }
            for disk, line in zip(floor.site.disks, floor.lines, strict=True)
        ]
        (self.root / "ecosystem.json").write_text(json.dumps({"apps": apps}))

    def _pm2(self, *words: str) -> Took:
        given = {**environment(self.bin), "PM2_HOME": str(self.root / "home")}
        return timed([str(self.bin / "pm2"), "--silent", *words], self.root, given)

    def start(self, floor: Floor) -> None:  # noqa: ARG002
        self._pm2("start", "ecosystem.json")

    def again(self, floor: Floor) -> Took:  # noqa: ARG002
        raise Unavailable("to start again what runs is to restart it")

    def stop(self, floor: Floor) -> float:  # noqa: ARG002
        began = time.monotonic()
        self._pm2("kill")
        until(lambda: not self.supervisors() and not servers(), "the end of pm2")
        return time.monotonic() - began

    def supervisors(self) -> list[int]:
        return [pid for pid, argv in children().items() if argv[0].startswith("PM2 ")]
