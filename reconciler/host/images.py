"""Image files: look at their headers, create them without ever overwriting, claim a run.

A qcow2 header is read by ourselves: 14 µs, where `qemu-img info` takes 9 ms and needs a share of
the image's lock. Source: qemu's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import posixpath
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actual import FileSystem, Image
from reconciler.core.errors import HostError
from reconciler.core.units import Bytes, Seconds
from reconciler.host.effects import Effect, effect

CREATE_TIMEOUT: Final[Seconds] = 60.0
"""qemu-img create takes 11-40 ms; a minute means that the storage hangs."""
CHECK_TIMEOUT: Final[Seconds] = 600.0
"""qemu-img check reads an image's tables: some 130 MiB for each TiB that is in it."""
SLOWEST: Final = 10 << 20
"""Bytes per second. Storage from which an image is read more slowly is one that hangs."""
_MAGIC: Final = b"QFI\xfb"
_CORRUPT: Final = 1 << 1
"""Bit of the incompatible features. Source: qemu's docs/interop/qcow2.txt."""
_MAX_L1: Final = 32 << 20
"""Bytes. Source: QCOW_MAX_L1_SIZE, qemu's block/qcow2.h."""
_MAX_OFFSET: Final = (1 << 56) - 1
"""Bytes. Source: the masks of offsets in qemu's docs/interop/qcow2.txt."""
TEMPORARY: Final = ".creating-"
DEEP: Final = 100
"""Folders above a path from which on it is left to the library, which needs no stack."""


