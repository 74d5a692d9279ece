"""The command line in a world where a disk fills up in the middle of things.

`python -m tests.e2e.filling DIRECTORY EFFECT SIDE ARGUMENT…` runs `reconciler ARGUMENT…`, and takes
all space of DIRECTORY's file system before or after the first effect of that name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reconciler.cli.main import main
from reconciler.host import effects
from tests.mounts import fill


def filler(where: Path, effect: str, side: str) -> effects.Hook:
    def hook(what: effects.Effect, when: effects.Side) -> None:
        if (what.name, when.name) == (effect, side):
            fill(where)

    return hook


if __name__ == "__main__":
    directory, effect, side, *arguments = sys.argv[1:]
    effects.hook = filler(Path(directory), effect, side)
    sys.argv = ["reconciler", *arguments]
    main()
