"""`{{ }}` in values: what an expression may do, and that it cannot do harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reconciler.core.limits import Looks
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
        "{{ ([[0] * 300] * 300) | lower | length }}",
        "{{ ([[0] * 300] * 300) | title | length }}",
        "{{ ([[0] * 300] * 300) | capitalize | length }}",
        "{{ ([[0] * 300] * 300) | trim | length }}",
        "{{ ([[0] * 300] * 300) | replace('0', '1') | length }}",
        "{{ ('a' | replace([[0] * 300] * 300, 'b')) | length }}",
        "{{ ('a' | replace('a', [[0] * 300] * 300)) | length }}",
        "{{ (['a', 'b'] | join([[0] * 300] * 300)) | length }}",
        "{{ ([[[0] * 300] * 300] | join) | length }}",
        "{{ ([[[0] * 300] * 300] | map('upper') | list) | length }}",
        "{{ (((0,) * 300,) * 300) ~ '' }}",
        "{{ ({'a': [[0] * 300] * 300} ~ '') | length }}",
        "{{ ([[0] * 300] * 300) is upper }}",
        "{{ ([[0] * 300] * 300) is lower }}",
        "{{ (('x' * 60000) ~ ('x' * 60000)) | length }}",
        "{{ (('x' * 60000) + ('x' * 60000)) | length }}",
        "{{ (([0] * 60000) + ([0] * 60000)) | length }}",
        "{{ (('x' * 60000) * 2) | length }}",
        "{{ ((0,) * 60000 * 2) | length }}",
        "{{ (2 ** 64) ** 2 % 7 }}",
        "{{ (2 ** 64) * (2 ** 64) % 7 }}",
        "{{ (('f' * 60000) | int(0, 16)) % 7 }}",
        "{{ range(99999) | length }}",
        "{{ 5 | round(999999, 'ceil') }}",
        "{{ 5 | round(-999999) }}",
        "{{ 5 | round(precision=-999999) }}",
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


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x'.center(9) }}",
        "{{ 'x'.ljust(9) }}",
        "{{ 'x'.rjust(9) }}",
        "{{ 'x'.zfill(9) }}",
        "{{ 'x'.expandtabs(9) }}",
        "{{ 'x'.join(['a', 'b']) }}",
        "{{ 'x'.replace('x', 'y') }}",
        "{{ 'x'.translate(vm) }}",
        "{{ 'x'.splitlines() }}",
        "{{ disks.copy() }}",
        "{{ vm.copy() }}",
        "{{ dict.fromkeys(disks) }}",
        "{{ n.bit_length() }}",
        "{{ n.to_bytes(9, 'big') }}",
        "{{ vm.items().isdisjoint([]) }}",
        "{{ [disks]() }}",
    ],
)
def test_a_method_that_nobody_looked_at_cannot_be_called(text: str) -> None:
    """And the refusal does not show the object, which may be large, nor its address."""
    with pytest.raises(TemplateError, match=r"not allowed here: '[a-z_]+' cannot be called$"):
        render(text, VARIABLES)


@pytest.mark.parametrize("text", ["{{ '{}'.format(n) }}", "{{ '{name}'.format_map(vm) }}"])
def test_a_format_is_refused_with_what_takes_its_place(text: str) -> None:
    with pytest.raises(TemplateError, match="join the parts with ~"):
        render(text, VARIABLES)


TALL: dict[str, object] = {
    "flat": [0] * 20_000,
    "table": {f"vm-{i}": i for i in range(100_000)},
    "word": "x" * 20_000,
    "line": "x" * 2_000,
    "letters": "yx" * 300,
    "rows": [[0] * 100] * 100,
    "same": [[0] * 100] * 100,
}
"""Variables of a file may be larger than what an expression may make of them."""


@pytest.mark.parametrize(
    "expression",
    [
        "rows == same",
        "1 < 2 < rows",
        "rows in [same]",
        "rows not in [same]",
        "0.5 in flat * 3",
        "rows is eq same",
        "rows is in [same]",
        "[rows] | select('==', same) | list | length",
        "range(50) | select('in', flat[:2000]) | list | length",
        "((0,) * 100,) * 100 in table",
        "[rows] | selectattr(0, 'in', [same]) | list | length",
        "[rows, same] | sort | length",
        "[rows, same] | map('d') | sort | length",
        "[rows, same] | max | length",
        "[rows, same] | min | length",
        "([word] * 10) | unique | list | length",
        "[[word, 1]] * 10 == [[word, 2]] * 10",
        "range(800) | sort | length",
        "{'a': rows, 'b': same} | dictsort(by='value') | length",
        "{((0,) * 100,) * 100: 1} | length",
        "vm.get(((0,) * 100,) * 100)",
        "dict([[((0,) * 100,) * 100, 1]]) | length",
        "[rows].index(same)",
        "rows.count(1)",
        "flat | list | length",
        "[flat[:6000], flat[:6000]] | length",
        "[word[:6000], word[:6000]] | length",
        "word | upper | length",
        "word.upper() | length",
        "word | list | length",
        "[line ~ line, line ~ line, line ~ line] | length",
        "flat[:6000]",
        "line | trim(letters) | length",
        "line.strip(letters) | length",
        "range(400) | map('d') | list | length",
        "range(400) | select('odd') | list | length",
        "range(600) | select | list | length",
        "(['x'] * 40) | map(attribute='0.' * 20 ~ '0') | list | length",
        "(['x'] * 40) | map('map', attribute='0.' * 200 ~ '0') | list | length",
        "([[''] * 400] * 20) | map('join') | list | length",
        "([range(400)] * 20) | map('list') | list | length",
        "(['a'] * 40) | map('replace', 'a', 'b' * 400) | list | length",
        "range(40) | map(attribute='x', default=[0] * 400) | list == []",
    ],
)
def test_every_step_counts_what_it_looks_at(
    expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.core.template.MAX_LOOKS", 9_999)
    with pytest.raises(TemplateError, match="it looks at more than 9,999 items and characters"):
        evaluate(expression, {**VARIABLES, **TALL})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("table['vm-77']", 77),
        ("table.get('vm-77')", 77),
        ("'vm-77' in table", True),
        ("n not in flat[:100]", True),
        ("rows | first | length", 100),
        ("range(100) | reject('in', disks) | list | length", 100),
        ("1 < n < 5", True),
        ("5 > n > 3", False),
        ("n in disks or n not in disks", True),
        ("'x' in word[:100] and n >= 3 != 4", True),
    ],
)
def test_what_looks_at_little_is_cheap_whatever_it_looks_into(
    expression: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.core.template.MAX_LOOKS", 9_999)
    assert evaluate(expression, {**VARIABLES, **TALL}) == value


def test_a_text_costs_the_same_every_time() -> None:
    """Nothing is worked out once, when it is compiled: a later pass would refuse other texts."""
    costs = []
    for _ in range(2):
        with Looks(1_000_000, "this test looks") as looks:
            assert evaluate("['a', 'b'] | join | upper ~ 'c'", {}) == "ABc"
        costs.append(looks.most - looks.left)
    assert costs[0] == costs[1] > 0


def test_a_whole_site_in_one_table_can_be_looped_over() -> None:
    tags = {f"tag-{index}": "some twenty letters" for index in range(25)}
    site = {f"ctx-{i}": {**tags, "path": f"/DC1/vm/{i}", "disks": [2000] * 9} for i in range(9_000)}
    known = {"site": site, "out": sorted(site)[:300]}
    assert evaluate(
        "site | dictsort | map('first') | reject('in', out) | list | length", known
    ) == (8_700)
    assert evaluate("site.values() | sort(attribute='path') | first", known) == site["ctx-0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ vm.keys() - ['name'] }}", ["cannot use - on keys", "reject"]),
        ("{{ ['a'] - vm.keys() }}", ["cannot use - on keys"]),
        ("{{ vm[disks] }}", ["cannot look up a list or keys"]),
        ("{{ disks | map(disks) | list }}", ["cannot make text of a list"]),
        ("{{ disks | select((1, 2)) | list }}", ["cannot make text of a list"]),
        ("{{ {disks[:1] | first: 1, (1, 2): 2} }}", ["cannot make text of a list"]),
        ("{{ disks | capitalize }}", ["cannot make text of a list", "name one value in it"]),
        ("{{ disks | lower }}", ["cannot make text of a list"]),
        ("{{ disks | title }}", ["cannot make text of a list"]),
        ("{{ disks | trim }}", ["cannot make text of a list"]),
        ("{{ disks | upper }}", ["cannot make text of a list"]),
        ("{{ disks | string }}", ["cannot make text of a list"]),
        ("{{ disks | replace('0', '1') }}", ["cannot make text of a list"]),
        ("{{ disks is lower }}", ["cannot make text of a list"]),
        ("{{ (['x' * 60000] * 2) | join }}", ["cannot join this", "too large"]),
        ("{{ disks ~ n }}", ["cannot make text of a list"]),
        ("a{{ disks }}b", ["cannot make text of a list", "name one value in it"]),
        ("a{{ vm }}b", ["cannot make text of keys and values"]),
        ("a{{ none }}b", ["cannot make text of nothing", "default"]),
        ("{{ n ~ none }}", ["cannot make text of nothing"]),
        ("a{{ disks | map('string') }}b", ["cannot make text of generator"]),
        ("{{ nobody ~ 'a' }}", ["the variable 'nobody' is not defined"]),
        ("{{ nobody | upper }}", ["the variable 'nobody' is not defined"]),
        ("{{ nobody | string }}", ["the variable 'nobody' is not defined"]),
        ("{{ nobody ** 2 }}", ["the variable 'nobody' is not defined"]),
        ("{{ nobody - 1 }}", ["the variable 'nobody' is not defined"]),
        ("{{ nobody == 1 }}", ["the variable 'nobody' is not defined"]),
        ("{{ site ** 2 }}", ["unsupported operand"]),
        ("{{ disks.index('x' * 60000) }}", ["cannot evaluate"]),
        ("{{ vm['x' * 60000] }}", ["there is no key", "…"]),
        ("{{ " + "n and " * 300 + "n }}", ["nested too deeply"]),
        ("{{ dict(a=1, a=2) }}", ["keyword argument repeated"]),
    ],
    ids=lambda one: str(one)[:40],
)
def test_a_refusal_says_what_is_wrong_and_stays_short(text: str, words: list[str]) -> None:
    with pytest.raises(TemplateError) as refusal:
        render(text, VARIABLES)
    says(str(refusal.value), *words)
    assert len(str(refusal.value)) < 500


def test_looking_for_a_near_miss_counts_where_many_texts_miss() -> None:
    many = {f"vm{index}": index for index in range(100)}
    with Looks(39_999, "this file looks"):
        for _ in range(3):
            with pytest.raises(TemplateError, match="did you mean 'vm77'"):
                render("{{ vm_77 }}", many)
        with pytest.raises(TemplateError, match="this file looks at more than 39,999"):
            render("{{ vm_77 }}", many)


@pytest.mark.parametrize("inner", ["[''] * 300", "[[]] * 300", "{'a': [''] * 300}"])
def test_what_is_empty_counts_as_well_where_there_is_much_of_it(inner: str) -> None:
    with pytest.raises(TemplateError, match="more than 65,536 parts"):
        render(f"{{{{ [{inner}] * 300 }}}}", {})


@pytest.mark.parametrize("text", ["{{ '\\ud800' }}", "a{{ '\\ud800' }}", "{{ {'\\ud800': [1]} }}"])
def test_half_of_a_character_does_not_leave_an_expression(text: str) -> None:
    """It could not be written to a file, an argument or a row."""
    with pytest.raises(TemplateError, match="half of a character"):
        render(text, {})
    assert render("{{ '\\u00e9' }}{{ '\\U0001f600' }}", {}) == "é😀"


def test_a_part_of_what_has_none_is_no_warning_of_python() -> None:
    """Python warns on stderr when it compiles such a thing."""
    with pytest.raises(TemplateError, match=r"object is not subscriptable$"):
        render("{{ (1)[1:] }}", {})
    assert render("{{ 'abcdef'[1:5:2] ~ 'abc'[::-1] ~ 'abc'[:-1] }}", {}) == "bdcbaab"


def test_long_keys_count_as_long_texts_do() -> None:
    with pytest.raises(TemplateError, match="more than 65,536 parts"):
        render("{{ {'a' * 40000: 1, 'b' * 40000: 1} }}", {})


def test_a_variable_may_have_any_name() -> None:
    """Also those that the evaluation itself might use."""
    names = ("result", "range", "environment", "context", "name", "self")
    for name in names[:-1]:
        assert render(f"{{{{ {name} }}}}", {name: 7}) == 7
        assert render(f"a{{{{ {name} }}}}", {name: 7}) == "a7"


def test_when_is_a_bare_expression() -> None:
    assert evaluate("site == 'a' and n > 2", VARIABLES) is True
    assert evaluate("n", VARIABLES) == 3
    with pytest.raises(TemplateError, match="did you mean 'site'"):
        evaluate("sit == 'a'", VARIABLES)
    with pytest.raises(TemplateError, match="cannot read"):
        evaluate("n }} {{ n", VARIABLES)
    for written in ("", "n }}", "{{ n", "n, n }}{{ n"):
        with pytest.raises(TemplateError, match="cannot read"):
            evaluate(written, VARIABLES)


def test_the_variables_of_a_text_are_known_before_it_is_evaluated() -> None:
    assert names_in("{{ site }}-{{ vm.name }}{{ range(n) }}") == {"site", "vm", "n"}
    assert names_in("{{ n + }}") == frozenset()
    assert names_in("{{ n }}" * MAX_TEMPLATE) == frozenset()
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
