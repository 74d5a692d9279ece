"""Both ends of a tunnel: what was seen and tried → a verdict for each, with what helps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from msgspec import Struct

from reconciler.core.appliances import Health, Holder
from reconciler.core.doctor import Check, failed, ok, unknown, warning
from reconciler.core.sshd import (
    NO_SHELL,
    Difference,
    Effective,
    Policy,
    authorized_keys,
    compare,
    keys_wanting,
)
from reconciler.core.tunnel import HostKey, Reach, Tunnel
from reconciler.core.tunnel_seen import TunnelSeen
from reconciler.core.units import Port, format_duration

AS_ROOT: Final = "needs root: sudo reconciler doctor --only tunnel"
BLOCK: Final = "reconciler render sshd"


# -- the hub


class Sshd(Struct, frozen=True, kw_only=True):
    """An sshd of this machine."""

    binary: str = ""
    """Empty: it is not installed."""
    pid: int = 0
    """Of who listens; 0: nobody does."""
    config: str = ""
    """What it was told with -f; empty: its own /etc/ssh/sshd_config."""
    ports: Sequence[Port] = ()
    waits: str = ""
    """The socket unit by which systemd listens for it."""

    @property
    def command(self) -> str:
        """How it says what holds, up to `-C`."""
        return f"{self.binary} -T" + (f" -f {self.config}" if self.config else "")


class Account(Struct, frozen=True, kw_only=True):
    """The account that tunnels come to."""

    name: str
    uid: int
    home: str
    shell: str
    shell_works: bool
    """sshd lets nobody in whose shell it cannot execute, though it never starts it."""
    groups: Sequence[str] = ()
    gids: Collection[int] = ()
    password: str | None = None
    """`locked`, `none` (nobody's fits), `set`; None: not ours to see."""
    expired: bool = False


class KeyFile(Struct, frozen=True, kw_only=True):
    """A file of keys that let in as the account."""

    path: str
    text: str = ""
    trouble: str = ""
    """Why sshd does not use it."""
    missing: bool = False


def server(found: Sshd) -> Check:
    """Whether an sshd is there to be dialled."""
    id_, title = "tunnel.sshd", "sshd"
    if not found.binary:
        said = "it is not installed, so no appliance can dial this hub"
        return failed(id_, title, said, "apt-get install openssh-server")
    config = f", by {found.config}" if found.config else ""
    if found.pid:
        ports = f" on {', '.join(map(str, found.ports))}" if found.ports else ""
        return ok(id_, title, f"{found.binary} listens{ports} (pid {found.pid}{config})")
    if found.waits:
        return ok(id_, title, f"{found.binary}: systemd listens for it ({found.waits})")
    return failed(id_, title, f"{found.binary} does not run", "systemctl enable --now ssh")


def account(name: str, found: Account | None, pam: bool) -> Check:
    """Whether somebody can come in as the account, and no further."""
    id_, title = "tunnel.account", "tunnel's account"
    if found is None:
        said = f"there is no user {name} (`tunnel: {{user: …}}`)"
        how = f"--system --no-create-home --home-dir /nonexistent --shell {NO_SHELL} --password '*'"
        return failed(id_, title, said, f"useradd {how} {name}")
    if not found.shell_works:
        said = f"{name}'s shell {found.shell} cannot be executed, and sshd refuses such a user"
        return failed(id_, title, said, f"usermod --shell {NO_SHELL} {name}")
    if found.expired:
        said = f"the account {name} has expired"
        return failed(id_, title, said, f"usermod --expiredate '' {name}")
    if found.password == "locked" and not pam:  # noqa: S105 no password
        said = f"{name} is locked (! in /etc/shadow), and with `UsePAM no` its key is refused too"
        return failed(id_, title, said, f"usermod --password '*' {name}")
    if found.uid and not found.shell.endswith(("/nologin", "/false")):
        said = f"{name}'s shell is {found.shell}: should the policy go, its key opens it"
        return warning(id_, title, said, f"usermod --shell {NO_SHELL} {name}")
    if found.password is None:
        return unknown(id_, title, f"{name} is there; whether it is locked cannot be told", AS_ROOT)
    return ok(id_, title, f"{name}, shell {found.shell}")


def rules(policy: Policy, found: Effective, groups: Collection[str], asked: str) -> Iterator[Check]:
    """Where the running sshd differs from the policy, a line each. `asked`: how it was asked."""
    wrong = compare(policy, found, groups)
    for one in wrong:
        yield _difference(f"tunnel.policy.{one.keyword.lower()}", "sshd's policy", one)
    if not any(one.needed for one in wrong):
        opens, listens = policy.opens, policy.listens
        said = (
            f"{asked}: {policy.user} may open {len(opens)} ports and listen on "
            f"{', '.join(map(str, listens))}"
        )
        yield ok("tunnel.policy", "sshd's policy", said)


def _difference(id_: str, title: str, one: Difference) -> Check:
    verdict = failed if one.needed else warning
    how = f"{one.line}; the whole block: {BLOCK}"
    return verdict(id_, title, one.found, how if one.keyword != "authorized_keys" else one.line)


def keys(policy: Policy, files: Sequence[KeyFile]) -> Iterator[Check]:
    """Whether each SNA has a key that lets it in."""
    id_, title = "tunnel.keys", "authorized keys"
    usable = [one for one in files if not one.trouble and not one.missing]
    for number, one in enumerate(files):
        if one.trouble:
            fix = f"chown root: {one.path}; chmod 644 {one.path}; see: namei -l {one.path}"
            said = f"sshd does not use {one.path}: {one.trouble}"
            yield failed(f"{id_}.file{number}", title, said, fix)
    if not usable:
        if not any(one.trouble for one in files):
            paths = " ".join(one.path for one in files) or "none is named"
            said = f"there is no file of keys of {policy.user}: {paths}"
            yield failed(id_, title, said, f"{BLOCK} --key SNA=FILE.pub")
        return
    where = " ".join(one.path for one in usable)
    lines = [line for one in usable for line in authorized_keys(one.text)]
    wrong = keys_wanting(policy, lines, where)
    for number, found in enumerate(wrong):
        yield _difference(f"{id_}.{number}" if number else id_, title, found)
    if not wrong:
        count = sum(line.key is not None for line in lines)
        yield ok(id_, title, f"{where}: {count} key{'s' * (count != 1)}, one at least for "
                 f"{', '.join(policy.reaches)}")  # fmt: skip


def reverse(
    name: str, reach: Reach, held: Holder | None, health: Health, user: str, exposed: str
) -> Iterator[Check]:
    """Who holds the port by which the hub finds an SNA, and whether it answers through it.

    `exposed`: the address at which other machines reach it too.
    """
    id_, title, end = f"tunnel.{name}.reverse", f"tunnel of {name}", reach.listens
    reply = f"GET /api/v1/health: {health.status or health.said or health.kind}"
    if held is None:
        said = f"nobody listens on {end}: the appliance has not dialled, or was refused"
        fix = "at the appliance: reconciler status; here: journalctl -u ssh -n 50"
        yield failed(id_, title, said, fix)
        return
    if held.pid is None:
        yield unknown(id_, title, f"{end} is held by {held}; {reply}", AS_ROOT)
        return
    if not held.sshd:
        if health.well:
            said = f"{end}: {held} of this machine answers itself; no tunnel leads there"
            yield ok(id_, title, said)
        else:
            said = (
                f"{end} is held by {held}, which is no sshd, so no appliance can have it; {reply}"
            )
            yield failed(id_, title, said, f"see what it is: ps -fp {held.pid}; end it")
        return
    if held.user != user:
        said = f"{end} is held by {held}, and tunnels come as {user} (`tunnel: {{user: …}}`)"
        fix = "have the spec's `user` and the hub's config agree"
        yield warning(f"{id_}.user", title, said, fix)
    if exposed:
        said = f"{held} listens on {exposed} too: other machines reach the appliance by it"
        yield warning(f"{id_}.open", title, said, f"GatewayPorts no; the whole block: {BLOCK}")
    if health.well:
        took = format_duration(health.took)
        yield ok(id_, title, f"{end} is held by {held}; {reply} after {took}")
        return
    said = f"{end} is held by {held}; {reply}: "
    fix = f"at the appliance: reconciler status; if that session is a dead one: kill {held.pid}"
    if health.status:
        said += "the tunnel stands, and what answers is no appliance that is well"
        fix = "start the appliance's own service"
    else:
        said += "nobody answers: the appliance is down, or the link to it, or the session is dead"
    yield failed(id_, title, said, fix)


# -- the appliance


def appliance_end(
    one: Tunnel, seen: TunnelSeen, version: str, owner: str, shown: Sequence[HostKey], fault: str,
    reason: str,
) -> Iterator[Check]:  # fmt: skip
    """What a tunnel needs at the side that dials. `owner`: of the key, with its mode. `shown`: the
    keys that the hub shows; `fault`, `reason`: why it showed none."""
    base, title = f"tunnel.{one.name}", f"tunnel {one.name}"
    if seen.ssh_error:
        yield failed(f"{base}.ssh", title, seen.ssh_error, "apt-get install openssh-client")
    else:
        yield ok(f"{base}.ssh", title, version)
    yield _identity(one, seen, owner, f"{base}.identity", title)
    trust = f"reconciler tunnel trust {one.name}"
    if seen.key is None:
        said = seen.key_error or "its spec names no host_key, and anybody could be the hub"
        yield failed(f"{base}.host_key", title, said, trust)
    else:
        yield ok(f"{base}.host_key", title, f"pinned: {seen.key.kind} {seen.key.fingerprint}")
    if seen.busy:
        port, who = min(seen.busy.items())
        more = f", and {len(seen.busy) - 1} more of its ports are taken" * (len(seen.busy) > 1)
        said = (
            f"{one.bind}:{port} is held by {who}{more}; for one busy port ssh gives up all forwards"
        )
        fix = f"ss -ltnp 'sport = :{port}'; end that, or give it another `forward: {{bind: …}}`"
        yield failed(f"{base}.ports", title, said, fix)
    else:
        ours = sum(len(line.listening) for line in seen.lines)
        ports = len(one.ports("whole"))
        said = f"{ports} local ports on {one.bind}: {ports - ours} free, {ours} of its own ssh"
        yield ok(f"{base}.ports", title, said)
    yield _far(one, seen, shown, fault, reason, f"{base}.hub", title)


def _identity(one: Tunnel, seen: TunnelSeen, owner: str, id_: str, title: str) -> Check:
    ref = one.identity
    if ref is None:
        return failed(id_, title, "its spec names no identity", "write `identity: {file: PATH}`")
    if ref.kind == "credential" and not seen.identity:
        said = f"{ref}: only a service that systemd started has it"
        return unknown(id_, title, said, "systemctl show reconciler -p LoadCredential")
    if seen.identity_error:
        said, _, fix = seen.identity_error.rpartition(": ")
        known = said and fix.startswith(("chmod", "ssh-keygen"))
        if known:
            return failed(id_, title, said, fix)
        return failed(id_, title, seen.identity_error, f"ls -l {seen.identity}")
    return ok(id_, title, f"{seen.identity}, {owner}, a private key without a passphrase")


_HELPS: Final = {
    "HubUnresolved": "getent hosts {host}; mend the name, or write an address",
    "HubUnreachable": "getent hosts {host}; ip route; at the hub: systemctl status ssh, ss -ltn",
    "HubNotSsh": "at the hub: ss -ltnp 'sport = :{port}'",
    "SshMissing": "apt-get install openssh-client",
}


def _far(
    one: Tunnel, seen: TunnelSeen, shown: Sequence[HostKey], fault: str, reason: str, id_: str,
    title: str,
) -> Check:  # fmt: skip
    if fault:
        fix = _HELPS.get(reason, "ssh-keyscan -p {port} {host}")
        return failed(id_, title, fault, fix.format(host=one.host, port=one.port))
    if seen.key is None:
        said = f"{one.target} answers with {shown[0].kind} {shown[0].fingerprint}, not yet trusted"
        return warning(id_, title, said, f"reconciler tunnel trust {one.name}")
    if seen.key in shown:
        return ok(id_, title, f"{one.target} answers with the pinned host key")
    other = next((key for key in shown if key.kind == seen.key.kind), shown[0])
    said = (
        f"{one.target} answers with {other.kind} {other.fingerprint}, not with the pinned "
        f"{seen.key.fingerprint}: another machine, or a hub that was installed anew"
    )
    return failed(id_, title, said, f"compare at the hub; then: reconciler tunnel trust {one.name} "
                  "--replace")  # fmt: skip
