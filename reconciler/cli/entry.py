"""The console script: completing a word is answered before anything is loaded for it."""

from __future__ import annotations

import os
import sys

ASKED = "_RECONCILER_COMPLETE"
"""Set by the scripts of `reconciler completion`, to the name of the shell."""


def main() -> None:
    if shell := os.environ.get(ASKED):
        from reconciler.cli.completing import answer

        sys.stdout.write(answer(shell, sys.argv[1:], os.environ))
        sys.stdout.flush()
        os._exit(0)  # nothing is to be taken apart
    from reconciler.cli.main import main as command

    command()
