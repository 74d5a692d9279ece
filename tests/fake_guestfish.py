#!/usr/bin/env python3
"""Answers as guestfish 1.48 does, of a disk with ext4, swap, a damaged XFS, and an unknown one."""

from __future__ import annotations

import shlex
import sys

LISTING = """total 3090
drwxr-xr-x  4 0 0    1024 Nov 26 14:04 .
drwxr-xr-x 15 0 0    4096 Nov 26 14:50 ..
lrwxrwxrwx  1 0 0       3 Nov 26 14:04 bin -> usr
brw-rw----  1 0 6    8, 0 Nov 26 14:04 disk
drwxr-xr-x  2 0 0    1024 Nov 26 14:04 etc
-rw-r--r--  1 0 0       9 Nov 26 14:04 with a "name"

"""
ANSWERS = {
    "list-filesystems": "/dev/sda1: ext4\n/dev/sda2: swap\n/dev/sda3: xfs\n/dev/vg/lv: unknown\n",
    "vfs-label": "rootfs\n",
    "vfs-uuid": "4ca09a55\n",
    "filesize": "9\n",
    "checksum": "af49\n",
    "statvfs": "bsize: 1024\nfrsize: 1024\nblocks: 100\nbfree: 40\nfiles: 16384\n",
}

if __name__ == "__main__":
    assert sys.argv[1:4] == ["--ro", "--format=raw", "-a"], sys.argv
    for number, line in enumerate(sys.stdin, 1):
        command, *words = shlex.split(line)
        command = command.lstrip("-")
        if command == "echo":
            print(*words, flush=True)
        elif command == "mount-ro" and words[0] == "/dev/sda3":
            said = "libguestfs: error: mount_ro: bad superblock"
            print(f"*stdin*:{number}: {said}", file=sys.stderr, flush=True)
        elif command == "ll":
            sys.stdout.write(LISTING if words == ["/"] else "total 0\n\n")
        elif command in ("filesize", "checksum"):
            assert words[-1] == '/with a "name"', words
            sys.stdout.write(ANSWERS[command])
        else:
            sys.stdout.write(ANSWERS.get(command, ""))
