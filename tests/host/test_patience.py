"""Storage that hangs costs its deadline once, and holds up nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from reconciler.core.errors import HostError
from reconciler.host import patience
from tests.e2e.site import until
from tests.mounts import Mounts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "QUIET", 1.0)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a question waits for that hangs; open at the end of the test."""
    found = threading.Event()
    yield found
    found.set()


def waits(gate: threading.Event) -> str:
    gate.wait(60)
    return "late"


def says(text: str) -> str:
    return text


def test_answers_come_in_the_order_of_the_questions() -> None:
    asked = {"/a": [partial(says, str(n)) for n in range(5)], "/b": [partial(says, "b")]}
    answers, silent = patience.ask(asked)
    assert answers == {"/a": ("0", "1", "2", "3", "4"), "/b": ("b",)}
    assert silent == {}


def test_a_root_that_hangs_gives_what_it_answered_and_the_others_all(
    impatient: None, gate: threading.Event
) -> None:
    first, last = partial(says, "first"), partial(says, "last")
    answers, silent = patience.ask({"/a": [first, partial(waits, gate), last], "/b": [first, last]})
    assert answers == {"/a": ("first",), "/b": ("first", "last")}
    assert silent == {"/a": 1.0}


def test_a_root_that_still_hangs_is_not_asked_again_until_it_has_come_back(
    impatient: None, gate: threading.Event
) -> None:
    asked: list[str] = []

    def count() -> str:
        asked.append("asked")
        return "answer"

    questions: list[Callable[[], str]] = [partial(waits, gate), count]
    patience.ask({"/c": questions})
    before = threading.active_count()
    for _ in range(3):
        assert patience.ask({"/c": [count]}) == ({"/c": ()}, {"/c": 1.0})
        with pytest.raises(HostError, match="cannot claim: no answer from the storage of /c"):
            patience.do("claim", "/c", count, 60)
    assert threading.active_count() == before
    gate.set()
    until(lambda: not patience.hangs("/c"), "the end of what was left behind")
    assert asked == []  # what nobody waits for any more is not begun
    assert patience.ask({"/c": [count]}) == ({"/c": ("answer",)}, {})


def test_slow_is_not_hung_as_long_as_answers_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "QUIET", 2.0)
    slow = partial(time.sleep, 0.7)
    answers, silent = patience.ask({"/d": [slow] * 4})
    assert (len(answers["/d"]), silent) == (4, {})
    monkeypatch.setattr(patience, "LONGEST", 1.0)
    assert patience.ask({"/e": [slow] * 4})[1] == {"/e": 1.0}  # but not for ever


def test_what_a_question_raises_is_raised_where_it_is_asked() -> None:
    def wrong() -> str:
        raise HostError("no", "CannotClaim")

    with pytest.raises(HostError, match="no") as refusal:
        patience.do("claim", "/f", wrong, 60)
    assert refusal.value.reason == "CannotClaim"
    with pytest.raises(HostError, match="no"):
        patience.ask({"/f": [wrong]})


def test_who_gives_up_says_so_to_what_still_runs(gate: threading.Event) -> None:
    given_up = threading.Event()
    seen: list[bool] = []

    def effect() -> None:
        gate.wait(60)
        seen.append(given_up.is_set())

    with pytest.raises(HostError, match=r"no answer from the storage of /g within 0\.1 s") as hung:
        patience.do("take it back", "/g", effect, 0.1, given_up)
    assert hung.value.reason == "StorageHangs"
    gate.set()
    until(lambda: not patience.hangs("/g"), "the end of what was left behind")
    assert seen == [True]


def test_what_was_not_touched_is_touched_again_before_anything_is_done_to_it(
    hangable: Mounts, impatient: None, tmp_path: Path
) -> None:
    far = str(tmp_path / "far")
    hung = hangable.hung(tmp_path / "far")
    done = partial(says, "done")
    assert patience.ask({far: [done]}) == ({far: ()}, {far: 1.0})
    before = threading.active_count()
    with pytest.raises(HostError, match="still"):
        patience.do("claim", far, done, 60)
    assert threading.active_count() <= before  # nobody was left behind
    hung.end()
    assert patience.do("claim", far, done, 60) == "done"


TABLE = """\
22 1 0:21 / / rw - ext4 /dev/vda rw
30 22 0:40 / /mnt rw,relatime shared:1 - tmpfs first rw
31 22 0:41 / /mnt/far\\040away rw master:2 - nfs4 server:/my\\040export rw
32 22 0:42 / /mnt rw - tmpfs second rw
"""


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/backup", "ext4, /dev/vda at /"),
        ("/mnt", "tmpfs, second at /mnt"),
        ("/mnt/x", "tmpfs, second at /mnt"),
        ("/mntx", "ext4, /dev/vda at /"),
        ("/mnt/far away/r", "nfs4, server:/my export at /mnt/far away"),
    ],
)
def test_the_mount_of_a_path_is_named_without_asking_it(path: str, said: str) -> None:
    assert str(patience._mounted(path, TABLE)) == said


def test_a_mount_that_hangs_is_named_and_keeps_nobody_from_ending(
    hangable: Mounts, tmp_path: Path
) -> None:
    far = tmp_path / "far"
    hung = hangable.hung(far)
    code = (
        "import os, sys, threading\n"
        "from reconciler.core.errors import HostError\n"
        "from reconciler.host import patience\n"
        "patience.QUIET = 0.3\n"
        "def look(): return os.stat(sys.argv[1])\n"
        "try: patience.do('look', sys.argv[1], look, 0.3)\n"
        "except HostError as error: print(error, threading.active_count())\n"
        "print(patience.ask({sys.argv[1]: [look]}), threading.active_count())\n"
    )
    line = [sys.executable, "-c", code, str(far)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        f"cannot look: no answer from the storage of {far} (fuse, hung at {far}) within 0.3 s 2",
        f"({ {str(far): ()} }, { {str(far): 0.3} }) 2",
    ]
    hung.end()
    assert patience.ask({str(far): [partial(os.listdir, far)]}) == ({str(far): ([],)}, {})