class Paths:
    """Where paths lead, for one look: a directory is looked at once, however many lie below it."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {"/": "/"}
        self._devices: dict[str, int] = {}

    def real(self, path: str) -> str:
        """An absolute path without symlinks, as os.path.realpath has it."""
        known = self._real.get(path)
        if known is None:
            above, name = posixpath.split(path)
            plain = name not in ("", ".", "..") and path.startswith("/") and path.count("/") < DEEP
            base = self.real(above) if plain else ""
            known = posixpath.join(base, name)
            if not plain or os.path.islink(known):
                known = os.path.realpath(path)
            self._real[path] = known
        return known

    def device(self, directory: str) -> int:
        """The file system that a directory is on, or will be when it is made; 0: not known."""
        known = self._devices.get(directory)
        if known is None:
            above = posixpath.dirname(directory)
            try:
                known = os.stat(directory).st_dev
            except OSError:
                end = above == directory or directory.count("/") >= DEEP
                known = _device(directory) if end else self.device(above)
            self._devices[directory] = known
        return known


def look(path: str, root: str, paths: Paths | None = None) -> Image:
    """What is at `path`, below the repository `root`. Never raises; `error` tells."""
    paths = paths or Paths()
    real_root = paths.real(root)
    real = paths.real(path)
    if real != real_root and not real.startswith(real_root.rstrip("/") + "/"):
        return Image(path=path, exists=os.path.lexists(path), outside=real)
    try:
        # Without O_NONBLOCK, opening a FIFO waits for somebody to write into it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return Image(path=path, exists=True, error=_kind(info.st_mode))
            found = replace(_header(path, fd, info), locked=_locked(fd))
            return replace(
                found,
                allocated=info.st_blocks * 512,
                written=info.st_mtime,
                device=info.st_dev,
            )
        finally:
            os.close(fd)
    except FileNotFoundError:
        if os.path.islink(path):
            return Image(path=path, exists=True, error="it is a symlink to nothing")
        return Image(path=path, exists=False, device=paths.device(posixpath.dirname(path)))
    except (OSError, struct.error) as error:
        said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "torn"
        return Image(path=path, exists=True, error=said)


def space(path: str) -> Image:
    """How much an image takes, and of which file system; nothing else of it is looked at."""
    try:
        info = os.stat(path)
    except OSError:
        return Image(path=path, exists=False, device=_device(posixpath.dirname(path)))
    return Image(path=path, exists=True, allocated=info.st_blocks * 512, device=info.st_dev)


def _kind(mode: int) -> str:
    """What is there instead of a file."""
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    return f"it is {'a FIFO' if stat.S_ISFIFO(mode) else 'a device'}, not a file"


def _device(directory: str) -> int:
    """The file system that a directory is on, or will be when it is made; 0: not known."""
    while True:
        try:
            return os.stat(directory).st_dev
        except OSError:
            above = posixpath.dirname(directory)
            if above == directory:
                return 0
            directory = above


def file_system(path: str) -> FileSystem | None:
    """The file system that a path is on, whether it exists or not; None: it does not say."""
    path = os.path.realpath(path)
    device = _device(path)
    while (above := posixpath.dirname(path)) != path and _device(above) == device:
        path = above
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    if not found.f_blocks:
        return None  # one that keeps no count of its blocks is not full
    return FileSystem(
        mount=path,
        free=found.f_bavail * found.f_frsize,
        read_only=bool(found.f_flag & os.ST_RDONLY),
    )


def _header(path: str, fd: int, info: os.stat_result) -> Image:
    head = os.pread(fd, 104, 0)
    if head[:4] != _MAGIC:
        return Image(path=path, exists=True, format="raw" if head else "", size=info.st_size)
    backing_at, backing_length, cluster_bits, size = struct.unpack_from("!QIIQ", head, 8)
    l1_entries, l1_at = struct.unpack_from("!IQ", head, 36)
    (snapshots,) = struct.unpack_from("!I", head, 60)
    absurd = not 9 <= cluster_bits <= 21 or l1_entries * 8 > _MAX_L1 or backing_length > 1023
    if absurd or max(l1_at, backing_at) > _MAX_OFFSET:
        return Image(path=path, exists=True, error="its qcow2 header is damaged")
    # Version 2 has no features: its header is shorter.
    (version,) = struct.unpack_from("!I", head, 4)
    features = struct.unpack_from("!Q", head, 72)[0] if version >= 3 else 0
    backing = None
    if backing_at:
        name = os.pread(fd, backing_length, backing_at).decode("utf-8", "replace")
        backing = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    table = os.pread(fd, l1_entries * 8, l1_at)
    cluster = 1 << cluster_bits
    bare = -(-(l1_at + l1_entries * 8) // cluster) * cluster
    # A client's data clusters are appended at once, its tables only at a flush: look at both.
    pristine = not table.strip(b"\0") and info.st_size <= bare and not snapshots
    return Image(
        path=path,
        exists=True,
        format="qcow2",
        size=size,
        backing=backing,
        corrupt=bool(features & _CORRUPT),
        pristine=pristine,
        allocated=info.st_blocks * 512,
    )


def _locked(fd: int) -> bool:
    """Whether anybody holds a lock on the file, as qemu does on every image it has open.

    Asked of the file itself: reading /proc/locks stops the kernel for 10 ms. Source: fcntl(2).
    """
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    with contextlib.suppress(OSError):  # a file system without locks has no holder to name
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
    return False


def create(path: str, size: Bytes, root: str, backing: str | None = None) -> None:
    """A new qcow2 at `path`. Raises HostError if anything is there: nothing is ever overwritten.

    `qemu-img create` overwrites without asking, so it works at a name of ours beside the target,
    and `link` gives the file its name only if the name is free. The backing path is written
    relative, so that a repository can be moved.
    """
    import subprocess  # here, so that who only looks does not load it

    directory = posixpath.dirname(path)
    temporary = _temporary(path)
    line = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if backing:
        line += ["-b", posixpath.relpath(backing, directory), "-F", "qcow2"]
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
        if look(path, root).outside:
            raise HostError(f"cannot create {path}: it leads out of {root}", "CannotCreate")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # what an earlier try of ours left; one writer holds the lock
        done = subprocess.run(
            [*line, temporary, str(size)],
            capture_output=True,
            text=True,
            timeout=CREATE_TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in our terminal is for us: what was begun is ended
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode:
            lines = done.stderr.strip().removeprefix("qemu-img: ").splitlines()
            raise HostError(
                f"cannot create {path}: {lines[-1] if lines else 'qemu-img failed'}",
                "CannotCreate",
            )
        _sync(temporary)
        with effect(Effect.IMAGE):
            os.link(temporary, path)
            os.unlink(temporary)
            _sync(directory)
    except FileExistsError as error:
        raise HostError(
            f"cannot create {path}: something is there since we looked", "CannotCreate"
        ) from error
    except FileNotFoundError as error:
        missing = "qemu-img: install it with `apt-get install qemu-utils`"
        said = missing if error.filename == "qemu-img" else f"{path}: {error.strerror}"
        raise HostError(f"cannot create {said}", "CannotCreate") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"cannot create {path}: no end after {CREATE_TIMEOUT:g} s, its storage hangs",
            "StorageHangs",
        ) from error
    except OSError as error:
        raise HostError(f"cannot create {path}: {error.strerror}", "CannotCreate") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _temporary(path: str) -> str:
    """Where an image is made before it gets its name."""
    return posixpath.join(posixpath.dirname(path), f"{TEMPORARY}{posixpath.basename(path)}")


def irremovable(path: str, root: str, size: Bytes | None, backing: str | None) -> str:
    """Why what is at `path` is not removed as the image that was published there; empty: it is
    that, and nobody has it locked, or nothing is there. `size` and `backing` are the record's."""
    found = look(path, root)
    if not found.exists:
        return ""
    if found.outside:
        return f"it leads out of {root}, to {found.outside}"
    if found.error:
        return found.error
    if os.path.islink(path):
        return "it is a symlink: remove it and what it leads to yourself"
    if found.format != "qcow2" or size not in (None, found.size):
        return "it is not the image that was published there: remove it yourself"
    if found.backing not in (backing, None):
        return f"it is built on {found.backing}, and was on {backing or 'nothing'}"
    return "some process has it locked" if found.locked else ""


