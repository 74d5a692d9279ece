"""supervisord: one process, one section for each server."""

from __future__ import annotations

import time
from pathlib import Path

from bench.hubs import Floor
from bench.peers import Supervisor, commands, environment, run, until, venv
from bench.workplace import Took, children, servers, timed

HEAD = """\
[supervisord]
logfile={root}/supervisord.log
pidfile={root}/supervisord.pid
childlogdir={root}
minfds=4096
[unix_http_server]
file={root}/supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{root}/supervisor.sock
"""
PROGRAM = """\
[program:{name}]
command={line}
autorestart=true
startsecs=0
stdout_logfile=/dev/null
stderr_logfile=/dev/null
"""


class Supervisord(Supervisor):
    """Its own environment; every log that is not needed is off."""

    name = "supervisord"

    def install(self) -> str:
        # It asks pkg_resources for its version, which setuptools had until its version 81.
        self.bin = venv(self.home, "supervisor", "setuptools<81")
        return run([self.bin / "supervisord", "--version"]).splitlines()[-1]

    def prepare(self, floor: Floor) -> None:
        root = floor.site.root / "supervisor"
        root.mkdir(exist_ok=True)
        self.config = root / "supervisord.conf"
        programs = [
            PROGRAM.format(name=name, line=line.replace("%", "%%"))
            for name, line in commands(floor).items()
        ]
        self.config.write_text(HEAD.format(root=root) + "".join(programs))

    def _line(self, command: str, *words: str) -> list[str]:
        return [str(self.bin / command), "-c", str(self.config), *words]

    def start(self, floor: Floor) -> None:
        timed(self._line("supervisord"), floor.site.root, environment(self.bin))

    def again(self, floor: Floor) -> Took:
        return timed(self._line("supervisorctl", "update"), floor.site.root, environment(self.bin))

    def stop(self, floor: Floor) -> float:
        began = time.monotonic()
        timed(self._line("supervisorctl", "shutdown"), floor.site.root, environment(self.bin))
        until(lambda: not self.supervisors() and not servers(), "the end of supervisord")
        return time.monotonic() - began

    def supervisors(self) -> list[int]:
        word = str(Path(self.config))
        return [pid for pid, argv in children().items() if word in argv]
