"""Both ends as files: OpenSSH and systemd accept them, they say the same, and they carry bytes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.cli.main import run
from reconciler.cli.rendering import ssh_word, tokens
from reconciler.core.doctor import document
from reconciler.core.errors import HostError
from reconciler.core.sshd import compare, effective, policy
from reconciler.core.tunnel import forwards, options
from reconciler.doctor import Doctor
from reconciler.host.host_keys import pinned
from reconciler.loop import load_settings
from reconciler.tunnel_doctor import listeners
from reconciler.tunnels import named
from tests.e2e.site import ROOT, until
from tests.e2e.test_render import analyze, values
from tests.hub_sshd import DROP_IN, SSHD, USER, HubSshd, ended, listens, ssh
from tests.ports import Dealer

NEAR = "127.0.0.2"
"""The appliance's side, as another machine's loopback would be."""


MOST_EXPOSED = 1.7
"""systemd's own score, from 0 (nothing is exposed) to 10. It has 1.5."""


class Lab:
    """A hub and an appliance on one machine, told apart by their loopback addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = Dealer().deal(6)
        self.range, self.api, self.reverse, self.own = ports[:3], ports[3], ports[4], ports[5]
        self.sshd = HubSshd(folder / "sshd", Dealer().deal(1)[0])
        self.hub, self.sna = folder / "hub", folder / "sna"
        self.hub.mkdir()
        (self.sna / "specs").mkdir(parents=True)
        self.write_hub()
        self.write_sna()

    def write_hub(self, **changes: Any) -> None:
        value = {
            "hub": "hub-a",
            "state": "state",
            "tunnel": {"user": USER},
            "ports": {"range": f"{self.range[0]}-{self.range[-1]}"},
            "api": {"listen": f"127.0.0.1:{self.api}"},
            "snas": {"site-a": {"url": f"http://127.0.0.1:{self.reverse}", "timeout": "1s",
                                "connect_timeout": "1s"}},
            **changes,
        }  # fmt: skip
        (self.hub / "reconciler.yaml").write_text(json.dumps(value))

    def write_sna(self, **changes: Any) -> None:
        (self.sna / "reconciler.yaml").write_text(json.dumps({"hub": "sna-a", "state": "state"}))
        spec = {
            "name": "hub-a",
            "state": "down",
            "hub": {"host": "127.0.0.1", "port": self.sshd.port},
            "user": USER,
            "identity": {"file": str(self.sshd.identity)},
            "host_key": self.sshd.public(self.sshd.host_key),
            "forward": {"ports": f"{self.range[0]}-{self.range[-1]}", "api": self.api,
                        "bind": NEAR},
            "reverse": {"port": self.reverse, "to": f"{NEAR}:{self.own}"},
            **changes,
        }  # fmt: skip
        (self.sna / "specs" / "t.yaml").write_text(json.dumps({"tunnels": [spec]}))

    def run(self, where: Path, *arguments: str, code: int = 0) -> str:
        """stdout and stderr, in this very process."""
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(where),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            assert run(arguments) == code, err.getvalue()
        self.printed = out.getvalue()
        return self.printed + err.getvalue()

    def render_hub(self, *arguments: str) -> Path:
        key = self.sshd.identity.with_suffix(".pub")
        self.run(self.hub, "render", "sshd", "--key", str(key), "--output", "out", *arguments)
        return self.hub / "out"

    def render_sna(self, *arguments: str) -> Path:
        """The files; the ssh_config finds the others where they are."""
        self.run(self.sna, "render", "tunnel", "hub-a", "--output", "out", *arguments)
        for path in (self.sna / "out").glob("*.ssh_config"):
            text = path.read_text().replace("/etc/reconciler/tunnels", str(self.sna / "out"))
            path.write_text(text)
        return self.sna / "out"

    def doctor(self, where: Path | None = None) -> dict[str, dict[str, Any]]:
        """Id → check, of the hub or another folder."""
        with contextlib.chdir(where or self.hub):
            settings = load_settings("reconciler.yaml", {})
            checks = Doctor(settings, {}).checks(["tunnel"])
        return {one["id"]: one for one in document("hub-a", checks)["checks"]}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    before = signal.getsignal(signal.SIGTERM)
    found = Lab(tmp_path / "lab")
    try:
        yield found
    finally:
        found.sshd.stop()
        signal.signal(signal.SIGTERM, before)


class Speaker:
    """Answers the first bytes of each connection, and keeps what it heard."""

    def __init__(self, host: str, port: int, says: bytes) -> None:
        self.socket = socket.create_server((host, port))
        self.says, self.heard = says, b""
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self.socket.accept()
            except OSError:
                return
            with line:
                self.heard += line.recv(4096)
                line.sendall(self.says)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)


@contextlib.contextmanager
def speaking(host: str, port: int, says: bytes) -> Iterator[Speaker]:
    found = Speaker(host, port, says)
    try:
        yield found
    finally:
        found.close()


def asks(host: str, port: int, says: bytes) -> bytes:
    with socket.create_connection((host, port), 5) as line:
        line.sendall(says)
        return line.recv(4096)


HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


# -- the hub's side


def test_sshd_accepts_the_policy_and_says_it_back(lab: Lab) -> None:
    lab.sshd.configure(lab.render_hub())
    done = subprocess.run([SSHD, "-t", "-f", str(lab.sshd.config)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = policy(load_settings(str(lab.hub / "reconciler.yaml"), {}))
    said = effective(lab.sshd.effective())
    assert compare(wanted, said) == []
    assert said["permitopen"] == [str(one) for one in wanted.opens]
    assert said["maxsessions"] == ["0"]


def test_a_policy_that_is_not_there_is_a_list_of_differences(lab: Lab) -> None:
    lab.sshd.configure(None)
    wanted = policy(load_settings(str(lab.hub / "reconciler.yaml"), {}))
    found = {one.keyword for one in compare(wanted, effective(lab.sshd.effective()))}
    assert {
        "ClientAliveInterval",
        "PermitOpen",
        "PermitListen",
        "MaxSessions",
        "PermitTTY",
    } <= found


def test_the_policy_is_one_users_and_what_follows_is_not_in_it(lab: Lab) -> None:
    rendered = lab.render_hub("--user", "somebody-else") / DROP_IN
    lab.sshd.configure(None)
    # Not included, which ends a block by itself, but written into the file.
    with lab.sshd.config.open("a") as file:
        file.write(f"{rendered.read_text()}\nMaxSessions 7\n")
    assert "maxsessions 7" in lab.sshd.effective()


def test_a_second_port_keeps_the_first(lab: Lab) -> None:
    text = (lab.render_hub("--port", "443") / DROP_IN).read_text()
    assert re.findall(r"^Port (\d+)$", text, re.MULTILINE) == ["22", "443"]
    assert text.index("Port 443") < text.index("Match User")
    assert "Port " not in (lab.render_hub() / DROP_IN).read_text()


def test_each_appliance_has_its_own_reverse_port_and_none_is_given_twice(lab: Lab) -> None:
    a, b = lab.sshd.keygen("a"), lab.sshd.keygen("b")
    snas = {name: {"url": f"http://127.0.0.1:{lab.reverse + i}"} for i, name in enumerate("ab")}
    lab.write_hub(snas={**snas, "far": {"url": "http://10.0.0.5:9081"}})
    said = lab.run(lab.hub, "render", "sshd", "--key", f"a={a}.pub", "--key", f"b={b}.pub")
    assert "SNA far is left out: its url http://10.0.0.5:9081 is no port of this machine" in said
    for name, key, port in (("a", a, lab.reverse), ("b", b, lab.reverse + 1)):
        (line,) = [one for one in said.splitlines() if one.endswith(f" {name}")
                   and one.startswith("restrict,port-forwarding")]  # fmt: skip
        assert re.findall('permitlisten="([^"]*)"', line) == [f"127.0.0.1:{port}"]
        assert lab.sshd.public(key) in line
    assert "install -o root -g root -m 0644 authorized_keys /etc/ssh" in lab.printed
    # Who renders for one of them leaves the others as they are.
    lab.run(lab.hub, "render", "sshd", "--sna", "b", "--key", f"{b}.pub")
    assert f"PermitListen 127.0.0.1:{lab.reverse} 127.0.0.1:{lab.reverse + 1}\n" in lab.printed
    assert "cat authorized_keys >> /etc/ssh/authorized_keys.d/" in lab.printed
    assert "restrict,port-forwarding" in lab.printed and lab.sshd.public(a) not in lab.printed
    said = lab.run(lab.hub, "render", "sshd", "--key", f"a={a}.pub", "--key", f"b={a}.pub", code=64)
    assert "a and b have the same key" in said
    said = lab.run(lab.hub, "render", "sshd", "--key", f"{a}.pub", code=64)
    assert f"say whose it is: a={a}.pub or b={a}.pub" in said
    lab.write_hub(snas={name: {"url": "http://127.0.0.1:9081"} for name in "ab"})
    said = lab.run(lab.hub, "render", "sshd", code=1)
    assert "a and b both have port 9081" in said


def test_a_private_key_is_refused_and_not_shown(lab: Lab) -> None:
    key = lab.sshd.identity
    said = lab.run(lab.hub, "render", "sshd", "--key", str(key), code=1)
    assert f"it is a private key, which stays where it was made; the hub needs {key}.pub" in said
    assert key.read_text().splitlines()[1] not in said


def test_without_an_appliance_behind_a_port_there_is_nothing_to_permit(lab: Lab) -> None:
    lab.write_hub(snas={"far": {"url": "http://10.0.0.5:9081"}})
    assert "no SNA of the config is reached" in lab.run(lab.hub, "render", "sshd", code=1)
    assert "no SNA 'fra'; did you mean 'far'?" in lab.run(
        lab.hub, "render", "sshd", "--sna", "fra", code=64
    )


# -- the appliance's side


@pytest.mark.parametrize("split", [False, True])
def test_ssh_reads_what_the_tunnel_says(lab: Lab, split: bool) -> None:
    lab.write_sna(split=split, ciphers=["aes128-gcm@openssh.com"])
    folder = lab.render_sna()
    with contextlib.chdir(lab.sna):
        one = named("hub-a", (), load_settings(None, {}))
    key, _ = pinned(one)
    assert key is not None
    for part in one.parts:
        name = f"hub-a-{part}" if split else "hub-a"
        done = subprocess.run(
            ["ssh", "-G", "-F", str(folder / f"{name}.ssh_config"), "hub-a"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        said: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            keyword, _, value = line.partition(" ")
            said.setdefault(keyword, []).append(value)
        told = options(one, str(lab.sshd.identity), str(folder / "hub-a.known_hosts"))
        for keyword, value in told.items():
            # ssh prints some words its own way; ControlPath none is as if it were not there.
            also = {"yes": "true", "no": "false", "none": "none none"}.get(value, value)
            if keyword != "ControlPath":
                assert {value, also} & set(said[keyword.lower()]), (keyword, said[keyword.lower()])
        wanted = list(forwards(one, part))
        plain = {kind: [f"{a} {b}" for k, a, b in wanted if k == kind]
                 for kind in ("LocalForward", "RemoteForward")}  # fmt: skip
        for kind, lines in plain.items():
            seen = [re.sub(r"\[([^\]:]*)\]", r"\1", line) for line in said.get(kind.lower(), [])]
            assert seen == lines


@pytest.mark.parametrize("credential", [False, True])
def test_systemd_accepts_the_units_and_finds_them_hardened(lab: Lab, credential: bool) -> None:
    identity = {"credential": "tunnel key"} if credential else {"file": "/etc/reconciler/key"}
    lab.write_sna(split=True, identity=identity)
    folder = lab.render_sna()
    units = sorted(path.name for path in folder.glob("*.service"))
    assert units == [
        "reconciler-tunnel-hub-a-control.service",
        "reconciler-tunnel-hub-a-data.service",
    ]
    done = analyze("verify", *(f"./{name}" for name in units), folder=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = analyze(
        "security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager",
        *(f"./{name}" for name in units), folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    text = (folder / units[0]).read_text()
    head, _, service = text.partition("\n[Service]\n")
    assert "StartLimitIntervalSec=0" in head
    assert "StartLimit" not in service
    assert values(text, "Restart") == ["always"]
    (command,) = values(text, "ExecStart")
    assert command == "/usr/bin/ssh -F /etc/reconciler/tunnels/hub-a-control.ssh_config -N -T hub-a"
    config = (folder / "hub-a-control.ssh_config").read_text()
    if credential:
        assert values(text, "LoadCredential") == [
            "tunnel key:/etc/reconciler/credentials/tunnel key"
        ]
        assert 'IdentityFile "${CREDENTIALS_DIRECTORY}/tunnel key"' in config
    else:
        assert values(text, "LoadCredential") == []
        assert "IdentityFile /etc/reconciler/key" in config


def test_no_secret_is_in_what_is_rendered(lab: Lab) -> None:
    token = lab.sna / "token"
    token.write_text("the-token-of-the-hub")
    lab.write_sna(token={"file": str(token)})
    private = lab.sshd.identity.read_text().splitlines()[1:-1]
    for folder in (lab.render_hub(), lab.render_sna()):
        assert {path.name for path in folder.iterdir()} >= {"install.txt"}
        for path in folder.iterdir():
            text = path.read_text()
            assert "PRIVATE" not in text
            assert "the-token-of-the-hub" not in text
            assert not any(line in text for line in private), path


def test_what_is_printed_is_what_is_written(lab: Lab) -> None:
    lab.run(lab.sna, "render", "tunnel", "hub-a", "--output", "out")
    lab.run(lab.sna, "render", "tunnel", "hub-a")
    folder = lab.sna / "out"
    pieces = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(re.findall(r"^# ([\w.-]+)\n", "\n" + lab.printed, re.MULTILINE)) == sorted(pieces)
    assert all(text in lab.printed for text in pieces.values())
    assert all(name in pieces["install.txt"] for name in pieces if name != "install.txt")


def test_a_tunnel_without_a_trusted_key_is_not_rendered(lab: Lab) -> None:
    lab.write_sna(host_key={"file": "hub-a.pub"})
    said = lab.run(lab.sna, "render", "tunnel", "hub-a", code=1)
    assert "see: reconciler tunnel trust hub-a" in said
    assert "there is no tunnel 'hub-b'; did you mean 'hub-a'?" in lab.run(
        lab.sna, "render", "tunnel", "hub-b", code=64
    )


# -- both


def test_both_ends_as_rendered_carry_bytes_both_ways_without_this_program(lab: Lab) -> None:
    lab.sshd.configure(lab.render_hub())
    lab.sshd.start()
    folder = lab.render_sna()
    log = lab.folder / "ssh.log"
    with (
        ssh("-F", str(folder / "hub-a.ssh_config"), "-N", "-T", "hub-a", log=log) as process,
        speaking("127.0.0.1", lab.range[1], b"of the hub") as export,
        speaking(NEAR, lab.own, HEALTHY) as appliance,
    ):
        until(lambda: listens(lab.reverse), f"{log.read_text()} {lab.sshd.log()}")
        assert asks(NEAR, lab.range[1], b"of the appliance") == b"of the hub"
        assert export.heard.endswith(b"of the appliance")
        assert asks("127.0.0.1", lab.reverse, b"GET / HTTP/1.1\r\n\r\n") == HEALTHY
        assert b"GET / HTTP/1.1" in appliance.heard
        # What the policy does not name is refused, though the key is the same.
        done = subprocess.run(
            ["ssh", "-F", str(folder / "hub-a.ssh_config"), "-o", "ClearAllForwardings=yes",
             "hub-a", "echo", "a-shell"], capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        assert done.returncode != 0
        assert "a-shell" not in done.stdout
        if USER == "root":
            checks = lab.doctor()
            assert {one["status"] for one in checks.values()} == {"ok"}, checks
            held = checks["tunnel.site-a.reverse"]["observed"]
            assert "held by sshd (pid " in held
            assert f"user {USER}, from 127.0.0.1:" in held
            assert "GET /api/v1/health: 200" in held
            assert str(lab.sshd.config) in checks["tunnel.sshd"]["observed"]
        assert process.poll() is None


@pytest.mark.skipif(USER != "root", reason="what sshd permits is root's to see")
def test_doctor_names_what_a_running_sshd_gets_wrong(lab: Lab) -> None:
    lab.sshd.configure(
        lab.render_hub(), "GatewayPorts yes", "ClientAliveInterval 0", "PermitTTY yes",
        f"PermitOpen 127.0.0.1:{lab.range[0]}",
    )  # fmt: skip
    lab.sshd.start()
    folder = lab.render_sna()
    log = lab.folder / "ssh.log"
    with ssh("-F", str(folder / "hub-a.ssh_config"), "-N", "-T", "hub-a", log=log):
        until(lambda: listens(lab.reverse), f"{log.read_text()} {lab.sshd.log()}")
        checks = lab.doctor()
        assert checks["tunnel.policy.gatewayports"]["status"] == "warning"
        assert checks["tunnel.policy.permittty"]["status"] == "warning"
        assert checks["tunnel.policy.clientaliveinterval"]["fix"].startswith(
            "ClientAliveInterval 3; the whole block: reconciler render sshd"
        )
        assert f"lacks 127.0.0.1:{lab.range[1]}" in checks["tunnel.policy.permitopen"]["observed"]
        # Nobody is behind the reverse port; the session that holds it is named, and how to end it.
        held = checks["tunnel.site-a.reverse"]
        assert held["status"] == "failed"
        assert "nobody answers: the appliance is down, or the link to it" in held["observed"]
        pid = int(held["fix"].rpartition("kill ")[2])
        assert f"(pid {pid}, user {USER}" in held["observed"]
        assert checks["tunnel.site-a.reverse.open"]["status"] == "warning"
    until(lambda: not listens(lab.reverse), "the end of the session")
    with speaking("127.0.0.1", lab.reverse, b"no HTTP"):
        checks = lab.doctor()
        held = checks["tunnel.site-a.reverse"]
        assert "which is no sshd, so no appliance can have it" in held["observed"]
        assert held["status"] == "failed"


def test_an_appliance_of_the_same_machine_needs_no_sshd(lab: Lab) -> None:
    with speaking("127.0.0.1", lab.reverse, HEALTHY):
        checks = lab.doctor()
    assert list(checks) == ["tunnel.site-a.reverse"]
    assert "of this machine answers itself; no tunnel leads there" in str(checks)
    lab.write_hub(snas={})
    assert {one["status"] for one in lab.doctor().values()} == {"ok"}


def test_ssh_does_its_work_in_the_sandbox_of_its_unit(lab: Lab) -> None:
    lab.sshd.configure(lab.render_hub())
    lab.sshd.start()
    folder = lab.render_sna()
    with (lab.folder / "ssh.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.sandbox", str(folder / "reconciler-tunnel-hub-a.service"),
             "/usr/bin/ssh", "-F", str(folder / "hub-a.ssh_config"), "-N", "-T", "hub-a"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
        )  # fmt: skip
    try:
        with speaking("127.0.0.1", lab.range[1], b"of the hub"):
            until(lambda: listens(lab.reverse), str(lab.folder))
            assert asks(NEAR, lab.range[1], b"x") == b"of the hub"
    finally:
        ended(process)


def test_doctor_looks_at_what_an_appliance_dials_with(lab: Lab) -> None:
    lab.sshd.configure(lab.render_hub())
    lab.sshd.start()
    lab.write_sna(state="up")
    checks = lab.doctor(lab.sna)
    assert {one["status"] for one in checks.values()} == {"ok"}, checks
    assert checks["tunnel.hub-a.ssh"]["observed"].startswith("OpenSSH")
    assert "mode 0600, a private key without a passphrase" in str(checks["tunnel.hub-a.identity"])
    # Each of these keeps ssh from coming up, and each is named with what helps.
    locked = lab.sshd.keygen("locked", "a passphrase")
    lab.write_sna(
        state="up", identity={"file": str(locked)}, host_key=lab.sshd.public(lab.sshd.identity)
    )
    with socket.create_server((NEAR, lab.range[2])):
        checks = lab.doctor(lab.sna)
    assert checks["tunnel.hub-a.identity"]["fix"] == f"ssh-keygen -p -N '' -f {locked}"
    assert "reconciler tunnel trust hub-a --replace" in checks["tunnel.hub-a.hub"]["fix"]
    assert f"{NEAR}:{lab.range[2]} is held by" in checks["tunnel.hub-a.ports"]["observed"]
    lab.sshd.identity.chmod(0o644)
    lab.write_sna(state="up", host_key={"file": "hub-a.pub"}, hub={"host": "no-such.invalid"})
    checks = lab.doctor(lab.sna)
    assert checks["tunnel.hub-a.identity"]["fix"] == f"chmod 600 {lab.sshd.identity}"
    assert checks["tunnel.hub-a.host_key"]["fix"] == "reconciler tunnel trust hub-a"
    assert checks["tunnel.hub-a.hub"]["fix"].startswith("getent hosts no-such.invalid")
    lab.write_sna(state="up", host_key=None)
    checks = lab.doctor(lab.sna)
    assert "the key 'host_key' is missing" in checks["tunnel.declared"]["observed"]
    lab.write_sna()
    assert "declared to be down" in lab.doctor(lab.sna)["tunnel.hub-a"]["observed"]


def test_without_root_what_is_not_ours_to_see_is_no_failure(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.sshd.configure(lab.render_hub())
    lab.sshd.start()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    check = lab.doctor()["tunnel.policy"]
    assert check["status"] == "unknown"
    assert check["fix"] == "needs root: sudo reconciler doctor --only tunnel"


@pytest.mark.skipif(USER != "root", reason="a network of its own takes root")
def test_an_sshd_of_another_network_is_not_this_machines(lab: Lab) -> None:
    lab.sshd.configure(lab.render_hub())
    lab.sshd.start()
    assert lab.sshd.process is not None
    assert lab.sshd.process.pid in {one.pid for one in listeners()}
    lab.sshd.stop()
    process = subprocess.Popen(["unshare", "--net", SSHD, "-D", "-f", str(lab.sshd.config)],
                               stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        until(lambda: b"[listener]" in command(process.pid), "sshd")
        assert process.pid not in {one.pid for one in listeners()}
    finally:
        ended(process)
        assert process.stderr is not None
        process.stderr.close()


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("/etc/key", "/etc/key"),
        ("/etc/a key", '"/etc/a key"'),
        ("/etc/100%h", "/etc/100%%h"),
        ("/etc/#1", '"/etc/#1"'),
    ],
)
def test_nothing_in_a_path_is_special_to_ssh(path: str, written: str) -> None:
    assert ssh_word(tokens(path)) == written


@pytest.mark.parametrize("path", ["/etc/${HOME}/key", '/etc/"key"', "/etc/key\nProxyCommand sh"])
def test_a_path_that_ssh_would_take_for_something_else_is_refused(path: str) -> None:
    with pytest.raises(HostError, match="cannot write"):
        ssh_word(tokens(path))
