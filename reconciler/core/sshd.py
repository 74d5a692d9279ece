"""What the hub's sshd is to let a tunnel do: the policy as a value, and what a running one says.

The policy is made from the same `Reach` as the forwards that the appliance asks for.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct, field

from reconciler.core.appliances import near_end
from reconciler.core.settings import Settings
from reconciler.core.tunnel import LOOPBACK, HostKey, Reach
from reconciler.core.units import Endpoint, Port

KEYS: Final = "/etc/ssh/authorized_keys.d/%u"
"""Root's, so that whoever gets in as the tunnel's user cannot let others in. sshd puts the user's
name for %u."""
DROP_IN: Final = "/etc/ssh/sshd_config.d/50-reconciler-tunnel.conf"
NO_SHELL: Final = "/usr/sbin/nologin"
ALIVE: Final = (15, 3)
"""Seconds between two questions of sshd, and how many may be unanswered. So a dead session
lets go of its reverse port after 45 s, when an appliance that dials anew has waited a few times."""
STALE: Final = 60
"""Seconds after which a dead session must have let go of its reverse port."""
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 compared, not bound


class Policy(Struct, frozen=True, kw_only=True):
    """What the account of the tunnels may do, and nothing else."""

    user: str
    reaches: Mapping[str, Reach]
    """SNA → what its tunnel carries. They differ by the reverse port alone."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """SNA → why no tunnel belongs to it."""
    keys: str = KEYS

    @property
    def opens(self) -> list[Endpoint]:
        """`PermitOpen`: every export's port, and the API."""
        return list(dict.fromkeys(end for one in self.reaches.values() for end in one.opens))

    @property
    def listens(self) -> list[Endpoint]:
        """`PermitListen`: the reverse port of every SNA."""
        return list(dict.fromkeys(one.listens for one in self.reaches.values()))

    @property
    def doubled(self) -> Mapping[Port, Sequence[str]]:
        """Reverse ports that several SNAs want, and only one can have → these."""
        found: dict[Port, list[str]] = {}
        for name, reach in self.reaches.items():
            found.setdefault(reach.reverse, []).append(name)
        return {port: names for port, names in found.items() if len(names) > 1}


def near(host: str) -> str:
    """How somebody on this machine finds who listens at `host`."""
    return LOOPBACK if host in (*_EVERYWHERE, "localhost") else host


def policy(settings: Settings) -> Policy:
    """What the config asks of sshd."""
    reaches: dict[str, Reach] = {}
    skipped: dict[str, str] = {}
    for name, sna in settings.snas.items():
        end = near_end(sna.url)
        if end is None:
            skipped[name] = (
                f"its url {sna.url} is no port of this machine, so no tunnel leads to it"
            )
        elif end[1] < 1024:
            skipped[name] = f"port {end[1]} is root's alone, so no tunnel can listen there"
        else:
            reaches[name] = Reach(
                ports=settings.ports,
                api=settings.listen.port,
                reverse=end[1],
                host=near(settings.bind),
            )
    return Policy(user=settings.tunnel_user, reaches=reaches, skipped=skipped)


class Directive(Struct, frozen=True):
    """One line of the policy."""

    keyword: str
    """As sshd_config(5) spells it."""
    value: str
    why: str
    needed: bool = False
    """Without it no tunnel comes up, or comes back; else more is permitted than should be."""


def directives(one: Policy) -> list[Directive]:
    """The `Match User` block, in the order in which it is written."""
    interval, count = ALIVE
    return [
        Directive("PubkeyAuthentication", "yes", "a key lets in", needed=True),
        Directive("AuthenticationMethods", "publickey", "and a key alone does", needed=True),
        Directive("PasswordAuthentication", "no", "no password"),
        Directive("KbdInteractiveAuthentication", "no", "nor one that PAM asks for"),
        Directive("AuthorizedKeysFile", one.keys, "root's file, not one in the account's home"),
        Directive("DisableForwarding", "no", "a `yes` goes over all that follows", needed=True),
        Directive(
            "AllowTcpForwarding", "yes", "both ways: exports there, the SNA here", needed=True
        ),
        Directive(
            "PermitOpen",
            " ".join(map(str, one.opens)),
            "what -L reaches: every port of `ports.range`, and the API; no other host or port",
            needed=True,
        ),
        Directive(
            "PermitListen",
            " ".join(map(str, one.listens)),
            "what -R may take: as an address, since ssh asks for one; says nothing about -L",
            needed=True,
        ),
        Directive("GatewayPorts", "no", "the reverse port is this machine's alone"),
        Directive("AllowStreamLocalForwarding", "no", "no Unix sockets"),
        Directive("AllowAgentForwarding", "no", "no agent"),
        Directive("X11Forwarding", "no", "no X11"),
        Directive("PermitTunnel", "no", "no network device"),
        Directive("PermitTTY", "no", "no terminal"),
        Directive("PermitUserRC", "no", "no ~/.ssh/rc"),
        Directive("MaxSessions", "0", "no shell, no command, no sftp: `ssh -N` opens none"),
        Directive("ForceCommand", "/bin/false", "and if one were opened, it would do this"),
        Directive(
            "ClientAliveInterval",
            str(interval),
            "a session that is dead lets go of the reverse port, or the next is refused",
            needed=True,
        ),
        Directive("ClientAliveCountMax", str(count), f"so after {interval * count} s", needed=True),
    ]


