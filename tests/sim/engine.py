"""One number → a world and what happens in it; lived on virtual time, checked after every step.

A seed is everything: `script_of(seed)` draws the world and the events, `run(script)` lets them
happen to the real planner and the real executor on the host of tests/fakes.py. Nothing in it
depends on the clock, on threads or on the order of a set, so a seed that fails once fails always.

To look at one:

    python -m tests.sim --show 4711       what is drawn from the seed
    python -m tests.sim --from 4711       live it; on failure, the shortened script
    python -m tests.sim --script FILE     live a script again; `-` reads it from stdin
    python -m tests.sim --seeds 10000     many of them

Where a life breaks an invariant, the script is shortened to what is needed for that, and shown as
JSON. Add it to regressions.json, with a sentence that says what was wrong: it is a test from then
on. What a seed draws changes with the table of events; a script does not.
"""

from __future__ import annotations

import json
import random
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final

from msgspec import Struct, convert, to_builtins
from msgspec.structs import replace

from tests.sim.events import EVENTS, MOST, Event, happen, quiet
from tests.sim.invariants import Broken, check
from tests.sim.life import Life, World
from tests.sim.threads import one_by_one

UNEXPECTED: Final = "nothing is raised that nobody expects"
"""What is broken where code raises instead of an invariant."""
SHORT, LONG = 20, 60
"""How many events a life has, at least and about at most."""
LIKELY: Final = (0, 1, 1, 3)
"""How much more or less often than usual a kind of event happens in one life."""
NEWS: Final = ("declare", "make_absent", "an_appliance_ends_its_jobs")
"""After these there is something to do for who looks."""
CHUNK: Final = 50
"""Seeds that a worker lives before it tells of them."""
TRIES: Final = 2000
"""Lives that shortening one script may cost."""


class Script(Struct, frozen=True, kw_only=True):
    """A life that can be lived again."""

    seed: int
    """Where it came from; also in which order side by side work is done."""
    world: World
    events: tuple[Event, ...]

    def to_json(self) -> str:
        """One event a line."""
        events = ",\n    ".join(json.dumps(event) for event in self.events)
        world = json.dumps(to_builtins(self.world))
        return (
            f'{{\n  "seed": {self.seed},\n  "world": {world},\n  "events": [\n    {events}\n  ]\n}}'
        )


def script_from(value: Any) -> Script:
    """A script from its JSON. Raises msgspec.ValidationError."""
    return convert(value, Script)


def script_of(seed: int) -> Script:
    """What is drawn from a seed."""
    draw = random.Random(seed)
    return Script(seed=seed, world=_world(draw), events=tuple(_events(draw)))


def _world(draw: random.Random) -> World:
    return World(
        ports=draw.choice([3, 5, 8, 12, 12]),
        max_running=draw.randint(1, 3),
        reports_end=draw.random() < 0.7,
        remembers_jobs=draw.random() < 0.2,
        cache=draw.choice(["", "", "", "", "writethrough"]),
        lock=draw.random() < 0.7,
        declared=tuple(draw.choice(["r1", "r1", "r2", ""]) for _ in range(3)),
    )


def _events(draw: random.Random) -> Iterator[Event]:
    names = list(EVENTS)
    # Some things happen often in one life and never in another: a life in which everything
    # happens a little seldom gets far in anything.
    weights = [EVENTS[name].weight * draw.choice(LIKELY) for name in names]
    meanwhile = [0 if n == "one_looks" else w for n, w in zip(names, weights, strict=True)]

    def one(name: str) -> Event:
        return (name, draw.randrange(MOST), draw.randrange(MOST))

    for _ in range(draw.randint(0, 3)):
        yield one("the_next_answer_will_be")
    yield one(draw.choice(["apply", "apply_and_crash"]))
    for _ in range(draw.randint(SHORT, LONG)):
        name = draw.choices(names, weights)[0]
        if name == "one_looks" and draw.random() < 0.7:
            yield one(draw.choice(NEWS))
        yield one(name)
        if name == "one_looks":
            # What happens between a look and what is done about it is where races are.
            for other in draw.choices(names, meanwhile, k=draw.randint(1, 2)):
                yield one(other)
            yield one("who_looked_acts")


def run(script: Script) -> Counter[str]:
    """Live it; what was done, by kind. Raises Broken."""
    with one_by_one(script.seed):
        try:
            return _live(script)
        except Broken:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            raise Broken(UNEXPECTED, f"{type(error).__name__}: {error} ({where})") from error


