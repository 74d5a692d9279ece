"""Locks, sockets, processes and files, each against the real thing."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reconciler.core.actual import Identity
from reconciler.core.errors import HostError, LockError
from reconciler.core.settings import Secret, SecretRef
from reconciler.host import files, lock, patience, proc, processes, qemu_nbd, sockets
from tests.mounts import Mounts

# -- lock


def test_a_second_holder_waits_is_told_who_and_gives_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    path = tmp_path / "lock"
    told: list[lock.Holder | None] = []
    with lock.held(path, "first", 1):
        assert (holder := lock.holder(path)) is not None
        assert (holder.pid, holder.command) == (os.getpid(), "first")
        with (
            pytest.raises(LockError, match=r"\(first\)"),
            lock.held(path, "second", 1, told.append),
        ):
            raise AssertionError
    assert [one.command for one in told if one] == ["first"]
    assert lock.holder(path) is None
    with lock.held(path, "second", 0):
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom reconciler.host import lock\n"
        f"with lock.held(pathlib.Path({str(tmp_path / 'lock')!r}), 'victim', 1):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    child.kill()
    child.wait(10)
    child.stdout.close()
    with lock.held(tmp_path / "lock", "next", 0):
        pass


# -- sockets and what is seen of them


def test_a_reserved_port_is_seen_and_cannot_be_reserved_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    bound = sockets.reserve("127.0.0.1", port)
    try:
        assert bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not bound.get_inheritable()
        (seen,) = [one for one in proc.tcp_sockets() if one.port == port]
        assert (seen.address, seen.listening, seen.inode) == (
            "127.0.0.1",
            True,
            sockets.inode(bound),
        )
        assert proc.holders([seen.inode]) == {seen.inode: os.getpid()}
        with pytest.raises(sockets.PortBusyError, match="Address already in use"):
            sockets.reserve("127.0.0.1", port)
    finally:
        bound.close()
    assert [one for one in proc.tcp_sockets() if one.port == port and one.listening] == []


def test_a_client_is_counted_at_the_servers_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            found = [one for one in proc.tcp_sockets() if one.port == port and not one.listening]
            assert len(found) == 1


def test_a_listener_on_ipv6_is_seen() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        assert [one.address for one in proc.tcp_sockets() if one.port == port] == ["::1"]


def test_an_address_that_is_not_here_says_what_to_correct() -> None:
    with pytest.raises(HostError, match="correct `ports:"):
        sockets.reserve("192.0.2.1", 20000)


# -- processes


def test_a_pid_that_is_anothers_now_is_not_signalled() -> None:
    child = subprocess.Popen(["sleep", "600"])
    try:
        seen = proc.identify(child.pid)
        assert seen is not None
        earlier = Identity(seen.pid, seen.started - 1)
        with pytest.raises(processes.Gone, match="another process's now"):
            processes.Handle(earlier, proc.identify)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait(10)


def test_a_process_that_ignores_sigterm_is_killed_and_reaped() -> None:
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    identity = proc.identify(child.pid)
    assert identity is not None
    with processes.Handle(identity, proc.identify) as handle:
        assert handle.end(0.1) is True
    assert proc.identify(child.pid) is None
    child.stdout.close()
    child.wait(10)


def test_a_frozen_process_is_ended_too() -> None:
    child = subprocess.Popen(["sleep", "600"])
    os.kill(child.pid, signal.SIGSTOP)
    identity = proc.identify(child.pid)
    assert identity is not None
    with processes.Handle(identity, proc.identify) as handle:
        handle.end(0.1)
    child.wait(10)
    assert proc.identify(child.pid) is None


def test_a_process_that_is_gone_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait(10)
    with pytest.raises(processes.Gone):
        processes.Handle(Identity(child.pid, 1), proc.identify)


def test_a_zombie_is_not_a_process() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert proc.identify(child.pid) is None
    child.wait(10)


def test_how_a_process_ended_in_words() -> None:
    assert processes.described(256) == "exit status 1"
    assert processes.described(9) == "killed by SIGKILL"
    assert processes.described(None) == "it ended"


def test_who_holds_a_file_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()
    code = f"f = open({str(path)!r}, 'r+b'); print(flush=True); import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        with path.open("rb"):  # a reader is not a holder
            assert proc.openers(str(path)) == [child.pid]
        assert proc.openers(str(path), ignore=[child.pid]) == []
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def test_a_file_that_hangs_elsewhere_keeps_nobody_from_finding_a_holder(
    hangable: Mounts, tmp_path: Path
) -> None:
    path, far = tmp_path / "image", tmp_path / "far"
    path.touch()
    hangable.hung(far)
    code = (
        f"import os, time; os.open({str(far)!r}, os.O_PATH); f = open({str(path)!r}, 'r+b')\n"
        "print(flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        found = patience.do("look", str(path), lambda: proc.openers(str(path)), 20)
        assert found == [child.pid]
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


# -- logs


def test_a_log_that_has_grown_too_long_keeps_its_end_and_who_writes_it_goes_on(
    tmp_path: Path,
) -> None:
    log = tmp_path / "a.log"
    with log.open("ab", buffering=0) as writer:
        lines = [f"line {n:09}\n".encode() for n in range(qemu_nbd.LOG_LIMIT // 15)]
        writer.write(b"".join(lines))
        before = log.read_bytes()
        qemu_nbd.cap(log)
        assert log.read_bytes() == before  # long, and not too long
        writer.write(b"one more\n" * 2)
        qemu_nbd.cap(log)
        writer.write(b"the last\n")
    after = log.read_bytes()
    assert qemu_nbd.LOG_KEPT - 100 < len(after) < qemu_nbd.LOG_KEPT + 100
    assert after.startswith(b"line ")
    assert after.endswith(lines[-1] + b"one more\none more\nthe last\n")
    assert (before + b"one more\none more\nthe last\n").endswith(after)


def test_logs_that_nobody_needs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    old = {"gone-2000-r1.log", "kept-2000-r1.log", "notes.txt", "young-2000-r1.log"}
    for name in old:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1000, 5000 if name.startswith("young") else 1000))
    (tmp_path / "folder.log").mkdir()
    (tmp_path / "long.log").write_bytes(b"x" * 80 + b"\n" + b"y\n" * qemu_nbd.LOG_LIMIT)
    qemu_nbd.tidy(tmp_path, {"kept-2000-r1.log"}, before=2000)
    assert {one.name for one in tmp_path.iterdir()} == old - {"gone-2000-r1.log"} | {
        "folder.log",
        "long.log",
    }
    assert qemu_nbd.log_size(tmp_path / "long.log") <= qemu_nbd.LOG_KEPT


def test_logs_that_cannot_be_tidied_are_left(tmp_path: Path, mounts: Mounts) -> None:
    qemu_nbd.tidy(tmp_path / "nowhere", set(), before=2000)
    small = mounts.small(tmp_path / "small", 4)
    for name in ("old.log", "long.log"):
        (small.at / name).write_bytes(b"y\n" * qemu_nbd.LOG_LIMIT)
        os.utime(small.at / name, (1000, 1000 if name == "old.log" else 5000))
    small.read_only()
    qemu_nbd.tidy(small.at, set(), before=2000)
    assert {one.name for one in small.at.iterdir()} == {"old.log", "long.log"}


def test_last_words_are_those_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old trouble\n")
    before = qemu_nbd.log_size(log)
    with log.open("a") as file:
        file.write("".join(f"line {number}\n" for number in range(9)))
    assert qemu_nbd.last_words(log, before).splitlines() == [f"line {n}" for n in range(4, 9)]
    assert qemu_nbd.last_words(tmp_path / "none") == ""


def test_a_missing_qemu_nbd_says_what_to_install() -> None:
    with pytest.raises(HostError, match="apt-get install qemu-utils"):
        qemu_nbd.find("/nowhere/qemu-nbd")


# -- files and secrets


def test_a_directory_means_its_yaml_below_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "sub/c.yaml", ".git/d.yaml", ".e.yaml", "f.txt", "g.yaml~"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [os.path.relpath(one.file, tmp_path) for one in files.texts([str(tmp_path)])]
    assert found == ["a.yml", "b.yaml", "sub/c.yaml"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x")
    assert len(files.texts([str(tmp_path), str(tmp_path / "a.yaml")])) == 1


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"vms: []")))
    (text,) = files.texts(["-"])
    assert (text.file, text.text) == ("<stdin>", "vms: []")


def test_secrets_by_file_variable_and_credential(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("hunter2\n")
    environment = {"PW": "hunter3", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    for ref, text in (
        (SecretRef("file", str(tmp_path / "pw")), "hunter2"),
        (SecretRef("env", "PW"), "hunter3"),
        (SecretRef("credential", "pw"), "hunter2"),
    ):
        assert files.secret(ref, environment).reveal() == text


@pytest.mark.parametrize(
    ("ref", "what"),
    [
        (SecretRef("file", "/nowhere/pw"), "No such file or directory"),
        (SecretRef("file", "/dev/null"), "it is empty"),
        (SecretRef("env", "NOT_SET"), "the variable NOT_SET is not set"),
        (SecretRef("credential", "pw"), "LoadCredential"),
    ],
)
def test_a_secret_that_cannot_be_read_says_why(ref: SecretRef, what: str) -> None:
    with pytest.raises(HostError, match=what):
        files.secret(ref, {})


def test_a_secret_does_not_show_itself() -> None:
    import json
    import pickle

    secret = Secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {[secret]}"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        json.dumps(secret)


def test_descriptors_that_we_inherit_are_not_passed_on() -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    qemu_nbd.close_inherited()
    assert not os.get_inheritable(writing)
    os.close(reading)
    os.close(writing)
