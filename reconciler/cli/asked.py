"""What status and explain say of runs that are asked for and not begun. Light, as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
from msgspec import Struct

from reconciler.cli import options
from reconciler.core.asked import Request, read, unbegun
from reconciler.core.ledger import Ledger
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import stamp
from reconciler.host import files


class Waiting(Struct, frozen=True):
    """What is asked for, and not begun."""

    requests: Sequence[Request] = ()
    unread: Sequence[str] = ()
    """Files that cannot be read."""

    @classmethod
    def below(cls, folder: Path, ledger: Ledger | None) -> Waiting:
        """What is asked for in a directory of requests."""
        found: list[Request] = []
        unread: list[str] = []
        for path, seen in files.listing(str(folder)).files.items():
            text = files.read(path, pipe=False)
            requests = None if text.error else read(text.text, path, seen[3] / 1e9)
            if requests is None:
                unread.append(path)
            found += requests or ()
        return cls(unbegun(found, ledger), unread)

    @property
    def vms(self) -> set[str]:
        return {one.vm for one in self.requests}

    def of(self, vms: Collection[str]) -> Waiting:
        """The same of some VMs."""
        return Waiting([one for one in self.requests if one.vm in vms])

    def lines(self, holder: str) -> list[str]:
        """For people; the last says what comes next. `holder`: who is changing the hub."""
        said = [one.sentence for one in self.requests]
        said += [f"cannot read {file}: see reconciler backup --list" for file in self.unread]
        return said + [f"next: {self.following(holder)}"] * bool(self.requests)

    def following(self, holder: str) -> str:
        """Who begins it."""
        if "(reconciler watch" in holder:
            return "reconciler watch, which runs, begins it; if it does not: reconciler validate"
        return "reconciler apply, or reconciler watch, which begins it by itself"

    def to_json(self) -> list[dict[str, Any]]:
        return [one.to_json() for one in self.requests]

    def explain(self, hub: str | None, holder: str, output: str) -> None:
        """A VM of which nothing was ever applied."""
        if output == "text":
            click.echo("\n".join(self.lines(holder)))
            return
        options.print_json(
            {
                "format_version": FORMAT_VERSION,
                "hub": hub,
                "vm": None,
                "since": stamp(self.requests[0].at),
                "asked": self.to_json(),
                "actions": [],
                "retry_at": None,
                "changed_by": holder or None,
                "events": [],
                "next": self.following(holder),
            }
        )
