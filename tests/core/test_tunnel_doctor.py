"""The verdicts on both ends of a tunnel: what was seen in, checks out."""

from __future__ import annotations

from typing import Any

import pytest

from reconciler.core.appliances import Health, Holder
from reconciler.core.doctor import Check, Status
from reconciler.core.settings import SecretRef
from reconciler.core.tunnel import Tunnel, TunnelMark
from reconciler.core.tunnel_doctor import (
    Account,
    KeyFile,
    Sshd,
    account,
    appliance_end,
    keys,
    reverse,
    rules,
    server,
)
from reconciler.core.tunnel_seen import Ssh, TunnelSeen
from tests.core.test_sshd import KEY, OTHER, WANTED, A, B, says

REACH = WANTED.reaches["a"]
FINE = Health(status=200, took=0.01)
SILENT = Health(kind="timeout", said="no answer in time")


def by_id(checks: Any) -> dict[str, Check]:
    found = list(checks)
    assert len({one.id for one in found}) == len(found), "two checks of one id"
    return {one.id: one for one in found}


def who(**changes: Any) -> Account:
    values = {"name": "tunnel", "uid": 990, "home": "/nonexistent", "shell": "/usr/sbin/nologin",
              "shell_works": True, "password": "none"}  # fmt: skip
    return Account(**{**values, **changes})


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (Sshd(), "failed", "apt-get install openssh-server"),
        (Sshd(binary="/s"), "failed", "systemctl enable --now ssh"),
        (Sshd(binary="/s", waits="ssh.socket"), "ok", "systemd listens for it (ssh.socket)"),
        (Sshd(binary="/s", pid=7, ports=(22, 443)), "ok", "listens on 22, 443 (pid 7)"),
    ],
)
def test_an_sshd_that_is_there(found: Sshd, status: str, words: str) -> None:
    check = server(found)
    assert check.status == status
    assert words in check.observed + check.fix


@pytest.mark.parametrize(
    ("found", "pam", "status", "words"),
    [
        (None, True, "failed", "--password '*' tunnel"),
        (who(), False, "ok", "tunnel, shell /usr/sbin/nologin"),
        (who(password="locked"), True, "ok", ""),
        (who(password="locked"), False, "failed", "usermod --password '*' tunnel"),
        (who(shell="/bin/bash"), True, "warning", "usermod --shell /usr/sbin/nologin tunnel"),
        (who(shell_works=False), True, "failed", "sshd refuses such a user"),
        (who(expired=True), True, "failed", "usermod --expiredate '' tunnel"),
        (who(password=None), True, "unknown", "needs root: sudo reconciler doctor"),
    ],
)
def test_an_account_that_is_let_in(
    found: Account | None, pam: bool, status: str, words: str
) -> None:
    check = account("tunnel", found, pam)
    assert check.status == status, check
    assert words in check.observed + check.fix


def test_a_difference_is_a_line_of_its_own() -> None:
    checks = by_id(rules(WANTED, says(permitopen="none", permittty="yes"), (), "sshd -T"))
    assert checks["tunnel.policy.permitopen"].status is Status.FAILED
    assert checks["tunnel.policy.permittty"].status is Status.WARNING
    assert "tunnel.policy" not in checks
    checks = by_id(rules(WANTED, says(), (), "sshd -T"))
    assert list(checks) == ["tunnel.policy"]
    assert "may open 4 ports and listen on 127.0.0.1:9081, 127.0.0.1:9082" in str(checks)


def test_keys_that_sshd_does_not_use_are_told_with_why() -> None:
    files = [KeyFile(path="/k", text=A + B), KeyFile(path="/l", trouble="mode 0666")]
    checks = by_id(keys(WANTED, files))
    assert [one.status for one in checks.values()] == ["failed", "ok"]
    assert "sshd does not use /l: mode 0666" in checks["tunnel.keys.file1"].observed
    assert "2 keys, one at least for a, b" in checks["tunnel.keys"].observed
    (check,) = keys(WANTED, [KeyFile(path="/k", missing=True)])
    assert check.observed == "there is no file of keys of tunnel: /k"
    (check,) = keys(WANTED, [KeyFile(path="/k", text=A)])
    assert "--sna b --key FILE.pub, and its line into /k" in check.fix


SESSION = Holder(pid=7, name="sshd", user="tunnel", peer="198.51.100.7:40000", since=1_800_000_000)
NGINX = Holder(pid=8, name="nginx")


