#!/usr/bin/env python3
"""A VM to back up: disks in one qemu-storage-daemon, and a guest that writes on all of them.

Its folder is DIR/<vm_name> of an appliance's --sources. The disks are qcow2 images in it, made if
they are not there; the VM's sockets, `qmp` and `nbd`, tell the appliance that it is live.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import live
from nbd_client import Connection
from records import BLOCK, newest, record

UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
PROGRAMS: Final = {"qemu-img": "qemu-utils", "qemu-storage-daemon": "qemu-system-common"}
STARTING: Final = 30.0
"""For qemu-storage-daemon to be there. Seconds. Chosen: it takes 10 ms where nothing else runs."""
ENDING: Final = 10.0
"""For it to write its bitmaps and go. Seconds. Chosen."""


def parse_disk(text: str) -> tuple[str, int]:
    """Read KEY=SIZE."""
    found = re.fullmatch(r"(?P<key>[0-9]{1,9})=(?P<count>[0-9]{1,9})(?P<unit>[KMG]?)", text)
    size = int(found["count"]) * UNITS[found["unit"]] if found else 0
    if not found or not size or size % BLOCK:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write 2000=64M, in blocks of 4K")
    return found["key"], size


def serve(folder: Path, disks: Mapping[str, int]) -> subprocess.Popen[bytes]:
    """Start the storage daemon; it answers when this returns. Raises OSError."""
    for key, size in disks.items():
        if not (folder / f"{key}.qcow2").exists():
            create = ["qemu-img", "create", "-q", "-f", "qcow2", f"{key}.qcow2", str(size)]
            if subprocess.run(create, cwd=folder, check=False).returncode:
                raise OSError(f"qemu-img makes no disk {key}; see above")
    started = folder / "pid"
    started.unlink(missing_ok=True)
    command = ["qemu-storage-daemon", "--pidfile", started.name]
    command += ["--chardev", f"socket,id=monitor,path={live.QMP},server=on,wait=off"]
    command += ["--monitor", "monitor", "--nbd-server", f"addr.type=unix,addr.path={live.NBD}"]
    for key in disks:
        image = f"file.driver=file,file.filename={key}.qcow2"
        node = f"node-name=disk-{key}"
        command += ["--blockdev", f"driver=qcow2,{node},discard=unmap,{image}"]
        command += ["--export", f"nbd,id=disk-{key},{node},name={key},writable=on"]
    # In the folder, with short names: the path of a socket has no more than 107 bytes.
    none = subprocess.DEVNULL
    daemon = subprocess.Popen(command, cwd=folder, stdin=none, stdout=none, start_new_session=True)
    until = time.monotonic() + STARTING
    while not (started.exists() and started.read_text()):  # written last. Source: its --help
        if daemon.poll() is not None or time.monotonic() > until:
            daemon.kill()
            raise OSError(f"qemu-storage-daemon does not serve {folder}; see above")
        time.sleep(0.002)
    return daemon


def write(folder: Path, keys: list[str], pause: float, stopping: threading.Event) -> int:
    """Write record after record until it is time to stop; the number of the last one."""
    with ExitStack() as stack:
        disks = [stack.enter_context(Connection(folder / live.NBD, key)) for key in keys]
        number = max(1, newest(disks[0].read(0, disks[0].size), 0))  # perhaps not yet on them all
        while True:
            for position, disk in enumerate(disks):
                block = number % (disk.size // BLOCK)
                disk.write(block * BLOCK, record(number, position))
            if stopping.wait(pause) if pause else stopping.is_set():
                return number
            number += 1


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; exit code 1 if that cannot even begin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made if it is not there")
    hint = "a disk, by its disk key; in the order in which they are written"
    parser.add_argument(
        "--disk", type=parse_disk, action="append", required=True, metavar="KEY=SIZE", help=hint
    )
    hint = "write numbered records on all disks"
    parser.add_argument("--write", action="store_true", help=hint)
    hint = "rest so long after each record; default 0"
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help=hint)
    options = parser.parse_args(argv)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    disks: dict[str, int] = dict(options.disk)
    try:
        for program, package in PROGRAMS.items():
            if not shutil.which(program):
                raise OSError(f"there is no {program}; install it (Debian: {package})")
        options.folder.mkdir(parents=True, exist_ok=True)
        daemon = serve(options.folder, disks)
    except OSError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    print(f"disks {', '.join(disks)} are live in {options.folder}, pid {daemon.pid}", flush=True)
    try:
        if options.write:
            last = write(options.folder, list(disks), options.pause, stopping)
            print(f"last record: {last}", flush=True)
        else:
            while daemon.poll() is None and not stopping.wait(1.0):
                pass
    except OSError as error:
        print(f"cannot write: {error}; is pid {daemon.pid} gone?", file=sys.stderr)
        return 1
    finally:
        daemon.terminate()  # in order: its bitmaps go into its images
        daemon.wait(ENDING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
