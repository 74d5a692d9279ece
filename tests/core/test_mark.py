"""Our mark: a server is ours if its argv says so, and nothing else makes it ours."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reconciler.core.desired import Export
from reconciler.core.mark import ENTER, Mark, argv, parse
from reconciler.core.settings import QemuNbd
from tests.core.builders import an_export

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True)
ports = st.integers(1, 65535)
keys = st.integers(0, 2**31 - 1)
paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30).map(
    lambda tail: f"/{tail}"
)


@st.composite
def exports(draw: st.DrawFn) -> Export:
    position = draw(st.integers(0, 99))
    return Export(
        vm=draw(words),
        key=draw(keys),
        position=position,
        run=draw(words),
        attempt=draw(st.integers(1, 99)),
        name=f"{draw(words)}disk{position}",
        image=draw(paths),
        size=512,
        read_only=draw(st.booleans()),
    )


options = st.builds(
    QemuNbd,
    binary=st.sampled_from(["qemu-nbd", "/usr/local/bin/qemu-nbd", "/opt/q/qemu-nbd-9"]),
    shared=st.integers(2, 1000),
    cache=st.sampled_from([None, "none", "writethrough"]),
    aio=st.sampled_from([None, "native"]),
    discard=st.sampled_from([None, "unmap"]),
    detect_zeroes=st.sampled_from([None, "off"]),
)


@given(export=exports(), port=ports, hub=words, option=options, early=st.booleans())
def test_a_server_we_start_is_known_as_ours_again(
    export: Export, port: int, hub: str, option: QemuNbd, early: bool
) -> None:
    line = argv(export, port, hub, option)
    started = ("sh", "-c", ENTER, *line) if early else line
    served = parse(started)
    assert served is not None
    assert served.mark == Mark(hub, export.vm, export.key, export.run, export.attempt, port)
    assert served.image == export.image
    assert served.starting is early
    assert served.argv == line
    assert served.port is None


@given(words, words, keys, words, st.integers(1, 99), ports)
def test_a_mark_is_read_as_it_is_written(
    hub: str, vm: str, disk: int, run: str, attempt: int, port: int
) -> None:
    mark = Mark(hub, vm, disk, run, attempt, port)
    assert Mark.parse(str(mark)) == mark
    assert mark.key == (vm, disk, run, attempt)


def test_a_server_is_started_as_measured() -> None:
    assert argv(an_export(), 10100, "hub-a", QemuNbd(binary="/usr/bin/qemu-nbd")) == (
        "qemu-nbd",
        "--persistent",
        "--shared",
        "10",
        "--format",
        "qcow2",
        "--export-name",
        "ctx-1-r1-disk0",
        "--description",
        "nbd-reconciler/1 hub=hub-a vm=ctx-1 disk=2000 run=r1 attempt=1 port=10100",
        "/backup/ctx-1/2000/r1.qcow2",
    )


def test_a_restore_is_served_read_only_and_options_are_passed_on() -> None:
    line = argv(
        an_export(read_only=True),
        10100,
        "hub-a",
        QemuNbd(cache="writethrough", detect_zeroes="unmap"),
    )
    assert "--read-only" in line
    assert line[line.index("--cache") + 1] == "writethrough"
    assert line[line.index("--detect-zeroes") + 1] == "unmap"
    assert "--port" not in line
    assert "--bind" not in line


MARK: Final = "nbd-reconciler/1 hub=h vm=v disk=1 run=r attempt=1 port=2"


@pytest.mark.parametrize(
    "description",
    [
        "",
        "backup of ctx-1",
        "nbd-reconciler hub=h vm=v disk=1 run=r attempt=1 port=2",
        "nbd-reconciler/2 hub=h vm=v disk=1 run=r attempt=1 port=2",
        f" {MARK}",
        f"x{MARK}",
        MARK.replace(" port=2", ""),
        MARK.replace(" hub=h", ""),
        MARK.replace("disk=1", "disk=one"),
        MARK.replace("attempt=1", "attempt="),
        MARK.replace(" ", "  ").replace("=", " "),
    ],
)
def test_a_description_that_is_not_quite_our_mark_is_not_ours(description: str) -> None:
    assert Mark.parse(description) is None


def test_a_mark_with_a_name_that_no_spec_can_have_is_not_ours() -> None:
    """Anybody may start a process; its words must not get into plans, paths and messages."""
    impossible = ["²", "9" * 5000, "a/../b", "\udcff", "", "-v"]
    texts = [
        f"nbd-reconciler/1 hub=h vm={vm} disk=1 run={run} attempt=1 port=2"
        for name in impossible
        for vm, run in ((name, "r1"), ("ctx-1", name))
    ]
    assert [text[:60] for text in texts if Mark.parse(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["sshd"],
        ["python", "qemu-nbd", "--description", MARK],
        ["vim", "/etc/qemu-nbd.conf"],
        ["sh", "-c", "qemu-nbd --description x"],
        ["sh", "-c", ENTER],
        ["sh", "-c", f"{ENTER} ", "qemu-nbd", "--description", MARK],
    ],
)
def test_what_is_not_a_qemu_nbd_is_none_of_our_business(line: list[str]) -> None:
    assert parse(line) is None


@pytest.mark.parametrize(
    ("line", "image", "port"),
    [
        (["qemu-nbd", "-f", "raw", "/a.raw", "-p", "10105"], "/a.raw", 10105),
        (["/usr/bin/qemu-nbd", "--port=10105", "/a"], "/a", 10105),
        (["qemu-nbd", "-x", "/not-this", "-D", "text", "/a"], "/a", None),
        (["qemu-nbd", "--socket", "/run/s", "/a"], "/a", None),
        (["qemu-nbd", "-p"], None, None),
        (["qemu-nbd", "-p", "x", "/a"], "/a", None),
        (["qemu-nbd", "--list"], None, None),
    ],
)
def test_a_strangers_server_is_reported_with_its_image_and_port(
    line: list[str], image: str | None, port: int | None
) -> None:
    served = parse(line)
    assert served is not None
    assert (served.image, served.port, served.mark) == (image, port, None)


@given(st.lists(st.text(max_size=10) | st.sampled_from(["-p", "--port", "-D", "-x"]), max_size=6))
@example(["-p", "²"])  # a digit to isdigit, not to int
@example(["--port", "9" * 5000])
@example(["--port=٣"])
def test_no_argv_of_anybody_makes_looking_fail(rest: list[str]) -> None:
    served = parse(["qemu-nbd", *rest])
    assert served is not None
    assert served.port is None or served.port >= 0
