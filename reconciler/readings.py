"""What files said when they were read last: so that they are not checked again where nothing moved.

Checking a config, an inventory and specs takes YAML, templates and models. Loading those alone
costs more than all else that a command does when there is nothing to do. What came of it is a
plain value, and a function of the texts, of what they looked up, of the environment and of this
program. So it is kept beside the user's other caches, under a digest of all of that; where the
digest is another, it is worked out again. Nothing depends on it: a cache that cannot be read,
written or trusted is none. Only what is without a finding is kept, so every error is worked out
anew each time it is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from reconciler import __version__
from reconciler.core.declared import Asked, CheckedRun, CheckedVm, Declared, Found
from reconciler.core.document import Document
from reconciler.core.document import Path as Keys
from reconciler.core.inventory import Inventory
from reconciler.core.settings import Settings
from reconciler.host.files import Text

FORMAT: Final = 1
FOLDER: Final = "reconciler"
MOST: Final = 64 << 20
"""Bytes of a file in the cache. The specs of 10,000 VMs with three disks each take about 10 MiB."""
FILES: Final = 64
"""Files in the cache: one for each config that is used, and for each place where specs are."""
_ENVIRONMENT: Final = ("HOME", "STATE_DIRECTORY", "XDG_STATE_HOME")
"""Variables on which a config depends, beside those that begin with RECONCILER_."""

_READING: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Neither a link nor a pipe, for which a writer would be waited."""

T = TypeVar("T")


def digest(*parts: object) -> str:
    """Of all that something depends on."""
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()


@cache
def program() -> str:
    """Of the code that works readings out, and of the libraries beside it: another installation is
    another program, also while it is being written."""
    here = Path(__file__).parent
    found: list[object] = [__version__]
    for folder in (here, here / "core", Path(msgspec.__file__).parents[1]):
        info = folder.stat()
        found.append((info.st_mtime_ns, info.st_ino))
    with os.scandir(here / "core") as entries:
        found += sorted((one.name, one.stat().st_mtime_ns, one.stat().st_size) for one in entries)
    return digest(*found)


class Cache:
    """A folder of what can be worked out again; of this user alone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        home = environment.get("HOME", "")
        above = environment.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else "")
        self.folder = Path(above) / FOLDER if os.path.isabs(above) else None

    def read(self, name: str, kind: type[T]) -> T | None:
        """What was written under a name; None: nothing that can be used."""
        if self.folder is None:
            return None
        try:
            fd = os.open(self.folder / name, _READING)
            with open(fd, "rb") as file:
                info = os.fstat(fd)
                ours = info.st_uid == os.geteuid() and not info.st_mode & 0o022
                if not (ours and stat.S_ISREG(info.st_mode) and info.st_size <= MOST):
                    return None
                return msgspec.msgpack.decode(file.read(), type=kind)
        except (OSError, ValueError, msgspec.MsgspecError):  # damaged, in whatever way
            return None

    def write(self, name: str, value: object) -> None:
        """Write something as a whole, or not at all; that it cannot be is nobody's trouble."""
        data = msgspec.msgpack.encode(value)
        if self.folder is None or len(data) > MOST:
            return
        temporary = self.folder / f".{name}.{os.getpid()}"
        with contextlib.suppress(OSError):
            # A home that is not there is not made, and with sudo it may be another's.
            if self.folder.parents[1].stat().st_uid not in (os.geteuid(), 0):
                return
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            if self.folder.stat().st_uid != os.geteuid():
                return
            try:
                opening = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with open(os.open(temporary, opening, 0o600), "wb") as file:
                    file.write(data)
                os.rename(temporary, self.folder / name)
            except OSError:
                os.unlink(temporary)
                raise
            self._tidy()

    def _tidy(self) -> None:
        assert self.folder is not None
        found = [one for one in os.scandir(self.folder) if one.is_file(follow_symlinks=False)]
        for one in sorted(found, key=lambda one: -one.stat().st_mtime)[FILES:]:
            os.unlink(one.path)


# -- the config


class _Config(Struct, frozen=True):
    key: str
    settings: Settings


def settings(
    environment: Mapping[str, str], path: str | None, text: str | None, work: Callable[[], Settings]
) -> Settings:
    """The settings that a config means; worked out where they are not known. Raises what `work`
    raises."""
    cache = Cache(environment)
    mattering = sorted(
        (name, value)
        for name, value in environment.items()
        if name.startswith("RECONCILER_") or name in _ENVIRONMENT
    )
    cwd, host = os.getcwd(), os.uname().nodename
    key = digest(FORMAT, program(), path, text, mattering, cwd, host, os.geteuid())
    name = f"config-{digest(path or '', cwd)[:32]}"
    known = cache.read(name, _Config)
    if known and known.key == key:
        return known.settings
    found = work()
    # What is encrypted is safe where it stands; it need not stand in more places.
    if not any(ref.sealed for ref in found.secrets):
        cache.write(name, _Config(key, found))
    return found


