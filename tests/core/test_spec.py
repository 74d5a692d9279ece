"""What a person may write about VMs, and what they are told when it cannot be right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Struct

from reconciler.core import declared, inventory, inventory_file, spec, spec_files
from reconciler.core.declared import MAX_NAME, CheckedVm
from reconciler.core.desired import build
from reconciler.core.errors import nearest
from reconciler.core.filters import merged
from tests.core.builders import GIB, a_settings, document, lines, read, remembered, says

SMALLEST = """\
vms:
  - name: ctx-123
    state: exported
    disks: inventory
    backup: {run: nightly-2026-11-23}
"""


def vm(body: str, top: str = "") -> str:
    """One VM named ctx-1 with a run; `body` is indented below it."""
    head = "  - name: ctx-1\n    backup: {run: r1}\n"
    return f"{top}vms:\n{head}" + "".join(f"    {line}\n" for line in body.splitlines())


PAIRS = (
    (spec.VmSpec, declared.CheckedVm),
    (spec.DiskSpec, declared.CheckedDisk),
    (spec.BackupSpec, declared.CheckedBackup),
    (spec.AddressSpec, declared.CheckedAddress),
    (spec.RestoreSpec, declared.CheckedRestore),
    (spec.KeepSpec, declared.CheckedKeep),
    (spec.RunSpec, declared.CheckedRun),
    (inventory_file.KnownVmSpec, inventory.KnownVm),
    (inventory_file.KnownDiskSpec, inventory.KnownDisk),
)


@pytest.mark.parametrize(("model", "plain"), PAIRS)
def test_nothing_that_may_be_written_is_lost_on_the_way(
    model: type[spec.Strict], plain: type[Struct]
) -> None:
    assert tuple(model.model_fields) == plain.__struct_fields__


def one(text: str) -> CheckedVm:
    """The one VM of a file without errors."""
    found = read(text)
    assert lines(found.diagnostics) == []
    (declared,) = found.vms
    return declared.spec


def wrong(*texts: str) -> str:
    """Everything that is wrong with files of which nothing can be used."""
    found = read(*texts)
    assert found.vms == ()
    return "\n".join(lines(found.diagnostics))


# -- what may be written


def test_the_smallest_spec_is_enough() -> None:
    spec = one(SMALLEST)
    assert (spec.name, spec.state, spec.purpose) == ("ctx-123", "exported", "backup")
    assert spec.backup
    assert (spec.backup.run, spec.backup.type) == ("nightly-2026-11-23", "full")
    assert (spec.disks, spec.release, spec.protect) == ("inventory", "on_completion", False)


def test_the_full_spec_is_read() -> None:
    spec = one(
        """\
vars: {site: a}
defaults: {repository: local, sna: "site-{{ site }}"}
vms:
  - name: ctx-123
    state: exported
    for: backup
    vm: {name: pgtest1, path: /DC1/vm/pgtest1, vcenter: vc1}
    backup: {run: nightly-2026-11-23, type: incremental}
    release: keep
    protect: true
    labels: {tier: gold, rank: 3}
    disks:
      - key: 2000
        size: 40GiB
        image: ctx-123/2000/nightly.qcow2
        export: ctx-123-nightly-2026-11-23-disk0
        backing: ctx-123/2000/base.qcow2
