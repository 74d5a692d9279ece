"""A live VM: its disks are in one qemu-storage-daemon, and are snapshot while it writes.

The snapshot is what QEMU calls fleecing. A backup job with `sync: none` keeps in an overlay each
block that the VM is about to overwrite, and the overlay, served read-only, is the disk as it was.
All jobs begin in one QMP transaction, so that all disks are of one instant.

What has changed since an earlier snapshot is told by a dirty bitmap. Each snapshot adds one to each
disk, whose name is the change id: it notes what is written from that instant on.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmp import Monitor, QmpError

QMP: Final = "qmp"
NBD: Final = "nbd"
"""The sockets in a live VM's folder. An export of a disk is named by its disk key."""
CHANGED: Final = "changed"
"""The bitmap that is served with a snapshot: it stands still, and goes with the snapshot."""
WRITTEN: Final = 30.0
"""How long a torn set waits for the VM to write. Seconds. Chosen."""
CHANGE_ID: Final = re.compile(
    r"(?P<uuid>52( [0-9a-f]{2}){7}-[0-9a-f]{2}( [0-9a-f]{2}){7})/(?P<n>\d+)"
)
"""As VMware writes one: the tracking's uuid in bytes, and the number of the snapshot."""


class LiveError(Exception):
    """Why a live VM gave no snapshot, or not of this disk."""


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a disk. Bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One disk as it was at one instant, served read-only."""

    socket: Path
    export: str
    change_id: str
    """What to ask by next time."""
    areas: tuple[Area, ...]
    """What to copy: everything, or what has changed since the previous change id."""

    @property
    def size(self) -> int:
        """Say how much there is to copy. Bytes."""
        return sum(area.length for area in self.areas)


class LiveVm:
    """A VM that runs. Its folder holds its sockets, and the overlays while there is a snapshot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._one = threading.Lock()  # a QMP socket serves one client at a time

    def snapshot(
        self, previous: Mapping[str, str], *, together: bool = True
    ) -> dict[str, Snapshot | LiveError]:
        """Snapshot these disks: key → the change id to go on from, or "" for all of it.

        A disk of which the VM cannot say what has changed has an error in place of a snapshot.
        With `together` False, one after another, and the VM writes in between: a torn set. Raises
        LiveError, OSError.
        """
        with self._one, self._talking() as monitor:
            disks = self._disks(monitor)
            answers: dict[str, Snapshot | LiveError] = {}
            taken: dict[str, str] = {}
            for key, change_id in previous.items():
                if key not in disks:
                    raise LiveError(f"the VM in {self.folder} has no disk {key}")
                self._sweep(monitor, key)
                try:
                    taken[key] = next_change_id(disks[key].bitmaps, change_id)
                except LiveError as error:
                    answers[key] = error
            steps = {key: list(self._step(key, previous[key], new)) for key, new in taken.items()}
            for key in taken:
                self._overlay(monitor, key, disks[key].size)
            if together:
                # First every job, then the bitmaps: a job's step stops the writes to its disk until
                # the transaction is over, so no write falls between a disk and its bitmap.
                jobs = [job for job, *_ in steps.values()]
                bitmaps = [action for _, *rest in steps.values() for action in rest]
                monitor.do("transaction", actions=[*jobs, *bitmaps])
            for key, step in () if together else steps.items():
                monitor.do("transaction", actions=step)
                self._until_written(monitor, steps, key)
            for key, new in taken.items():
                answers[key] = self._served(monitor, key, disks[key].size, previous[key], new)
            return answers

    def drop(self, key: str) -> None:
        """Let go of the snapshot of a disk (raises LiveError, OSError)."""
        with self._one, self._talking() as monitor:
            self._sweep(monitor, key)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[Monitor]:
        try:
            with Monitor(self.folder / QMP) as monitor:
                yield monitor
        except QmpError as error:
            raise LiveError(f"the VM in {self.folder} refuses: {error}") from error
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise LiveError(f"no VM runs in {self.folder}; start source.py there") from error

    def _disks(self, monitor: Monitor) -> dict[str, Disk]:
        nodes = monitor.do("query-named-block-nodes", flat=True)
        return {
            node["node-name"].removeprefix("disk-"): Disk(
                node["image"]["virtual-size"], tuple(node.get("dirty-bitmaps", ()))
            )
            for node in nodes
            if node["node-name"].startswith("disk-")
        }

    def _overlay(self, monitor: Monitor, key: str, size: int) -> None:
        file = self.folder / f"snap-{key}.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(file), str(size)]
        done = subprocess.run(create, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LiveError(f"cannot keep what is overwritten: {done.stderr.strip()}")
        monitor.do(
            "blockdev-add",
            driver="qcow2",
            node_name=f"snap-{key}",
            file={"driver": "file", "filename": file.name},
            backing=f"disk-{key}",
        )

    def _step(self, key: str, previous: str, new: str) -> Iterable[dict[str, object]]:
        """Compose what is done to one disk at the instant."""
        disk, name = f"disk-{key}", "block-dirty-bitmap"
        job = {"job-id": f"snap-{key}", "device": disk, "target": f"snap-{key}", "sync": "none"}
        yield {"type": "blockdev-backup", "data": job}
        if previous:
            still = {"node": disk, "name": CHANGED, "disabled": True}
            yield {"type": f"{name}-add", "data": still}
            since = {"node": disk, "target": CHANGED, "bitmaps": [previous]}
            yield {"type": f"{name}-merge", "data": since}
        yield {"type": f"{name}-add", "data": {"node": disk, "name": new, "persistent": True}}

    def _served(self, monitor: Monitor, key: str, size: int, previous: str, new: str) -> Snapshot:
        bitmaps = [{"node": f"disk-{key}", "name": CHANGED}] if previous else []
        name = f"snap-{key}"
        monitor.do(
            "block-export-add", type="nbd", id=name, node_name=name, name=name, bitmaps=bitmaps
        )
        areas = self._changed(name) if previous else (Area(0, size),)
        return Snapshot(self.folder / NBD, name, new, areas)

    def _changed(self, export: str) -> tuple[Area, ...]:
        """Read the bitmap of a snapshot. In the folder, as a socket's path must be short."""
        context, uri = f"qemu:dirty-bitmap:{CHANGED}", f"nbd+unix:///{export}?socket={NBD}"
        command = ["nbdinfo", f"--map={context}", "--json", uri]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LiveError(f"cannot read what has changed: {done.stderr.strip()}")
        return tuple(
            Area(one["offset"], one["length"]) for one in json.loads(done.stdout) if one["type"]
        )

    def _until_written(self, monitor: Monitor, steps: Mapping[str, object], key: str) -> None:
        """Wait until the VM has written more than one record to the disks that come next."""
        keys = list(steps)
        for later in keys[keys.index(key) + 1 :]:
            for _ in range(2):  # the first write may be the one that the snapshot was just before
                probe = {"node": f"disk-{later}", "name": "probe"}
                monitor.do("block-dirty-bitmap-add", **probe)
                try:
                    self._until_counted(monitor, later)
                finally:
                    monitor.do("block-dirty-bitmap-remove", **probe)

    def _until_counted(self, monitor: Monitor, key: str) -> None:
        """Wait until the probe has noted a write (raises LiveError)."""
        until = time.monotonic() + WRITTEN
        while time.monotonic() < until:
            bitmaps = self._disks(monitor)[key].bitmaps
            if any(one.get("name") == "probe" and one["count"] for one in bitmaps):
                return
            time.sleep(0.002)
        raise LiveError("told to tear the set, and the VM does not write")

    def _sweep(self, monitor: Monitor, key: str) -> None:
        """Let go of what is there of a snapshot: also of one that a killed appliance has left."""
        name = f"snap-{key}"
        if any(one["id"] == name for one in monitor.do("query-block-exports")):
            monitor.do("block-export-del", id=name, mode="hard")
            monitor.wait("BLOCK_EXPORT_DELETED", id=name)
        if any(one["id"] == name for one in monitor.do("query-jobs")):
            monitor.do("block-job-cancel", device=name)
            monitor.wait("JOB_STATUS_CHANGE", id=name, status="null")
        nodes = monitor.do("query-named-block-nodes", flat=True)
        if any(node["node-name"] == name for node in nodes):
            monitor.do("blockdev-del", node_name=name)
        (self.folder / f"{name}.qcow2").unlink(missing_ok=True)
        if any(one.get("name") == CHANGED for one in self._disks(monitor)[key].bitmaps):
            monitor.do("block-dirty-bitmap-remove", node=f"disk-{key}", name=CHANGED)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a live VM: its size in bytes, and its bitmaps as QMP tells them."""

    size: int
    bitmaps: tuple[Mapping[str, Any], ...]


def next_change_id(bitmaps: Iterable[Mapping[str, Any]], previous: str) -> str:
    """Name the next snapshot of a disk. Raises LiveError if it cannot go on from `previous`.

    A bitmap that is not recording says nothing: that of a VM which was killed is inconsistent.
    """
    known = {str(one["name"]) for one in bitmaps if one.get("name") and one.get("recording")}
    if previous and previous not in known:
        raise LiveError(
            f"the VM does not know what has changed since {previous!r}; ask for a full backup"
        )
    found = [match for one in known if (match := CHANGE_ID.fullmatch(one))]
    if not found:
        first = bytes([0x52, *uuid.uuid4().bytes[1:]])
        return f"{first[:8].hex(' ')}-{first[8:].hex(' ')}/1"
    last = max(found, key=lambda match: int(match["n"]))
    return f"{last['uuid']}/{int(last['n']) + 1}"