@pytest.mark.parametrize(
    ("held", "health", "status", "words"),
    [
        (None, FINE, "failed", "nobody listens on 127.0.0.1:9081"),
        (SESSION, FINE, "ok", "held by sshd (pid 7, user tunnel, from 198.51.100.7:40000, since "),
        (SESSION, SILENT, "failed", "no answer in time: nobody answers"),
        (SESSION, Health(status=404), "failed", "no appliance that is well"),
        (NGINX, FINE, "ok", "nginx (pid 8) of this machine answers itself"),
        (NGINX, SILENT, "failed", "held by nginx (pid 8), which is no sshd"),
        (Holder(user="bob"), FINE, "unknown", "held by a process of user bob that is not ours"),
    ],
)
def test_who_holds_a_reverse_port(
    held: Holder | None, health: Health, status: str, words: str
) -> None:
    (found,) = reverse("a", REACH, held, health, "tunnel", "")
    assert found.status == status
    assert words in found.observed
    assert (status == "ok") is not bool(found.fix)


def test_a_session_of_another_user_or_open_to_all_is_said() -> None:
    odd = Holder(pid=7, name="sshd-session", user="bob")
    found = by_id(reverse("a", REACH, odd, FINE, "tunnel", "0.0.0.0:9081"))
    assert [one.status for one in found.values()] == ["warning", "warning", "ok"]
    assert "tunnels come as tunnel" in found["tunnel.a.reverse.user"].observed
    assert found["tunnel.a.reverse.open"].fix.startswith("GatewayPorts no")


TUNNEL = Tunnel(name="hub-a", host="hub", user="tunnel", reach=REACH,
                identity=SecretRef("file", "/k"), host_key=KEY)  # fmt: skip


def end(tunnel: Tunnel = TUNNEL, shown: Any = (KEY,), fault: str = "", reason: str = "",
        **seen: Any) -> dict[str, Check]:  # fmt: skip
    look = TunnelSeen(**{"key": KEY, "identity": "/k", **seen})
    checks = appliance_end(tunnel, look, "OpenSSH_9.2", "root's, mode 0600", shown, fault, reason)
    return {name.removeprefix("tunnel.hub-a."): one for name, one in by_id(checks).items()}


def test_an_end_that_is_well() -> None:
    line = Ssh(pid=5, started=1, argv=(), mark=TunnelMark("h", "hub-a", "whole"),
               listening=frozenset((10100, 10101)))  # fmt: skip
    checks = end(lines=(line,))
    assert {one.status for one in checks.values()} == {"ok"}
    assert list(checks) == ["ssh", "identity", "host_key", "ports", "hub"]
    assert "2 free, 2 of its own ssh" in checks["ports"].observed


@pytest.mark.parametrize(
    ("changes", "which", "status", "words"),
    [
        ({"ssh_error": "cannot find ssh"}, "ssh", "failed", "apt-get install openssh-client"),
        ({"identity_error": "the private key /k has mode 0644, too open: chmod 600 /k"}, "identity",
         "failed", "chmod 600 /k"),
        ({"identity_error": "/k is no private key"}, "identity", "failed", "ls -l /k"),
        ({"key": None, "key_error": "there is no /p yet"}, "host_key", "failed",
         "reconciler tunnel trust hub-a"),
        ({"key": None}, "hub", "warning", "not yet trusted"),
        ({"busy": {10101: "nginx (pid 3)", 10102: "nginx (pid 3)"}}, "ports", "failed",
         "127.0.0.1:10101 is held by nginx (pid 3), and 1 more"),
        ({"shown": (OTHER,)}, "hub", "failed", "reconciler tunnel trust hub-a --replace"),
        ({"fault": "the name has no address", "reason": "HubUnresolved"}, "hub", "failed",
         "getent hosts hub"),
        ({"fault": "Connection refused", "reason": "HubUnreachable"}, "hub", "failed",
         "systemctl status ssh"),
    ],
)  # fmt: skip
def test_what_an_end_lacks_is_told_with_what_helps(
    changes: dict[str, Any], which: str, status: str, words: str
) -> None:
    check = end(**changes)[which]
    assert check.status == status
    assert words in f"{check.observed} {check.fix}"


def test_a_credential_is_systemds_to_show() -> None:
    tunnel = Tunnel(name="hub-a", host="hub", user="tunnel", identity=SecretRef("credential", "k"))
    assert end(tunnel, identity="")["identity"].status is Status.UNKNOWN