# -- specs and the inventory


class _Row(Struct, frozen=True, array_like=True):
    """A VM or a run, and where it is written."""

    spec: CheckedVm
    document: int
    path: Keys


class _Wish(Struct, frozen=True, array_like=True):
    spec: CheckedRun
    document: int
    path: Keys
    aside: bool


class _File(Struct, frozen=True):
    """What one file said."""

    digest: str
    asked: list[tuple[str, str, str]]
    """What it looked up: kind, name, and a digest of the answer."""
    documents: list[Document]
    vms: list[_Row]
    runs: list[_Wish]


class _Known(Struct, frozen=True):
    key: str
    files: dict[str, _File]
    inventory_key: str = ""
    inventory: Inventory | None = None


class LookedUp(Protocol):
    """What lies around a file, and what was asked of it; see library.Beside."""

    asked: dict[tuple[str, str], str]

    def holds(self) -> bool: ...
    def variable(self, name: str) -> str | None: ...


class Readings:
    """What the specs of one place said. Used by one command, in one thread."""

    def __init__(
        self,
        settings: Settings,
        paths: Sequence[str],
        environment: Mapping[str, str],
        extra: Sequence[Text] = (),
    ) -> None:
        """`extra`: variables over all others, which every file depends on."""
        self._cache = Cache(environment)
        cwd = os.getcwd()
        given = [_of(text) for text in extra]
        self._key = digest(FORMAT, program(), msgspec.msgpack.encode(settings), cwd, given)
        self._name = f"specs-{digest(settings.state, cwd, tuple(paths))[:32]}"
        known = self._cache.read(self._name, _Known)
        self._known = known if known and known.key == self._key else _Known(self._key, {})
        self._files: dict[str, _File] = {}
        """Those that were asked for, as they are now."""
        self._moved = False

    # -- the inventory

    def inventory(self, text: Text) -> Inventory | None:
        """What an inventory's text says; None: that is not known."""
        known = self._known
        return known.inventory if known.inventory_key == _of(text) else None

    def note_inventory(self, text: Text, found: Inventory) -> None:
        """An inventory was read."""
        self._known = replace(self._known, inventory_key=_of(text), inventory=found)
        self._moved = True

    # -- a file of specs or of runs

    def found(self, text: Text, beside: LookedUp | None, *, aside: bool = False) -> Found | None:
        """What a file says; None: that is not known. `beside`: what it may look up."""
        known = self._known.files.get(_place(text, aside=aside))
        if known is None or known.digest != _of(text):
            return None
        if known.asked:
            if beside is None:
                return None
            beside.asked = {(kind, name): answer for kind, name, answer in known.asked}
            if not beside.holds():
                beside.asked = {}
                return None
            for kind, name, _ in known.asked:
                if kind == "env":  # what was asked for is told on, to a daemon or a saved plan
                    beside.variable(name)
        self._files[_place(text, aside=aside)] = known
        return _found(text.file, known)

    def note(
        self, text: Text, found: Found, beside: LookedUp | None, *, aside: bool = False
    ) -> None:
        """A file was read."""
        if found.diagnostics or found.refused or found.lost or found.tunnels:
            return  # tunnels are few, and what is said of them is no plain value
        asked = [
            (*question, answer) for question, answer in (beside.asked if beside else {}).items()
        ]
        self._files[_place(text, aside=aside)] = _file(_of(text), asked, found)
        self._moved = True

    def write(self) -> None:
        """Keep what was read anew, if anything was."""
        if self._moved:
            self._cache.write(self._name, replace(self._known, files=self._files))


def _place(text: Text, *, aside: bool) -> str:
    return f"{'aside ' if aside else ''}{text.root or ''}\0{text.file}"


def _of(text: Text) -> str:
    return digest(text.file, text.root, text.text, text.error)


def _file(digest_: str, asked: list[Any], found: Found) -> _File:
    documents: dict[int, Document] = {}

    def number(document: Document) -> int:
        documents.setdefault(id(document), document)
        return list(documents).index(id(document))

    vms = [_Row(one.spec, number(one.document), one.path) for one in found.vms]
    runs = [_Wish(one.spec, number(one.document), one.path, one.aside) for one in found.runs]
    # The values themselves are in what was made of them; places are what is looked up later.
    kept = [replace(document, value=None) for document in documents.values()]
    return _File(digest_, asked, kept, vms, runs)


def _found(file: str, known: _File) -> Found:
    documents = known.documents
    return Found(
        file,
        tuple(Declared(one.spec, documents[one.document], one.path) for one in known.vms),
        tuple(Asked(one.spec, documents[one.document], one.path, one.aside) for one in known.runs),
    )
