"""Whom the appliance tells what it does: its log, and the hub."""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

from jobs import Disk, Job, Phase
from wire import Json, rfc3339

HUB_TIMEOUT: Final = 2.0
"""How long one callback may take: a mute hub must not hold up a copy. Seconds. Chosen."""


class Log:
    """JSON lines, each on the disk before the next thing happens; on stderr without a file."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._file = path.open("a+", encoding="utf-8") if path else None
        self._number = 0
        if self._file:
            self._file.seek(0)
            self._number = sum(1 for _ in self._file)  # numbers go on rising after a restart

    def write(self, event: str, **fields: object) -> None:
        """Append one line: its number `n`, the time, what happened, and the fields."""
        with self._lock:
            self._number += 1
            line = json.dumps({"n": self._number, "at": rfc3339(), "event": event, **fields})
            print(line, file=self._file or sys.stderr, flush=True)
            if self._file:
                os.fsync(self._file.fileno())


class Hub:
    """The hub's callbacks. A hub that does not answer is complained about once and left alone."""

    def __init__(self, base: str | None) -> None:
        self.base = base.rstrip("/") if base else None
        # No proxy: the hub is the near end of a tunnel, whatever the environment says.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def change_id(self, vm_name: str, position: int) -> str:
        """Ask for the change id of a disk's last backup; "" if there is none."""
        query = urlencode({"vm_name": vm_name, "disk_id": position})
        return str(self._ask(f"backups/changeid?{query}").get("change_id", ""))

    def complete(self, job_id: str, disk: Disk) -> None:
        """Report one disk as arrived."""
        body: Json = {"change_id": disk.change_id, "disk_id": disk.target.position}
        self._ask(f"backups/{job_id}/complete", {**body, "bytes_transferred": disk.copied})

    def telemetry(self, job: Job, status: Phase) -> None:
        """Report how far a job is."""
        self._ask(f"telemetry/backup/{job.start.job_id}", job.telemetry(status))

    def _ask(self, path: str, body: Json | None = None) -> Json:
        if not self.base:
            return {}
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.base}/api/v1/{path}", data, headers)
        try:
            with self._opener.open(request, timeout=HUB_TIMEOUT) as answer:
                value = json.load(answer)
                return value if isinstance(value, dict) else {}
        except urllib.error.HTTPError as error:
            error.close()
            about, why = path, f"it answers {error.code} to {path}; see the hub's log"
        except (OSError, ValueError, http.client.HTTPException) as error:
            about, why = "", f"{error}; the copies go on without it"
        with self._lock:
            if about not in self._said:
                self._said.add(about)
                print(
                    f"cannot report to the hub at {self.base}: {why}", file=sys.stderr, flush=True
                )
        return {}
