#!/usr/bin/env python3
"""A small node appliance (SNA): takes the hub's one call and really copies disks over NBD.

It stands where the appliance beside vCenter stands: a source "disk" is a raw file, and the copy is
made by nbdcopy (Debian package libnbd-bin). It also misbehaves on request, so that a hub can be
tested against every answer that the network may give. Standard library only, Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import quote, urlencode

Json = dict[str, object]

NBDCOPY: Final = ("nbdcopy", "--connections=2", "--threads=2", "--flush", "--progress=1")
"""Two connections per disk, as the field's client opens. nbdcopy opens no more connections than it
has threads, and takes one thread per core if not told: hence --threads. Source: nbdcopy(1)."""
PACED: Final = ("--requests=1", "--request-size=65536")
"""Small steps, so that a copy can be caught half-way. Bytes. Measured: 4 MiB take about 10 ms."""
HUB_TIMEOUT: Final = 2.0
"""How long one callback may take: a mute hub must not hold up a copy. Seconds. Chosen."""
TELEMETRY_PERIOD: Final = 1.0
"""Between two telemetry posts of a job. Seconds. Chosen: about what the field's client does."""
HANG_SECONDS: Final = 600.0
"""How long `hang-*` keeps a mute client's connection. Seconds. Chosen: beyond any time-out."""
MAX_BODY: Final = 1 << 20
"""Largest request body. Bytes. Chosen: some 10 000 targets."""
CLOSE_GRACE: Final = 0.5
"""After SIGTERM, for ended copies to reach the log. Seconds. Chosen: the end is within one."""

START_PATH: Final = "/api/v1/backup/start"
REQUIRED: Final = (
    *("job_id", "vm_name", "vcenter_host", "vcenter_user", "vcenter_password"),
    *("vm_path", "nbd_targets", "backup_type"),
)
JOB_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
TARGET: Final = re.compile(
    r"(?P<key>[^:,/\s]+):nbd://(?P<host>[^:,/\s]+):(?P<port>[0-9]{1,5})"
    r"/(?P<export>[^:,/\s]*disk(?P<position>[0-9]{1,5}))"
)
PROGRESS: Final = re.compile(r"([0-9]+)/100")


class Mode(Enum):
    """A way to misbehave: its name in an order, and what it does."""

    NONE = ("none", "behave")
    REFUSE = ("refuse", "answer a start with 400; nothing started")
    FORBIDDEN = ("forbidden", "answer a start with 403; nothing started")
    CONFLICT = ("conflict", "answer a start with 409; nothing started")
    REDIRECT = ("redirect", "answer a start with 307 to /elsewhere (a 404); nothing started")
    ERROR_BEFORE = ("error-before", "answer a start with 500; nothing started")
    ERROR_AFTER = ("error-after", "start the job, then answer 500")
    HANG_BEFORE = ("hang-before", "read a start and never answer; nothing started")
    HANG_AFTER = ("hang-after", "start the job and never answer")
    DROP_BEFORE = ("drop-before", "read a start, close the connection; nothing started")
    DROP_AFTER = ("drop-after", "start the job, then close the connection unanswered")
    ANSWER_TWICE = ("answer-twice", "start the job once and put the same 200 on the wire twice")
    STRANGER = ("stranger", "answer a start with a 200 naming another job_id; nothing started")
    FORGET = ("forget", "forget every job at once, and each new one at birth; copies go on")
    DIE = ("die", "accept the start, then kill its nbdcopy processes half-way: it fails")
    UNHEALTHY = ("unhealthy", "answer health with 503")
    CLOSE_ALL = ("close-all", "close every connection, like a tunnel with nothing behind it")

    def __str__(self) -> str:
        return self.value[0]


