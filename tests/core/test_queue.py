"""The queue: each name once, one worker per name, urgent ones first, and nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.queue import AGE, Priority, Queue

CHANGED, CRASHED, RESYNC = Priority


def test_a_name_waits_once_however_often_it_is_kicked() -> None:
    queue = Queue()
    assert queue.add("a", RESYNC, 0.0)
    assert not queue.add("a", RESYNC, 1.0)
    assert len(queue) == 1
    assert queue.take(2.0)
    assert queue.take(2.0) is None


def test_more_urgent_goes_first() -> None:
    queue = Queue()
    queue.add("resync", RESYNC, 0.0)
    queue.add("crashed", CRASHED, 0.1)
    queue.add("changed", CHANGED, 0.2)
    queue.add("resync", CHANGED, 0.3)  # a person asks
    order = [item.name for _ in range(3) if (item := queue.take(0.4))]
    assert order == ["changed", "resync", "crashed"]


def test_what_has_waited_long_goes_before_what_is_urgent() -> None:
    queue = Queue()
    queue.add("old", RESYNC, 0.0)
    queue.add("new", CHANGED, 2 * AGE + 0.1)
    item = queue.take(2 * AGE + 0.2)
    assert item and item.name == "old"


def test_one_worker_per_name_and_a_kick_meanwhile_is_not_lost() -> None:
    queue = Queue()
    queue.add("a", CHANGED, 0.0)
    assert queue.take(0.0)
    queue.add("a", CRASHED, 0.1)
    assert queue.take(0.2) is None, "somebody works on it"
    queue.done("a")
    assert queue.take(0.3)


def test_reserved_names_are_left_to_who_reserved_them_all_or_none() -> None:
    queue = Queue()
    queue.add("a", CHANGED, 0.0)
    assert queue.take(0.0)
    assert not queue.reserve(["a", "b"])
    queue.add("b", CHANGED, 0.1)
    queue.done("a")
    assert queue.reserve(["a", "b"])
    assert not queue.reserve(["b"])
    assert queue.take(0.2) is None
    queue.free(["a", "b"])
    item = queue.take(0.3)
    assert item and item.name == "b"


def test_timers_ripen_in_order_and_the_earlier_one_counts() -> None:
    queue = Queue()
    queue.add_at("a", 10.0)
    queue.add_at("a", 20.0)
    queue.add_at("b", 30.0)
    queue.add_at("b", 5.0, CRASHED)
    assert queue.next_at() == 5.0
    assert queue.take(4.9) is None
    item = queue.take(5.0)
    assert item and (item.name, item.priority) == ("b", CRASHED)
    queue.forget_timer("a")
    assert queue.next_at() is None
    assert queue.take(100.0) is None


NAMES = st.sampled_from("abcde")
STEPS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.sampled_from(list(Priority))),
    st.tuples(st.just("at"), NAMES, st.floats(0, 50)),
    st.tuples(st.just("take"), st.none(), st.none()),
    st.tuples(st.just("done"), NAMES, st.none()),
)


@given(st.lists(STEPS, max_size=60))
def test_whatever_happens_each_kick_is_followed_by_a_look(
    steps: list[tuple[str, str, float]],
) -> None:
    """After the last kick of a name, a worker takes it; never two at once; nothing is left over."""
    queue, now = Queue(), 0.0
    owed: set[str] = set()
    working: set[str] = set()
    for kind, name, value in steps:
        now += 1.0
        if kind == "add":
            queue.add(name, Priority(int(value)), now)
            owed.add(name)
        elif kind == "at":
            queue.add_at(name, now + value)
            owed.add(name)
        elif kind == "take" and (item := queue.take(now)):
            assert item.name not in working
            working.add(item.name)
            if item.name not in queue._timers:
                owed.discard(item.name)
        elif kind == "done":
            queue.done(name)
            working.discard(name)
    for name in list(working):
        queue.done(name)
    now += 1000.0
    while item := queue.take(now):
        owed.discard(item.name)
        queue.done(item.name)
    assert not owed
    assert len(queue) == 0 and queue.next_at() is None


@given(st.integers(1, 40))
def test_under_a_stream_of_changes_a_resync_waits_no_longer_than_its_age_allows(many: int) -> None:
    queue = Queue()
    queue.add("quiet", RESYNC, 0.0)
    now, waited = 0.0, None
    for number in range(many * 10):
        now += 1.0
        queue.add(f"busy{number % 3}", CHANGED, now)
        item = queue.take(now)
        assert item
        queue.done(item.name)
        if item.name == "quiet":
            waited = now
            break
    if many * 10 > 2 * AGE + 2:
        assert waited is not None and waited <= 2 * AGE + 2
