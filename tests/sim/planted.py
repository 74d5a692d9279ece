"""Bugs that the simulation has to find: each is put into the code, or into what stands for it.

A bug of the planner or of the executor is planted there; one that would sit in an adapter is
planted in the fake that takes the adapter's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from msgspec.structs import replace
from pytest import MonkeyPatch

from reconciler.core.actions import Action, Stop
from reconciler.core.actual import Identity
from reconciler.core.call import Answer, Call, CallEvent, CallState
from reconciler.core.desired import Vm
from reconciler.core.settings import Secret
from reconciler.core.units import Seconds
from reconciler.core.vm_plan import OneVm
from reconciler.execute import Step, _OneVm
from tests.fakes import FakeHost, FakeLine, FakeRecords, Process


def the_intent_is_written_after_the_post(patch: MonkeyPatch) -> None:
    """A crash in between leaves no trace of the POST."""
    advance, intend, start = FakeRecords.advance, FakeHost.intend, FakeLine.start
    late: list[Callable[[], object]] = []

    def later(self: FakeRecords, call: Call, event: CallEvent, now: Seconds, **told: Any) -> Call:
        if event is not CallEvent.INTEND:
            return advance(self, call, event, now, **told)
        late[:] = [lambda: advance(self, call, event, now, **told)]
        return replace(call, state=CallState.INTENDED)

    def intend_later(self: FakeHost, vm: Vm, call: Call) -> None:
        late.append(lambda: intend(self, vm, call))

    def start_first(self: FakeLine, request: Mapping[str, str], password: Secret) -> Answer:
        answer = start(self, request, password)
        for write in late:
            write()
        return answer

    patch.setattr(FakeRecords, "advance", later)
    patch.setattr(FakeHost, "intend", intend_later)
    patch.setattr(FakeLine, "start", start_first)


def the_post_is_sent_again_on_a_time_out(patch: MonkeyPatch) -> None:
    """As many a library for HTTP does by itself."""
    start = FakeLine.start

    def insist(self: FakeLine, request: Mapping[str, str], password: Secret) -> Answer:
        answer = start(self, request, password)
        return start(self, request, password) if answer.sent and not answer.status else answer

    patch.setattr(FakeLine, "start", insist)


def a_lease_is_released_before_its_server_is_gone(patch: MonkeyPatch) -> None:
    """A stop that fails, or a crash, then leaves a server on a port that is free to be given."""
    perform = _OneVm.perform

    def release_first(self: _OneVm, action: Action) -> Step | None:
        if isinstance(action, Stop) and action.lease:
            self.records.release([action.lease])
        return perform(self, action)

    patch.setattr(_OneVm, "perform", release_first)


def a_server_is_known_by_its_pid_alone(patch: MonkeyPatch) -> None:
    """Whoever has the pid by now is ended in its place."""

    def by_pid(self: FakeHost, identity: Identity) -> Process | None:
        found = [p for one, p in self.processes.items() if one.pid == identity.pid]
        return found[-1] if found else None

    patch.setattr(FakeHost, "held", by_pid)


def not_found_is_taken_as_a_no(patch: MonkeyPatch) -> None:
    """By an appliance that forgets its jobs whenever it restarts."""
    outcome = OneVm.outcome

    def credulous(self: OneVm) -> None:
        before = self.desired
        snas = {
            name: replace(sna, remembers_jobs=True) for name, sna in before.settings.snas.items()
        }
        self.desired = replace(before, settings=replace(before.settings, snas=snas))
        outcome(self)
        self.desired = before

    patch.setattr(OneVm, "outcome", credulous)


def a_claim_is_ignored(patch: MonkeyPatch) -> None:
    """It is neither looked at nor refused."""
    claims = FakeHost._claims

    def unseen(self: FakeHost, *about: Any) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
        return {}, claims(self, *about)[1]

    def claim_anyway(self: FakeHost, vm: Vm) -> None:
        self.claims[vm.root, vm.name, vm.run] = self.records.state_id

    patch.setattr(FakeHost, "_claims", unseen)
    patch.setattr(FakeHost, "claim", claim_anyway)


def taint_is_forgotten(patch: MonkeyPatch) -> None:
    """Once the server is up again, nobody knows that it had died."""
    patch.setattr(FakeRecords, "taint", lambda self, call: None)


def a_step_is_taken_from_wherever_the_call_is(patch: MonkeyPatch) -> None:
    """Without compare-and-swap two operators are kept apart by the lock alone."""
    advance = FakeRecords.advance

    def blindly(self: FakeRecords, call: Call, event: CallEvent, now: Seconds, **told: Any) -> Call:
        known = self.calls.get(call.key)
        if known:
            self.calls[call.key] = replace(known, state=call.state)
        return advance(self, call, event, now, **told)

    patch.setattr(FakeRecords, "advance", blindly)


def an_appliance_is_not_asked_first(patch: MonkeyPatch) -> None:
    """That it is out of reach is found out when everything is built."""
    patch.setattr(OneVm, "unreachable", lambda self: False)


REACHED: Final = "nothing of a run is begun before its appliance has answered"
ONCE: Final = "a run is started once, and once more for each order of a person"
LEFT_ALONE: Final = "what is not ours is left alone"
LEASED: Final = "a server has a lease for as long as it lives"
NO_BACKUP: Final = "a run that lost writes is no backup"
ENDED: Final = "the end of a run is its end"
IN_USE: Final = "a server that is in use is not stopped without an order"


@dataclass(frozen=True, slots=True)
class Bug:
    plant: Callable[[MonkeyPatch], None]
    breaks: frozenset[str]
    """What it does to the world."""


WITHIN: Final = 1500
"""Seeds, from 0 on, in which each is found. Measured: 13 to 230."""
BUGS: Final = (
    Bug(the_intent_is_written_after_the_post, frozenset({ONCE})),
    Bug(the_post_is_sent_again_on_a_time_out, frozenset({ONCE})),
    Bug(a_lease_is_released_before_its_server_is_gone, frozenset({LEASED})),
    Bug(a_server_is_known_by_its_pid_alone, frozenset({LEFT_ALONE})),
    Bug(not_found_is_taken_as_a_no, frozenset({ONCE, IN_USE})),
    Bug(a_claim_is_ignored, frozenset({ONCE, IN_USE})),
    Bug(taint_is_forgotten, frozenset({NO_BACKUP})),
    Bug(an_appliance_is_not_asked_first, frozenset({REACHED})),
    Bug(a_step_is_taken_from_wherever_the_call_is, frozenset({ONCE, ENDED})),
)