"""
    )
    assert (spec.repository, spec.sna, spec.release, spec.protect) == (
        "local",
        "site-a",
        "keep",
        True,
    )
    assert spec.labels == {"tier": "gold", "rank": "3"}
    assert spec.vm.path == "/DC1/vm/pgtest1"
    assert isinstance(spec.disks, list)
    (disk,) = spec.disks
    assert (disk.key, disk.size) == (2000, 40 * GIB)
    assert disk.backing == "ctx-123/2000/base.qcow2"


def test_a_whole_number_is_a_name_where_a_name_is_meant() -> None:
    spec = one("vms: [{name: 17, disks: inventory, backup: {run: 20261123}}]")
    assert spec.name == "17"
    assert spec.backup
    assert spec.backup.run == "20261123"


def test_a_restore_names_a_run_or_images() -> None:
    assert one("vms: [{name: look, for: restore, of: {vm: ctx-1, run: r1}}]").of
    images = "vms: [{name: look, for: restore, disks: [{key: 2000, image: ctx-1/x.qcow2}]}]"
    assert one(images).purpose == "restore"


def test_an_absent_vm_needs_nothing_but_its_name() -> None:
    assert one("vms: [{name: ctx-1, state: absent}]").state == "absent"


def test_a_file_may_name_no_vms() -> None:
    assert read("vms: []").diagnostics == ()


# -- loop, when, vars and defaults


def test_a_loop_makes_one_vm_per_item() -> None:
    found = read(
        "vms:\n  - loop: '{{ range(3) | list }}'\n    name: 'ctx-{{ item }}'\n    state: absent\n"
    )
    assert [declared.spec.name for declared in found.vms] == ["ctx-0", "ctx-1", "ctx-2"]
    assert {str(declared.place("name")) for declared in found.vms} == {"a.yaml:3:11"}


def test_a_loop_over_written_items_may_use_their_parts() -> None:
    text = (
        "vms:\n  - loop: [{n: a, s: absent}]\n    name: '{{ item.n }}'\n    state: '{{ item.s }}'\n"
    )
    assert one(text).name == "a"


@pytest.mark.parametrize(
    ("condition", "there"),
    [
        ("site == 'a'", True),
        ("site == 'b'", False),
        ("'{{ site == \"a\" }}'", True),
        ("true", True),
        ("false", False),
        ("item > 0", False),
    ],
)
def test_when_decides_whether_a_vm_is_declared(condition: str, there: bool) -> None:
    found = read(
        f"vars: {{site: a}}\nvms:\n  - {{loop: [0], name: x, state: absent, when: {condition}}}\n"
    )
    assert lines(found.diagnostics) == []
    assert bool(found.vms) is there


def test_a_vm_that_is_not_meant_is_not_evaluated() -> None:
    found = read("vms: [{name: '{{ nobody }}', state: absent, when: false}]")
    assert found.diagnostics == ()


def test_vars_may_use_each_other_in_any_order() -> None:
    text = "vars: {b: '{{ a }}-b', a: '{{ c }}', c: x}\nvms: [{name: '{{ b }}', state: absent}]"
    assert one(text).name == "x-b"


def test_vars_may_lean_on_each_other_as_deep_as_they_like() -> None:
    many = "".join(f"  v{index}: '{{{{ v{index + 1} }}}}'\n" for index in range(1_500))
    assert one(f"vars:\n{many}  v1500: ctx-1\nvms: [{{name: '{{{{ v0 }}}}', state: absent}}]").name


def test_a_large_circle_is_told_by_its_ends() -> None:
    many = "".join(f"  v{index}: '{{{{ v{(index + 1) % 90} }}}}'\n" for index in range(90))
    said = wrong(f"vars:\n{many}vms: []")
    says(said, "circle: v0 → v1 → v2 → v3 → v4 → … → v88 → v89 → v0")
    assert "\n" not in said


def test_defaults_go_below_what_a_vm_says() -> None:
    spec = one(
        vm(
            "disks: inventory\nlabels: {b: vm}\nsna: site-b",
            "defaults: {sna: site-a, repository: local, labels: {a: d, b: d}}\n",
        )
    )
    assert (spec.sna, spec.repository) == ("site-b", "local")
    assert spec.labels == {"a": "d", "b": "vm"}


def test_a_default_backup_is_not_for_a_restore() -> None:
    spec = one(
        "defaults: {backup: {run: r1}, disks: inventory}\n"
        "vms: [{name: look, for: restore, of: {vm: ctx-1, run: r1}}]\n"
    )
    assert (spec.backup, spec.disks) == (None, None)


def test_merging_goes_into_mappings_and_replaces_the_rest() -> None:
    assert merged({"a": {"x": 1, "y": 1}, "b": [1]}, {"a": {"y": 2}, "b": [2], "c": 3}) == {
        "a": {"x": 1, "y": 2},
        "b": [2],
        "c": 3,
    }


# -- runs that are asked for beside the VMs


def asked(text: str) -> list[tuple[str, str, str, str]]:
    found = read(text)
    assert lines(found.diagnostics) == []
    return [(one.spec.vm, one.spec.run, one.spec.type, str(one.place("run"))) for one in found.runs]


def test_a_file_may_ask_for_runs_and_declare_nothing() -> None:
    assert asked("runs:\n  - {vm: ctx-1, run: 20261123}\n") == [
        ("ctx-1", "20261123", "full", "a.yaml:2:22")
    ]
    assert read("runs: []").diagnostics == ()


def test_runs_have_variables_loops_and_conditions_as_vms_have() -> None:
    text = (
        "vars: {night: n1}\n"
        "runs:\n"
        "  - loop: [1, 2, 3]\n"
        "    when: item != 2\n"
        "    vm: 'ctx-{{ item }}'\n"
        "    run: '{{ night }}'\n"
        "    type: incremental\n"
    )
    place = "a.yaml:6:10"
    assert asked(text) == [
        ("ctx-1", "n1", "incremental", place),
        ("ctx-3", "n1", "incremental", place),
    ]


def test_defaults_are_for_vms_and_not_for_runs() -> None:
    assert asked("defaults: {backup: {run: x}}\nruns: [{vm: a, run: b}]") == [
        ("a", "b", "full", "a.yaml:2:21")
    ]


def test_a_fault_in_one_run_leaves_the_others_standing() -> None:
    found = read("runs: [{vm: a, run: r}, {vm: b}, {vm: c, run: r}]")
    assert [one.spec.vm for one in found.runs] == ["a", "c"]
    (fault,) = found.diagnostics
    assert (fault.vm, lines([fault])[0].split(":")[:2]) == ("b", ["1", "25 error"])


def test_a_file_of_requests_asks_and_declares_nothing() -> None:
    texts = {
        "a": "vms: [{name: ctx-1, state: absent}]\nruns: [{vm: ctx-1, run: r1}]",
        "b": "defaults: {sna: x}\nruns: [{vm: ctx-1, run: r2}]",
        "c": "",
        "d": "vars: {a: b}",
    }
    found = spec_files.read([], [document(text, f"{name}.yaml") for name, text in texts.items()])
    assert found.vms == ()
    assert [one.spec.run for one in found.runs] == ["r1", "r2"]
    said = [f"{one.place}: {one.summary}" for one in found.diagnostics]
    says(said[0], "a.yaml:1:1: unknown key 'vms'", "known here: vars, runs")
    says(said[1], "b.yaml:1:1: unknown key 'defaults'")
    says(said[2], "c.yaml:1:1: the file is empty: write `runs:`")
    says(said[3], "d.yaml:1:1: the key 'runs' is missing")


def test_requests_are_read_last_and_only_they_may_be_aside() -> None:
    here, there = (
        document("runs: [{vm: a, run: r1}]", "a"),
        document("runs: [{vm: a, run: r2}]", "b"),
    )
    for scoped in (False, True):
        found = spec_files.read([here], [there], scoped=scoped)
        assert [(one.spec.run, one.aside) for one in found.runs] == [("r1", False), ("r2", scoped)]


@pytest.mark.parametrize(
    ("text", "refused", "unread"),
    [
        ("vms: [{name: a, state: absent}]", set(), False),
        ("vms: [{name: a, state: gone}]", {"a"}, False),
        ("vms: [{name: a}]", {"a"}, False),
        ("vms: [{name: a, state: absent}, {name: a, state: absent}]", {"a"}, False),
        ("vms: [{name: a, state: absent, sna: '{{ x }}'}]", {"a"}, False),
        ("vms: [{name: 'a{{ x }}', state: absent}]", set(), True),
        ("vms: [{name: 'a{{ item }}', loop: [1], state: gone}]", {"a1"}, False),
        ("vms: [{name: a, loop: 3}]", set(), True),
        ("vms: [{name: a, when: 3}]", set(), True),
        ("vms: [{state: absent}]", set(), True),
        ("vms: [a]", set(), True),
        ("vms: 3", set(), True),
        ("vm: [{name: a}]", set(), True),
        ("", set(), True),
        ("runs: [{vm: a, run: r}]", set(), False),
        ("runs: [{vm: a}]", set(), True),
        ("runs: [3]", set(), True),
        ("runs: 3", set(), True),
        ("defaults: {x: 1}\nvms: [{name: a, state: absent}]", set(), False),
    ],
)
def test_what_cannot_be_used_is_remembered_by_name_or_else_by_file(
    text: str, refused: set[str], unread: bool
) -> None:
    found = read(text)
    assert found.refused == refused
    assert found.unread == ({"a.yaml"} if unread else set())
    assert found.failed == bool(found.diagnostics)


# -- what is refused, and where


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["1:1 error: the file is empty", "vms:"]),
        ("[]", ["1:1 error", "vars, vars_files, include, defaults, vms", "found a list"]),
        ("hello", ["found the text 'hello'"]),
        ("vars: {}", ["1:1 error: the key 'vms' is missing"]),
        ("runs:", ["1:6 error: `runs:` is empty", "[] for none"]),
        ("runs: {}", ["1:7 error: expected a list of runs, found keys and values"]),
        ("runs: [r1]", ["1:8 error: expected a run with `vm` and `run`, found the text 'r1'"]),
        ("runs: [{}]", ["1:8 error: the key 'vm' is missing", "the key 'run' is missing"]),
        ("runs: [{vm: a, run: r, typ: x}]", ["1:24 error: unknown key 'typ'", "mean 'type'"]),
        (
            "runs: [{vm: a, run: r, type: ful}]",
            ["1:30 error: type: expected one of full", "'full'"],
        ),
        ("runs: [{vm: a, run: r 1}]", ["1:21 error: run: 'r 1' holds ' '"]),
        ("runs: [{vm: a, run: '{{ b }}'}]", ["1:21 error", "'b' is not defined"]),
        ("runs: [{vm: a, run: r, by: 3}]", ["1:28 error: by: expected text, found the number 3"]),
        ('runs: [{vm: a, run: r, by: "x\\ny"}]', ["1:28 error: by: write one line", "200"]),
        (f"runs: [{{vm: a, run: r, by: {'x' * 201}}}]", ["1:28 error: by: write one line"]),
        ("runs: [{vm: a, run: r, loop: 3}]", ["1:30 error: expected a list to loop over"]),
        ("runs: [{vm: a, run: r, when: 3}]", ["1:30 error: `when`"]),
        ("vm: []", ["1:1 error: unknown key 'vm'", "did you mean 'vms'"]),
        ("vms:", ["1:5 error: `vms:` is empty", "[] for none"]),
        ("vms: {}", ["1:6 error: expected a list of VMs, found keys and values"]),
        ("vms: [ctx-1]", ["1:7 error: expected a VM with at least a name", "'ctx-1'"]),
        ("vms: [{}]", ["1:7 error: the key 'name' is missing"]),
        ("vars: 3\nvms: []", ["1:7 error: expected keys and values, found the number 3"]),
        ("vars: {a-b: 1}\nvms: []", ["1:8 error: 'a-b' cannot be used in {{ }}"]),
        ("defaults: {snaa: x}\nvms: []", ["1:12 error: unknown key 'snaa' in defaults", "'sna'"]),
        ("defaults: {name: x}\nvms: []", ["1:12 error: unknown key 'name' in defaults"]),
        ("vars: {a: '{{ b }}', b: '{{ a }}'}\nvms: []", ["circle: a → b → a"]),
        ("vars: {a: '{{ a }}'}\nvms: []", ["1:11 error", "circle: a → a"]),
        ("vars: {a: '{{ zzz }}'}\nvms: []", ["1:11 error", "'zzz' is not defined"]),
        ("vms: [{name: x, loop: 3}]", ["1:23 error: expected a list to loop over", "number 3"]),
        ("vms: [{name: x, loop: '{{ a }}'}]", ["1:23 error", "'a' is not defined"]),
        ("vms: [{name: x, when: 3}]", ["1:23 error: `when`", "true or false", "the number 3"]),
        ("vms: [{name: x, when: 'a = 1'}]", ["1:23 error: cannot read a = 1"]),
        ("vms: [{name: x, state: there}]", ["1:24 error: state: expected one of exported, absent"]),
        ("vms: [{name: x, state: absnt}]", ["did you mean 'absent'"]),
        ("vms: [{name: [x]}]", ["1:14 error: name: expected text, found a list"]),
        ("vms: [{name: 1.0}]", ["1:14 error: name", "the number 1.0", 'quote it: "1.0"']),
        ("vms: [{name: true}]", ["name: expected text, found true"]),
        ("vms: [{name: ''}]", ["1:14 error: name: a name cannot be empty"]),
        ("vms: [{name: a/b}]", ["1:14 error: name: 'a/b' holds '/'"]),
        ("vms: [{name: -a}]", ["'-a' holds '-'", "a letter or digit first"]),
        (f"vms: [{{name: {'a' * 101}}}]", ["has 101 characters", str(MAX_NAME)]),
        ("vms: [{name: ctx-1}]", ["1:7 error: VM ctx-1: the key 'disks' is missing"]),
        (vm("dsks: inventory"), ["4:5 error: unknown key 'dsks'", "did you mean 'disks'", "for"]),
        (vm("disks: inventry"), ["4:12 error: disks: expected `inventory`", "mean 'inventory'"]),
        (vm("disks: []"), ["4:12 error: VM ctx-1: `disks` is an empty list"]),
        (vm("disks: inventory\nprotect: yes"), ["5:14 error: protect: expected true or false"]),
        (vm("disks: inventory\nlabels: [a]"), ["5:13 error: labels: expected keys and values"]),
        (vm("disks: inventory\nof: {vm: a, run: b}"), ["5:9 error", "for: restore"]),
        (vm("disks: inventory\nvm: {pth: x}"), ["5:10 error: unknown key 'pth'", "mean 'path'"]),
        ("vms: [{name: x, backup: r1, disks: inventory}]", ["1:25 error: backup: expected keys"]),
        ("vms: [{name: x, backup: {}, disks: inventory}]", ["1:25 error: the key 'run' is miss"]),
        (
            "vms: [{name: x, backup: {run: r 1}, disks: inventory}]",
            ["1:31 error: run: 'r 1' holds ' '"],
        ),
    ],
)
def test_what_cannot_be_right_is_refused_at_its_place(text: str, words: list[str]) -> None:
    says(wrong(text), *words)


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ("{}", ["4:13 error: the key 'key' is missing"]),
        ("2000", ["4:13 error", "expected keys and values, found the number 2000"]),
        ("{key: '2000'}", ["4:19 error: key: expected a whole number", "without quotes"]),
        ("{key: -1}", ["4:19 error: key: "]),
        ("{key: 2.5}", ["4:19 error: key: expected a whole number"]),
        ("{key: 1, size: 40GB}", ["4:28 error: size: ", "powers of 1000 or of 1024"]),
        ("{key: 1, size: 0}", ["4:28 error: size: a disk of 0 bytes"]),
        ("{key: 1, size: 1000}", ["4:28 error", "multiple of 512", "1024 bytes"]),
        ("{key: 1, size: 1025P}", ["1025 PiB is more than"]),
        (f"{{key: 1, size: 1{'0' * 900}}}", ["size", "PiB is more than any disk can hold"]),
        (f"{{key: 1, size: {'9' * 900}}}", ["size", "PiB is more than any disk can hold"]),
        (f"{{key: 1, image: {'i' * 4096}}}", ["at most 4,095 characters, this one 4,096"]),
        ("{key: 1, size: [1]}", ["4:28 error: size: write a size like 40GiB"]),
        ("{key: 1, sise: 1G}", ["4:22 error: unknown key 'sise'", "did you mean 'size'"]),
        ("{key: 1, image: /etc/passwd}", ["4:29 error: image: ", "leads out of the repository"]),
        ("{key: 1, image: a/../../b}", ["leads out of the repository"]),
        ("{key: 1, image: ''}", ["is not a file name"]),
        ("{key: 1, image: .}", ["is not a file name"]),
        ('{key: 1, image: "a\\0b"}', ["is not a file name"]),
        ("{key: 1, image: ctx-1/.claim-r1}", ["begins with a dot", "of our own"]),
        ("{key: 1, backing: /b}", ["4:31 error: backing: ", "leads out of the repository"]),
        ("{key: 1, export: a-r1}", ["4:30 error: export: ", "does not end in disk<N>"]),
        ("{key: 1, export: 'a,b-r1-disk0'}", ["it holds ','", "splits targets at"]),
        ("{key: 1, export: 'a:r1-disk0'}", ["it holds ':'"]),
        ("{key: 1, export: a/r1-disk0}", ["it holds '/'"]),
        ("{key: 1, export: a r1-disk0}", ["it holds ' '"]),
        (f"{{key: 1, export: {'r1' * 130}disk0}}", ["at most 255 characters"]),
        ("{key: 1, export: r1-disk1}", ["4:30 error", "ends in disk1", "at position 0"]),
        ("{key: 1, size: 1G}, {key: 1, size: 1G}", ["4:39 error", "two disks have the key 1"]),
        (
            "{key: 1, image: a}, {key: 2, image: a}",
            ["4:49 error", "two disks have the image 'a' (the other on line 4)"],
        ),
    ],
)
def test_a_disk_that_cannot_be_right_is_refused_at_its_place(disk: str, words: list[str]) -> None:
    says(wrong(vm(f"disks: [{disk}]")), *words)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("for: restore", ["either `of: {vm, run}` or `disks`"]),
        ("for: restore, of: {vm: a, run: b}, disks: [{key: 1, image: x}]", ["not both"]),
        ("for: restore, disks: inventory", ["1:41 error", "the inventory knows no images"]),
        ("for: restore, disks: [{key: 1}]", ["1:42 error", "needs its `image`"]),
        ("for: restore, of: {vm: a, run: b}, backup: {run: r}", ["a restore makes no backup"]),
        ("for: restre", ["for: expected one of backup, restore", "did you mean 'restore'"]),
        ("for: restore, of: {vm: a}", ["the key 'run' is missing"]),
    ],
)
def test_a_restore_that_cannot_be_right_is_refused(item: str, words: list[str]) -> None:
    says(wrong(f"vms: [{{name: look, {item}}}]"), *words)


def test_a_fault_in_a_default_is_shown_where_the_default_is() -> None:
    text = "defaults: {release: never}\nvms:\n  - {name: x, disks: inventory, backup: {run: r}}\n"
    says(wrong(text), "1:21 error: release: expected one of on_completion, keep")
    text = "defaults: {sna: '{{ zzz }}'}\nvms:\n  - {name: x, state: absent}\n"
    says(wrong(text), "1:17 error: cannot evaluate {{ zzz }}")


def test_a_fault_in_one_vm_leaves_the_others_standing() -> None:
    found = read("vms:\n  - {name: a, state: absent}\n  - {name: b, state: gone}\n")
    assert [declared.spec.name for declared in found.vms] == ["a"]
    says(lines(found.diagnostics)[0], "3:22 error: state")


def test_all_that_is_wrong_with_a_vm_is_said_at_once() -> None:
    found = wrong(vm("disks: [{key: x, size: 3}]\nprotect: 1\nstat: absent"))
    says(found, "4:19 error: key", "4:28 error: size", "5:14 error: protect", "6:5 error: unknown")


def test_a_vm_that_is_declared_twice_is_not_used_at_all() -> None:
    found = read(
        "vms: [{name: a, state: absent}, {name: b, state: absent}]",
        "vms: [{name: a, state: absent}]",
    )
    assert [declared.spec.name for declared in found.vms] == ["b"]
    (said,) = lines(found.diagnostics)
    says(said, "1:14 error: the VM 'a' is declared twice", "first at a.yaml:1:14", "neither")
    assert found.diagnostics[0].place
    assert found.diagnostics[0].place.file == "b.yaml"


def test_a_loop_of_one_name_is_that_name_twice() -> None:
    says(wrong("vms: [{name: a, loop: [1, 2], state: absent}]"), "declared twice")


def test_a_loop_beyond_all_sense_is_refused() -> None:
    text = "vms: [{name: 'a{{ item }}', loop: '{{ range(10001) | list }}', state: absent}]"
    says(wrong(text), "1:35 error: this loop has 10,001 items; at most 10,000")


LOOPS = """\
vms:
  - {loop: "{{ range(50) | list }}", name: "a{{ item }}", state: absent}
  - {name: b, state: absent}
