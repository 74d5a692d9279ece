"""What keeps a server from being stopped, and an image from being served."""

from __future__ import annotations

from typing import Any

import pytest

from reconciler.core.call import Call, CallState
from reconciler.core.guards import broken_chain, in_use, keeps, unfit
from tests.core.builders import GIB, a_call, a_server, a_vm, an_export, an_image, says

S = CallState


@pytest.mark.parametrize(
    ("clients", "words"), [(0, None), (1, "1 client is connected"), (3, "3 clients are connected")]
)
def test_a_server_is_in_use_while_anybody_is_connected(clients: int, words: str | None) -> None:
    found = in_use(a_server(clients=clients))
    if words is None:
        assert found is None
    else:
        says(found or "", words, "port 10100")


def kept(call: Call | None = None, clients: int = 0, **changes: Any) -> str | None:
    """The cause for which a server is kept."""
    server = a_server(clients=clients)
    found = keeps(server, call, **{"protect": False, "kill_clients": False, **changes})
    return found[0] if found else None


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        (S.DUE, None),
        (S.INTENDED, "RunActive"),
        (S.ACCEPTED, "RunActive"),
        (S.UNKNOWN, "RunActive"),
        (S.REJECTED, None),
        (S.COMPLETED, None),
        (S.FAILED, None),
        (S.CANCELLED, None),
    ],
)
def test_a_server_of_a_run_that_may_be_writing_is_kept(state: CallState, cause: str | None) -> None:
    assert kept(a_call(state=state)) == cause


def test_an_active_run_keeps_only_its_own_servers() -> None:
    assert kept(a_call(a_vm(run="r2"))) is None
    assert kept(a_call(attempt=2)) is None


def test_an_order_to_cut_clients_off_does_not_end_a_run() -> None:
    assert kept(clients=2) == "InUse"
    assert kept(clients=2, kill_clients=True) is None
    assert kept(a_call(), clients=2, kill_clients=True) == "RunActive"
    assert kept(protect=True, kill_clients=True) == "Protected"


def test_a_kept_server_says_how_it_can_be_let_go() -> None:
    active = keeps(a_server(), a_call(), protect=False, kill_clients=False)
    assert active
    says(
        active[1],
        "r1 is ACCEPTED",
        "reconciler resolve ctx-1 --failed --reason WHY (or --completed)",
    )
    busy = keeps(a_server(clients=1), None, protect=False, kill_clients=False)
    assert busy
    says(busy[1], "1 client is connected", "reconciler stop ctx-1 --kill-clients")
    protected = keeps(a_server(), None, protect=True, kill_clients=False)
    assert protected
    says(protected[1], "protect: true")


@pytest.mark.parametrize(
    ("export", "image", "held", "cause", "words"),
    [
        ({}, {"exists": False}, False, None, []),
        ({}, {}, False, None, []),
        ({}, {"pristine": False}, True, None, []),
        ({}, {"pristine": False}, False, "ImageNotEmpty", ["data that is not of this run"]),
        ({}, {"format": "raw"}, True, "WrongFormat", ["is raw, not qcow2"]),
        ({}, {"format": ""}, True, "WrongFormat", ["of no known format"]),
        ({}, {"size": 2 * GIB}, True, "SizeMismatch", ["2 GiB", "2147483648", "1 GiB"]),
        ({}, {"holder": "qemu-img (pid 9)"}, True, "ImageLocked", ["qemu-img (pid 9) holds"]),
        ({}, {"error": "permission denied"}, True, "ImageUnreadable", ["permission denied"]),
        ({}, {"outside": "/etc/x"}, True, "ImageOutsideRepository", ["leads out", "/etc/x"]),
        ({}, {"backing": "/b"}, True, "BackingMismatch", ["builds on /b, the spec on nothing"]),
        ({"backing": "/b"}, {"backing": None}, True, "BackingMismatch", ["on nothing", "on /b"]),
        ({"backing": "/b"}, {"backing": "/b"}, True, None, []),
        ({"read_only": True}, {"exists": False}, False, "ImageMissing", ["restore from"]),
        ({"read_only": True}, {"pristine": False, "backing": "/b"}, False, None, []),
        ({"read_only": True}, {"holder": "x (pid 9)"}, False, "ImageLocked", ["pid 9"]),
        ({"read_only": True, "size": None}, {"size": 3 * GIB}, False, None, []),
        ({"read_only": True}, {"size": 3 * GIB}, False, "SizeMismatch", ["3 GiB"]),
    ],
)
def test_an_image_is_served_only_if_nothing_in_it_is_at_stake(
    export: dict[str, Any], image: dict[str, Any], held: bool, cause: str | None, words: list[str]
) -> None:
    wanted = an_export(**export)
    found = unfit(wanted, an_image(wanted, **{"backing": None, **image}), held=held)
    assert (found[0] if found else None) == cause
    says(found[1] if found else "", *words)


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ({}, None),
        ({"/b": {"backing": None}}, None),
        ({"/b": {"backing": "/c"}, "/c": {"backing": None}}, None),
        ({"/b": {"exists": False}}, ["/top builds on /b, which is missing", "put it back"]),
        ({"/b": {"backing": "/c"}, "/c": {"exists": False}}, ["/b builds on /c", "missing"]),
        ({"/b": {"error": "permission denied"}}, ["/b, which cannot be read: permission denied"]),
        ({"/b": {"format": "raw"}}, ["/b, which is raw, not qcow2"]),
        ({"/b": {"outside": "/etc/x"}}, ["leads out of its repository, to /etc/x"]),
        ({"/b": {"backing": "/top"}, "/top": {"backing": "/b"}}, ["the chain is a ring"]),
    ],
)
def test_a_chain_is_read_whole_or_not_at_all(
    links: dict[str, dict[str, Any]], words: list[str] | None
) -> None:
    images = {path: an_image(**{"path": path, **link}) for path, link in links.items()}
    found = broken_chain(an_image(path="/top", backing="/b"), images)
    assert (found is None) == (words is None)
    if found:
        assert found[0] == "ChainBroken"
        says(found[1], *(words or []))