def remove(path: str) -> bool:
    """Remove a file for good; False: it was not there. Raises HostError."""
    try:
        with effect(Effect.UNLINK):
            os.unlink(path)
            _sync(posixpath.dirname(path))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}", "CannotRemove") from error
    return True


def sweep(path: str) -> None:
    """Remove what a crash left beside an image that has its name. Never raises."""
    with contextlib.suppress(OSError):
        os.unlink(_temporary(path))


def check(path: str, timeout: Seconds = CHECK_TIMEOUT) -> str:
    """What is wrong with an image, by `qemu-img check`; empty: nothing that matters.

    It may be open in its server, which must be idle and flushed. It is opened without what it is
    built on, whose own faults are told of that. Clusters that leak cost space and nothing else.
    Exit codes 0, 2 and 3. Source: qemu-img(1). Raises HostError.
    """
    import json
    import subprocess

    alone = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None}
    line = ["qemu-img", "check", "-U", "-q", f"json:{json.dumps(alone)}"]
    try:
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"cannot check {path}: no end after {timeout:g} s, its storage hangs",
            "StorageHangs",
        ) from error
    except OSError as error:
        raise HostError(f"cannot run qemu-img: {error.strerror}", "CannotCheck") from error
    words = (done.stderr + done.stdout).replace(line[-1], path).strip().splitlines()
    if done.returncode == 2:
        return _damage(words) or (words[0] if words else "qemu-img check finds errors in it")
    if done.returncode not in (0, 3):
        if damage := _damage(words):
            return damage
        said = words[-1] if words else f"qemu-img check ends with {done.returncode}"
        raise HostError(f"cannot check {path}: {said}", "CannotCheck")
    return ""


def _damage(words: Sequence[str]) -> str:
    """What a check that was not completed tells of the image; empty: something else was the matter.

    Tables that point nowhere end the check with 1, as does an image that is not there. Measured
    with qemu-img 7.2: garbage over the tables, the first 64 KiB, a file that was cut off.
    """
    found = next((one for one in words if one.startswith("ERROR")), "")
    last = words[-1] if words else ""
    if found or "Could not open" not in last:
        return found
    why = last.rpartition("': ")[2]
    return "" if why in map(os.strerror, errno.errorcode) else f"it cannot be opened: {why}"


def digest(path: str, block: Bytes = 1 << 16) -> str:
    """`sha256:…` of the bytes of a file, holes read as zeros: what sha256sum(1) prints. So it is
    the same wherever the file is copied to, however sparse the copy is. Raises HostError.

    Holes are not read from the disk, only hashed.
    """
    import hashlib

    found, zeros = hashlib.sha256(), bytes(block)
    try:
        with open(path, "rb", buffering=0) as file:
            at, end = 0, os.fstat(file.fileno()).st_size
            while at < end:
                data = _data_from(file.fileno(), at, end)
                for start in range(at, data, block):
                    found.update(zeros[: min(block, data - start)])
                at = data
                hole = os.lseek(file.fileno(), data, os.SEEK_HOLE) if data < end else end
                file.seek(data)
                while at < min(hole, end):
                    read = file.read(min(block, hole - at))
                    if not read:
                        raise HostError(
                            f"cannot take the digest of {path}: it became shorter meanwhile, so "
                            "somebody writes it",
                            "CannotDigest",
                        )
                    found.update(read)
                    at += len(read)
    except OSError as error:
        raise HostError(
            f"cannot take the digest of {path}: {error.strerror}", "CannotDigest"
        ) from error
    return f"sha256:{found.hexdigest()}"