"""


def test_loops_that_declare_more_than_anybody_means_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines, with an alias on a loop, could ask for a billion VMs."""
    assert len(read(LOOPS).vms) == 51
    monkeypatch.setattr("reconciler.core.spec_files.MAX_DECLARED", 240)
    found = read(LOOPS)
    assert [one.spec.name for one in found.vms] == [f"a{index}" for index in range(21)]
    says(
        "\n".join(lines(found.diagnostics)),
        "2:5 error: this file declares more than 240 values, loops followed",
        "the VMs from here on are not read: split this file",
    )


def test_expressions_that_cost_more_together_than_anybody_means_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reconciler.core.spec_files.MAX_LOOKS", 600)
    found = read(LOOPS)
    assert 0 < len(found.vms) < 50
    says(
        "\n".join(lines(found.diagnostics)),
        "2:44 error: cannot evaluate this: the expressions of this file look at more than 600",
        "2:5 error: the VMs from here on are not read: split this file",
    )
    assert read(SMALLEST, LOOPS.replace("50", "5")).diagnostics == ()


def test_what_is_long_is_not_repeated_in_full() -> None:
    long = "x" * 5_000
    for key in ("state", "repository", "protect", "labels", "vm", "release"):
        assert len(wrong(vm(f"disks: inventory\n{key}: {long}"))) < 1_000
    for key in ("size", "image", "export"):
        assert len(wrong(vm(f"disks: [{{key: 1, {key}: /{long}}}]"))) < 1_000


