"""Mistakes that people make, and that each of them is told where it is and what helps."""

from __future__ import annotations

import pytest

from tests import gallery
from tests.core.builders import says
from tests.gallery import MISTAKES, Mistake


@pytest.mark.parametrize("mistake", MISTAKES, ids=[one.title for one in MISTAKES])
def test_a_mistake_is_told_where_it_is_and_what_helps(mistake: Mistake) -> None:
    said, code = gallery.told(mistake)
    assert code == mistake.code, said
    says(said, *mistake.says)
    assert "Traceback" not in said


def test_the_gallery_shows_what_is_printed_now() -> None:
    assert gallery.PAGE.read_text() == gallery.page(), f"docs/errors.md is stale: {gallery.REFRESH}"
