"""Before and after of an action: the command line and the image of its disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from reconciler.core.actions import (
    Action,
    Adopt,
    Create,
    Dial,
    HangUp,
    Notify,
    Redial,
    Refuse,
    Release,
    Restart,
    Start,
    Stop,
    TakeOver,
)
from reconciler.core.actual import Identity, Image, Server
from reconciler.core.desired import Export
from reconciler.core.mark import argv
from reconciler.core.plan import Plan, exports_of
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.units import Bytes, Port, format_size
from reconciler.core.vm_plan import VmPlan

_VALUED: Final = frozenset(
    {"--shared", "--format", "--export-name", "--description", "--cache", "--aio", "--discard"}
    | {"--detect-zeroes"}
)
"""Options of our command lines that take a value. See mark.argv."""


class Serving(Struct, frozen=True):
    """A server, as it runs or as it will."""

    identity: Identity | None
    """None: it is to be started."""
    port: Port
    argv: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        pid = self.identity.pid if self.identity else None
        return {"pid": pid, "port": self.port, "argv": list(self.argv)}


class File(Struct, frozen=True):
    """An image, as it is or as it will be."""

    path: str
    format: str
    size: Bytes | None
    """None: whatever it holds."""
    backing: str | None = None

    def __str__(self) -> str:
        size = "" if self.size is None else f"{format_size(self.size)} ({self.size} bytes) "
        backing = f", backing {self.backing}" if self.backing else ""
        return f"{self.path}: {size}{self.format or 'of no known format'}{backing}"

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


class Side(Struct, frozen=True):
    """One disk at one moment. None: there is none."""

    server: Serving | None = None
    image: File | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "server": self.server.to_json() if self.server else None,
            "image": self.image.to_json() if self.image else None,
        }


class Sides(Struct, frozen=True):
    """Before and after."""

    before: Side
    after: Side

    def to_json(self) -> dict[str, Any]:
        return {"before": self.before.to_json(), "after": self.after.to_json()}


def sides(action: Action, one: VmPlan, plan: Plan) -> Sides | None:
    """What an action makes of what; None: it is about no disk that is or will be served."""
    match action:
        case Create(export=export):
            image = wanted_image(export)
            return Sides(Side(image=seen_image(plan, export.image)), Side(image=image))
        case Start(export=export, lease=lease):
            after = Side(_to_start(export, lease.port, plan), wanted_image(export))
            return Sides(Side(image=seen_image(plan, export.image)), after)
        case Restart(export=export, lease=lease, server=server):
            before = Side(_running(server) if server else None, seen_image(plan, export.image))
            image = before.image or wanted_image(export)
            return Sides(before, Side(_to_start(export, lease.port, plan), image))
        case Adopt(server=server) | Stop(server=server):
            before = Side(_running(server), seen_image(plan, server.argv[-1]))
            stopped = Side(image=before.image)
            return Sides(before, stopped if isinstance(action, Stop) else before)
        case Refuse(disk=disk) if disk is not None:
            for export in exports_of(one):
                seen, image = seen_image(plan, export.image), wanted_image(export)
                if export.key == disk and seen and not _fits(seen, image):
                    return Sides(Side(image=seen), Side(image=image))
            return None
        case _:
            return None


def described(action: Action, one: VmPlan | TunnelPlan, plan: Plan) -> dict[str, Any]:
    """All of an action that a person approves of: the same as long as it does the same to the same.

    Not in it: why, and what moves with the clock.
    """
    found: dict[str, Any] = {
        "action": action.kind,
        "type": type(action).__name__,
        "disk": action.disk,
        "cause": action.cause,
    }
    both = sides(action, one, plan) if isinstance(one, VmPlan) else None
    if both:
        found |= both.to_json()
    match action:
        case Dial(part=part, argv=line) | Redial(part=part, argv=line):
            found |= {"part": part, "argv": list(line)}
            if isinstance(action, Redial):
                found["server"] = [action.ssh.pid, action.ssh.started] if action.ssh else None
        case HangUp(ssh=ssh) | TakeOver(ssh=ssh):
            found |= {"part": ssh.mark.part, "server": [ssh.pid, ssh.started]}
        case Restart(server=server, taints=taints):
            found |= {"server": _identity(server), "taints": taints}
        case Adopt(server=server) | Stop(server=server):
            found["server"] = _identity(server)
        case Release(lease=lease):
            found["port"] = lease.port
        case Notify(target=target) if isinstance(one, VmPlan):
            found["call"] = {
                "sna": target.sna,
                "run": target.run,
                "type": target.type,
                "request": target.request,
                "exports": [
                    {"name": export.name, "key": export.key, "port": one.ports.get(export.key)}
                    for export in target.exports
                ],
            }
        case _:
            call, event = getattr(action, "call", None), getattr(action, "event", None)
            if call is not None:
                found["call"] = [call.run, call.attempt, str(call.state), str(event or "")]
    return found


def _identity(server: Server | None) -> list[int] | None:
    return [server.identity.pid, server.identity.started] if server else None


def seen_image(plan: Plan, path: str) -> File | None:
    """An image as it was seen; None: it is not there."""
    image = plan.images.get(path)
    return file_of(image) if image and image.exists else None


def file_of(image: Image) -> File:
    return File(image.path, image.format, image.size, image.backing)


def wanted_image(export: Export) -> File:
    return File(export.image, "qcow2", export.size, export.backing)


def _fits(seen: File, wanted: File) -> bool:
    size = wanted.size in (None, seen.size)
    return size and (seen.format, seen.backing) == (wanted.format, wanted.backing)


def _running(server: Server) -> Serving:
    return Serving(server.identity, server.mark.port, server.argv)


def _to_start(export: Export, port: Port, plan: Plan) -> Serving:
    return Serving(None, port, argv(export, port, plan.hub, plan.qemu_nbd))


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, each change with `before` and `after`; null if it is about no disk."""
    found = plan.to_json()
    pairs = [(action, one) for one in plan.vms for action in one.actions]
    for change, (action, one) in zip(found["changes"], pairs, strict=True):
        both = sides(action, one, plan)
        change |= both.to_json() if both else {"before": None, "after": None}
    return found


def lines(both: Sides) -> list[str]:
    """Both sides as lines: `- ` only before, `+ ` only after, two blanks in both.

    Of a command line that is nearly the same, only what differs.
    """
    before, after = both.before, both.after
    image = list(_image_lines(before.image, after.image))
    one = options(before.server.argv) if before.server else []
    two = options(after.server.argv) if after.server else []
    if one == two:
        return [*image, *(f"  {line}" for line in one)]
    import difflib  # only who asks for it pays for it

    whole = not one or not two
    differing = [line for line in difflib.ndiff(one, two) if line[0] in "-+" or whole]
    return [*image, *(line for line in differing if line[0] != "?")]


def _image_lines(before: File | None, after: File | None) -> Iterator[str]:
    if before and after and _fits(before, after):
        yield f"  image {before}"
        return
    path = (before or after or File("", "", None)).path
    if before or after:
        yield f"- image {before or f'{path}: absent'}"
    if after:
        yield f"+ image {after}"


def options(line: Sequence[str]) -> list[str]:
    """A command line as a line for each option, with its value."""
    found: list[str] = []
    words = list(line)
    while words:
        word = words.pop(0)
        if word in _VALUED and words:
            word = f"{word} {shlex.quote(words.pop(0))}"
        elif found and not word.startswith("--"):
            word = shlex.quote(word)
        found.append(word)
    return found
