"""`reconciler doctor` on real processes, sockets and storage."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.doctor import document, exit_code
from reconciler.doctor import TRIAL, Doctor
from reconciler.host import proc
from reconciler.loop import load_settings
from tests.e2e.site import PASSWORD, Appliance, Site, until
from tests.e2e.watching import watching
from tests.mounts import Mounts
from tests.ports import Dealer

NBD = "/usr/bin/qemu-nbd"


def told(site: Site, *arguments: str, code: int | None = None) -> dict[str, dict[str, Any]]:
    """Id → check, by the command."""
    said = site.json("doctor", *arguments, code=code)
    assert said["format_version"] == "1.0"
    return {one["id"]: one for one in said["checks"]}


def found(site: Site, only: str, code: int | None = None) -> dict[str, dict[str, Any]]:
    """Id → check, without a process of its own for it."""
    settings = load_settings(str(site.folder / "reconciler.yaml"), {})
    checks = Doctor(settings, {}).checks(only.split(","))
    assert code is None or exit_code(checks) == code, checks
    return {one["id"]: one for one in document(settings.hub, checks)["checks"]}


def statuses(checks: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {id_: one["status"] for id_, one in checks.items()}


def wrapper(site: Site, body: str) -> str:
    """A program in the place of qemu-nbd."""
    path = site.folder / "bin" / "qemu-nbd"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nimport os, socket, sys, time\n{body}\n")
    path.chmod(0o755)
    site.write_config(qemu_nbd={"binary": str(path), "start_timeout": "2s", "stop_grace": "1s"})
    return str(path)


RUN = f"os.execv('{NBD}', ['qemu-nbd', *sys.argv[1:]])"


def everything(folder: Path) -> list[tuple[str, int]]:
    """Every path below a folder, with what tells that it was written."""
    return sorted(
        (str(path), path.stat().st_mtime_ns if path.is_file() else 0)
        for path in folder.rglob("*")
        if path.name != "stderr"
    )


def trials(pid: int) -> list[int]:
    """The trial servers of one doctor."""
    whose = f"{TRIAL} {pid} "
    return [
        one.identity.pid
        for one in proc.processes(TRIAL.encode())
        if any(word.startswith(whose) for word in one.argv)
    ]


def test_a_hub_that_is_well_is_told_so_and_left_as_it_is(
    site: Site, appliance: Appliance, tmp_path: Path
) -> None:
    site.inventory({"ctx-1": {2000: 1 << 20, 2001: 1 << 20}})
    site.spec(site.vm("ctx-1", [1 << 20, 1 << 20]))
    site.apply()
    own = tmp_path / "tmp"
    own.mkdir()
    before, servers = everything(tmp_path), site.servers()
    out = site.run("doctor", TMPDIR=str(own))
    assert " failed" not in out
    assert everything(tmp_path) == before
    assert site.servers() == servers
    assert appliance.starts() and len(appliance.starts()) == 1
    checks = told(site, code=0)
    assert checks["qemu.serves"]["status"] == "ok"
    assert "on its own socket only" in checks["qemu.serves"]["observed"]
    assert "8 free, 2 in use by this hub" in checks["ports.free"]["observed"]
    assert checks["repository.local.writes"]["status"] == "ok"
    assert "2 disks" in checks["inventory"]["observed"]
    assert checks["sna.site-a"]["observed"].startswith(f"GET {appliance.url}/api/v1/health: 200")
    assert PASSWORD not in str(checks)


def test_it_works_beside_a_daemon_and_knows_what_is_the_daemons(
    site: Site, appliance: Appliance
) -> None:
    site.inventory({"ctx-1": {2000: 1 << 20}})
    site.spec(site.vm("ctx-1"))
    with watching(site) as daemon:
        until(lambda: site.servers(), "a server")
        checks = told(site, code=0)
    assert f"pid {daemon.pid}" in checks["daemon"]["observed"]
    assert "not a systemd service" in checks["daemon"]["observed"]
    assert "which is ours" in checks["api"]["observed"]
    assert f"the daemon (pid {daemon.pid})" in checks["limits.files"]["observed"]
    assert checks["ports.free"]["status"] == "ok"
    assert "held by pid" in checks["state.lock"]["observed"]


def test_a_socket_that_the_daemon_keeps_for_a_dead_server_is_ours(
    site: Site, appliance: Appliance
) -> None:
    path = wrapper(site, RUN)
    site.spec(site.vm("ctx-1"))
    with watching(site) as daemon:
        until(lambda: site.servers(), "a server")
        Path(path).write_text("#!/bin/sh\nexit 1\n")
        site.kill(next(iter(site.servers())).pid)
        until(lambda: daemon.said("StartFailed"), "a start that fails")
        assert site.listening()
        checks = found(site, "ports", code=0)
    assert checks["ports.free"]["status"] == "ok", checks
    assert "9 free, 1 in use by this hub" in checks["ports.free"]["observed"]


@pytest.mark.parametrize(
    "options", [{"cache": "none", "aio": "native"}, {"cache": "writethrough", "discard": "unmap"}]
)
def test_the_options_of_the_config_are_what_is_tried(site: Site, options: dict[str, str]) -> None:
    log = site.folder / "argv"
    wrapper(site, f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10)); {RUN}")
    site.write_config(qemu_nbd={**site.config["qemu_nbd"], **options})
    checks = found(site, "qemu")
    assert checks["qemu.serves"]["status"] == "ok", checks
    tried = log.read_text().splitlines()[-1]
    for name, value in options.items():
        assert f"--{name} {value}" in tried
        assert f"--{name}={value}" in checks["qemu.serves"]["observed"]


def test_another_address_for_exports_is_what_is_bound(site: Site) -> None:
    site.write_config(ports={**site.config["ports"], "bind": "127.0.0.2"})
    with socket.create_server(("127.0.0.1", site.ports[3])):  # in nobody's way
        checks = found(site, "qemu,ports", code=0)
    assert checks["ports.free"]["observed"].endswith("on 127.0.0.2: 10 free, 0 in use by this hub")
    assert checks["qemu.serves"]["status"] == "ok"
    site.write_config(ports={**site.config["ports"], "bind": "192.0.2.1"})
    assert "no such address" in found(site, "ports", code=1)["ports.free"]["fix"]


def test_a_server_that_listens_elsewhere_too_is_found_out(site: Site, dealer: Dealer) -> None:
    port = dealer.deal(1)[0]
    wrapper(
        site,
        "if sys.argv[1] == '--version': print('qemu-nbd 0'); sys.exit()\n"
        f"s = socket.create_server(('127.0.0.1', {port})); s.set_inheritable(True)\n"
        "os.dup2(s.fileno(), 77)\n" + RUN,
    )
    checks = found(site, "qemu", code=1)
    assert checks["qemu.serves"]["status"] == "failed"
    assert f"127.0.0.1:{port}" in checks["qemu.serves"]["observed"]
    assert not trials(os.getpid())


def test_what_a_server_that_cannot_start_says_is_told(site: Site) -> None:
    wrapper(site, f"os.execv('{NBD}', ['qemu-nbd', '--aio=never', *sys.argv[1:]])")
    checks = found(site, "qemu", code=1)
    assert "qemu.serves" in checks or "never" in checks["qemu.nbd"]["observed"]
    wanted = checks.get("qemu.serves", checks["qemu.nbd"])
    assert wanted["status"] == "failed"
    assert "never" in wanted["observed"]
    assert wanted["fix"]


def test_without_qemu_nbd_it_says_how_to_get_it(site: Site) -> None:
    site.write_config(qemu_nbd={"binary": "/nowhere/qemu-nbd"})
    checks = found(site, "qemu", code=1)
    assert list(checks) == ["qemu.nbd"]
    assert "apt-get install qemu-utils" in checks["qemu.nbd"]["fix"]


def started(there: Path) -> int:
    """The pid that a wrapper has written down."""
    return int(until(lambda: (there.read_text() or None) if there.exists() else None, "it"))


def test_a_signal_in_the_middle_leaves_nothing(site: Site) -> None:
    own = site.folder / "tmp"
    own.mkdir()
    there = site.folder / "there"
    wrapper(
        site,
        "if sys.argv[1] == '--version': print('qemu-nbd 0'); sys.exit()\n"
        f"open({str(there)!r}, 'w').write(str(os.getpid())); time.sleep(60)",
    )
    process = site.start("doctor", "--only", "qemu", TMPDIR=str(own))
    pid = started(there)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(own.iterdir()) == []
    assert proc.identify(pid) is None


def test_what_a_killed_doctor_left_is_ended_by_the_next(site: Site) -> None:
    there = site.folder / "there"
    path = wrapper(
        site,
        "if sys.argv[1] == '--version': print('qemu-nbd 0'); sys.exit()\n"
        f"open({str(there)!r}, 'w').write(str(os.getpid())); time.sleep(600)",
    )
    own = site.folder / "tmp"
    own.mkdir()
    first = site.start("doctor", "--only", "qemu", TMPDIR=str(own))
    pid = started(there)
    first.kill()
    first.communicate(timeout=60)
    Path(path).write_text(f"#!{sys.executable}\nimport os, sys\n{RUN}\n")
    assert len(list(own.iterdir())) == 1
    assert " failed" not in site.run("doctor", "--only", "qemu", TMPDIR=str(own))
    until(lambda: proc.identify(pid) is None, "the end of what was left")
    assert list(own.iterdir()) == []


def test_who_holds_a_port_of_the_range_is_named(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.ports[3])):
        checks = found(site, "ports", code=0)
    taken = checks["ports.free"]
    assert taken["status"] == "warning"
    assert f"(pid {os.getpid()}) on 127.0.0.1:{site.ports[3]}" in taken["observed"]
    assert "9 free" in taken["observed"]


def test_a_connection_that_goes_out_of_a_port_is_seen(site: Site) -> None:
    """The kernel gives such ports away, where the range is not kept from it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as far,
        socket.socket() as near,
    ):
        near.bind(("127.0.0.1", site.ports[2]))
        near.connect(far.getsockname())
        taken = found(site, "ports", code=0)["ports.free"]
    assert taken["status"] == "warning"
    assert f"{site.ports[2]}: Address already in use: a connection of" in taken["observed"]
    assert f"(pid {os.getpid()})" in taken["observed"]


