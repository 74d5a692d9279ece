"""What keeps a server from being stopped, and an image from being served."""

from __future__ import annotations

from collections.abc import Mapping

from reconciler.core.actual import Image, Server
from reconciler.core.call import Call, ending
from reconciler.core.desired import Export
from reconciler.core.units import Seconds, format_duration, format_size


def in_use(server: Server) -> str | None:
    """Why a client would notice."""
    if not server.clients:
        return None
    many = "s are" if server.clients > 1 else " is"
    return f"{server.clients} client{many} connected to port {server.mark.port}"


def cancelling(vm: str, *, declared: bool) -> str:
    """The command that ends an active run unfinished. `declared`: a watched directory declares the
    VM, so that who watches it pauses the VM with that, or it would be started again at once."""
    command = f"reconciler stop {vm} --cancel-run"
    return (
        f"{command}; under watch that pauses it, so then: reconciler resume {vm}"
        if declared
        else command
    )


def keeps(
    server: Server,
    call: Call | None,
    *,
    protect: bool,
    kill_clients: bool,
    drained: Seconds | None = None,
    declared: bool = False,
) -> tuple[str, str] | None:
    """(cause, why) for which a server is not stopped; None: nothing speaks against it.

    `drained`: how long its clients were already given to leave. `declared`: see `cancelling`.
    """
    vm = server.mark.vm
    if protect:
        return "Protected", (
            "the spec says `protect: true`: to stop it, remove that, apply, and stop it then"
        )
    if call and call.state.active and (call.run, call.attempt) == server.mark.key[2:]:
        return "RunActive", (
            f"its run {call.run} is {call.state}, so the appliance may be writing; "
            f"when it is not: {ending(call)}; to end the run unfinished: "
            f"{cancelling(vm, declared=declared)}"
        )
    busy = in_use(server)
    if busy and not kill_clients:
        cut = f"when they are to be cut off: reconciler stop {vm} --kill-clients"
        if drained is not None:
            return "DrainTimedOut", f"{busy} after {format_duration(drained)} of draining; {cut}"
        return "InUse", (f"{busy}; they are waited for with --drain-timeout, or {cut}")
    return None


def unfit(export: Export, image: Image, *, held: bool) -> tuple[str, str] | None:
    """(cause, why) for which an image cannot be served as `export`; None: it can.

    `held`: the ledger knows it as this very run's. An image that does not exist is fit to be
    created, unless it was to be read or already belongs to the run.
    """
    if image.outside:
        return "ImageOutsideRepository", (
            f"{export.image} leads out of its repository, to {image.outside}: "
            "move the image, or name one inside"
        )
    if image.error:
        return "ImageUnreadable", f"cannot look at {export.image}: {image.error}"
    if not image.exists:
        if export.read_only:
            return "ImageMissing", f"there is no image {export.image} to restore from"
        return None
    if image.format != "qcow2":
        return "WrongFormat", (
            f"{export.image} is {image.format or 'of no known format'}, not qcow2: "
            "move it away, or name another image"
        )
    if export.size is not None and image.size != export.size:
        return "SizeMismatch", (
            f"{export.image} has {format_size(image.size)} ({image.size} bytes), the disk "
            f"{format_size(export.size)} ({export.size} bytes): move it away, or correct the size"
        )
    if image.holder:
        return "ImageLocked", f"{image.holder} holds {export.image} open: it must let go first"
    if export.read_only:
        return None
    if not image.pristine and not held:
        return "ImageNotEmpty", (
            f"{export.image} holds data that is not of this run: move it away, or ask for a new run"
        )
    if image.backing != export.backing:
        return "BackingMismatch", (
            f"{export.image} builds on {image.backing or 'nothing'}, the spec on "
            f"{export.backing or 'nothing'}: move it away, or correct `backing`"
        )
    return None


def broken_chain(top: Image, images: Mapping[str, Image]) -> tuple[str, str] | None:
    """(cause, why) for which what an image builds on cannot be read; None: it can.

    By the headers alone; a link that was not looked at is not judged.
    """
    seen, child = {top.path}, top
    while child.backing:
        link = images.get(child.backing)
        if link is None:
            return None
        builds = f"{child.path} builds on {link.path}"
        wrong = ""
        if link.path in seen:
            wrong = "which builds on it: the chain is a ring"
        elif link.outside:
            wrong = f"which leads out of its repository, to {link.outside}"
        elif link.error:
            wrong = f"which cannot be read: {link.error}"
        elif not link.exists:
            wrong = "which is missing: put it back where it was, or read another run"
        elif link.corrupt:
            wrong = "which qemu has marked as corrupt"
        elif link.format != "qcow2":
            wrong = f"which is {link.format or 'of no known format'}, not qcow2"
        if wrong:
            return "ChainBroken", f"{builds}, {wrong}"
        seen.add(link.path)
        child = link
    return None
