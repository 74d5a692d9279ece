"""Each layer between hub and SNA fails on real sockets, and is told apart; and who asks when."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from reconciler.core.appliances import Health, Holder, layer, trouble
from reconciler.core.settings import Appliance, SecretRef
from reconciler.host import proc
from reconciler.look import Observer
from reconciler.reaching import Reach, holder, side_by_side, with_holder
from tests.core.builders import a_settings, a_vm, remembered, says, wanting
from tests.e2e.site import until
from tests.ports import Dealer

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
DEADLINE = 0.3


def eyes(url: str, **changes: object) -> Observer:
    sna = Appliance(url=url, connect_timeout=DEADLINE, **changes)  # type: ignore[arg-type]
    return Observer(a_settings(snas={"site-a": sna}), {})


def asked(url: str) -> Health:
    return eyes(url).healths(["site-a"])["site-a"]


@contextlib.contextmanager
def answering(reply: bytes | None, *, stays: bool = True) -> Iterator[int]:
    """A listener of this process; `reply` None: it says nothing, and closes unless it `stays`."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                if reply is not None:
                    client.recv(65536)
                    client.sendall(reply)
                if reply is not None or not stays:
                    client.close()
                else:
                    kept.append(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for one in kept:
            one.close()


def http(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


def test_an_sna_that_is_well() -> None:
    with answering(http("200 OK")) as port:
        found = asked(f"http://127.0.0.1:{port}")
    assert (found.well, found.status, found.holder) == (True, 200, None)


def test_nobody_listens() -> None:
    (port,) = Dealer().deal(1)
    found = asked(f"http://127.0.0.1:{port}")
    assert (found.kind, found.here, found.holder) == ("refused", True, None)
    says(layer(found), "no tunnel of this SNA is up")


@pytest.mark.parametrize(
    ("reply", "stays", "words"),
    [
        (None, True, "no answer in time"),
        (None, False, "the connection"),
        (http("503 Service Unavailable"), True, "HTTP: it answers 503"),
        (http("302 Found"), True, "HTTP: it answers 302"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", True, "the connection was closed without a whole answer"),
    ],
)
def test_another_process_holds_the_port(reply: bytes | None, stays: bool, words: str) -> None:
    with answering(reply, stays=stays) as port:
        found = asked(f"http://127.0.0.1:{port}")
    assert not found.well
    name = proc.name_of(os.getpid())
    says(layer(found), words, f"{name} (pid {os.getpid()}, user {getpass.getuser()}", "no sshd")


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_it_does_not_let_us_in(status: str) -> None:
    with answering(http(status)) as port:
        found = asked(f"http://127.0.0.1:{port}")
    says(trouble("site-a", "u", found), f"token: it answers {status[:3]}", "{token: …}")


def test_a_name_that_cannot_be_resolved() -> None:
    found = asked("http://sna.invalid:9081")
    assert (found.kind, found.here) == ("dns", False)
    says(layer(found), "name: it cannot be resolved")


def test_no_tls_where_tls_is_wanted() -> None:
    with answering(b"hello\r\n\r\n") as port:
        found = asked(f"https://127.0.0.1:{port}")
    assert found.kind == "tls"
    says(layer(found), "TLS: ")


def test_an_answer_that_trickles_is_none() -> None:
    """Each byte comes in time, and the whole never does."""

    def dribble(_name: str) -> Health | None:
        stop.wait(10)
        return Health(status=200)

    stop = threading.Event()
    before = time.monotonic()
    found = side_by_side(["a", "b"], dribble, 0.1)
    assert time.monotonic() - before < 5
    stop.set()
    assert {name: one.kind for name, one in found.items()} == {"a": "timeout", "b": "timeout"}


def test_snas_are_asked_side_by_side() -> None:
    """Each waits until the other is asked too."""
    both = threading.Barrier(2, timeout=10)

    def ask(_name: str) -> Health | None:
        both.wait()
        return Health(status=200)

    assert side_by_side(["a", "b"], ask, 10).keys() == {"a", "b"}


def test_what_goes_wrong_while_it_is_asked_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(["a"], lambda _: Health(status=1 // 0), 10)


def test_an_sna_whose_token_cannot_be_read_is_not_asked() -> None:
    """SecretUnreadable tells of it."""
    with answering(http("200 OK")) as port:
        one = eyes(f"http://127.0.0.1:{port}", token=SecretRef("env", "NO_SUCH_VARIABLE"))
        assert one.healths(["site-a"]) == {}


def test_an_sna_that_the_config_does_not_have_any_more_is_not_asked() -> None:
    assert eyes("http://127.0.0.1:1").healths(["gone"]) == {}


def test_a_look_asks_only_for_runs_that_are_to_begin_and_status_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = eyes("http://127.0.0.1:1")
    times: list[Collection[str]] = []

    def healths(names: Collection[str]) -> dict[str, Health]:
        times.append(set(names))
        return dict.fromkeys(names, Health(kind="refused", said="connection refused"))

    monkeypatch.setattr(one, "healths", healths)
    desired = wanting(a_vm("ctx-1"), a_vm("ctx-2"), settings=one.settings)
    assert one.look(desired, remembered(), secrets=False).appliances is None
    assert times == []
    for _ in range(2):  # two passes of one apply
        assert (one.look(desired, remembered()).appliances or {}).keys() == {"site-a"}
    assert times == [{"site-a"}]


# -- a real tunnel


class Tunnel:
    """An sshd and an ssh -R to it: a port of the hub that leads to a port of the appliance."""

    def __init__(self, folder: Path, sshd: int, port: int, far: int) -> None:
        self.sshd_port, self.port = sshd, port
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)],
                check=True,
            )
        os.makedirs("/run/sshd", exist_ok=True)
        (folder / "sshd_config").write_text(
            f"Port {sshd}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPidFile none\n"
            "AllowTcpForwarding yes\nPermitRootLogin yes\nLogLevel QUIET\n"
        )
        self.server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL
        )
        until(lambda: holder("127.0.0.1", sshd), "the sshd")
        self.client = subprocess.Popen(
            [
                *("ssh", "-F", "none", "-N", "-i", str(folder / "user"), "-p", str(sshd)),
                *("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known"),
                *("-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"),
                *("-R", f"127.0.0.1:{port}:127.0.0.1:{far}", f"{getpass.getuser()}@127.0.0.1"),
            ],
            stderr=subprocess.DEVNULL,
        )
        until(lambda: holder("127.0.0.1", port), "the tunnel's port")

    def end(self) -> None:
        for one in (self.client, self.server):
            one.terminate()
            one.wait(10)


@pytest.mark.skipif(not os.path.exists(SSHD) or os.geteuid() != 0, reason="no sshd, or not root")
def test_an_sshd_holds_the_port(tmp_path: Path) -> None:
    sshd, port, far = Dealer().deal(3)
    tunnel = Tunnel(tmp_path, sshd, port, far)
    try:
        found = asked(f"http://127.0.0.1:{port}")
        said = layer(found)
        assert found.holder is not None
        assert found.holder.sshd
        assert found.holder.user == getpass.getuser()
        assert found.holder.peer.startswith("127.0.0.1:")
        assert found.holder.peer != f"127.0.0.1:{sshd}"
        assert abs(found.holder.since - time.time()) < 60
        says(said, f"sshd (pid {found.holder.pid}, user ", "closes each connection at once",
             "a stale session holds the port")  # fmt: skip
        assert layer(asked(f"http://127.0.0.1:{port}")) == said  # the same words each time
        with socket.create_server(("127.0.0.1", far)):  # it accepts, and nobody reads
            hung = asked(f"http://127.0.0.1:{port}")
        says(layer(hung), f"sshd (pid {found.holder.pid}", "no answer in time")
    finally:
        tunnel.end()


def test_a_process_that_cannot_be_seen_is_told_by_its_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proc, "holders", lambda _: {})
    with answering(None) as port:
        found = holder("127.0.0.1", port)
    assert found == Holder(user=getpass.getuser())


