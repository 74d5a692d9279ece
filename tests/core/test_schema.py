"""The schemas for editors: they take all that is right, and refuse what is wrong at its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import ValidationError  # type: ignore[import-untyped]

from reconciler.core import config, declared, document, inventory_file, spec_files
from reconciler.core.schema import KINDS, SAYS, schema
from tests import generated
from tests.core.test_spec import SMALLEST

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = {kind: schema(kind) for kind in KINDS}


def parsed(text: str, file: str = "x.yaml") -> document.Document:
    found, wrong = document.parse(text, file)
    assert found is not None, wrong
    return found


def refused(kind: str, text: str) -> list[tuple[str, str]]:
    """Where and why a schema refuses a text, from the top down."""
    found = parsed(text)
    errors = Draft7Validator(SCHEMAS[kind]).iter_errors(found.value)
    return sorted({place for error in errors for place in places(found, error)})


def places(found: document.Document, error: ValidationError) -> Iterator[tuple[str, str]]:
    inner = [place for one in error.context or () for place in places(found, one)]
    if inner:
        yield from inner
        return
    path: tuple[Any, ...] = tuple(error.absolute_path)
    unknown = []
    if error.validator == "additionalProperties":
        known = [*error.schema.get("properties", ()), *error.schema.get("patternProperties", ())]
        unknown = [key for key in error.instance if not any(re.search(k, key) for k in known)]
    for key in unknown or [None]:
        where = found.place((*path, key) if key else path, key=key is not None)
        yield f"{where.line}:{where.column}", str(error.validator)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_schema_of_draft_7(kind: str) -> None:
    Draft7Validator.check_schema(SCHEMAS[kind])
    words = json.dumps(SCHEMAS[kind])
    assert "$defs" not in words
    assert "prefixItems" not in words
    for name in re.findall(r'"#/definitions/(\w+)"', words):
        assert name in SCHEMAS[kind]["definitions"]


def test_the_files_are_what_the_command_prints() -> None:
    for path, text in generated.everything().items():
        said = f"`python -m tests.generated` writes {path}"
        if path.suffix == ".json":  # the order of keys is that of one version of pydantic
            assert json.loads(path.read_text()) == json.loads(text), said
        else:
            assert path.read_text() == text, said


def written() -> Iterator[tuple[str, Path]]:
    for path in sorted([*ROOT.glob("specs/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")]):
        kinds = {"reconciler.yaml": "config", "inventory.yaml": "inventory"}
        variables = {"group_vars", "host_vars", "vars"} & {*path.parts}
        if path.name != "reconciler.rules.yaml" and not variables:  # those are Prometheus's
            yield kinds.get(path.name, "spec"), path


@pytest.mark.parametrize(("kind", "path"), list(written()), ids=str)
def test_every_example_is_let_pass_and_names_its_schema(kind: str, path: Path) -> None:
    text = path.read_text()
    assert refused(kind, text) == []
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found
    assert (path.parent / found.group(1)).resolve() == (
        ROOT / "docs" / "schema" / f"{kind}.schema.json"
    )


def snippets() -> Iterator[tuple[str, str]]:
    """What the pages show, by its first key."""
    pages = [
        *(one for one in ROOT.glob("docs/*.md") if one.name != "errors.md"),
        *ROOT.glob("examples/*/README.md"),
        ROOT / "README.md",
    ]
    for page in sorted(pages):
        for text in re.findall(r"(?s)```yaml\n(.*?)```", page.read_text()):
            found, _ = document.parse(text, str(page))
            value = found.value if found else None
            if not isinstance(value, dict):
                continue
            if value.keys() & {"vms", "runs", "include"}:
                yield "inventory" if isinstance(value.get("vms"), dict) else "spec", text
            elif value and value.keys() <= set(config.ConfigModel.model_fields):
                yield "config", text


SNIPPETS = list(snippets())


@pytest.mark.parametrize(("kind", "text"), SNIPPETS)
def test_every_snippet_of_the_docs_is_let_pass(kind: str, text: str) -> None:
    assert refused(kind, text) == []


def test_there_are_snippets_of_each_kind() -> None:
    assert {kind for kind, _ in SNIPPETS} == set(KINDS)


class _Vm:
    """A VM with one more line."""

    @staticmethod
    def format(line: str) -> str:
        return f"vms:\n  - name: ctx-1\n    {line}\n"


VM = _Vm


@pytest.mark.parametrize(
    "line",
    [
        'backup: "{{ nightly }}"',
        'backup: {run: "{{ run }}", type: "{{ type }}"}',
        "backup: {run: 20261123}",
        'protect: "{{ tier == \'gold\' }}"',
        'disks: "{{ lookup(\'disks\') }}"',
        'disks: ["{{ disk }}", {key: "{{ key }}", size: "{{ size }}"}]',
        "disks: [{key: 1, size: 1048576}, {key: 2, size: 1.5TiB}, {key: 3, size: 512}]",
        "labels: {tier: gold, rack: 7}",
        "sna: null",
        "vm: {name: a, path: /p, vcenter: \"{{ vc }}\"}",
        "when: site == 'a'",
        "when: true",
        'loop: "{{ range(3) | list }}"',
        "loop: [1, {a: b}]",
        "vars: {tier: gold, deep: {er: 1}}",
        "groups: [gold, \"{{ tier }}\"]",
        "groups: gold",
        "backup: {type: incremental}",
    ],
)  # fmt: skip
def test_templates_may_stand_anywhere(line: str) -> None:
    assert refused("spec", VM.format(line)) == []
    assert refused("spec", "defaults: {backup: {type: full}}\n" + VM.format(line)) == []


BROKEN = [
    ("vms: {}", "1:6", "type"),
    ("vmss: []", "1:1", "additionalProperties"),
    ("vars: {}", "1:1", "required"),
    ("vars: {a-b: 1}\nvms: []", "1:7", "pattern"),
    ("vms:\n  - state: absent", "2:5", "required"),
    (VM.format("stat: absent"), "3:5", "additionalProperties"),
    (VM.format("state: gone"), "3:12", "enum"),
    (VM.format("for: restre"), "3:10", "enum"),
    (VM.format("protect: yes please"), "3:14", "type"),
    (VM.format("protect: 'true'"), "3:14", "type"),
    (VM.format("disks: inventry"), "3:12", "enum"),
    (VM.format("disks: [{size: 1GiB}]"), "3:13", "required"),
    (VM.format("disks: [{key: '2000'}]"), "3:19", "type"),
    (VM.format("disks: [{key: -1}]"), "3:19", "minimum"),
    (VM.format("disks: [{key: 1, size: 40GB}]"), "3:28", "pattern"),
    (VM.format("disks: [{key: 1, size: 1000}]"), "3:28", "multipleOf"),
    (VM.format("disks: [{key: 1, sise: 1GiB}]"), "3:22", "additionalProperties"),
    (VM.format("disks: [{key: 1, image: ../x}]"), "3:29", "pattern"),
    (VM.format("disks: [{key: 1, image: /x}]"), "3:29", "pattern"),
    (VM.format("disks: [{key: 1, export: 'a,disk0'}]"), "3:30", "pattern"),
    (VM.format("backup: {run: a/b}"), "3:19", "pattern"),
    (VM.format("backup: {run: a, typ: full}"), "3:22", "additionalProperties"),
    (VM.format("backup: {run: a, type: ful}"), "3:28", "enum"),
    (VM.format("vm: {path: 3}"), "3:16", "type"),
    (VM.format("labels: [a]"), "3:13", "type"),
    (VM.format("labels: {a: [b]}"), "3:17", "type"),
    (VM.format("loop: range(3)"), "3:11", "pattern"),
    (VM.format("when: 3"), "3:11", "type"),
    (VM.format("groups: [a b]"), "3:14", "pattern"),
    (VM.format("name: a b").replace("name: ctx-1\n    ", ""), "2:11", "pattern"),
    ("runs: [{vm: a}]", "1:8", "required"),
    ("runs: [{vm: a, run: b, kind: full}]", "1:24", "additionalProperties"),
    ("defaults: {name: a}\nvms: []", "1:12", "additionalProperties"),
    ("defaults: {stat: a}\nvms: []", "1:12", "additionalProperties"),
    ("include: [{vars: {}}]", "1:11", "required"),
    ("include: 3", "1:10", "type"),
]


@pytest.mark.parametrize(("text", "where", "why"), BROKEN)
def test_a_broken_spec_is_refused_at_its_place(text: str, where: str, why: str) -> None:
    found = refused("spec", text)
    assert (where, why) in found, found
    assert {place for place, _ in found} == {where}, found


@pytest.mark.parametrize("text", [text for text, _, _ in BROKEN])
def test_what_the_schema_refuses_is_wrong(text: str) -> None:
    """The other way round it may let pass what only `validate` can know."""
    assert spec_files.read([parsed(text)]).failed


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("hubb: a", "1:1", "additionalProperties"),
        ("hub: a b", "1:6", "pattern"),
        ("ports: {range: 10100}", "1:16", "type"),
        ("ports: {rang: 1-2}", "1:9", "additionalProperties"),
        ("snas: {a: {url: x}}", "1:17", "pattern"),
        ("snas: {a: {}}", "1:11", "required"),
        ("snas: {a b: {url: 'http://x'}}", "1:8", "additionalProperties"),
        ("snas: {a: {url: 'http://x', token: secret}}", "1:36", "type"),
        ("snas: {a: {url: 'http://x', timeout: 5 minutes}}", "1:38", "pattern"),
        ("qemu_nbd: {cache: unsafe}", "1:19", "enum"),
        ("qemu_nbd: {shared: 1}", "1:20", "minimum"),
        ("loop: {max_delete: half}", "1:20", "pattern"),
        ("repositories: {a: {root: /x, min_free: 1GB}}", "1:40", "pattern"),
    ],
)
def test_a_broken_config_is_refused_at_its_place(text: str, where: str, why: str) -> None:
    assert refused("config", text) == [(where, why)]


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("vms: []", "1:6", "type"),
        ("vms: {a: {}}", "1:10", "required"),
        ("vms: {a: {disks: [{key: 1}]}}", "1:19", "required"),
        ("vms: {a: {disk: [], disks: []}}", "1:11", "additionalProperties"),
    ],
)
def test_a_broken_inventory_is_refused_at_its_place(text: str, where: str, why: str) -> None:
    assert refused("inventory", text) == [(where, why)]


def test_the_smallest_spec_is_let_pass() -> None:
    assert refused("spec", SMALLEST) == []


def test_every_key_is_explained() -> None:
    models = {name for kind in KINDS for name in SCHEMAS[kind]["definitions"]}
    for kind in KINDS:
        for name, one in [("", SCHEMAS[kind]), *SCHEMAS[kind]["definitions"].items()]:
            for key, value in one.get("properties", {}).items():
                assert value.get("description") or name == "include", f"{kind}: {name}.{key}"
    gone = {key for key in SAYS if key.split(".")[0] not in {*models, "ConfigModel", "_File"}}
    assert gone == set()


def test_defaults_are_let_pass_by_their_own_schema() -> None:
    for kind in KINDS:
        for one in (SCHEMAS[kind], *SCHEMAS[kind]["definitions"].values()):
            for value in one.get("properties", {}).values():
                if "default" in value:
                    whole = {**value, "definitions": SCHEMAS[kind]["definitions"]}
                    Draft7Validator(whole).validate(value["default"])


def test_a_reader_that_nobody_described_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from reconciler.core import schema as module

    monkeypatch.setattr(module, "_READ_BY", {})
    with pytest.raises(module.UnknownReaderError, match="no schema is known of what"):
        schema("inventory")
    assert inventory_file.KnownDiskSpec.model_validate({"key": 1, "size": "1GiB"}).size == 1 << 30
    assert declared.MAX_NAME == 100
