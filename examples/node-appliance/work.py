"""The appliance's work: it takes starts, copies disks, and misbehaves as told."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from carrying import carry
from jobs import CopyError, Disk, Job, Phase, bytes_read
from live import QMP, LiveError, LiveVm, Snapshot
from modes import Mode
from telling import Hub, Log
from wire import Start, parse_targets

NBDCOPY: Final = ("nbdcopy", "--connections=2", "--threads=2", "--flush", "--progress=1")
"""Two connections per disk, as the field's client opens. nbdcopy opens no more connections than it
has threads, and takes one thread per core if not told: hence --threads. Source: nbdcopy(1)."""
PACED: Final = ("--requests=1", "--request-size=65536")
"""Small steps, so that a copy can be caught half-way. Bytes. Measured: 4 MiB take about 10 ms."""
TELEMETRY_PERIOD: Final = 1.0
"""Between two telemetry posts of a job. Seconds. Chosen: about what the field's client does."""
CLOSE_GRACE: Final = 0.5
"""After SIGTERM, for ended copies to reach the log. Seconds. Chosen: the end is within one."""
REPEATS: Final = 3
"""How often `repeat` reports a disk. Chosen."""
PROGRESS: Final = re.compile(r"([0-9]+)/100")


class Appliance:
    """The jobs, their copies, and the misbehaviour that is on."""

    def __init__(self, sources: Path, hub: Hub, log: Log, slow: float) -> None:
        self.sources, self.hub, self.log, self.slow = sources, hub, log, slow
        self.jobs: dict[str, Job] = {}  # by job id; a second start of one id hides the first
        self._mode = Mode.NONE
        self._times: int | None = None  # how often still; None: for good
        self._lock = threading.RLock()  # reentrant: SIGUSR1 may come while its thread holds it
        self._children: set[subprocess.Popen[str]] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._vms: dict[Path, LiveVm] = {}
        self._sequence = itertools.count(1)

    def misbehave(self, mode: Mode, times: int | None = None) -> None:
        """Misbehave from now on; with `times`, for that many requests (close-all: connections)."""
        with self._lock:
            self._mode, self._times = mode, times
            if mode is Mode.FORGET:
                self.jobs.clear()

    def spoil(self, *modes: Mode) -> Mode:
        """Say which of `modes` spoils the request at hand, if any, and count it."""
        with self._lock:
            mode = self._mode
            if mode not in modes:
                return Mode.NONE
            if self._times is not None:
                self._times -= 1
                if not self._times:
                    self.misbehave(Mode.NONE)
            return mode

    def start(self, start: Start, mode: Mode) -> Job:
        """Accept a start: log it, and copy every disk in a thread of its own."""
        folder = self.sources / start.vm_name
        disks = []
        for target in parse_targets(start.nbd_targets):
            source = folder / f"{target.key}.raw"
            disks.append(Disk(target, source, source.stat().st_size if source.is_file() else 0))
        job = Job(start, tuple(disks), mode)
        self.log.write("start", **asdict(start))  # first: what was started is in the log
        with self._lock:
            if mode is not Mode.FORGET:
                self.jobs[start.job_id] = job
        if (folder / QMP).is_socket():
            self._begin([partial(self._back_up_live, job, folder)])
        else:
            self._begin([partial(self._copy, job, d, partial(self._fetch, job, d)) for d in disks])
        if self.hub.base:
            threading.Thread(target=self._report, args=(job,), daemon=True).start()
        return job

    def _begin(self, works: list[Callable[[], None]]) -> list[threading.Thread]:
        """Start a thread for each work."""
        threads = [threading.Thread(target=work, daemon=True) for work in works]
        with self._lock:  # none holds up the end; close() waits as long as is due
            self._threads = [t for t in self._threads if t.is_alive()] + threads
            for thread in threads:
                thread.start()
        return threads

    def _report(self, job: Job) -> None:
        """Send telemetry while the job runs; a failure is silence, as in the field."""
        while job.phase in {Phase.STARTED, Phase.RUNNING}:
            self.hub.telemetry(job, Phase.RUNNING)
            time.sleep(TELEMETRY_PERIOD)

    def _back_up_live(self, job: Job, folder: Path) -> None:
        """Snapshot a live VM, all disks at once, and carry each over."""
        with self._lock:
            vm = self._vms.setdefault(folder, LiveVm(folder))
        for disk in job.disks:
            disk.previous = self.hub.change_id(job.start.vm_name, disk.target.position)
        previous = {disk.target.key: disk.previous for disk in job.disks}
        taken: dict[str, Snapshot | LiveError]
        try:
            taken = vm.snapshot(previous, together=job.mode is not Mode.TORN)
            self._tell_snapshot(job, taken)
        except (LiveError, OSError) as error:
            taken = dict.fromkeys(previous, LiveError(str(error)))
        works: list[Callable[[], None]] = []
        for disk in job.disks:
            snapshot = taken[disk.target.key]
            if isinstance(snapshot, Snapshot):
                disk.size = snapshot.size
            works.append(
                partial(self._copy, job, disk, partial(self._carry, job, disk, vm, snapshot))
            )
        self._begin(works)

    def _tell_snapshot(self, job: Job, taken: Mapping[str, Snapshot | LiveError]) -> None:
        disks = [
            {"key": key, "change_id": one.change_id, "bytes": one.size}
            for key, one in taken.items()
            if isinstance(one, Snapshot)
        ]
        self.log.write("snapshot", job_id=job.start.job_id, disks=disks)

    def _carry(self, job: Job, disk: Disk, vm: LiveVm, snapshot: Snapshot | LiveError) -> str:
        """Carry one disk of a live VM over; its change id (raises as carry does, and LiveError)."""
        if isinstance(snapshot, LiveError):
            raise snapshot
        disk.phase = Phase.RUNNING
        try:
            carry(snapshot, disk, partial(self._gate, job, time.monotonic() + self.slow))
        finally:
            vm.drop(disk.target.key)
        return snapshot.change_id

    def _gate(self, job: Job, until: float) -> None:
        """Hold a copy half-way until then; after that let it go on, or not (raises CopyError)."""
        if self._closing.wait(max(0.0, until - time.monotonic())):
            raise CopyError("the appliance is stopping; start the job again")
        if job.mode is Mode.CRASH:
            self._crash(job)
        if job.mode is Mode.DIE:
            raise CopyError("told to die; the copy was given up half-way")

    def _fetch(self, job: Job, disk: Disk) -> str:
        """Copy a raw file over; a change id (raises CopyError, or OSError without an nbdcopy)."""
        disk.previous = self.hub.change_id(job.start.vm_name, disk.target.position)
        self._run_nbdcopy(job, disk)
        return f"{uuid.uuid4()}/{next(self._sequence)}"

    def _copy(self, job: Job, disk: Disk, bring: Callable[[], str]) -> None:
        """Bring one disk over, and report it."""
        try:
            change_id, phase = bring(), Phase.COMPLETED
        except (CopyError, LiveError, OSError) as error:
            disk.error, phase = str(error), Phase.FAILED
        else:
            while job.mode is self._mode is Mode.LATE and not self._closing.wait(0.02):
                pass
            disk.change_id = change_id
            self._report_end(job, disk)
        with self._lock:  # so that of two disks ending at once, one is the last
            disk.phase, job.updated = phase, datetime.now(UTC)
            last = job.phase in {Phase.COMPLETED, Phase.FAILED}
        if last:
            names = ("phase", "previous", "change_id", "error")
            disks = [
                {
                    "key": disk.target.key,
                    **{name: getattr(disk, name) for name in names},
                    "bytes_transferred": disk.copied,
                }
                for disk in job.disks
            ]
            self.log.write("end", job_id=job.start.job_id, status=job.phase, disks=disks)
        if phase is Phase.COMPLETED and self._reports(job, disk):
            # The field's quirk: a disk that has arrived reports the whole job as completed.
            self.hub.telemetry(job, phase)

    def _report_end(self, job: Job, disk: Disk) -> None:
        for _ in range(REPEATS if job.mode is Mode.REPEAT else 1):
            if self._reports(job, disk):
                self.hub.complete(job.start.job_id, disk)

    def _reports(self, job: Job, disk: Disk) -> bool:
        """Say whether the end of a disk is told to the hub."""
        first = min(job.disks, key=lambda one: one.target.position)
        return job.mode is not Mode.ONE_DISK or disk is first

    def _run_nbdcopy(self, job: Job, disk: Disk) -> None:
        """Copy one disk (raises CopyError, or OSError without an nbdcopy)."""
        if not disk.source.is_file():
            raise CopyError(f"there is no source disk {disk.source}; put a raw image there")
        until = time.monotonic() + self.slow
        kills = job.mode in {Mode.DIE, Mode.CRASH}
        pacing = kills or self.slow > 0
        command = [*NBDCOPY, *(PACED if pacing else ()), str(disk.source), disk.target.url]
        out, none = subprocess.PIPE, subprocess.DEVNULL
        with self._lock:  # no child is born after close() has ended them all
            if self._closing.is_set():
                raise CopyError("the appliance is stopping; start the job again")
            process = subprocess.Popen(
                command, stdin=none, stdout=out, stderr=subprocess.STDOUT, text=True
            )
            self._children.add(process)
        disk.pid, disk.phase = process.pid, Phase.RUNNING
        if pacing:
            pace = (process, disk, until, job)
            threading.Thread(target=self._pace, args=pace, daemon=True).start()
        words = ""
        for line in map(str.strip, process.stdout or ()):
            if found := PROGRESS.fullmatch(line):
                disk.percent, job.updated = int(found[1]), datetime.now(UTC)
            else:
                words = line or words  # what is no progress is a complaint; the last one counts
        code = process.wait()
        with self._lock:
            self._children.discard(process)
        if code < 0:
            raise CopyError(f"nbdcopy was ended by signal {-code}")
        if code > 0:
            raise CopyError(words or f"nbdcopy ended with exit code {code}")
        if kills:
            raise CopyError("told to die; nbdcopy was through before it could be killed")
        time.sleep(max(0.0, until - time.monotonic()))

    def _pace(self, process: subprocess.Popen[str], disk: Disk, until: float, job: Job) -> None:
        """Hold a copy half-way, connected, until then; after that let it end, or kill it.

        nbdcopy tells its progress in steps of 128 MiB only, so the kernel's count of the bytes it
        has read says when half of the source's data is through. A source without data is not held.
        """
        loading = 1 << 16  # nbdcopy reads less than this before it reads the source; bytes
        half = loading + disk.source.stat().st_blocks * 512 // 2
        while process.poll() is None and bytes_read(process.pid) < half:
            time.sleep(0.0005)
        process.send_signal(signal.SIGSTOP)
        time.sleep(max(0.0, until - time.monotonic()))
        if job.mode is Mode.CRASH:
            self._crash(job)
        process.send_signal(signal.SIGKILL if job.mode is Mode.DIE else signal.SIGCONT)

    def _crash(self, job: Job) -> None:
        """Be gone at once, copies and all; the start was accepted by then."""
        job.answered.wait()
        with self._lock:
            for process in self._children:
                process.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """End every copy, by pid, and leave a moment for the last lines of the log."""
        with self._lock:
            self._closing.set()
            for process in self._children:
                process.kill()  # not SIGTERM: a held process would not see it
        until = time.monotonic() + CLOSE_GRACE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
