"""What an argv, names and headers tell of a server that is not ours, and what they do not."""

from __future__ import annotations

from typing import Any

import pytest

from reconciler.core.actual import Identity, Image
from reconciler.core.declared import join
from reconciler.core.document import parse
from reconciler.core.foreign import (
    Options,
    Place,
    Seen,
    advice,
    document,
    options,
    place,
    reasons,
    shown,
    spec_text,
)
from reconciler.core.inventory import Inventory
from reconciler.core.inventory_file import read
from reconciler.core.mark import Mark
from reconciler.core.settings import Settings
from reconciler.core.spec_files import read_file
from reconciler.core.units import Endpoint, PortRange

MIB = 1 << 20
SETTINGS = Settings(
    hub="a", state="/s", repositories={"local": "/r"}, ports=PortRange(10100, 10109)
)
LINE = "qemu-nbd -r -t -e 4 -f qcow2 -x ctx-1-disk0 -p 10100 -b 127.0.0.1"


def seen(path: str = "/r/ctx-1/2000/x.qcow2", line: str = LINE, **changes: Any) -> Seen:
    values: dict[str, Any] = {
        "identity": Identity(7, 1),
        "argv": (*line.split(), path),
        "listeners": (Endpoint("127.0.0.1", 10100),),
        "path": path,
        "image": Image(path=path, exists=True, format="qcow2", size=MIB),
        "size": MIB,
        "source": "the image's header",
    }
    return Seen(**{**values, **changes})


def mark(**changes: Any) -> Mark:
    values: dict[str, Any] = {
        "hub": "a", "vm": "ctx-1", "disk": 2000, "run": "r1", "attempt": 1, "port": 10100
    }  # fmt: skip
    return Mark(**{**values, **changes})


@pytest.mark.parametrize(
    ("line", "shared", "flags", "export", "image"),
    [
        ("qemu-nbd /i", 1, "", "", "/i"),
        ("qemu-nbd --shared 10 --persistent --export-name x /i", 10, "t", "x", "/i"),
        ("qemu-nbd --shared=0 --pers --read-only -xname /i", 0, "tr", "name", "/i"),
        ("qemu-nbd -rte5 /i", 5, "tr", "", "/i"),
        ("qemu-nbd -tre 5 -x disk0 /i", 5, "tr", "disk0", "/i"),
        ("qemu-nbd /i -t -r", 1, "tr", "", "/i"),
        ("qemu-nbd -t -- -odd", 1, "t", "", "-odd"),
        ("qemu-nbd -D -t /i", 1, "", "", "/i"),  # the value of -D
        ("qemu-nbd --cache none --aio native -t /i", 1, "t", "", "/i"),
        ("qemu-nbd -e many /i", 1, "", "", "/i"),
        ("qemu-nbd -x", 1, "", "", ""),
        ("qemu-nbd --s 9 /i", 1, "", "", "/i"),  # ambiguous: qemu-nbd itself refuses it
    ],
)
def test_options_are_read_as_getopt_does(
    line: str, shared: int, flags: str, export: str, image: str
) -> None:
    found = options(line.split())
    assert (found.shared, found.export) == (shared, export)
    assert (found.persistent, found.read_only) == ("t" in flags, "r" in flags)
    if "--s " not in line:
        assert found.image == image


@pytest.mark.parametrize(
    ("path", "export", "expected"),
    [
        ("/r/ctx-1/2000/x.qcow2", "ctx-1-disk0", Place("ctx-1", 2000, 0, "its path")),
        ("/r/ctx-1/disk-2001/x.qcow2", "ctx-1-disk1", Place("ctx-1", 2001, 1, "its path")),
        ("/r/ctx-1/disk-0/x.qcow2", "ctx-1-disk0", Place("ctx-1", None, 0, "its path")),
        ("/r/ctx-1/disk0/x.qcow2", "", Place("ctx-1", None, None, "its path")),
        ("/r/x.qcow2", "ctx-9-r7-disk3", Place("ctx-9-r7", None, 3, "its export name")),
        ("/r/my disk.qcow2", "any", Place("my-disk", None, None, "its image's name")),
        ("/r/ä.qcow2", "", Place("unnamed", None, None, "its image's name")),
        ("", "", Place("unnamed", None, None, "its image's name")),
        ("/2000/x.qcow2", "disk0", Place("x", None, 0, "its image's name")),
    ],
)
def test_names_tell_the_vm_and_the_key_or_nothing(path: str, export: str, expected: Place) -> None:
    line = f"qemu-nbd -x {export}" if export else "qemu-nbd"
    assert place(seen(path, line)) == expected