def _live(script: Script) -> Counter[str]:
    life = Life(script.world)
    life.after_step = lambda: check(life)
    for event in script.events:
        happen(life, event)
        check(life)
    quiet(life)
    life.counts["events"] = len(script.events)
    life.counts["calls"] = sum(life.host.started().values())
    return life.counts


# -- what a failure comes to


def broken(script: Script) -> Broken | None:
    """What a script breaks."""
    try:
        run(script)
    except Broken as found:
        return found
    return None


def shorten(script: Script, invariant: str) -> Script:
    """The least that breaks the same invariant: fewer events, smaller numbers, a plainer world."""
    tries = Counter[str]()

    def breaks(candidate: Script) -> bool:
        tries["lives"] += 1
        if tries["lives"] > TRIES:
            return False
        found = broken(candidate)
        return found is not None and found.invariant == invariant

    while True:
        before = script
        script = _fewer(script, breaks)
        script = _smaller(script, breaks)
        script = _plainer(script, breaks)
        if script == before or tries["lives"] > TRIES:
            return script


def _fewer(script: Script, breaks: Any) -> Script:
    size = max(1, len(script.events) // 2)
    while size:
        start = 0
        while start < len(script.events):
            events = script.events[:start] + script.events[start + size :]
            candidate = replace(script, events=events)
            if breaks(candidate):
                script = candidate
            else:
                start += size
        size //= 2
    return script


def _smaller(script: Script, breaks: Any) -> Script:
    for at, (name, *numbers) in enumerate(script.events):
        for which, number in enumerate(numbers):
            for less in sorted({0, 1, 2, 3, number // 2, number - 1} & set(range(number))):
                changed = list(script.events[at][1:])
                changed[which] = less
                event = (name, *changed)
                events = (*script.events[:at], event, *script.events[at + 1 :])
                candidate = replace(script, events=events)
                if breaks(candidate):
                    script = candidate
                    break
    return script


def _plainer(script: Script, breaks: Any) -> Script:
    plain = World()
    changes: list[dict[str, Any]] = [
        {name: getattr(plain, name)} for name in World.__struct_fields__ if name != "declared"
    ]
    for at in range(len(plain.declared)):
        for run_ in ("", "r1"):
            declared = list(script.world.declared)
            declared[at] = run_
            changes.append({"declared": tuple(declared)})
    for change in changes:
        candidate = replace(script, world=replace(script.world, **change))
        if candidate != script and breaks(candidate):
            script = candidate
    return replace(script, seed=0) if breaks(replace(script, seed=0)) else script


def told(script: Script, found: Broken) -> str:
    """All that is needed to look into a failure, the shortened script included."""
    short = shorten(script, found.invariant)
    again = broken(short)
    return (
        f"seed {script.seed} breaks: {found.invariant}\n  {found.what}\n"
        f"shortened from {len(script.events)} to {len(short.events)} events, where it says\n"
        f"  {again.what if again else 'nothing'}\n{short.to_json()}"
    )


# -- many


@dataclass(slots=True)
class Total:
    """What many lives came to."""

    seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, Broken]] = field(default_factory=list)

    def add(self, other: Total) -> None:
        self.seeds += other.seeds
        self.counts += other.counts
        self.failed += other.failed

    def __str__(self) -> str:
        words = ("events", "applies", "passes", "steps", "crashes", "calls")
        counts = ", ".join(f"{self.counts[word]} {word}" for word in words)
        return f"{self.seeds} seeds, {counts} accepted"


def live(seeds: Sequence[int]) -> Total:
    """Some lives, up to the first that breaks something."""
    total = Total()
    for seed in seeds:
        total.seeds += 1
        try:
            total.counts += run(script_of(seed))
        except Broken as found:
            total.failed.append((seed, found))
            break
    return total


def live_many(first: int, count: int, jobs: int) -> Iterator[Total]:
    """The same over processes, chunk by chunk; each chunk stops at its first failure."""
    chunks = [
        range(start, min(start + CHUNK, first + count))
        for start in range(first, first + count, CHUNK)
    ]
    if jobs == 1:
        yield from map(live, chunks)
        return
    # Begun anew: a copy of a process with threads may stand still for ever.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(live, chunks)


def demand(seeds: Sequence[int]) -> Total:
    """Live them all. Raises AssertionError, with the shortened script."""
    total = live(seeds)
    for seed, found in total.failed:
        raise AssertionError(told(script_of(seed), found))
    return total
