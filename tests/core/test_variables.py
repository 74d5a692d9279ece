"""Variables: which layer has the last word, what is evaluated when, what is said of mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from reconciler.core import spec_files
from reconciler.core.around import Nothing, Side
from reconciler.core.declared import Found
from reconciler.core.document import parse
from reconciler.core.limits import TemplateError
from reconciler.core.variables import EXTRA, Variable
from tests.core.builders import document, known, lines, says


class Files(Nothing):
    """What lies around, as texts: `group_vars/gold`, `host_vars/ctx-1`, `vars/x.yaml`, `-e`."""

    def __init__(self, texts: Mapping[str, str], inventory: str = "", **environment: str) -> None:
        self.texts = texts
        self.known = known(inventory) if inventory else None
        self.environment = environment
        self.asked: list[str] = []

    def _side(self, name: str) -> Side:
        found, wrong = parse(self.texts[name], name)
        return Side(name, found, tuple(wrong))

    @property
    def extra(self) -> Sequence[Side]:  # type: ignore[override]
        return [self._side(name) for name in self.texts if name.startswith(EXTRA)]

    def inventory(self) -> Mapping[str, Any] | None:
        self.asked.append("inventory")
        return self.known.facts() if self.known else None

    def groups_of(self, vm: str) -> Sequence[str]:
        return self.known.groups_of(vm) if self.known else ()

    def group_vars(self, group: str) -> Sequence[Side]:
        name = f"group_vars/{group}"
        return [self._side(name)] if name in self.texts else []

    def host_vars(self, vm: str) -> Sequence[Side]:
        name = f"host_vars/{vm}"
        return [self._side(name)] if name in self.texts else []

    def file(self, path: str, _beside: str, *, spec: bool = False) -> Side:
        if path not in self.texts:
            raise TemplateError(f"cannot read {path}: there is no file {path}")
        return self._side(path)

    def text(self, path: str, _beside: str) -> str | None:
        return self.texts.get(path)

    def variable(self, name: str) -> str | None:
        return self.environment.get(name)


def found(text: str, files: Files | None = None, explain: str = "") -> Found:
    return spec_files.read_file(document(text, "a.yaml"), files or Files({}), explain=explain)


def label(text: str, files: Files | None = None) -> str:
    """The label `x` of the one VM of a file without errors."""
    read = found(text, files)
    assert lines(read.diagnostics) == []
    (one,) = read.vms
    return one.spec.labels["x"]


def wrong(text: str, files: Files | None = None) -> str:
    read = found(text, files)
    return "\n".join(f"{one.place}: {one.summary} [{one.vm}]" for one in read.diagnostics)


ONE = "vms: [{name: ctx-1, state: absent, groups: [gold, late], labels: {x: '{{ x }}'}}]\n"
LAYERS = [
    "group_vars/all",
    "group_vars/gold",
    "group_vars/late",
    "host_vars/ctx-1",
    "vars",
    "vars/x.yaml",
    "own",
    "-e x",
]
"""From the weakest to the strongest."""


def written(layers: Sequence[str]) -> tuple[str, Files]:
    """A file whose VM has `x` in some layers, each with the layer's name as the value."""
    text = ONE
    if "vars" in layers:
        text += "vars: {x: vars}\n"
    if "vars/x.yaml" in layers:
        text += "vars_files: vars/x.yaml\n"
    if "own" in layers:
        text = text.replace("state", "vars: {x: own}, state")
    return text, Files({layer: f"x: {layer}" for layer in layers if layer not in ("vars", "own")})


@pytest.mark.parametrize("strongest", range(len(LAYERS)))
def test_the_stronger_layer_has_the_last_word(strongest: int) -> None:
    assert label(*written(LAYERS[: strongest + 1])) == LAYERS[strongest]
    assert label(*written([LAYERS[0], LAYERS[strongest]])) == LAYERS[strongest]


def test_vars_of_an_include_go_over_those_of_the_included_file() -> None:
    files = Files({"includes/b.yaml": f"vars: {{x: b}}\n{ONE}"})
    assert label("vars: {x: a}\ninclude: includes/b.yaml\n", files) == "b"
    text = "vars: {x: a}\ninclude: [{file: includes/b.yaml, vars: {x: given}}]\n"
    assert label(text, files) == "given"