def test_a_mark_says_it_all() -> None:
    assert place(seen("/r/other/9999/x", mark=mark())) == Place("ctx-1", 2000, 0, "its mark")


def test_what_carries_our_mark_is_ours_and_nothing_else_is() -> None:
    assert reasons(seen(mark=mark()), SETTINGS) == []
    (other,) = reasons(seen(mark=mark(hub="b")), SETTINGS)
    assert "hub b" in other
    assert "write `hub: b`" in advice(seen(mark=mark(hub="b")), SETTINGS)
    best = reasons(seen(), SETTINGS)  # meets every promise, and still is not ours
    assert best == ["it carries no mark, and a running server cannot be given one"]


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (seen(line=LINE.replace("-r ", "")), "it is writable"),
        (seen(clients=2), "2 clients are connected"),
        (seen(listeners=()), "on no TCP port"),
        (seen(listeners=(), line=LINE + " -k /sock"), "(--socket)"),
        (seen(listeners=(Endpoint("0.0.0.0", 10100),)), "others than this machine"),
        (seen(listeners=(Endpoint("::", 10100),)), "others than this machine"),
        (seen(listeners=(Endpoint("127.0.0.1", 9),)), "not in the range 10100-10109"),
        (seen(line=LINE.replace("-t ", "")), "no --persistent"),
        (seen(line=LINE.replace("-e 4", "")), "--shared 1"),
        (seen(line=LINE.replace("-f qcow2", "")), "--format is not stated"),
        (seen("/elsewhere/x.qcow2"), "in no repository of the config"),
        (seen(path=""), "which file it serves is not known"),
        (seen(image=None), "cannot be looked at"),
        (seen(image=Image(path="x", exists=False)), "any more"),
        (seen(image=Image(path="x", exists=True, error="torn")), "torn"),
        (seen(image=Image(path="x", exists=True, format="raw")), "raw, not qcow2"),
        (seen(line=LINE.replace("ctx-1-disk0", "foo")), "'foo' is none"),
    ],
)
def test_each_promise_that_a_stranger_does_not_keep_is_named(one: Seen, words: str) -> None:
    found = reasons(one, SETTINGS)
    assert len(found) == 2, found
    assert words in found[1]
    assert advice(one, SETTINGS)


def test_an_argv_is_shown_on_one_line_and_without_secrets() -> None:
    line = ("qemu-nbd", "--object", "secret,id=a,data=hunter2", "--object=secret,data=hunter2",
            "-x", "a\nvms: []", "ssh://me:hunter2@far/x", "\udcff\x1b[2J")  # fmt: skip
    text = shown(line)
    assert "hunter2" not in text
    assert text.isprintable()


def specs_of(text: str) -> Any:
    written, wrong = parse(text, "x.yaml")
    assert written is not None and not wrong, wrong
    return join([read_file(written)])


def test_servers_that_read_become_one_restore_that_is_valid() -> None:
    second = seen(
        "/r/ctx-1/2001/x.qcow2", LINE.replace("disk0", "disk1"), identity=Identity(8, 1)
    )  # fmt: skip
    text = spec_text([second, seen()], SETTINGS, None, "Made by hand.")
    specs = specs_of(text)
    assert not specs.failed, specs.diagnostics
    (vm,) = [one.spec for one in specs.vms]
    assert (vm.name, vm.purpose) == ("ctx-1-restore", "restore")
    assert [(d.key, d.size, d.image, d.export) for d in vm.disks] == [
        (2000, MIB, "ctx-1/2000/x.qcow2", "ctx-1-disk0"),
        (2001, MIB, "ctx-1/2001/x.qcow2", "ctx-1-disk1"),
    ]
    assert "TODO" not in text.split("vms:")[1]
    assert f"#   {LINE} /r/ctx-1/2000/x.qcow2" in text


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (seen("/r/ctx-1/disk-0/x.qcow2"), "key"),
        (seen("/elsewhere/ctx-1/2000/x.qcow2"), "image"),
    ],
)
def test_what_no_name_tells_is_refused_and_not_made_up(one: Seen, what: str) -> None:
    text = spec_text([one], SETTINGS, None, "Made by hand.")
    assert f"{what}:   # TODO" in text
    found = specs_of(text)
    assert found.failed
    assert any(what in one.summary for one in found.diagnostics)


