"""What systemd is told and tells: its words, and that nothing of them goes on to a server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from reconciler.cli.activation import handed_over
from reconciler.core.errors import HostError
from reconciler.core.units import Endpoint
from reconciler.host import systemd

HANDED_OVER = """
import json, os, socket, sys
from reconciler.host import systemd
os.environ.update(LISTEN_PID=str(os.getpid() + int(sys.argv[1])), LISTEN_FDS=sys.argv[2],
                  LISTEN_FDNAMES=sys.argv[3])
found = systemd.listeners()
print(json.dumps({
    "found": {name: one.getsockname()[1] for name, one in found.items()},
    "inherited": [one.get_inheritable() for one in found.values()],
    "open": [fd for fd in (3, 4, 5) if os.path.exists(f"/proc/self/fd/{fd}")],
    "left": sorted(name for name in os.environ if name.startswith("LISTEN_")),
    "again": len(systemd.listeners()),
}))
"""


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told_at_the_socket_that_it_named(tmp_path: Path, abstract: bool) -> None:
    name = f"@reconciler-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(10)
        assert systemd.notify("READY=1", "STATUS=a\nb", environment={"NOTIFY_SOCKET": name})
        assert manager.recv(4096) == b"READY=1\nSTATUS=a b"


@pytest.mark.parametrize("name", ["", "relative", "/nowhere/notify"])
def test_nobody_is_told_where_nobody_asked_or_hears(name: str) -> None:
    assert not systemd.notify("READY=1", environment={"NOTIFY_SOCKET": name})
    assert not systemd.notify("READY=1", environment={})


def test_a_manager_that_does_not_read_keeps_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        full = threading.Event()

        def fill() -> None:
            while systemd.notify("WATCHDOG=1", environment={"NOTIFY_SOCKET": path}):
                pass
            full.set()

        threading.Thread(target=fill, daemon=True).start()
        assert full.wait(20)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_often_it_wants_to_hear_of_us(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert systemd.watchdog(environment) == seconds


def found_by_a_process(
    given: list[socket.socket], names: str, *, count: str = "", other: int = 0
) -> tuple[dict[str, object], list[int]]:
    """What a process finds that gets these sockets from fd 3 on, and their ports."""
    import json

    code = "import os, sys\n" + "".join(
        f"os.dup2(int(sys.argv[{4 + n}]), {90 + n})\n" for n in range(len(given))
    )
    code += "".join(f"os.dup2({90 + n}, {3 + n})\n" for n in range(len(given))) + HANDED_OVER
    done = subprocess.run(
        [sys.executable, "-c", code, str(other), count or str(len(given)), names,
         *(str(one.fileno()) for one in given)],
        pass_fds=[one.fileno() for one in given], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), [
        one.getsockname()[1] if one.family == socket.AF_INET else 0 for one in given
    ]


def test_sockets_are_taken_by_name_and_go_on_to_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        found, ports = found_by_a_process([a, b], "api:more")
    assert found == {
        "found": {"api": ports[0], "more": ports[1]},
        "inherited": [False, False],
        "open": [3, 4],
        "left": [],
        "again": 0,
    }


def test_what_is_for_another_process_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as a:
        found, _ = found_by_a_process([a], "api", other=1)
    assert (found["found"], found["left"], found["open"]) == ({}, [], [3])


def test_what_does_not_listen_is_not_taken() -> None:
    with socket.socket() as unbound, socket.create_server(("127.0.0.1", 0)) as a:
        found, ports = found_by_a_process([unbound, a], "api:api")
    assert (found["found"], found["open"]) == ({"api": ports[1]}, [4])


@pytest.mark.parametrize("count", ["x", "-1", "0"])
def test_a_count_that_is_none_hands_nothing_over(count: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as a:
        found, _ = found_by_a_process([a], "api", count=count)
    assert found["found"] == {}


def test_a_count_too_large_and_names_too_few_are_survived() -> None:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        found, ports = found_by_a_process([a, b], "api", count="9")
    assert found["found"] == {"api": ports[0], "unknown": ports[1]}


# -- the socket for callbacks


def hand_over(monkeypatch: pytest.MonkeyPatch, **given: socket.socket) -> None:
    monkeypatch.setattr(systemd, "listeners", lambda: dict(given))


def test_the_socket_for_callbacks_is_taken_and_others_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("", 0)) as other:
        hand_over(monkeypatch, api=api, other=other)
        for host in ("127.0.0.1", "localhost"):
            assert handed_over(Endpoint(host, api.getsockname()[1])) is api
        assert other.fileno() == -1


def test_without_one_we_listen_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    hand_over(monkeypatch)
    assert handed_over(Endpoint("127.0.0.1", 8082)) is None


@pytest.mark.parametrize("host", ["127.0.0.2", "0.0.0.0", "127.0.0.1"])
def test_one_that_is_not_where_the_config_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    with socket.create_server((host, 0)) as api:
        port = api.getsockname()[1]
        wanted = Endpoint("127.0.0.1", port + 1 if host == "127.0.0.1" else port)
        hand_over(monkeypatch, api=api)
        with pytest.raises(HostError, match=f"hands over a socket at {host}:{port}") as refusal:
            handed_over(wanted)
        assert "reconciler render systemd" in str(refusal.value)
        assert api.fileno() == -1


def test_one_that_is_no_tcp_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as api:
        api.bind(str(tmp_path / "api"))
        hand_over(monkeypatch, api=api)
        with pytest.raises(HostError, match=str(tmp_path)):
            handed_over(Endpoint("127.0.0.1", 8082))
