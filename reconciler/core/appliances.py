"""Whether a run may begin: its SNA has to answer a health check before anything of it is made.

A TCP connect proves nothing, as the hub's sshd accepts for whoever is or was at the other end of
the tunnel. So `GET /api/v1/health` is asked, and where it is not answered, who holds the port tells
which layer has failed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core.backoff import pause
from reconciler.core.call import CallState
from reconciler.core.desired import Vm
from reconciler.core.ledger import Ledger
from reconciler.core.units import Port, Seconds, stamp

UNREACHABLE: Final = "ApplianceUnreachable"
"""Why a run does not begin, and the reason that status shows."""
FRESH: Final[Seconds] = 5.0
"""How long an answer counts for whoever looks by itself: so many VMs that begin ask once."""
LONGEST: Final[Seconds] = 30.0
"""An SNA for which runs wait is asked at least that often: they go on soon after it is back."""
TUNNEL: Final = (
    "on the SNA reconciler status and reconciler explain tunnel/NAME, here "
    "reconciler doctor --only tunnel"
)
"""What tells more of a tunnel, from both of its ends."""


class Holder(Struct, frozen=True, kw_only=True):
    """Who listens on this machine at the port of an SNA's URL."""

    pid: int | None = None
    """None: not ours to see."""
    name: str = ""
    user: str = ""
    """As whom it runs; of an sshd, who has logged in."""
    peer: str = ""
    """Of an sshd, the other end of its session: address and port. Empty: not known."""
    since: Seconds = 0.0
    """When it began. Seconds since the epoch; 0: not known."""

    @property
    def sshd(self) -> bool:
        """Its session's process is `sshd`, since OpenSSH 9.8 `sshd-session`."""
        return self.name in ("sshd", "sshd-session")

    def __str__(self) -> str:
        if self.pid is None:
            whose = f" of user {self.user}" if self.user else ""
            return f"a process{whose} that is not ours to see"
        told = [f"pid {self.pid}"]
        told += [f"user {self.user}"] if self.user else []
        told += [f"from {self.peer}"] if self.peer else []
        told += [f"since {stamp(self.since)}"] if self.since else []
        return f"{self.name or 'a process'} ({', '.join(told)})"


class Health(Struct, frozen=True, kw_only=True):
    """What an SNA answered to its health check."""

    status: int | None = None
    kind: str = ""
    """`refused`, `closed`, `connect` (no connection in time), `timeout`, `dns`, `tls`, or `other`,
    where no answer came."""
    said: str = ""
    took: Seconds = 0.0
    here: bool = False
    """Its URL names this machine, so that who listens there can be seen."""
    holder: Holder | None = None
    """Who listens there; None: nobody, or it was not looked."""

    @property
    def well(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def near_end(url: str) -> tuple[str, Port] | None:
    """The address and port of a URL that names this machine; None: it names another."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if host == "localhost":
        return "127.0.0.1", port
    try:
        return (host, port) if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return None


def layer(found: Health) -> str:
    """Which layer between the hub and an SNA that is not well has failed, and how."""
    held = found.holder
    stranger = held is not None and held.pid is not None and not held.sshd
    if found.status in (401, 403):
        return f"token: it answers {found.status}, so it speaks and does not let us in"
    if found.status is not None:
        who = f"; {held} holds the port, which is no sshd" if stranger else ""
        said = "it is not well, or something else answers there"
        return f"HTTP: it answers {found.status}, so {said}{who}"
    if found.kind == "dns":
        return f"name: it cannot be resolved: {found.said}"
    if found.kind == "tls":
        return f"TLS: {found.said}"
    if found.here and held is None:
        if found.kind == "refused":
            return "tunnel: nothing listens there, so no tunnel of this SNA is up"
        return f"tunnel: {found.said}, and nothing listens there any more"
    if stranger:
        return f"port: {held} holds it, which is no sshd, so no tunnel can: {found.said}"
    if held is not None:
        who = str(held) if held.sshd else f"a tunnel, or whatever {held} is,"
        how = "closes each connection at once" if found.kind == "closed" else found.said
        return (
            f"appliance: {who} holds the port, and behind it: {how}. The tunnel is up and the "
            "appliance behind it does not answer, or a stale session holds the port"
        )
    if found.kind in ("timeout", "closed"):
        return f"appliance: it accepts, and then: {found.said}"
    return f"network: {found.said}"


def helps(name: str, found: Health) -> str:
    """What to type next."""
    held = found.holder
    if found.status in (401, 403):
        return f"see to `snas: {{{name}: {{token: …}}}}`, then reconciler doctor --only sna"
    if found.kind in ("dns", "tls") or (found.kind == "connect" and not found.here):
        return "reconciler doctor --only sna"
    if held is not None and held.pid is not None and not held.sshd:
        return f"ps -fp {held.pid}; {TUNNEL}"
    return TUNNEL


def trouble(name: str, url: str, found: Health) -> str:
    """Why nothing of a run is begun. The same words as long as it is the same trouble."""
    return f"SNA {name} at {url}: {layer(found)}; next: {helps(name, found)}"


def next_of(why: str) -> str:
    """What `trouble` says to type next."""
    return why.rpartition("; next: ")[2]


def rest(failures: int) -> Seconds:
    """How long an SNA that did not answer well so often in a row is left alone: 5, 5, 8, 16, 30."""
    return min(LONGEST, max(FRESH, pause(failures)))


def unbegun(
    vm: Vm, ledger: Ledger, claims: Collection[tuple[str, str]], served: Collection[tuple[str, str]]
) -> bool:
    """Whether a VM's run is still to begin: nothing was made, leased, claimed, served or called.

    `claims`, `served`: (VM, run) of the claims and of the servers that were seen.
    """
    run = (vm.name, vm.run)
    if not vm.exported or vm.purpose != "backup" or not vm.sna or run in claims or run in served:
        return False
    call = ledger.active(vm.name) or ledger.latest(*run)
    if call is not None and call.state not in (CallState.DUE, CallState.REJECTED):
        return False
    return all(lease.run != vm.run for lease in ledger.of(vm.name))


def needed(
    vms: Iterable[Vm],
    ledger: Ledger,
    claims: Collection[tuple[str, str]],
    served: Collection[tuple[str, str]],
    now: Seconds,
) -> set[str]:
    """The SNAs that have to answer before some run of these VMs begins."""
    return {
        vm.sna
        for vm in vms
        if unbegun(vm, ledger, claims, served) and not ledger.paused(vm.name, now)
    }


def refusal(vm: Vm, url: str, appliances: Mapping[str, Health] | None, ledger: Ledger) -> str:
    """Why a run that is still to begin does not; empty: it may.

    `appliances`: what SNAs answered; None: nobody asked them, and what was found last counts.
    """
    if appliances is None:
        reason, told = ledger.failures.get(vm.name, ("", ""))
        return told if reason == UNREACHABLE else ""
    found = appliances.get(vm.sna)
    return "" if found is None or found.well else trouble(vm.sna, url, found)
