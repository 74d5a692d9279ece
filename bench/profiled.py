"""Run one `reconciler` command line under cProfile and write its top 25 to a file.

    python bench/profiled.py OUT ARGUMENTS…

Times are CPU seconds, imports included. Every thread has a profile of its own and they are added
up, so that what the workers do is seen; what they wait for is not.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import pstats
import sys
import sysconfig
import threading
import time
from pathlib import Path

TOP = 25


def main() -> int:
    out, *arguments = sys.argv[1:]
    profiles = [cProfile.Profile(time.thread_time)]
    run = threading.Thread.run

    def profiled(self: threading.Thread) -> None:
        profile = cProfile.Profile(time.thread_time)
        with contextlib.suppress(ValueError):  # from Python 3.12 on there is one at a time
            profile.enable()
            profiles.append(profile)
        try:
            run(self)
        finally:
            profile.disable()

    threading.Thread.run = profiled  # type: ignore[method-assign]
    profiles[0].enable()
    from reconciler.cli.main import run as command

    code = command(arguments)
    profiles[0].disable()
    said = io.StringIO()
    stats = pstats.Stats(profiles[0], stream=said)
    for profile in profiles[1:]:
        profile.create_stats()
        if profile.stats:
            stats.add(profile)
    stats.sort_stats("cumulative").print_stats(TOP)
    text = said.getvalue()
    for name in ("purelib", "platlib", "stdlib"):
        text = text.replace(sysconfig.get_path(name) + "/", "")
    ours = str(Path(sys.modules["reconciler"].__path__[0]).parent) + "/"
    Path(out).write_text(text.replace(ours, ""))
    return code


if __name__ == "__main__":
    sys.exit(main())
