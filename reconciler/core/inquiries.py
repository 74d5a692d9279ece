"""When an SNA is asked again about a run that it has accepted, and that its client says nothing of.

Its answer ends nothing, it is only shown, so it is not asked for ever at the pace of a call whose
outcome is not known: the longer an answer stays as it is, the longer it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from reconciler.core.call import Report
from reconciler.core.units import Seconds


class _Answer(Struct, frozen=True):
    report: Report
    since: Seconds
    again: Seconds


class Inquiries:
    """Job → what its SNA answered last, and when it is asked again. Times are of one clock."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answer] = {}

    def answered(
        self, job: str, report: Report, now: Seconds, poll: Seconds, longest: Seconds
    ) -> None:
        """The same answer as before: the next question has to wait as long as it has stood by now,
        `poll` at least and `longest` at most. Another one, or none: it is asked after `poll`."""
        known = self._answers.get(job)
        same = known is not None and known.report == report and report.known is not None
        since = known.since if known and same else now
        rest = max(poll, min(now - since, longest))
        self._answers[job] = _Answer(report, since, now + rest)

    def again_at(self, job: str) -> Seconds:
        """When it is time to ask about a job; 0: it was not asked about."""
        known = self._answers.get(job)
        return known.again if known else 0.0

    def keep(self, jobs: Iterable[str]) -> None:
        """Nothing is to be asked about any other: if that changes, it is at once."""
        for job in self._answers.keys() - set(jobs):
            del self._answers[job]
