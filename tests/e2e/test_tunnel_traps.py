"""What went wrong in the field, each first as it did there, named by us; then as it is right."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.tunnel import Reach, Tunnel
from reconciler.core.tunnel_faults import fault
from reconciler.core.units import PortRange
from tests.e2e.site import Site, until
from tests.e2e.test_tunnel import ready, tunnel
from tests.lab import HUB, PORT, Lab, laboratory, missing, policy

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path / "lab") as found:
        yield found


@pytest.fixture
def sna(lab: Lab, tmp_path: Path) -> Site:
    return lab.sna(tmp_path / "sna")


WANTED = Tunnel(name="hub-a", host=HUB, port=PORT, user="root")


def by_hand(lab: Lab, *forwards: str, seconds: float = 10) -> str:
    """What ssh says before it ends, with forwards as somebody would write them."""
    folder = lab.sshd.folder
    known = folder / "known"
    known.write_text(f"[{HUB}]:{PORT} {lab.sshd.key()}\n")
    line = [*("ssh", "-F", "none", "-N", "-o", "BatchMode=yes", "-p", str(PORT)),
            *("-o", "ExitOnForwardFailure=yes", "-o", f"UserKnownHostsFile={known}"),
            *("-i", str(folder / "id"), *forwards, HUB)]  # fmt: skip
    process = lab.run_in(lab.sna_ns, line, stderr=subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    return said.decode()


def connected(site: Site) -> bool:
    found = next(c for c in tunnel(site)["conditions"] if c["type"] == "Connected")
    return bool(found["status"] == "True")


def test_a_reverse_port_without_an_address_is_refused_and_ours_has_one(lab: Lab, sna: Site) -> None:
    said = by_hand(lab, "-R", "9081:127.0.0.1:8081")
    assert fault(said, WANTED).reason == "ReverseRefused", said
    assert "PermitListen 127.0.0.1:9081" in fault(said, WANTED).message
    sna.apply(code=3)  # nobody answers behind it, but it is let in
    assert connected(sna)
    assert tunnel(sna)["reverse"] == "127.0.0.1:9081"


def test_permit_listen_says_nothing_about_forwards_and_each_missing_port_is_named(
    lab: Lab, sna: Site
) -> None:
    every = " ".join(f"127.0.0.1:{port}" for port in (9081, 8082, *range(10100, 10201)))
    some = " ".join(f"127.0.0.1:{p}" for p in (8082, *range(10100, 10201)) if p != 10150)
    lab.sshd.policy = policy(lab.reach, PermitListen=every, PermitOpen=some)
    lab.sshd.restart()
    said = sna.apply(code=1)
    assert "does not permit forwards to 127.0.0.1 port 10150 (PermitOpen)" in said
    assert tunnel(sna)["connections"][0]["refused"] == [10150]
    assert ready(sna) == ("False", "ForwardRefused")
    assert "on the hub: reconciler doctor --only tunnel" in sna.run("explain", "tunnel/hub-a")
    lab.sshd.policy = policy(lab.reach)
    lab.sshd.restart()
    sna.apply(code=3)
    assert tunnel(sna)["connections"][0]["refused"] == []
    assert ready(sna) == ("False", "HubApiSilent")


def test_a_connect_through_ssh_always_succeeds_so_only_an_answer_counts(
    lab: Lab, sna: Site
) -> None:
    sna.apply(code=3)
    assert lab.connects(lab.sna_ns, 10150), "ssh itself takes the connection"
    assert lab.connects(lab.sna_ns, 8082)
    assert ready(sna) == ("False", "HubApiSilent")
    lab.answering()
    assert ready(sna) == ("True", "Healthy")


def test_an_export_that_is_said_to_be_up_and_does_not_greet_is_named(lab: Lab, sna: Site) -> None:
    lab.answering()
    disks = (
        '[{"nbd_port": 10107, "status": "qemu_started"}, {"nbd_port": 10108, "status": "failed"}]'
    )
    answer = lab.folder / "answers" / "api/v1/backups"
    answer.write_text(f'{{"backups": [{{"disk_results": {disks}}}]}}')
    sna.apply(code=3)
    assert ready(sna) == ("False", "ExportSilent")
    said = sna.run("explain", "tunnel/hub-a")
    assert (
        "no NBD greeting comes through 127.0.0.1:10107: the connection was closed at once" in said
    )
    image = lab.folder / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", str(image), "1M"], check=True)
    serve = ["qemu-nbd", "--persistent", "--format=raw", "--bind=127.0.0.1", "--port=10107"]
    lab.run_in(lab.hub_ns, [*serve, str(image)])
    until(lambda: ready(sna) == ("True", "Healthy"), "a greeting")


def hold(lab: Lab, port: int) -> subprocess.Popen[bytes]:
    """A process at the appliance that has a port."""
    line = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(1)"
    line += "; time.sleep(600)"
    process = lab.run_in(lab.sna_ns, [sys.executable, "-uSc", line], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    return process


def test_one_busy_local_port_takes_all_forwards_down_and_its_holder_is_named_before(
    lab: Lab, sna: Site
) -> None:
    holder = hold(lab, 10150)
    many: Sequence[str] = [
        word
        for port in range(10149, 10152)
        for word in ("-L", f"127.0.0.1:{port}:127.0.0.1:{port}")
    ]
    said = by_hand(lab, *many)
    assert (fault(said, WANTED).reason, fault(said, WANTED).port) == ("LocalPortBusy", 10150)
    said = sna.apply(code=3)
    assert re.search(rf"127.0.0.1:10150 is held by python\S* \(pid {holder.pid}\)", said), said
    log = sna.folder / "state" / "logs" / "tunnel-hub-a-whole.log"
    assert not log.exists(), "ssh was started all the same"
    assert ready(sna) == ("False", "LocalPortBusy")
    holder.kill()
    holder.communicate()
    sna.apply(code=3)
    assert connected(sna)


def test_a_stale_session_keeps_the_reverse_port_unless_the_hub_asks_for_life(
    lab: Lab, sna: Site
) -> None:
    for alive, freed in ((0, False), (1, True)):
        lab.sshd.policy = policy(lab.reach, alive=alive)
        lab.sshd.restart()
        sna.apply(code=3)
        assert connected(sna)
        lab.cut()
        (row,) = tunnel(sna)["connections"]
        os.kill(row["pid"], signal.SIGKILL)  # as when the appliance loses its power
        until(lambda: tunnel(sna)["connections"][0]["pid"] is None, "the end of ssh")
        lab.reborn()
        lab.mend()
        if not freed:
            said = sna.apply(code=1)
            assert "does not let us listen on 127.0.0.1:9081" in said
            assert ready(sna) == ("False", "ReverseRefused")
            assert lab.sshd.sessions(), "the stale session is what holds it"
        else:
            until(lambda: sna.apply(code=None) and connected(sna), "the port to be free", 30)


@pytest.mark.soak
def test_a_hub_that_asks_often_keeps_a_dead_session_and_its_port(lab: Lab, sna: Site) -> None:
    """Why the policy asks for life more often than the hub asks the appliance."""
    lab.sshd.policy = policy(lab.reach, alive=1, ClientAliveCountMax="1")
    lab.sshd.restart()
    sna.apply(code=3)
    lab.cut()
    line = (
        "import socket, time\n"
        "while True:\n    socket.create_connection(('127.0.0.1', 9081), 1).close(); time.sleep(0.2)"
    )
    asking = lab.run_in(lab.hub_ns, [sys.executable, "-Sc", line], stderr=subprocess.DEVNULL)
    time.sleep(12)  # three times as long as a quiet one lives
    assert lab.sshd.sessions()
    asking.kill()
    until(lambda: not lab.sshd.sessions(), "the end of a dead session that is quiet", 20)


@pytest.mark.parametrize(
    ("trouble", "reason", "help"),
    [
        ("host key", "HostKeyMismatch", "reconciler tunnel trust hub-a --replace"),
        ("key", "AuthenticationFailed", "authorized_keys"),
        ("name", "HubUnresolved", "has no address"),
        ("port", "HubUnreachable", "nobody listens there"),
        ("service", "HubNotSsh", "another service listens there"),
        ("silence", "HubNotSsh", "takes the connection and says nothing"),
        ("cipher", "NoCommonCipher", "aes256-gcm"),
        ("address", "LocalPortUnusable", "no interface has that address"),
        ("damaged key", "IdentityUnusable", "Load key"),
        ("mode", "IdentityUnusable", "chmod 600"),
        ("no key", "IdentityUnusable", "ssh-keygen -t ed25519"),
        ("public key", "IdentityUnusable", "a public key, not the private one"),
    ],
)
def test_each_layer_that_fails_is_named(
    lab: Lab, sna: Site, trouble: str, reason: str, help: str
) -> None:
    folder = lab.sshd.folder
    match trouble:
        case "host key":
            lab.sshd.host = "other-host"
            lab.sshd.restart()
        case "key":
            lab.tunnel(sna, identity={"file": str(folder / "other-id")})
        case "name":
            lab.tunnel(sna, hub={"host": "no-such-hub.invalid", "port": PORT})
        case "port":
            lab.tunnel(sna, hub={"host": HUB, "port": 444})
        case "service":
            line = (
                f"import socket\ns = socket.create_server(({HUB!r}, 444)); print(1)\n"
                "while True: s.accept()[0].close()"
            )
            other = lab.run_in(lab.hub_ns, [sys.executable, "-uSc", line], stdout=subprocess.PIPE)
            assert other.stdout is not None
            other.stdout.read(1)
            lab.tunnel(sna, hub={"host": HUB, "port": 444})
        case "silence":
            line = f"import socket, time\ns = socket.create_server(({HUB!r}, 444)); print(1)"
            line += "\ntime.sleep(600)"
            other = lab.run_in(lab.hub_ns, [sys.executable, "-uSc", line], stdout=subprocess.PIPE)
            assert other.stdout is not None
            other.stdout.read(1)
            lab.tunnel(sna, hub={"host": HUB, "port": 444}, connect_timeout="1s")
        case "address":
            lab.tunnel(sna, forward={"bind": "192.0.2.99"})
        case "damaged key":
            text = (folder / "id").read_text().splitlines()
            (folder / "damaged").write_text("\n".join([*text[:2], "A" * 70, *text[3:]]) + "\n")
            (folder / "damaged").chmod(0o600)
            lab.tunnel(sna, identity={"file": str(folder / "damaged")})
        case "cipher":
            lab.sshd.policy = "Ciphers aes256-gcm@openssh.com\n" + lab.sshd.policy
            lab.sshd.restart()
            lab.tunnel(sna, ciphers=["aes128-gcm@openssh.com"])
        case "mode":
            (folder / "id").chmod(0o644)
        case "no key":
            lab.tunnel(sna, identity={"file": str(folder / "none")})
        case "public key":
            lab.tunnel(sna, identity={"file": str(folder / "id.pub")})
        case _:
            raise AssertionError(trouble)
    (folder / "id.pub").chmod(0o600)
    said = sna.apply(code=1)
    assert help in said, said
    assert ready(sna)[1] == reason
    assert help in sna.run("explain", "tunnel/hub-a")


def test_a_cause_that_is_over_is_not_told_of_an_ssh_that_was_killed(lab: Lab, sna: Site) -> None:
    """Told as today's it would send somebody after the hub's keys, and wait five minutes.

    Of a wide range, the lines of idle forwards push it out of what is read; so it is a small one.
    """
    lab.tunnel(sna, forward={"ports": "10100-10102"})
    lab.sshd.host = "other-host"
    lab.sshd.restart()
    sna.apply(code=1)
    assert ready(sna)[1] == "HostKeyMismatch"
    other, pinned = lab.sshd.key("other-host").fingerprint, lab.sshd.key().fingerprint
    assert f"pinned is {pinned}, it has {other}" in sna.run("explain", "tunnel/hub-a")
    lab.sshd.host = "host"
    lab.sshd.restart()
    sna.apply(code=3)
    assert connected(sna)
    (row,) = tunnel(sna)["connections"]
    os.kill(row["pid"], signal.SIGKILL)
    until(lambda: tunnel(sna)["connections"][0]["pid"] is None, "the end of ssh")
    assert ready(sna) == ("False", "SshEnded")
    assert "its ssh ended and said nothing; dialled again" in sna.run("explain", "tunnel/hub-a")


def test_ssh_of_a_smaller_range_is_a_restart_in_the_plan(lab: Lab, sna: Site) -> None:
    lab.answering()
    sna.apply()
    before = tunnel(sna)["connections"][0]["pid"]
    assert sna.json("plan")["changes"] == []
    lab.tunnel(sna, forward={"ports": str(PortRange(10100, 10110))})
    (change,) = sna.json("plan")["changes"]
    assert (change["vm"], change["tunnel"]) == (None, "hub-a")
    assert (change["action"], change["cause"]) == ("restart", "ArgvChanged")
    lab.tunnel(sna, host_key=str(lab.sshd.key("other-host")))
    assert sna.json("plan")["changes"][0]["cause"] == "HostKeyChanged"
    assert tunnel(sna)["connections"][0]["pid"] == before, "a plan changes nothing"
    assert Reach().ports == PortRange(10100, 10200)


def test_a_token_that_the_hub_does_not_take_is_said_and_one_that_is_missing_too(
    lab: Lab, sna: Site
) -> None:
    lab.answering()
    line = (
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(401 if 'backups' in self.path else 200)\n"
        "        self.send_header('Content-Length', '0'); self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "h.HTTPServer(('127.0.0.1', 8090), H).serve_forever()"
    )
    lab.run_in(lab.hub_ns, [sys.executable, "-c", line])
    until(lambda: lab.connects(lab.hub_ns, 8090), "the API")
    lab.sshd.policy = policy(replace(lab.reach, api=8090))
    lab.sshd.restart()
    lab.tunnel(sna, forward={"api": 8090})
    sna.apply()
    assert "--: exports are not checked: HTTP 401" in sna.run("explain", "tunnel/hub-a")
    token = sna.folder / "token"
    token.write_text("a-token-of-sixteen-characters\n")
    lab.tunnel(sna, forward={"api": 8090}, token={"file": str(token)})
    said = sna.apply(code=3)
    assert ready(sna) == ("False", "TokenRefused")
    assert "a-token-of-sixteen" not in said + sna.run("explain", "tunnel/hub-a")


def test_a_way_on_which_nothing_comes_back_is_not_the_hubs_fault(lab: Lab, sna: Site) -> None:
    lab.answering()
    sna.apply()
    lab.cut()
    assert ready(sna) == ("False", "TunnelSilent")
