"""Fixtures that tests of any kind may use; and what tests counted, told at the end of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.databases import MariaDb, Postgres, Server, running
from tests.e2e import zygote
from tests.mounts import Hung, Mounts, private
from tests.ports import Dealer

pytest.register_assert_rewrite("tests.e2e.crashes", "tests.e2e.site")

COUNTED: Final = "counted: "
"""Prefix of the properties that are summed up."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-starts",
        action="store_true",
        help="start an interpreter for every command, in place of forking one that is warm",
    )


def pytest_configure(config: pytest.Config) -> None:
    # What commands keep of their readings is each run's own, and no other's before it.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tests-cache-")
    zygote.always_real = config.getoption("--real-starts")


def pytest_unconfigure() -> None:
    zygote.end()
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    """What a test may mount; without the right to, it is skipped."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    try:
        private()
    except OSError as error:
        pytest.skip(f"no mounts of one's own here: {error}")
    with contextlib.ExitStack() as stack:
        yield Mounts(stack)


@pytest.fixture
def hangable(mounts: Mounts, tmp_path: Path) -> Mounts:
    """The same, where a mount can be made to hang."""
    try:
        Hung(tmp_path / "probe").end()
    except OSError as error:
        pytest.skip(f"no FUSE mounts here: {error}")
    return mounts


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


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Server]:
    """A MariaDB of this worker's own."""
    with running(MariaDb, Dealer()) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL of this worker's own."""
    with running(Postgres, Dealer()) as server:
        yield server
