"""A node appliance for the bench: answers health and starts as fast as it can, and counts.

Not the reference appliance of examples/: that one copies disks. This one has to cost next to
nothing, because its time is in both of the things that are compared.
"""

from __future__ import annotations

import json
import socketserver
import sys
import threading
import time

COUNT = "/count"


class Handler(socketserver.StreamRequestHandler):
    """HTTP/1.1 with keep-alive, one write per answer."""

    disable_nagle_algorithm = True
    wbufsize = -1
    server: Appliance

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, target, _ = line.decode("latin-1").split(" ", 2)
            length = 0
            while (header := self.rfile.readline().strip().lower()) != b"":
                if header.startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            status, value = self.server.answer(method, target, self.rfile.read(length))
            body = json.dumps(value).encode()
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            self.wfile.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.wfile.flush()


class Appliance(socketserver.ThreadingTCPServer):
    """Remembers how often each job was started, and when the last one was."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mutex = threading.Lock()
        self.jobs: dict[str, int] = {}
        self.last = 0.0

    def answer(self, method: str, target: str, body: bytes) -> tuple[str, dict[str, object]]:
        """What a request is answered."""
        if target == "/api/v1/health":
            return "200 OK", {"status": "healthy"}
        if (method, target) == ("POST", "/api/v1/backup/start"):
            job = str(json.loads(body)["job_id"])
            with self.mutex:
                self.jobs[job] = self.jobs.get(job, 0) + 1
                self.last = time.monotonic()
            started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            answer = {"job_id": job, "status": "started", "message": "started"}
            return "200 OK", {**answer, "started_at": started_at, "pid": 1}
        if target == COUNT:
            with self.mutex:
                counted = {"jobs": dict(self.jobs), "last": self.last}
                if method == "DELETE":
                    self.jobs.clear()
            return "200 OK", counted
        return "404 Not Found", {}


def main() -> None:
    """Serve until stdin ends, which is when the bench does, however it ends."""
    with Appliance() as appliance:
        threading.Thread(target=appliance.serve_forever, daemon=True).start()
        print(appliance.server_address[1], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