def test_what_is_included_has_the_vars_and_defaults_of_who_includes_it() -> None:
    files = Files(
        {
            "includes/b.yaml": "defaults: {labels: {b: b}}\n"
            "vms: [{name: ctx-1, labels: {x: '{{ site }}'}}]\n"
        }
    )
    read = found(
        "vars: {site: a}\ndefaults: {state: absent, labels: {b: a, c: c}}\n"
        "include: ['includes/{{ \"b\" }}.yaml']\nvms: [{name: ctx-0}]\n",
        files,
    )
    assert lines(read.diagnostics) == []
    assert [one.spec.name for one in read.vms] == ["ctx-0", "ctx-1"]
    assert read.vms[1].spec.labels == {"b": "b", "c": "c", "x": "a"}
    assert str(read.vms[1].place("name")) == "includes/b.yaml:2:14"
    assert read.vms[0].spec.labels == {"b": "a", "c": "c"}


def test_the_variables_of_a_file_may_lean_on_those_of_each_vm() -> None:
    read = found(
        "vars: {where: '{{ room }}/{{ vm_name }}/{{ item }}', room: none}\n"
        "vms:\n"
        "  - {loop: [1, 2], name: 'ctx-{{ item }}', state: absent, labels: {x: '{{ where }}'}}\n",
        Files(
            {
                "-e room": "room: '{{ deep }}'",
                "host_vars/ctx-2": "deep: two",
                "group_vars/all": "deep: all",
            }
        ),
    )
    assert lines(read.diagnostics) == []
    assert [one.spec.labels["x"] for one in read.vms] == ["all/ctx-1/1", "two/ctx-2/2"]


def test_a_condition_is_what_the_layers_of_each_vm_say() -> None:
    read = found(
        "vms:\n"
        "  - {loop: [1, 2], name: 'ctx-{{ item }}', state: absent, when: not skip}\n"
        "  - {loop: [{n: a}, {}], name: '{{ item.n }}', state: absent, when: item.n is defined}\n",
        Files({"group_vars/all": "skip: false", "host_vars/ctx-2": "skip: true"}),
    )
    assert lines(read.diagnostics) == []
    assert [one.spec.name for one in read.vms] == ["ctx-1", "a"]


def test_a_vms_own_vars_are_seen_by_those_of_the_file() -> None:
    text = "vars: {x: 'x{{ y }}', y: file}\n" + ONE.replace("state", "vars: {y: own}, state")
    assert label(text) == "xown"


def test_values_keep_their_types_through_every_layer() -> None:
    text = (
        "vars: {on: '{{ off }}', n: '{{ many }}'}\n"
        "vms: [{name: ctx-1, disks: [{key: '{{ n[1] }}', size: '{{ n[0] | to_size }}'}], "
        "backup: {run: r1}, protect: '{{ on }}'}]\n"
    )
    read = found(text, Files({"host_vars/ctx-1": "off: true\nmany: [1MiB, 2001]"}))
    assert lines(read.diagnostics) == []
    spec = read.vms[0].spec
    assert spec.protect is True
    assert isinstance(spec.disks, list)
    assert (spec.disks[0].key, spec.disks[0].size) == (2001, 1 << 20)


def test_no_value_injects_yaml_or_another_expression() -> None:
    evil = "}, state: exported, y: {{ 1 + 1 }}"
    assert label(ONE, Files({"-e x": f"x: \"{{{{ '{evil[:22]}' }}}}\""})) == evil[:22]
    joined = "{{ '{' ~ '{ 1 + 1 }' ~ '}' }}"
    assert label(f'vars: {{x: "{joined}"}}\n{ONE}') == "{{ 1 + 1 }}"


# -- groups and the inventory

INVENTORY = """\
groups: {gold: ['ctx-1*'], db: [ctx-2], all: [ctx-1]}
vms:
  ctx-1: {vm: {path: /a}, disks: [{key: 2000, size: 1MiB}]}
  ctx-10: {vm: {path: /b}, disks: [{key: 2000, size: 1MiB}, {key: 2001, size: 1GiB}]}
  ctx-2: {vm: {name: pg, path: /c}, disks: []}
"""


def test_a_vm_has_the_groups_of_the_inventory_and_those_that_are_written() -> None:
    read = found(
        "defaults: {groups: [common], state: absent}\n"
        "vms:\n"
        "  - {name: ctx-10, labels: {x: '{{ group_names | join(\" \") }}'}}\n"
        "  - {name: ctx-2, groups: mine, labels: {x: '{{ group_names | join(\" \") }}'}}\n"
        "  - {name: none, groups: [], when: group_names | length > 0}\n",
        Files({}, INVENTORY),
    )
    assert lines(read.diagnostics) == []
    assert [one.spec.labels["x"] for one in read.vms] == ["gold common", "db mine"]


