"""pyinfra: one deploy on @local, one question about all, one command for what is missing."""

from __future__ import annotations

import shutil
import sys

from bench.hubs import Floor
from bench.peers import CALL, Peer, commands, environment, job, run, venv
from bench.workplace import Took, timed

DEPLOY = """\
from pyinfra import host
from pyinfra.facts.server import Command
from pyinfra.operations import server

LINES = {lines!r}
VMS = {vms!r}
LOOK = "ss -Hltn; echo called:; ls {root}/called 2>/dev/null || true"
seen = host.get_fact(Command, LOOK) or ""
sockets, _, called = seen.partition("called:")
up = {{word.rsplit(":", 1)[1] for word in sockets.split() if word.startswith("127.0.0.1:")}}
missing = [line for port, line in LINES.items() if port not in up]
if missing:
    started = "\\n".join(f"{{line}} >/dev/null 2>&1 </dev/null &" for line in missing)
    server.shell(name="servers", commands=[started])
if set(VMS) - set(called.split()):
    server.shell(name="calls", commands=["{python} {call} {job}"])
"""


class Pyinfra(Peer):
    """The operations of a run that has nothing to do are none."""

    name = "pyinfra"

    def install(self) -> str:
        self.bin = venv(self.home, "pyinfra")
        return run([self.bin / "pyinfra", "--version"]).split()[-1].removeprefix("v")

    def prepare(self, floor: Floor) -> None:
        root = floor.site.root
        shutil.rmtree(root / "called", ignore_errors=True)
        ports = [str(disk.port) for disk in floor.site.disks]
        text = DEPLOY.format(
            lines=dict(zip(ports, commands(floor).values(), strict=True)),
            vms=list(floor.site.vms),
            root=root,
            python=sys.executable,
            call=CALL,
            job=job(floor),
        )
        (root / "deploy.py").write_text(text)

    def cold(self, floor: Floor) -> Took:
        return self.again(floor)

    def again(self, floor: Floor) -> Took:
        line = [str(self.bin / "pyinfra"), "@local", "deploy.py", "-y"]
        return timed(line, floor.site.root, environment(self.bin))
