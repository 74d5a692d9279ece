"""A unit's sandbox, as far as one can have it without systemd, and then the command.

`python -m tests.sandbox UNIT COMMAND…`: no rights of root, no new ones, and seccomp filters made of
what the unit says: SystemCallFilter=, MemoryDenyWriteExecute=, RestrictAddressFamilies= and
RestrictNamespaces=. Not here: what the unit does to the file system. Source: systemd.exec(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ALLOW, EPERM, ENOSYS, EAFNOSUPPORT = (
    0x7FFF0000,
    *(0x00050000 | code for code in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT)),
)
"""What a filter does with a call. Source: seccomp.h, SCMP_ACT_ALLOW, SCMP_ACT_ERRNO."""
EQUAL, MASKED = 4, 7
"""Source: seccomp.h, SCMP_CMP_EQ and SCMP_CMP_MASKED_EQ."""
WRITE, EXECUTE = 2, 4
NAMESPACES = 0x7E020080
"""Every CLONE_NEW*. Source: sched.h."""
NO_NEW_PRIVS, DROP_BOUND = 38, 24
"""Source: prctl.h, PR_SET_NO_NEW_PRIVS and PR_CAPBSET_DROP."""


class Compare(ctypes.Structure):
    """One argument of a call, against a value."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    ]


class Filter:
    """A seccomp filter that is being made."""

    def __init__(self, otherwise: int) -> None:
        self.lib = ctypes.CDLL("libseccomp.so.2")
        self.lib.seccomp_init.restype = ctypes.c_void_p
        self.context = ctypes.c_void_p(self.lib.seccomp_init(ctypes.c_uint32(otherwise)))

    def rule(self, action: int, name: str, *compare: Compare) -> None:
        number = self.lib.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return  # not a call of this machine
        array = (Compare * len(compare))(*compare)
        code = self.lib.seccomp_rule_add_array(
            self.context, ctypes.c_uint32(action), number, len(compare), array
        )
        assert code == 0, (name, code)

    def load(self) -> None:
        assert self.lib.seccomp_load(self.context) == 0


def values(unit: str, key: str) -> list[str]:
    """What a unit says under a key, line by line."""
    prefix = f"{key}="
    return [line.removeprefix(prefix) for line in unit.splitlines() if line.startswith(prefix)]


def calls_of(words: Iterable[str]) -> set[str]:
    """The system calls behind names and groups of them."""
    found: set[str] = set()
    for word in words:
        if not word.startswith("@"):
            found.add(word)
            continue
        text = subprocess.run(
            ["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True
        ).stdout
        inner = [line.strip() for line in text.splitlines()[1:]]
        found |= calls_of(one for one in inner if one and not one.startswith("#"))
    return found


def allowed(unit: str) -> set[str]:
    """The system calls that a unit allows."""
    found: set[str] = set()
    for line in values(unit, "SystemCallFilter"):
        words = line.removeprefix("~").split()
        found = found - calls_of(words) if line.startswith("~") else found | calls_of(words)
    return found | calls_of(["@default"])


def filters(unit: str) -> list[Filter]:
    calls = Filter(EPERM)
    for name in allowed(unit):
        calls.rule(ALLOW, name)
    memory = Filter(ALLOW)
    if values(unit, "MemoryDenyWriteExecute") == ["yes"]:
        both = WRITE | EXECUTE
        memory.rule(EPERM, "mmap", Compare(2, MASKED, both, both))
        for name in ("mprotect", "pkey_mprotect"):
            memory.rule(EPERM, name, Compare(2, MASKED, EXECUTE, EXECUTE))
    families = Filter(ALLOW)
    named = " ".join(values(unit, "RestrictAddressFamilies")).split()
    good = {int(getattr(socket, name)) for name in named}
    for family in set(range(46)) - good:
        families.rule(EAFNOSUPPORT, "socket", Compare(0, EQUAL, family, 0))
    spaces = Filter(ALLOW)
    if values(unit, "RestrictNamespaces") == ["yes"]:
        spaces.rule(ENOSYS, "clone3")
        for bit in (1 << n for n in range(32) if NAMESPACES >> n & 1):
            spaces.rule(EPERM, "clone", Compare(0, MASKED, bit, bit))
            spaces.rule(EPERM, "unshare", Compare(0, MASKED, bit, bit))
    return [memory, families, spaces, calls]


def main() -> None:
    unit = Path(sys.argv[1]).read_text(encoding="utf-8")
    made = filters(unit)
    libc = ctypes.CDLL(None, use_errno=True)
    if values(unit, "CapabilityBoundingSet") == [""]:
        for number in range(64):
            libc.prctl(DROP_BOUND, number, 0, 0, 0)  # who is not root has none to drop
    if values(unit, "NoNewPrivileges") == ["yes"]:
        assert libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    for one in made:
        one.load()
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
