"""The life of the one call, as a table; and what each answer of an SNA means.

The call is the only thing that cannot be looked at: it is remembered, in the ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct

from reconciler.core.desired import Export, Vm
from reconciler.core.units import Bytes, Seconds, format_size


class CallState(StrEnum):
    """Where the one call of a (VM, run, attempt) stands."""

    DUE = "DUE"
    INTENDED = "INTENDED"
    ACCEPTED = "ACCEPTED"
    UNKNOWN = "UNKNOWN"
    REJECTED = "REJECTED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def active(self) -> bool:
        """An SNA may be writing: the servers are protected."""
        return self in (CallState.INTENDED, CallState.ACCEPTED, CallState.UNKNOWN)

    @property
    def terminal(self) -> bool:
        """Nothing more happens to this run."""
        return self in (CallState.COMPLETED, CallState.FAILED, CallState.CANCELLED)


class CallEvent(StrEnum):
    """What can happen to a call."""

    INTEND = "Intend"
    NOTHING_SENT = "NothingSent"
    ACCEPT = "Accepted"
    REJECT = "Rejected"
    UNCLEAR = "Unclear"
    CRASH = "CrashedAfterIntent"
    WITNESS = "Witnessed"
    DENY = "DeniedByAppliance"
    END = "ReportedCompleted"
    FAIL = "ReportedFailed"
    SERVER_DIED = "ServerDied"
    REARM = "Rearmed"
    SAY_ACCEPTED = "ResolvedAccepted"
    SAY_COMPLETED = "ResolvedCompleted"
    SAY_FAILED = "ResolvedFailed"
    RESEND = "ResolvedResend"
    CANCEL = "Cancelled"
    EVIDENCE = "IntentInRepository"
    DAMAGED = "ImagesDamaged"
    EMPTY = "NothingArrived"


_S, _E = CallState, CallEvent
NEXT: Final[Mapping[tuple[CallState, CallEvent], CallState]] = {
    (_S.DUE, _E.INTEND): _S.INTENDED,
    (_S.DUE, _E.NOTHING_SENT): _S.DUE,
    (_S.DUE, _E.REARM): _S.DUE,
    (_S.DUE, _E.CANCEL): _S.CANCELLED,
    (_S.DUE, _E.EVIDENCE): _S.UNKNOWN,
    (_S.INTENDED, _E.NOTHING_SENT): _S.DUE,
    (_S.INTENDED, _E.ACCEPT): _S.ACCEPTED,
    (_S.INTENDED, _E.REJECT): _S.REJECTED,
    (_S.INTENDED, _E.UNCLEAR): _S.UNKNOWN,
    (_S.INTENDED, _E.CRASH): _S.UNKNOWN,
    (_S.UNKNOWN, _E.WITNESS): _S.ACCEPTED,
    (_S.UNKNOWN, _E.DENY): _S.DUE,
    (_S.UNKNOWN, _E.END): _S.COMPLETED,
    (_S.UNKNOWN, _E.FAIL): _S.FAILED,
    (_S.UNKNOWN, _E.SERVER_DIED): _S.FAILED,
    (_S.UNKNOWN, _E.DAMAGED): _S.FAILED,
    (_S.UNKNOWN, _E.EMPTY): _S.FAILED,
    (_S.UNKNOWN, _E.SAY_ACCEPTED): _S.ACCEPTED,
    (_S.UNKNOWN, _E.SAY_COMPLETED): _S.COMPLETED,
    (_S.UNKNOWN, _E.SAY_FAILED): _S.FAILED,
    (_S.UNKNOWN, _E.RESEND): _S.CANCELLED,
    (_S.UNKNOWN, _E.CANCEL): _S.CANCELLED,
    (_S.ACCEPTED, _E.END): _S.COMPLETED,
    (_S.ACCEPTED, _E.FAIL): _S.FAILED,
    (_S.ACCEPTED, _E.SERVER_DIED): _S.FAILED,
    (_S.ACCEPTED, _E.DAMAGED): _S.FAILED,
    (_S.ACCEPTED, _E.EMPTY): _S.FAILED,
    (_S.ACCEPTED, _E.SAY_COMPLETED): _S.COMPLETED,
    (_S.ACCEPTED, _E.SAY_FAILED): _S.FAILED,
    (_S.ACCEPTED, _E.RESEND): _S.CANCELLED,
    (_S.ACCEPTED, _E.CANCEL): _S.CANCELLED,
    (_S.REJECTED, _E.REARM): _S.DUE,
    (_S.REJECTED, _E.EVIDENCE): _S.UNKNOWN,
    (_S.REJECTED, _E.CANCEL): _S.CANCELLED,
}
"""Every step a call may take. A pair that is not here is refused by `step`."""


class ImpossibleStepError(ValueError):
    """The call is in a state in which this cannot happen."""


def step(state: CallState, event: CallEvent) -> CallState:
    """The state after `event`. Raises ImpossibleStepError."""
    try:
        return NEXT[state, event]
    except KeyError:
        raise ImpossibleStepError(f"cannot take {event} in state {state}") from None


class Call(Struct, frozen=True, kw_only=True):
    """The ledger's row of one attempt. Times in seconds since the epoch, None: not yet."""

    hub: str
    vm: str
    run: str
    attempt: int
    state: CallState
    sna: str
    type: str
    request: str
    """Digest of what else the SNA is told; see desired.Vm."""
    job_id: str
    """See `job_id`."""
    exports: tuple[Export, ...]
    created: Seconds
    changed: Seconds
    reason: str = ""
    message: str = ""
    failures: int = 0
    """Calls in a row of which nothing was sent."""
    retry_at: Seconds = 0.0
    tainted: bool = False
    """A server died under a client: acknowledged writes may be gone, the run can only fail."""
    targets: str = ""
    """What the SNA was told, from the intent on."""
    display_name: str = ""
    """The VM's name in vCenter; the SNA's client asks the hub by it."""
    path: str = ""
    vcenter: str = ""
    """(vcenter, path) is the VM's identity, whatever name it has here."""
    who: str = ""
    """Who asked for the run."""
    called: Seconds = 0.0
    """When the intent was written down; 0: not yet."""
    ended: Seconds = 0.0
    fallback: str = ""
    """Why it is full although an incremental was asked for; empty: it is what was asked for."""
    doubt: str = ""
    """Why what was published may not be all that was meant; empty: nothing speaks for that."""
    policy: str = ""
    """What a scheduler calls the rule by which it asked; ours only to give back."""
    tags: str = "{}"
    """What else it wants to find with the run: a JSON object of strings."""

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.vm, self.run, self.attempt)


