"""`{{ }}` in values: what an expression may do, and that it cannot do harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reconciler.core.template import (
    MAX_RESULT,
    MAX_TEMPLATE,
    TemplateError,
    evaluate,
    is_template,
    names_in,
    render,
    render_tree,
)
from tests.core.builders import says

VARIABLES: dict[str, object] = {"site": "a", "n": 3, "disks": [2000, 2001], "vm": {"name": "x"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ n }}", 3),
        ("{{n}}", 3),
        ("{{ disks }}", [2000, 2001]),
        ("{{ vm }}", {"name": "x"}),
        ("{{ n > 2 }}", True),
        ("{{ none }}", None),
        ("{{ n / 2 }}", 1.5),
        ("{{ 2 ** 10 }}", 1024),
        ("{{ 'x' * 3 }}", "xxx"),
        ("{{ range(3) | list }}", [0, 1, 2]),
        ("{{ range(3) }}", [0, 1, 2]),
        ("{{ (1, 2) }}", [1, 2]),
        ("{{ vm.name | upper }}", "X"),
        ("{{ vm['name'] }}", "x"),
        ("{{ dict(a=1) }}", {"a": 1}),
        ("{{ disks | map('string') | join('+') }}", "2000+2001"),
        ("{{ 'b' if site == 'a' else 'c' }}", "b"),
        ("{{ nobody | default('x') }}", "x"),
        ("{{ 'a-b'.split('-') }}", ["a", "b"]),
        ("{{ 'a-b' | replace('-', '+') }}", "a+b"),
        ("site-{{ site }}", "site-a"),
        ("{{ n }}{{ n }}", "33"),
        (" {{ n }}", " 3"),
        ("{{ n }}\n", "3\n"),
        ("{{ '{{ n }}' }}", "{{ n }}"),
        ("no expression", "no expression"),
    ],
)
def test_one_whole_expression_keeps_its_type_and_a_mix_is_text(text: str, value: Any) -> None:
    found = render(text, VARIABLES)
    assert found == value
    assert type(found) is type(value)


def test_a_tree_is_evaluated_in_its_values_and_not_in_its_keys() -> None:
    tree = {"{{ n }}": ["{{ n }}", 1, None, {"a": "x{{ site }}"}]}
    assert render_tree(tree, VARIABLES) == {"{{ n }}": [3, 1, None, {"a": "xa"}]}


def test_what_an_expression_returns_is_not_evaluated_again() -> None:
    assert render("{{ evil }}", {"evil": "{{ 1 + 1 }}"}) == "{{ 1 + 1 }}"
    assert render_tree(["{{ evil }}"], {"evil": "{{ 1 + 1 }}"}) == ["{{ 1 + 1 }}"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ sit }}", ["the variable 'sit' is not defined", "did you mean 'site'"]),
        ("{{ zzz }}", ["the variable 'zzz' is not defined", "defined here: disks, n, site, vm"]),
        ("x{{ zzz }}", ["the variable 'zzz' is not defined"]),
        ("{{ vm.nome }}", ["cannot evaluate", "nome"]),
        ("{{ n + }}", ["cannot read {{ n + }}"]),
        ("{{ }}", ["cannot read"]),
        ("{{ n", ["cannot read"]),
        ("{{ n | nofilter }}", ["nofilter"]),
        ("{{ n + site }}", ["cannot evaluate"]),
        ("{{ 1 / 0 }}", ["cannot evaluate", "division by zero"]),
        ("{{ n }}{% for x in y %}{% endfor %}", ["{% %}", "expressions"]),
        ("{{ n }}{# note #}", ["{# #}"]),
        ("{{ ''.__class__ }}", ["not allowed here"]),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ["not allowed here"]),
        ("{{ disks.append(1) }}", ["not allowed here"]),
        ("{{ vm.update(a=1) }}", ["not allowed here"]),
        ("{{ 'x'.ljust(10) }}", ["not allowed here"]),
        ("{{ 'x'.encode() }}", ["not allowed here"]),
        ("{{ '%s' % n }}", ["% on text"]),
        ("{{ 9 ** 99 }}", ["**", "too large"]),
        ("{{ 'x' * 70000 }}", ["70,000 times", "too large"]),
        ("{{ 70000 * [1] }}", ["70,000 times"]),
        ("{{ 'aaaa' | replace('a', 'b' * 60000) }}", ["grows too large"]),
        ("{{ range(99999) | list }}", ["more than 65,536 parts"]),
        ("{{ range(9999999) | list }}", ["cannot evaluate"]),
        ("{{ (2 ** 64) * (2 ** 64) * 2 }}", ["128 bits"]),
        ("{{ range }}", ["not data"]),
        ("{{ disks | map('string') }}", ["generator", "not data"]),
        ("{{ 'x' | center(10) }}", ["center"]),
        ("{{ lipsum() }}", ["'lipsum' is not defined"]),
        ("{{ cycler(1) }}", ["'cycler' is not defined"]),
        ("{{ " + "n" * MAX_TEMPLATE + " }}", [f"longer than {MAX_TEMPLATE}"]),
        ("{{ " + "(" * 300 + "n" + ")" * 300 + " }}", ["nested too deeply"]),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_an_expression_must_not_do_is_refused_with_a_reason(
    text: str, words: list[str]
) -> None:
    with pytest.raises(TemplateError) as refusal:
        render(text, VARIABLES)
    says(str(refusal.value), *words)


@pytest.mark.parametrize("text", ["{{ [nobody] }}", "{{ {'a': {'b': nobody}} }}"])
def test_an_undefined_variable_inside_a_list_is_found_as_well(text: str) -> None:
    with pytest.raises(TemplateError, match="nobody"):
        render(text, VARIABLES)


@pytest.mark.parametrize("text", ["{{ [range] }}", "{{ {'a': disks | map('string')} }}"])
def test_only_data_leaves_an_expression_at_whatever_depth(text: str) -> None:
    with pytest.raises(TemplateError, match="not data"):
        render(text, VARIABLES)


def test_chance_has_no_place_in_a_spec() -> None:
    """The same files must mean the same on every pass."""
    with pytest.raises(TemplateError, match="random"):
        render("{{ disks | random }}", VARIABLES)


@pytest.mark.parametrize(
    "text",
    [
        "{{ (['x' * 60000] * 2) | join | length }}",
        "{{ ([[0] * 300] * 300) | string | length }}",
        "{{ ([[0] * 300] * 300) | sum(start=[]) | length }}",
        "{{ (([[0] * 300] * 300) ~ '') | length }}",
        "{{ ([[0] * 300] * 300) | upper | length }}",
        "{{ ([[0] * 300] * 300) | trim | length }}",
        "{{ [1] | batch(70000, 0) | list | first | length }}",
        "{{ [1] | slice(70000) | list | length }}",
        "{{ '{:>70000}'.format(1) | length }}",
        "{{ (5).to_bytes(70000, 'big') | length }}",
    ],
)
def test_no_step_inside_an_expression_grows_out_of_hand(text: str) -> None:
    """Each of these takes gigabytes if its numbers are a little larger."""
    with pytest.raises(TemplateError):
        render(text, {})


def test_when_is_a_bare_expression() -> None:
    assert evaluate("site == 'a' and n > 2", VARIABLES) is True
    assert evaluate("n", VARIABLES) == 3
    with pytest.raises(TemplateError, match="did you mean 'site'"):
        evaluate("sit == 'a'", VARIABLES)
    with pytest.raises(TemplateError, match="cannot read"):
        evaluate("n }} {{ n", VARIABLES)


def test_the_variables_of_a_text_are_known_before_it_is_evaluated() -> None:
    assert names_in("{{ site }}-{{ vm.name }}{{ range(n) }}") == {"site", "vm", "n"}
    assert names_in("{{ n + }}") == frozenset()
    assert not is_template("site")
    assert not is_template(3)
    assert is_template("{{ n }}")


def test_a_result_may_be_as_long_as_the_limit() -> None:
    assert len(str(render("{{ 'x' * 65536 }}", {}))) == MAX_RESULT


@pytest.mark.parametrize(
    "inner",
    ["(" * 300 + "n" + ")" * 300, "9" * 4500, "[" * 300 + "]" * 300],
    ids=["parentheses", "digits", "brackets"],
)
def test_looking_for_variables_never_fails(inner: str) -> None:
    """An expression that cannot be read is reported where it is evaluated."""
    assert names_in(f"{{{{ {inner} }}}}") <= {"n"}


TOKENS = st.lists(
    st.sampled_from(
        [
            "n", "site", "vm", "disks", "item", "1", "2.5", "'a'", "[", "]", "{", "}", "(", ")",
            ",", ":", ".", "name", "|", "list", "join", "length", "upper", "default", "first",
            "map", "sort", "string", "int", "==", "<", "+", "-", "*", "/", "//", "%", "~", "**",
            "not", "and", "in", "is", "defined", "if", "else", "range", "dict", "none", "true",
            "__class__", "loop", "self", "=", "}}", "{{", "\n", "tojson", "groupby", "attr",
        ]
    ),
    max_size=8,
).map(" ".join)  # fmt: skip


@given(TOKENS | st.text(max_size=20))
@example("n | tojson")
@example("--1")
def test_no_expression_fails_but_with_a_sentence(expression: str) -> None:
    for text in (f"{{{{ {expression} }}}}", f"a{{{{ {expression} }}}}b"):
        try:
            value = render(text, VARIABLES)
        except TemplateError as error:
            assert str(error)
            continue
        assert value is None or isinstance(value, str | int | float | bool | list | dict)
    try:
        evaluate(expression, VARIABLES)
    except TemplateError as error:
        assert str(error)
    names_in(f"{{{{ {expression} }}}}")
