"""What has changed in a raw file of the reference appliance since an earlier backup."""

from __future__ import annotations

import random
from pathlib import Path

import tracking
from areas import Area
from tracking import KEPT, PIECE, RawFile


def disk(folder: Path, pieces: int, extra: int = 0) -> Path:
    path = folder / "2000.raw"
    path.write_bytes(random.Random(7).randbytes(pieces * PIECE + extra))
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_only_the_pieces_that_differ_are_told(tmp_path: Path) -> None:
    path = disk(tmp_path, 4, extra=512)
    before = RawFile(path).digests()
    tracking.note(path, "u/1", before)
    assert tracking.changed(path, "u/1", before) == ()
    overwrite(path, PIECE + 5, b"!")
    overwrite(path, 4 * PIECE + 511, b"!")
    found = tracking.changed(path, "u/1", RawFile(path).digests())
    assert found == (Area(PIECE, PIECE), Area(4 * PIECE, 512))


def test_of_an_unknown_backup_or_of_another_size_nothing_is_told(tmp_path: Path) -> None:
    path = disk(tmp_path, 2)
    tracking.note(path, "u/1", RawFile(path).digests())
    assert tracking.changed(path, "u/2", RawFile(path).digests()) is None
    disk(tmp_path, 3)
    assert tracking.changed(path, "u/1", RawFile(path).digests()) is None


def test_the_oldest_of_many_go(tmp_path: Path) -> None:
    path = disk(tmp_path, 1)
    digests = RawFile(path).digests()
    for number in range(KEPT + 2):
        tracking.note(path, f"u/{number}", digests)
    known = [tracking.changed(path, f"u/{number}", digests) is not None for number in range(10)]
    assert sum(known) == KEPT
    assert known[-1]


def test_behind_its_end_a_file_is_zeros(tmp_path: Path) -> None:
    path = disk(tmp_path, 0, extra=3)
    assert RawFile(path).read(1, 4) == path.read_bytes()[1:] + b"\0\0"
