"""Before and after of each change: command lines and images."""

from __future__ import annotations

from typing import Any, Final

from reconciler.core.actual import Actual
from reconciler.core.call import CallState
from reconciler.core.desired import Desired
from reconciler.core.ledger import Ledger
from reconciler.core.mark import argv
from reconciler.core.plan import Plan, plan
from reconciler.core.settings import QemuNbd
from reconciler.core.sides import document, lines, options, sides
from tests.core.builders import (
    HUB,
    NOW,
    ROOT,
    a_call,
    a_lease,
    a_server,
    a_vm,
    absent,
    an_export,
    an_image,
    remembered,
    seen,
    wanting,
)

ENDED: Final = remembered([a_lease()], [a_call(state=CallState.COMPLETED)])


def planned(desired: Desired, actual: Actual, ledger: Ledger | None = None) -> Plan:
    return plan(desired, actual, ledger or remembered(), NOW)


def told(found: Plan) -> dict[str, list[str]]:
    """Action → its lines."""
    pairs = [(action, one) for one in found.vms for action in one.actions]
    return {a.kind: lines(both) for a, one in pairs if (both := sides(a, one, found))}


def older(export: Any = None, shared: int = 2) -> tuple[str, ...]:
    return argv(export or an_export(), 10100, HUB, QemuNbd(shared=shared))


def test_a_restart_shows_the_options_that_differ_and_no_others() -> None:
    ledger = remembered([a_lease()], [a_call(state=CallState.DUE)])
    found = planned(wanting(a_vm()), seen([a_server(argv=older())], [an_image()]), ledger)
    image = f"  image {an_export().image}: 1 GiB (1073741824 bytes) qcow2"
    assert told(found)["restart"] == [image, "- --shared 2", "+ --shared 10"]


def test_a_first_start_shows_the_image_and_the_whole_command_line() -> None:
    found = told(planned(wanting(a_vm()), seen()))
    path = an_export().image
    assert found["create"] == [
        f"- image {path}: absent",
        f"+ image {path}: 1 GiB (1073741824 bytes) qcow2",
    ]
    assert found["start"][2:] == [f"+ {line}" for line in options(older(shared=10))]
    assert "+ --shared 10" in found["start"]


def test_an_overlay_shows_its_backing() -> None:
    export = an_export(backing=f"{ROOT}/base.qcow2")
    vm = a_vm(exports=(export,))
    parent = an_image(path=f"{ROOT}/base.qcow2", pristine=False)
    found = told(planned(wanting(vm), seen([], [parent])))
    assert found["create"][1].endswith(f"qcow2, backing {ROOT}/base.qcow2")


def test_a_stop_shows_what_ends_and_an_adoption_what_stays() -> None:
    found = told(planned(wanting(absent()), seen([a_server()], [an_image()]), ENDED))
    assert [line[:2] for line in found["stop"]] == ["  ", *["- "] * 7]
    known = remembered(calls=[a_call()])
    adopted = told(planned(wanting(a_vm()), seen([a_server()], [an_image()]), known))["adopt"]
    assert {line[:2] for line in adopted} == {"  "}
    assert "  --shared 10" in adopted


def test_an_image_of_another_size_is_shown_where_it_is_refused() -> None:
    found = planned(wanting(a_vm()), seen([], [an_image(size=4096)]))
    path = an_export().image
    assert told(found)["refuse"] == [
        f"- image {path}: 4 KiB (4096 bytes) qcow2",
        f"+ image {path}: 1 GiB (1073741824 bytes) qcow2",
    ]


def test_in_json_every_change_has_both_sides() -> None:
    call = a_call(a_vm("ctx-2"), CallState.COMPLETED)
    there = seen([a_server(an_export("ctx-2"), 10105)])
    found = planned(wanting(a_vm(), absent("ctx-2")), there, remembered(calls=[call]))
    changes = {(one["vm"], one["action"]): one for one in document(found)["changes"]}
    create, start = changes["ctx-1", "create"], changes["ctx-1", "start"]
    assert create["before"] == {"server": None, "image": None}
    assert create["after"]["image"]["size"] == 1 << 30
    assert start["after"]["server"]["pid"] is None
    assert start["after"]["server"]["argv"] == list(older(shared=10))
    stop = changes["ctx-2", "stop"]
    assert stop["before"]["server"]["pid"] == a_server(port=10105).pid
    assert stop["after"]["server"] is None
    assert changes["ctx-1", "call"]["before"] is None
    plain = found.to_json()
    assert all("before" not in one for one in plain["changes"])
