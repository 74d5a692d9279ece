"""Requests for runs on a real file system: whole or not at all, for all or for none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.core.errors import HostError
from reconciler.host.files import NothingNamed, requested, texts_of
from reconciler.host.requests import path, prepare, write


def there(directory: Path) -> dict[str, str]:
    return {one.name: one.read_text() for one in sorted(directory.iterdir())}


def test_requests_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "runs"
    prepare(folder)
    prepare(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    write(folder, {"ctx-1": "one", "ctx-2": "two"})
    write(folder, {"ctx-1": "three"})
    assert there(folder) == {"ctx-1.yaml": "three", "ctx-2.yaml": "two"}
    assert path(folder, "ctx-1").stat().st_mode & 0o777 == 0o600


def test_what_a_crash_left_is_written_over_and_never_read(tmp_path: Path) -> None:
    (tmp_path / ".ctx-1.writing").write_text("much longer than what comes, and torn")
    assert requested(str(tmp_path)) == []
    write(tmp_path, {"ctx-1": "one"})
    assert there(tmp_path) == {"ctx-1.yaml": "one"}


FULL = """
import resource, signal, sys
from pathlib import Path
from reconciler.core.errors import HostError
from reconciler.host.requests import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    write(Path(sys.argv[1]), {"ctx-1": "new", "ctx-2": "more than ten bytes"})
except HostError as error:
    print(error)
"""


def test_a_disk_that_is_full_changes_nothing(tmp_path: Path) -> None:
    """The second file does not fit: the first, which did, is not put in place either."""
    write(tmp_path, {"ctx-1": "old", "ctx-2": "old"})
    line = [sys.executable, "-c", FULL, str(tmp_path)]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "cannot write the request" in said
    assert f"df {tmp_path}" in said
    assert there(tmp_path) == {"ctx-1.yaml": "old", "ctx-2.yaml": "old"}


def test_everything_is_on_the_disk_before_anything_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(fd: int) -> None:
        order.append("sync of " + ("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"))
        fsync(fd)

    def replaced(old: str, new: str) -> None:
        order.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path, {"ctx-1": "one", "ctx-2": "two"})
    assert order == ["sync of file"] * 2 + ["rename"] * 2 + ["sync of directory"]


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(HostError, match="cannot make the directory"):
        prepare(tmp_path / "state" / "runs")
    with pytest.raises(HostError, match=r"cannot read .*: Not a directory"):
        requested(str(tmp_path / "state" / "runs"))


def test_specs_need_not_be_there_where_runs_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "runs")
    with pytest.raises(NothingNamed, match="cannot read specs"):
        texts_of([], folder)
    assert texts_of([], folder, asking=True) == ([], [])
    with pytest.raises(NothingNamed, match="cannot read other"):
        texts_of(["other"], folder, asking=True)
    prepare(Path(folder))
    with pytest.raises(NothingNamed, match="cannot read specs"):
        texts_of([], folder)
    write(Path(folder), {"ctx-1": "one"})
    written, asked = texts_of([], folder)
    assert (written, [text.text for text in asked]) == ([], ["one"])
    (tmp_path / "specs").mkdir()
    assert texts_of([], folder)[0] == []
    with pytest.raises(NothingNamed, match="cannot read other"):
        texts_of(["other"], folder)
    (tmp_path / "specs" / "vms.yaml").write_text("two")
    assert [text.text for text in texts_of([], folder)[0]] == ["two"]
