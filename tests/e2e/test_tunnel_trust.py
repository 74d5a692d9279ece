"""`tunnel trust` on a real sshd: what is shown, what is asked, what is written."""

from __future__ import annotations

import os
import pty
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import HostError
from reconciler.core.tunnel import HostKey
from reconciler.host import host_keys
from tests.e2e.site import ROOT
from tests.e2e.test_render_tunnel import Lab, lab
from tests.ports import Dealer

__all__ = ["lab"]


@pytest.fixture
def hub(lab: Lab) -> Iterator[Lab]:
    """An sshd that answers, and a tunnel whose key is to be in a file."""
    lab.sshd.configure(None)
    lab.sshd.start()
    lab.write_sna(host_key={"file": "hub-a.pub"})
    return lab  # type: ignore[return-value]


def key_of(path: Path) -> HostKey:
    return HostKey.parse(path.with_suffix(".pub").read_text())


def test_a_fingerprint_that_was_given_is_written_and_another_is_not(hub: Lab) -> None:
    mine, other = key_of(hub.sshd.host_key), key_of(hub.sshd.identity)
    file = hub.sna / "specs" / "hub-a.pub"
    said = hub.run(hub.sna, "tunnel", "trust", "hub-a", "--fingerprint", other.fingerprint, code=1)
    assert f"none of its keys has the fingerprint {other.fingerprint}" in said
    assert not file.exists()
    said = hub.run(hub.sna, "tunnel", "trust", "hub-a", "--fingerprint", mine.fingerprint)
    assert f"{mine.fingerprint}  ssh-ed25519" in said
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in said
    assert host_keys.read(str(file)) == mine
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(file.parent.iterdir()) == [*sorted(file.parent.iterdir())]
    assert {one.name for one in file.parent.iterdir()} == {"t.yaml", "hub-a.pub"}
    assert "trusted already" in hub.run(hub.sna, "tunnel", "trust", "hub-a")


def test_another_key_is_never_replaced_unasked(hub: Lab) -> None:
    mine, other = key_of(hub.sshd.host_key), key_of(hub.sshd.identity)
    file = hub.sna / "specs" / "hub-a.pub"
    file.write_text(f"{other} hub-a\n")
    for more in ((), ("--fingerprint", mine.fingerprint)):
        said = hub.run(hub.sna, "tunnel", "trust", "hub-a", *more, code=4)
        assert mine.fingerprint in said
        assert other.fingerprint in said
        assert "reconciler tunnel trust hub-a --replace" in said
        assert host_keys.read(str(file)) == other
    hub.run(hub.sna, "tunnel", "trust", "hub-a", "--replace", "--fingerprint", mine.fingerprint)
    assert host_keys.read(str(file)) == mine
    file.write_text("what is this\n")
    said = hub.run(hub.sna, "tunnel", "trust", "hub-a", "--fingerprint", mine.fingerprint, code=1)
    assert "if it may go: reconciler tunnel trust hub-a --replace" in said
    assert file.read_text() == "what is this\n"


def test_a_host_alone_has_the_line_printed(hub: Lab) -> None:
    mine = key_of(hub.sshd.host_key)
    hub.run(
        hub.sna, "tunnel", "trust", f"127.0.0.1:{hub.sshd.port}", "--fingerprint", mine.fingerprint
    )
    assert hub.printed == f'host_key: "{mine}"\n'
    hub.write_sna(host_key=str(key_of(hub.sshd.identity)))
    said = hub.run(hub.sna, "tunnel", "trust", "hub-a", "--replace", "--fingerprint",
                   mine.fingerprint)  # fmt: skip
    assert "write this into the tunnel at specs/t.yaml:1:" in said
    assert hub.printed == f'host_key: "{mine}"\n'


def test_without_a_terminal_nobody_is_asked(hub: Lab) -> None:
    said = hub.run(hub.sna, "tunnel", "trust", "hub-a", code=64)
    assert "cannot ask without a terminal" in said
    assert key_of(hub.sshd.host_key).fingerprint in said
    assert not (hub.sna / "specs" / "hub-a.pub").exists()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 1), ("n\n", 1)])
def test_a_person_is_asked_and_silence_is_no(hub: Lab, answer: str, code: int) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "reconciler", "tunnel", "trust", "hub-a"],
        cwd=hub.sna, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while b"[y/N]: " not in said and b"[Y/n]: " not in said:
            said += os.read(ours, 4096)
        os.write(ours, answer.encode())
        assert process.wait(20) == code
    finally:
        process.kill()
        process.wait(5)
        os.close(ours)
    assert key_of(hub.sshd.host_key).fingerprint.encode() in said
    assert (hub.sna / "specs" / "hub-a.pub").exists() is (code == 0)


# -- asking


def test_the_layer_that_gives_no_key_is_named() -> None:
    port = Dealer().deal(1)[0]
    with pytest.raises(HostError, match="Connection refused") as refused:
        host_keys.scan("127.0.0.1", port, 2)
    assert refused.value.reason == "HubUnreachable"
    with pytest.raises(HostError, match="the name has no address") as unresolved:
        host_keys.scan("no-such-host.invalid", port, 2)
    assert unresolved.value.reason == "HubUnresolved"
    with socket.create_server(("127.0.0.1", port)) as server:
        stop = threading.Event()

        def web() -> None:
            server.settimeout(0.1)
            while not stop.is_set():
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    continue
                with line:
                    line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=web)
        thread.start()
        try:
            with pytest.raises(HostError, match="no sshd listens there: it says b'HTTP") as web_:
                host_keys.scan("127.0.0.1", port, 2)
        finally:
            stop.set()
            thread.join()
    assert web_.value.reason == "HubNotSsh"


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    key = HostKey("ssh-ed25519", "AAAA")
    with pytest.raises(HostError, match="cannot write"):
        host_keys.write(str(tmp_path / "there"), key, "hub-a")
    assert [one.name for one in tmp_path.iterdir()] == ["there"]