# -- a running sshd


class Difference(Struct, frozen=True):
    """Something that is not as the policy says."""

    keyword: str
    found: str
    """What is so, as a sentence without its end."""
    line: str
    """What to write."""
    needed: bool
    """The tunnel does not work so, or does not come back; else it may do more than it should."""


Effective = Mapping[str, Sequence[str]]
"""Keyword in small letters → its words, of all of its lines."""


def effective(text: str) -> Effective:
    """What `sshd -T -C user=…` prints."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword:
            found.setdefault(keyword.lower(), []).extend(rest.split())
    return found


def compare(one: Policy, found: Effective, groups: Collection[str] = ()) -> list[Difference]:
    """Where an sshd differs from the policy; nothing: it does what the rendered block says.

    `groups`: those of the account. Where the authorized keys are is not compared: any file will do.
    """
    wrong = [*_let_in(one, found, groups)]
    for line in directives(one):
        key = line.keyword.lower()
        if key in _BY_HAND:
            continue
        value = " ".join(found.get(key, ()))
        if value and value.lower() not in (line.value.lower(), *_ALSO.get(key, ())):
            wrong.append(_differs(line, value))
    wrong += _forwards(one, found)
    wrong += _alive(found)
    for key, keyword in _IDLE.items():
        value = " ".join(found.get(key, ()))
        if value not in ("", "none", "0"):
            wrong.append(
                Difference(
                    keyword,
                    f"{keyword} {value}: a tunnel at rest, or an export in one, is cut by it",
                    f"{keyword} none",
                    needed=True,
                )
            )
    return wrong


_BY_HAND: Final = (
    "permitopen",
    "permitlisten",
    "clientaliveinterval",
    "clientalivecountmax",
    "authorizedkeysfile",
    "forcecommand",
)
_ALSO: Final[Mapping[str, Sequence[str]]] = {"allowtcpforwarding": ("all",)}
_IDLE: Final = {
    "channeltimeout": "ChannelTimeout",
    "unusedconnectiontimeout": "UnusedConnectionTimeout",
}
_SAYS: Final[Mapping[str, str]] = {
    "allowtcpforwarding no": "nothing is forwarded at all",
    "allowtcpforwarding local": "the reverse port is refused",
    "allowtcpforwarding remote": "no export and no API is reached",
    "disableforwarding yes": "nothing is forwarded, whatever else permits it",
    "gatewayports yes": "the reverse port is open to every machine that reaches this one",
    "gatewayports clientspecified": "the appliance may open the reverse port to every machine",
    "pubkeyauthentication no": "no key lets in",
}


def _differs(line: Directive, value: str) -> Difference:
    said = _SAYS.get(f"{line.keyword.lower()} {value.lower()}")
    needed = line.needed
    if line.keyword == "AuthenticationMethods":
        needed = value != "any" and "publickey" not in value.split()
        said = "more than a key is asked for" if needed else "other ways than a key lead in"
    return Difference(
        line.keyword,
        f"{line.keyword} {value}: {said or f'the policy says {line.value}'}",
        f"{line.keyword} {line.value}",
        needed,
    )


def _let_in(one: Policy, found: Effective, groups: Collection[str]) -> Iterator[Difference]:
    for keyword, names, what in (("AllowUsers", (one.user,), "users"),
                                 ("AllowGroups", tuple(groups), "groups")):  # fmt: skip
        patterns = found.get(keyword.lower(), ())
        if patterns and not _any(names, patterns):
            yield Difference(
                keyword,
                f"{keyword} {' '.join(patterns)}: only these {what} are let in, and "
                f"{one.user} is none of them",
                f"{keyword} {one.user if keyword == 'AllowUsers' else (names or (one.user,))[0]}",
                needed=True,
            )
    for keyword, names in (("DenyUsers", (one.user,)), ("DenyGroups", tuple(groups))):
        patterns = found.get(keyword.lower(), ())
        if patterns and _any(names, patterns):
            yield Difference(
                keyword,
                f"{keyword} {' '.join(patterns)}: {one.user} is kept out by it",
                f"take {one.user} out of {keyword}",
                needed=True,
            )


def _any(names: Collection[str], patterns: Sequence[str]) -> bool:
    """Whether a list of patterns takes one of these in. Source: ssh_config(5), PATTERNS."""
    plain = [pattern.partition("@")[0] for pattern in patterns]
    for name in names:
        if any(p.startswith("!") and fnmatch.fnmatchcase(name, p[1:]) for p in plain):
            continue
        if any(not p.startswith("!") and fnmatch.fnmatchcase(name, p) for p in plain):
            return True
    return False


def _forwards(one: Policy, found: Effective) -> Iterator[Difference]:
    tokens = found.get("permitopen", ("any",))
    lacking = [end for end in one.opens if not permitted(end, tokens)]
    if lacking:
        local = _by_name(lacking, tokens)
        yield Difference(
            "PermitOpen",
            f"PermitOpen lacks {_several(lacking)}: forwards to them are refused, though a TCP "
            f"connect at the appliance succeeds{local}",
            f"PermitOpen {_ranges(one.opens)}",
            needed=True,
        )
    elif wider := _wider(one.opens, tokens):
        yield Difference(
            "PermitOpen",
            f"PermitOpen also has {' '.join(wider[:5])}: the appliance reaches more than exports "
            "and the API",
            f"PermitOpen {_ranges(one.opens)}",
            needed=False,
        )
    tokens = found.get("permitlisten", ("any",))
    lacking = [end for end in one.listens if not permitted(end, tokens)]
    line = f"PermitListen {' '.join(map(str, one.listens))}"
    if lacking:
        yield Difference(
            "PermitListen",
            f"PermitListen lacks {_several(lacking)}: the reverse port is refused, and ssh ends "
            f"({' '.join(tokens)}){_by_name(lacking, tokens)}",
            line,
            needed=True,
        )
    elif wider := _wider(one.listens, tokens):
        only = ": a port without an address" if any(w.startswith("*:") for w in wider) else ""
        yield Difference(
            "PermitListen",
            f"PermitListen also has {' '.join(wider[:5])}{only}; more than the reverse ports",
            line,
            needed=False,
        )
    value = " ".join(found.get("forcecommand", ("none",)))
    if value == "none":
        yield Difference(
            "ForceCommand",
            "ForceCommand none: a session would have a command of its own choice",
            "ForceCommand /bin/false",
            needed=False,
        )


def _alive(found: Effective) -> Iterator[Difference]:
    interval, count = ALIVE
    seen = [_seconds(found.get(key, ("0",))[0]) for key in
            ("clientaliveinterval", "clientalivecountmax")]  # fmt: skip
    lines = (f"ClientAliveInterval {interval}", f"ClientAliveCountMax {count}")
    if not seen[0]:
        yield Difference(
            "ClientAliveInterval",
            "ClientAliveInterval 0: a session whose appliance is gone holds its reverse port for "
            "ever, and every new one is refused",
            lines[0],
            needed=True,
        )
    elif not seen[1]:
        yield Difference(
            "ClientAliveCountMax",
            "ClientAliveCountMax 0: a session is never ended, however long it is silent",
            lines[1],
            needed=True,
        )
    elif seen[0] * seen[1] > STALE:
        yield Difference(
            "ClientAliveInterval",
            f"ClientAliveInterval {seen[0]}, ClientAliveCountMax {seen[1]}: a dead session holds "
            f"its reverse port for {seen[0] * seen[1]} s",
            f"{lines[0]}, {lines[1]}",
            needed=False,
        )


def _seconds(text: str) -> int:
    return int(text) if text.isdigit() else 0


def permitted(end: Endpoint, tokens: Sequence[str]) -> bool:
    """Whether a list of `PermitOpen` or `PermitListen` lets somebody have `end`.

    sshd compares names, not addresses: `localhost:9081` is another than `127.0.0.1:9081`. A port
    without an address, which `sshd -T` prints with a star, is any address. Measured with 9.2.
    """
    return any(
        token == "any" or token in _forms(end)  # noqa: S105 a word of sshd's
        for token in tokens
    )


def _forms(end: Endpoint) -> tuple[str, ...]:
    host = str(end).rpartition(":")[0]
    return (str(end), f"*:{end.port}", f"{host}:*", "*:*", str(end.port))


def _wider(ends: Sequence[Endpoint], tokens: Sequence[str]) -> list[str]:
    exact = {str(end) for end in ends}
    return [token for token in tokens if token != "none" and token not in exact]  # noqa: S105


def _by_name(lacking: Sequence[Endpoint], tokens: Sequence[str]) -> str:
    named = [f"localhost:{end.port}" for end in lacking if f"localhost:{end.port}" in tokens]
    if not named:
        return ""
    return f"; it has {named[0]}, and the appliance asks for {lacking[0]}, which is not the same"


def _several(ends: Sequence[Endpoint]) -> str:
    first = " ".join(map(str, ends[:3]))
    return first + (f" and {len(ends) - 3} more" if len(ends) > 3 else "")


def _ranges(ends: Sequence[Endpoint]) -> str:
    return f"{ends[0]} … {ends[-1]}" if len(ends) > 3 else " ".join(map(str, ends))


# -- the keys


class KeyLine(Struct, frozen=True):
    """One line of an authorized_keys file."""

    number: int
    options: Mapping[str, Sequence[str]]
    """Name in small letters → its values; of a flag there is an empty one."""
    key: HostKey | None
    """None: there is none that can be read."""


def authorized_line(reach: Reach, key: HostKey, comment: str) -> str:
    """The line that lets an appliance's key in, with its own reverse port and nobody else's.

    The options repeat the policy, so that the key is no more where that block is missing.
    """
    options = ["restrict", "port-forwarding", 'command="/bin/false"']
    options.append(f'permitlisten="{reach.listens}"')
    options += [f'permitopen="{end}"' for end in reach.opens]
    return f"{','.join(options)} {key} {comment}\n"


def authorized_keys(text: str) -> list[KeyLine]:
    """What a file of keys says. Source: sshd(8), AUTHORIZED_KEYS FILE FORMAT."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            found.append(KeyLine(number, {}, _at_once(line)))
            continue
        except ValueError:
            head, rest = _split(line)
        try:
            key = _at_once(rest)
        except ValueError:
            key = None
        options: dict[str, list[str]] = {}
        for name, value in re.findall(r'([A-Za-z0-9-]+)(?:="((?:[^"\\]|\\.)*)")?,?', head):
            options.setdefault(name.lower(), []).append(value)
        found.append(KeyLine(number, options, key))
    return found


