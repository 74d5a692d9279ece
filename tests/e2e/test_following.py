"""events, wait, status --watch: what a person follows, with no lock taken and nothing written."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

import pytest

from reconciler.cli.redrawing import drawn, redraw
from reconciler.core.call import CallEvent
from reconciler.host.store import Store
from tests.core.builders import says
from tests.e2e.site import Appliance, Site, until


@contextmanager
def following(site: Site, *arguments: str) -> Iterator[list[str]]:
    """The lines of a command that goes on, as they come; it is ended by Ctrl-C."""
    process = site.start(*arguments)
    lines: list[str] = []
    assert process.stdout
    out = process.stdout

    def one_by_one() -> None:
        for line in out:  # not `extend`, which would keep them until the end
            lines.append(line.rstrip("\n"))  # noqa: PERF401

    reader = threading.Thread(target=one_by_one, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(20)
        reader.join(20)
        process.stdout.close()
        assert process.stderr
        errors = process.stderr.read()
        process.stderr.close()
        assert code == 130, errors


def told(lines: Sequence[str], words: str) -> bool:
    return any(words in line for line in lines)


def test_events_are_told_as_they_come_and_once(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    with (
        following(site, "events", "-w", "-n", "1") as lines,
        following(site, "events", "-w", "-o", "json", "ctx-1") as documents,
    ):
        until(lambda: bool(lines and documents), "what was there")
        assert len(lines) == 1
        says(lines[0], "ctx-1: CallAccepted")
        before = len(documents)
        for words in ("ctx-1: Paused: paused: mine", "×2 since 20"):
            site.run("pause", "ctx-1", "--reason", "mine")
            until(partial(told, lines, words), words)
        site.run("pause", "--all", "--reason", "enough")
        until(lambda: "hub: Paused" in lines[-1], "the hub's own")
        until(lambda: len(documents) == before + 2, "the same event twice")
    assert len(lines) == 4
    found = [json.loads(document) for document in documents]
    assert {one["vm"] for one in found} == {"ctx-1"}
    one, two = found[-2:]
    assert (one["id"], one["count"], two["id"], two["count"]) == (two["id"], 1, one["id"], 2)
    shown = site.json("events", "ctx-1", "-n", "2")["events"]
    assert shown == [found[-3], two]
    assert site.run("events", "--since", "0s") == "No event.\n"


def end(site: Site, vm: str, event: CallEvent) -> None:
    """What a person, or an appliance, says of a run."""
    with closing(Store(site.folder / "state", site.hub)) as store:
        call = store.ledger().active(vm)
        assert call
        store.advance(call, event, time.time(), message="by word")


def test_wait_ends_when_it_is_so_when_it_cannot_be_and_when_the_time_is_over(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    site.apply()
    waiting = site.start("wait", "ctx-1", "--for", "Completed", "--run", "r1")
    says(site.run("wait", "ctx-1", "ctx-2", "--for", "Ready"), "ctx-2 is Ready: Converged")
    said = site.run("wait", "ctx-1", "--for", "Completed", "--timeout", "0s", code=124)
    says(said, "not waiting any longer than 0 ms for Completed", "run r1 is ACCEPTED")
    end(site, "ctx-1", CallEvent.SAY_COMPLETED)
    out, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, err
    assert out == "ctx-1 is Completed: run r1 is completed\n"
    end(site, "ctx-2", CallEvent.SAY_FAILED)
    said = site.run("wait", "ctx-1", "ctx-2", "--for", "Completed", code=1)
    says(said, "run r1 is FAILED: by word", "cannot become Completed any more: ctx-2")
    says(site.run("wait", "ctx-3", "--for", "Ready", code=64), "no VM 'ctx-3'")


def test_status_is_shown_again_when_it_changes(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    with following(site, "status", "--watch", "-n", "200ms") as lines:
        until(lambda: any("answers" in line for line in lines), "the first look")
        site.kill(site.pids()["ctx-1", 2000])
        until(lambda: any("not served" in line for line in lines), "the second")


def test_what_stays_the_same_is_not_shown_again(capsys: pytest.CaptureFixture[str]) -> None:
    pages = iter(["a", "a", "b", "b", "a"])
    with pytest.raises(StopIteration):
        redraw(lambda: print(next(pages)), 0.0)
    assert capsys.readouterr().out == "a\nb\na\n"


def on_a_terminal(site: Site, arguments: Sequence[str], end: str) -> str:
    """What a command writes to a terminal until that has some text."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "reconciler", *arguments],
        cwd=site.folder, stdin=theirs, stdout=theirs, stderr=theirs,
        env={k: v for k, v in os.environ.items() if not k.startswith("RECONCILER_")},
    )  # fmt: skip
    os.close(theirs)
    text = ""

    def more() -> bool:
        nonlocal text
        with contextlib.suppress(OSError):  # who wrote has ended
            text += os.read(ours, 1 << 16).decode()
        return end in text

    try:
        until(more, end)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        until(lambda: more() or "\x1b[?7h" in text, "the last word")
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
    return text


def test_on_a_terminal_status_is_drawn_over_itself(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    text = on_a_terminal(site, ["status", "--watch"], "Ctrl-C ends this")
    assert text.startswith("\x1b[?7l\x1b[H")
    assert "\x1b[J" in text


@pytest.mark.parametrize(("lines", "rows", "most"), [(3, 24, 3), (40, 24, 20)])
def test_what_does_not_fit_is_counted(lines: int, rows: int, most: int) -> None:
    text = drawn("".join(f"line {n}\n" for n in range(lines)), rows)
    assert text.count("line ") == most
    assert text.count("\n") < rows
    assert ("more lines" in text) is (lines > most)
