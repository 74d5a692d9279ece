"""What is shown again and again: redrawn on a terminal, else told anew where it changed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable

from reconciler.core.units import Seconds, stamp

NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
"""A line that is too long is cut. Source: xterm, Control Sequences, DECAWM."""
HOME, END_OF_LINE, BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


class Page(io.StringIO):
    """What is written, for a stream that may be a terminal."""

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def redraw(show: Callable[[], None], every: Seconds) -> None:
    """Show what `show` prints, again whenever that is something else, until somebody ends us."""
    out, before = sys.stdout, None
    screen = out.isatty() and os.environ.get("TERM") != "dumb"
    try:
        if screen:
            out.write(NO_WRAP)
        while True:
            page = Page()
            with contextlib.redirect_stdout(page):
                show()
            text = page.getvalue()
            if text != before:
                rows = shutil.get_terminal_size().lines
                out.write(drawn(text, rows) if screen else text)
                out.flush()
                before = text
            time.sleep(every)
    finally:
        if screen:
            out.write(WRAP)
            out.flush()


def drawn(text: str, rows: int) -> str:
    """A text over the one that is on the screen, as much of it as fits."""
    lines = [f"{stamp(time.time())}   Ctrl-C ends this", "", *text.splitlines()]
    if len(lines) >= rows:
        rest = len(lines) - rows + 2
        lines = [*lines[: rows - 2], f"… {rest} more lines"]
    return HOME + "".join(f"{line}{END_OF_LINE}\n" for line in lines) + BELOW
