"""Files of keys as sshd reads them: with the account's rights; not if others can write them."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.tunnel_doctor import Account
from reconciler.host.accounts import account, key_file
from reconciler.tunnel_doctor import key_files

SOMEBODY = Account(name="tunnel", uid=54321, home="/nonexistent", shell="/bin/sh", shell_works=True)


def keys(folder: Path) -> Path:
    """A file that everybody can read, by folders that everybody can enter."""
    path = folder / "keys" / "tunnel"
    path.parent.mkdir(mode=0o755)
    path.write_text("ssh-ed25519 AAAA x\n")
    path.chmod(0o644)
    return path


def test_an_account_is_as_the_system_says() -> None:
    found = account(getpass.getuser())
    assert found is not None
    assert (found.uid, found.home) == (os.getuid(), os.path.expanduser("~"))
    assert found.shell_works
    assert account("no-such-account") is None


def test_a_file_that_is_not_there_is_missing(tmp_path: Path) -> None:
    found = key_file(str(tmp_path / "none"), SOMEBODY, strict=True)
    assert found.missing
    assert not found.trouble


def test_what_the_account_may_not_read_is_said(tmp_path: Path) -> None:
    path = keys(tmp_path)
    mine = replace(SOMEBODY, uid=os.getuid())  # as owner it may enter what pytest made for itself
    assert key_file(str(path), mine, strict=False).text.startswith("ssh-ed25519")
    assert not key_file(str(path), mine, strict=False).trouble
    if os.getuid() == 0:
        tmp_path.chmod(0o700)
        found = key_file(str(path), SOMEBODY, strict=False)
        assert "tunnel may not enter " in found.trouble
        path.chmod(0o600)
        assert f"tunnel may not read {path}" in key_file(str(path), SOMEBODY, strict=False).trouble


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_can_write_is_not_used_with_strict_modes(tmp_path: Path, which: str) -> None:
    path = keys(tmp_path)
    mine = replace(SOMEBODY, uid=os.getuid(), home=str(path.parent))
    assert not key_file(str(path), mine, strict=True).trouble
    wrong = path if which == "file" else path.parent
    wrong.chmod(0o777 if which == "folder" else 0o666)
    assert f"{wrong} can be written by others" in key_file(str(path), mine, strict=True).trouble
    assert not key_file(str(path), mine, strict=False).trouble


def test_tokens_and_relative_paths_are_the_accounts() -> None:
    written = [".ssh/authorized_keys", "/etc/ssh/keys/%u", "%h/k", "/a%%b", "none"]
    assert key_files(written, SOMEBODY) == [
        "/nonexistent/.ssh/authorized_keys", "/etc/ssh/keys/tunnel", "/nonexistent/k", "/a%b",
    ]  # fmt: skip