def test_a_loop_over_the_inventory_declares_a_site() -> None:
    read = found(
        "vms:\n"
        "  - loop: '{{ inventory | list }}'\n"
        "    loop_var: one\n"
        "    when: inventory[one].disks | length > 0\n"
        "    name: '{{ one }}'\n"
        "    state: absent\n"
        "    labels:\n"
        "      x: '{{ inventory[vm_name].disks | map(attribute=\"size\") | max | human_size }}'\n",
        Files({}, INVENTORY),
    )
    assert lines(read.diagnostics) == []
    assert [(one.spec.name, one.spec.labels["x"]) for one in read.vms] == [
        ("ctx-1", "1 MiB"),
        ("ctx-10", "1 GiB"),
    ]


def test_the_inventory_is_asked_only_where_an_expression_leads_to_it() -> None:
    files = Files({}, INVENTORY)
    found("vms: [{name: ctx-1, disks: inventory, backup: {run: r1}}]", files)
    assert files.asked == []
    found("vars: {all: '{{ inventory }}', x: '{{ all | length }}'}\n" + ONE, files)
    assert files.asked


def test_without_an_inventory_it_is_said_what_to_write() -> None:
    said = wrong("vms: [{loop: '{{ inventory | list }}', name: '{{ item }}'}]")
    says(said, "a.yaml:1:14", "no inventory that can be read", "inventory: {file: inventory.yaml}")
    says(wrong("vars: {a: '{{ inventory }}'}\nvms: []"), "a.yaml:1:11", "no inventory")


# -- look-ups


def test_look_ups_give_text_that_is_not_read_again() -> None:
    files = Files({"motd": "{{ x }}"}, SITE="a")
    for expression, value in (
        ("lookup('env', 'SITE')", "a"),
        ("lookup('env', 'NONE', default='d')", "d"),
        ("lookup('file', 'motd')", "{{ x }}"),
        ("lookup('file', 'none', default='') | length", "0"),
    ):
        text = f'vars: {{x: "{{{{ {expression} }}}}"}}\n{ONE}'
        assert label(text, files) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("lookup('env', 'NONE')", ["cannot look up env 'NONE': it is not set", "default=''"]),
        ("lookup('file', 'x')", ["cannot look up file 'x': it is not there"]),
        ("lookup('pipe', 'id')", ["cannot look up 'pipe'", "known: env, file"]),
    ],
)
def test_a_look_up_that_finds_nothing_is_an_error(expression: str, words: list[str]) -> None:
    said = wrong(f'vms: [{{name: ctx-1, state: absent, labels: {{x: "{{{{ {expression} }}}}"}}}}]')
    says(said, "a.yaml:1:48", *words)


# -- mistakes


def test_a_variable_that_cannot_be_evaluated_is_blamed_where_it_is_written() -> None:
    files = Files({"host_vars/ctx-1": "y: '{{ nothing }}'"})
    read = found("vars: {x: '{{ y }}'}\n" + ONE, files)
    says(
        "\n".join(map(str, read.diagnostics)),
        "host_vars/ctx-1:1:4: error",
        "'nothing' is not defined",
    )
    assert read.refused == {"ctx-1"}
    assert {one.vm for one in read.diagnostics} == {"ctx-1"}
    assert not read.lost


def test_a_broken_file_of_variables_hurts_only_those_who_need_it() -> None:
    files = Files({"group_vars/gold": "a: [", "host_vars/ctx-3": "3"})
    read = found(
        "vms:\n"
        "  - {name: ctx-1, state: absent, groups: [gold]}\n"
        "  - {name: ctx-2, state: absent}\n"
        "  - {name: ctx-3, state: absent}\n",
        files,
    )
    assert [one.spec.name for one in read.vms] == ["ctx-2"]
    assert read.refused == {"ctx-1", "ctx-3"}
    assert not read.lost
    said = "\n".join(f"{one.vm} {one}" for one in read.diagnostics)
    says(said, "ctx-1 group_vars/gold:", "ctx-3 host_vars/ctx-3:1:1: error: expected variables")


