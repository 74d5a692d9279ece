"""One tunnel: what is read of it, what ssh is told, what its words mean, and what is planned."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core import spec_files
from reconciler.core.actions import Action, Dial, HangUp, Redial, TakeOver
from reconciler.core.actual import Actual
from reconciler.core.desired import Desired, build
from reconciler.core.document import parse
from reconciler.core.errors import Diagnostic
from reconciler.core.ledger import Applied, Ledger, Pause
from reconciler.core.plan import Plan, plan
from reconciler.core.settings import SecretRef
from reconciler.core.tunnel import (
    CONTROL,
    DATA,
    WHOLE,
    HostKey,
    Reach,
    Tunnel,
    argv,
    known_hosts,
    mark_of,
)
from reconciler.core.tunnel_faults import fault
from reconciler.core.tunnel_plan import CAUTION, PATIENCE, pause
from reconciler.core.tunnel_seen import Check, Dialled, Ssh, TunnelSeen
from reconciler.core.tunnel_status import conditions, tunnel_json
from reconciler.core.units import Endpoint, PortRange, Seconds
from reconciler.execute import Step, execute
from tests.core.builders import HUB, NOW, a_settings
from tests.fakes import FakeHost

KEY = HostKey.parse(
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE2bqnmTMjSs0wlNVSMFnfUfRrUHaWwVGDrsCJN1V3Zr root@hub"
)
OTHER = HostKey.parse(
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMEVzgCcIPmLQBQVAwMkd0uMlaPBPBkT+yIZ6GxXZ1aZ"
)
NAME = "tunnel/hub-a"


def a_tunnel(**changes: Any) -> Tunnel:
    values: dict[str, Any] = {
        "name": "hub-a",
        "host": "hub.example",
        "user": "tunnel",
        "identity": SecretRef("file", "/keys/id"),
        "host_key": KEY,
        "reach": Reach(ports=PortRange(10100, 10103)),
    }
    return Tunnel(**{**values, **changes})


def a_line(tunnel: Tunnel, part: str = WHOLE, *, pid: int = 100, **changes: Any) -> Ssh:
    """An ssh that is as it should be."""
    line = argv(tunnel, part, HUB, "/keys/id", "/state/known")
    mark = mark_of(line)
    assert mark is not None
    values: dict[str, Any] = {
        "pid": pid,
        "started": 1,
        "argv": line,
        "mark": mark,
        "age": 100.0,
        "listening": frozenset(tunnel.ports(part)),
    }
    return Ssh(**{**values, **changes})


def a_record(part: str = WHOLE, **changes: Any) -> Dialled:
    values: dict[str, Any] = {"tunnel": NAME, "part": part, "up": NOW - 100, "pid": 100,
                              "started": 1}  # fmt: skip
    return Dialled(**{**values, **changes})


def planned(
    tunnel: Tunnel,
    *lines: Ssh,
    records: tuple[Dialled, ...] = (),
    now: Seconds = NOW,
    kill_clients: bool = False,
    ledger: Ledger | None = None,
    **seen: Any,
) -> Plan:
    values: dict[str, Any] = {"key": KEY, "identity": "/keys/id", "known": "/state/known"}
    found = TunnelSeen(lines=lines, **{**values, **seen})
    desired = Desired(
        settings=a_settings(), vms={}, tunnels={NAME: tunnel}, kill_clients=kill_clients
    )
    ledger = ledger or Ledger(hub=HUB, state_id="state-1")
    ledger = replace(ledger, dialled={(one.tunnel, one.part): one for one in records})
    return plan(desired, Actual(tunnels={NAME: found}, lines=lines), ledger, now)


def kinds(found: Plan) -> list[tuple[str, str]]:
    return [(action.kind, action.cause) for action in found.actions]


def first(found: Plan) -> Action:
    return found.actions[0]


# -- what is read


def read(text: str, **settings: Any) -> Desired:
    document, wrong = parse(text, "/specs/tunnel.yaml")
    assert document is not None
    assert not wrong
    ledger = Ledger(hub=HUB, state_id="state-1")
    settings = {"listen": Endpoint("127.0.0.1", 8083), **settings}
    return build(spec_files.read([document]), None, a_settings(**settings), ledger)


def errors(found: Desired) -> list[Diagnostic]:
    return [one for one in found.diagnostics if one.severity == "error"]


SPEC = f"""
tunnels:
  - name: hub-a
    hub: {{host: hub.example}}
    identity: {{file: ../keys/id}}
    host_key: {KEY}
