"""What may come next on a command line: names of commands, options, VMs, runs.

A shell asks at every Tab, so this loads nothing but `re` and, where VMs or runs are meant, SQLite:
no click, no model, no YAML. What commands there are is in `grammar`, which is made from them.
"""

from __future__ import annotations

import contextlib
import os
import re

from reconciler.cli.grammar import COMMANDS
from reconciler.core.places import state_directory
from reconciler.host.places import config_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FILES, FOLDERS, WORDS = "files", "dirs", "words"
"""The first line of an answer: what the shell is to complete by itself, or that words follow."""
MOST = 2_000
"""Names that are offered; a shell asks before it shows as many."""
MAX_SPECS = 1 << 20
"""Bytes of specs that are looked through for names."""
SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(
    rb"""(?m)^ {0,4}(?:- +)?\{? *name: *["']?([A-Za-z0-9][A-Za-z0-9._-]*)["']? *(?=[,}#\r\n]|$)"""
)
"""A VM's name as nearly everybody writes it."""
_STATE = re.compile(r"(?m)^state:[ \t]*[\"']?([\w./-]+)[\"']?[ \t]*(?:#.*)?$")


class Line:
    """A command line as far as it is typed."""

    def __init__(self, words: Sequence[str]) -> None:
        self.path = ""
        """The command, and the one below it."""
        self.values: dict[str, list[str]] = {}
        """Option → its values so far."""
        self.given: list[str] = []
        """The arguments so far."""
        self.open: str | None = None
        """The option whose value comes next."""
        self.plain = False
        """After `--`."""
        for word in words:
            self._take(word)

    def options(self) -> Iterable[tuple[tuple[str, ...], str, str]]:
        """Names, kind of value and help of each option that may stand here."""
        return COMMANDS[self.path][1]

    def kind_of(self, option: str) -> str | None:
        """What an option takes; empty: nothing; None: there is no such option."""
        return next((kind for names, kind, _ in self.options() if option in names), None)

    def _take(self, word: str) -> None:
        if self.open is not None:
            self.values.setdefault(self.open, []).append(word)
            self.open = None
        elif self.plain or not word.startswith("-") or word == "-":
            below = f"{self.path} {word}".strip()
            if below in COMMANDS and not self.given:
                self.path = below
            else:
                self.given.append(word)
        elif word == "--":
            self.plain = True
        elif word.startswith("--") and "=" in word:
            name, _, value = word.partition("=")
            self.values.setdefault(name, []).append(value)
        elif self.kind_of(word):
            self.open = word