def test_who_listens_there_alone_goes_before_who_listens_everywhere() -> None:
    (port,) = Dealer().deal(1)
    child = (
        "import socket, sys, time; s = socket.socket(); s.setsockopt(1, 15, 1); "
        "s.bind(('0.0.0.0', int(sys.argv[1]))); s.listen(); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", child, str(port)])
    try:
        until(lambda: holder("127.0.0.1", port), "who has it all")
        with socket.socket() as mine:
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            mine.bind(("127.0.0.1", port))
            mine.listen()
            found = holder("127.0.0.1", port)
        assert found is not None
        assert found.pid == os.getpid()
    finally:
        other.kill()
        other.wait(10)


def test_who_listens_elsewhere_does_not_hold_the_port() -> None:
    with answering(None) as port:
        assert holder("127.0.0.2", port) is None
        assert holder("127.0.0.1", port) is not None
        far = Health(kind="timeout", said="no answer in time")
        assert with_holder(f"http://192.0.2.1:{port}", far) == far


# -- how often


class Field:
    """SNAs that are well or not, by a clock that stands; and what was told of them."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.well: dict[str, bool] = {"a": False, "b": True}
        self.questions: list[str] = []
        self.moved: list[tuple[str, bool]] = []
        self.asked: list[tuple[str, bool | None]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.reach = Reach(
            self.ask, lambda name, found: self.moved.append((name, found.well)),
            lambda name, well: self.asked.append((name, well)), clock=lambda: self.now,
        )  # fmt: skip

    def ask(self, names: Collection[str]) -> Mapping[str, Health]:
        self.questions += names
        assert self.gate.wait(10)
        return {
            name: Health(status=200) if self.well[name] else Health(kind="refused", said="no")
            for name in names
            if name in self.well
        }


def test_many_who_want_to_know_ask_once() -> None:
    field = Field()
    field.gate.clear()
    found: list[Mapping[str, Health]] = []
    threads = [
        threading.Thread(target=lambda: found.append(field.reach.of(["a", "b"]))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(field.questions) == 2, "both questions")
    field.gate.set()
    for thread in threads:
        thread.join(10)
    assert sorted(field.questions) == ["a", "b"]
    assert [sorted(one) for one in found] == [["a", "b"]] * 8
    assert not found[0]["a"].well
    assert field.reach.known(["a", "c"]).keys() == {"a"}


def test_one_that_is_away_is_polled_with_back_off_and_told_once_when_it_is_back() -> None:
    field = Field()
    field.reach.of(["a"])
    assert field.moved == [("a", False)]
    gaps = []
    for _ in range(6):
        due = field.reach.next_at()
        assert due is not None
        gaps.append(due - field.now)
        field.now = due - 0.01
        assert field.reach.take({"a"}) == []
        assert not field.reach.of(["a"])["a"].well  # those who wait take the last answer
        field.now = due
        assert field.reach.take({"a"}) == ["a"]
        assert field.reach.take({"a"}) == []  # it is being asked
        assert field.reach.next_at() is None
        field.reach.poll("a")
    assert gaps == [5, 5, 8, 16, 30, 30]
    assert field.questions == ["a"] * 7
    assert field.moved == [("a", False)]
    field.well["a"] = True
    field.reach.poll("a")
    assert field.moved == [("a", False), ("a", True)]
    assert field.reach.next_at() is None
    assert not field.reach.unwell("a")


def test_a_good_answer_counts_for_a_moment() -> None:
    field = Field()
    for later, times in ((0.0, 1), (4.9, 1), (0.2, 2)):
        field.now += later
        assert field.reach.of(["b"])["b"].well
        assert len(field.questions) == times
    field.now += 5
    assert field.reach.known(["b"]) == {}


def test_a_person_is_told_what_is_so_now() -> None:
    field = Field()
    field.reach.of(["a"])
    field.well["a"] = True
    field.now += 1
    assert not field.reach.of(["a"])["a"].well
    assert field.reach.now(["a"])["a"].well
    assert field.moved[-1] == ("a", True)
    assert field.questions == ["a", "a"]


def test_one_for_which_nobody_waits_is_not_asked_again() -> None:
    field = Field()
    field.reach.of(["a"])
    field.now += 60
    assert field.reach.take(set()) == []
    assert field.reach.next_at() is None
    assert field.asked == [("a", False), ("a", None)]
    assert field.questions == ["a"]


def test_another_config_is_asked_at_once() -> None:
    field = Field()
    field.reach.of(["a"])
    field.well["a"] = True
    field.reach.forget()
    assert field.reach.known(["a"]) == {}
    assert field.reach.of(["a"])["a"].well


def test_one_that_cannot_be_asked_is_not_known() -> None:
    field = Field()
    assert field.reach.of(["no token"]) == {}
    assert field.reach.now(["no token"]) == {}
    assert field.reach.next_at() is None
