"""A process that has imported everything, and forks one process per command.

Starting an interpreter and importing the libraries is most of what a command costs in a test. A
fork has them already. What the forked command sees is what a started one sees: its own working
directory, environment, argv, standard streams, signals and time zone, and no other open file. What
differs: its command line in /proc is this one's, its parent is this process, its hash seed is that
of its siblings, and every module is loaded. A test that is about one of these asks for a start of
its own, by `site.real_starts` or `real=True`; `pytest --real-starts` has every command started so.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

ROOT: Final = Path(__file__).resolve().parents[2]
LIBRARIES: Final = (
    "http.server",
    "inotify_simple",
    "jinja2.sandbox",
    "psycopg",
    "pymysql.cursors",
    "pyrage",
    "re2",
    "rich.console",
    "rich.live",
    "rich.table",
    "runpy",
    "stamina",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)
"""What commands import in the middle of things. A missing one costs time, nothing else."""
_MESSAGE: Final = 1 << 20
"""Bytes of one request at most; an environment is some kilobytes."""
_PATIENCE: Final = 60.0
"""Seconds until a request must have been answered."""
_DRAWN_FROM: Final = ("PYTHON", "LC_", "LANG")
"""Beginnings of the variables that an interpreter reads once, when it starts."""
NETNS: Final = "TEST_NETNS"
"""A variable with the path of the network namespace that a command is to run in; it is not passed
on."""
_FOLLOWED: Final = frozenset({"cwd", "stdin", "stdout", "stderr"})
"""Options of Popen that a fork follows, besides `env` and `text`."""


def fits(environment: Mapping[str, str]) -> bool:
    """Whether a fork can stand for an interpreter that is started in this environment."""
    return read_at_start(environment) == read_at_start(os.environ)


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """All but PYTHONPATH, which a fork can still follow."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_DRAWN_FROM) and name != "PYTHONPATH"
    }


# -- the side of the tests