def answer(shell: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a shell is told of the last of some words, the one that is being typed."""
    *before, current = words or [""]
    prefix = ""
    if shell == "bash":
        before, current = _joined(before, current)
    current = current.lstrip("\"'")
    line = Line(before)
    if line.open is None and not line.plain and current.startswith("--") and "=" in current:
        line.open, _, value = current.partition("=")
        prefix = f"{line.open}=" if shell == "fish" else ""
        current = value
    if line.open is not None:
        kind = line.kind_of(line.open) or ""
    elif current.startswith("-") and not line.plain:
        return _told(shell, _options(line), current)
    elif COMMANDS[line.path][3]:
        return _told(shell, () if line.given else _below(line.path), current)
    else:
        kind = COMMANDS[line.path][2]
        if line.given and not kind.endswith("*"):
            kind = ""
        kind = kind.removesuffix("*")
    if kind in (FILES, FOLDERS):
        return f"{kind}\n"
    names = [name for name in _names(kind, current, line, environment) if name not in line.given]
    return _told(shell, [(f"{prefix}{name}", "") for name in names], f"{prefix}{current}")


def _joined(before: list[str], current: str) -> tuple[list[str], str]:
    """Bash parts words at `=`: `--output`, `=`, `js` is the value of an option."""
    if current == "=" and before:
        return before, ""
    if before[-1:] == ["="]:
        before = before[:-1]
    return [word for word in before if word != "="], current


def _below(path: str) -> Iterable[tuple[str, str]]:
    return ((name, COMMANDS[f"{path} {name}".strip()][0]) for name in COMMANDS[path][3])


def _options(line: Line) -> Iterable[tuple[str, str]]:
    return ((name, said) for names, _, said in line.options() for name in names)


def _told(shell: str, found: Iterable[tuple[str, str]], current: str) -> str:
    rows = [(word, said) for word, said in found if word.startswith(current)]
    if shell == "bash":  # it shows no descriptions
        rows = [(word, "") for word, _ in rows]
    lines = [f"{word}\t{said}" if said else word for word, said in rows]
    return "".join(f"{line}\n" for line in (WORDS, *lines))


# -- names


def _names(kind: str, current: str, line: Line, environment: Mapping[str, str]) -> Iterable[str]:
    """What may be meant; nothing where it cannot be read, as nobody is there to be told."""
    if "|" in kind:
        return kind.split("|")
    if kind not in ("vm", "run"):
        return ()
    try:
        where = _store(line, environment)
        if kind == "run":
            return _runs(where, line.given, current)
        found = set(_vms(where, current))
    except (OSError, ValueError):
        found = set()
    files = line.values.get("-f", []) + line.values.get("--file", [])
    found |= {name for name in _declared(files or ["specs"]) if name.startswith(current)}
    return sorted(found)[:MOST]


def _store(line: Line, environment: Mapping[str, str]) -> str:
    """The store of the hub that the command line is about."""
    given = line.values.get("--config", [""])[-1]
    path = config_path(os.path.expanduser(given) if given else None, environment)
    written = None
    if path:
        with open(path, encoding="utf-8", errors="replace") as file:
            plain = _STATE.findall(file.read(1 << 20))
        if len(plain) == 1:
            written = os.path.join(os.path.dirname(os.path.abspath(path)), plain[0])
    state = state_directory(written, environment, root=os.geteuid() == 0)
    return os.path.join(state, "state.db")


def _vms(store: str, current: str) -> list[str]:
    inside = "vm >= ? AND vm < ?"
    query = f"SELECT vm FROM applied WHERE {inside} UNION SELECT vm FROM declared WHERE {inside}"  # noqa: S608 ours
    span = (current, current + "\U0010ffff")
    tunnels = f"{query} UNION SELECT tunnel FROM tunnels WHERE tunnel >= ? AND tunnel < ?"  # noqa: S608 ours
    for asked, times in ((tunnels, 3), (query, 2)):
        with contextlib.suppress(ValueError):  # of before there was that table
            return _asked(store, asked, span * times)
    return _asked(store, f"SELECT vm FROM applied WHERE {inside}", span)  # noqa: S608 ours


def _runs(store: str, vms: Sequence[str], current: str) -> list[str]:
    """The runs of some VMs, or of all, newest first."""
    named = f"vm IN ({', '.join('?' * len(vms))}) AND" if vms else ""
    query = (
        f"SELECT run FROM calls WHERE {named} run >= ? AND run < ? "  # noqa: S608 ours
        "GROUP BY run ORDER BY max(created) DESC"
    )
    return _asked(store, query, (*vms, current, current + "\U0010ffff"))


def _asked(store: str, query: str, values: Sequence[str]) -> list[str]:
    """The first column. Raises OSError, ValueError. Writes nothing, as in `store.reading`."""
    size = os.stat(store).st_size
    if not size:
        return []
    import sqlite3

    try:
        alone = not os.stat(f"{store}-wal").st_size
    except FileNotFoundError:
        alone = True
    quoted = os.path.abspath(store).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    mode = "mode=ro&immutable=1" if alone else "mode=ro"
    try:
        db = sqlite3.connect(f"file:{quoted}?{mode}", uri=True, timeout=0.2)
        try:
            return [str(row[0]) for row in db.execute(f"{query} LIMIT {MOST}", values)]
        finally:
            db.close()
    except sqlite3.Error as error:
        raise ValueError(str(error)) from error


def _declared(paths: Sequence[str]) -> set[str]:
    """Names in spec files, as far as a quick look goes."""
    found: set[str] = set()
    left = MAX_SPECS
    for path in _spec_files(paths):
        if left <= 0:
            break
        try:
            with open(path, "rb") as file:
                text = file.read(left)
        except OSError:
            continue
        left -= len(text)
        found |= {name.decode() for name in _NAME.findall(text)}
    return found


def _spec_files(paths: Sequence[str]) -> Iterable[str]:
    for path in map(os.path.expanduser, paths):
        if not os.path.isdir(path):
            if os.path.isfile(path):
                yield path
            continue
        for folder, below, names in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                if name.endswith(SUFFIXES) and not name.startswith("."):
                    yield os.path.join(folder, name)
