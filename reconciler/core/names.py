"""Which VM a name means: its context, or its name in vCenter where only one VM has that.

Who only looks may say either. Who changes something says the context, and is helped to it: a name
in vCenter may be another VM's tomorrow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from reconciler.core.errors import UsageError, nearest
from reconciler.core.tunnel import PREFIX


def meant(name: str, contexts: Collection[str], shown: Mapping[str, str]) -> list[str]:
    """The VM contexts that a name may mean: the context itself, else all that are called so in
    vCenter. `shown`: context → name in vCenter."""
    if name in contexts:
        return [name]
    return sorted(vm for vm, display in shown.items() if name and display == name)


def resolved(name: str, contexts: Collection[str], shown: Mapping[str, str]) -> str:
    """The one context that a name means; itself, where it means none. Raises UsageError."""
    found = meant(name, contexts, shown)
    if len(found) > 1:
        raise UsageError(f"{name!r} may be any of {', '.join(found)}; name the VM context")
    return found[0] if found else name


def hint(name: str, contexts: Collection[str], shown: Mapping[str, str]) -> str:
    """What to say behind a name that no context has; empty: nothing is like it."""
    if PREFIX + name in contexts:
        return f"; did you mean {PREFIX + name!r}?"
    found = meant(name, (), shown)
    if len(found) > 1:
        return f"; {', '.join(found)} are called so in vCenter: name the VM context"
    if found:
        return f"; did you mean {found[0]!r} ({name})?"
    return nearest(name, [one for one in contexts if one != name])
