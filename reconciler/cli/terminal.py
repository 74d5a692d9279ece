"""What a terminal can show: colours, columns, and no character that would break it."""

from __future__ import annotations

import os
from typing import Any, Final

import click

WIDTH: Final = 120
"""Columns where nobody looks at a terminal."""
TAB: Final = 4
"""Columns of a tab in a line that is shown; where it would stop is not known behind a gutter."""
_UNSEEN: Final = frozenset("Cc Cf Cs Co Cn Zl Zp".split())
"""Categories of characters that show nothing and may do something: control characters, those that
turn the direction of a line, halves of characters. Source: Unicode, general categories."""
_JOINERS: Final = frozenset("\u200d\ufe0f\ufe0e")
"""Of these, those without which a flag or a letter looks another way; they do nothing else."""


def coloured(stream: Any) -> bool:
    """Whether colours can be seen and are wanted. Source: https://no-color.org."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(stream.isatty())


def paint(text: str, colour: str | None, on: bool, *, bold: bool = False) -> str:
    return click.style(text, fg=colour, bold=bold) if on and (colour or bold) else text


def width_of(stream: Any) -> int:
    """Columns of the terminal under a stream; the usual number where there is none."""
    if not stream.isatty():
        return WIDTH
    import shutil  # which loads compression, of all things; only a terminal needs it

    return max(20, shutil.get_terminal_size((WIDTH, 24)).columns)


def limit(stream: Any) -> int | None:
    """Columns that a table may take; None: nobody looks at a terminal, so as many as it needs."""
    return width_of(stream) if stream.isatty() else None


def safe(text: str) -> str:
    r"""A text in which every character that would do something to a terminal is written out, as
    `\x1b` or `\u202e`."""
    return text if text.isprintable() else "".join(map(_seen, text))


def _seen(char: str) -> str:
    import unicodedata  # few texts need it

    if char in _JOINERS or unicodedata.category(char) not in _UNSEEN:
        return char
    number = ord(char)
    if char in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[char]
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def source(char: str) -> str:
    """A character of a line that is quoted. A tab shows, as it is not what it looks like."""
    return "→".ljust(TAB) if char == "\t" else safe(char)


def cells(text: str) -> int:
    """Columns that a text takes: a wide character takes two, a combining one none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # its tables are loaded where they are needed

    return cell_len(text)


def padded(text: str, width: int) -> str:
    return text + " " * max(0, width - cells(text))
