"""Trying a directory: what works, what does not, and that nothing stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from reconciler.host import trial
from tests.mounts import Mounts


def test_a_directory_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    found = trial.attempt(str(tmp_path), direct=True)
    assert (found.failed, found.direct) == ("", "")
    assert found.fsync > 0
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "link", "write"])
def test_the_step_that_fails_is_named_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refused(*_arguments: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, call, refused)
    found = trial.attempt(str(tmp_path))
    assert call in found.failed
    assert found.failed.endswith("Operation not permitted")
    assert os.listdir(tmp_path) == []


def test_a_full_file_system_is_said(tmp_path: Path, mounts: Mounts) -> None:
    at = tmp_path / "small"
    at.mkdir()
    mounts.small(at, 1).fill(0)
    before = sorted(os.listdir(at))
    assert "No space left on device" in trial.attempt(str(at)).failed
    assert sorted(os.listdir(at)) == before


def test_what_a_killed_trial_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (f"{trial.TRIAL}1", f"{trial.TRIAL}2", "x"))
    for path in (old, young, other):
        path.write_text("")
    past = time.time() - 2 * trial.LEFT
    os.utime(old, (past, past))
    os.utime(other, (past, past))
    assert not trial.attempt(str(tmp_path)).failed
    assert sorted(tmp_path.iterdir()) == sorted([young, other])


def test_what_is_at_a_path(tmp_path: Path) -> None:
    found = trial.room(str(tmp_path))
    assert (found.exists, found.directory, found.owner) == (True, True, os.geteuid())
    assert found.free > 0
    gone = trial.room(str(tmp_path / "a" / "b"))
    assert (gone.exists, gone.nearest, gone.makeable) == (False, str(tmp_path), True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert trial.room(str(link)).real == str(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert not trial.room(str(file)).directory
    assert trial.room(f"{file}/below").error == "Not a directory"
