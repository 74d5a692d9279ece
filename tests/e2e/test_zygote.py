"""What stands for a start of a command is like one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import zygote

ABOUT = """
import json, os, signal, sys, threading, time
signals = {one.name: str(signal.getsignal(one)) for one in signal.Signals}
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "cwd": os.getcwd(), "environment": dict(os.environ), "umask": os.umask(0),
    "files": os.listdir("/proc/self/fd")[:-1], "files of 0": os.readlink("/proc/self/fd/0"),
    "signals": signals, "blocked": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "group": os.getpgrp(), "session": os.getsid(0), "ids": [os.getuid(), os.geteuid(), os.getgid()],
    "zone": time.tzname, "threads": threading.active_count(),
    "tasks": len(os.listdir("/proc/self/task")),
    "streams": [[one.encoding, one.errors, one.line_buffering, one.write_through, one.isatty(),
                 one.fileno(), one.mode, type(one.buffer).__name__]
                for one in (sys.stdin, sys.stdout, sys.stderr)],
    "limits": open("/proc/self/limits").read(), "mounts": os.readlink("/proc/self/ns/mnt"),
    "nice": os.nice(0), "oom": open("/proc/self/oom_score_adj").read(),
}))
print("and to stderr", file=sys.stderr)
"""
"""Prints all that a process may depend on."""


def both(folder: Path, text: str, *arguments: str, **extra: str) -> list[subprocess.Popen[str]]:
    """The same program, started and forked."""
    (folder / "program.py").write_text(text)
    read_at_start = zygote.read_at_start(os.environ)
    return [
        zygote.python(
            ["-m", "program", *arguments],
            real=real,
            cwd=folder,
            env={**read_at_start, "PATH": "/usr/bin", "TZ": "Asia/Kathmandu", **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for real in (True, False)
    ]


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the option says."""
    monkeypatch.setattr(zygote, "always_real", False)


def told(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "and to stderr\n"), out + err
    return json.loads(out)


def test_a_fork_sees_what_a_start_sees(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    started, forked = map(
        told, both(tmp_path, ABOUT, "-x", "a b", PYTHONPATH=str(tmp_path / "lib"))
    )
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
    started, forked = both(tmp_path, "import time; print('x', flush=True); time.sleep(600)")
    for process in (started, forked):
        with process:
            assert isinstance(process, zygote.Forked) is (process is not started)
            assert process.stdout is not None
            assert process.stdout.readline() == "x\n"
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.terminate()
            assert process.wait(60) == -signal.SIGTERM == process.poll()
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
