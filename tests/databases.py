"""Real database servers for tests: each in a directory of its own, ended by pid.

Root cannot run them, so root runs them as another user. What keeps data over a crash is off: these
live for one run of the tests.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tests.ports import Dealer

PASSWORD: Final = "s3cret/of the?databäse"
USER: Final = "hub"
DATABASE: Final = "migratekit_oma"

CONTEXTS: Final = """CREATE TABLE vm_replication_contexts (
  context_id VARCHAR(64) PRIMARY KEY, vm_name VARCHAR(255) NOT NULL, vmware_vm_id VARCHAR(255),
  vm_path VARCHAR(500), vcenter_host VARCHAR(255), credential_id INT)"""
DISKS: Final = """CREATE TABLE vm_disks (
  id INT PRIMARY KEY, vm_context_id VARCHAR(64), disk_id VARCHAR(64), size_gb INT,
  capacity_bytes BIGINT, unit_number INT, label VARCHAR(64), datastore VARCHAR(64),
  disk_change_id VARCHAR(255))"""
"""The field's tables, as far as they are known. Source: WIRE.md."""


_ids: Final = itertools.count(1)


class Tables:
    """The field's tables in some database, by any connection of DB-API 2.0."""

    def __init__(self, connection: Any, marker: str = "%s") -> None:
        self.own, self.marker = connection, marker

    def execute(self, statement: str, *values: object) -> None:
        cursor = self.own.cursor()
        cursor.execute(statement.replace("?", self.marker), values)
        cursor.close()

    def create(self) -> None:
        """Both tables, empty."""
        for name in ("vm_disks", "vm_replication_contexts"):
            self.execute(f"DROP TABLE IF EXISTS {name}")
        self.execute(CONTEXTS)
        self.execute(DISKS)

    def vm(
        self,
        name: str,
        sizes: Sequence[int | None] = (),
        *,
        display: str = "",
        host: str | None = "vc.example",
        keys: Sequence[str] = (),
    ) -> None:
        """A VM with disks disk-2000, disk-2001 …, or of other keys; all of it at one moment."""
        self.execute("BEGIN")  # or a daemon may read it while a disk is missing, and back that up
        self.execute(
            "INSERT INTO vm_replication_contexts VALUES (?, ?, ?, ?, ?, 1)",
            name, display or name, f"vm-{name}", f"/DC/vm/{display or name}", host,
        )  # fmt: skip
        for index, size in enumerate(sizes):
            self.disk(name, keys[index] if keys else f"disk-{2000 + index}", size)
        self.execute("COMMIT")

    def disk(self, vm: str, key: str | None, size: int | None) -> None:
        gigabytes = -(-(size or 0) // (1 << 30))
        self.execute(
            "INSERT INTO vm_disks VALUES (?, ?, ?, ?, ?, 0, 'Hard disk', 'ds1', NULL)",
            next(_ids), vm, key, gigabytes, size,
        )  # fmt: skip


class Server:
    """A server of one kind. `url`: that of the database with the tables, without a password."""

    kind = ""
    process: subprocess.Popen[bytes] | None = None

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.install()
        self.start()
        self.prepare()

    @property
    def url(self) -> str:
        return f"{self.kind}://{USER}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def by_socket(self) -> str:
        raise NotImplementedError

    def install(self) -> None:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def connect(self, database: str = DATABASE) -> Any:
        """As the administrator."""
        raise NotImplementedError

    def prepare(self) -> None:
        """The user and the database."""
        raise NotImplementedError

    def run(self, *argv: str) -> None:
        done = subprocess.run(
            [*_as_another(), *argv], cwd=self.folder, env=_environment(self.folder),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_as_another(), *self.command()], cwd=self.folder,
                env=_environment(self.folder), stdout=log, stderr=log,
            )  # fmt: skip
        last = time.monotonic() + 60
        while True:
            try:
                # First by a socket of ours: one that PyMySQL cannot connect it leaves open.
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                self.connect(self.first).close()
            except Exception as error:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < last, f"never ready: {error}"
                time.sleep(0.05)
            else:
                return

    first = ""

    def stop(self) -> None:
        """End it. It can be started again."""
        if self.process:
            self.process.send_signal(
                signal.SIGQUIT if self.kind == "postgresql" else signal.SIGKILL
            )
            self.process.wait(30)
            self.process = None

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """It accepts connections and answers none: every process of it stands still."""
        assert self.process
        pids = [self.process.pid, *_children(self.process.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def tables(self) -> Tables:
        """The field's tables, anew; they are the user's own, who may therefore write them."""
        if self.process is None:
            self.start()
        found = Tables(self.as_user())
        found.create()
        return found

    def as_user(self) -> Any:
        """A connection of the user."""
        raise NotImplementedError


class MariaDb(Server):
    kind = "mysql"

    OPTIONS = (
        "--no-defaults",
        "--innodb-buffer-pool-size=8M",
        "--innodb-log-file-size=4M",
        "--innodb-doublewrite=0",
        "--innodb-flush-method=nosync",
        "--innodb-flush-log-at-trx-commit=2",  # what the kernel has outlives the server
        "--skip-name-resolve",
    )

    @property
    def by_socket(self) -> str:
        return f"mysql://{USER}@localhost/{DATABASE}?unix_socket={self.folder / 's'}"

    def install(self) -> None:
        options = ("--auth-root-authentication-method=normal", "--skip-test-db")
        self.run("mariadb-install-db", *self.OPTIONS, f"--datadir={self.folder / 'data'}", *options)

    def command(self) -> list[str]:
        return [
            _found("mariadbd"),
            *self.OPTIONS,
            f"--datadir={self.folder / 'data'}",
            f"--socket={self.folder / 's'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-log-bin",
            "--performance-schema=off",
        ]

    def connect(self, database: str = DATABASE) -> Any:
        import pymysql

        return pymysql.connect(
            unix_socket=str(self.folder / "s"), user="root", database=database or None,
            autocommit=True,
        )  # fmt: skip

    def as_user(self) -> Any:
        import pymysql

        return pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD.encode(),
            database=DATABASE,
            autocommit=True,
        )

    def prepare(self) -> None:
        with self.connect("") as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {DATABASE}")
            cursor.execute(f"CREATE USER {USER} IDENTIFIED BY %s", (PASSWORD,))
            cursor.execute(f"GRANT ALL ON {DATABASE}.* TO {USER}")


class Postgres(Server):
    kind = "postgresql"
    first = "postgres"

    @property
    def by_socket(self) -> str:
        return (
            f"postgresql://{USER}@:{self.port}/{DATABASE}?host={quote(str(self.folder), safe='')}"
        )

    def install(self) -> None:
        self.run(
            _found("initdb"), "-D", str(self.folder / "data"), "-U", "admin", "--auth-local=trust",
            "--auth-host=scram-sha-256", "--no-sync", "--no-instructions", "--locale=C",
            "--encoding=UTF8",
        )  # fmt: skip

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "shared_buffers": "8MB",
            "max_connections": "20",
            "autovacuum": "off",
        }
        words = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        return [_found("postgres"), "-D", str(self.folder / "data"), *words]

    def connect(self, database: str = DATABASE) -> Any:
        import psycopg

        return psycopg.connect(
            host=str(self.folder), port=self.port, user="admin", dbname=database, autocommit=True
        )

    def as_user(self) -> Any:
        import psycopg

        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=DATABASE,
            autocommit=True,
        )

    def prepare(self) -> None:
        from psycopg import sql

        with self.connect("postgres") as connection:
            connection.execute(
                sql.SQL("CREATE USER {} PASSWORD {}").format(sql.Identifier(USER), PASSWORD)
            )
            connection.execute(f"CREATE DATABASE {DATABASE} OWNER {USER}".encode())


def _found(program: str) -> str:
    """The path of a server's program; PostgreSQL's are not on the PATH of Debian."""
    places = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0),
    )
    path = os.pathsep.join([*map(str, reversed(places)), os.environ["PATH"], "/usr/sbin"])
    found = shutil.which(program, path=path)
    assert found, f"{program} is missing: make system-tests"
    return found


def _environment(folder: Path) -> dict[str, str]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    # Its own TMPDIR: when a MariaDB starts, it removes the temporary tables of all in theirs.
    return {"PATH": path, "HOME": str(folder), "TMPDIR": str(folder), "LC_ALL": "C"}


def _as_another() -> list[str]:
    """What goes before a command that root must not run."""
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    return ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def running(kind: type[Server], dealer: Dealer) -> Iterator[Server]:
    """A server that is gone with the block, and all that it wrote."""
    # A socket's path has at most 107 characters, so that it cannot be where the test's files are.
    folder = Path(tempfile.mkdtemp(prefix="reconciler-db-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        server = kind(folder, dealer.deal(1)[0])
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
