"""Fixtures on real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Appliance, Site
from tests.ports import Dealer


@pytest.fixture(scope="session")
def dealer() -> Dealer:
    return Dealer()


@pytest.fixture
def site(tmp_path: Path, dealer: Dealer) -> Iterator[Site]:
    """A hub with ten ports and no appliance."""
    dealt = dealer.deal(11)
    found = Site(tmp_path, dealt[:10], api=dealt[10])
    yield found
    found.clean_up()


@pytest.fixture
def appliance(tmp_path: Path, site: Site) -> Iterator[Appliance]:
    """The reference appliance, known to the hub as site-a."""
    found = Appliance(tmp_path / "appliance")
    site.appliance_at(found.url)
    yield found
    found.end()


@pytest.fixture
def ending(site: Site, appliance: Appliance) -> Appliance:
    """The same, and its status may end a run."""
    site.appliance_at(appliance.url, reports_end=True)
    return appliance
