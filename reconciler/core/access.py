"""Who may ask for what: tokens, peers of the Unix socket, and what a route needs."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from reconciler.core.errors import HostError

if TYPE_CHECKING:
    from reconciler.core.settings import ApiToken

LEAST_TOKEN: Final = 16
"""Characters of a token. Of 64 kinds each, that is 96 bits, which nobody guesses."""
_SENDABLE: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What can stand behind `Bearer`. Source: RFC 6750, section 2.1."""


class Scope(StrEnum):
    """What a route needs of who asks."""

    READ = "read"
    """See backups, and what became of them."""
    OPERATE = "operate"
    """Start and end them."""
    CALLBACK = "callback"
    """Say how a run is getting on: the appliances' clients."""
    WATCH = "watch"
    """Health and figures. No token names it: where one is needed, any will do."""


SCOPES: Final = (Scope.READ, Scope.OPERATE, Scope.CALLBACK)
"""What a token may be given."""
ALL: Final = frozenset(SCOPES)
OPERATORS: Final = frozenset({Scope.READ, Scope.OPERATE})
"""What the members of `api: {group: …}` may."""
SOLE: Final = "token"
"""The name of the one that is written as `api: {token: …}`."""


class Caller(Struct, frozen=True):
    """Somebody who has said who they are."""

    who: str
    """As it is shown and written down; no secret."""
    scopes: frozenset[Scope]

    def may(self, needed: Scope) -> bool:
        return needed is Scope.WATCH or needed in self.scopes


class Peer(Struct, frozen=True):
    """Who is at the other end of the Unix socket, by the kernel's word."""

    uid: int
    name: str
    """Empty: nobody knows that user."""
    groups: frozenset[int] = frozenset()


class Key(Struct, frozen=True):
    """A token as it is kept: its digest. Its text is nowhere in it."""

    name: str
    digest: bytes
    scopes: frozenset[Scope]


def key(name: str, text: str, scopes: Iterable[Scope]) -> Key:
    """A token that can be used. Raises ValueError, which shows nothing of it."""
    if len(text) < LEAST_TOKEN:
        raise ValueError(
            f"it has {len(text)} characters, and {LEAST_TOKEN} are the least: write what "
            "`openssl rand -hex 32` prints"
        )
    if not _SENDABLE.fullmatch(text):
        raise ValueError(
            "it has characters that no client can send: a token is made of letters, digits and "
            "`-._~+/`, without spaces; write what `openssl rand -hex 32` prints"
        )
    return Key(name, _digest(text.encode()), frozenset(scopes))


def keyring(tokens: Sequence[ApiToken], texts: Sequence[str]) -> tuple[Key, ...]:
    """The tokens of the config, each with its text. Raises HostError, which shows nothing of it:
    one cannot be used, or is another's too."""
    found: list[Key] = []
    for token, text in zip(tokens, texts, strict=True):
        called = "the token of `api`" if token.name == SOLE else f"token {token.name} of `api`"
        try:
            one = key(token.name, text, map(Scope, token.scopes))
        except ValueError as error:
            raise HostError(
                f"cannot use {called} ({token.secret}): {error}", "SecretUnreadable"
            ) from None
        same = [other.name for other in found if other.digest == one.digest]
        if same:
            raise HostError(
                f"cannot use {called} ({token.secret}): it is the same as {same[0]}'s, so it could "
                "not be told who asks",
                "SecretUnreadable",
            )
        found.append(one)
    return tuple(found)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class Access(Struct, frozen=True, kw_only=True):
    """What holds for one address and the Unix socket beside it."""

    keys: tuple[Key, ...] = ()
    loopback: bool = True
    """Only this machine can reach the address."""
    callbacks_closed: bool = False
    """A token was made for callbacks, so they need one."""
    uid: int = -1
    """Who we are."""
    group: int | None = None
    """Whose members may operate."""

    def holder(self, presented: bytes) -> Caller | None:
        """Whose token this is; None: nobody's. It takes the same time whichever is meant."""
        found: Key | None = None
        digest = _digest(presented)
        for one in self.keys:
            if hmac.compare_digest(one.digest, digest):
                found = one
        if found is None:
            return None
        who = "the token" if found.name == SOLE else f"token {found.name}"
        return Caller(who, found.scopes)

    def peer(self, peer: Peer) -> Caller:
        """What somebody may who came by the Unix socket."""
        name = f" ({peer.name})" if peer.name else ""
        if peer.uid in (0, self.uid):
            scopes = ALL
        elif self.group is not None and self.group in peer.groups:
            scopes = OPERATORS
        else:
            scopes = frozenset()
        return Caller(f"uid {peer.uid}{name} by the socket", scopes)

    def asks(self, needed: Scope) -> bool:
        """Whether who comes by the address has to say who they are."""
        if not self.loopback:
            return True
        match needed:
            case Scope.WATCH:
                return False
            case Scope.CALLBACK:
                return self.callbacks_closed
            case Scope.READ | Scope.OPERATE:
                return bool(self.keys)


def sentence(*, loopback: bool, tokens: bool, callbacks_closed: bool) -> str:
    """What a person should know of an address; empty: it asks everybody."""
    if not loopback or callbacks_closed:
        return ""
    if tokens:
        return (
            "callbacks are taken without a token, as unmodified appliances send none; a token with "
            "the scope `callback` in `api: {tokens: …}` closes that"
        )
    return (
        "everybody on this machine, and whoever a tunnel brings here, may use the API: no token is "
        "asked for until `api: {tokens: …}` in the config names one"
    )


UNASKED: Final = (
    "this needs a token: send `Authorization: Bearer TOKEN` with one of `api: {tokens: …}` in the "
    "hub's config, or ask by its Unix socket"
)
UNKNOWN: Final = (
    "this hub knows no such token; those that it knows are in `api: {tokens: …}` of its config, "
    "which `reconciler reload` reads again"
)


def forbidden(caller: Caller, needed: Scope) -> str:
    """Why somebody who is known may not."""
    has = ", ".join(sorted(caller.scopes)) or "no scope"
    if caller.who.startswith("uid "):
        where = "the hub's own user and root may, and members of `api: {group: …}` read and operate"
    else:
        where = "add it to the token's `scopes` in `api: {tokens: …}` of the hub's config"
    return f"this needs the scope {needed}, and {caller.who} has {has}; {where}"


class Bucket(Struct):
    """How much somebody may ask still. It fills with time; each request takes one out."""

    level: float
    at: float
    """When it was that full; seconds of any clock that only goes forward."""


class Meter:
    """How often each of many may ask."""

    def __init__(self, rate: float, *, burst: float, most: int = 4096) -> None:
        """`rate`: requests a second; `burst`: at once, after a rest. `most`: how many are kept in
        mind; who has rested longest is forgotten first."""
        self.rate, self.burst, self.most = rate, burst, most
        self._buckets: dict[object, Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, who: object, now: float) -> float:
        """0.0: it may be asked; else how many seconds from now it may."""
        bucket = self._buckets.pop(who, None) or Bucket(self.burst, now)
        level = min(self.burst, bucket.level + max(0.0, now - bucket.at) * self.rate)
        wait = 0.0 if level >= 1.0 else (1.0 - level) / self.rate
        self._buckets[who] = Bucket(level - (0.0 if wait else 1.0), now)
        if len(self._buckets) > self.most:
            del self._buckets[next(iter(self._buckets))]
        return wait
