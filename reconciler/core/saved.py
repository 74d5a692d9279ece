"""A saved plan: what a person has read and approved of, and all that it rests on.

It is applied as it is or not at all. Whoever applies it plans anew; what is done is what both plans
say, so a file that somebody has made up orders nothing that the planner would not do anyway.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.actions import CHANGES, Action, Conclude, Notify, Release, Stop, Wait, Witness
from reconciler.core.actual import Actual, Listener, Server
from reconciler.core.desired import Vm
from reconciler.core.errors import Exit, ReconcilerError
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan
from reconciler.core.sides import File, described, file_of
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.units import Bytes, Port, Seconds, format_size, natural, stamp
from reconciler.core.vm_plan import VmPlan

Some: TypeAlias = VmPlan | TunnelPlan
_OnePlan = TypeVar("_OnePlan", VmPlan, TunnelPlan)

KIND: Final = "reconciler saved plan"
FORMAT: Final = 1
"""Of the file. Another one is of another version of this program, and is refused."""
NOT_PROMISED: Final = "NotPromised"
"""Cause of a wait in the place of a step that a saved plan does not have."""
SKEW: Final[Seconds] = 60.0
"""How far a clock may be set back between plan and apply; beyond, `expires` means nothing."""
MOST: Final = 20
"""Lines about one thing that are told one by one."""


class StalePlanError(ReconcilerError):
    """What a saved plan rests on has moved, or it was used, or its time is over."""

    exit: ClassVar[Exit] = Exit.STALE_PLAN
    reason: ClassVar[str] = "StalePlan"


class UnreadablePlanError(ReconcilerError):
    """A file that is no saved plan, or not as it was written."""

    exit: ClassVar[Exit] = Exit.INVALID
    reason: ClassVar[str] = "UnreadablePlan"


class Words(Protocol):
    """What was read of something, or why nothing was."""

    @property
    def text(self) -> str: ...
    @property
    def error(self) -> str: ...


class Reading(Struct, frozen=True):
    """What a file said, as digests: enough to see what moved, and no word of it."""

    digest: str
    lines: tuple[str, ...] = ()
    """A short digest of each line."""

    @classmethod
    def of(cls, words: Words, salt: str) -> Reading:
        said = words.error or words.text
        digest = hashlib.sha256(f"{salt}\0{said}".encode(errors="replace")).hexdigest()
        if words.error:
            return cls(digest)
        return cls(digest, tuple(_short(f"{salt}\0{line}") for line in said.splitlines()))


class Known(Struct, frozen=True):
    """What the inventory says of a VM."""

    disks: Mapping[str, Bytes]
    rest: str
    """Digest of everything else, the order of the disks included."""


class Basis(Struct, frozen=True, kw_only=True):
    """A plan, and what was seen when it was made."""

    plan: Plan
    servers: tuple[Server, ...] = ()
    """Ours, of the VMs of the plan."""
    images: Mapping[str, File] = field(default_factory=dict)
    """Path → the image that is there, of the VMs of the plan."""
    leases: Mapping[Port, str] = field(default_factory=dict)
    """Port → whose it is."""
    paused: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, actual: Actual, ledger: Ledger, now: Seconds) -> Basis:
        names = {one.name for one in plan.all}
        return cls(
            plan=plan,
            servers=tuple(one for one in actual.servers if one.mark.vm in names),
            images={path: file_of(one) for path, one in actual.images.items() if one.exists},
            leases={one.port: f"{one.vm} disk {one.disk}" for one in ledger.leases},
            paused=tuple(name for name in sorted(names) if ledger.paused(name, now)),
        )


class Saved(Struct, frozen=True, kw_only=True):
    """A plan that can be applied once, until its time is over."""

    id: str
    """Random; what its one use is written down under."""
    made: Seconds
    expires: Seconds
    who: str
    hub: str
    state_id: str
    """Of the state directory; empty: there was none yet."""
    settings: Mapping[str, Any]
    folder: str
    """Where it was made: paths of specs are relative to it."""
    files: tuple[str, ...] = ()
    """As `-f` has them."""
    extra: tuple[str, ...] = ()
    """As `-e` has them."""
    prune: bool = False
    patterns: tuple[str, ...] = ()
    """As `--vm` has them."""
    selector: str = ""
    chosen: tuple[str, ...] | None = None
    """The VMs that these choose; None: all."""
    readings: Mapping[str, Reading]
    """What was read → what it said."""
    inventory: Mapping[str, Known] | None
    basis: Basis

    def to_json(self) -> dict[str, Any]:
        """What a person may want to know of it, beside the plan itself."""
        return {
            "id": self.id,
            "made": stamp(self.made),
            "expires": stamp(self.expires),
            "who": self.who,
            "state": self.settings.get("state"),
            "folder": self.folder,
            "files": list(self.files),
            "extra": list(self.extra),
            "prune": self.prune,
            "vms": list(self.patterns),
            "selector": self.selector,
            "read": sorted(self.readings),
        }

    @property
    def again(self) -> str:
        """The command that makes it anew, without the name of its file."""
        words = ["reconciler", "plan"]
        words += [word for file in self.files for word in ("-f", file)]
        words += [word for extra in self.extra for word in ("-e", extra)]
        words += [word for pattern in self.patterns for word in ("--vm", pattern)]
        words += ["-l", self.selector] if self.selector else []
        words += ["--prune"] if self.prune else []
        return f"{shlex.join(words)} --out"


class Promise(Struct, frozen=True, kw_only=True):
    """A saved plan that is being applied."""

    saved: Saved
    file: str
    """What it is called where it is applied."""
    begun: bool = False
    """It was carried out; what is left is to stay until its runs have ended."""

    def stale(self, moved: Sequence[str]) -> StalePlanError:
        """What to say if that has moved."""
        made = stamp(self.saved.made)
        told = "\n".join(f"  {line}" for line in moved)
        return StalePlanError(
            f"cannot apply {self.file}, made at {made}; since then:\n{told}\n"
            f"nothing was changed; make a new plan: {self.anew}"
        )

    def used(self, at: Seconds, who: str) -> StalePlanError:
        """What to say if it was applied before."""
        return StalePlanError(
            f"cannot apply {self.file}: it was applied at {stamp(at)} by {who}; a plan is used "
            "once, whatever became of it. See reconciler status, and for what is left make a new "
            f"plan: {self.anew}"
        )

    @property
    def anew(self) -> str:
        return f"{self.saved.again} {shlex.quote(self.file)}"

    def kept(self, planned: Plan, done: Collection[str]) -> Plan:
        """A later plan of the same apply, without what was not promised, or is done already."""
        promised = keys(self.saved.basis.plan) - set(done)
        vms = tuple(self._kept(one, planned, promised) for one in planned.vms)
        tunnels = tuple(self._kept(one, planned, promised) for one in planned.tunnels)
        return replace(planned, vms=vms, tunnels=tunnels)

    def _kept(self, one: _OnePlan, plan: Plan, promised: Collection[str]) -> _OnePlan:
        def stays(action: Action) -> bool:
            if action.kind not in CHANGES or key(action, one, plan) in promised:
                return True
            if not self.begun:
                return False
            ended = isinstance(action, Stop) and action.cause == "RunEnded"
            return ended or isinstance(action, Conclude | Witness | Release)

        going = [action for action in one.actions if not stays(action)]
        if going:  # nor a call that would follow on something that is not done
            going += [a for a in one.actions if isinstance(a, Notify) and a not in going]
        actions = [self._left(action) if action in going else action for action in one.actions]
        return replace(one, actions=tuple(actions)) if going else one

    def _left(self, action: Action) -> Wait:
        why = f"the saved plan does not have: {action.what()} ({action.why}); make a new plan"
        return Wait(vm=action.vm, disk=action.disk, cause=NOT_PROMISED, why=f"{why}: {self.anew}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]


# -- the file


def dump(saved: Saved) -> bytes:
    """The file's content."""
    value = json.loads(msgspec.json.encode(saved))
    outer = {"kind": KIND, "format": FORMAT, "digest": _digest(value), "saved": value}
    return json.dumps(outer, ensure_ascii=False, indent=1).encode() + b"\n"


