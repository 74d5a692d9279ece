#!/usr/bin/env python3
"""A small node appliance (SNA): takes the hub's one call and really copies disks over NBD.

It stands where the appliance beside vCenter stands. A source "disk" is a raw file, and nbdcopy
(Debian package libnbd-bin) copies the whole of it; or it is a disk of a live VM (see source.py),
all of which are snapshot at one instant, and an incremental backup copies what has changed. The
appliance also misbehaves on request, so that a hub can be tested against every answer that the
network may give. Standard library only, Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import uuid
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from jobs import Phase
from modes import MODES, ON_START, REFUSALS, Mode
from telling import Hub, Log
from wire import START_PATH, Json, RefusedError, parse_json, parse_start, refuse, rfc3339
from work import NBDCOPY, Appliance

HANG_SECONDS: Final = 600.0
"""How long `hang-*` keeps a mute client's connection. Seconds. Chosen: beyond any time-out."""
MAX_BODY: Final = 1 << 20
"""Largest request body. Bytes. Chosen: some 10 000 targets."""


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
                mode = appliance.spoil(Mode.UNHEALTHY, Mode.SICKENS)
                if mode is Mode.SICKENS:
                    appliance.misbehave(Mode.UNHEALTHY)
                if mode is Mode.UNHEALTHY:
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
        job_id = job = None
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
            job = appliance.start(start, mode)
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
        if job:
            self.wfile.flush()
            job.answered.set()

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
    hint = "where source disks are: DIR/<vm_name>/<disk key>.raw, or a live VM in DIR/<vm_name>"
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
