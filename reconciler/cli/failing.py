"""How a command that failed says so: for people on stderr, for programs in what they asked for."""

from __future__ import annotations

import os
from typing import Any

from reconciler import __version__
from reconciler.cli import options
from reconciler.cli.findings import findings
from reconciler.cli.terminal import coloured, width_of
from reconciler.core.errors import ConfigError, InputError, ReconcilerError
from reconciler.core.findings import in_order


def told(error: InputError, stream: Any) -> list[str]:
    """What an error holds; of a configuration, no more is shown than what is meant."""
    return findings(
        error.diagnostics,
        error.sources,
        colour=coloured(stream),
        width=width_of(stream),
        private=error.sources.keys() if isinstance(error, ConfigError) else (),
        each=None,
    )


def as_document(error: ReconcilerError) -> None:
    """A document on stdout where one was asked for: a program need not read sentences."""
    if options.Manner.quiet:
        return
    found = in_order(getattr(error, "diagnostics", ()))
    sources = getattr(error, "sources", {})
    if options.Manner.output == "sarif":
        from reconciler.core.sarif import log

        options.print_json(log(found, sources, __version__, os.getcwd()))
    elif options.Manner.output == "json":
        from reconciler.core.plan import FORMAT_VERSION, diagnostics_json

        options.print_json(
            {
                "format_version": FORMAT_VERSION,
                "error": {
                    "exit": int(error.exit),
                    "reason": getattr(error, "reason", type(error).__name__),
                    "message": str(error),
                },
                "diagnostics": diagnostics_json(found, sources),
            }
        )