def is_saved(data: bytes) -> bool:
    """Whether it is a saved plan, be it whole or not, of this version or another."""
    try:
        value = json.loads(data)
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("kind") == KIND


def load(data: bytes, name: str) -> Saved:
    """Raises UnreadablePlanError."""

    def refused(why: str) -> UnreadablePlanError:
        return UnreadablePlanError(
            f"cannot use {name}: {why}; nothing was changed. Make a plan: reconciler plan --out "
            "FILE"
        )

    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise refused("it is no saved plan, or only a part of one") from None
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise refused("it is no saved plan")
    if value.get("format") != FORMAT:
        raise refused(
            f"it was made by another version (format {value.get('format')!s:.20}, this one knows "
            f"{FORMAT})"
        )
    inner = value.get("saved")
    if value.get("digest") != _digest(inner):
        raise refused("it is not as it was written (its digest is another): it was edited, or is "
                      "damaged")  # fmt: skip
    try:
        return msgspec.convert(inner, Saved, str_keys=True, strict=True)
    except (msgspec.ValidationError, ValueError) as error:
        raise refused(f"it was made by another version ({error})") from error


def _digest(value: object) -> str:
    """Of what it says: blanks and the order of its keys are no matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode(errors='replace')).hexdigest()}"


# -- what has moved


def out_of_time(saved: Saved, now: Seconds) -> list[str]:
    if now >= saved.expires:
        return [f"it has expired: it was good until {stamp(saved.expires)}"]
    if now < saved.made - SKEW:
        return [f"the clock was set back: it is {stamp(now)} now"]
    return []


def elsewhere(saved: Saved, hub: str, state_id: str, settings: Mapping[str, Any]) -> list[str]:
    """What is another hub's, or of another configuration."""
    if saved.hub != hub:
        return [f"another hub: it was made for hub {saved.hub}, and this is hub {hub}"]
    before, after = dict(_flat(saved.settings)), dict(_flat(settings))
    found = [
        f"another config: {key} was {_shown(before.get(key))}, and is {_shown(after.get(key))}"
        for key in sorted({*before, *after}, key=natural)
        if before.get(key) != after.get(key)
    ]
    if saved.state_id and saved.state_id != state_id:
        is_ = state_id or "a new one"
        found.append(f"another state directory: its id was {saved.state_id}, and is {is_}")
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            yield from _flat(one, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", one


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def edited(saved: Saved, now: Mapping[str, Words], quotable: Collection[str] = ()) -> list[str]:
    """What files and variables say otherwise. `quotable`: of which the lines may be shown."""
    found: list[str] = []
    for name in dict.fromkeys((*saved.readings, *now)):
        before, words = saved.readings.get(name), now.get(name)
        if before is None:
            found.append(f"{_thing(name)} is read too, which was not there")
        elif words is None:
            found.append(f"{_thing(name)} is not read any more")
        elif words.error and Reading.of(words, saved.id) != before:
            found.append(f"{_thing(name)}: {words.error}")
        else:
            after = Reading.of(words, saved.id)
            if after.digest != before.digest:
                lines = words.text.splitlines() if name in quotable else []
                found += _edited(name, before, after, lines)
    return found


def _thing(name: str) -> str:
    return f"the variable {name} of the environment" if name.startswith("$") else name


def _edited(name: str, before: Reading, after: Reading, lines: Sequence[str]) -> Iterator[str]:
    import difflib  # only when something has moved

    spans, changed, gone = list[str](), list[int](), 0
    matcher = difflib.SequenceMatcher(None, before.lines, after.lines, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "delete":
            gone += b - a
        elif kind != "equal":
            spans.append(f"line {c + 1}" if d == c + 1 else f"lines {c + 1} to {d}")
            changed += range(c, d)
    where = _some(spans, 5)
    if gone:
        where += f"{', ' if where else ''}{gone} line{'s' if gone > 1 else ''} removed"
    yield f"{_thing(name)} was edited since ({where or 'blanks at its end'})"
    for number in changed[:5]:
        if number < len(lines):
            shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in lines[number][:120])
            yield f"  {number + 1}: {shown}"


def known(facts: Mapping[str, Mapping[str, Any]] | None) -> Mapping[str, Known] | None:
    """What an inventory says, of every VM."""
    if facts is None:
        return None
    return {
        name: Known(
            {str(disk["key"]): disk["size"] for disk in one.get("disks", ())},
            _short(
                repr(
                    sorted((k, v) for k, v in one.items() if k != "disks")
                    + [disk["key"] for disk in one.get("disks", ())]
                )
            ),
        )
        for name, one in facts.items()
    }


def restocked(saved: Saved, now: Mapping[str, Known] | None) -> list[str]:
    """What the inventory says otherwise; first of the VMs of the plan."""
    if saved.inventory is None or now is None:
        if saved.inventory is now:
            return []
        return [
            "there is an inventory, which there was not"
            if saved.inventory is None
            else "there is no inventory that can be read"
        ]
    planned = {one.name for one in saved.basis.plan.vms}
    moved = [
        name
        for name in sorted({*saved.inventory, *now}, key=natural)
        if saved.inventory.get(name) != now.get(name)
    ]
    moved.sort(key=lambda name: name not in planned)
    lines = [
        line
        for name in moved
        for line in _restocked(name, saved.inventory.get(name), now.get(name))
    ]
    rest = len(lines) - MOST
    return lines[:MOST] + ([f"and {rest} more changes of the inventory"] if rest > 0 else [])


def _restocked(name: str, before: Known | None, after: Known | None) -> Iterator[str]:
    if before is None:
        yield f"the inventory has another VM: {name}"
        return
    if after is None:
        yield f"the inventory has no VM {name} any more"
        return
    for disk in sorted({*before.disks, *after.disks}, key=natural):
        was, size = before.disks.get(disk), after.disks.get(disk)
        if was is None:
            yield f"the inventory has another disk for {name}: {disk} ({format_size(size or 0)})"
        elif size is None:
            yield f"the inventory has no disk {disk} for {name} any more"
        elif was != size:
            yield (
                f"the inventory has another size for disk {disk} of {name}: {format_size(size)} "
                f"({size} bytes), was {format_size(was)} ({was} bytes)"
            )
    if before.disks == after.disks:
        yield f"the inventory says something else of {name}: its name, path, vCenter or groups"


def observed(before: Basis, now: Basis) -> list[str]:
    """What would be done otherwise now, and what was seen to be otherwise of those VMs.

    Nothing else that was seen counts: who applies a plan wants that to be done which it says.
    """
    ours = {one.name: one for one in before.plan.all}
    theirs = {one.name: one for one in now.plan.all}
    differing = [
        name
        for name in sorted({*ours, *theirs}, key=natural)
        if not _same(ours.get(name), before.plan, theirs.get(name), now.plan)
    ]
    found: list[str] = []
    for name in differing:
        one, two = ours.get(name), theirs.get(name)
        if not (isinstance(one, TunnelPlan) or isinstance(two, TunnelPlan)):
            found += dict.fromkeys(_seen(name, one, two, before, now))
        found += _difference(name, one, before.plan, two, now.plan)
    rest = len(found) - 5 * MOST
    return found[: 5 * MOST] + ([f"and {rest} lines more"] if rest > 0 else [])


def _same(one: Some | None, ours: Plan, two: Some | None, theirs: Plan) -> bool:
    if one is None or two is None:
        return one is two
    if isinstance(one, TunnelPlan) or isinstance(two, TunnelPlan):
        return _all(one, ours) == _all(two, theirs)  # all that is wanted is in the argv
    return _wanted(one.vm) == _wanted(two.vm) and _all(one, ours) == _all(two, theirs)


def _wanted(vm: Vm) -> Vm:
    """A VM but for where it is written."""
    return replace(vm, place="", run_place="", labels={})


def _all(one: Some, plan: Plan) -> list[dict[str, Any]]:
    return [described(action, one, plan) for action in one.actions]


def _seen(
    name: str, one: VmPlan | None, two: VmPlan | None, before: Basis, now: Basis
) -> Iterator[str]:
    """What is there of a VM and was not, or was and is not."""
    ours = {server.identity: server for server in before.servers if server.mark.vm == name}
    theirs = {server.identity: server for server in now.servers if server.mark.vm == name}
    for identity in sorted(ours.keys() - theirs.keys(), key=lambda one: one.pid):
        yield f"server pid {identity.pid} of {name} disk {ours[identity].mark.disk} has ended"
    for identity in sorted(theirs.keys() - ours.keys(), key=lambda one: one.pid):
        mark = theirs[identity].mark
        yield (
            f"server pid {identity.pid} of {name} disk {mark.disk} runs on port {mark.port}, which "
            "was not there"
        )
    for identity in ours.keys() & theirs.keys():
        was, server = ours[identity], theirs[identity]
        where = f"server pid {identity.pid} of {name} disk {server.mark.disk}"
        if was.clients != server.clients:
            yield f"{where} has {server.clients} clients, it had {was.clients}"
        if _answers(was) != _answers(server):
            yield f"{where} {'answers now' if _answers(server) else 'does not answer any more'}"
    strangers = {stranger.port: stranger for stranger in now.plan.strangers}
    known = {stranger.port for stranger in before.plan.strangers}
    for port in sorted({*(one.ports if one else {}).values()}):
        if port in strangers and port not in known:
            yield f"port {port} was taken by {_who(strangers[port])}"
        holder = now.leases.get(port)
        if holder and not holder.startswith(f"{name} ") and before.leases.get(port) != holder:
            yield f"port {port} belongs to {holder} now"
    for path in sorted({*before.plan.images, *now.plan.images} & _paths(one, two)):
        was_there, is_there = before.images.get(path), now.images.get(path)
        if was_there != is_there:
            yield f"the image {path} is {_image(is_there)}; it was {_image(was_there)}"
    if (name in before.paused) != (name in now.paused):
        yield f"{name} is {'paused' if name in now.paused else 'not paused any more'}"
    calls = [plan.call if plan else None for plan in (one, two)]
    states = [(c.run, c.attempt, str(c.state)) if c else None for c in calls]
    if states[0] != states[1]:
        yield f"{name}: {_call(states[1])}; it was: {_call(states[0])}"
    if one and two and _wanted(one.vm) != _wanted(two.vm):
        names = [
            field
            for field in one.vm.__struct_fields__
            if getattr(_wanted(one.vm), field) != getattr(_wanted(two.vm), field)
        ]
        yield f"{name} is wanted otherwise: {', '.join(names)}"


def _answers(server: Server) -> bool:
    return bool(server.handshake and server.handshake.answered)


def _who(stranger: Listener) -> str:
    if stranger.pid is None:
        return f"a process that we may not see, on {stranger.address}"
    return f"pid {stranger.pid} ({stranger.name or 'unknown'})"


def _paths(*plans: VmPlan | None) -> set[str]:
    return {export.image for one in plans if one for export in one.vm.exports}


def _image(image: File | None) -> str:
    return str(image).removeprefix(f"{image.path}: ") if image else "not there"


def _call(state: tuple[str, int, str] | None) -> str:
    if state is None:
        return "no run of it was asked for"
    run, attempt, stands = state
    again = f" (attempt {attempt})" if attempt > 1 else ""
    return f"its run {run}{again} is {stands}"


def _difference(
    name: str, one: Some | None, ours: Plan, two: Some | None, theirs: Plan
) -> Iterator[str]:
    """The two plans of a VM, line by line: `- ` what was approved of, `+ ` what it would be."""
    left = _lines(one)
    right = _lines(two)
    gone, new = Counter(left), Counter(right)
    for line in dict.fromkeys(left):
        if gone[line] > new[line]:
            yield f"- {name} {line}"
    for line in dict.fromkeys(right):
        if new[line] > gone[line]:
            yield f"+ {name} {line}"
    if left == right and one and two:
        for a, b in zip(_all(one, ours), _all(two, theirs), strict=False):
            moved = [key for key in {*a, *b} if a.get(key) != b.get(key)]
            if moved:
                disk = "VM" if a["disk"] is None else f"disk {a['disk']}"
                yield f"{name} {disk}: {a['action']}: other {', '.join(sorted(moved))}"


def _lines(one: Some | None) -> list[str]:
    if one is None:
        return ["is not in the plan"]
    return [
        f"{'VM' if action.disk is None else f'disk {action.disk}'}: {action.kind}: "
        + (f"{action.what()} ({action.cause})" if action.kind in CHANGES else action.cause)
        for action in one.actions
    ] or ["as declared"]


def _some(words: Sequence[str], most: int) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


# -- what was promised


def keys(plan: Plan) -> set[str]:
    """Every change of a plan; see `key`."""
    return {
        key(action, one, plan)
        for one in plan.all
        for action in one.actions
        if action.kind in CHANGES
    }


def key(action: Action, one: Some, plan: Plan) -> str:
    """What an action makes true, whatever there was before and why it is done."""
    found = described(action, one, plan)
    dropped = {"cause", "before", *(() if isinstance(action, Stop) else ("server", "taints"))}
    found = {name: value for name, value in found.items() if name not in dropped}
    return json.dumps([one.name, found], sort_keys=True)


def done(plan: Plan, actions: Iterable[Action]) -> set[str]:
    """The keys of the actions that were carried out."""
    vms = {one.name: one for one in plan.all}
    return {key(action, vms[action.vm], plan) for action in actions if action.vm in vms}
