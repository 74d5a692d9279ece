"""What an incremental builds on: each disk's parent, and everything below that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actual import Actual, Image
from reconciler.core.call import Call, CallState
from reconciler.core.desired import Export, Vm
from reconciler.core.ledger import VERIFY, Kept, Ledger
from reconciler.core.proofs import damage, needs_digests
from reconciler.core.units import format_size, stamp

PARENTS: Final = frozenset(
    {
        "ParentMissing",
        "ParentUnreadable",
        "ParentOutside",
        "ParentUnfit",
        "ParentDamaged",
        "ParentRemoved",
        "DiskResized",
        "NoChangeId",
        "ChainBroken",
    }
)
"""Causes for which an incremental is refused and a full run gets past it."""


class Unfit(Struct, frozen=True):
    """Why nothing can be built on a parent."""

    cause: str
    why: str
    remedy: str
    """What gets past it. Not for a run that is full by itself instead."""


class Layer(Struct, frozen=True):
    """An image below an incremental's."""

    path: str
    call: Call | None
    """The completed run that has written it; None: the ledger knows of none."""
    export: Export | None

    @property
    def run(self) -> str:
        """`run nightly-3`, for people."""
        return f"run {self.call.run}" if self.call else "no run of this hub"


def layers(ledger: Ledger, vm: str, path: str) -> Sequence[Layer]:
    """An image and what it is built on, the newest first, as the ledger knows it."""
    known = _written(ledger.runs(vm))
    if path not in known:  # a parent that is written into the spec may be of another name's VM
        known |= _written(ledger.calls)
    found: dict[str, Layer] = {}
    below: str | None = path
    while below and below not in found:
        call, export = known.get(below, (None, None))
        found[below] = Layer(below, call, export)
        below = export.backing if export else None
    return tuple(found.values())


def _written(calls: Sequence[Call]) -> dict[str, tuple[Call, Export]]:
    return {
        export.image: (call, export)
        for call in calls
        if call.state is CallState.COMPLETED
        for export in call.exports
    }


def unfit_parent(
    export: Export, ledger: Ledger, actual: Actual, written: Mapping[str, str]
) -> Unfit | None:
    """Why nothing can be built on the parent of an export; None: it can.

    `written`: image → who writes it now.
    """
    assert export.backing is not None
    found = layers(ledger, export.vm, export.backing)
    parent, *below = found
    kept = ledger.shelf.of(one.call.job_id for one in found if one.call)
    if wrong := _looked(export, parent, _image(actual, parent), written):
        return wrong
    if remembered := _remembered(parent, kept):
        its = f"its parent {parent.path} ({parent.run})"
        mended = f"{remembered.remedy}; " if remembered.remedy else ""
        return Unfit(remembered.cause, f"{its} {remembered.why}", f"{mended}{_another(export)}")
    if wrong := _told(export, parent, kept):
        return wrong
    for above, one in zip(found, below, strict=False):
        image = _image(actual, one)
        header = _image(actual, above).backing
        if header is None:
            return None  # it was made one with what it was built on
        why = (
            f"{above.path} is built on {header} by its header, on {one.path} by its record"
            if header != one.path
            else _lost(image)
        )
        remembered = _remembered(one, kept)
        mended = ""
        if not why and remembered:
            why = f"that {remembered.why}"
            mended = f"{remembered.remedy}; " if remembered.remedy else ""
        if why:
            return Unfit(
                "ChainBroken",
                f"its parent {parent.path} ({parent.run}) is built on {one.path} ({one.run}): "
                f"{why}",
                f"{mended}{_another(export)}",
            )
    return None


def _image(actual: Actual, layer: Layer) -> Image:
    return actual.images.get(layer.path) or Image(path=layer.path, exists=False)


def _another(export: Export) -> str:
    """The command that gets past it."""
    return _full(export.vm)


def _full(vm: str) -> str:
    return f"for a full run: reconciler backup {vm} --run NEW --type full"


def without_command(why: str, vm: str) -> str:
    """Why nothing can be built on a parent, where nobody is to type what gets past it."""
    return why.removesuffix(_full(vm)).removesuffix("or ").removesuffix("; ")


def _looked(
    export: Export, parent: Layer, image: Image, written: Mapping[str, str]
) -> Unfit | None:
    """What a look at the parent tells."""
    its, another = f"its parent {parent.path}", _another(export)
    if image.outside:
        why = f"{its} leads out of its repository, to {image.outside}"
        return Unfit("ParentOutside", why, another)
    if not image.exists:
        why = f"{its} ({parent.run}) is missing"
        return Unfit("ParentMissing", why, f"bring it back; or {another}")
    if image.error:
        return Unfit("ParentUnreadable", f"cannot look at {its}: {image.error}", another)
    if image.format != "qcow2":
        return Unfit("ParentUnfit", f"{its} is not qcow2", another)
    if image.corrupt:
        return Unfit("ParentDamaged", f"{its} is marked as corrupt by qemu", another)
    if who := written.get(parent.path):
        why = f"{its} is being written, by {who}"
        return Unfit("ParentWritten", why, "build on a completed run")
    if export.size is not None and image.size != export.size:
        how = "grew" if image.size < export.size else "shrank"
        return Unfit(
            "DiskResized",
            f"the disk {how} from {format_size(image.size)} to {format_size(export.size)} "
            f"({image.size} to {export.size} bytes) since {parent.run}, and an overlay keeps the "
            "size of its parent",
            another,
        )
    return None


def _lost(image: Image) -> str:
    """What a look at an image further below tells; empty: nothing is wrong."""
    if not image.exists:
        return "that is missing"
    if image.error or image.outside:
        return f"that cannot be looked at: {image.error or 'it leads out of its repository'}"
    if image.format != "qcow2":
        return "that is not qcow2"
    return "that is marked as corrupt by qemu" if image.corrupt else ""


def _remembered(layer: Layer, kept: Mapping[str, Kept]) -> Unfit | None:
    """What the ledger remembers against an image, and what mends that."""
    if layer.call is None:
        return None
    known, verify = kept[layer.call.job_id], f"reconciler verify {layer.call.vm}"
    if known.removed:
        return Unfit("ParentRemoved", f"was removed at {stamp(known.removed)}", "")
    proof = known.proofs.get(VERIFY)
    if wrong := damage(proof, [layer.path]):
        deep = " --digests" if needs_digests(proof) else ""
        mended = f"where it was mended: {verify} --run {layer.call.run}{deep}"
        return Unfit("ParentDamaged", f"is damaged ({wrong})", mended)
    return None


def _told(export: Export, parent: Layer, kept: Mapping[str, Kept]) -> Unfit | None:
    """Whether the client can be told what to go on from."""
    report = None
    if parent.call and parent.export and parent.export.key == export.key:
        report = kept[parent.call.job_id].reports.get(parent.export.position)
    if report and report.change_id:
        return None
    why = f"no change id was reported of it with {parent.run}"
    if parent.call is None:
        why = "no completed run of this hub has written it, so no change id of it is known"
    return Unfit(
        "NoChangeId",
        f"its parent {parent.path}: {why}, and without one the client would copy the whole disk",
        _another(export),
    )


def as_full(vm: Vm, why: str) -> Vm:
    """The same run of all disks, full; why it is not what was asked for."""
    exports = tuple(replace(one, backing=None) for one in vm.exports)
    return replace(vm, type="full", fell_back=why, exports=exports)
