"""The plan of one tunnel: which connections end, which are dialled, and what is in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actions import Action, Dial, HangUp, Hold, Redial, Refuse, TakeOver, Wait
from reconciler.core.backoff import jittered
from reconciler.core.ledger import EVERY, Pause
from reconciler.core.tunnel import Tunnel, argv
from reconciler.core.tunnel_seen import Dialled, Ssh, TunnelSeen
from reconciler.core.units import Port, Seconds, format_duration, stamp

PATIENCE: Final[Seconds] = 30.0
"""The longest rest where the network is to blame: a link that is back is used soon."""
CAUTION: Final[Seconds] = 300.0
"""The longest rest where the hub says no: it is mended by a person, and may count our tries."""
_SAID_NO: Final = frozenset(
    {"HostKeyMismatch", "AuthenticationFailed", "IdentityUnusable", "NoCommonCipher", "SshUsage"}
)
YOUNG: Final[Seconds] = 5.0
"""Who dials has written down what became of it by then; else it was ended, and another takes over.
"""
STARTING: Final[Seconds] = 20.0
"""Beside `connect_timeout`: an ssh that does not listen by then never will."""


class TunnelPlan(Struct, frozen=True, kw_only=True):
    """What is to be done about one tunnel, in order; a `VmPlan` as far as the loop asks."""

    call: ClassVar[None] = None
    lost_run: ClassVar[str] = ""
    stale: ClassVar[str] = ""

    name: str
    """`tunnel/NAME`."""
    tunnel: Tunnel
    actions: tuple[Action, ...]

    @property
    def again_at(self) -> Seconds:
        """When the first wait ends by the clock alone; 0: none does."""
        return min(
            (a.until for a in self.actions if isinstance(a, Wait | Hold) and a.until), default=0.0
        )

    @property
    def waits(self) -> list[Wait]:
        """Why it is not as declared."""
        return [action for action in self.actions if isinstance(action, Wait)]


def pause(reason: str, failures: int, *who: object) -> Seconds:
    """1, 2, 4 … seconds of rest after failures in a row, with jitter. 0 after none."""
    if failures <= 0:
        return 0.0
    longest = CAUTION if reason in _SAID_NO else PATIENCE
    return jittered(min(longest, 2.0 ** min(failures - 1, 16)), *who, failures)


def plan_tunnel(
    tunnel: Tunnel,
    seen: TunnelSeen,
    dials: Mapping[str, Dialled],
    now: Seconds,
    *,
    hub: str,
    pause: Pause | None = None,
    ordered: bool = False,
    kill_clients: bool = False,
    healthy_after: Seconds = 60.0,
) -> TunnelPlan:
    """What would make a tunnel as it is declared. `dials`: part → what is remembered of it."""
    one = _One(tunnel, seen, dials, now, hub, kill_clients, healthy_after)
    if pause:
        one.paused(pause)
    elif tunnel.up:
        one.wanted()
    else:
        why = "by order of `reconciler stop`" if ordered else "the spec says `state: down`"
        one.unwanted(seen.lines, "Down", why)
    return TunnelPlan(name=tunnel.subject, tunnel=tunnel, actions=tuple(one.actions))


class _One:
    def __init__(
        self,
        tunnel: Tunnel,
        seen: TunnelSeen,
        dials: Mapping[str, Dialled],
        now: Seconds,
        hub: str,
        kill_clients: bool,
        healthy_after: Seconds,
    ) -> None:
        self.tunnel, self.seen, self.dials, self.now, self.hub = tunnel, seen, dials, now, hub
        self.kill_clients, self.healthy_after = kill_clients, healthy_after
        self.actions: list[Action] = []
        self.moving: list[Hold] = []
        """Why connections with other options are left alone."""
        self.name = tunnel.subject

    def paused(self, pause: Pause) -> None:
        every = pause.vm == EVERY
        until = f", until {stamp(pause.until)}" if pause.until else ""
        self.actions.append(
            Hold(
                vm=self.name,
                cause="Paused",
                why=f"{'everything was' if every else 'it was'} paused at {stamp(pause.since)}"
                f"{until}, by {pause.who or 'somebody'}: {pause.reason}; to go on: "
                f"reconciler resume {'--all' if every else self.name}",
                until=pause.until,
            )
        )

    def wait(self, cause: str, why: str, until: Seconds = 0.0) -> None:
        self.actions.append(Wait(vm=self.name, cause=cause, why=why, until=until))

    # -- what is to be gone

    def unwanted(self, lines: Sequence[Ssh], cause: str, why: str) -> bool:
        """Hang up all of them; none, and False, if a client is in the way of one: half a tunnel
        would cut off a backup's reports and leave its data."""
        held = [found for line in lines if (found := self.held(line))]
        self.actions += held or [
            HangUp(vm=self.name, cause=cause, why=why, ssh=line) for line in lines
        ]
        return not held

    def held(self, line: Ssh) -> Hold | None:
        if not line.clients or self.kill_clients:
            return None
        many = f"{line.clients} client{'s are' if line.clients > 1 else ' is'}"
        return Hold(
            vm=self.name,
            cause="InUse",
            why=f"{many} connected through its {line.mark.part} connection (pid {line.pid}); when "
            "they have left, the same again; or now: reconciler stop "
            f"{self.name} --kill-clients",
            subject=f"keep pid {line.pid}",
        )

    # -- what is to be there

    def wanted(self) -> None:
        chosen = {part: self.choose(part) for part in self.tunnel.parts}
        free = True
        kept = {(line.pid, line.started) for line in chosen.values() if line}
        for line in self.seen.lines:
            if (line.pid, line.started) in kept:
                continue
            part = line.mark.part
            double = part in chosen
            why = (
                f"another ssh of ours (pid {chosen[part].pid}) is this connection"  # type: ignore[union-attr]
                if double
                else f"the tunnel has no {part} connection any more"
            )
            free &= self.unwanted([line], "Double" if double else "PartNotDeclared", why)
        if not free:  # it has the ports that its successors need
            return
        if self.seen.key is None:
            why = self.seen.key_error or "no host key of the hub is pinned"
            over = " --replace" if why.startswith("cannot use") else ""
            self.refuse(
                "HostKeyUnknown", f"{why}: reconciler tunnel trust {self.tunnel.name}{over}"
            )
            return
        self.moving = [held for line in chosen.values() if line and (held := self.moved(line))]
        self.actions += self.moving
        up = [self.part(part, line) for part, line in chosen.items()]
        if all(up) and not self.actions:
            for check in self.seen.checks:
                if check.reason:
                    self.wait(check.reason, check.message)

    def choose(self, part: str) -> Ssh | None:
        """The one that is kept: one that listens before one that does not, then the oldest."""
        found = [line for line in self.seen.lines if line.mark.part == part]
        return max(found, key=lambda line: (len(line.listening), line.age), default=None)

    def refuse(self, cause: str, why: str) -> None:
        self.actions.append(Refuse(vm=self.name, cause=cause, why=why))

    def part(self, part: str, line: Ssh | None) -> bool:
        """Plan one connection; True if it is up and as declared."""
        tunnel = self.tunnel
        wanted = self.argv(part)
        known = self.dials.get(part) or Dialled(tunnel=tunnel.subject, part=part)
        if line is None:
            return self.missing(part, wanted, known)
        if line.argv != wanted:
            # A hub that moved must not have one half of a tunnel, and the old one the other.
            if not self.moving and self.can_dial(part, line):
                cause, why = drift(line.argv, wanted)
                self.redial(part, wanted, known, line, cause, why)
            return False
        if not line.listening.issuperset(tunnel.ports(part)):
            if line.age < tunnel.connect_timeout + STARTING:
                self.wait("Starting", f"its {part} connection (pid {line.pid}) is being made")
            else:
                why = f"pid {line.pid} does not listen after {format_duration(line.age)}"
                self.redial(part, wanted, known, line, "NotListening", why)
            return False
        if not known.is_of(line) and line.age < YOUNG:
            self.wait("Starting", f"its {part} connection (pid {line.pid}) is being tried")
            return False
        if not known.is_of(line):
            self.actions.append(
                TakeOver(
                    vm=self.name,
                    cause="Unrecorded",
                    why="it runs with our mark and is not in the ledger",
                    tunnel=tunnel,
                    part=part,
                    ssh=line,
                )
            )
            return False
        if known.refused:
            return self.refused(part, wanted, known, line)
        return True

    def argv(self, part: str) -> tuple[str, ...]:
        return argv(self.tunnel, part, self.hub, self.seen.identity, self.seen.known)

    def moved(self, line: Ssh) -> Hold | None:
        """What keeps a connection with other options from being dialled anew."""
        return self.held(line) if line.argv != self.argv(line.mark.part) else None

    def can_dial(self, part: str, line: Ssh | None) -> bool:
        """Say what is in the way of an ssh that is to be started."""
        tunnel, seen = self.tunnel, self.seen
        if seen.ssh_error:
            self.refuse("SshMissing", seen.ssh_error)
            return False
        if seen.identity_error:
            self.refuse("IdentityUnusable", seen.identity_error)
            return False
        own = line.listening if line else frozenset()
        busy = [port for port in tunnel.ports(part) if port in seen.busy and port not in own]
        if busy:
            first = busy[0]
            more = f", and {len(busy) - 1} more" if len(busy) > 1 else ""
            self.wait(
                "LocalPortBusy",
                f"{tunnel.bind}:{first} is held by {seen.busy[first]}{more}: ssh would give up all "
                f"forwards for it, so it is not started; end that process, or see "
                f"`ss -ltnp sport = :{first}`",
            )
            return False
        return True

    def missing(self, part: str, wanted: tuple[str, ...], known: Dialled) -> bool:
        if not self.can_dial(part, None):
            return False
        until = known.rest
        reason, message = known.reason, known.message
        if known.up:  # it was up, and ended by itself
            said = self.seen.words.get(part)
            reason, message = (said.reason, said.message) if said else ("SshEnded", "its ssh ended")
            soon = self.now - known.up < self.healthy_after
            if soon and known.failures and not known.hurried:
                until = known.up + pause(reason, known.failures + 1, self.name, part)
        if until > self.now:
            self.wait(reason or "BackOff", f"{message}; dialled again at {stamp(until)}", until)
            return False
        if known.up:
            self.redial(part, wanted, known, None, reason, message)
            return False
        why = "it is not there"
        if known.failures:
            times = f"{known.failures} times" if known.failures > 1 else "once"
            why = f"tried {times}, last: {message}"
        self.actions.append(
            Dial(
                vm=self.name,
                cause=reason or "NotRunning",
                why=why,
                tunnel=self.tunnel,
                part=part,
                argv=wanted,
                known=known,
            )
        )
        return False

    def refused(self, part: str, wanted: tuple[str, ...], known: Dialled, line: Ssh) -> bool:
        """The hub's policy holds for the life of a connection, so another is tried at times."""
        if known.rest <= self.now and not line.clients:
            self.redial(part, wanted, known, line, "ForwardRefused", known.message)
            return False
        again = f"; dialled again at {stamp(known.rest)}" if known.rest > self.now else ""
        self.wait("ForwardRefused", known.message + again, max(known.rest, self.now + 1.0))
        return False

    def redial(
        self,
        part: str,
        wanted: tuple[str, ...],
        known: Dialled,
        line: Ssh | None,
        cause: str,
        why: str,
    ) -> None:
        self.actions.append(
            Redial(
                vm=self.name,
                cause=cause,
                why=why,
                tunnel=self.tunnel,
                part=part,
                argv=wanted,
                known=known,
                ssh=line,
            )
        )