def test_a_range_that_the_kernel_gives_away_is_told_with_the_line_to_type(site: Site) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    site.write_config(ports={"range": f"{first - 2}-{first + 3}"})
    one = found(site, "ports")["ports.ephemeral"]
    assert one["status"] == "warning"
    assert one["observed"].startswith("4 of them")
    assert "sysctl -w net.ipv4.ip_local_reserved_ports=" in one["fix"]
    assert f"{first - 2}-{first + 3}" in one["fix"]


def test_a_vm_with_more_disks_than_ports_fails(site: Site) -> None:
    site.inventory({"ctx-1": {2000 + i: 1 << 20 for i in range(11)}})
    one = found(site, "ports", code=1)["ports.enough"]
    assert one["status"] == "failed"
    assert "ctx-1 has 11 disks" in one["observed"]


def test_a_repository_that_is_no_directory_fails(site: Site) -> None:
    (site.folder / "repository").write_text("")
    checks = found(site, "repository", code=1)
    assert checks["repository.local.directory"]["status"] == "failed"


def test_a_full_and_a_read_only_repository(site: Site, mounts: Mounts) -> None:
    small = mounts.small(site.folder / "repository", 8)
    checks = found(site, "repository", code=0)
    assert checks["repository.local.space"]["status"] == "warning"
    assert checks["repository.local.filesystem"]["status"] == "warning"  # tmpfs
    assert checks["repository.local.writes"]["status"] == "ok"
    small.fill(0)
    checks = found(site, "repository", code=1)
    assert "No space left on device" in checks["repository.local.writes"]["observed"]
    small.read_only()
    checks = found(site, "repository", code=1)
    assert "read-only" in checks["repository.local.writes"]["observed"]
    assert "remount,rw" in checks["repository.local.writes"]["fix"]


