"""Where a bench happens: a directory of its own, and processes that are all ended by their pid."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

HERE: Final = Path(__file__).resolve().parent
DEADLINE: Final = 60.0
"""Seconds after which what is waited for is taken as hanging."""
PARALLEL: Final = min(32, 4 * (os.cpu_count() or 1))
"""Servers that the tool starts at once, unless its config says otherwise."""


class BenchError(Exception):
    """Something was not as it must be for the figures to mean anything."""


def become_subreaper() -> None:
    """Servers whose starter has ended become our children. Source: prctl(2)."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise BenchError(f"prctl: {os.strerror(ctypes.get_errno())}")


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on. Source: proc(5)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def children() -> dict[int, tuple[str, ...]]:
    """pid → argv of every process below us that lives; our children that have ended are reaped."""
    parents: dict[int, int] = {}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):
            state, parent = _stat(pid)[:2]
            if state != "Z":
                parents[pid] = int(parent)
            elif int(parent) == os.getpid():
                os.waitpid(pid, os.WNOHANG)
    found = {}
    for pid in parents:
        above = pid
        while (above := parents.get(above, 0)) and above != os.getpid():
            pass
        if above:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if words[:-1]:  # one that is just ending has none
                    found[pid] = tuple(words[:-1])
    return found


def servers() -> dict[int, tuple[str, ...]]:
    """The qemu-nbd among them."""
    return {
        pid: argv for pid, argv in children().items() if argv[0].rsplit("/", 1)[-1] == "qemu-nbd"
    }


def end(pids: Sequence[int], number: signal.Signals) -> None:
    """Signal children and wait until all of them are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    deadline = time.monotonic() + DEADLINE
    while any(map(_lives, pids)):  # whose parents are others
        if time.monotonic() > deadline:
            raise BenchError(f"does not end: {list(pids)}")
        time.sleep(0.0005)


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def end_all() -> None:
    """Leave no child behind, nor the children of those that end here."""
    while left := list(children()):
        end(left, signal.SIGKILL)


def cpu_of(pids: Sequence[int]) -> float:
    """CPU seconds that processes have used so far. Source: the kernel's sched-stats.rst."""
    spent = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            spent += int((thread / "schedstat").read_text().split()[0])
    return spent / 1e9


def memory_of(pids: Sequence[int]) -> float:
    """MiB that processes have for themselves, shared ones in parts. Source: proc(5), PSS."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def cpu_of_ours() -> float:
    """CPU seconds of this process, and of those of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@dataclass(frozen=True)
class Took:
    """What a command took: by the clock, and CPU of its own, without that of its servers."""

    wall: float
    cpu: float
    began: float
    out: str


def timed(argv: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> Took:
    """Run a command from its exec to its end; its CPU is also that of the children it waited for.

    Raises BenchError unless it succeeds.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
        if process.returncode:
            err.seek(0)
            last = "\n".join((text + err.read().decode()).splitlines()[-20:])
            raise BenchError(f"exit {process.returncode} from {shlex.join(argv)}\n{last}")
    return Took(wall, usage.ru_utime + usage.ru_stime, began, text)


def machine(where: Path) -> dict[str, object]:
    """What the seconds depend on."""
    version = subprocess.run(["qemu-nbd", "--version"], capture_output=True, text=True, check=True)
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    under = [mount for mount in mounts if where.is_relative_to(mount[1])]
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "qemu_nbd": version.stdout.splitlines()[0].split()[1],
        "filesystem": max(under, key=lambda mount: len(mount[1]))[2] if under else "unknown",
        "parallel": PARALLEL,
        "load_before": os.getloadavg()[0],
    }


def until(done: Callable[[], bool], what: str) -> None:
    """Raises BenchError if it is never so."""
    deadline = time.monotonic() + DEADLINE
    while not done():
        if time.monotonic() > deadline:
            raise BenchError(f"never: {what}")
        time.sleep(0.0005)


def carried_out(work: Callable[[], int]) -> int:
    """The exit code of a bench, whatever comes in between."""
    try:
        return work()
    except BenchError as error:
        told(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        told("interrupted: every process is ended")
        return 130


def told(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def settle_environment(root: Path) -> None:
    """What the shell has set must not count: our settings, and how Python starts.

    Bytecode is cached, as it is where the command is installed, but not in this checkout.
    """
    for name in [name for name in os.environ if name.startswith(("RECONCILER_", "PYTHON"))]:
        del os.environ[name]
    os.environ["PYTHONPYCACHEPREFIX"] = str(root / "bytecode")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")  # where the tool keeps what it read


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary directory; afterwards it is gone, and so is every process of ours."""

    def stop(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    become_subreaper()
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="reconciler-bench-") as name:
        try:
            settle_environment(Path(name))
            yield Path(name)
        finally:
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.SIG_IGN)
            end_all()


def reconciler() -> str:
    """The command that is installed beside this interpreter, or found on the PATH."""
    beside = Path(sys.executable).parent / "reconciler"
    found = str(beside) if beside.exists() else shutil.which("reconciler")
    if not found:
        raise BenchError("cannot find the command `reconciler`: `make bench` installs it")
    return found
