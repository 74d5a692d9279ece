"""How often an SNA is asked about a run that it has accepted, when nothing new comes of it."""

from __future__ import annotations

import pytest

from reconciler.core.call import Report
from reconciler.core.inquiries import Inquiries

POLL, LONGEST = 10.0, 300.0
RUNNING, FAILED = Report(True, "running"), Report(True, "failed", "no space")


def asked(answers: list[Report], until: float) -> list[float]:
    """When a job is asked about that gets these answers, the last one for ever."""
    found, one, now = [], Inquiries(), 1000.0
    while now <= 1000.0 + until:
        found.append(now - 1000.0)
        report = answers[min(len(found), len(answers)) - 1]
        one.answered("job", report, now, POLL, LONGEST)
        now = one.again_at("job")
    return found


@pytest.mark.parametrize("report", [RUNNING, FAILED, Report(False, message="unknown")])
def test_an_answer_that_stays_is_believed_as_long_as_it_has_stood(report: Report) -> None:
    assert asked([report], 1300) == [0, 10, 20, 40, 80, 160, 320, 620, 920, 1220]


def test_another_answer_is_asked_about_at_the_pace_of_the_first() -> None:
    assert asked([RUNNING, RUNNING, RUNNING, RUNNING, FAILED], 200) == [
        *(0, 10, 20, 40, 80),
        *(90, 100, 120, 160),
    ]


def test_an_sna_that_cannot_be_asked_is_asked_at_each_poll() -> None:
    assert asked([Report(None, message="refused")], 60) == [0, 10, 20, 30, 40, 50, 60]


def test_the_rest_is_never_shorter_than_the_poll() -> None:
    one = Inquiries()
    for now in (0.0, POLL, 2 * POLL):
        one.answered("job", RUNNING, now, POLL, 1.0)
        assert one.again_at("job") == now + POLL


def test_what_was_not_to_be_asked_for_a_while_is_asked_at_once() -> None:
    one = Inquiries()
    for job in ("a", "b"):
        one.answered(job, RUNNING, 5.0, POLL, LONGEST)
    one.keep(["b", "c"])
    assert [one.again_at(job) for job in ("a", "b", "c")] == [0.0, 15.0, 0.0]
