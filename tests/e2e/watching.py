"""A daemon for one test: started, watched by its log, ended by pid."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator

from tests.e2e.site import Site, until


class Watcher:
    """`reconciler watch` on a site's specs."""

    def __init__(self, site: Site, *arguments: str, ready: bool = True, **extra: str) -> None:
        self.site = site
        self.process = site.start("watch", str(site.specs), *arguments, **extra)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready:
            until(
                lambda: self.said('"message": "ready"') or self.process.poll() is not None,
                "ready",
                60,
            )
            assert self.process.poll() is None, self.log

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def said(self, word: str) -> bool:
        return any(word in line for line in list(self.lines))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        return code


@contextlib.contextmanager
def watching(site: Site, *arguments: str, ready: bool = True, **extra: str) -> Iterator[Watcher]:
    """A daemon that is ended with the block."""
    found = Watcher(site, *arguments, ready=ready, **extra)
    try:
        yield found
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            found.end()
        if found.process.poll() is None:
            found.process.kill()
            found.process.wait(10)
        assert "Traceback" not in found.log, found.log
        assert "this is a bug" not in found.log, found.log
