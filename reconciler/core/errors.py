"""What can go wrong, by what helps: an edit, another pass, or a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import ClassVar, Final

from msgspec import Struct

MAX_TYPO: Final = 200
"""Characters of a word that may be a near miss. Looking for one takes long where both are long."""


class Exit(IntEnum):
    """Exit codes of the command line. 64, 65 and 78 are those of sysexits.h."""

    OK = 0
    ERROR = 1
    CHANGES = 2
    PARTIAL = 3
    HELD = 4
    STALE_PLAN = 5
    LOCKED = 6
    UNKNOWN = 7
    USAGE = 64
    INVALID = 65
    CONFIG = 78
    TIMED_OUT = 124
    INTERRUPTED = 130
    TERMINATED = 143


class Place(Struct, frozen=True, order=True):
    """Where in a file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Diagnostic(Struct, frozen=True):
    """One thing that is wrong with what somebody wrote, or that they should know."""

    severity: str  # "error" | "warning"
    summary: str
    place: Place | None = None
    vm: str = ""
    """Which VM it is about, where that is known."""
    help: str = ""
    """What to write or type, where the summary does not say it itself."""
    rule: str = ""
    """What kind of finding it is; empty: `findings.rule_of` tells by the summary."""

    def __str__(self) -> str:
        """One line, for logs and events; `cli.findings` has the view for people."""
        where = f"{self.place}: " if self.place else ""
        return f"{where}{self.severity}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """The summary, and what helps."""
        return f"{self.summary}; {self.help}" if self.help else self.summary


class ReconcilerError(Exception):
    """An error that a person sees as one sentence, not as a traceback."""

    exit: ClassVar[Exit] = Exit.ERROR


class InputError(ReconcilerError):
    """What was written cannot be used until somebody edits it; holds every finding."""

    exit: ClassVar[Exit] = Exit.INVALID

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__("\n".join(map(str, diagnostics)))
        self.diagnostics = tuple(diagnostics)
        self.sources: dict[str, str] = {}
        """File → its text, as far as it is at hand, to show the lines that are meant."""


class ConfigError(InputError):
    """The same, of the configuration."""

    exit: ClassVar[Exit] = Exit.CONFIG


class HostError(ReconcilerError):
    """Something outside refused or failed; another pass may succeed.

    `reason` is the CamelCase word that status shows.
    """

    def __init__(self, message: str, reason: str = "HostError") -> None:
        super().__init__(message)
        self.reason = reason


class UsageError(ReconcilerError):
    """What was typed names something that is not there."""

    exit: ClassVar[Exit] = Exit.USAGE


class LockError(ReconcilerError):
    """Somebody else is changing this hub and did not finish in time."""

    exit: ClassVar[Exit] = Exit.LOCKED


def described(value: object) -> str:
    """`text 'abc'`, `the number 3`, `a list`: what was found, for people."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value[:40]!r}"
        case list() | tuple():
            return "a list"
        case dict():
            return "keys and values"
        case _:
            return type(value).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'image'?` for a near miss, else nothing."""
    if len(word) > MAX_TYPO:
        return ""
    import difflib  # only when something is already wrong: start-up does not pay for it

    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def shortened(text: str, most: int = 600) -> str:
    """`text`, without its middle where it is longer than that many characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
