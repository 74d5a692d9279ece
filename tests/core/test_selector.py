"""Which VMs are meant, by their labels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.selector import Choice, Selector, Term, parse
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


# -- names and globs

KNOWN: dict[str, dict[str, str] | None] = {
    "ctx-10": GOLD,
    "ctx-2": {"tier": "silver"},
    "db-1": {},
    "torn": None,
}


@pytest.mark.parametrize(
    ("patterns", "selector", "names"),
    [
        ([], None, ["ctx-2", "ctx-10", "db-1", "torn"]),
        (["db-1"], None, ["db-1"]),
        (["ctx-*", "db-?"], None, ["ctx-2", "ctx-10", "db-1"]),
        (["[dt]*"], None, ["db-1", "torn"]),
        ([], "tier=gold", ["ctx-10", "torn"]),
        (["ctx-*"], "tier!=gold", ["ctx-2"]),
        (["CTX-2", "*"], None, ValueError),
    ],
)
def test_who_is_chosen(
    patterns: list[str], selector: str | None, names: list[str] | type[ValueError]
) -> None:
    """Of `torn` the labels cannot be read: it may be meant."""
    choice = Choice.read(patterns, selector)
    assert bool(choice) is bool(patterns or selector)
    if isinstance(names, list):
        assert choice.of(KNOWN) == names
    else:
        with pytest.raises(names, match="no VM 'CTX-2'"):
            choice.of(KNOWN)


@pytest.mark.parametrize(
    ("patterns", "selector", "words"),
    [
        (["ctx-1"], None, ["no VM 'ctx-1' here; did you mean", "ctx-10"]),
        (["ctx-9*"], None, ["no VM 'ctx-9*' here; did you mean", "ctx-2"]),
        (["zzz"], None, ["(there are: ctx-2, ctx-10, db-1, torn)"]),
        (["db-1"], "tier", ["no VM of these has the labels 'tier'; there are: site=a, tier=gold"]),
        (["x" * 5000], None, ["there are"]),
    ],
)
def test_who_is_not_there_is_named_with_who_may_be_meant(
    patterns: list[str], selector: str | None, words: list[str]
) -> None:
    with pytest.raises(ValueError, match="no VM") as found:
        Choice.read(patterns, selector).of(KNOWN, beside="; and more")
    says(str(found.value), *words, "; and more")
