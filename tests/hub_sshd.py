"""An sshd of a test's own, with the policy that `render sshd` prints for its site."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import until

SSHD = "/usr/sbin/sshd"
USER = getpass.getuser()
DROP_IN = "50-reconciler-tunnel.conf"


class HubSshd:
    """Keys, files and a configuration in one folder; listens between `start` and `stop`."""

    def __init__(self, folder: Path, port: int) -> None:
        if not os.path.exists(SSHD):
            pytest.skip("no sshd here: apt-get install openssh-server")
        self.folder, self.port = folder, port
        folder.mkdir(parents=True)
        if os.geteuid() == 0:
            # systemd makes it for its own; sshd wants it to be there.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.host_key = self.keygen("host_key")
        self.identity = self.keygen("identity")
        self.process: subprocess.Popen[bytes] | None = None

    def keygen(self, name: str, passphrase: str = "") -> Path:
        path = self.folder / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", name, "-f", str(path)],
            check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return path

    def public(self, path: Path) -> str:
        return " ".join(path.with_suffix(".pub").read_text().split()[:2])

    @property
    def config(self) -> Path:
        return self.folder / "sshd_config"

    def configure(self, rendered: Path | None, *before: str) -> None:
        """`rendered`: what render wrote. `before`: lines of a Match block, which win over it."""
        keys = rendered / "authorized_keys" if rendered else self.folder / "authorized_keys"
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.host_key}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            f"Match User {USER}",
            f"AuthorizedKeysFile {keys}",
            *before,
            "Match all",
            *([f"Include {rendered / DROP_IN}"] if rendered else []),
        ]
        self.config.write_text("\n".join(lines) + "\n")

    def effective(self) -> str:
        done = subprocess.run(
            [SSHD, "-T", "-f", str(self.config), "-C", f"user={USER},host=h,addr=192.0.2.1"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.config)], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: listens(self.port), f"sshd: {self.log()}")

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@contextlib.contextmanager
def ssh(
    *arguments: str, log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """OpenSSH's client, ended with the block."""
    with log.open("ab") as words:
        process = subprocess.Popen(
            ["/usr/bin/ssh", *arguments], stdin=subprocess.DEVNULL, stdout=words, stderr=words,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
    try:
        yield process
    finally:
        ended(process)


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started. An ssh may miss a signal in the moment before it sleeps."""
    process.terminate()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
