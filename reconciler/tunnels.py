"""The tunnels that specs declare, for commands that are about no VM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, field

from reconciler.core.errors import Diagnostic, InputError, UsageError, nearest
from reconciler.core.settings import Settings
from reconciler.core.tunnel import PREFIX, Tunnel
from reconciler.host.files import NothingNamed
from reconciler.loop import load_source


class DeclaredTunnels(Struct, frozen=True):
    """What some specs say of tunnels."""

    tunnels: Mapping[str, Tunnel] = field(default_factory=dict)
    """Name → the tunnel, of those that can be used."""
    diagnostics: Sequence[Diagnostic] = ()
    """What is wrong with others."""
    lines: Mapping[str, str] = field(default_factory=dict)
    """File → its text."""


def declared(paths: Sequence[str], settings: Settings) -> DeclaredTunnels:
    """What specs say of tunnels.

    No paths: the specs are where they usually are, if they are. Raises HostError.
    """
    from reconciler.core.tunnel_spec import build

    try:
        source = load_source(paths, settings)
    except NothingNamed:
        if paths:
            raise
        return DeclaredTunnels()
    specs = source.specs
    found, wrong = build(specs.tunnels, settings)
    of_tunnels = [one for one in specs.diagnostics if not one.vm or one.vm.startswith(PREFIX)]
    tunnels = {one.name: one for one in found.values()}
    return DeclaredTunnels(tunnels, (*of_tunnels, *wrong), source.lines)


def named(name: str, paths: Sequence[str], settings: Settings) -> Tunnel:
    """The tunnel of that name. Raises InputError: its declaration is wrong; UsageError: there is
    none; HostError."""
    plain = name.removeprefix(PREFIX)
    said = declared(paths, settings)
    found = said.tunnels
    if plain in found:
        return found[plain]
    about = [
        one
        for one in said.diagnostics
        if one.severity == "error" and one.vm in ("", PREFIX + plain)
    ]
    if about:
        error = InputError(about)
        error.sources.update(said.lines)
        raise error
    known = f"; declared are {', '.join(sorted(found))}" if found else "; none is declared"
    raise UsageError(f"there is no tunnel {plain!r}{nearest(plain, found)}{known}")