def _data_from(fd: int, at: int, end: int) -> int:
    """Where the next data of a file begins; its end, if there is none. Source: lseek(2)."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        raise


def locked(path: str) -> bool:
    """Whether some process holds a lock on an image. False where there is none to look at."""
    try:
        with open(path, "rb") as file:
            return _locked(file.fileno())
    except OSError:
        return False


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def claim_path(root: str, vm: str, run: str) -> Path:
    return Path(root) / vm / f".claim-{run}"


class Owner(Struct, frozen=True):
    """The state directory that claimed a run."""

    state_id: str
    directory: str = ""
    """Where it was then, an absolute path; empty: the claim does not say."""


def owner_of(root: str, vm: str, run: str) -> Owner | None:
    """The state directory that claimed a run here; None: none did. Raises HostError."""
    path = claim_path(root, vm, run)
    try:
        state_id, directory, *_ = [*path.read_text(errors="replace").split("\n"), "", ""]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"cannot read the claim {path}: {error.strerror}", "Storage") from error
    return Owner(state_id.strip() or "nobody: the claim is empty", directory)


def claimed_by(root: str, vm: str, run: str) -> str | None:
    """The id of the state directory that claimed a run here; None: none did. Raises HostError."""
    owner = owner_of(root, vm, run)
    return owner.state_id if owner else None


def claim(root: str, vm: str, run: str, owner: Owner, *, take_over: bool = False) -> None:
    """Say on the repository itself that a run is being asked for. Raises HostError.

    Written whole at another name and linked, so that a crash leaves a claim or none. Doing it
    again for the same state directory changes nothing. `take_over`: an operator's order to make
    another state directory's claim ours.
    """
    path = claim_path(root, vm, run)
    temporary = path.with_name(f".claiming-{run}-{owner.state_id}")
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _write(str(temporary), f"{owner.state_id}\n{owner.directory}\n")
        with effect(Effect.CLAIM):
            if take_over:
                os.rename(temporary, path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
                os.unlink(temporary)
            _sync(str(path.parent))
    except OSError as error:
        raise HostError(
            f"cannot claim run {run} of {vm} in {path.parent}: {error.strerror}", "CannotClaim"
        ) from error
    there = owner_of(root, vm, run)
    if there is None or there.state_id != owner.state_id:
        whose = f"{there.state_id} {there.directory}".rstrip() if there else "nobody"
        raise HostError(
            f"cannot claim run {run} of {vm}: {path} belongs to state directory {whose}",
            "ClaimedElsewhere",
        )


def intent_path(root: str, vm: str, run: str, attempt: int) -> Path:
    return Path(root) / vm / f".intent-{run}-a{attempt}"


def taint_path(root: str, vm: str, run: str, attempt: int) -> Path:
    return Path(root) / vm / f".tainted-{run}-a{attempt}"


def tainted(root: str, vm: str, run: str, attempt: int) -> bool:
    """Whether a server of this attempt died under a client. Raises HostError."""
    return _exists(taint_path(root, vm, run, attempt))


def taint(root: str, vm: str, run: str, attempt: int) -> None:
    """Say on the repository that acknowledged writes of a run may be gone. Raises HostError."""
    path = taint_path(root, vm, run, attempt)
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _write(str(path), "a server died under a client: acknowledged writes may be gone\n")
        _sync(str(path.parent))
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", "CannotTaint") from error


def intended(root: str, vm: str, run: str, attempt: int) -> bool:
    """Whether an SNA may have been called for this attempt. Raises HostError."""
    return _exists(intent_path(root, vm, run, attempt))


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise HostError(f"cannot look for {path}: {error.strerror}", "Storage") from error
    return True


def intend(root: str, vm: str, run: str, attempt: int, job_id: str) -> None:
    """Say on the repository that an SNA is about to be called. Raises HostError.

    The ledger can be put back to what it was last week; the repository tells what it forgot.
    """
    path = intent_path(root, vm, run, attempt)
    try:
        with effect(Effect.MARKER):
            _write(str(path), f"{job_id}\n")
            _sync(str(path.parent))
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", "CannotClaim") from error


def unintend(
    root: str, vm: str, run: str, attempt: int, given_up: Callable[[], bool] = lambda: False
) -> None:
    """Take it back: it is known that the SNA did not act. Raises HostError.

    `given_up`: nobody waits for this any more, so that another intent of the same name may be made
    meanwhile; nothing is removed then. The way to the directory, where hanging storage holds us up,
    is behind us when that is asked, and while we are in the unlink the kernel lets nobody else make
    a file in the directory.
    """
    path = intent_path(root, vm, run, attempt)
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}", "CannotClaim") from error
    try:
        if given_up():
            return
        with effect(Effect.UNMARK), contextlib.suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=directory)
            os.fsync(directory)
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}", "CannotClaim") from error
    finally:
        os.close(directory)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