def test_a_near_miss_is_looked_for_among_words_and_not_among_texts() -> None:
    """Comparing two long texts takes minutes."""
    assert nearest("stat", ["state"]) == "; did you mean 'state'?"
    assert nearest("x" * 201, ["x" * 200]) == ""


def test_the_place_of_a_fault_beside_a_merge_is_its_own() -> None:
    text = (
        "vms:\n"
        "  - &base {name: ctx-1, state: absent}\n"
        "  - <<: *base\n"
        "    name: ctx-2\n"
        "    state: exported\n"
    )
    found = lines(read(text).diagnostics)
    says(found[0], "3:5 error: VM ctx-2: the key 'disks' is missing")
    found = lines(read(text + "    stat: x\n").diagnostics)
    says(found[0], "6:5 error: unknown key 'stat'")


@pytest.mark.parametrize(
    "value",
    [
        '\'{{ {"run": "r1", "type": nobody} }}\'',
        "'{{ {\"run\": nobody} }}'",
        "'{{ {\"run\": range} }}'",
        "'{{ [nobody] }}'",
    ],
)
def test_a_value_that_an_expression_spoils_is_refused_like_any_other(value: str) -> None:
    text = f"vms: [{{name: x, disks: inventory, backup: {value}}}]"
    says(wrong(text), "1:43 error")


