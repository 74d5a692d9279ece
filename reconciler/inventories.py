"""The inventory of the config, file or database: read with a deadline, its last answer remembered.

`reader_of` gives the one reader of an inventory in this process. What is read well is good for
everything. Where it cannot be read, the last good answer is given out as stale (see
`core.inventory.Stale`): what has begun goes on by it, and nothing new begins.

The last good answer is in `<state>/inventory.json`. Only who holds the hub writes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from reconciler.core import inventory
from reconciler.core.document import parse
from reconciler.core.errors import Diagnostic, HostError
from reconciler.core.inventory import Inventory
from reconciler.core.settings import Secret, Settings, SqlInventory, VCenter
from reconciler.core.source import Stale, told
from reconciler.core.units import Seconds, format_duration, stamp
from reconciler.host import files
from reconciler.host.sql import Database, Rows

if TYPE_CHECKING:
    from reconciler.readings import Readings

NAME: Final = "inventory.json"
"""The last good answer, in the state directory. When it was given is the file's time."""
FORMAT: Final = 1
AGAIN: Final[Seconds] = 0.5
"""How long is waited for a database that did not answer in time when it was asked last."""


class Answer(Struct, frozen=True, kw_only=True):
    """What a reading of the inventory came to."""

    inventory: Inventory | None = None
    """None: the config names none."""
    diagnostics: tuple[Diagnostic, ...] = ()
    """Why it cannot be read."""
    digest: str = ""
    """Of what is known: another one where anything else is."""

    @property
    def error(self) -> str:
        """Why it cannot be read; empty: it was."""
        return self.inventory.stale.error if self.inventory and self.inventory.stale else ""


class Good(Struct, frozen=True, kw_only=True):
    """An answer that can be relied upon as of a moment."""

    inventory: Inventory
    at: Seconds
    digest: str


