"""What the kernel and the system say of this machine: limits, clock, confinement. Reads only."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable
from typing import Final

from reconciler.core.doctor import Clock, Limits
from reconciler.core.units import Seconds

_STA_UNSYNC: Final = 0x40
_TIME_ERROR: Final = 5
"""Source: adjtimex(2), linux/timex.h."""
SYNCHRONIZED: Final = "/run/systemd/timesync/synchronized"
"""Made by systemd-timesyncd once it has heard of a server. Source: systemd-timesyncd(8)."""
AUDIT_LOG: Final = "/var/log/audit/audit.log"
_AUDIT_READ: Final = 1 << 20
"""Bytes at the end of the audit log that are looked through."""
_KERNEL_LINES: Final = 20_000
"""Lines of the kernel's log that are looked through; its ring holds fewer."""
_DENIED: Final = ('apparmor="DENIED"', "avc:  denied")
"""How AppArmor and SELinux word a denial."""


def read(path: str) -> str:
    """A small file of the kernel's, stripped; empty: it is not there, or not ours to read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16).strip("\0\n ")
    except OSError:
        return ""


def sysctl(name: str) -> str:
    """`net.ipv4.ip_local_port_range`; empty: this kernel does not tell."""
    return read(f"/proc/sys/{name.replace('.', '/')}")


def number(text: str) -> int | None:
    """None: no number, so no limit."""
    return int(text) if text.isdigit() else None


def limits(pid: int) -> Limits:
    """What a process may take of this machine; the ones that it starts inherit that."""
    files = processes = None
    with contextlib.suppress(OSError, ValueError):
        files = _finite(resource.prlimit(pid, resource.RLIMIT_NOFILE)[0])
        processes = _finite(resource.prlimit(pid, resource.RLIMIT_NPROC)[0])
    return Limits(
        files=files,
        processes=None if os.geteuid() == 0 else processes,  # root is not counted: setrlimit(2)
        tasks=_tasks(pid),
        pid_max=number(sysctl("kernel.pid_max")),
        threads_max=number(sysctl("kernel.threads-max")),
        watches=number(sysctl("fs.inotify.max_user_watches")),
        instances=number(sysctl("fs.inotify.max_user_instances")),
    )


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _tasks(pid: int) -> int | None:
    """The least `pids.max` above a process; None: there is none. Source: cgroups(7)."""
    found: list[int] = []
    for line in read(f"/proc/{pid}/cgroup").splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers == "":
            tops = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        elif "pids" in controllers.split(","):
            tops = ["/sys/fs/cgroup/pids"]
        else:
            continue
        for top in tops:
            for above in _upwards(path):
                most = number(read(f"{top}{above}/pids.max"))
                found += [most] if most is not None else []
    return min(found, default=None)


def _upwards(path: str) -> Iterable[str]:
    """The path of a group, of each above it, and of the topmost: in a container that has a limit
    too, and is all that is seen."""
    while path.strip("/"):
        yield path
        path = path.rsplit("/", 1)[0]
    yield ""


def unit(pid: int) -> str:
    """The systemd service that a process is in; empty: none."""
    for line in read(f"/proc/{pid}/cgroup").splitlines():
        for part in line.split(":", 2)[-1].split("/"):
            if part.endswith(".service") and not part.startswith("user@"):
                return part
    return ""


def container() -> str:
    """What tells that this is a container; empty: nothing does."""
    if kind := read("/run/systemd/container"):
        return kind
    for path in ("/.dockerenv", "/run/.containerenv"):
        if os.path.exists(path):
            return path
    with contextlib.suppress(OSError), open("/proc/1/environ", "rb") as file:
        for word in file.read(1 << 16).split(b"\0"):
            if word.startswith(b"container="):
                return word.decode(errors="replace")
    return ""


def clock() -> Clock:
    """What is known of the clock."""
    synchronised = True if os.path.exists(SYNCHRONIZED) else _disciplined()
    return Clock(now=time.time(), synchronised=synchronised, container=container())


def _disciplined() -> bool | None:
    """Whether the kernel says that somebody keeps its clock right; None: it does not say.

    Source: adjtimex(2) with modes 0, which changes nothing and needs no right.
    """
    import ctypes  # late: only this asks

    class Timex(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("before", ctypes.c_long * 4),  # offset, freq, maxerror, esterror
            ("status", ctypes.c_int),
            ("rest", ctypes.c_byte * 256),  # more than any architecture's
        )

    found = Timex()
    try:
        said = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(found))
    except AttributeError:
        return None
    if said < 0:
        return None
    return said != _TIME_ERROR and not found.status & _STA_UNSYNC


def selinux() -> str:
    """`enforcing`, `permissive`, or empty: it is not on."""
    return {"1": "enforcing", "0": "permissive"}.get(read("/sys/fs/selinux/enforce"), "")


def apparmor() -> bool:
    return read("/sys/module/apparmor/parameters/enabled") == "Y"


def label(pid: int) -> str:
    """What confines a process; empty: nothing, or nobody says.

    Source: apparmor(7), /proc/PID/attr/apparmor/current; selinux(8), /proc/PID/attr/current.
    """
    return read(f"/proc/{pid}/attr/apparmor/current") or read(f"/proc/{pid}/attr/current")


def denials(words: Iterable[str] = ("qemu-nbd", "qemu-img")) -> tuple[list[str], list[str]]:
    """What was denied to qemu's programs lately, from the audit log and the kernel's own; and the
    logs that could not be read, each with why."""
    lines: list[str] = []
    unread: list[str] = []
    for path, tail in ((AUDIT_LOG, _audit), ("/dev/kmsg", _kernel)):
        try:
            found = tail(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            unread.append(f"{path}: {error.strerror}")
            continue
        lines += [
            line
            for line in found
            if any(denied in line for denied in _DENIED) and any(word in line for word in words)
        ]
    return lines[-5:], unread


def _audit(path: str) -> list[str]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _AUDIT_READ))
        return file.read(_AUDIT_READ).decode(errors="replace").splitlines()


def _kernel(path: str) -> list[str]:
    """What is in the kernel's ring; a read at its end fails at once. Source: dev-kmsg."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    lines: list[str] = []
    try:
        for _ in range(_KERNEL_LINES):
            try:
                lines.append(os.read(fd, 8192).decode(errors="replace"))
            except BrokenPipeError:
                continue  # it was overwritten while we read
            except BlockingIOError:
                break
    finally:
        os.close(fd)
    return lines


def bindable(host: str, port: int) -> str:
    """Why a port cannot be bound; empty: it can. It is not listened on, so nobody notices."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return os.strerror(error.errno or 0)
    return ""


def program(line: list[str], timeout: Seconds) -> tuple[int, str]:
    """Exit code and what a short program said; -1: it could not be run, or did not end in time."""
    import subprocess

    try:
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {timeout:g} s"
    except OSError as error:
        return -1, error.strerror or str(error)
    return done.returncode, (done.stdout + done.stderr).strip()
