"""What the appliances' clients say: noted once, without the lock, and without moving a call."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.call import Call, CallEvent, CallState
from reconciler.core.desired import Export
from reconciler.host import effects
from reconciler.host.effects import Effect, Side
from reconciler.host.store import Store, StoreError, events, read
from reconciler.host.store.inbox import (
    Inbox,
    OtherVersionError,
    Question,
    Receipt,
    Word,
    clean,
    count,
)

JOB = "ctx-1-job"


def an_export(vm: str, run: str, position: int, backing: str | None = None) -> Export:
    return Export(vm=vm, key=2000 + position, position=position, run=run, attempt=1,
                  name=f"{vm}-{run}-disk{position}", image=f"/r/{vm}/{2000 + position}/{run}.qcow2",
                  size=512, backing=backing)  # fmt: skip


def a_call(vm: str = "ctx-1", run: str = "r1", disks: int = 2, **changes: Any) -> Call:
    exports = tuple(an_export(vm, run, position) for position in range(disks))
    values: dict[str, Any] = {
        "hub": "h", "vm": vm, "run": run, "attempt": 1, "state": CallState.DUE, "sna": "site-a",
        "type": "full", "request": "d", "job_id": f"{vm}-job", "exports": exports, "created": 1.0,
        "changed": 1.0, "display_name": f"name of {vm}", "path": f"/DC/{vm}", "vcenter": "vc1",
    }  # fmt: skip
    return Call(**{**values, **changes})


def put(store: Store, call: Call, *steps: CallEvent) -> Call:
    """The call in the store, after those steps."""
    store.hold([], call)
    for number, event in enumerate(steps):
        call = store.advance(call, event, 2.0 + number)
    return call


ACCEPTED = (CallEvent.INTEND, CallEvent.ACCEPT)
OPEN = {
    "INTENDED": (CallEvent.INTEND,),
    "ACCEPTED": ACCEPTED,
    "UNKNOWN": (CallEvent.INTEND, CallEvent.UNCLEAR),
}
ENDED = {
    "COMPLETED": (*ACCEPTED, CallEvent.END),
    "FAILED": (*ACCEPTED, CallEvent.FAIL),
    "CANCELLED": (*ACCEPTED, CallEvent.CANCEL),
}
UNASKED = {"DUE": (), "REJECTED": (CallEvent.INTEND, CallEvent.REJECT)}


def everything(directory: Path) -> dict[str, list[Any]]:
    """All tables but what is only told."""
    db = sqlite3.connect(directory / "state.db")
    tables = ("calls", "leases", "applied", "reports", "telemetry", "sightings", "meta")
    found = {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
    db.close()
    return found


# -- a disk has arrived


@pytest.mark.parametrize("state", OPEN)
def test_a_report_is_noted_from_the_intent_on(
    store: Store, inbox: Inbox, tmp_path: Path, state: str
) -> None:
    put(store, a_call(), *OPEN[state])
    said = inbox.report(JOB, 1, "52 d0/7", 4096, 9.0)
    assert (said.word, said.vm, said.run, said.change_id) == (Word.NOTED, "ctx-1", "r1", "52 d0/7")
    ledger = read(tmp_path)
    assert ledger is not None
    report = ledger.reports[JOB][1]
    assert (report.change_id, report.bytes, report.at) == ("52 d0/7", 4096, 9.0)
    assert ledger.calls[0].state == state  # a report moves nothing by itself
    assert set(ledger.reports[JOB]) == {1}


def test_a_repeated_report_changes_nothing(store: Store, inbox: Inbox, tmp_path: Path) -> None:
    put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "id-1", 1, 5.0)
    before = everything(tmp_path)
    for _ in range(2):
        assert inbox.report(JOB, 0, "id-1", 999, 6.0).word is Word.REPEATED
    assert everything(tmp_path) == before
    assert events(tmp_path, "ctx-1") == []


def test_another_change_id_for_the_same_disk_is_told_and_the_first_stays(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "id-1", 1, 5.0)
    before = everything(tmp_path)
    for _ in range(2):
        said = inbox.report(JOB, 0, "id-2", 1, 6.0)
        assert (said.word, said.change_id) == (Word.REPEATED, "id-1")
    assert everything(tmp_path) == before
    (event,) = events(tmp_path, "ctx-1")
    assert (event.reason, event.count, event.disk) == ("ReportContradicts", 2, 2000)
    assert event.severity == "Warning"
    assert "id-1" in event.message
    assert "id-2" in event.message


@pytest.mark.parametrize("state", ENDED)
def test_a_late_report_is_an_event_and_nothing_else(
    store: Store, inbox: Inbox, tmp_path: Path, state: str
) -> None:
    put(store, a_call(), *ENDED[state])
    before = everything(tmp_path)
    for _ in range(3):
        said = inbox.report(JOB, 0, "id-1", 1, 9.0)
        assert (said.word, said.state) == (Word.LATE, state)
        assert inbox.telemetry(JOB, 9.0, status="completed").word is Word.LATE
    assert everything(tmp_path) == before
    found = {(e.reason, e.disk, e.count) for e in events(tmp_path, "ctx-1")}
    assert found == {("LateReport", 2000, 3), ("LateReport", None, 3)}
    severities = {e.severity for e in events(tmp_path, "ctx-1")}
    assert severities == {"Normal" if state == "COMPLETED" else "Warning"}


def test_a_report_that_comes_again_after_the_run_was_published_is_only_a_repetition(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    call = put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "id-1", 1, 5.0)
    store.advance(call, CallEvent.END, 6.0)
    assert inbox.report(JOB, 0, "id-1", 1, 7.0).word is Word.REPEATED
    assert events(tmp_path, "ctx-1") == []


@pytest.mark.parametrize("state", UNASKED)
def test_what_nobody_asked_for_counts_for_no_later_call(
    store: Store, inbox: Inbox, tmp_path: Path, state: str
) -> None:
    put(store, a_call(), *UNASKED[state])
    before = everything(tmp_path)
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.UNASKED
    assert inbox.telemetry(JOB, 9.0).word is Word.UNASKED
    assert everything(tmp_path) == before
    assert {e.reason for e in events(tmp_path, "ctx-1")} == {"ReportUnasked"}


def test_unknown_jobs_and_disks_leave_nothing_behind(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    put(store, a_call(), *ACCEPTED)
    before = everything(tmp_path)
    assert inbox.report("nobody", 0, "id-1", 1, 9.0).word is Word.UNKNOWN_JOB
    assert inbox.telemetry("nobody", 9.0).word is Word.UNKNOWN_JOB
    for position in (2, -1, 2000, 1 << 70):
        said = inbox.report(JOB, position, "id-1", 1, 9.0)
        assert said.word is Word.UNKNOWN_DISK
        assert "it has 0, 1" in said.message
    assert everything(tmp_path) == before
    assert events(tmp_path, "ctx-1") == []


def test_a_disk_may_be_left_out_only_where_there_is_one(store: Store, inbox: Inbox) -> None:
    put(store, a_call(), *ACCEPTED)
    put(store, a_call("ctx-2", disks=1), *ACCEPTED)
    said = inbox.report(JOB, None, "id-1", 1, 9.0)
    assert said.word is Word.UNKNOWN_DISK
    assert "say which disk" in said.message
    assert inbox.report("ctx-2-job", None, "id-1", 1, 9.0).word is Word.NOTED
    assert set(store.ledger().reports["ctx-2-job"]) == {0}


@pytest.mark.parametrize("change_id", ["", "  ", "\n", "a\nb", "a\0b", "x" * 501, "\ud800"])
def test_a_change_id_that_cannot_be_one_is_refused(
    store: Store, inbox: Inbox, change_id: str
) -> None:
    put(store, a_call(), *ACCEPTED)
    with pytest.raises(ValueError, match="change_id must be 1 to 500 printable characters"):
        inbox.report(JOB, 0, change_id, 1, 9.0)
    assert store.ledger().reports == {}


# -- telemetry


def test_the_last_word_of_telemetry_counts_and_moves_nothing(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    put(store, a_call(), *ACCEPTED)
    before = everything(tmp_path)["calls"]
    first = inbox.telemetry(JOB, 5.0, status="running", phase="copying", size=1, total=10, speed=2,
                            percent=10.0)  # fmt: skip
    last = inbox.telemetry(JOB, 6.0, status="completed", phase="done", size=10, total=10, speed=3,
                           percent=100)  # fmt: skip
    assert (first.word, last.word) == (Word.NOTED, Word.REPEATED)
    found = store.ledger().telemetry[JOB]
    assert (found.first, found.at, found.status, found.phase) == (5.0, 6.0, "completed", "done")
    assert (found.bytes, found.total, found.speed, found.percent) == (10, 10, 3, 100.0)
    assert everything(tmp_path)["calls"] == before
    assert store.ledger().reports == {}


def test_telemetry_is_kept_within_what_it_can_mean(store: Store, inbox: Inbox) -> None:
    put(store, a_call(), *ACCEPTED)
    inbox.telemetry(JOB, 5.0, status="a\x1b[31mb\n", phase="x" * 2000, size=-5, total=10**30,
                    speed=float("nan"), percent=250.0)  # fmt: skip
    found = store.ledger().telemetry[JOB]
    assert found.status == "a [31mb"
    assert found.phase == "x" * 500
    assert (found.bytes, found.total, found.speed) == (0, (1 << 63) - 1, 0)
    assert found.percent == 100.0
    for percent, kept in ((float("nan"), 0.0), (-1, 0.0), (float("inf"), 100.0)):
        inbox.telemetry(JOB, 5.0, percent=percent)
        assert store.ledger().telemetry[JOB].percent == kept


def test_an_error_is_kept_while_it_is_the_last_word_and_told_once_per_text(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    put(store, a_call(), *ACCEPTED)
    for error in ("snapshot failed", "snapshot failed", "disk full", "snapshot failed"):
        inbox.telemetry(JOB, 5.0, status="failed", error=error)
        assert store.ledger().telemetry[JOB].error == error
    told = {(e.reason, e.message, e.count) for e in events(tmp_path, "ctx-1")}
    assert told == {
        ("ApplianceReportsError", "the client of SNA site-a reports: snapshot failed", 3),
        ("ApplianceReportsError", "the client of SNA site-a reports: disk full", 1),
    }
    inbox.telemetry(JOB, 6.0, status="running")
    assert store.ledger().telemetry[JOB].error == ""
    assert store.ledger().calls[0].state == "ACCEPTED"


# -- the question for a change id


def an_incremental(vm: str = "ctx-1", run: str = "r2", **changes: Any) -> Call:
    """A run on top of r1, whose disks stand the other way round."""
    exports = tuple(
        replace(an_export(vm, run, position, backing=f"/r/{vm}/{key}/r1.qcow2"), key=key)
        for position, key in enumerate((2001, 2000))
    )
    return a_call(vm, run, type="incremental", job_id=f"{vm}-{run}", exports=exports, **changes)


@pytest.mark.parametrize("name", ["ctx-1", "name of ctx-1"])
@pytest.mark.parametrize("state", OPEN)
def test_an_incremental_goes_on_from_what_was_reported_of_the_same_disk(
    store: Store, inbox: Inbox, name: str, state: str
) -> None:
    parent = put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "of-2000", 1, 4.0)
    inbox.report(JOB, 1, "of-2001", 1, 4.0)
    store.advance(parent, CallEvent.END, 5.0)
    put(store, an_incremental(), *OPEN[state])
    found = [inbox.change_id(name, position) for position in (0, 1)]
    assert [one.change_id for one in found] == ["of-2001", "of-2000"]
    assert {one.job_id for one in found} == {JOB}
    assert {one.question for one in found} == {Question.ANSWERED}
    assert inbox.change_id(name, 2).question is Question.UNKNOWN_DISK


def test_a_full_run_goes_on_from_nothing(store: Store, inbox: Inbox) -> None:
    parent = put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "of-2000", 1, 4.0)
    store.advance(parent, CallEvent.END, 5.0)
    put(store, a_call(run="r2", job_id="second"), *ACCEPTED)
    found = inbox.change_id("ctx-1", 0)
    assert (found.change_id, found.job_id, found.question) == ("", "", Question.ANSWERED)
    assert "is full" in found.message


@pytest.mark.parametrize("end", [CallEvent.FAIL, CallEvent.CANCEL])
def test_what_is_no_backup_is_gone_on_from_by_nobody(
    store: Store, inbox: Inbox, end: CallEvent
) -> None:
    parent = put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "of-2000", 1, 4.0)
    store.advance(parent, end, 5.0)
    put(store, an_incremental(), *ACCEPTED)
    found = inbox.change_id("ctx-1", 1)
    assert (found.change_id, found.question) == ("", Question.ANSWERED)
    assert "/r/ctx-1/2000/r1.qcow2 is of no completed run" in found.message


def test_a_parent_that_was_called_complete_without_a_report_has_no_change_id(
    store: Store, inbox: Inbox
) -> None:
    put(store, a_call(), *ENDED["COMPLETED"])
    put(store, an_incremental(), *ACCEPTED)
    found = inbox.change_id("ctx-1", 0)
    assert (found.change_id, found.job_id) == ("", "")
    assert "none was reported of its parent, run r1" in found.message


@pytest.mark.parametrize(("path", "known"), [("/DC/other", False), ("/DC/ctx-1", True)])
def test_a_change_id_of_another_vm_means_nothing_unless_it_is_the_same_by_another_name(
    store: Store, inbox: Inbox, path: str, known: bool
) -> None:
    parent = put(store, a_call("ctx-0", job_id="old", path=path), *ACCEPTED)
    inbox.report("old", 0, "of-2000", 1, 4.0)
    store.advance(parent, CallEvent.END, 5.0)
    export = an_export("ctx-1", "r2", 0, backing="/r/ctx-0/2000/r1.qcow2")
    put(store, a_call(run="r2", type="incremental", exports=(export,)), *ACCEPTED)
    assert inbox.change_id("ctx-1", 0).change_id == ("of-2000" if known else "")


def test_a_change_id_of_another_disk_of_the_vm_is_not_taken(store: Store, inbox: Inbox) -> None:
    parent = put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "of-2000", 1, 4.0)
    store.advance(parent, CallEvent.END, 5.0)
    export = replace(an_export("ctx-1", "r2", 0, backing="/r/ctx-1/2000/r1.qcow2"), key=2001)
    put(store, a_call(run="r2", type="incremental", job_id="r2", exports=(export,)), *ACCEPTED)
    assert inbox.change_id("ctx-1", 0).change_id == ""


def test_without_an_active_run_there_is_nothing_to_go_on_from(store: Store, inbox: Inbox) -> None:
    assert inbox.change_id("ctx-1", 0).question is Question.UNKNOWN_VM
    put(store, a_call(), *ENDED["COMPLETED"])
    put(store, an_incremental())
    for name in ("ctx-1", "name of ctx-1"):
        found = inbox.change_id(name, 0)
        assert (found.question, found.change_id) == (Question.ANSWERED, "")
        assert "no run of" in found.message
    store.apply({}, {"ctx-7": {"display_name": "seven"}}, 1.0)
    assert inbox.change_id("seven", 0).question is Question.ANSWERED
    for name in ("eight", "", "ctx"):
        assert inbox.change_id(name, 0).question is Question.UNKNOWN_VM


def test_of_two_vms_with_one_name_none_is_guessed(store: Store, inbox: Inbox) -> None:
    put(store, a_call("ctx-1", display_name="db"), *ACCEPTED)
    put(store, a_call("ctx-2", display_name="db"), *ACCEPTED)
    put(store, a_call("ctx-3", display_name="ctx-1"), *ACCEPTED)
    found = inbox.change_id("db", 0)
    assert found.question is Question.AMBIGUOUS
    assert "ctx-1 (run r1) and ctx-2 (run r1)" in found.message
    assert inbox.change_id("ctx-1", 0).question is Question.AMBIGUOUS
    assert inbox.change_id("ctx-2", 0).question is Question.ANSWERED


def test_a_call_that_only_a_claim_told_of_is_found_by_the_name_that_was_applied(
    store: Store, inbox: Inbox
) -> None:
    store.remember(a_call(state=CallState.UNKNOWN, display_name="", exports=()))
    store.apply({}, {"ctx-1": {"display_name": "pgtest1"}}, 1.0)
    assert "is full" in inbox.change_id("pgtest1", 0).message


# -- the file


def test_before_there_is_a_store_nothing_is_known_and_nothing_is_made(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "state")
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.UNKNOWN_JOB
    assert inbox.telemetry(JOB, 9.0).word is Word.UNKNOWN_JOB
    assert inbox.change_id("ctx-1", 0).question is Question.UNKNOWN_VM
    assert inbox.identity() is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.db").touch()
    assert inbox.identity() is None
    store = Store(tmp_path / "state", "h")
    put(store, a_call(), *ACCEPTED)
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.NOTED
    found = inbox.identity()
    assert found is not None
    assert (found.hub, found.state_id) == ("h", store.state_id)
    store.close()
    inbox.close()


@pytest.mark.parametrize(("version", "words"), [(1, "the next apply brings it up"), (99, "newer")])
def test_a_store_of_another_version_is_left_alone(
    store: Store, inbox: Inbox, tmp_path: Path, version: int, words: str
) -> None:
    put(store, a_call(), *ACCEPTED)
    db = sqlite3.connect(tmp_path / "state.db")
    here = db.execute("PRAGMA user_version").fetchone()[0]
    db.execute(f"PRAGMA user_version = {version}")
    before = everything(tmp_path)
    for _ in range(2):
        with pytest.raises(OtherVersionError, match=words):
            inbox.report(JOB, 0, "id-1", 1, 9.0)
        with pytest.raises(OtherVersionError, match=words):
            inbox.change_id("ctx-1", 0)
    assert everything(tmp_path) == before
    assert db.execute("PRAGMA user_version").fetchone()[0] == version
    db.execute(f"PRAGMA user_version = {here}")  # it was migrated meanwhile
    db.close()
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.NOTED


def test_a_store_that_was_replaced_is_the_one_that_is_written(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    put(store, a_call(), *ACCEPTED)
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.NOTED
    store.close()
    for path in tmp_path.glob("state.db*"):
        path.unlink()
    second = Store(tmp_path, "h")
    put(second, a_call(), *ACCEPTED)
    assert inbox.report(JOB, 1, "id-2", 1, 9.0).word is Word.NOTED
    assert set(second.ledger().reports[JOB]) == {1}
    second.close()
    ledger = read(tmp_path)
    assert ledger is not None
    assert set(ledger.reports[JOB]) == {1}


OPEN_AND_CLOSE = """
import sys
from pathlib import Path
from reconciler.host.store import Store
Store(Path(sys.argv[1]), "h").close()
"""


def test_what_a_process_hears_stays_while_it_and_others_open_and_close_the_store(
    store: Store, inbox: Inbox, tmp_path: Path
) -> None:
    """POSIX drops all locks of a process on a file when it closes any descriptor of it."""
    put(store, a_call(), *ACCEPTED)
    store.close()
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.NOTED
    Store(tmp_path, "h").close()
    read(tmp_path)
    subprocess.run([sys.executable, "-c", OPEN_AND_CLOSE, str(tmp_path)], check=True)
    assert inbox.report(JOB, 1, "id-2", 1, 9.0).word is Word.NOTED
    ledger = read(tmp_path)
    assert ledger is not None
    assert set(ledger.reports[JOB]) == {0, 1}


def test_a_word_waits_for_no_lock_and_is_refused_where_the_store_is_held(
    store: Store, inbox: Inbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.host.store.window.BUSY_TIMEOUT", 0.05)
    put(store, a_call(), *ACCEPTED)
    with store._write():
        assert inbox.change_id("ctx-1", 0).question is Question.ANSWERED
        with pytest.raises(StoreError, match="it was locked by another process"):
            inbox.report(JOB, 0, "id-1", 1, 9.0)
    assert inbox.report(JOB, 0, "id-1", 1, 9.0).word is Word.NOTED


MANY = """
import sys
from pathlib import Path
from reconciler.host.store.inbox import Inbox
inbox = Inbox(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(40):
    word = inbox.report("ctx-1-job", number, f"id-{sys.argv[2]}-{number}", 1, 9.0).word
    inbox.telemetry("ctx-1-job", 9.0, size=number)
    print(word.name, flush=True)
"""


def test_processes_that_write_at_once_wait_for_each_other_and_each_word_counts_once(
    store: Store, tmp_path: Path
) -> None:
    put(store, a_call(disks=40), *ACCEPTED)
    with store._write() as db:  # a transaction that is open while both begin
        db.execute("UPDATE calls SET message = 'written meanwhile'")
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", MANY, str(tmp_path), name],
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
    words = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    for one, other in zip(*words, strict=True):
        assert {one, other} == {"NOTED", "REPEATED"}
    ledger = store.ledger()
    assert set(ledger.reports[JOB]) == set(range(40))
    assert (ledger.calls[0].state, ledger.calls[0].message) == ("ACCEPTED", "written meanwhile")


class Died(BaseException):
    """The process was ended here."""


@pytest.mark.parametrize("side", list(Side))
def test_a_report_is_there_as_a_whole_or_not_at_all(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Side
) -> None:
    put(store, a_call(), *ACCEPTED)
    seen: list[tuple[Effect, Side]] = []

    def hook(what: Effect, when: Side) -> None:
        seen.append((what, when))
        if when is side:
            raise Died

    monkeypatch.setattr(effects, "hook", hook)
    first = Inbox(tmp_path)
    with pytest.raises(Died):
        first.report(JOB, 0, "id-1", 1, 9.0)
    monkeypatch.setattr(effects, "hook", None)
    assert seen[-1] == (Effect.REPORT, side)
    assert bool(store.ledger().reports) is (side is Side.AFTER)
    again = Inbox(tmp_path)
    word = Word.REPEATED if side is Side.AFTER else Word.NOTED
    assert again.report(JOB, 0, "id-1", 1, 9.0).word is word
    first.close()
    again.close()


def test_only_a_report_that_is_noted_is_an_effect(
    store: Store, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, a_call(), *ACCEPTED)
    seen: list[Effect] = []
    monkeypatch.setattr(effects, "hook", lambda what, _side: seen.append(what))
    said: list[Receipt] = [
        inbox.report("nobody", 0, "id-1", 1, 9.0),
        inbox.report(JOB, 0, "id-1", 1, 9.0),
        inbox.report(JOB, 0, "id-1", 1, 9.0),
        inbox.telemetry(JOB, 9.0),
    ]
    assert [one.word.name for one in said] == ["UNKNOWN_JOB", "NOTED", "REPEATED", "NOTED"]
    assert seen == [Effect.REPORT] * 2


def test_reports_of_a_vms_newest_run_are_read_after_its_end_too(store: Store, inbox: Inbox) -> None:
    call = put(store, a_call(), *ACCEPTED)
    inbox.report(JOB, 0, "id-1", 1, 5.0)
    store.advance(call, CallEvent.END, 6.0)
    assert set(store.ledger().reports) == {JOB}
    put(store, a_call(run="r2", job_id="second", created=9.0), *ACCEPTED)
    assert set(store.ledger().reports) == set()


def test_numbers_and_texts_that_no_column_takes() -> None:
    assert [count(n) for n in (-1, 0, 3.9, 1e300, float("inf"), float("nan"), 1 << 90)] == [
        0, 0, 3, (1 << 63) - 1, (1 << 63) - 1, 0, (1 << 63) - 1,
    ]  # fmt: skip
    assert clean("  a\tb\r\n\x00c\udfff  ") == "a b   c?"
    assert os.fsencode(clean("\ud800")) == b"?"