MODES: Final = {str(mode): mode for mode in Mode}
ON_START: Final = frozenset(Mode) - {Mode.NONE, Mode.UNHEALTHY, Mode.CLOSE_ALL}
REFUSALS: Final = {
    Mode.REFUSE: HTTPStatus.BAD_REQUEST,
    Mode.FORBIDDEN: HTTPStatus.FORBIDDEN,
    Mode.CONFLICT: HTTPStatus.CONFLICT,
    Mode.REDIRECT: HTTPStatus.TEMPORARY_REDIRECT,
    Mode.ERROR_BEFORE: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class RefusedError(Exception):
    """A request that is not carried out: the HTTP status to answer with, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class CopyError(Exception):
    """Why one disk did not arrive."""


def refuse(why: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> NoReturn:
    """Raise RefusedError for a start."""
    raise RefusedError(status, f"cannot accept the start: {why}")


@dataclass(frozen=True, slots=True)
class Target:
    """Where one disk goes: a pair of the targets string."""

    key: str
    url: str
    position: int  # the <N> of "disk<N>" at the end of the export name, as the field's client does


def parse_targets(text: str) -> tuple[Target, ...]:
    """Read a targets string, strictly: the field's client skips bad pairs in silence."""
    targets = []
    for pair in text.split(","):
        found = TARGET.fullmatch(pair)
        if not found or not pair.isprintable() or not 0 < int(found["port"]) < 1 << 16:
            refuse(f"nbd_targets holds {pair!r}; write key:nbd://host:port/name-disk<N>")
        url = f"nbd://{found['host']}:{found['port']}/{quote(found['export'])}"
        targets.append(Target(found["key"], url, int(found["position"])))
    for column in (
        {t.key for t in targets},
        {t.url for t in targets},
        {t.position for t in targets},
    ):
        if len(column) < len(targets):
            refuse("nbd_targets repeats a key, an export or a position; name each disk once")
    return tuple(targets)


@dataclass(frozen=True, slots=True)
class Start:
    """A valid start request. The password is checked and left behind: nothing here can leak it."""

    job_id: str
    vm_name: str
    vm_path: str
    nbd_targets: str
    backup_type: str
    previous_change_id: str
    idempotency_key: str | None  # the header, for the log alone: jobs are not de-duplicated


def parse_start(body: bytes, idempotency_key: str | None) -> Start:
    """Check a start request (raises RefusedError). No message repeats what may be secret."""
    values = {"previous_change_id": "", **parse_json(body)}
    text = {name: value for name, value in values.items() if isinstance(value, str)}
    for name in REQUIRED:
        if not text.get(name):
            refuse(f"{name} is missing, empty or not a string; send a non-empty string")
    if "previous_change_id" not in text:
        refuse("previous_change_id is not a string; send one, or leave it out of a full backup")
    if not JOB_ID.fullmatch(text["job_id"]):
        refuse("job_id is not 1 to 64 of A-Z a-z 0-9 . _ -; send such a name")
    vm_name = text["vm_name"]
    if vm_name in {".", ".."} or "/" in vm_name or not vm_name.isprintable():
        refuse("vm_name is no folder name; send one without a slash")
    if text["backup_type"] not in {"full", "incremental"}:
        refuse("backup_type is neither full nor incremental; send one of the two")
    if text["backup_type"] == "incremental" and not text["previous_change_id"]:
        refuse("previous_change_id is empty; an incremental backup needs one")
    parse_targets(text["nbd_targets"])
    kept = set(Start.__slots__) - {"idempotency_key"}
    return Start(**{name: text[name] for name in kept}, idempotency_key=idempotency_key)


def parse_json(body: bytes) -> Json:
    """Read a JSON object (raises RefusedError)."""
    with contextlib.suppress(ValueError):
        value = json.loads(body)
        if isinstance(value, dict):
            return value
    raise RefusedError(HTTPStatus.BAD_REQUEST, "cannot read the body: send one JSON object")


class Phase(StrEnum):
    """The life of a disk's copy, and of a job."""

    STARTED = "started"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(slots=True)
class Disk:
    """One disk on its way. Only its own thread writes here."""

    target: Target
    source: Path
    size: int  # bytes; 0 if there is no source
    phase: Phase = Phase.STARTED
    percent: int = 0  # as nbdcopy tells it: in steps of 128 MiB
    pid: int = 0  # of its nbdcopy
    previous: str = ""  # the change id that the hub knew before
    change_id: str = ""  # invented when the disk has arrived
    error: str = ""

    @property
    def copied(self) -> int:
        """Bytes that have arrived, holes included; between nbdcopy's steps, what it has read."""
        told = self.size * self.percent // 100
        if self.phase is not Phase.RUNNING or not self.pid:
            return told
        return max(told, min(bytes_read(self.pid), self.size * 99 // 100))


@dataclass(slots=True)
class Job:
    """One accepted start."""

    start: Start
    disks: tuple[Disk, ...]
    dies: bool  # its copies are to be killed half-way
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    updated: datetime = field(default_factory=lambda: datetime.now(UTC))

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
        seconds = (self.updated - self.began).total_seconds()
        return {
            "stage": f"{self.phase}: {done} of {len(self.disks)} disks arrived{''.join(errors)}",
            "status": self.phase,
            "bytes_transferred": copied,
            "total_bytes": total,
            "throughput_bps": int(copied / seconds) if seconds else 0,
            "percent": 100 * copied / total if total else 0.0,
        }

    def telemetry(self, status: Phase) -> Json:
        """Compose a telemetry post. `status` may differ from the phase: see Appliance._copy."""
        now = self.progress()
        left = sum(disk.size - disk.copied for disk in self.disks)
        speed = now["throughput_bps"]
        disks = [
            {
                "disk_index": disk.target.position,
                "bytes_transferred": disk.copied,
                "total_bytes": disk.size,
                "status": disk.phase,
                "progress_percent": 100 * disk.copied / disk.size if disk.size else 0.0,
            }
            for disk in self.disks
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


def rfc3339(when: datetime | None = None) -> str:
    """Write a time as the wire format wants it; now, if none is given."""
    return (when or datetime.now(UTC)).isoformat(timespec="milliseconds")


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
        self._closing = False
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

    def start(self, start: Start, mode: Mode) -> None:
        """Accept a start: log it, and copy every disk in a thread of its own."""
        disks = []
        for target in parse_targets(start.nbd_targets):
            source = self.sources / start.vm_name / f"{target.key}.raw"
            disks.append(Disk(target, source, source.stat().st_size if source.is_file() else 0))
        job = Job(start, tuple(disks), dies=mode is Mode.DIE)
        self.log.write("start", **asdict(start))  # first: what was started is in the log
        copies = [threading.Thread(target=self._copy, args=(job, disk)) for disk in disks]
        with self._lock:
            if mode is not Mode.FORGET:
                self.jobs[start.job_id] = job
            self._threads = [t for t in self._threads if t.is_alive()] + copies
            for thread in copies:
                thread.daemon = True  # none holds up the end; close() waits as long as is due
                thread.start()
        if self.hub.base:
            threading.Thread(target=self._report, args=(job,), daemon=True).start()

    def _report(self, job: Job) -> None:
        """Send telemetry while the job runs; a failure is silence, as in the field."""
        while job.phase in {Phase.STARTED, Phase.RUNNING}:
            self.hub.telemetry(job, Phase.RUNNING)
            time.sleep(TELEMETRY_PERIOD)

    def _copy(self, job: Job, disk: Disk) -> None:
        """Carry one disk over: ask for its change id, copy it, report it."""
        try:
            disk.previous = self.hub.change_id(job.start.vm_name, disk.target.position)
            self._run_nbdcopy(job, disk)
        except (CopyError, OSError) as error:
            disk.error, phase = str(error), Phase.FAILED
        else:
            disk.change_id, phase = f"{uuid.uuid4()}/{next(self._sequence)}", Phase.COMPLETED
            self.hub.complete(job.start.job_id, disk)
        with self._lock:  # so that of two disks ending at once, one is the last
            disk.phase, job.updated = phase, datetime.now(UTC)
            last = job.phase in {Phase.COMPLETED, Phase.FAILED}
        if last:
            names = ("phase", "previous", "change_id", "error")
            disks = [
                {"key": disk.target.key, **{name: getattr(disk, name) for name in names}}
                for disk in job.disks
            ]
            self.log.write("end", job_id=job.start.job_id, status=job.phase, disks=disks)
        if phase is Phase.COMPLETED:
            # The field's quirk: a disk that has arrived reports the whole job as completed.
            self.hub.telemetry(job, phase)

    def _run_nbdcopy(self, job: Job, disk: Disk) -> None:
        """Copy one disk (raises CopyError, or OSError without an nbdcopy)."""
        if not disk.source.is_file():
            raise CopyError(f"there is no source disk {disk.source}; put a raw image there")
        until = time.monotonic() + self.slow
        pacing = job.dies or self.slow > 0
        command = [*NBDCOPY, *(PACED if pacing else ()), str(disk.source), disk.target.url]
        out, none = subprocess.PIPE, subprocess.DEVNULL
        with self._lock:  # no child is born after close() has ended them all
            if self._closing:
                raise CopyError("the appliance is stopping; start the job again")
            process = subprocess.Popen(
                command, stdin=none, stdout=out, stderr=subprocess.STDOUT, text=True
            )
            self._children.add(process)
        disk.pid, disk.phase = process.pid, Phase.RUNNING
        if pacing:
            pace = (process, disk, until, job.dies)
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
        if job.dies:
            raise CopyError("told to die; nbdcopy was through before it could be killed")
        time.sleep(max(0.0, until - time.monotonic()))

    def _pace(self, process: subprocess.Popen[str], disk: Disk, until: float, dies: bool) -> None:
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
        process.send_signal(signal.SIGKILL if dies else signal.SIGCONT)

    def close(self) -> None:
        """End every copy, by pid, and leave a moment for the last lines of the log."""
        with self._lock:
            self._closing = True
            for process in self._children:
                process.kill()  # not SIGTERM: a held process would not see it
        until = time.monotonic() + CLOSE_GRACE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def bytes_read(pid: int) -> int:
    """Bytes that a process has read so far; 0 if it is gone. Source: proc_pid_io(5), rchar."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    return 0


class Server(ThreadingHTTPServer):
    """The HTTP listener: a thread per connection."""

    daemon_threads = True  # a hanging request must not hold up the end
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], appliance: Appliance) -> None:
        super().__init__(address, Handler)
        self.appliance = appliance

    def verify_request(self, *_: object) -> bool:
        """Say whether to serve a new connection; otherwise it is closed at once."""
        return self.appliance.spoil(Mode.CLOSE_ALL) is Mode.NONE

    def handle_error(self, request: object, client_address: object) -> None:
        """Let a client that went away go; tell of anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: Server
    protocol_version = "HTTP/1.1"  # keep-alive: the hub posts where its health check went
    wbufsize = -1  # buffered: an answer leaves in one piece, not as head and body
    disable_nagle_algorithm = True

    def parse_request(self) -> bool:
        """Read a request's head; say whether to go on with it."""
        if super().parse_request() and self.server.appliance.spoil(Mode.CLOSE_ALL) is Mode.NONE:
            return True
        self.close_connection = True
        return False

    def do_GET(self) -> None:
        """Answer health, status and progress."""
        appliance = self.server.appliance
        match self.path.split("?")[0].split("/"):
            case ["", "api", "v1", "health"]:
                if appliance.spoil(Mode.UNHEALTHY) is Mode.UNHEALTHY:
                    self._send(503, "cannot serve: told to be unhealthy")
                else:
                    self._send(200, {"status": "healthy", "timestamp": rfc3339()})
            case ["", "api", "v1", "status" | "progress" as question, job_id]:
                if job := appliance.jobs.get(job_id):
                    self._send(200, job.status() if question == "status" else job.progress())
                else:
                    self._send(404, "cannot find that job: it is not known here")
            case _:
                self._send(404, f"cannot find {self.path}; the README says what is served")

    def do_POST(self) -> None:
        """Take a start: check it, start it unless told not to, answer unless told not to."""
        appliance, log = self.server.appliance, self.server.appliance.log
        job_id = None
        try:
            body = self._body()
            if self.path != START_PATH:
                refuse(f"nothing is at {self.path}; post to {START_PATH}", HTTPStatus.NOT_FOUND)
            start = parse_start(body, self.headers.get("Idempotency-Key"))
            job_id = start.job_id
            mode = appliance.spoil(*ON_START)
            if mode in REFUSALS:
                refuse(f"told to misbehave ({mode})", REFUSALS[mode])
        except RefusedError as error:
            log.write("refused", job_id=job_id, status=error.status, why=str(error))
            moved = error.status is HTTPStatus.TEMPORARY_REDIRECT
            self._send(error.status, str(error), {"Location": "/elsewhere"} if moved else {})
            return
        if mode in {Mode.HANG_BEFORE, Mode.DROP_BEFORE, Mode.STRANGER}:
            log.write("refused", job_id=job_id, status=None, why=f"told to misbehave ({mode})")
        else:
            appliance.start(start, mode)
        answer: Json = {
            "job_id": f"stranger-{uuid.uuid4()}" if mode is Mode.STRANGER else job_id,
            "status": Phase.STARTED,
            "message": "backup started",
            "started_at": rfc3339(),
            "pid": os.getpid(),
        }
        match mode:
            case Mode.HANG_BEFORE | Mode.HANG_AFTER:
                self._hang()
            case Mode.DROP_BEFORE | Mode.DROP_AFTER:
                self.close_connection = True
            case Mode.ERROR_AFTER:
                self._send(500, f"cannot say that the job runs: told to misbehave ({mode})")
            case Mode.ANSWER_TWICE:
                self._send(200, answer)
                self._send(200, answer)
            case _:
                self._send(200, answer)

    def do_PUT(self) -> None:
        """Switch a misbehaviour on: /_control, for tests only."""
        try:
            order = parse_json(self._body())
        except RefusedError as error:
            return self._send(error.status, str(error))
        mode, times = MODES.get(str(order.get("misbehave"))), order.get("times")
        if self.path != "/_control":
            return self._send(404, f"cannot find {self.path}; put to /_control")
        if not mode:
            return self._send(400, f"cannot misbehave like that; choose of {', '.join(MODES)}")
        if not (times is None or (type(times) is int and times > 0)):
            return self._send(400, "cannot misbehave that often; times is null, 1, 2, 3 ...")
        self.server.appliance.misbehave(mode, times)
        return self._send(200, {"misbehave": str(mode), "times": times})

    def _body(self) -> bytes:
        """Read the whole request body (raises RefusedError, and gives the connection up)."""
        length = self.headers.get("Content-Length", "")
        if re.fullmatch(r"[0-9]{1,9}", length) and int(length) <= MAX_BODY:
            return self.rfile.read(int(length))
        self.close_connection = True  # where the next request begins is not known
        why = f"cannot read the body: send its Content-Length, {MAX_BODY} bytes at most"
        raise RefusedError(HTTPStatus.BAD_REQUEST, why)

    def _send(self, status: int, body: Json | str, headers: dict[str, str] | None = None) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        kind = "text/plain; charset=utf-8" if isinstance(body, str) else "application/json"
        data = f"{text}\n".encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _hang(self) -> None:
        """Say nothing until the client goes."""
        self.close_connection = True
        self.connection.settimeout(HANG_SECONDS)
        with contextlib.suppress(OSError):  # the time-out is one
            while self.connection.recv(4096):
                pass

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: what matters is in the log."""


def parse_listen(text: str) -> tuple[str, int]:
    """Read HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"cannot listen on {text!r}; write HOST:PORT")
    return host, int(port)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; --help tells of every option and misbehaviour."""
    modes = (f"  {mode!s:13} {mode.value[1]}" for mode in Mode)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(("misbehaviours, for tests (see the README for PUT /_control):", *modes)),
    )
    add = parser.add_argument
    local, hint = ("127.0.0.1", 8081), "default 127.0.0.1:8081; port 0 picks a free one"
    add("--listen", type=parse_listen, default=local, metavar="HOST:PORT", help=hint)
    add("--port-file", type=Path, metavar="FILE", help="write the port there when listening")
    hint = "where source disks are: DIR/<vm_name>/<disk key>.raw"
    add("--sources", type=Path, required=True, metavar="DIR", help=hint)
    add("--hub", metavar="URL", help="post the callbacks there; default: post none")
    add("--log", type=Path, metavar="FILE", help="append JSON lines there; default: stderr")
    hint = "hold each copy half-way, connected, until it has lasted this long; default 0"
    add("--slow", type=float, default=0.0, metavar="SECONDS", help=hint)
    hint = "one of those below, until SIGUSR1 or PUT /_control; default none"
    add("--misbehave", choices=MODES, default="none", metavar="MODE", help=hint)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; exit code 1 if that cannot even begin."""
    options = parse_arguments(argv)
    try:
        if not shutil.which(NBDCOPY[0]):
            raise OSError("there is no nbdcopy; install it (Debian: libnbd-bin)")
        if not options.sources.is_dir():
            raise OSError(f"{options.sources} is no directory; create it, or name another")
        log, hub = Log(options.log), Hub(options.hub)
        appliance = Appliance(options.sources.resolve(), hub, log, options.slow)
        appliance.misbehave(MODES[options.misbehave])
        server = Server(options.listen, appliance)
        signal.signal(signal.SIGUSR1, lambda *_: appliance.misbehave(Mode.NONE))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))  # raised out of serve_forever
        host, port = options.listen[0], server.server_address[1]
        if options.port_file:
            draft = options.port_file.with_name(f"{options.port_file.name}.new")
            draft.write_text(f"{port}\n")
            draft.replace(options.port_file)  # whole or not there: tests wait for it
    except OSError as error:
        print(f"cannot start: {error} (see --help)", file=sys.stderr)
        return 1
    print(f"node appliance listening on http://{host}:{port}", flush=True)
    try:
        server.serve_forever()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # one order to end is enough
        server.server_close()
        appliance.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
