"""Which VMs are meant, by their labels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.selector import Selector, Term, parse
from tests.core.builders import says

GOLD = {"tier": "gold", "site": "a"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("tier=gold", True),
        ("tier=silver", False),
        ("tier!=gold", False),
        ("tier!=silver", True),
        ("zone!=b", True),
        ("zone=b", False),
        ("tier", True),
        ("zone", False),
        ("tier=gold,site=a", True),
        ("tier=gold,site=b", False),
        ("tier=gold,site!=b,site", True),
        (" tier = gold , site ", True),
        ("tier=", False),
        ("tier!=", True),
    ],
)
def test_labels_match(text: str, matches: bool) -> None:
    assert parse(text).matches(GOLD) is matches


@pytest.mark.parametrize(
    "text",
    ["", ",", "tier=gold,", "=gold", "!=gold", "!", "!tier", "tier!", "tier==gold", "a=b=c", "a!b"],
)
def test_what_is_no_selector_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read the selector") as caught:
        parse(text)
    says(str(caught.value), repr(text), "tier=gold, tier!=gold or tier")


words = st.text(st.characters(exclude_characters="=!,", exclude_categories=["Z", "C"]), max_size=5)
keys = words.filter(bool)
terms = st.builds(Term, keys) | st.builds(Term, keys, words, st.booleans())
selectors = st.builds(Selector, st.lists(terms, min_size=1, max_size=4).map(tuple))
labels = st.dictionaries(keys, words, max_size=4)


@given(selector=selectors)
def test_a_selector_says_itself(selector: Selector) -> None:
    assert parse(str(selector)) == selector


@given(selector=selectors, have=labels)
def test_a_comma_means_and(selector: Selector, have: dict[str, str]) -> None:
    each = [parse(str(term)).matches(have) for term in selector.terms]
    assert selector.matches(have) is all(each)


@given(key=keys, value=words, have=labels)
def test_of_equal_and_not_equal_exactly_one_holds(
    key: str, value: str, have: dict[str, str]
) -> None:
    assert parse(f"{key}={value}").matches(have) is not parse(f"{key}!={value}").matches(have)