def ending(call: Call) -> str:
    """The command by which a person says how a run has ended: a shell takes it as it stands, the
    other answer is behind it in brackets, and nothing is offered that would be refused."""
    other = "" if call.tainted else " (or --completed)"
    return f"reconciler resolve {call.vm} --failed --reason WHY{other}"


def resolving(call: Call) -> str:
    """The same of a call of which it is not even known whether an appliance acts on it."""
    others = ["--failed", "--resend"] if call.tainted else ["--completed", "--failed", "--resend"]
    return f"reconciler resolve {call.vm} --accepted --reason WHY (or {', '.join(others)})"


def job_id(hub: str, vm: str, run: str, attempt: int) -> str:
    """The id that every witness can be asked about: at most 64 of `[A-Za-z0-9._-]`.

    A function of what the call is for, so that a process that lost its memory asks for the same.
    """
    import hashlib  # late: who only looks reads the id from the ledger

    digest = hashlib.sha256(json.dumps([hub, vm, run, attempt]).encode()).hexdigest()[:32]
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", vm)[:31].strip("-._")
    return f"{readable or 'vm'}-{digest}"


def due_call(hub: str, vm: Vm, now: Seconds, who: str) -> Call:
    """The row of a run before anything of it exists."""
    attempt = vm.exports[0].attempt
    return Call(
        hub=hub,
        job_id=job_id(hub, vm.name, vm.run, attempt),
        vm=vm.name,
        run=vm.run,
        attempt=attempt,
        state=CallState.DUE,
        sna=vm.sna,
        type=vm.type,
        request=vm.request,
        exports=vm.exports,
        created=now,
        changed=now,
        display_name=vm.display_name,
        path=vm.path,
        vcenter=vm.vcenter,
        who=vm.asked or who,
        policy=vm.policy,
        tags=json.dumps(dict(vm.tags), sort_keys=True),
        fallback=vm.fell_back,
    )


def targets(exports: Sequence[Export], ports: Mapping[int, int], host: str) -> str:
    """The targets string, by position. Raises KeyError if a disk has no port."""
    ordered = sorted(exports, key=lambda export: export.position)
    return ",".join(f"{e.key}:nbd://{host}:{ports[e.key]}/{e.name}" for e in ordered)