def test_storage_or_an_appliance_that_hangs_is_a_line_and_not_a_hang(
    site: Site, hangable: Mounts
) -> None:
    far = site.folder / "far"
    far.mkdir()
    roots = {"local": {"root": "repository"}, "far": {"root": str(far)}}
    site.write_config(repositories=roots)
    site.write_config(state=str(far / "state"))
    hangable.hung(far)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        site.write_config(snas={"mute": {"url": f"http://127.0.0.1:{mute.getsockname()[1]}"}})
        checks = told(site, code=1)
    assert "no answer in time" in checks["sna.mute"]["observed"]
    assert f"no answer from the storage of {far}" in checks["repository.far.directory"]["observed"]
    assert checks["repository.local.directory"]["status"] == "warning"
    assert checks["qemu.serves"]["status"] == "ok"
    assert f"no answer from the storage of {far}/state" in checks["state.directory"]["observed"]
    assert checks["daemon"]["status"] == "unknown"
    assert not [one for one in checks.values() if "no answer within 25 s" in one["observed"]]


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def closing_at_once() -> Iterator[str]:
    """A tunnel with nothing behind it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close_all() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=close_all)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_how_an_appliance_does_not_speak_is_told_apart(site: Site, dealer: Dealer) -> None:
    nobody = f"http://127.0.0.1:{dealer.deal(1)[0]}"
    with (
        answering(503) as ill,
        answering(401) as shut,
        closing_at_once() as empty,
    ):
        urls = {
            "refused": nobody,
            "closed": empty,
            "ill": ill,
            "shut": shut,
        }
        site.write_config(snas={name: {"url": url} for name, url in urls.items()})
        checks = found(site, "sna", code=1)
    said = {id_.removeprefix("sna."): one["observed"] for id_, one in checks.items()}
    assert {one["status"] for one in checks.values()} == {"failed"}
    assert "connection refused" in said["refused"]
    assert "a tunnel with nothing behind it" in said["closed"]
    assert "503" in said["ill"]
    assert "401" in said["shut"]


def test_each_secret_is_read_and_none_is_shown(site: Site, appliance: Appliance) -> None:
    token = {"token": {"env": "TOKEN_OF_THE_SNA"}}
    site.appliance_at(appliance.url, **token)
    checks = found(site, "secrets", code=1)
    assert statuses(checks) == {"secrets.vcenter.vc1": "ok", "secrets.sna.site-a": "failed"}
    assert "set TOKEN_OF_THE_SNA" in checks["secrets.sna.site-a"]["fix"]
    out = site.run("doctor", "--only", "secrets,sna", TOKEN_OF_THE_SNA="s3cret-token")
    assert "s3cret-token" not in out
    (site.folder / "password").unlink()
    checks = found(site, "secrets", code=1)
    assert checks["secrets.vcenter.vc1"]["status"] == "failed"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("x" * 15,), "cannot use token t0 of `api`.*it has 15 characters"),
        (("x" * 20, "x" * 20), "cannot use token t1 of `api`.*it is the same as t0's"),
        ((None,), "t0.*No such file"),
        (("x" * 19 + " x",), "cannot use token t0 of `api`.*no client can send"),
    ],
)
def test_the_tokens_of_the_api_are_read_as_the_daemon_reads_them(
    site: Site, texts: tuple[str | None, ...], said: str
) -> None:
    for number, text in enumerate(texts):
        if text:
            (site.folder / f"t{number}").write_text(text)
    names = [f"t{number}" for number in range(len(texts))]
    tokens = [{"name": one, "token": {"file": one}, "scopes": ["read"]} for one in names]
    site.write_config(api={"tokens": tokens})
    access = found(site, "api")["api.access"]
    assert access["status"] == "failed"
    assert re.search(said, access["observed"]), access
    assert "x" * 15 not in str(access)
    for one in names:
        (site.folder / one).write_text(f"a-token-that-is-long-{one}")
    access = found(site, "api")["api.access"]
    assert (access["status"], names[0] in access["observed"]) == ("ok", True)


def test_a_stranger_at_the_address_for_callbacks(site: Site) -> None:
    checks = found(site, "api", code=0)
    assert statuses(checks) == {"api": "ok", "api.access": "ok"}
    assert "no token is asked for" in checks["api.access"]["observed"]
    with socket.create_server(("127.0.0.1", site.api)):
        one = found(site, "api", code=1)["api"]
    assert f"(pid {os.getpid()})" in one["observed"]


def test_a_damaged_store_and_one_of_another_hub(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    assert found(site, "state", code=0)["state.store"]["status"] == "ok"
    site.write_config(hub="another")
    one = found(site, "state", code=1)["state.store"]
    assert f"write `hub: {site.hub}`" in one["fix"]
    site.write_config(hub=site.hub)
    store = site.folder / "state" / "state.db"
    data = bytearray(store.read_bytes())
    data[8192:] = b"\xff" * len(data[8192:])
    store.write_bytes(data)
    one = found(site, "state", code=1)["state.store"]
    assert one["status"] == "failed"
    assert "damaged" in one["observed"] or "malformed" in one["observed"]


def test_a_clock_before_what_was_written_down(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    assert statuses(found(site, "clock"))["clock"] != "failed"
    with closing(sqlite3.connect(site.folder / "state" / "state.db")) as db, db:
        db.execute("UPDATE events SET last = last + 86400")
    one = found(site, "clock", code=1)["clock"]
    assert "before the newest thing written in the store" in one["observed"]


def test_a_state_directory_that_others_may_write(site: Site) -> None:
    state = site.folder / "state"
    state.mkdir()
    state.chmod(0o777)
    one = found(site, "state", code=0)["state.owner"]
    assert one["fix"] == f"chmod 700 {state}"
    assert stat.S_IMODE(state.stat().st_mode) == 0o777


def test_a_config_that_cannot_be_read_is_78_and_the_rest_is_tried(site: Site) -> None:
    (site.folder / "reconciler.yaml").write_text("hubb: x\n")
    told_all = site.json("doctor", code=78)
    checks = {one["id"]: one for one in told_all["checks"]}
    assert told_all["hub"] is None
    assert "reconciler.yaml:1:1" in checks["config"]["observed"]
    assert "not tried without it: ports, repository" in checks["config"]["observed"]
    assert checks["qemu.serves"]["status"] == "ok"
    assert not [id_ for id_ in checks if id_.startswith(("ports", "repository", "state", "sna"))]


def test_a_group_that_is_not_there_is_a_usage_error(site: Site) -> None:
    assert "did you mean 'ports'?" in site.run("doctor", "--only", "port", code=64)


def test_a_kernel_that_lets_too_few_files_open(site: Site, appliance: Appliance) -> None:
    line = [sys.executable, "-m", "reconciler", "doctor", "--only", "limits"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 80; exec "$0" "$@"', *line],
        cwd=site.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "may have 80, and 10 exports need 104" in done.stdout