def _at_once(line: str) -> HostKey:
    """A key that a line begins with. Raises ValueError."""
    if not re.match(r"(?:ssh|ecdsa|sk)-[a-z0-9@.-]+\s", line):
        raise ValueError("no key")
    return HostKey.parse(line)


def _split(line: str) -> tuple[str, str]:
    """Options and what follows; a space within quotes divides nothing."""
    found = re.match(r'((?:[^\s"]|"(?:[^"\\]|\\.)*")+)\s+(.*)', line)
    return (found[1], found[2]) if found else (line, "")


def keys_wanting(one: Policy, lines: Sequence[KeyLine], file: str) -> list[Difference]:
    """What the keys of the account lack. Of a key that is there twice, sshd takes the first."""
    first: dict[str, KeyLine] = {}
    for line in lines:
        if line.key:
            first.setdefault(str(line.key), line)
    if not first:
        return [_no_key(next(iter(one.reaches), "SNA"), f"{file} has no key", file)]
    wrong: list[Difference] = []
    for name, reach in one.reaches.items():
        able = [line for line in first.values() if not _hinders(line, reach)]
        if not able:
            why = [f"line {line.number}: {_hinders(line, reach)}" for line in first.values()]
            said = f"no key in {file} may carry {name} ({reach.listens}): {'; '.join(why[:3])}"
            wrong.append(_no_key(name, said, file))
        elif len(one.reaches) > 1:
            wrong += [
                Difference(
                    "authorized_keys",
                    f"{file}:{line.number} has no permitlisten, so this appliance may take the "
                    "reverse port of another",
                    f'permitlisten="{reach.listens}" (reconciler render sshd prints the line)',
                    needed=False,
                )
                for line in able
                if "permitlisten" not in line.options
            ]
    return list(dict.fromkeys(wrong))


def _no_key(name: str, said: str, file: str) -> Difference:
    line = f"reconciler render sshd --sna {name} --key FILE.pub, and its line into {file}"
    return Difference("authorized_keys", said, line, needed=True)


def _hinders(line: KeyLine, reach: Reach) -> str:
    """Why a key cannot carry a tunnel; empty: it can."""
    options = line.options
    if "no-port-forwarding" in options or (
        "restrict" in options and "port-forwarding" not in options
    ):
        return "it forwards nothing (restrict without port-forwarding)"
    if "permitlisten" in options and not permitted(reach.listens, options["permitlisten"]):
        return f"its permitlisten is {' '.join(options['permitlisten'])}"
    if "permitopen" in options:
        lacking = [end for end in reach.opens if not permitted(end, options["permitopen"])]
        if lacking:
            return f"its permitopen lacks {_several(lacking)}"
    return ""