def difference(call: Call, sna: str, kind: str, exports: Sequence[Export]) -> str | None:
    """How what is asked for now is not what the call was made for, both sides; None: it is."""
    if call.sna != sna:
        return f"it was asked of SNA {call.sna}, the spec now says {sna}"
    if call.type != kind:
        return f"it was asked for as {call.type}, the spec now says {kind}"
    before = {export.key: export for export in call.exports}
    after = {export.key: export for export in exports}
    if before.keys() != after.keys():
        return (
            f"it was asked for with the disks {', '.join(map(str, before)) or 'unknown'}, "
            f"the spec now names {', '.join(map(str, after))}"
        )
    for key, was in before.items():
        now = after[key]
        for what in ("position", "size", "image", "name", "backing"):
            one, two = getattr(was, what), getattr(now, what)
            if one != two:
                return f"its disk {key} had the {what} {one}, the spec now says {two}"
    return None


class Answer(Struct, frozen=True):
    """What came of one try to call: `sent` is False only when nothing can have left."""

    sent: bool
    status: int | None = None
    body: str = ""
    error: str = ""


REFUSALS: Final = frozenset({400, 401, 403, 404, 405, 413, 415, 422})
"""Statuses with which an SNA says that it did not act. Everything else may mean that it did."""


def judge(answer: Answer, expected_job: str) -> tuple[CallEvent, str]:
    """What an answer means for the call, and the sentence that says so."""
    if not answer.sent:
        return CallEvent.NOTHING_SENT, f"nothing was sent: {answer.error}"
    if answer.status is None:
        return CallEvent.UNCLEAR, f"no answer came: {answer.error}"
    said = answer.body.strip().replace("\n", " ")[:200]
    if answer.status in REFUSALS:
        return CallEvent.REJECT, f"it refused with {answer.status}: {said or 'no reason given'}"
    if answer.status != 200:
        return CallEvent.UNCLEAR, f"it answered {answer.status}: {said or 'nothing more'}"
    try:
        body: Any = json.loads(answer.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return CallEvent.UNCLEAR, f"it answered 200, but not with a JSON object: {said}"
    if body.get("job_id") != expected_job or body.get("status") != "started":
        return CallEvent.UNCLEAR, f"it answered 200, but not that our job started: {said}"
    return CallEvent.ACCEPT, "it started the job"


class Seal(Struct, frozen=True):
    """One image of a run that has ended, after everything that was acknowledged is on the disk."""

    key: int
    image: str
    empty: bool
    """Nothing was ever written into it."""
    damage: str = ""
    """What `qemu-img check` found that matters; clusters that leak do not."""
    size: Bytes = 0
    """What a guest sees."""
    allocated: Bytes = 0
    """What the file takes on its file system."""
    digest: str = ""
    """`sha256:…` of the file; empty: none was asked for."""


def doubt(exports: Sequence[Export], seals: Sequence[Seal], told: Mapping[int, Bytes]) -> str:
    """Why what was published may not be all that was meant; empty: nothing speaks for that.

    `told`: position → how much the client says that it transferred. Numbers alone are no proof: a
    client may count zeros that it need not write, or the bytes of the whole job. So a disk into
    which nothing came at all is told, and its run counts. See docs/adr/0026.
    """
    empty = {one.key for one in seals if one.empty}
    found = [
        f"disk {one.key}: its client reports {format_size(told[one.position])}, and nothing was "
        "ever written into its image"
        for one in sorted(exports, key=lambda export: export.position)
        if one.key in empty and told.get(one.position, 0) > 0
    ]
    return "; ".join(found)


def verdict(kind: str, seals: Sequence[Seal]) -> tuple[CallEvent, str]:
    """How a run ends whose every disk was reported complete, and the sentence that says so.

    An empty disk is plausible, and so is an incremental without changes; a full backup in which
    no disk holds anything is not: its data went somewhere else.
    """
    damaged = [f"disk {one.key} ({one.image}): {one.damage}" for one in seals if one.damage]
    if damaged:
        return CallEvent.DAMAGED, f"its images are damaged: {'; '.join(damaged)}"
    if kind == "full" and all(one.empty for one in seals):
        return CallEvent.EMPTY, (
            "every disk was reported complete, and nothing was written into any image: the data "
            "went elsewhere, or nowhere"
        )
    count = f"{len(seals)} disks" if len(seals) != 1 else "1 disk"
    return CallEvent.END, f"{count} flushed and checked"


class Report(Struct, frozen=True):
    """What an SNA's status says of a job. `known` None: it could not be asked."""

    known: bool | None
    status: str = ""
    message: str = ""
    percent: float | None = None
