"""systemd, as far as a service sees it: it holds the socket, hears what it is told, and starts
the service in its sandbox."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.site import ROOT, Site, until

ENTER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="api",
                  WATCHDOG_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


class Manager:
    """Starts `reconciler watch` on a site as its unit would."""

    def __init__(self, site: Site, unit: Path | None = None, watchdog: float = 0.0) -> None:
        self.site, self.unit, self.watchdog = site, unit, watchdog
        self.heard: list[str] = []
        """Every line that it was told since the service was started last."""
        self.address = str(site.folder / "notify")
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(self.address)
        self.api = socket.create_server(("127.0.0.1", site.api), backlog=128)
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        self.heard.clear()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RECONCILER_")},
            "HOME": str(self.site.folder),
            "PYTHONPATH": str(ROOT),
            "NOTIFY_SOCKET": self.address,
            **({"WATCHDOG_USEC": str(int(self.watchdog * 1e6))} if self.watchdog else {}),
        }
        inside = ["tests.sandbox", str(self.unit), sys.executable, "-m"] if self.unit else []
        with (self.site.folder / "daemon.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ENTER, str(self.api.fileno()), *inside,
                 "reconciler", "watch", str(self.site.specs)],
                cwd=self.site.folder, env=environment, pass_fds=[self.api.fileno()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            )  # fmt: skip
        return self.process

    @property
    def log(self) -> str:
        return (self.site.folder / "daemon.log").read_text()

    def listen(self) -> list[str]:
        """What it was told until now."""
        while select.select([self.notified], [], [], 0)[0]:
            self.heard += self.notified.recv(4096).decode().splitlines()
        return self.heard

    def hears(self, line: str, seconds: float = 60.0) -> None:
        """Wait until it is told this."""

        def told() -> bool:
            process = self.process
            assert process is None or process.poll() is None or line in self.listen(), self.log
            return line in self.listen()

        until(told, f"{line} in {self.heard}", seconds)

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
            self.process.kill()
            self.process.wait(10)
        self.api.close()
        self.notified.close()


@contextlib.contextmanager
def managing(site: Site, unit: Path | None = None, watchdog: float = 0.0) -> Iterator[Manager]:
    """A manager whose service is ended with the block."""
    found = Manager(site, unit, watchdog)
    try:
        yield found
    finally:
        found.close()
        assert "Traceback" not in found.log, found.log
        assert "this is a bug" not in found.log, found.log
