"""Which configuration is used. Light: completing a word may load little more than this."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def config_path(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The first configuration that is named or exists; None: the built-in defaults."""
    for named in (given, environment.get("RECONCILER_CONFIG")):
        if named:
            return named
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(
        environment.get("HOME", "/"), ".config"
    )
    for usual in (
        "reconciler.yaml",
        os.path.join(home, "reconciler", "config.yaml"),
        "/etc/reconciler/config.yaml",
    ):
        if os.path.exists(usual):
            return usual
    return None
