"""Looks at every image that a backup needs. Reads only: images of published runs do not change.

So it takes no lock, holds nobody up, and works beside a daemon; what was found is then written down
by who holds the lock, with an order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.call import Call
from reconciler.core.chains import Backup, Chain, Disk, newest_completed, of_run, path_to
from reconciler.core.errors import HostError, UsageError, nearest
from reconciler.core.ledger import VERIFY, Proof
from reconciler.core.proofs import Finding, findings, merged, proof_of
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds, format_size, stamp
from reconciler.host import images, patience
from reconciler.repositories import roots_of


class Verified(Struct, frozen=True, kw_only=True):
    """What was found of one backup's own images."""

    backup: Backup
    disks: tuple[Finding, ...]
    """By this look alone."""

    def proof(self, at: Seconds, who: str) -> Proof:
        """The same, to be written down."""
        return proof_of(self.backup.call.job_id, self.disks, at, who)

    def known(self, at: Seconds) -> tuple[Finding, ...]:
        """What is known of its images now: also what this look does not take back."""
        return findings(merged(self.backup.proofs.get(VERIFY), self.proof(at, "")))


MOST: Final = 5
"""Backups that are named where another one was asked for."""


def chosen(chains: Sequence[Chain], calls: Sequence[Call], vm: str, run: str) -> tuple[Backup, ...]:
    """What a run needs, the full run first; empty: the newest backup is meant.

    Raises UsageError for a run that is none of the VM's, HostError for one that is no backup.
    """
    newest = newest_completed(chains)
    name = run or (newest.run if newest else "")
    chain = of_run(chains, name)
    found = path_to(chain, name) if chain else ()
    kept = sorted((one for chain in chains for one in chain.kept), key=lambda one: one.ended)
    names = [one.run for one in kept]
    its = f"its newest backups: {', '.join(names[: -MOST - 1 : -1]) or 'none'}"
    if not name:
        raise HostError(f"cannot verify {vm}: no run of it is completed; {its}")
    if not found:
        state = next((call.state for call in reversed(calls) if call.run == name), None)
        if state is None:
            raise UsageError(f"{vm} has no run {name!r}{nearest(name, names)} ({its})")
        raise HostError(
            f"cannot verify run {name} of {vm}: it is {state}, so it is no backup; {its}"
        )
    if not found[-1].completed:
        stands = found[-1].call.state
        raise HostError(
            f"cannot verify run {name} of {vm}: it is {stands}, so it is no backup; {its}"
        )
    if found[-1].removed:
        raise HostError(
            f"cannot verify run {name} of {vm}: its images were removed at "
            f"{stamp(found[-1].removed)}; see reconciler chain {vm}"
        )
    return found


def verify(settings: Settings, backups: Sequence[Backup], *, digests: bool) -> Iterator[Verified]:
    """Look at the images of some backups, one after the other.

    Raises HostError if one cannot be looked at: then nothing is known of it.
    """
    for backup in backups:
        disks = tuple(_image(settings, backup, disk, digests=digests) for disk in backup.disks)
        yield Verified(backup=backup, disks=disks)


def _image(settings: Settings, backup: Backup, disk: Disk, *, digests: bool) -> Finding:
    path = disk.export.image
    if backup.removed:
        wrong = (f"it was removed at {stamp(backup.removed)}",)
        return Finding(key=str(disk.export.key), image=path, wrong=wrong)
    root = roots_of(settings, path)[-1]
    reading = (disk.export.size or 0) / images.SLOWEST if digests else 0.0
    look = partial(_looked, disk, root, digests=digests)
    return patience.do(f"verify {path}", root, look, images.CHECK_TIMEOUT + 10 + reading)


def _looked(disk: Disk, root: str, *, digests: bool) -> Finding:
    export, kept = disk.export, disk.archived
    # Of one whose digest nobody has taken, there is no deeper look than at its tables.
    deep = digests and bool(kept and kept.digest)
    base = Finding(key=str(export.key), image=export.image, deep=deep)
    image = images.look(export.image, root)
    size = kept.size if kept else export.size
    wrong = []
    if not image.exists:
        wrong.append("it is missing")
    elif image.outside:
        wrong.append(f"it leads out of its repository, to {image.outside}")
    elif image.error:
        wrong.append(f"it cannot be read: {image.error}")
    elif image.format != "qcow2":
        wrong.append("it is not qcow2")
    if wrong:
        return replace(base, wrong=tuple(wrong))
    if image.corrupt:
        wrong.append("qemu has marked it as corrupt")
    if size is not None and image.size != size:
        wrong.append(f"it has {format_size(image.size)}, and had {format_size(size)}")
    if image.backing not in (export.backing, None):
        wrong.append(
            f"it is built on {image.backing} by its header, on {export.backing or 'nothing'} by "
            "its record"
        )
    if damage := images.check(export.image):
        wrong.append(damage)
    digest = ""
    if deep and kept:
        digest = "same" if images.digest(export.image) == kept.digest else "differs"
        if digest == "differs":
            wrong.append("its bytes are not those that were published: its digest differs")
    elif digests:
        digest = "none was taken"
    return replace(base, wrong=tuple(wrong), digest=digest)
