"""Ask a database one question, read-only: MariaDB or MySQL, PostgreSQL, SQLite.

A driver is imported when its kind of database is asked. The connection is kept for the next
question. Each wait for the server has a deadline, here and, where it can have one, in the server
too; that all of them together have one is for who asks to see to.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct

from reconciler.core.errors import HostError, shortened
from reconciler.core.settings import Secret
from reconciler.core.units import Seconds

UNREADABLE: Final = "InventoryUnreadable"
MOST_ROWS: Final = 1_000_000
"""More is no inventory: it is the wrong query. 100 VMs have some 300."""


class Rows(Struct, frozen=True):
    """An answer."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class Cursor(Protocol):
    """As DB-API 2.0 has it. Source: PEP 249."""

    @property
    def description(self) -> Sequence[Sequence[Any]] | None: ...
    def fetchmany(self, size: int, /) -> Sequence[Sequence[Any]]: ...


class Connection(Protocol):
    def ask(self, query: str) -> Cursor:
        """Ask within a read-only transaction."""
        ...

    def end(self) -> None:
        """End the transaction."""
        ...

    def fileno(self) -> int:
        """Of its socket; -1: it has none."""
        ...

    def close(self) -> None: ...


class Database:
    """One database. Used by one thread at a time."""

    def __init__(self, url: str, timeout: Seconds) -> None:
        """`url`: see SqlInventory. `timeout`: of each wait."""
        self.url, self.timeout = url, timeout
        self._kept: Connection | None = None
        self._asking: Connection | None = None
        """Over which a question is out."""
        self._mutex = threading.Lock()
        """Held while `_asking` is closed or cut, so that its descriptor is nobody else's then."""

    def ask(self, query: str, password: Callable[[], Secret | None]) -> Rows:
        """The answer to a query. `password` is asked for where a connection is made.

        Raises HostError; no message holds the password.
        """
        kept, self._kept = self._kept, None
        if kept:
            began = time.monotonic()
            try:
                return self._asked(kept, query)
            except Exception as error:
                # The server may have ended it since: then the question goes over a new one.
                if time.monotonic() - began > self.timeout / 2:
                    raise HostError(f"cannot ask it: {_said(error, '')}", UNREADABLE) from None
        secret = password()
        text = secret.reveal() if secret else ""
        try:
            fresh = _CONNECT[urlsplit(self.url).scheme](self.url, text, self.timeout)
        except Exception as error:  # each driver has its own
            raise HostError(f"cannot connect: {_said(error, text)}", UNREADABLE) from None
        try:
            return self._asked(fresh, query)
        except HostError:
            raise
        except Exception as error:
            raise HostError(f"cannot ask it: {_said(error, text)}", UNREADABLE) from None

    def _asked(self, connection: Connection, query: str) -> Rows:
        """The connection is kept afterwards, or closed where anything is wrong."""
        self._asking = connection
        try:
            cursor = connection.ask(query)
            if cursor.description is None:
                raise HostError("cannot use its answer: it has no rows; write a SELECT", UNREADABLE)
            columns = tuple(str(column[0]) for column in cursor.description)
            rows = cursor.fetchmany(MOST_ROWS + 1)
            if len(rows) > MOST_ROWS:
                raise HostError(
                    f"cannot use its answer: it has more than {MOST_ROWS:,} rows", UNREADABLE
                )
            connection.end()
            self._kept = connection
            return Rows(columns, rows)
        finally:
            with self._mutex:
                self._asking = None
                if self._kept is not connection:
                    _close(connection)

    def cut(self) -> None:
        """From another thread: have a question that is out fail, whatever the server does."""
        with self._mutex, contextlib.suppress(Exception):
            fd = self._asking.fileno() if self._asking else -1
            if fd >= 0:
                with socket.socket(fileno=os.dup(fd)) as same:
                    same.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection that is kept."""
        kept, self._kept = self._kept, None
        if kept:
            _close(kept)


def _close(connection: Connection) -> None:
    with contextlib.suppress(Exception):
        connection.close()


def _said(error: Exception, password: str) -> str:
    """What a driver says, in one line and without the password."""
    number, *words = error.args or ("",)
    said = f"{words[0]} ({number})" if words and isinstance(number, int) else str(error)
    # Without the line and the arrow that PostgreSQL adds.
    said = getattr(getattr(error, "diag", None), "message_primary", None) or said
    if password:
        said = said.replace(password, "…")
    return shortened(" ".join(said.split())) or type(error).__name__


class _Parts(Struct, frozen=True):
    """A URL, decoded."""

    user: str | None
    host: str | None
    port: int | None
    name: str
    options: dict[str, Any]


def _parts(url: str) -> _Parts:
    parts = urlsplit(url)
    return _Parts(
        user=unquote(parts.username) if parts.username else None,
        host=unquote(parts.hostname) if parts.hostname else None,
        port=parts.port,
        name=unquote(parts.path.removeprefix("/")),
        options=dict(parse_qsl(parts.query)),
    )


class _MySql:
    """MariaDB or MySQL, by PyMySQL."""

    def __init__(self, url: str, password: str, timeout: Seconds) -> None:
        import pymysql

        parts = _parts(url)
        tls = {key: value for key, value in parts.options.items() if key.startswith("ssl_")}
        if "ssl_verify_identity" in tls:
            tls["ssl_verify_identity"] = tls["ssl_verify_identity"] not in ("0", "false", "no")
        self._own: Any = pymysql.connect(
            host=parts.host,
            port=parts.port or 3306,
            user=parts.user,
            password=password.encode(),  # PyMySQL takes a text for latin-1, servers for UTF-8
            database=parts.name,
            unix_socket=parts.options.get("unix_socket"),
            charset=parts.options.get("charset", "utf8mb4"),
            connect_timeout=timeout,
            read_timeout=timeout,
            write_timeout=timeout,
            autocommit=True,
            **tls,
        )
        try:
            with self._own.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION READ ONLY")
                self._limit(cursor, timeout)
        except BaseException:
            self._own.close()
            raise

    @staticmethod
    def _limit(cursor: Any, timeout: Seconds) -> None:
        """Have the server end a query that takes longer: MariaDB in seconds, MySQL in ms."""
        import pymysql

        for setting in (f"max_statement_time = {timeout:.3f}",
                        f"max_execution_time = {math.ceil(timeout * 1000)}"):  # fmt: skip
            with contextlib.suppress(pymysql.err.OperationalError):  # it has no such variable
                cursor.execute(f"SET SESSION {setting}")
                return

    def ask(self, query: str) -> Cursor:
        cursor = self._own.cursor()
        cursor.execute("START TRANSACTION READ ONLY")
        cursor.execute(query)
        found: Cursor = cursor
        return found

    def end(self) -> None:
        self._own.rollback()

    def fileno(self) -> int:
        return -1  # each of its waits has a deadline

    def close(self) -> None:
        # Not by its own close(), which tells the server first and may wait for it.
        self._own._force_close()


class _PostgreSql:
    """PostgreSQL, by psycopg."""

    def __init__(self, url: str, password: str, timeout: Seconds) -> None:
        import psycopg

        parts = _parts(url)
        milliseconds = math.ceil(timeout * 1000)
        self._own = psycopg.connect(
            host=parts.host or parts.options.pop("host", None),
            port=parts.port,
            user=parts.user,
            password=password or None,
            dbname=parts.name,
            connect_timeout=max(2, math.ceil(timeout)),  # libpq takes less for 2
            options=f"-c default_transaction_read_only=on -c statement_timeout={milliseconds}",
            tcp_user_timeout=milliseconds,
            keepalives_idle=30,
            application_name="reconciler",
            **parts.options,
        )
        self._own.read_only = True

    def ask(self, query: str) -> Cursor:
        # Prepared: the server takes a single statement then, so none can leave the transaction.
        return self._own.execute(query.encode(), prepare=True)

    def end(self) -> None:
        self._own.rollback()

    def fileno(self) -> int:
        return self._own.fileno()

    def close(self) -> None:
        self._own.close()


class _Sqlite:
    """A file of SQLite."""

    def __init__(self, url: str, _password: str, timeout: Seconds) -> None:
        import sqlite3
        from urllib.parse import quote

        path = unquote(urlsplit(url).path)
        if not os.path.exists(path):  # SQLite says no more than "unable to open database file"
            raise FileNotFoundError(f"there is no file {path}")
        self._own = sqlite3.connect(
            f"file:{quote(path)}?mode=ro",
            uri=True,
            timeout=timeout,
            check_same_thread=False,
            isolation_level=None,
        )
        self._last = 0.0
        self._timeout = timeout
        self._own.set_progress_handler(self._late, 10_000)
        allowed = {
            sqlite3.SQLITE_SELECT,
            sqlite3.SQLITE_READ,
            sqlite3.SQLITE_FUNCTION,
            sqlite3.SQLITE_RECURSIVE,
            sqlite3.SQLITE_TRANSACTION,
        }
        # `mode=ro` is of this file alone: ATTACH and VACUUM INTO would make others.
        self._own.set_authorizer(
            lambda what, *_: sqlite3.SQLITE_OK if what in allowed else sqlite3.SQLITE_DENY
        )

    def _late(self) -> bool:
        """Ends the query, if it takes too long."""
        return time.monotonic() > self._last

    def ask(self, query: str) -> Cursor:
        self._last = time.monotonic() + self._timeout
        self._own.execute("BEGIN")
        return self._own.execute(query)

    def end(self) -> None:
        self._own.rollback()

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self._own.close()


_CONNECT: Final[dict[str, Callable[[str, str, Seconds], Connection]]] = {
    "mysql": _MySql,
    "postgresql": _PostgreSql,
    "sqlite": _Sqlite,
}
"""Scheme of the URL → what connects."""
