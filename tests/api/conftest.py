"""Fixtures on real connections."""

from __future__ import annotations

import pytest

from reconciler.core.units import Endpoint
from tests.ports import Dealer


@pytest.fixture(scope="session")
def dealer() -> Dealer:
    return Dealer()


@pytest.fixture
def endpoint(dealer: Dealer) -> Endpoint:
    """An address that nobody has."""
    return Endpoint("127.0.0.1", dealer.deal(1)[0])
