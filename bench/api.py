#!/usr/bin/env python3
"""What the API takes: many requests over many connections, against a real daemon.

python bench/api.py [--requests 10000] [--connections 64] [--vms 8] [--token] [--json FILE]

Lists, change ids and telemetry of runs that are open, mixed 2:1:1, from one client process with one
thread. The floor is uvicorn itself, as the daemon runs it, with an application that answers two
bytes. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # where `bench` is this directory, and not its bench.py

from bench.daemon import Hub  # noqa: E402
from bench.load import Asked, InUse, Load, in_use, load, request  # noqa: E402

FLOOR: Final = """\
import socket, sys, uvicorn
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
config = uvicorn.Config(app, loop="asyncio", http="h11", ws="none", lifespan="off",
                        log_level="critical", access_log=False)
uvicorn.Server(config).run(sockets=[sock])
"""
SETTLED: Final = 3.0
"""Seconds after the last answer, for what was begun to be let go."""


def mixture(hub: Hub, count: int, token: str) -> list[Asked]:
    """What schedulers and clients ask, again and again."""
    status = subprocess.run(
        [sys.executable, "-m", "reconciler", "status", "-o", "json"],
        cwd=hub.folder,
        capture_output=True,
        check=True,
    ).stdout
    found: list[Asked] = []
    for vm in json.loads(status)["vms"]:
        name, job = vm["name"], vm["call"]["job_id"]
        body = {
            "job_id": job,
            "job_type": "backup",
            "status": "running",
            "current_phase": "transferring",
            "bytes_transferred": 123_456_789,
            "total_bytes": 987_654_321,
            "transfer_speed_bps": 1_234_567,
            "progress_percent": 12.5,
            "disks": [],
        }
        lists = [
            request("list", "GET", "/api/v1/backups?limit=100", token=token),
            request("one", "GET", f"/api/v1/backups/{job}", token=token),
        ]
        client = [
            request("changeid", "GET", f"/api/v1/backups/changeid?vm_name={name}&disk_id=0"),
            request(
                "telemetry", "POST", f"/api/v1/telemetry/backup/{job}", json.dumps(body).encode()
            ),
        ]
        found += [lists[0], client[0], lists[1], client[1]]
    return (found * (count // len(found) + 1))[:count]


def floor(count: int, connections: int) -> Load:
    """The same number of requests against uvicorn alone."""
    server = subprocess.Popen([sys.executable, "-c", FLOOR], stdout=subprocess.PIPE)
    assert server.stdout
    try:
        port = int(server.stdout.readline())
        asked = [request("floor", "GET", "/")] * count
        load("127.0.0.1", port, asked[: count // 10], connections)
        return load("127.0.0.1", port, asked, connections)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def told(name: str, found: Load, kind: str = "") -> dict[str, Any]:
    line = {
        "p50_ms": round(1000 * found.quantile(0.5, kind), 1),
        "p99_ms": round(1000 * found.quantile(0.99, kind), 1),
        "worst_ms": round(1000 * found.quantile(1.0, kind), 1),
    }
    print(f"{name:<12} " + "  ".join(f"{key[:-3]} {value:8.1f} ms" for key, value in line.items()))
    return line


def kept(words: str, found: InUse) -> None:
    print(f"{words:<12} RSS {found.rss / 1024:.1f} MiB, {found.fds} fds, {found.threads} threads")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    hub = Hub(folder, arguments.vms)
    token = secrets.token_hex(16) if arguments.token else ""
    config = json.loads((folder / "reconciler.yaml").read_text())
    config["api"]["limits"] = {"rate": 1e6, "callback_rate": 1e6}
    if token:
        (folder / "token").write_text(token)
        config["api"]["token"] = {"file": "token"}
    (folder / "reconciler.yaml").write_text(json.dumps(config))
    try:
        hub.start()
        assert hub.daemon
        pid, port = hub.daemon.pid, config["api"]["listen"].rpartition(":")[2]
        asked = mixture(hub, arguments.requests, token)
        load("127.0.0.1", int(port), asked[: len(asked) // 10], arguments.connections)
        time.sleep(SETTLED)
        before = in_use(pid)
        found = load("127.0.0.1", int(port), asked, arguments.connections)
        time.sleep(SETTLED)
        after = in_use(pid)
    finally:
        hub.close()
    least = floor(arguments.requests, arguments.connections)
    result: dict[str, Any] = {
        "requests": arguments.requests,
        "connections": arguments.connections,
        "per_second": round(arguments.requests / found.took),
        "floor_per_second": round(arguments.requests / least.took),
        "before": before._asdict(),
        "after": after._asdict(),
        "broken": len(found.broken),
        "statuses": {f"{kind} {code}": n for (kind, code), n in sorted(found.statuses.items())},
    }
    print(f"{arguments.requests} requests over {arguments.connections} connections", end=": ")
    print(f"{result['per_second']}/s; uvicorn alone: {result['floor_per_second']}/s")
    result["all"] = told("all", found)
    for kind in sorted(found.seconds):
        result[kind] = told(f"  {kind}", found, kind)
    result["floor"] = told("floor", least)
    kept("before", before)
    kept("after", after)
    print("answers:", ", ".join(f"{n} × {what}" for what, n in result["statuses"].items()))
    for line in found.broken[:5]:
        print("broken:", line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--vms", type=int, default=8)
    parser.add_argument("--token", action="store_true", help="with a token for the reads")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="reconciler-bench-"))
    try:
        result = measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        result["cores"], result["host"] = os.cpu_count(), socket.gethostname()
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