"""


def test_what_is_not_written_is_what_the_field_has_and_the_range_is_the_hubs() -> None:
    found = read(SPEC, ports="10100-10119").tunnels[NAME]
    assert (found.port, found.user, found.bind) == (443, "tunnel", "127.0.0.1")
    assert found.reach == Reach(ports=PortRange(10100, 10119), api=8082, reverse=9081)
    assert found.appliance == Endpoint("127.0.0.1", 8081)
    assert found.identity == SecretRef("file", "/keys/id")
    assert found.place == "/specs/tunnel.yaml:3:11"


def test_a_tunnel_can_be_templated_looped_and_left_out() -> None:
    text = SPEC.replace(
        "name: hub-a", "name: \"hub-{{ item }}\"\n    loop: [a, b]\n    when: item == 'a'"
    )
    assert list(read(text).tunnels) == [NAME]


@pytest.mark.parametrize(
    ("old", "new", "message", "line"),
    [
        (f"    host_key: {KEY}\n", "", "without it anybody could be the hub", 3),
        ("host_key: ssh-ed25519 AAAA", "host_key: ssh-ed25519 BBBB", "no ssh-ed25519 key", 6),
        ("identity: {file: ../keys/id}", "identity: {env: KEY}", "unknown key 'env'", 5),
        ("    identity: {file: ../keys/id}\n", "", "the key 'identity' is missing", 3),
        ("{host: hub.example}", "{host: '-oProxyCommand=x'}", "no host name or address", 4),
        ("{host: hub.example}", "{host: hub, prot: 22}", "did you mean 'port'", 4),
        ("name: hub-a", "name: hub-a\n    user: '-l'", "no user's name", 4),
        ("name: hub-a", "name: hub-a\n    ciphers: ['a,b']", "no cipher", 4),
        ("name: hub-a", "name: hub-a\n    reverse: {port: 0}", "greater than or equal to 1", 4),
        ("name: hub-a", "name: hub-a\n    state: exported", "expected one of up, down", 4),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_with_its_place(
    old: str, new: str, message: str, line: int
) -> None:
    assert old in SPEC
    found = read(SPEC.replace(old, new))
    (wrong,) = errors(found)
    assert message in wrong.sentence
    assert wrong.place is not None
    assert wrong.place.line == line
    assert wrong.vm == NAME
    assert not found.tunnels


def test_two_tunnels_that_need_one_port_cannot_both_be() -> None:
    second = SPEC.replace("tunnels:\n", "").replace("hub-a", "hub-b").replace("hub.ex", "other.ex")
    (wrong,) = errors(read(SPEC + second))
    assert "127.0.0.1:8082 is the tunnel hub-a's already" in wrong.sentence
    assert wrong.vm == "tunnel/hub-b"
    apart = second.replace("host_key", "forward: {bind: 127.0.0.3}\n    host_key")
    assert not errors(read(SPEC + apart))
    (twice,) = errors(read(SPEC + SPEC.replace("tunnels:\n", "")))
    assert "declared twice" in twice.sentence


def test_our_own_api_cannot_be_where_the_hubs_comes_out() -> None:
    (wrong,) = errors(read(SPEC, listen=Endpoint("127.0.0.1", 8082)))
    assert 'write another `api: {listen: "127.0.0.1:8083"}`' in wrong.sentence


def test_a_tunnel_that_is_down_needs_no_more_than_its_name() -> None:
    found = read("tunnels: [{name: hub-a, state: down}]")
    assert not errors(found)
    assert not found.tunnels[NAME].up


# -- what ssh is told


def test_ssh_takes_every_option_and_both_ends_are_written_out() -> None:
    tunnel = a_tunnel(ciphers=("aes128-gcm@openssh.com",), split=True)
    for part in tunnel.parts:
        line = argv(tunnel, part, HUB, "/keys/id", "/state/known")
        done = subprocess.run([*line[:1], "-G", *line[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = set(done.stdout.splitlines())
        assert "exitonforwardfailure yes" in said
        assert "stricthostkeychecking true" in said
        assert "compression no" in said
        assert "serveraliveinterval 15" in said
        assert "ciphers aes128-gcm@openssh.com" in said
        assert {one for one in said if "forward " in one} == {
            CONTROL: {
                "localforward [127.0.0.1]:8082 [127.0.0.1]:8082",
                "remoteforward [127.0.0.1]:9081 [127.0.0.1]:8081",
            },
            DATA: {f"localforward [127.0.0.1]:{p} [127.0.0.1]:{p}" for p in range(10100, 10104)},
        }[part]
        assert mark_of(line) is not None
        assert not any("localhost" in word for word in line)


def test_another_host_key_is_another_argv_and_the_mark_is_read_back() -> None:
    tunnel = a_tunnel()
    (one, text), (two, _) = known_hosts(tunnel, KEY), known_hosts(tunnel, OTHER)
    assert one != two
    assert text == f"hub-a {KEY}\n"
    mark = mark_of(argv(tunnel, WHOLE, HUB, "/keys/id", one))
    assert mark is not None
    assert (mark.hub, mark.subject, mark.part) == (HUB, NAME, WHOLE)
    assert mark_of(["ssh", "-o", "SetEnv=RECONCILER_TUNNEL=2:a:b:c", "hub"]) is None
    assert mark_of(["vi", "SetEnv=RECONCILER_TUNNEL=1:a:b:whole"]) is None


def test_a_fingerprint_is_what_ssh_keygen_says() -> None:
    said = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=str(KEY), capture_output=True, text=True
    )
    assert KEY.fingerprint in said.stdout


# -- what its words mean


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("ssh: connect to host h port 443: Connection refused", "HubUnreachable"),
        ("ssh: connect to host h port 443: Connection timed out", "HubUnreachable"),
        ("ssh: connect to host h port 443: No route to host", "HubUnreachable"),
        ("ssh: Could not resolve hostname h: Name or service not known", "HubUnresolved"),
        ("Host key verification failed.", "HostKeyMismatch"),
        ("tunnel@h: Permission denied (publickey).", "AuthenticationFailed"),
        ("Error: remote port forwarding failed for listen port 9081", "ReverseRefused"),
        ("bind [127.0.0.1]:10150: Address already in use\nCould not request", "LocalPortBusy"),
        ("channel_setup_fwd_listener_tcpip: cannot listen to port: 10150", "LocalPortUnusable"),
        ("kex_exchange_identification: Connection closed by remote host", "HubNotSsh"),
        ("Timeout, server h not responding.", "ConnectionLost"),
        ("client_loop: send disconnect: Broken pipe", "ConnectionLost"),
        ("Connection to h closed by remote host.", "ConnectionLost"),
        ("no matching cipher found. Their offer: aes256-gcm@openssh.com", "NoCommonCipher"),
        ("command-line: line 0: Bad configuration option: nosuch", "SshUsage"),
        ('Load key "/k": error in libcrypto\nPermission denied (publickey).', "IdentityUnusable"),
        ("channel 3: open failed: connect failed: Connection refused", "SshEnded"),
        ("", "SshEnded"),
    ],
)  # fmt: skip
def test_each_wording_is_a_layer(words: str, reason: str) -> None:
    assert fault(words, a_tunnel()).reason == reason


SILENT = """
Connection timed out during banner exchange
Connection to 198.51.100.2 port 444 timed out
"""
TURNED_AWAY = """
kex_exchange_identification: read: Connection reset by peer
Connection reset by 198.51.100.2 port 443
"""
TLS = """
kex_exchange_identification: banner line contains invalid characters
banner exchange: Connection to 198.51.100.2 port 448: invalid format
"""
NO_ADDRESS = """
bind [192.0.2.99]:10100: Cannot assign requested address
channel_setup_fwd_listener_tcpip: cannot listen to port: 10100
Could not request local forwarding.
"""
BUSY = """
bind [127.0.0.1]:10150: Address already in use
channel_setup_fwd_listener_tcpip: cannot listen to port: 10150
Could not request local forwarding.
"""
MAC = """
Unable to negotiate with 198.51.100.2: no matching MAC found. Their offer: hmac-sha2-256
"""
KEX = """
no matching key exchange method found. Their offer: curve25519-sha256
"""
CHANGED = """
The fingerprint for the ED25519 key sent by the remote host is
SHA256:i9V6t8uPNTj9+YUvx9MRKzlfM3k+vMTORCDosGZFXpU.
Please contact your system administrator.
Host key verification failed.
"""
UNKNOWN = """
No ED25519 host key is known for hub-a and you have requested strict checking.
Host key verification failed.
"""
OPEN = """
Permissions 0644 for '/keys/id' are too open.
This private key will be ignored.
Load key "/keys/id": bad permissions
tunnel@h: Permission denied (publickey).
"""
"""Words of OpenSSH 9.2, each provoked at a real sshd or at what stood in its place."""


@pytest.mark.parametrize(
    ("words", "reason", "said"),
    [
        (SILENT, "HubNotSsh", "takes the connection and says nothing"),
        (TURNED_AWAY, "HubNotSsh", "PerSourcePenalties"),
        (TLS, "HubNotSsh", "invalid characters"),
        (NO_ADDRESS, "LocalPortUnusable", "no interface has that address"),
        (BUSY, "LocalPortBusy", "127.0.0.1:10150 is in use"),
        (MAC, "NoCommonCipher", "no MAC in common; the hub offers hmac-sha2-256"),
        (KEX, "NoCommonCipher", "no key exchange method in common"),
        (CHANGED, "HostKeyMismatch", f"pinned is {KEY.fingerprint}, it has SHA256:i9V6t8uPNTj9"),
        (UNKNOWN, "HostKeyMismatch", f"pinned is {KEY.fingerprint}: another machine answers"),
        (OPEN, "IdentityUnusable", "Permissions 0644 for '/keys/id' are too open"),
    ],
)
def test_a_fault_says_what_was_seen(words: str, reason: str, said: str) -> None:
    found = fault(words, a_tunnel())
    assert (found.reason, said in found.message) == (reason, True), found.message


# -- what is planned


def test_what_is_not_there_is_dialled_and_what_is_there_is_left() -> None:
    tunnel = a_tunnel()
    assert kinds(planned(tunnel)) == [("start", "NotRunning")]
    assert kinds(planned(tunnel, a_line(tunnel), records=(a_record(),))) == []
    split = a_tunnel(split=True)
    assert kinds(planned(split)) == [("start", "NotRunning")] * 2


def test_an_ssh_that_nobody_wrote_down_is_adopted_when_its_dialler_must_be_gone() -> None:
    tunnel = a_tunnel()
    assert kinds(planned(tunnel, a_line(tunnel, age=1.0))) == [("wait", "Starting")]
    assert kinds(planned(tunnel, a_line(tunnel))) == [("adopt", "Unrecorded")]


def test_other_options_are_a_restart_and_not_under_a_client() -> None:
    tunnel = a_tunnel()
    runs = a_line(a_tunnel(alive_interval=30.0))
    (action,) = planned(tunnel, runs, records=(a_record(),)).actions
    assert isinstance(action, Redial)
    assert (action.cause, action.ssh) == ("ArgvChanged", runs)
    assert "ServerAliveInterval=30" in action.why
    used = replace(runs, clients=2)
    held = planned(tunnel, used, records=(a_record(),))
    assert kinds(held) == [("hold", "InUse")]
    assert "2 clients are connected" in first(held).why
    ordered = planned(tunnel, used, records=(a_record(),), kill_clients=True)
    assert kinds(ordered) == [("restart", "ArgvChanged")]


def test_a_busy_port_is_said_before_anything_is_started() -> None:
    found = planned(a_tunnel(), busy={10102: "nc (pid 7)"})
    assert kinds(found) == [("wait", "LocalPortBusy")]
    assert "127.0.0.1:10102 is held by nc (pid 7)" in first(found).why
    split = planned(a_tunnel(split=True), busy={10102: "nc (pid 7)"})
    assert kinds(split) == [("start", "NotRunning"), ("wait", "LocalPortBusy")]


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        ({"key": None, "key_error": "there is no /k"}, "HostKeyUnknown"),
        ({"identity_error": "there is no private key"}, "IdentityUnusable"),
        ({"ssh_error": "cannot find ssh"}, "SshMissing"),
    ],
)
def test_what_only_a_person_can_mend_is_refused(seen: dict[str, Any], cause: str) -> None:
    assert kinds(planned(a_tunnel(), **seen)) == [("refuse", cause)]


def test_a_failure_is_rested_and_an_end_after_a_long_life_is_not() -> None:
    tunnel, message = a_tunnel(), "no TCP connection"
    failed = a_record(up=0.0, failures=2, rest=NOW + 2, reason="HubUnreachable", message=message)
    waits = planned(tunnel, records=(failed,))
    assert kinds(waits) == [("wait", "HubUnreachable")]
    assert waits.tunnels[0].again_at == NOW + 2
    assert kinds(planned(tunnel, records=(failed,), now=NOW + 3)) == [("start", "HubUnreachable")]
    words = {WHOLE: Check("ConnectionLost", "Timeout, server not responding")}
    ended = planned(tunnel, records=(a_record(),), words=words)
    assert kinds(ended) == [("restart", "ConnectionLost")]
    soon = a_record(up=NOW - 1, failures=3)
    assert kinds(planned(tunnel, records=(soon,), words=words)) == [("wait", "ConnectionLost")]


def test_the_rest_grows_to_a_limit_that_depends_on_who_is_to_blame() -> None:
    rests = [pause("HubUnreachable", n) for n in range(1, 9)]
    assert [round(one) for one in rests[:4]] == [1, 2, 4, 8]
    assert all(PATIENCE <= one <= PATIENCE * 1.1 for one in rests[5:])
    assert CAUTION <= pause("AuthenticationFailed", 20) <= CAUTION * 1.1
    assert pause("HubUnreachable", 0) == 0


def test_of_two_for_one_part_the_one_that_works_stays() -> None:
    tunnel = a_tunnel()
    good, other = a_line(tunnel), a_line(tunnel, pid=101, listening=frozenset())
    found = planned(tunnel, other, good, records=(a_record(),))
    (action,) = found.actions
    assert isinstance(action, HangUp)
    assert (action.cause, action.ssh.pid) == ("Double", 101)


def test_the_parts_of_before_are_ended_when_it_is_split() -> None:
    tunnel = a_tunnel(split=True)
    whole = a_line(a_tunnel())
    found = planned(tunnel, whole, records=(a_record(),))
    assert ("stop", "PartNotDeclared") in kinds(found)


def test_a_port_that_the_hub_does_not_permit_is_tried_again_when_nobody_uses_it() -> None:
    tunnel = a_tunnel()
    refused = a_record(refused=(10101,), rest=NOW + 5, message="does not permit", failures=1)
    waits = planned(tunnel, a_line(tunnel), records=(refused,))
    assert kinds(waits) == [("wait", "ForwardRefused")]
    again = planned(tunnel, a_line(tunnel), records=(refused,), now=NOW + 6)
    assert kinds(again) == [("restart", "ForwardRefused")]
    used = planned(tunnel, a_line(tunnel, clients=1), records=(refused,), now=NOW + 6)
    assert kinds(used) == [("wait", "ForwardRefused")]


def test_what_fails_behind_a_connection_is_said_and_nothing_is_restarted() -> None:
    tunnel = a_tunnel()
    checks = (Check("", "fine"), Check("HubApiSilent", "the hub's API does not answer"))
    found = planned(tunnel, a_line(tunnel), records=(a_record(),), checks=checks)
    assert kinds(found) == [("wait", "HubApiSilent")]


def test_down_hangs_up_and_a_pause_leaves_all_as_it_is() -> None:
    tunnel = a_tunnel()
    assert kinds(planned(replace(tunnel, up=False), a_line(tunnel))) == [("stop", "Down")]
    used = a_line(tunnel, clients=1)
    assert kinds(planned(replace(tunnel, up=False), used)) == [("hold", "InUse")]
    rest = Pause(vm=NAME, reason="work", since=NOW)
    ledger = Ledger(hub=HUB, state_id="state-1", pauses={NAME: rest})
    assert kinds(planned(tunnel, ledger=ledger)) == [("hold", "Paused")]


def test_a_tunnel_that_runs_and_is_not_in_scope_is_untouched() -> None:
    line = a_line(a_tunnel())
    desired = Desired(settings=a_settings(), vms={})
    found = plan(desired, Actual(lines=(line,)), Ledger(hub=HUB, state_id="s"), NOW)
    assert found.untouched == (NAME,)
    assert not found.actions


def test_a_healthy_tunnel_says_what_answers() -> None:
    tunnel = a_tunnel()
    checks = (Check("", "the hub's API answers"), Check("", "no export is up"))
    line = a_line(tunnel)
    seen = TunnelSeen(lines=(line,), key=KEY, checks=checks)
    found = planned(tunnel, line, records=(a_record(),), checks=checks)
    (one,) = found.tunnels
    told = {
        c.type: c
        for c in conditions(one, Actual(tunnels={NAME: seen}), Ledger(hub=HUB, state_id="s"))
    }
    assert (told["Ready"].status, told["Ready"].reason) == ("True", "Healthy")
    assert told["Ready"].message == "the hub's API answers; no export is up"
    assert told["Connected"].status == "True"


# -- what is remembered of what was done


def carried_out(host: FakeHost, found: Plan) -> list[Step]:
    return execute(found, host, lambda _: None, stopping=threading.Event())


def test_failures_are_counted_and_a_good_connection_is_remembered_by_its_process() -> None:
    host, tunnel = FakeHost(a_settings()), a_tunnel()
    host.undialled = "HubUnreachable"
    for count in (1, 2):
        records = tuple(host.records.dials.values())
        (step,) = carried_out(host, planned(tunnel, records=records, now=host.clock))
        assert (step.ok, step.reason) == (False, "HubUnreachable")
        known = host.records.dials[NAME, WHOLE]
        assert (known.failures, known.reason) == (count, "HubUnreachable")
        assert known.rest > host.clock
        host.clock = known.rest + 1
    host.undialled = ""
    records = tuple(host.records.dials.values())
    (step,) = carried_out(host, planned(tunnel, records=records, now=host.clock))
    assert step.ok
    known = host.records.dials[NAME, WHOLE]
    assert (known.pid, known.up, known.refused) == (host.lines[0].pid, host.clock, ())
    assert known.rest == 0


def test_a_port_that_is_not_permitted_fails_the_step_and_leaves_the_rest_up() -> None:
    host, tunnel = FakeHost(a_settings()), a_tunnel()
    host.not_permitted = {10102}
    (step,) = carried_out(host, planned(tunnel))
    assert (step.ok, step.reason) == (False, "ForwardRefused")
    assert "port 10102 (PermitOpen)" in step.message
    assert host.lines, "the ports that are permitted go on"
    assert host.records.dials[NAME, WHOLE].refused == (10102,)


def test_one_connection_does_not_wait_for_the_other() -> None:
    host, tunnel = FakeHost(a_settings()), a_tunnel(split=True)
    found = planned(tunnel, busy={10102: "nc (pid 7)"})
    (step,) = carried_out(host, found)
    assert step.ok
    assert isinstance(step.action, Dial)
    assert step.action.part == CONTROL


def test_what_is_adopted_is_looked_at_for_what_it_may_not_do() -> None:
    host, tunnel = FakeHost(a_settings()), a_tunnel()
    host.not_permitted = {10101}
    (step,) = carried_out(host, planned(tunnel, a_line(tunnel)))
    assert isinstance(step.action, TakeOver)
    assert host.records.dials[NAME, WHOLE].refused == (10101,)
    assert host.records.dials[NAME, WHOLE].up == host.clock - 100


def test_a_tunnel_comes_back_from_the_store_as_it_went_in() -> None:
    tunnel = a_tunnel(split=True, ciphers=("aes128-gcm@openssh.com",))
    assert Tunnel.from_json(tunnel.to_json()) == tunnel
    assert Applied(vm=tunnel.to_json(), generation=1, at=NOW).vm == tunnel.to_json()


@pytest.mark.parametrize(
    ("failures", "reason", "stalled"),
    [
        (1, "HubUnreachable", False),
        (2, "HubUnreachable", False),
        (3, "HubUnreachable", True),
        (1, "HostKeyMismatch", True),
        (1, "AuthenticationFailed", True),
    ],
)
def test_somebody_is_told_of_what_does_not_end_by_itself(
    failures: int, reason: str, stalled: bool
) -> None:
    record = a_record(up=0.0, failures=failures, rest=NOW + 2, reason=reason, message="it failed")
    found = planned(a_tunnel(), records=(record,))
    ledger = Ledger(hub=HUB, state_id="s", dialled={(NAME, WHOLE): record})
    told = {c.type: c for c in conditions(found.tunnels[0], Actual(), ledger)}
    assert (told["Ready"].status, told["Ready"].reason) == ("False", reason)
    assert (told["Stalled"].status == "True") is stalled


def test_another_host_key_is_said_to_be_the_reason() -> None:
    tunnel = a_tunnel()
    found = planned(tunnel, a_line(tunnel), records=(a_record(),), known="/state/other")
    assert kinds(found) == [("restart", "HostKeyChanged")]


def test_of_a_split_tunnel_in_use_no_half_is_hung_up() -> None:
    tunnel = a_tunnel(split=True, up=False)
    lines = (a_line(tunnel, CONTROL), a_line(tunnel, DATA, pid=101, clients=2))
    assert kinds(planned(tunnel, *lines)) == [("hold", "InUse")]
    assert kinds(planned(tunnel, *lines, kill_clients=True)) == [("stop", "Down")] * 2


def test_a_split_tunnel_in_use_moves_whole_or_not_at_all() -> None:
    tunnel = a_tunnel(split=True)
    before = a_tunnel(split=True, host="old.example")
    lines = (a_line(before, CONTROL), a_line(before, DATA, pid=101, clients=2))
    assert kinds(planned(tunnel, *lines)) == [("hold", "InUse")]
    quiet = tuple(replace(one, clients=0) for one in lines)
    assert kinds(planned(tunnel, *quiet)) == [("restart", "ArgvChanged")] * 2


def test_what_has_the_ports_of_its_successors_is_waited_for() -> None:
    whole = a_line(a_tunnel(), clients=1)
    assert kinds(planned(a_tunnel(split=True), whole)) == [("hold", "InUse")]


def test_a_rest_is_told_by_its_end_and_a_time_of_another_process_is_not_told() -> None:
    tunnel = a_tunnel()
    record = a_record(up=0.0, failures=1, rest=NOW + 8, reason="HubUnreachable", message="no")
    one, two = (planned(tunnel, records=(record,), now=now) for now in (NOW, NOW + 3))
    assert first(one).why == first(two).why
    ledger = Ledger(hub=HUB, state_id="s", dialled={(NAME, WHOLE): a_record()})
    for pid, told in ((100, True), (101, False)):
        line = a_line(tunnel, pid=pid)
        actual = Actual(tunnels={NAME: TunnelSeen(lines=(line,), key=KEY)}, lines=(line,))
        plan_ = planned(tunnel, line, records=(a_record(),))
        (row,) = tunnel_json(plan_.tunnels[0], actual, ledger, NOW)["connections"]
        assert (row["upSince"] is not None) is told


def test_a_tunnel_that_the_watched_directory_does_not_name_says_so() -> None:
    found = planned(a_tunnel(), a_line(a_tunnel()), records=(a_record(),)).tunnels[0]
    for source, told in (({}, False), ({"tunnels": ["hub-a"]}, False), ({"tunnels": []}, True)):
        ledger = Ledger(hub=HUB, state_id="s", source=source)
        kept = [c for c in conditions(found, Actual(), ledger) if c.type == "PruneHeld"]
        assert bool(kept) is told
        assert all("reconciler stop tunnel/hub-a" in one.message for one in kept)


def test_a_host_key_that_is_no_key_is_replaced_by_order() -> None:
    for error, command in (
        ("there is no /k", "hub-a"),
        ("cannot use the host key in /k", "hub-a --replace"),
    ):
        found = planned(a_tunnel(), key=None, key_error=error)
        assert first(found).why.endswith(f"reconciler tunnel trust {command}")