def came_up(
    action: Dial | Redial, ssh: Ssh, refused: Sequence[Port], now: Seconds, healthy_after: Seconds
) -> Dialled:
    """What is remembered of a connection that was brought up just now."""
    known = action.known
    failures = known.failures
    if isinstance(action, Redial):
        lived = now - known.up
        ended_soon = action.ssh is None and lived < healthy_after
        failures = known.failures + 1 if ended_soon or refused else 0
    found = Dialled(
        tunnel=action.vm,
        part=action.part,
        failures=failures,
        up=now,
        pid=ssh.pid,
        started=ssh.started,
        restarts=known.restarts + isinstance(action, Redial),
    )
    return not_permitted(found, action.tunnel, refused, now) if refused else found


def not_permitted(known: Dialled, tunnel: Tunnel, refused: Sequence[Port], now: Seconds) -> Dialled:
    """The same of a connection for which the hub does not permit some forwards."""
    failures = max(1, known.failures)
    return replace(
        known,
        failures=failures,
        rest=now + pause("ForwardRefused", failures + 2, known.tunnel, known.part),
        reason="ForwardRefused",
        message=refused_ports(refused, tunnel.reach.host),
        refused=tuple(refused),
    )


def failed(
    action: Dial | Redial, reason: str, message: str, now: Seconds, healthy_after: Seconds
) -> Dialled:
    """What is remembered of a connection that could not be brought up."""
    known = action.known
    long = bool(known.up) and now - known.up >= healthy_after
    failures = (0 if long else known.failures) + 1
    return Dialled(
        tunnel=action.vm,
        part=action.part,
        failures=failures,
        rest=now + pause(reason, failures, action.vm, action.part),
        reason=reason,
        message=message,
        restarts=known.restarts,
    )


