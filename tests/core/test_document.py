"""YAML as people write it: what stays text, where everything stands, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from reconciler.core.document import parse
from reconciler.core.errors import Place
from reconciler.core.yaml_reader import MAX_DEPTH
from tests.core.builders import document, lines, says


def wrong(text: str) -> list[str]:
    """What is wrong with a text that cannot be used."""
    found, diagnostics = parse(text, "vms.yaml")
    assert found is None
    return lines(diagnostics)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("22:00", "22:00"),
        ("2026-11-23", "2026-11-23"),
        ("2026-11-23T10:00:00Z", "2026-11-23T10:00:00Z"),
        ("0123", "0123"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("true", True),
        ("False", False),
        ("tRuE", "tRuE"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'null'", "null"),
        ('"1"', "1"),
        ("7", 7),
        ("-7", -7),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
    ],
)
def test_a_plain_word_means_what_it_looks_like(written: str, value: Any) -> None:
    found = document(f"key: {written}").value
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


def test_a_key_is_always_text() -> None:
    assert document("2000: a\nnull: b\ntrue: c\n1.5: d").value == {
        "2000": "a",
        "null": "b",
        "true": "c",
        "1.5": "d",
    }


def test_every_value_and_every_key_knows_its_line_and_column() -> None:
    found = document("vms:\n  - name: ctx-1\n    disks:\n      - {key: 2000, size: 1G}\n")
    assert found.place(("vms", 0, "name")) == Place("vms.yaml", 2, 11)
    assert found.place(("vms", 0, "name"), key=True) == Place("vms.yaml", 2, 5)
    assert found.place(("vms", 0, "disks", 0, "size")) == Place("vms.yaml", 4, 27)
    assert found.place(("vms", 0)) == Place("vms.yaml", 2, 5)
    assert str(found.place(("vms",))) == "vms.yaml:2:3"


def test_what_is_not_there_is_placed_at_what_is_around_it() -> None:
    found = document("vms:\n  - name: ctx-1\n")
    assert found.place(("vms", 0, "disks", 3, "size")) == Place("vms.yaml", 2, 5)
    assert document("").place(("vms",)) == Place("vms.yaml", 1, 1)


def test_an_alias_is_the_same_value_again() -> None:
    found = document("a: &d {size: 1G}\nb: *d\n")
    assert found.value == {"a": {"size": "1G"}, "b": {"size": "1G"}}


def test_a_merge_goes_below_what_is_written_beside_it() -> None:
    found = document("a: &d {x: 1, y: 2}\nb: &e {x: 3, z: 4}\nc: {y: 9, <<: [*d, *e]}\n")
    assert isinstance(found.value, dict)
    assert found.value["c"] == {"x": 1, "y": 9, "z": 4}


@pytest.mark.parametrize(
    ("written", "line"), [("<<: *d\n  name: ctx-2", 4), ("name: ctx-2\n  <<: *d", 3)]
)
def test_a_merge_does_not_move_what_is_written_beside_it(written: str, line: int) -> None:
    found = document(f"a: &d {{name: ctx-1, state: absent}}\nb:\n  {written}\n")
    assert isinstance(found.value, dict)
    assert found.value["b"] == {"name": "ctx-2", "state": "absent"}
    assert found.place(("b", "name")).line == line
    assert found.place(("b", "name"), key=True).line == line
    assert found.place(("b", "state")).line == 1
    assert found.place(("b",)).line == 3


@pytest.mark.parametrize("merges", ["<<: [*d, *e]", "<<: *d\n  <<: *e"])
def test_of_what_is_merged_twice_the_first_source_counts_and_is_the_place(merges: str) -> None:
    found = document(f"a: &d {{x: 1}}\nb: &e\n  x: 2\n  y: 3\nc:\n  {merges}\n")
    assert isinstance(found.value, dict)
    assert found.value["c"] == {"x": 1, "y": 3}
    assert found.place(("c", "x")).line == 1
    assert found.place(("c", "x"), key=True).line == 1
    assert found.place(("c", "y")).line == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["3:1 error", "the key 'a' is written twice", "first on line 1"]),
        ("a: {b: 1, b: 2}\n", ["1:11 error", "'b' is written twice"]),
        ("2000: a\n'2000': b\n", ["2:1 error", "'2000' is written twice"]),
        ("a: 1\n---\nb: 2\n", ["2:1 error", "a second document starts here"]),
        ("a: [1, 2\n", ["error: cannot read this as YAML"]),
        ("a:\n\t- 1\n", ["2:1 error", "cannot read this as YAML"]),
        ("a: *nobody\n", ["1:4 error", "undefined alias"]),
        ("a: {{ name }}\n", ["1:5 error", "quotes"]),
        ("? [a, b]\n: 1\n", ["1:3 error", "a key is one word"]),
        ("a: !!python/object:os.system {}\nb: !!timestamp 2026-11-23\n", ["2:4", "!!timestamp"]),
        ("a: !!strr x\n", ["1:4 error", "!!strr", "did you mean 'str'"]),
        ("a: !secret x\n", ["1:4 error", "only plain values"]),
        ("a: &a [*a]\n", ["error: cannot read this: an alias holds itself"]),
        ("a: {<<: 5}\n", ["1:5 error", "<< takes a mapping"]),
        (f"a: {'9' * 5000}\n", ["1:4 error", "5000 characters"]),
        (f"a: 0x{'f' * 5000}\n", ["1:4 error", "5002 characters"]),
        (f"a: {'9' * 5000}.5\n", ["1:4 error", "5002 characters"]),
        (f"a: {{? {'k' * 1001} : 1}}\n", ["1:7 error", "1,001 characters", "at most 1,000"]),
        ("a: \x01\n", ["error: cannot read this as YAML"]),
        ('a: "\\ud800"\n', ["error: cannot read this as YAML"]),
        ("a: b\nc: d\ud800\n", ["2:5 error: cannot read this as YAML", "half of a character"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text: str, words: list[str]) -> None:
    says("\n".join(wrong(text)), *words)


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = wrong("a: 1\na: 2\nb: !!set x\n? [c]\n: 1\n")
    assert [line.split(" ")[0] for line in found] == ["2:1", "3:4", "4:3"]


def test_nesting_beyond_all_sense_is_refused_before_it_hurts() -> None:
    deep = MAX_DEPTH + 1
    says(wrong("[" * deep + "]" * deep)[0], f"more than {MAX_DEPTH} levels deep")
    says(wrong("[\n" * 100_000)[0], f"more than {MAX_DEPTH} levels deep")
    assert document("[" * MAX_DEPTH + "]" * MAX_DEPTH).value is not None


def test_nesting_that_libyaml_refuses_by_itself_is_refused_in_the_same_words() -> None:
    """libyaml reads a line ahead, and since 0.2.6 has a limit of its own."""
    assert f"more than {MAX_DEPTH} levels deep" in wrong("[" * 100_000)[0]


@pytest.mark.parametrize("item", ["- x\n", "- [x]\n"])
@pytest.mark.parametrize("start", ["", "&all\n", "a:\n", "a: &all\n", "<<:\n", "[x]:\n"])
def test_more_values_than_anybody_means_are_refused_before_the_rest_is_read(
    monkeypatch: pytest.MonkeyPatch, start: str, item: str
) -> None:
    """Each kept event takes half a kilobyte."""
    monkeypatch.setattr("reconciler.core.yaml_reader.MAX_VALUES", 1_000)
    events = 0

    class Loader(yaml.CSafeLoader):
        def get_event(self) -> yaml.Event | None:
            nonlocal events
            events += 1
            return super().get_event()

    monkeypatch.setattr("reconciler.core.yaml_reader.yaml.CSafeLoader", Loader)
    says(wrong(start + item * 20_000)[-1], "values")
    assert events < 3_100


def test_aliases_cannot_blow_a_small_file_up() -> None:
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for one, two in zip("abcdefg", "bcdefgh", strict=True):
        text += f"{two}: &{two} [{','.join([f'*{one}'] * 9)}]\n"
    says(wrong(text)[0], "with its aliases followed it holds more than 500,000 values")


@pytest.mark.parametrize(
    "text", ["a: &a\n  <<: *a\n", "a: &a\n  b: &b\n    <<: *a\n", "&a {x: {<<: [*a, *a]}}\n"]
)
def test_a_merge_that_holds_itself_is_refused(text: str) -> None:
    says(wrong(text)[0], "holds itself")


@pytest.mark.parametrize("tag", ["int", "float", "bool"])
def test_a_tag_that_does_not_fit_its_value_is_refused(tag: str) -> None:
    says(wrong(f"a: !!{tag} several\n")[0], "1:4 error", tag, "several")


YAMLISH = st.text(
    st.sampled_from(list("ab01: -\n[]{},&*!|>'\"%@`#?~<.\t")) | st.characters(codec="utf-8"),
    max_size=60,
)
PIECES = st.lists(
    st.sampled_from(
        [
            "a", "b", ": ", "- ", "\n", "  ", "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!str ",
            "!!bool ", "!!null ", "!x ", "[", "]", "{", "}", ", ", "? ", "1", "0x", "1e9", "~",
            "'", '"', "|\n", ">-\n", "---\n", "...\n", "#", "%YAML 1.1\n", "\t",
        ]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@given(YAMLISH | PIECES)
@example("a: !!float abc")
@example("a: &a\n  <<: *a\n")
def test_no_text_makes_reading_fail_but_with_a_place(text: str) -> None:
    found, diagnostics = parse(text, "vms.yaml")
    assert (found is None) == bool(diagnostics)
    for one in diagnostics:
        assert one.severity == "error"
        assert one.place
        assert one.place.line >= 1
        assert one.place.column >= 1
