"""What stands for a start of a command is like one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import zygote

ABOUT = """
import json, os, pathlib, signal, sys, threading, time
signals = {one.name: str(signal.getsignal(one)) for one in signal.Signals}
about = json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "cwd": os.getcwd(), "environment": dict(os.environ), "umask": os.umask(0),
    "files": os.listdir("/proc/self/fd")[:-1], "files of 0": os.readlink("/proc/self/fd/0"),
    "signals": signals, "blocked": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "group": os.getpgrp(), "session": os.getsid(0), "ids": [os.getuid(), os.geteuid(), os.getgid()],
    "zone": time.tzname, "threads": threading.active_count(),
    "tasks": len(os.listdir("/proc/self/task")),
    "streams": [[one.encoding, one.errors, one.line_buffering, one.write_through, one.isatty(),
                 one.fileno(), one.mode, one.seekable(), type(one.buffer).__name__]
                for one in (sys.stdin, sys.stdout, sys.stderr)],
    "limits": open("/proc/self/limits").read(), "mounts": os.readlink("/proc/self/ns/mnt"),
    "nice": os.nice(0), "oom": open("/proc/self/oom_score_adj").read(),
})
pathlib.Path("about.json").write_text(about)
print("to stdout")
print("and to stderr", file=sys.stderr)
"""
"""Writes down all that a process may depend on."""


def both(
    folder: Path, text: str, *arguments: str, stream: int = subprocess.PIPE, **extra: str
) -> Iterator[subprocess.Popen[str]]:
    """The same program, started and then forked."""
    (folder / "program.py").write_text(text)
    read_at_start = zygote.read_at_start(os.environ)
    for real in (True, False):
        process = zygote.python(
            ["-m", "program", *arguments],
            real=real,
            cwd=folder,
            env={**read_at_start, "PATH": "/usr/bin", "TZ": "Asia/Kathmandu", **extra},
            stdin=subprocess.DEVNULL if stream == subprocess.PIPE else stream,
            stdout=stream,
            stderr=stream,
        )
        assert isinstance(process, zygote.Forked) is not real
        yield process


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the option says."""
    monkeypatch.setattr(zygote, "always_real", False)


@pytest.mark.parametrize("where", ["pipes", "a terminal"])
def test_a_fork_sees_what_a_start_sees(tmp_path: Path, where: str) -> None:
    (tmp_path / "lib").mkdir()
    ours, theirs = pty.openpty()
    found = []
    extra = {"PYTHONPATH": str(tmp_path / "lib")}
    stream = subprocess.PIPE if where == "pipes" else theirs
    for process in both(tmp_path, ABOUT, "-x", "a b", stream=stream, **extra):
        out, err = process.communicate(timeout=60)
        if where == "a terminal":
            out, err = os.read(ours, 1 << 16).decode().replace("\r", ""), ""
        assert (process.returncode, out + err) == (0, "to stdout\nand to stderr\n")
        found.append(json.loads((tmp_path / "about.json").read_text()))
        (tmp_path / "about.json").unlink()
    os.close(ours)
    os.close(theirs)
    started, forked = found
    assert forked == started
    assert (forked["cwd"], forked["argv"][1:]) == (str(tmp_path), ["-x", "a b"])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("raise SystemExit", 0),
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('no')", 1),
        ("import os; os._exit(3)", 3),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("print('x' * 100_000)", 0),
    ],
)
def test_a_fork_ends_as_a_start_ends(tmp_path: Path, text: str, code: int) -> None:
    started, forked = ((one.communicate(timeout=60), one) for one in both(tmp_path, text))
    assert [started[1].returncode, forked[1].returncode] == [code, code]
    assert forked[0][0] == started[0][0]
    assert forked[0][1].splitlines()[-1:] == started[0][1].splitlines()[-1:]


def test_a_fork_is_waited_for_and_signalled_like_any_process(tmp_path: Path) -> None:
    for process in both(tmp_path, "import time; print('x', flush=True); time.sleep(600)"):
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "x\n"
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.terminate()
            assert process.wait(60) == -signal.SIGTERM == process.poll()
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
