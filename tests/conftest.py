"""What tests counted, told at the end of a run: crash points, kills, seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import pytest

pytest.register_assert_rewrite("tests.e2e.crashes", "tests.e2e.site")

COUNTED: Final = "counted: "
"""Prefix of the properties that are summed up."""


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Say how many of something a test has run; the sum is shown at the end."""
    return lambda what, number: record_property(f"{COUNTED}{what}", number)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, number in report.user_properties:
                    if name.startswith(COUNTED):
                        totals[name.removeprefix(COUNTED)] += int(str(number))
    for what, number in totals.items():
        terminalreporter.write_line(f"{what}: {number}")
