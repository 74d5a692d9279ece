"""Looks at every image that a backup needs. Reads only: images of published runs do not change.

So it takes no lock, holds nobody up, and works beside a daemon; what was found is then written down
by who holds the lock, with an order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial

from msgspec import Struct

from reconciler.core.chains import Backup, Chain, Disk, newest_completed, of_run, path_to
from reconciler.core.errors import HostError
from reconciler.core.ledger import VERIFY, Proof
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds, format_size, stamp
from reconciler.host import images, patience
from reconciler.repositories import roots_of


class Found(Struct, frozen=True, kw_only=True):
    """What was found of one image."""

    key: int
    image: str
    wrong: tuple[str, ...]
    """What is the matter with it; empty: it is well."""
    digest: str = ""
    """`same`, `differs`, `none was taken`; empty: it was not looked at."""


class Verified(Struct, frozen=True, kw_only=True):
    """What was found of one backup's own images."""

    backup: Backup
    disks: tuple[Found, ...]

    @property
    def ok(self) -> bool:
        return not any(disk.wrong for disk in self.disks)

    def proof(self, at: Seconds, who: str) -> Proof:
        """The same, to be written down."""
        disks = [
            {"key": str(one.key), "image": one.image, "wrong": one.wrong, "digest": one.digest}
            for one in self.disks
        ]
        return Proof(
            job_id=self.backup.call.job_id,
            kind=VERIFY,
            at=at,
            ok=self.ok,
            result=json.dumps({"disks": disks}),
            who=who,
        )


def chosen(chains: Sequence[Chain], vm: str, run: str) -> tuple[Backup, ...]:
    """What a run needs, the full run first; empty: the newest backup is meant. Raises HostError."""
    newest = newest_completed(chains)
    name = run or (newest.run if newest else "")
    chain = of_run(chains, name)
    found = path_to(chain, name) if chain else ()
    if not found or not found[-1].completed:
        stands = f"is {found[-1].call.state}" if found else "is no completed run"
        names = [one.run for one in chains[-1].kept] if chains else []
        raise HostError(
            f"cannot verify {vm}: {f'{name!r} {stands}' if name else 'no run of it is completed'}; "
            f"its newest backups: {', '.join(names[-5:]) or 'none'}"
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


def _image(settings: Settings, backup: Backup, disk: Disk, *, digests: bool) -> Found:
    path = disk.export.image
    if backup.removed:
        wrong = (f"it was removed at {stamp(backup.removed)}",)
        return Found(key=disk.export.key, image=path, wrong=wrong)
    root = roots_of(settings, path)[-1]
    reading = (disk.export.size or 0) / images.SLOWEST if digests else 0.0
    look = partial(_looked, disk, root, digests=digests)
    return patience.do(f"verify {path}", root, look, images.CHECK_TIMEOUT + 10 + reading)


def _looked(disk: Disk, root: str, *, digests: bool) -> Found:
    export, kept = disk.export, disk.archived
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
        return Found(key=export.key, image=export.image, wrong=tuple(wrong))
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
    if digests and kept and kept.digest:
        digest = "same" if images.digest(export.image) == kept.digest else "differs"
        if digest == "differs":
            wrong.append("its bytes are not those that were published: its digest differs")
    elif digests:
        digest = "none was taken"
    return Found(key=export.key, image=export.image, wrong=tuple(wrong), digest=digest)