class Reader:
    """Reads one inventory. Used by any thread."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.state = Path(settings.state)
        self._mutex = threading.Lock()
        self._remembered = ""
        """Digest of what is in the state directory."""
        self._good: Good | None = None
        self._looked = False
        """Whether it was looked for in the state directory."""
        sql, file = settings.inventory_sql, settings.inventory
        self._way: _File | _Sql | None = None
        if sql:
            self._way = _Sql(sql, settings.vcenters, environment)
        elif file:
            self._way = _File(file)

    def read(
        self,
        *,
        since: Seconds | None = None,
        pipe: bool = False,
        known: Readings | None = None,
    ) -> Answer:
        """What is known now. Never raises; a database takes no longer than the config allows.

        `since`: a monotonic time; a database that was asked after that is not asked again. `pipe`:
        the file may be one, which is waited for. `known`: what files said when they were read
        before.
        """
        if self._way is None:
            return Answer()
        with self._mutex:
            found = self._way.read(since, pipe=pipe, known=known)
            if isinstance(found, Good):
                self._good = found
                return Answer(inventory=found.inventory, digest=found.digest)
            return self._stale(found, self._way)

    @property
    def text(self) -> files.Text | None:
        """The file as it was read last, for who shows what is wrong in it; None: it is none."""
        return self._way.read_last if isinstance(self._way, _File) else None

    def _stale(self, wrong: tuple[Diagnostic, ...], way: _File | _Sql) -> Answer:
        if self._good is None and not self._looked:
            self._good = _remembered(self.state / NAME, way.identity)
        self._looked = True
        good, error = self._good, way.error(wrong[0])
        if good is None:
            nothing = Inventory(way.origin, {}, stale=Stale(error))
            return Answer(inventory=nothing, diagnostics=wrong, digest="none")
        known, stale = good.inventory, Stale(error, good.at)
        found = Inventory(way.origin, known.vms, known.groups, known.unusable, stale)
        return Answer(
            inventory=found,
            diagnostics=tuple(way.told(one, stale) for one in wrong),
            digest=f"{good.digest} stale",
        )

    def remember(self) -> None:
        """Write the last good answer down, for who starts later. The caller holds the hub.

        Raises HostError.
        """
        with self._mutex:
            good, way = self._good, self._way
            if good is None or way is None:
                return
            path = self.state / NAME
            try:
                if self._remembered != good.digest:
                    _write(path, way.identity, good)
                    self._remembered = good.digest
                os.utime(path, (good.at, good.at))
            except OSError as error:
                self._remembered = ""
                raise HostError(f"cannot write {path}: {error.strerror}", "Storage") from error

    def close(self) -> None:
        """End what is open."""
        if isinstance(self._way, _Sql):
            self._way.close()


class _File:
    """A file."""

    def __init__(self, path: str) -> None:
        self.origin = path
        self.identity = _hash(f"file {path}")
        self._text = ""
        self.read_last: files.Text | None = None
        self._found: Good | tuple[Diagnostic, ...] | None = None

    def read(
        self, _since: Seconds | None, *, pipe: bool, known: Readings | None
    ) -> Good | tuple[Diagnostic, ...]:
        """The file as it is; parsed where it is not as it was."""
        at, text = time.time(), files.read(self.origin, pipe=pipe)
        self.read_last = text
        if text.error:
            self._found = None
            return (Diagnostic("error", f"the inventory: {text.error}"),)
        if self._found is None or text.text != self._text:
            self._found, self._text = self._parsed(text, known), text.text
        found = self._found
        if isinstance(found, Good):
            return Good(inventory=found.inventory, at=at, digest=found.digest)
        return found

    def _parsed(self, text: files.Text, readings: Readings | None) -> Good | tuple[Diagnostic, ...]:
        if readings and (before := readings.inventory(text)):
            return Good(inventory=before, at=0.0, digest=_hash(text.text))
        document, wrong = parse(text.text, text.file)
        known = None
        if document:
            from reconciler.core.inventory_file import read  # late: its models take 50 ms to load

            known, wrong = read(document)
        if known is None:
            return tuple(wrong)
        if readings:
            readings.note_inventory(text, known)
        return Good(inventory=known, at=0.0, digest=_hash(text.text))

    def error(self, one: Diagnostic) -> str:
        return told(one)

    def told(self, one: Diagnostic, _stale: Stale) -> Diagnostic:
        return one


class _Sql:
    """A database. It is asked in a thread, so that nobody waits longer than the deadline."""

    def __init__(
        self,
        sql: SqlInventory,
        vcenters: Mapping[str, VCenter],
        environment: Mapping[str, str],
    ) -> None:
        self.sql, self.vcenters, self.environment = sql, vcenters, environment
        self.origin = sql.origin
        from reconciler.core import inventory_rows  # late, as is all that checks what is written

        self.query = sql.query or inventory_rows.QUERY
        self.identity = _hash(f"sql {sql.url}\0{self.query}\0{sorted(vcenters)}")
        self._database = Database(sql.url, sql.timeout)
        self._out: _Question | None = None
        self._asked = float("-inf")
        """When it was asked last; monotonic."""
        self._found: Good | tuple[Diagnostic, ...] | None = None
        self._late = False
        """It did not answer in time when it was asked last."""
        self._known: tuple[str, Inventory] | None = None
        """Digest of some rows, and what they say."""

    def read(
        self,
        since: Seconds | None,
        *,
        pipe: bool,  # noqa: ARG002
        known: Readings | None,  # noqa: ARG002
    ) -> Good | tuple[Diagnostic, ...]:
        if since is not None and self._asked >= since and self._found is not None:
            return self._found
        self._asked = time.monotonic()
        self._found = self._read()
        return self._found

    def _read(self) -> Good | tuple[Diagnostic, ...]:
        out, timeout = self._out, self.sql.timeout
        silence = f"no answer within {format_duration(timeout)}"
        if out and out.ended.is_set():  # too late for who asked; what it says is of then
            self._late, out = self._late and bool(out.error), None
        if out and time.monotonic() - out.began >= timeout:
            self._database.cut()
            return self._wrong(silence)
        if out is None:
            out = self._out = _Question(self)
            out.start()
        ended = out.ended.wait(min(AGAIN, timeout) if self._late else timeout)
        took = time.monotonic() - out.began
        if not ended or (out.error and took >= 0.9 * timeout):  # whoever was first to give it up
            self._late = True
            if took >= timeout:
                self._database.cut()
            return self._wrong(silence)
        self._late, self._out = False, None
        if out.error:
            return self._wrong(out.error)
        assert out.rows is not None
        return self._read_rows(out.rows, out.at)

    def _read_rows(self, rows: Rows, at: Seconds) -> Good | tuple[Diagnostic, ...]:
        if not rows.rows:
            return self._wrong("it knows no VM at all, which is not believed")
        ordered = sorted(map(repr, rows.rows))  # a database gives them in any order
        digest = _hash(repr((rows.columns, ordered)))
        if self._known is None or self._known[0] != digest:
            from reconciler.core import inventory_rows

            try:
                found = inventory_rows.read(self.origin, rows.columns, rows.rows, self.vcenters)
            except inventory_rows.ColumnsError as error:
                return self._wrong(str(error))
            self._known = (digest, found)
        return Good(inventory=self._known[1], at=at, digest=digest)

    def _wrong(self, why: str) -> tuple[Diagnostic, ...]:
        return (Diagnostic("error", f"{self._cannot}{why}"),)

    @property
    def _cannot(self) -> str:
        return f"cannot read the inventory {self.origin}: "

    def error(self, one: Diagnostic) -> str:
        return one.summary.removeprefix(self._cannot)

    def told(self, one: Diagnostic, stale: Stale) -> Diagnostic:
        """A server that is away is nobody's mistake: what has begun goes on without it."""
        said = f"{one.summary}; what has begun goes on by its answer of {stamp(stale.since)}"
        return Diagnostic("warning", f"{said}, and no run begins", one.place)

    def ask(self) -> Rows:
        """Raises HostError."""
        return self._database.ask(self.query, self._password)

    def _password(self) -> Secret | None:
        ref = self.sql.password
        return files.secret(ref, self.environment) if ref else None

    def close(self) -> None:
        if self._out is None or self._out.ended.wait(0):
            self._database.close()
        else:
            self._database.cut()


