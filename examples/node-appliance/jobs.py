"""The jobs that the appliance has accepted, and what it says of them."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

from modes import Mode
from wire import Json, Start, Target, rfc3339


class CopyError(Exception):
    """Why one disk did not arrive."""


class Phase(StrEnum):
    """The life of a disk's copy, and of a job."""

    STARTED = "started"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(slots=True)
class Disk:
    """One disk on its way. Only its own threads write here."""

    target: Target
    source: Path
    size: int  # what there is to copy; bytes; 0 if there is no source, or if it is not known yet
    phase: Phase = Phase.STARTED
    percent: int = 0  # as nbdcopy tells it: in steps of 128 MiB
    pid: int = 0  # of its nbdcopy
    previous: str = ""  # the change id that the hub knew before
    change_id: str = ""  # invented when the disk has arrived
    error: str = ""
    _moved: int = 0  # what a copy of our own has written
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count bytes that were written."""
        with self._lock:
            self._moved += count

    @property
    def copied(self) -> int:
        """Bytes that have arrived, holes included; between nbdcopy's steps, what it has read."""
        told = self._moved + self.size * self.percent // 100
        if self.phase is not Phase.RUNNING or not self.pid:
            return told
        return max(told, min(bytes_read(self.pid), self.size * 99 // 100))


SPAN: Final = 1.0
"""Seconds over which the speed of a copy is reckoned at least: of less it says nothing."""


@dataclass(slots=True)
class Job:
    """One accepted start."""

    start: Start
    disks: tuple[Disk, ...]
    mode: Mode = Mode.NONE  # how it is to misbehave on its way
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    updated: datetime = field(default_factory=lambda: datetime.now(UTC))
    answered: threading.Event = field(default_factory=threading.Event)  # the call was

    @property
    def phase(self) -> Phase:
        """What the disks come to: running while one is, failed if any failed."""
        phases = {disk.phase for disk in self.disks}
        if phases == {Phase.STARTED}:
            return Phase.STARTED
        if phases & {Phase.STARTED, Phase.RUNNING}:
            return Phase.RUNNING
        return Phase.FAILED if Phase.FAILED in phases else Phase.COMPLETED

    def status(self) -> Json:
        """Compose the status answer."""
        return {
            "job_id": self.start.job_id,
            "status": self.phase,
            "progress_percent": self.progress()["percent"],
            "current_operation": self.progress()["stage"],
            "start_time": rfc3339(self.began),
            "last_update": rfc3339(self.updated),
            "vm_path": self.start.vm_path,
        }

    def progress(self) -> Json:
        """Compose the progress answer."""
        copied, total = sum(d.copied for d in self.disks), sum(d.size for d in self.disks)
        done = sum(d.phase is Phase.COMPLETED for d in self.disks)
        errors = [f"; cannot copy disk {d.target.key}: {d.error}" for d in self.disks if d.error]
        until = self.updated if self.phase in (Phase.COMPLETED, Phase.FAILED) else datetime.now(UTC)
        seconds = (until - self.began).total_seconds()
        return {
            "stage": f"{self.phase}: {done} of {len(self.disks)} disks arrived{''.join(errors)}",
            "status": self.phase,
            "bytes_transferred": copied,
            "total_bytes": total,
            "throughput_bps": int(copied / max(seconds, SPAN)),
            "percent": share(copied, total, self.phase),
        }

    def telemetry(self, status: Phase) -> Json:
        """Compose a telemetry post. `status` may differ from the phase: see Appliance._report_end.

        The field's client often says nothing of single disks: here, until one has arrived.
        """
        now = self.progress()
        left = sum(disk.size - disk.copied for disk in self.disks)
        speed = now["throughput_bps"]
        disks = [
            {
                "disk_index": disk.target.position,
                "bytes_transferred": disk.copied,
                "total_bytes": disk.size,
                "status": disk.phase,
                "progress_percent": share(disk.copied, disk.size, disk.phase),
            }
            for disk in self.disks
            if status is Phase.COMPLETED
        ]
        return {
            "job_id": self.start.job_id,
            "job_type": "backup",
            "status": status,
            "current_phase": now["stage"],
            "bytes_transferred": now["bytes_transferred"],
            "total_bytes": now["total_bytes"],
            "transfer_speed_bps": speed,
            "eta_seconds": left // speed if isinstance(speed, int) and speed else 0,
            "progress_percent": now["percent"],
            "disks": disks,
            "timestamp": rfc3339(),
        }


def share(part: int, whole: int, phase: Phase) -> float:
    """Per cent. Of nothing, all has arrived when that is over."""
    return 100 * part / whole if whole else 100.0 * (phase is Phase.COMPLETED)


def bytes_read(pid: int) -> int:
    """Bytes that a process has read so far; 0 if it is gone. Source: proc_pid_io(5), rchar."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    return 0
