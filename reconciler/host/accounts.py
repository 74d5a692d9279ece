"""An account of this machine as sshd judges it, and its files of keys. Reads only."""

from __future__ import annotations

import contextlib
import grp
import os
import posixpath
import pwd
import stat
import time
from collections.abc import Iterator

from reconciler.core.tunnel_doctor import Account, KeyFile

SHADOW = "/etc/shadow"
MOST = 1 << 20
"""Bytes of a file of keys that are read."""


def account(name: str) -> Account | None:
    """An account by its name; None: there is none."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return None
    gids = os.getgrouplist(name, found.pw_gid)
    password, expired = _shadow(name)
    shell = found.pw_shell or "/bin/sh"  # sshd's own default
    return Account(
        name=name,
        uid=found.pw_uid,
        home=found.pw_dir,
        shell=shell,
        shell_works=os.path.isfile(shell) and os.access(shell, os.X_OK),
        groups=tuple(_names(gids)),
        gids=frozenset(gids),
        password=password,
        expired=expired,
    )


def _names(gids: list[int]) -> Iterator[str]:
    for gid in gids:
        with contextlib.suppress(KeyError):
            yield grp.getgrgid(gid).gr_name


def _shadow(name: str) -> tuple[str | None, bool]:
    """What is known of its password, and whether it has expired. Source: shadow(5)."""
    try:
        with open(SHADOW, encoding="utf-8", errors="replace") as file:
            rows = [line.rstrip("\n").split(":") for line in file]
    except OSError:
        return None, False
    for row in rows:
        if row[0] == name and len(row) >= 8:
            locked = row[1].startswith("!")
            word = "locked" if locked else "none" if row[1].startswith("*") else "set"
            return word, row[7].isdigit() and int(row[7]) * 86400 < time.time()
    return "none", False  # it is kept elsewhere, such as in a directory service


def key_file(path: str, who: Account, *, strict: bool) -> KeyFile:
    """A file of keys as sshd sees it: read as the account, and with `strict` distrusted if others
    could write it. Source: sshd_config(5), StrictModes; OpenSSH, safe_path()."""
    real = os.path.realpath(path)
    try:
        info = os.stat(real)
        with open(real, encoding="utf-8", errors="replace") as file:
            text = file.read(MOST)
    except FileNotFoundError:
        return KeyFile(path=path, missing=True)
    except OSError as error:
        return KeyFile(path=path, trouble=f"{error.strerror}")
    if not stat.S_ISREG(info.st_mode):
        return KeyFile(path=path, trouble="it is no file")
    trouble = _closed(real, who) or (_open(real, who) if strict else "")
    return KeyFile(path=path, text=text, trouble=trouble)


def _upwards(path: str) -> Iterator[str]:
    yield path
    while path != "/":
        path = posixpath.dirname(path)
        yield path


def _closed(path: str, who: Account) -> str:
    """Why the account cannot read a file; empty: it can."""
    if who.uid == 0:
        return ""
    for one in _upwards(path):
        info = os.stat(one)
        need = 4 if one == path else 1
        shift = 6 if info.st_uid == who.uid else 3 if info.st_gid in who.gids else 0
        if not (info.st_mode >> shift) & need:
            return f"{who.name} may not {'read' if need == 4 else 'enter'} {one}"
    return ""


def _open(path: str, who: Account) -> str:
    """Who else may write it; empty: nobody. Within the home only what is below it counts."""
    for one in _upwards(path):
        info = os.stat(one)
        if info.st_uid not in (0, who.uid):
            return f"{one} belongs to uid {info.st_uid} (StrictModes)"
        if info.st_mode & 0o022:
            mode = f"{stat.S_IMODE(info.st_mode):04o}"
            return f"{one} can be written by others, mode {mode} (StrictModes)"
        if one == who.home:
            break
    return ""
