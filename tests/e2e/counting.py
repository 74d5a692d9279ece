"""What a command asks of the kernel and of SQLite, counted: equal for equal work, on any machine.

Times differ from run to run; these do not. Left out is what depends on timing or on the machine:
threads and their locks, polls, and what is read of processes that are not the test's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.site import Site

CALLS: Final = "execve,fsync,fdatasync,connect,openat"
STRACE: Final = (
    *("strace", "--follow-forks", "--decode-fds=path", "--quiet=all", "--signal=none"),
    *("--string-limit=4096", "--detach-on=execve", f"--trace={CALLS}"),
)
"""It lets go of what is started, so that servers are not traced and their end is not waited for."""
COMMAND: Final = """
import json, sqlite3, sys
commits = 0

def connect(*args, real=sqlite3.connect, **options):
    connection = real(*args, **options)
    writes = False  # a commit of what only read writes nothing, so it does not count

    def told(statement):
        global commits
        nonlocal writes
        commits += writes and statement.startswith("COMMIT")
        writes = statement.startswith("BEGIN IMMEDIATE") or (
            writes and not statement.startswith(("COMMIT", "ROLLBACK"))
        )

    connection.set_trace_callback(told)
    return connection

sqlite3.connect = connect
from reconciler.cli.main import run
code = run(sys.argv[2:])
modules = sorted(name for name in sys.modules if name.partition(".")[0] == "reconciler")
with open(sys.argv[1], "w") as file:
    json.dump({"code": code, "commits": commits, "modules": modules}, file)
"""
"""Runs a command line and writes down what only its own process knows."""
_CALL: Final = re.compile(r"(?P<pid>\d+) +(?P<name>execve|fsync|fdatasync|connect|openat)\(")
_PROGRAM: Final = re.compile(r'execve\("[^"]*", \["([^"]*)"')
_FD: Final = re.compile(r"\((\d+)<([^>]*)>")
_OPENED: Final = re.compile(r'openat\((?:AT_FDCWD|\d+)<([^>]*)>, "([^"]*)"')
_PORT: Final = re.compile(r"sin_port=htons\((\d+)\)")


@cache
def why_not() -> str:
    """Why nothing can be traced here; empty if it can."""
    if not shutil.which("strace"):
        return "strace is not installed: make system-tests"
    done = subprocess.run(
        [*STRACE, "--output=/dev/null", "true"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


def counted(site: Site, appliance: int, *arguments: str) -> Counter[str]:
    """Run a command of a hub and count. `appliance`: its port."""
    if why := why_not():
        pytest.skip(f"cannot count system calls: {why}")
    before = set(site.pids().values())
    with tempfile.TemporaryDirectory() as name:
        trace, known = Path(name, "trace"), Path(name, "known")
        argv = [*STRACE, f"--output={trace}", sys.executable, "-c", COMMAND, str(known)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RECONCILER_")}
        done = subprocess.run(
            [*argv, *arguments], cwd=site.folder, env={**environment, "HOME": str(site.folder)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        told = json.loads(known.read_text())
        assert told["code"] == 0, done.stdout + done.stderr
        found = Counter(calls(trace.read_text(), site, appliance, before))
    found["commits"] = told["commits"]
    found["modules of ours"] = len(told["modules"])
    return +found


def calls(trace: str, site: Site, appliance: int, servers: Collection[int]) -> Iterator[str]:
    """What each traced call is for. `servers`: pids of those that ran before."""
    started: set[str] = set()
    own = {(str(pid),) for pid in servers}
    first = ""
    for line in trace.splitlines():
        call = _CALL.match(line)
        if not call:  # the rest of one that was interrupted by another thread's
            continue
        first = first or call["pid"]
        if call["name"] == "execve":
            program = _PROGRAM.search(line)
            assert program, line
            # A program is looked for in one directory after the other: one start, many tries.
            if call["pid"] not in {first, *started}:
                started.add(call["pid"])
                yield f"start {Path(program[1]).name}"
        elif call["name"] in {"fsync", "fdatasync"}:
            fd = _FD.search(line)
            assert fd, line
            yield f"sync {place(Path(fd[2]), site)}"
        elif call["name"] == "connect":
            if port := _PORT.search(line):
                yield (
                    "connect to a server"
                    if int(port[1]) in site.ports
                    else (
                        "connect to the appliance"
                        if int(port[1]) == appliance
                        else "connect elsewhere"
                    )
                )
        else:
            opened = _OPENED.search(line)
            assert opened, line
            path = Path(opened[1], opened[2])
            if path.is_relative_to(site.folder):
                yield f"open {place(path, site)}"
            elif path.parts[1:2] == ("proc",) and path.parts[2:3] in own:
                yield "open /proc of a server"


def place(path: Path, site: Site) -> str:
    """Where below a hub a file is."""
    if not path.is_relative_to(site.folder):
        return "elsewhere"
    parts = path.relative_to(site.folder).parts
    return parts[0] if parts and parts[0] in {"state", "repository"} else "spec and config"