@pytest.mark.parametrize(
    "files",
    [{"group_vars/all": "a: ["}, {"-e x": "a: ["}, {"vars/x.yaml": "a: ["}, {"vars/x.yaml": "[]"}],
)
def test_a_broken_file_that_every_vm_needs_loses_the_file(files: dict[str, str]) -> None:
    text = "vars_files: [vars/x.yaml]\n" if "vars/x.yaml" in files else ""
    read = found(text + ONE, Files({"vars/x.yaml": "", **files}))
    assert (read.vms, read.lost) == ((), True)
    assert read.diagnostics


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vars_files: [vars/y.yaml]\nvms: []", ["1:14", "there is no file vars/y.yaml"]),
        ("vars_files: [3]\nvms: []", ["1:14", "expected the path of a file, found the number 3"]),
        ("vars_files: ['{{ x }}']\nvms: []", ["1:14", "'x' is not defined"]),
        ("include: [includes/y.yaml]", ["1:11", "there is no file includes/y.yaml"]),
        ("include: [{fil: x}]", ["unknown key 'fil'; did you mean 'file'?"]),
        ("include: [3]", ["include: expected the path of a file"]),
        ("include: a.yaml", ["1:10", "round in a circle: a.yaml → a.yaml"]),
        ("include: [{file: b.yaml, vars: 3}]", ["expected variables, as keys and values"]),
        ("vars: {vm_name: x}\nvms: []", ["1:8", "'vm_name' cannot be a variable"]),
        ("vms: [{name: a, vars: {a-b: 1}, state: absent}]", ["'a-b' cannot be used"]),
        ("vms: [{name: a, vars: 3, state: absent}]", ["expected variables"]),
        ("vms: [{name: a, loop_var: x, state: absent}]", ["1:27", "`loop_var` names the item"]),
        ("vms: [{name: a, loop: [1], loop_var: lookup, state: absent}]", ["loop_var: 'lookup'"]),
        ("vms: [{name: a, groups: [3], state: absent}]", ["groups: expected a list of names"]),
        ("vms: [{name: a, groups: [a b], state: absent}]", ["groups: 'a b' holds ' '"]),
        ("vms: [{name: a, loop: {a: 1}, state: absent}]", ["found keys and values; `| list`"]),
        ("vars: {a: '{{ b }}', b: '{{ a }}'}\nvms: []", ["1:11", "in a circle: a → b → a"]),
    ],
)
def test_what_cannot_be_right_is_refused_at_its_place(text: str, words: list[str]) -> None:
    says(wrong(text, Files({"a.yaml": text, "b.yaml": "vms: []"})), *words)


def test_a_misspelt_loop_is_told_beside_the_item_that_is_not_there() -> None:
    said = wrong("vms:\n  - {lop: [1], name: 'ctx-{{ item }}', state: absent}\n")
    says(said, "a.yaml:2:6: unknown key 'lop'; did you mean 'loop'?", "'item' is not defined")
    said = wrong("runs:\n  - {lop: [1], vm: 'ctx-{{ item }}', run: r}\n")
    says(said, "a.yaml:2:6: unknown key 'lop'; did you mean 'loop'?", "'item' is not defined")


def test_variables_that_nobody_uses_are_checked_as_far_as_they_can_be() -> None:
    fine = "vars: {a: '{{ item }}', b: '{{ vm_name }}', c: '{{ theirs }}', d: '{{ own }}'}\n"
    vms = "vms:\n  - {name: ctx-1, state: absent, vars: {own: 1}}\n"
    assert wrong(fine + vms, Files({"host_vars/ctx-1": "theirs: 1"})) == ""
    says(wrong(fine + vms), "1:48", "'theirs' is not defined")


# -- what vars shows


def explained(text: str, files: Files) -> dict[str, Variable]:
    read = found(text, files, explain="ctx-1")
    assert read.explained is not None
    return {one.name: one for one in read.explained}


def test_each_variable_is_shown_with_where_it_comes_from_and_what_it_hides() -> None:
    text, files = written(LAYERS)
    told = explained(text, files)
    one = told["x"]
    assert (one.value, one.origin) == ("-e x", "-e")
    assert [origin for origin, _ in one.under] == [
        "vars of the VM",
        "vars_files vars/x.yaml",
        "vars",
        "host_vars/ctx-1",
        "group_vars/late",
        "group_vars/gold",
        "group_vars/all",
    ]
    assert str(one.under[2][1]) == "a.yaml:2:8"
    assert told["vm_name"].value == "ctx-1"
    assert told["group_names"].value == ["gold", "late"]


def test_a_vm_with_an_error_is_explained_too() -> None:
    told = explained("vars: {y: 3}\n" + ONE, Files({"host_vars/ctx-1": "z: '{{ nobody }}'"}))
    assert told["y"].value == 3
    says(told["z"].error, "'nobody' is not defined")
