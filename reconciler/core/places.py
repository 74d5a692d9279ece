"""Where things are, if nobody says. Light: completing a word may load little more than this."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def state_directory(written: object, environment: Mapping[str, str], *, root: bool) -> str:
    """Where the state lives: config, $RECONCILER_STATE, $STATE_DIRECTORY, or the usual place.

    `written` is the config's `state`, absolute already; the environment goes before it.
    """
    if environment.get("RECONCILER_STATE"):
        return environment["RECONCILER_STATE"]
    if isinstance(written, str) and written:
        return written
    if environment.get("STATE_DIRECTORY"):
        return environment["STATE_DIRECTORY"].split(":")[0]
    if root:
        return "/var/lib/reconciler"
    home = environment.get("XDG_STATE_HOME") or f"{environment.get('HOME', '/tmp')}/.local/state"  # noqa: S108
    return f"{home}/reconciler"