def known_path(text: str) -> str:
    """What a person makes of the TODO about the path."""
    found = text.replace("vm:   # TODO: {", "vm: {").replace(", where it is in vCenter", "")
    assert found != text
    return found


def inventory(text: str) -> Inventory:
    written, _ = parse(text, "i.yaml")
    assert written is not None
    known, wrong = read(written)
    assert known is not None, wrong
    return known


def test_servers_that_write_are_no_backup_of_ours_and_no_run_is_asked_for() -> None:
    one = seen(line=LINE.replace("-r ", ""))
    text = spec_text([one], SETTINGS, None, "Made by hand.")
    assert "vm:   # TODO" in text
    assert any("vm" in found.summary for found in specs_of(text).diagnostics)
    (vm,) = [found.spec for found in specs_of(known_path(text)).vms]
    assert (vm.name, vm.purpose, vm.backup) == ("ctx-1", "backup", None)
    assert [(d.key, d.size, d.image, d.export) for d in vm.disks] == [(2000, MIB, None, None)]
    known = inventory("vms: {ctx-1: {vm: {path: /D/x}, disks: [{key: 2000, size: 1MiB}]}}")
    text = spec_text([one], SETTINGS, known, "Made by hand.")
    assert "disks: inventory" in text
    assert "TODO" not in text.split("vms:")[1]


def test_a_marked_server_is_described_as_its_own_run() -> None:
    line = LINE.replace("-r ", "").replace("ctx-1-disk0", "ctx-1-r1-disk0")
    one = seen("/r/ctx-1/2000/r1.qcow2", line, mark=mark())
    text = spec_text([one], SETTINGS, None, "Made by hand.")
    (vm,) = [found.spec for found in specs_of(known_path(text)).vms]
    assert (vm.name, vm.backup.run, vm.backup.type) == ("ctx-1", "r1", "full")
    assert [(d.key, d.image, d.export) for d in vm.disks] == [(2000, None, None)]
    named = seen("/r/mine/r1.qcow2", line.replace("ctx-1-r1", "own-r1"), mark=mark())
    text = known_path(spec_text([named], SETTINGS, None, "x"))
    (vm,) = [found.spec for found in specs_of(text).vms]
    assert [(d.image, d.export) for d in vm.disks] == [("mine/r1.qcow2", "own-r1-disk0")]
    grown = Image(path="x", exists=True, format="qcow2", size=MIB, backing="/r/b.qcow2")
    text = spec_text([seen(line=line, mark=mark(), image=grown)], SETTINGS, None, "x")
    assert "type: incremental" in text


def test_two_restores_of_one_vm_are_two() -> None:
    four = [
        seen(f"/r/ctx-1/{key}/{run}.qcow2", LINE.replace("disk0", f"disk{i}"),
             identity=Identity(10 * i + len(run), 1))
        for i, key in enumerate((2000, 2001))
        for run in ("b", "aa")
    ]  # fmt: skip
    text = spec_text(four, SETTINGS, None, "x")
    specs = specs_of(text)
    assert {one.spec.name: [disk.image for disk in one.spec.disks] for one in specs.vms} == {
        "ctx-1-restore": ["ctx-1/2000/aa.qcow2", "ctx-1/2001/aa.qcow2"],
        "ctx-1-restore-2": ["ctx-1/2000/b.qcow2", "ctx-1/2001/b.qcow2"],
    }


def test_two_repositories_are_told_apart() -> None:
    two = Settings(hub="a", state="/s", repositories={"local": "/r", "far": "/f"})
    assert "repository: far" in spec_text([seen("/f/ctx-1/2000/x.qcow2")], two, None, "x")
    assert "repository:   # TODO" in spec_text([seen("/g/ctx-1/2000/x.qcow2")], two, None, "x")


def test_no_server_is_an_empty_spec_and_a_document() -> None:
    text = spec_text([], SETTINGS, None, "x")
    assert not specs_of(text).failed
    found = document([seen(clients=1)], SETTINGS, text)
    (server,) = found["servers"]
    assert (server["disk"], server["clients"], server["adopted"]) == ("2000", 1, False)
    assert len(server["why_not"]) == 2
    assert Options().shared == 1
