"""Carries out what core/retention.py decides: looks who needs an image, then removes.

A backup is marked as removed before the first of its images goes, and what is built on another goes
before it. So a crash leaves either a backup that is whole, or one that is marked; the next pass
removes what is left of that. Claims stay: a run that was is never asked for again.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from reconciler.core.chains import Backup, Disk
from reconciler.core.errors import HostError
from reconciler.core.ledger import Ledger
from reconciler.core.mark import parse
from reconciler.core.retention import Retention, built_on, retention, to_be_read
from reconciler.core.settings import Settings
from reconciler.core.units import Bytes, Seconds, format_size
from reconciler.host import images, patience, proc
from reconciler.host.store import Event, Store
from reconciler.hub import EFFECT


def planned(
    settings: Settings, ledger: Ledger, vms: Collection[str], now: Seconds
) -> list[Retention]:
    """What becomes of the backups of some VMs. Changes nothing. Raises HostError."""
    held = {**_served(), **to_be_read(ledger)}
    found = []
    for vm in vms:
        one = retention(ledger, vm, now, held, built_on(ledger, vm))
        left = [backup for backup in one.unfinished if _there(settings, backup)]
        found.append(Retention(vm=vm, keep=one.keep, fates=one.fates, unfinished=tuple(left)))
    return found


def _served() -> dict[str, str]:
    """Image → the server that has it open, ours or not."""
    found = {}
    for process in proc.processes():
        one = parse(process.argv)
        if one and one.image:
            found[one.image] = f"a qemu-nbd, pid {process.identity.pid}"
    return found


def _there(settings: Settings, backup: Backup) -> bool:
    """Whether an image of a backup is there. What is in no repository any more is not ours."""
    for disk in backup.disks:
        path = disk.export.image
        name = settings.repository_of(path)
        if name is None:
            continue
        root, look = settings.repositories[name], partial(images.space, path)
        if patience.do(f"look at {path}", root, look, patience.QUIET).exists:
            return True
    return False


def carry_out(
    settings: Settings,
    store: Store,
    vms: Collection[str],
    jobs: Collection[str],
    now: Seconds,
    who: str,
) -> list[str]:
    """Remove what still may go of what was shown; what to tell. Raises HostError where something
    could not be removed, when the rest is done."""
    told: list[str] = []
    wrong: list[str] = []
    for one in planned(settings, store.ledger(), vms, now):
        series = [[backup] for backup in one.unfinished]
        series += [list(fate.order) for fate in one.fates if fate.goes]
        for backups in series:
            if not all(backup.call.job_id in jobs for backup in backups):
                continue  # it has grown since: what was shown is not all that is built on it
            try:
                for backup in backups:
                    said = _remove(settings, store, backup, now, who)
                    told.append(said)
            except HostError as error:
                wrong.append(str(error))
    if wrong:
        raise HostError("; ".join([*wrong, *told]), "CannotRemove")
    return told


def _remove(settings: Settings, store: Store, backup: Backup, now: Seconds, who: str) -> str:
    """Remove a backup, or what is left of one whose removal was decided; what to tell.

    Raises HostError: it is as it was then, or it is marked, and the next pass goes on.
    """
    call = backup.call
    for disk in backup.disks:
        _free(settings, store, backup, disk)
    if not backup.removed:
        store.removed(call.job_id, now, [disk.export.position for disk in backup.disks])
    sizes = [size for disk in backup.disks if (size := _unlink(settings, disk)) is not None]
    many = f"{len(sizes)} image{'s' if len(sizes) != 1 else ''}"
    said = f"removed run {call.run} of {call.vm}: {many}, {format_size(sum(sizes))}"
    store.record([Event(vm=call.vm, run=call.run, reason="Removed", message=said)], who, now)
    return said


def _free(settings: Settings, store: Store, backup: Backup, disk: Disk) -> None:
    """Whether an image can be removed: it is the one that was published, our state directory has
    claimed its run, and nobody uses it. Raises HostError."""
    call, export, path = backup.call, disk.export, disk.export.image
    root = _root(settings, path)
    size = disk.archived.size if disk.archived and disk.archived.size else export.size

    def wrong() -> str:
        owner = images.owner_of(root, call.vm, call.run)
        if owner and owner.state_id != store.state_id:
            return f"its run is claimed by state directory {owner.directory or owner.state_id}"
        if pids := proc.users(path):
            return f"{proc.name_of(pids[0])} (pid {pids[0]}) has it open"
        return images.irremovable(path, root, size, export.backing)

    if why := patience.do(f"look at {path}", root, wrong, patience.QUIET):
        raise HostError(f"cannot remove {path}: {why}", "CannotRemove")


def _unlink(settings: Settings, disk: Disk) -> Bytes | None:
    """What an image took that is gone now; None: it was not there. Raises HostError."""
    path = disk.export.image

    def away() -> Bytes | None:
        taken = images.space(path).allocated
        return taken if images.remove(path) else None

    return patience.do(f"remove {path}", _root(settings, path), away, EFFECT)


def _root(settings: Settings, path: str) -> str:
    """The repository of an image. Raises HostError: what is in none is not ours to remove."""
    name = settings.repository_of(path)
    if name is None:
        raise HostError(
            f"cannot remove {path}: it is in no repository of the config", "CannotRemove"
        )
    return settings.repositories[name]