class _Question(threading.Thread):
    """One question to a database. Nobody has to wait for its end."""

    def __init__(self, way: _Sql) -> None:
        super().__init__(name="inventory", daemon=True)
        self._way = way
        self.began = time.monotonic()
        self.at = time.time()
        self.rows: Rows | None = None
        self.error = ""
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self.rows = self._way.ask()
        except HostError as error:
            self.error = str(error)
        except BaseException as error:  # told where the answer is waited for
            self.error = f"this is a bug: {type(error).__name__}: {error}"
        finally:
            self.ended.set()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _write(path: Path, identity: str, good: Good) -> None:
    """Write a file as a whole, or not at all. Raises OSError."""
    value = {"format": FORMAT, "identity": identity, "digest": good.digest}
    text = json.dumps({**value, "inventory": inventory.to_json(good.inventory)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _remembered(path: Path, identity: str) -> Good | None:
    """The last good answer of this very inventory; None: there is none that can be read."""
    try:
        at = path.stat().st_mtime
        value = json.loads(path.read_bytes())
        if (value["format"], value["identity"]) != (FORMAT, identity):
            return None
        known = inventory.from_json(value["inventory"], None)
        return Good(inventory=known, at=at, digest=str(value["digest"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # it only saves waiting: without it, what needs the inventory waits for it


_mutex: Final = threading.Lock()
_readers: Final[dict[str, tuple[object, Reader]]] = {}
"""State directory → its inventory, and the reader: a daemon and the commands that hand it their
work share one."""


def reader_of(settings: Settings, environment: Mapping[str, str] | None = None) -> Reader:
    """The reader of the config's inventory."""
    sql = settings.inventory_sql
    hosts = tuple((name, one.host) for name, one in settings.vcenters.items()) if sql else ()
    key = (settings.inventory, sql, hosts)
    with _mutex:
        known = _readers.get(settings.state)
        if known and known[0] == key:
            return known[1]
        if known:
            known[1].close()
        reader = Reader(settings, os.environ if environment is None else environment)
        _readers[settings.state] = (key, reader)
        return reader


def forget() -> None:
    """As if the process had just begun."""
    with _mutex:
        for _, reader in _readers.values():
            reader.close()
        _readers.clear()