@pytest.mark.parametrize("inner", ["(" * 300 + "1" + ")" * 300, "9" * 4500])
def test_a_var_beyond_all_sense_is_refused(inner: str) -> None:
    says(wrong(f"vars: {{a: '{{{{ {inner} }}}}'}}\nvms: []"), "1:11 error: cannot")


PIECES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, width=16)
    | st.sampled_from(
        [
            "ctx-1", "{{ item }}", "{{ x }}", "{{ [x] }}", "{{ range }}", "inventory", "absent",
            "exported", "restore", "1G", "1\u212a", "r1", "a/../b", "r1-disk0", "", "\0", "²",
        ]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            [
                "name", "state", "for", "disks", "backup", "run", "type", "key", "size", "image",
                "export", "backing", "vm", "path", "of", "loop", "when", "labels", "protect", "x",
            ]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip


@given(top=st.fixed_dictionaries({"vms": st.lists(PIECES, max_size=3)}, optional={
    "vars": PIECES, "defaults": PIECES, "runs": PIECES}))  # fmt: skip
@example({"vms": [{"name": "x", "backup": {"run": "{{ [x] }}", "type": "{{ {'a': x} }}"}}]})
@example({"vms": [{"name": "x", "disks": [{"key": 1, "size": "1\u212a"}]}]})
@example({"vms": [], "vars": {"a": "{{ " + "(" * 300 + " }}"}})
def test_nothing_that_can_be_written_makes_reading_fail(top: Any) -> None:
    found = read(json.dumps(top))
    for diagnostic in found.diagnostics:
        assert diagnostic.place
        assert diagnostic.summary
    desired = build(found, None, a_settings(), remembered())
    assert set(found.diagnostics) <= set(desired.diagnostics)
    assert not desired.vms.keys() & found.refused