def drift(runs: Sequence[str], wanted: Sequence[str]) -> tuple[str, str]:
    """(cause, why) of a connection that is not dialled as it should be."""

    def known(line: Sequence[str]) -> str:
        return next((word for word in line if word.startswith("UserKnownHostsFile=")), "")

    if known(runs) != known(wanted):
        return "HostKeyChanged", "another host key is pinned than the one that it was dialled with"
    gone = [word for word in runs if word not in wanted]
    new = [word for word in wanted if word not in runs]
    parts = [f"without {_some(gone)}"] if gone else []
    parts += [f"with {_some(new)}"] if new else []
    return (
        "ArgvChanged",
        f"it runs with other options: now {' and '.join(parts) or 'in another order'}",
    )


def _some(words: Sequence[str]) -> str:
    rest = len(words) - 2
    return ", ".join(words[:2]) + (f" and {rest} more" if rest > 0 else "")


def refused_ports(ports: Sequence[Port], host: str) -> str:
    """What is said of forwards that the hub's sshd does not permit."""
    some = ", ".join(map(str, ports[:5])) + (
        f" and {len(ports) - 5} more" if len(ports) > 5 else ""
    )
    return (
        f"the hub's sshd does not permit forwards to {host} port {some} (PermitOpen); on the hub: "
        "reconciler doctor --only tunnel, and reconciler render sshd"
    )
