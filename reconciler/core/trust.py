"""Which host key a person says is the hub's: what was asked, what is known → what may be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from reconciler.core.tunnel import HostKey

KINDS: Final = ("ed25519", "ecdsa", "rsa")
"""What a server is asked for, the best first, as ssh-keyscan calls them."""
_FILES: Final = {"ssh-ed25519": "ed25519", "ssh-rsa": "rsa"}


def kind_of(key: HostKey) -> str:
    """What sshd calls its file of it: `ed25519`, `ecdsa`, `rsa`."""
    return _FILES.get(key.kind, "ecdsa" if key.kind.startswith("ecdsa-") else key.kind)


def in_order(keys: Sequence[HostKey]) -> list[HostKey]:
    """Each key once, the best kind first."""
    known = dict.fromkeys(keys)
    return sorted(
        known, key=lambda one: KINDS.index(kind_of(one)) if kind_of(one) in KINDS else len(KINDS)
    )


def at_hub(key: HostKey) -> str:
    """The command that prints the same fingerprint at the hub itself."""
    return f"ssh-keygen -lf /etc/ssh/ssh_host_{kind_of(key)}_key.pub"


class Verdict(Struct, frozen=True):
    """What may be done with what a server showed."""

    outcome: str
    """`known`: it has the pinned key. `new`: none is pinned. `replace`: another is, and it may go.
    `other`: another is, and it stays. `unlike`: no key has the fingerprint that was given."""
    key: HostKey
    """The one that is, or would be, trusted."""


def judge(
    offered: Sequence[HostKey], pinned: HostKey | None, fingerprint: str, *, replace: bool
) -> Verdict:
    """`offered`: what the server showed, not empty, the best kind first. `fingerprint`: the only
    one that may be trusted; empty: a person is to say so."""
    if fingerprint:
        named = [one for one in offered if one.fingerprint == fingerprint]
        if not named:
            return Verdict("unlike", offered[0])
        if pinned in named:
            return Verdict("known", named[0])
        offered = named
    elif pinned in offered:
        return Verdict("known", next(one for one in offered if one == pinned))
    if pinned is None:
        return Verdict("new", offered[0])
    return Verdict("replace" if replace else "other", offered[0])
