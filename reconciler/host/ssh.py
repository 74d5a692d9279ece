"""Start an OpenSSH client with a log of its own; read its words; judge a private key as it does."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from reconciler.core.errors import HostError

MOST: Final = 1 << 16
"""Bytes of a log, or of a key, that are read at a time."""
LINES: Final = 12
STARTED: Final = b"-- ssh is started --\n"
"""In a log before the words of each ssh, so that none is judged by what one before it said."""
LINE: Final = 300
"""Characters of a line that is kept; what a terminal would obey is not among them."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(binary: str = "ssh") -> str:
    """The absolute path of ssh. Raises HostError with the command that installs it."""
    import shutil  # late, as in qemu_nbd.py

    found = shutil.which(binary)
    if found is None:
        raise HostError(
            f"cannot find {binary}: install it with `apt-get install openssh-client`", "SshMissing"
        )
    return str(Path(found).absolute())


def spawn(binary: str, argv: Sequence[str], log: Path) -> int:
    """Start an ssh with its words in `log`; returns its pid at once. Raises HostError.

    A tunnel matters more than its log: where that cannot be opened, its words are lost.
    """
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        words = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a full disk: ssh's words are lost with it
            os.write(words, STARTED)
        return os.posix_spawn(
            binary,
            list(argv),
            {"PATH": _PATH, "LC_ALL": "C"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, words, 2),
            ],
            setsid=True,  # Ctrl-C in our terminal is not for the tunnel
        )
    except OSError as error:
        raise HostError(f"cannot start {binary}: {error}", "CannotStart") from error
    finally:
        os.close(words)


def size(log: Path) -> int:
    """Bytes of a log; 0: there is none."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def words(log: Path, since: int = 0) -> str:
    """The last lines that the newest ssh wrote after byte `since` of its log."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, size(log) - MOST))
            text = file.read(MOST).rpartition(STARTED)[2].decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [re.sub(r"[^\x20-\x7e -\uffff]", "?", line) for line in text.strip().splitlines()]
    return "\n".join(line[:LINE] for line in lines[-LINES:])


def key_trouble(path: str) -> str:
    """Why ssh cannot use a private key; empty: it can. No part of the key is in the answer."""
    try:
        info = os.stat(path)
        with open(path, "rb") as file:
            data = file.read(MOST)
    except FileNotFoundError:
        return (
            f"there is no private key {path}; make one: ssh-keygen -t ed25519 -N '' -f {path}, and "
            "give the hub the line in its .pub file"
        )
    except IsADirectoryError:
        return f"the private key {path} is a directory"
    except OSError as error:
        return f"cannot read the private key {path}: {error.strerror}"
    # ssh's own rule, for keys of the user that it runs as. Source: OpenSSH, sshkey_perm_ok().
    if info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(info.st_mode):04o}"
        return (
            f"the private key {path} has mode {mode}, and ssh takes none that others can read: "
            f"chmod 600 {path}"
        )
    if b"PRIVATE KEY-----" not in data:
        public = data.startswith((b"ssh-", b"ecdsa-", b"sk-"))
        return f"{path} is {'a public key, not the private one' if public else 'no private key'}"
    if _locked(data):
        return (
            f"the private key {path} has a passphrase, and nobody is there to type it: "
            f"ssh-keygen -p -N '' -f {path}"
        )
    return ""


def _locked(data: bytes) -> bool:
    """Whether a private key is encrypted. Source: OpenSSH, PROTOCOL.key; RFC 1421 for PEM."""
    if b"ENCRYPTED" in data.split(b"\n\n", 1)[0]:
        return True
    found = re.search(rb"-----BEGIN OPENSSH PRIVATE KEY-----\s+([A-Za-z0-9+/=\s]+)-----END", data)
    if not found:
        return False
    try:
        raw = base64.b64decode(b"".join(found.group(1).split()))
    except ValueError:
        return False
    head = b"openssh-key-v1\0"
    if not raw.startswith(head):
        return False
    length = int.from_bytes(raw[len(head) : len(head) + 4], "big")
    return raw[len(head) + 4 : len(head) + 4 + length] != b"none"
