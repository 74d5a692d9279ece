"""How findings are shown: the line that is meant, whatever is in it, and never a secret."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.cli.findings import count, findings
from reconciler.cli.terminal import cells, safe
from reconciler.core.config import settings
from reconciler.core.document import parse
from reconciler.core.errors import ConfigError, Diagnostic, Place
from reconciler.core.findings import RULES, end_of, finding, in_order, lines, rule_of
from reconciler.core.plan import diagnostics_json
from reconciler.core.spec_files import read
from tests.core.test_schema import BROKEN

TEXT = """\
vms:
  - name: ctx-1
    imgae: x.qcow2
    disks: [{key: 1, size: 1000}, {key: 2}]
    labels: {"a": 'it''s', b: "x, y"}  # why
"""


def shown(
    summary: str, line: int, column: int, text: str = TEXT, width: int = 80, **options: object
) -> list[str]:
    found = [Diagnostic("error", summary, Place("a.yaml", line, column))]
    return findings(found, {"a.yaml": text}, colour=False, width=width, **options)  # type: ignore[arg-type]


def marked(line: str, mark: str) -> str:
    """What the carets stand under."""
    start = mark.index("^")
    end = len(mark)
    out, column = "", 0
    for char in line:
        if start <= column < end:
            out += char
        column += cells(char)
    return out


def test_a_finding_is_shown_as_compilers_do() -> None:
    said = "unknown key 'imgae'; did you mean 'image'? (known here: name, image)"
    assert shown(said, 3, 5) == [
        "a.yaml:3:5: error: unknown key 'imgae' (known here: name, image)",
        "    3 |     imgae: x.qcow2",
        "      |     ^^^^^",
        "      = did you mean 'image'?",
    ]


@pytest.mark.parametrize(
    ("line", "column", "meant"),
    [
        (3, 5, "imgae"),
        (3, 12, "x.qcow2"),
        (4, 12, "[{key: 1, size: 1000}, {key: 2}]"),
        (4, 13, "{key: 1, size: 1000}"),
        (4, 22, "size"),
        (4, 28, "1000"),
        (4, 41, "2"),
        (5, 13, """{"a": 'it''s', b: "x, y"}"""),
        (5, 14, '"a"'),
        (5, 19, "'it''s'"),
        (5, 28, "b"),
        (5, 31, '"x, y"'),
        (2, 3, "- name"),
    ],
)
def test_what_is_meant_is_underlined(line: int, column: int, meant: str) -> None:
    _, text, mark = shown("x", line, column)
    assert marked(text, mark) == meant


@pytest.mark.parametrize(
    ("summary", "headline", "help_"),
    [
        ("the key 'disks' is missing: write `disks: inventory` or a list of disks",
         "the key 'disks' is missing", "write `disks: inventory` or a list of disks"),
        ("the VM 'x' is declared twice (first at a.yaml:1:1); neither is used: keep one",
         "the VM 'x' is declared twice (first at a.yaml:1:1); neither is used", "keep one"),
        ("a: expected text, found the number 1.5; if you mean the text, quote it: \"1.5\"",
         "a: expected text, found the number 1.5", 'if you mean the text, quote it: "1.5"'),
        ("timeout: write a duration like 10s or 5m",
         "timeout: write a duration like 10s or 5m", ""),
        ("in the inventory: size: write a size like 40GiB",
         "in the inventory: size: write a size like 40GiB", ""),
        ("sna 'a' is not in the config; did you mean 'b'? (snas there: b)",
         "sna 'a' is not in the config (snas there: b)", "did you mean 'b'?"),
        ("it's wrong; did you mean \"it's\"?", "it's wrong", "did you mean \"it's\"?"),
    ],
)  # fmt: skip
def test_what_helps_stands_apart(summary: str, headline: str, help_: str) -> None:
    found = finding(Diagnostic("error", summary))
    assert (found.summary, found.help) == (headline, help_)


def test_a_line_for_logs_says_it_all() -> None:
    one = Diagnostic("error", "it is so", Place("a.yaml", 1, 2), help="write it otherwise")
    assert str(one) == "a.yaml:1:2: error: it is so; write it otherwise"
    assert finding(one).help == "write it otherwise"


# -- whatever is in a line


def test_wide_and_combining_characters_do_not_misplace_the_mark() -> None:
    text = "a: 日本語 e\u0301x: b\n"
    _, line, mark = shown("x", 1, text.index("x") + 1, text)
    assert cells(line[: line.index("x")]) == mark.index("^")
    _, line, mark = shown("x", 1, 4, "a: 日本\n")
    assert mark.count("^") == 4


def test_tabs_do_not_misplace_the_mark() -> None:
    _, line, mark = shown("x", 1, 5, "\t\ta: b\n".replace("a", "a"))
    assert "\t" not in line
    _, line, mark = shown("x", 1, 3, "\t\tabc: d\n")
    assert marked(line, mark) == "abc"


def test_no_control_character_reaches_the_terminal() -> None:
    text = "a: \x1b]0;title\x07 \u202eevil \x9b31m \x00 b\n"
    found = [Diagnostic("error", "it is \x1b[31m\nso \u2066", Place("a\x1b.yaml", 1, 1))]
    out = findings(found, {"a\x1b.yaml": text}, colour=False)
    assert all(line.isprintable() for line in out), out
    assert out[0] == "a\\x1b.yaml:1:1: error: it is \\x1b[31m\\nso \\u2066"
    assert "\\x1b]0;title\\x07 \\u202eevil \\x9b31m \\x00" in out[1]


LINE = "first: 1, " + "abc: def, " * 40 + "wrong: here" + ", xyz: uvw" * 40


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("column", [1, 8, LINE.index("wrong") + 1, len(LINE) - 2])
def test_a_long_line_is_cut_around_what_is_meant(width: int, column: int) -> None:
    _, line, mark = shown("x", 1, column, LINE + "\n", width)
    assert cells(line) <= max(width, 22)
    assert cells(mark) <= max(width, 22)
    assert LINE[column - 1 :].startswith(marked(line, mark)[:5].rstrip("…"))
    assert "…" in line


@given(
    line=st.text(st.characters(exclude_characters="\n\r\x85\u2028\u2029"), min_size=1),
    column=st.integers(1, 200),
    width=st.integers(20, 100),
)
def test_no_line_breaks_the_view(line: str, column: int, width: int) -> None:
    out = shown("x", 1, column, line + "\n", width)
    assert all(one.isprintable() for one in out), out
    assert all(cells(one) <= max(width, 22) for one in out[1:]), out
    assert out[2:] == [] or "^" in out[2]


def test_lines_are_those_of_yaml() -> None:
    text = "a: 1\r\nb: 2\rc: 3\x85d: 4\u2028e: 5\ne: 6"
    assert lines(text) == ["a: 1", "b: 2", "c: 3", "d: 4", "e: 5", "e: 6"]
    _, wrong = parse(text, "a.yaml")
    assert [str(one.place) for one in wrong] == ["a.yaml:6:1"]


def test_a_place_outside_of_the_text_is_no_error() -> None:
    for line, column in ((99, 1), (1, 99), (0, 1)):
        assert shown("x", line, column)[0] == f"a.yaml:{line}:{column}: error: x"
    assert findings([Diagnostic("error", "x")], {}, colour=False) == ["error: x"]
    assert end_of("", 1) == 1


# -- order and number


def test_errors_stand_last_file_by_file_from_the_top() -> None:
    places = [("error", "b", 2), ("warning", "b", 1), ("error", "a", 9), ("error", "b", 1)]
    found = [Diagnostic(kind, "x", Place(file, line, 1)) for kind, file, line in places]
    found.append(Diagnostic("error", "cannot read c"))
    assert [str(one) for one in in_order(found)] == [
        "b:1:1: warning: x",
        "error: cannot read c",
        "a:9:1: error: x",
        "b:1:1: error: x",
        "b:2:1: error: x",
    ]


def test_of_many_of_one_kind_some_are_shown() -> None:
    many = [
        Diagnostic("error", f"unknown key 'a{n}'", Place("a.yaml", n, 1)) for n in range(1, 1001)
    ]
    other = Diagnostic("error", "the VM 'x' is declared twice", Place("z.yaml", 1, 1))
    out = findings([*many, other], {}, colour=False)
    assert out[-1] == "… and 980 more unknown-key errors: `reconciler validate --all` shows all"
    assert len(out) == 22
    assert "z.yaml:1:1" in out[-2]
    assert len(findings([*many, other], {}, colour=False, each=None)) == 1001
    assert "1 more unknown-key error:" in findings(many[:21], {}, colour=False)[-1]
    assert len(findings(many[:20], {}, colour=False)) == 20


def test_colour_changes_no_character() -> None:
    found = [Diagnostic("error", "unknown key 'imgae'; did you mean 'x'?", Place("a.yaml", 3, 5))]
    plain = findings(found, {"a.yaml": TEXT}, colour=False)
    coloured = findings(found, {"a.yaml": TEXT}, colour=True)
    assert any("\x1b[" in line for line in coloured)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == plain


# -- rules


def test_every_finding_has_a_rule_that_is_known() -> None:
    """Over everything that is wrong in the table of the schemas."""
    found: list[Diagnostic] = []
    for text, _, _ in BROKEN:
        document, wrong = parse(text, "x")
        found += [*wrong, *read([document] if document else []).diagnostics]
    rules = {rule_of(one) for one in found}
    assert rules <= RULES.keys()
    assert {"unknown-key", "missing-key", "wrong-type", "bad-value", "template"} <= rules


@pytest.mark.parametrize(
    ("summary", "rule"),
    [
        ("unknown key 'a'; did you mean 'b'?", "unknown-key"),
        ("unknown key 'a' in defaults", "unknown-key"),
        ("in the inventory: unknown key 'disk' (known here: vm, disks)", "unknown-key"),
        ("the key 'run' is missing", "missing-key"),
        ("the key 'vms' is missing: write `vms:` and a list", "missing-key"),
        ("`vms:` is empty: write a list of VMs, or [] for none", "missing-key"),
        ("disks: expected `inventory` or a list, found the number 3", "wrong-type"),
        ("state: expected one of exported, absent, found the text 'x'", "bad-value"),
        ("cannot read this as YAML: while parsing a flow node", "yaml"),
        ("cannot read a.yaml: Permission denied", "unreadable"),
        ("the inventory: cannot read x: No such file or directory", "unreadable"),
        ("cannot read this: it is nested more than 32 levels deep", "limit"),
        ("this loop has 10,001 items; at most 10,000", "limit"),
        ("the key 'a' is written twice (first on line 1): keep one", "duplicate-key"),
        ("the VM 'a' is declared twice (first at x); neither is used: keep one", "duplicate-vm"),
        ("VM a: two disks have the key 1 (the other on line 3)", "duplicate-disk"),
        ("in the inventory: VM a has two disks with the key 1", "duplicate-disk"),
        ("cannot evaluate {{ a }}: the variable 'a' is not defined", "template"),
        ("the vars go round in a circle: a → a", "template"),
        ("token: a secret is never written in place: write {file: PATH}", "secret-in-place"),
        ("url: a URL with a password in it: write `token: {file: …}`", "secret-in-place"),
        ("VM a: the spec lists the disks 1; the inventory knows 2. One snapshot holds all",
         "inventory-mismatch"),
        ("VM a: the inventory /i.yaml does not know this VM", "inventory-unknown"),
        ("VM a: no inventory confirms that these are all its disks (DisksUnverified); a disk",
         "disks-unverified"),
        ("VM a: no run is asked for, so nothing of it is exported: write", "no-run"),
        ("VM a: sna 'b' is not in the config (snas there: a)", "unknown-name"),
        ("there is no VM 'ctx-11'; did you mean 'ctx-1'?", "unknown-name"),
        ("VM a: it has the vCenter path '/p', as has VM b (x:1:1)", "clash"),
        ("VM a: disk 1 has no completed run to build an incremental on: write", "not-a-backup"),
        ("size: 1000 is 1000 bytes, not a multiple of 512", "bad-value"),
    ],
)  # fmt: skip
def test_the_rule_is_known_by_the_summary(summary: str, rule: str) -> None:
    assert rule_of(Diagnostic("error", summary)) == rule
    assert rule_of(Diagnostic("error", summary, rule="limit")) == "limit"


def test_json_says_all_of_a_finding() -> None:
    said = "unknown key 'imgae'; did you mean 'image'?"
    found = [Diagnostic("error", said, Place("a.yaml", 3, 5), "ctx-1"), Diagnostic("warning", "x")]
    assert diagnostics_json(found, {"a.yaml": TEXT}) == [
        {
            "severity": "error",
            "rule": "unknown-key",
            "summary": said,
            "help": "did you mean 'image'?",
            "vm": "ctx-1",
            "file": "a.yaml",
            "line": 3,
            "column": 5,
            "end_column": 10,
        },
        {
            "severity": "warning",
            "rule": "bad-value",
            "summary": "x",
            "help": None,
            "vm": None,
            "file": None,
            "line": None,
            "column": None,
            "end_column": None,
        },
    ]


# -- secrets

SECRET = "geheim-4711"
LEAKY = [
    f"snas: {{a: {{url: 'http://x', token: {SECRET}}}}}",
    f"snas: {{a: {{urll: x, token: {SECRET}}}}}",
    f"snas: {{a: {{tokn: {SECRET}, urll: x}}}}",
    f"snas:\n  a:\n    url: http://x\n    tokn: {SECRET}\n",
    f"snas:\n  a:\n    url: http://x\n    token: {{value: {SECRET}}}\n",
    f"snas:\n  a:\n    url: http://x\n    token:\n      value: {SECRET}\n",
    f"vcenters: {{v: {{host: 3, user: u, password: {SECRET}}}}}",
    f"vcenters: {{v: {{password: {SECRET}, host: 3, user: u}}}}",
    f"vcenters:\n  v: {{user: u, password: {SECRET}}}\n",
    f"vcenters:\n  v:\n    password: {SECRET}\n    user: u\n",
    f"snas: {{a: {{url: 'http://u:{SECRET}@x'}}}}",
    f"git: {{url: 'https://u:{SECRET}@x/y', brunch: a}}",
    f"notify: {{url: 'https://u:{SECRET}@x/y'}}",
    f'vcenters:\n  v:\n    password: "{SECRET}\n',
    f"vcenters:\n  v:\n    password: '{SECRET}': x\n",
    f"vcenters:\n  v:\n    password: x\n    password: {SECRET}\n",
    f"password: {SECRET}\n",
    f"snas: [{SECRET}]\n",
    f"snas: {{a: {{url: 'http://x', token: {{age: AGE-SECRET-KEY-{SECRET}}}}}}}",
    f"snas:\n  a:\n    url: http://x\n    token:\n      age: {SECRET}\n",
    f"inventory: {{sql: {{url: 'mysql://u:a/{SECRET}@h:x/db'}}}}",
    f"inventory:\n  sql:\n    url: mysql://u:a#{SECRET}@h/db\n",
    f"inventory: {{sql: {{url: 'u:{SECRET}@h/db'}}}}",
    f"snas: {{a: {{url: 'u:{SECRET}@h/db', tokn: x}}}}",
]


@pytest.mark.parametrize("text", LEAKY)
@pytest.mark.parametrize("width", [40, 200])
def test_no_secret_of_a_config_is_shown(text: str, width: int) -> None:
    """Not even one that was written where none may be, in a line with something else wrong."""
    document, found = parse(text, "reconciler.yaml")
    if not found:
        with pytest.raises(ConfigError) as caught:
            settings(document, {}, base="/", cwd="/", host_name="h", root=True)
        found = list(caught.value.diagnostics)
    out = findings(
        found, {"reconciler.yaml": text}, colour=False, width=width, private={"reconciler.yaml"}
    )
    assert out
    assert SECRET not in "\n".join(out)


def test_of_a_config_what_is_meant_is_shown() -> None:
    text = "loop:\n  resink: 1s\n  max_delete: none\nports: {bind: 'a', range: 1}\n"
    document, _ = parse(text, "reconciler.yaml")
    with pytest.raises(ConfigError) as caught:
        settings(document, {}, base="/", cwd="/", host_name="h", root=True)
    out = findings(
        caught.value.diagnostics, {"reconciler.yaml": text}, colour=False,
        private={"reconciler.yaml"},
    )  # fmt: skip
    assert "    2 |   resink: …" in out
    assert "      |   ^^^^^^" in out
    assert "    3 |   max_delete: …" in out
    assert "      |               ^" in out
    assert "    4 | … range: 1 …" in out


@pytest.mark.parametrize(
    ("text", "column", "line"),
    [
        ("vms:\n\t- name: a\n", 1, "→   - name: a"),
        ("a:\n  b: 1\n  \tc: 2\n", 3, "  →   c: 2"),
        ("a:\n  b:\n    \t- x\n", 5, "    →   - x"),
        ("\ufeffa:\r\n\tb: c\r\n", 1, "→   b: c"),
        ("a: |\n\ttext\n", 1, "→   text"),
    ],
)
def test_a_tab_that_indents_is_shown_and_named(text: str, column: int, line: str) -> None:
    number = 2 if text.count("\n") == 2 else 3
    document, found = parse(text, "a.yaml")
    assert document is None
    assert [str(one.place) for one in found] == [f"a.yaml:{number}:{column}"]
    out = findings(found, {"a.yaml": text}, colour=False)
    assert "a tab stands where the line is indented, and YAML forbids tabs for that" in out[0]
    assert out[1:] == [
        f"    {number} | {line}", f"      | {' ' * (column - 1)}^^^^", "      = write spaces",
    ]  # fmt: skip
    out = findings(found, {"a.yaml": text}, colour=False, private={"a.yaml"})
    assert out[1].endswith("→   …")  # which hides nothing but what is behind it


@pytest.mark.parametrize("text", ["a: [\n\tb]\n", "a:\tb\n", 'a: "x\n\ty"\n'])
def test_a_tab_between_words_is_none_of_our_business(text: str) -> None:
    assert parse(text, "a.yaml")[1] == []


def test_another_error_behind_a_tab_is_not_blamed_on_it() -> None:
    (found,) = parse("a: [\n\tb: c: d]\n", "a.yaml")[1]
    assert "tab" not in found.summary


def test_a_value_of_a_config_with_a_tab_in_it_is_shown_as_the_finding_says_it() -> None:
    text = 'snas: {a: {url: "\tx", timeout: 1s}}\n'
    document, _ = parse(text, "reconciler.yaml")
    with pytest.raises(ConfigError) as caught:
        settings(document, {}, base="/", cwd="/", host_name="h", root=True)
    out = findings(
        caught.value.diagnostics, {"reconciler.yaml": text}, colour=False,
        private={"reconciler.yaml"},
    )  # fmt: skip
    assert '    1 | … url: "→   x" …' in out


def test_the_password_of_a_url_is_shown_nowhere() -> None:
    out = shown("x", 1, 6, f"url: git://u:{SECRET}@host/x # y\n")
    assert SECRET not in "\n".join(out)
    assert marked(out[1], out[2]) == "git://…@host/x"


def test_what_is_printable_stays_as_it_is() -> None:
    assert safe("naïve 日本 👨‍👩‍👧 ✓") == "naïve 日本 👨‍👩‍👧 ✓"


def test_what_hurts_many_vms_is_shown_once_and_counted_once() -> None:
    place = Place("a.yaml", 1, 9)
    wrong = [Diagnostic("error", "cannot evaluate {{ x }}", place, f"ctx-{n}") for n in range(5)]
    wrong.append(Diagnostic("error", "cannot evaluate {{ y }}", place, "ctx-1"))
    said = findings(wrong, {"a.yaml": "vars: {a: '{{ x }}'}"}, colour=False, width=80)
    assert [line for line in said if "error" in line] == [
        "a.yaml:1:9: error: cannot evaluate {{ x }}",
        "a.yaml:1:9: error: cannot evaluate {{ y }}",
    ]
    assert "    = of 5 VMs: ctx-0, ctx-1, ctx-2, …" in said
    assert count(wrong) == "2 errors, 0 warnings"
