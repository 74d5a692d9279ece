"""What the hub's sshd is to permit, and where one differs from it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from reconciler.core.settings import Appliance, Settings
from reconciler.core.sshd import (
    Effective,
    authorized_keys,
    authorized_line,
    compare,
    directives,
    effective,
    keys_wanting,
    permitted,
    policy,
)
from reconciler.core.tunnel import HostKey, Tunnel, forwards
from reconciler.core.units import Endpoint, PortRange

KEY = HostKey.parse(
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHGhMOVMj8wHaAwdjRljOx7GEbeKS9urMpQfUwzUMMTZ"
)
OTHER = HostKey.parse(
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIJPUErOnzHCfsBxtLrNGDX7X5Lq21lMkjFWp9GOJJ+h"
)


def settings(**snas: str) -> Settings:
    return Settings(
        hub="hub-a",
        state="/s",
        repositories={},
        ports=PortRange(10100, 10102),
        snas={name: Appliance(url=url) for name, url in snas.items()},
    )


WANTED = policy(settings(a="http://127.0.0.1:9081", b="http://localhost:9082"))


def says(**changes: str) -> Effective:
    """What an sshd with the rendered block prints, some lines of it changed."""
    lines = {one.keyword.lower(): one.value for one in directives(WANTED)}
    lines |= changes
    return effective("\n".join(f"{key} {value}" for key, value in lines.items() if value))


def test_the_policy_is_what_a_tunnel_of_the_same_hub_asks_for() -> None:
    tunnel = Tunnel(name="hub-a", reach=WANTED.reaches["b"])
    asked = list(forwards(tunnel, "whole"))
    assert [to for name, _, to in asked if name == "LocalForward"] == sorted(
        map(str, WANTED.opens), key=lambda end: int(end.rpartition(":")[2])
    )
    (reverse,) = [listen for name, listen, _ in asked if name == "RemoteForward"]
    assert reverse in map(str, WANTED.listens)
    assert [str(one) for one in WANTED.opens][-1] == "127.0.0.1:8082"


def test_an_appliance_elsewhere_has_no_tunnel() -> None:
    found = policy(
        settings(a="http://127.0.0.1:9081", far="http://10.0.0.5:9081", low="http://[::1]")
    )
    assert list(found.reaches) == ["a"]
    assert "no port of this machine" in found.skipped["far"]
    assert "port 80 is root's" in found.skipped["low"]


def test_one_reverse_port_for_two_is_seen() -> None:
    found = policy(settings(a="http://127.0.0.1:9081", b="http://localhost:9081"))
    assert found.doubled == {9081: ["a", "b"]}
    assert not WANTED.doubled


def test_a_hub_that_listens_everywhere_is_reached_by_loopback() -> None:
    found = policy(replace(settings(a="http://127.0.0.1:9081"), bind="0.0.0.0"))
    assert {end.host for end in (*found.opens, *found.listens)} == {"127.0.0.1"}


def test_an_sshd_with_the_rendered_block_differs_in_nothing() -> None:
    assert compare(WANTED, says()) == []


OPENS = " ".join(map(str, WANTED.opens))


@pytest.mark.parametrize(
    ("changes", "keyword", "needed", "words", "line"),
    [
        ({"permitopen": OPENS.replace("127.0.0.1:10101 ", "")}, "PermitOpen", True,
         "lacks 127.0.0.1:10101", "PermitOpen 127.0.0.1:10100"),
        ({"permitopen": OPENS.replace("127.0.0.1", "localhost")}, "PermitOpen", True,
         "it has localhost:10100, and the appliance asks for 127.0.0.1:10100", "PermitOpen "),
        ({"permitopen": "none"}, "PermitOpen", True, "and 1 more", "PermitOpen "),
        ({"permitopen": "any"}, "PermitOpen", False, "also has any", "PermitOpen "),
        ({"permitopen": f"{OPENS} 127.0.0.1:5432"}, "PermitOpen", False,
         "also has 127.0.0.1:5432", "PermitOpen "),
        ({"permitlisten": "localhost:9081 localhost:9082"}, "PermitListen", True,
         "it has localhost:9081, and the appliance asks for 127.0.0.1:9081",
         "PermitListen 127.0.0.1:9081 127.0.0.1:9082"),
        ({"permitlisten": "127.0.0.1:9081"}, "PermitListen", True, "lacks 127.0.0.1:9082",
         "PermitListen "),
        ({"permitlisten": "*:9081 *:9082"}, "PermitListen", False, "a port without an address",
         "PermitListen "),
        ({"permitlisten": "any"}, "PermitListen", False, "also has any", "PermitListen "),
        ({"allowtcpforwarding": "no"}, "AllowTcpForwarding", True, "nothing is forwarded",
         "AllowTcpForwarding yes"),
        ({"allowtcpforwarding": "remote"}, "AllowTcpForwarding", True, "no export and no API",
         "AllowTcpForwarding yes"),
        ({"allowtcpforwarding": "local"}, "AllowTcpForwarding", True, "reverse port is refused",
         "AllowTcpForwarding yes"),
        ({"disableforwarding": "yes"}, "DisableForwarding", True, "whatever else permits it",
         "DisableForwarding no"),
        ({"gatewayports": "yes"}, "GatewayPorts", False, "open to every machine",
         "GatewayPorts no"),
        ({"gatewayports": "clientspecified"}, "GatewayPorts", False, "to every machine",
         "GatewayPorts no"),
        ({"clientaliveinterval": "0"}, "ClientAliveInterval", True, "for ever",
         "ClientAliveInterval 15"),
        ({"clientalivecountmax": "0"}, "ClientAliveCountMax", True, "never ended",
         "ClientAliveCountMax 3"),
        ({"clientaliveinterval": "300"}, "ClientAliveInterval", False, "for 900 s",
         "ClientAliveInterval 15"),
        ({"maxsessions": "10"}, "MaxSessions", False, "MaxSessions 10", "MaxSessions 0"),
        ({"forcecommand": "none"}, "ForceCommand", False, "its own choice", "ForceCommand "),
        ({"x11forwarding": "yes"}, "X11Forwarding", False, "the policy says no",
         "X11Forwarding no"),
        ({"permittty": "yes"}, "PermitTTY", False, "the policy says no", "PermitTTY no"),
        ({"pubkeyauthentication": "no"}, "PubkeyAuthentication", True, "no key lets in",
         "PubkeyAuthentication yes"),
        ({"authenticationmethods": "any"}, "AuthenticationMethods", False, "other ways",
         "AuthenticationMethods publickey"),
        ({"authenticationmethods": "publickey,password"}, "AuthenticationMethods", True,
         "more than a key", "AuthenticationMethods publickey"),
        ({"allowusers": "backup admin"}, "AllowUsers", True, "tunnel is none of them",
         "AllowUsers tunnel"),
        ({"allowusers": "!tunnel *"}, "AllowUsers", True, "tunnel is none of them",
         "AllowUsers tunnel"),
        ({"denyusers": "tun*"}, "DenyUsers", True, "kept out", "take tunnel out of DenyUsers"),
        ({"allowgroups": "ssh-users"}, "AllowGroups", True, "none of them", "AllowGroups tunnels"),
        ({"denygroups": "tunnels"}, "DenyGroups", True, "kept out", "take tunnel out of"),
        ({"unusedconnectiontimeout": "600"}, "UnusedConnectionTimeout", True, "is cut by it",
         "UnusedConnectionTimeout none"),
        ({"channeltimeout": "direct-tcpip=10m"}, "ChannelTimeout", True, "is cut by it",
         "ChannelTimeout none"),
    ],
)  # fmt: skip
def test_each_difference_is_named_with_the_line_to_write(
    changes: dict[str, str], keyword: str, needed: bool, words: str, line: str
) -> None:
    (one,) = compare(WANTED, says(**changes), groups=("tunnels",))
    assert (one.keyword, one.needed) == (keyword, needed)
    assert words in one.found
    assert one.line.startswith(line)


@pytest.mark.parametrize(
    "changes",
    [
        {"allowtcpforwarding": "all"},
        {"allowusers": "backup tunnel@10.0.0.*"},
        {"allowgroups": "tunnels"},
        {"denyusers": "root"},
        {"forcecommand": "/usr/sbin/nologin"},
        {"clientaliveinterval": "20"},
        {"authorizedkeysfile": ".ssh/authorized_keys"},
        {"channeltimeout": "none", "unusedconnectiontimeout": "none"},
        {"permittunnel": ""},
    ],
)
def test_what_does_as_well_is_no_difference(changes: dict[str, str]) -> None:
    assert compare(WANTED, says(**changes), groups=("tunnels",)) == []


@pytest.mark.parametrize(
    ("tokens", "yes"),
    [
        (["any"], True),
        (["none"], False),
        (["127.0.0.1:9081"], True),
        (["127.0.0.1:*"], True),
        (["*:9081"], True),
        (["9081"], True),
        (["localhost:9081"], False),
        (["127.0.0.1:908"], False),
        ([], False),
    ],
)
def test_sshd_compares_addresses_as_they_are_written(tokens: list[str], yes: bool) -> None:
    assert permitted(Endpoint("127.0.0.1", 9081), tokens) is yes


A, B = (
    authorized_line(WANTED.reaches[name], key, name) for name, key in (("a", KEY), ("b", OTHER))
)


def test_a_line_of_keys_comes_back_as_it_was_meant() -> None:
    (found,) = authorized_keys(f"# a comment\n\n{A}")
    assert (found.number, found.key) == (3, KEY)
    assert found.options["permitlisten"] == ["127.0.0.1:9081"]
    assert found.options["permitopen"] == [str(one) for one in WANTED.opens]
    assert {"restrict", "port-forwarding"} <= found.options.keys()


def test_options_with_spaces_and_quotes_hide_no_key() -> None:
    text = f'from="10.0.0.1,10.0.0.2",command="say \\"a b\\"" {KEY} x\nnonsense\n{OTHER}\n'
    first, second, third = authorized_keys(text)
    assert first.key == KEY
    assert first.options["from"] == ["10.0.0.1,10.0.0.2"]
    assert second.key is None
    assert third.key == OTHER
    assert not third.options


@pytest.mark.parametrize(
    ("text", "needed", "words"),
    [
        ("", True, "/k has no key"),
        ("# only a comment\n", True, "/k has no key"),
        (A, True, "no key in /k may carry b (127.0.0.1:9082): line 1: its permitlisten is"),
        (A + B.replace("port-forwarding,", ""), True, "it forwards nothing"),
        (A + f"no-port-forwarding {OTHER}\n", True, "it forwards nothing"),
        (A + B.replace('permitopen="127.0.0.1:8082"', 'permitopen="127.0.0.1:80"'), True,
         "its permitopen lacks 127.0.0.1:8082"),
        (A + B.replace(str(OTHER), str(KEY)), True, "may carry b"),
        (A + f"restrict,port-forwarding {OTHER}\n", False, "/k:2 has no permitlisten"),
    ],
)  # fmt: skip
def test_keys_that_let_nobody_in_are_named(text: str, needed: bool, words: str) -> None:
    found = keys_wanting(WANTED, authorized_keys(text), "/k")
    assert found
    assert found[0].needed is needed
    assert words in found[0].found


def test_a_line_for_each_is_enough() -> None:
    assert keys_wanting(WANTED, authorized_keys(A + B), "/k") == []
