"""What a real ssh leaves in its log, and which private keys it takes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.host import processes, ssh

pytestmark = pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def started(log: Path, port: int) -> int:
    line = ["ssh", "-F", "none", "-N", "-o", "BatchMode=yes", "-p", str(port), "127.0.0.1"]
    return ssh.spawn(ssh.find(), line, log)


def ended(pid: int) -> None:
    os.waitpid(pid, 0)
    processes.reap(pid)


def test_words_are_of_the_last_ssh_and_not_of_one_before_it(
    tmp_path: Path, silent: socket.socket
) -> None:
    log = tmp_path / "logs" / "a.log"
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    ended(started(log, port))
    assert "Connection refused" in ssh.words(log)
    pid = started(log, silent.getsockname()[1])
    silent.accept()[0].close()
    ended(pid)
    assert "kex_exchange_identification" in ssh.words(log)
    assert "refused" not in ssh.words(log), "a cause that is over is told as today's"
    pid = started(log, silent.getsockname()[1])
    line = silent.accept()[0]
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    line.close()
    assert ssh.words(log) == "", "who was killed said nothing"
    assert "Connection refused" in log.read_text(), "a person still finds what was"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_takes_nothing_holds_no_ssh_up(tmp_path: Path, silent: socket.socket) -> None:
    for log in (Path("/dev/full"), tmp_path / "file" / "a.log"):
        (tmp_path / "file").write_text("where a directory should be")
        pid = started(log, silent.getsockname()[1])
        silent.settimeout(10)
        line = silent.accept()[0]
        line.close()
        ended(pid)


def test_the_last_of_many_words_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("channel 3: open failed: connect failed: Connection refused\n" * 3000 + "end\n")
    assert ssh.words(log).splitlines()[-1] == "end"
    assert len(ssh.words(log).splitlines()) == ssh.LINES


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ed25519", ""),
        ("rsa in PEM", ""),
        ("locked", "has a passphrase"),
        ("locked PEM", "has a passphrase"),
        ("open", "chmod 600"),
        ("public", "a public key, not the private one"),
        ("text", "is no private key"),
        ("directory", "is a directory"),
        ("none", "ssh-keygen -t ed25519"),
    ],
)
def test_a_private_key_is_judged_as_ssh_keygen_judges_it(
    tmp_path: Path, kind: str, said: str
) -> None:
    path = tmp_path / "key"
    secret = "correct horse" if "locked" in kind else ""
    pem = ["-t", "rsa", "-b", "2048", "-m", "PEM"] if "PEM" in kind else ["-t", "ed25519"]
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("hello\n")
        path.chmod(0o600)
    elif kind != "none":
        line = ["ssh-keygen", "-q", *pem, "-N", secret, "-f", str(path)]
        subprocess.run(line, check=True)
    if kind == "open":
        path.chmod(0o640)
    if kind == "public":
        path = path.with_suffix(".pub")
        path.chmod(0o600)
    found = ssh.key_trouble(str(path))
    assert (said in found) if said else not found, found
    assert not secret or secret not in found
    # ssh's own opinion: whether it can read the key without asking anybody.
    line = ["ssh-keygen", "-y", "-P", "", "-f", str(path)]
    taken = not subprocess.run(line, capture_output=True, stdin=subprocess.DEVNULL).returncode
    assert taken == (not found)