class Zygote:
    """The forking process of one worker. It ends with the worker, however that ends."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.zygote", str(theirs.fileno())],
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _MESSAGE)
        self._mutex = threading.Lock()
        self._mounts = _mounts()

    def fork(self, request: Mapping[str, Any], streams: Sequence[int], status: int) -> None:
        """Have one command forked, with these as its 0, 1 and 2; `status`: where it is told of."""
        with self._mutex:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [*streams, status])

    @property
    def fit(self) -> bool:
        """Whether it lives, and has the mounts of this worker, which may have made its own."""
        return self._process.poll() is None and self._mounts == _mounts()

    def end(self) -> None:
        """End it. What it has forked lives on."""
        self._socket.close()
        self._process.wait(20)

    @property
    def pid(self) -> int:
        return self._process.pid


def _mounts() -> str:
    """Which mounts this process sees. Source: mount_namespaces(7)."""
    return os.readlink("/proc/self/ns/mnt")


_begun: list[Zygote] = []
"""Those of this worker, the newest last. Older ones have their children to wait for."""


def shared() -> Zygote:
    """The one of this worker, begun when it is needed."""
    if not _begun or not _begun[-1].fit:
        _begun.append(Zygote())
    return _begun[-1]


def end() -> None:
    """End what was begun."""
    while _begun:
        _begun.pop().end()


def python(
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    real: bool = False,
    **options: Any,
) -> subprocess.Popen[str]:
    """`python ARGS…`: a fork that stands for it, or where that cannot be, the real one.

    `args`: a path to a script, or `-m` and a module; and what follows. `options`: those of Popen.
    """
    environment = dict(os.environ if env is None else env)
    if real or always_real or set(options) - _FOLLOWED or not fits(environment):
        line = [sys.executable, *args]
        if netns := environment.pop(NETNS, ""):
            line = ["nsenter", f"--net={netns}", *line]
        return subprocess.Popen(line, env=environment, text=True, **options)
    return Forked(args, env=environment, text=True, **options)


always_real = False
"""Whether every command is to be started by an interpreter of its own."""


class Forked(subprocess.Popen[str]):
    """A Popen whose process is forked by a zygote, which tells of its pid and of its end."""

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        self._told = -1  # the pipe of the zygote's news
        super().__init__(args, **options)

    def _execute_child(self, args: Sequence[str], *rest: Any, **_: Any) -> None:
        """In place of fork and exec. Source: Popen._execute_child of CPython 3.11 to 3.13."""
        names = ("executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo",
                 "creationflags", "shell", "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread",
                 "errwrite")  # fmt: skip
        given = dict(zip(names, rest, strict=False))
        pipes = [given[name] for name in names[-6:]]
        request = {"argv": list(args), "cwd": str(given["cwd"] or Path.cwd()), "env": given["env"]}
        self._told, telling = os.pipe()
        try:
            mine = (given["p2cread"], given["c2pwrite"], given["errwrite"])
            streams = [own if fd == -1 else fd for own, fd in enumerate(mine)]
            shared().fork(request, streams, telling)
        finally:
            os.close(telling)
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        assert select.select([self._told], [], [], _PATIENCE)[0], "the zygote does not answer"
        self.pid = self._news()
        self._child_created = True

    def _news(self) -> int:
        """The next number that the zygote tells."""
        told = os.read(self._told, 4)
        if len(told) != 4:
            raise RuntimeError(f"the zygote of {self.args!r} is gone")
        return int.from_bytes(told, signed=True)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """As os.waitpid."""
        if wait_flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        status = self._news()
        os.close(self._told)
        self._told = -1
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        lock = self._waitpid_lock  # type: ignore[attr-defined]
        if self.returncode is None and lock.acquire(blocking=False):  # else another thread waits
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self.returncode = os.waitstatus_to_exitcode(status)
            finally:
                lock.release()
        return self.returncode


# -- the side of the zygote


def load() -> None:
    """Import what commands import."""
    import reconciler

    for module in pkgutil.walk_packages(reconciler.__path__, "reconciler."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def serve(fd: int) -> None:
    """Fork for every request, and tell of every end, until nobody can ask any more."""
    asking = socket.socket(fileno=fd)
    poll = select.poll()  # not epoll: no file of its own
    poll.register(fd, select.POLLIN)
    children: dict[int, tuple[int, int]] = {}  # pidfd → pid, where its end is told
    while True:
        for ready, _ in poll.poll():
            if ready != fd:
                pid, telling = children.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                _tell(telling, os.waitpid(pid, 0)[1])
                os.close(telling)
                continue
            message, fds, _, _ = socket.recv_fds(asking, _MESSAGE, 4)
            if not message:
                return
            *streams, telling = fds
            pid = os.fork()
            if not pid:
                _become(json.loads(message), streams, telling)
            for stream in streams:
                os.close(stream)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, telling)
            poll.register(pidfd, select.POLLIN)


def _tell(fd: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        os.write(fd, number.to_bytes(4, signed=True))


def _become(request: Mapping[str, Any], streams: Sequence[int], telling: int) -> NoReturn:
    """Be the command that was asked for, in this forked process, and end as it would."""
    code = 1
    try:
        signal.signal(signal.SIGINT, _INTERRUPTED)
        _tell(telling, os.getpid())  # not before: a Ctrl-C would be lost
        for number, stream in enumerate(streams):
            os.dup2(stream, number)  # it was received above 2: 0, 1 and 2 are taken
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        if netns := request["env"].pop(NETNS, ""):
            _enter(netns)
        os.environ.clear()
        os.environ.update(request["env"])
        time.tzset()
        os.chdir(request["cwd"])
        for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            _stream(number, name, mode)
        code = _run(request["argv"])
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # as an interpreter ends that nobody caught it for
    except BaseException:
        traceback.print_exc()
    finally:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                file.flush()
        os._exit(code)


def _enter(netns: str) -> None:
    """Have the network of another namespace from now on. Source: setns(2), CLONE_NEWNET."""
    import ctypes

    fd = os.open(netns, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), f"cannot enter {netns}")
    os.close(fd)


def _stream(number: int, name: str, mode: str) -> None:
    """Make a standard stream as an interpreter does for what is open there now."""
    old = getattr(sys, name)
    buffering = 0 if old.write_through and mode == "w" else -1  # PYTHONUNBUFFERED
    raw = open(number, f"{mode}b", buffering, closefd=False)  # noqa: SIM115
    new = io.TextIOWrapper(
        raw,
        old.encoding,
        old.errors,
        newline=None if mode == "r" else "\n",
        line_buffering=not old.write_through and (name == "stderr" or os.isatty(number)),
        write_through=old.write_through,
    )
    new.mode = mode  # type: ignore[misc]
    setattr(sys, name, new)
    setattr(sys, f"__{name}__", new)


def _run(argv: Sequence[str]) -> int:
    """What `python ARGV…` does, and its exit code."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        if argv[0] == "-m":
            sys.path[:1] = [os.getcwd(), *path]
            sys.argv = list(argv[1:])
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[:1] = [os.path.dirname(argv[0]), *path]
            sys.argv = list(argv)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


_INTERRUPTED: Final[Any] = signal.getsignal(signal.SIGINT)
"""What an interpreter does at Ctrl-C from its start on: nothing, if who started it had it ignored.
"""

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the tests still runs their clean-up
    load()
    gc.collect()
    gc.freeze()  # else the first collection of every fork copies all that it shares
    serve(int(sys.argv[1]))
