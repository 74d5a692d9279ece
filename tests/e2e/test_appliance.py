"""The reference node appliance: it really copies, and it misbehaves exactly as told."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

APPLIANCE: Final = Path(__file__).parents[2] / "examples" / "node-appliance" / "appliance.py"
PASSWORD: Final = "s3cret-of-the-vcenter"
MIB: Final = 1 << 20
PATIENCE: Final = 10.0
"""How long a test waits for what must come. Seconds. Chosen: far above what is needed."""

Json = dict[str, Any]
Seen = TypeVar("Seen")


def wait_for(look: Callable[[], Seen], what: str) -> Seen:
    """Look until there is something to see."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if seen := look():
            return seen
        time.sleep(0.01)
    raise AssertionError(f"never saw {what}")


@dataclass
class Node:
    """A running appliance."""

    process: subprocess.Popen[str]
    port: int
    folder: Path

    def connect(self, timeout: float = PATIENCE) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Json | bytes | None = None, timeout: float = PATIENCE
    ) -> tuple[int, str]:
        """Send one request on a connection of its own; the status and the body that come back."""
        data = json.dumps(body) if isinstance(body, dict) else body
        with contextlib.closing(self.connect(timeout)) as connection:
            connection.request(method, path, data, {"Idempotency-Key": "key-1"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def post(self, body: Json | bytes, timeout: float = PATIENCE) -> tuple[int, str]:
        return self.ask("POST", "/api/v1/backup/start", body, timeout)

    def control(self, misbehave: str, times: int | None = None) -> None:
        status, text = self.ask("PUT", "/_control", {"misbehave": misbehave, "times": times})
        assert status == 200, text

    def status(self, job_id: str) -> Json:
        status, text = self.ask("GET", f"/api/v1/status/{job_id}")
        return json.loads(text) if status == 200 else {"status": status}

    def ended(self, job_id: str) -> Json:
        """Wait for a job's end; its last status."""
        ends = {"completed", "failed"}
        wait_for(lambda: self.status(job_id)["status"] in ends, f"the end of {job_id}")
        return self.status(job_id)

    def lines(self) -> list[Json]:
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]

    def events(self, name: str, job_id: str) -> list[Json]:
        """The log lines of one kind about one job."""
        return [line for line in self.lines() if (line["event"], line["job_id"]) == (name, job_id)]

    def end(self, job_id: str) -> Json:
        """Wait for the log line of a job's end, which comes just after the status says so."""
        (line,) = wait_for(lambda: self.events("end", job_id), f"{job_id} end in the log")
        return line

    def children(self) -> set[int]:
        return {
            int(stat.parent.name)
            for stat in Path("/proc").glob("[0-9]*/stat")
            if (text := read(stat)) and int(text.rpartition(")")[2].split()[1]) == self.process.pid
        }


def read(path: Path) -> str:
    """Read a file of /proc; "" if its process is gone."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[Node]:
    """Run an appliance with its sources, log and stderr in `folder`."""
    (folder / "sources").mkdir(exist_ok=True)
    files = [f"--{name}={folder / name}" for name in ("sources", "log", "port-file")]
    command = [sys.executable, str(APPLIANCE), "--listen=127.0.0.1:0", *files, *options]
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()  # ends with the process, too
            port = int((folder / "port-file").read_text())
            assert line == f"node appliance listening on http://127.0.0.1:{port}\n"
            yield Node(process, port, folder)
        finally:
            process.terminate()
            process.wait(PATIENCE)


@dataclass
class Export:
    """A source disk, and a real qemu-nbd that serves the empty qcow2 it is to arrive in."""

    server: subprocess.Popen[bytes]
    port: int
    source: Path
    image: Path
    target: str  # its pair of the targets string

    def differs(self) -> str:
        """Compare source and image, bit for bit, once nobody serves the image; "" if the same."""
        self.server.terminate()
        self.server.wait(PATIENCE)
        command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2"]
        files = [str(self.source), str(self.image)]
        done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def clients(self) -> int:
        """Connections that the server has accepted. Source: proc_net(5), state 01."""
        rows = map(str.split, read(Path("/proc/net/tcp")).splitlines())
        return sum(row[1].endswith(f":{self.port:04X}") and row[3] == "01" for row in rows)


Exporter = Callable[..., Export]


@contextlib.contextmanager
def exporting(folder: Path) -> Iterator[Exporter]:
    """Deal exports whose sources are in `folder`, where the appliance looks for them."""
    with contextlib.ExitStack() as stack:

        def export(key: str, position: int, size: int = 4 * MIB, server_size: int = 0) -> Export:
            source = folder / "sources" / "pgtest1" / f"{key}.raw"
            source.parent.mkdir(parents=True, exist_ok=True)
            if size:
                source.write_bytes(os.urandom(size // 2))
                os.truncate(source, size)  # the other half is a hole
            image, name = folder / f"{key}.qcow2", f"ctx-run-disk{position}"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", str(image)]
            subprocess.run([*create, str(server_size or size)], check=True)
            # The OS deals the port; qemu-nbd gets the listener as fd 3 (socket activation).
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
                serve = ["-t", "-e", "10", "-x", name, "-f", "qcow2", str(image)]
                server = stack.enter_context(activated(listener, serve))
            target = f"{key}:nbd://127.0.0.1:{port}/{name}"
            return Export(server, port, source, image, target)

        yield export


@contextlib.contextmanager
def activated(listener: socket.socket, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run qemu-nbd on a listener. LISTEN_PID is its own pid, which only the shell can know."""
    script = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd "$@"'
    command = ["sh", "-c", script, "sh", *arguments]
    with subprocess.Popen(command, stdin=listener.fileno(), stderr=subprocess.DEVNULL) as server:
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Exporter]:
    with exporting(tmp_path) as deal:
        yield deal


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Export]]:
    """One appliance and one export for the tests that look at answers alone."""
    folder = tmp_path_factory.mktemp("shared")
    with exporting(folder) as deal, running(folder) as started:
        yield started, deal("2000", 0)


def order(job_id: str, /, *targets: str, **changes: object) -> Json:
    """Compose a start request; a change to None takes the field out."""
    body = {
        "job_id": job_id,
        "vm_name": "pgtest1",
        "vcenter_host": "vcenter.example",
        "vcenter_user": "backup@vsphere.local",
        "vcenter_password": PASSWORD,
        "vm_path": "/DC1/vm/pgtest1",
        "nbd_targets": ",".join(targets),
        "backup_type": "full",
        "previous_change_id": "",
    }
    return {name: value for name, value in (body | changes).items() if value is not None}


# What it is for


class Hub(ThreadingHTTPServer):
    """A hub that notes what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Callbacks)
        self.heard: list[tuple[str, str, Json]] = []
        self.change_ids: dict[int, str] = {}
        """Position → what it says of a disk."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def completions(self, job_id: str) -> list[Json]:
        path = f"/api/v1/backups/{job_id}/complete"
        return [body for _, where, body in self.heard if where == path]


class Callbacks(BaseHTTPRequestHandler):
    """A request to it."""

    server: Hub

    def do_GET(self) -> None:
        self.server.heard.append(("GET", self.path, {}))
        position = int(self.path.rpartition("disk_id=")[2])
        self.reply({"change_id": self.server.change_ids.get(position, "")})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.append(("POST", self.path, body))
        self.reply({})

    def reply(self, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as found:
        threading.Thread(target=found.serve_forever, args=(0.05,)).start()
        try:
            yield found
        finally:
            found.shutdown()


def telemetry_of_both(heard: list[tuple[str, str, Json]]) -> list[Json]:
    """The posts that call the job completed, once there is one for each of two disks."""
    told = [body for _, path, body in heard if path == "/api/v1/telemetry/backup/job-1"]
    done = [body for body in told if body["status"] == "completed"]
    return done if len(done) == 2 else []


def test_two_disks_arrive_under_their_own_keys(tmp_path: Path, export: Exporter, hub: Hub) -> None:
    heard, hub.change_ids = hub.heard, {0: "before/1", 1: "before/1"}
    first, second = export("2000", 0, 8 * MIB), export("2016", 1, 4 * MIB)
    with running(tmp_path, f"--hub={hub.url}") as node:
        # The wire order is not the order of the keys: what counts is the name at each end.
        status, text = node.post(order("job-1", second.target, first.target))
        assert (status, json.loads(text)["job_id"]) == (200, "job-1")
        last = node.ended("job-1")
        _, progress = node.ask("GET", "/api/v1/progress/job-1")
        end = node.end("job-1")
        told = wait_for(lambda: telemetry_of_both(heard), "telemetry of both disks")
    assert first.differs() == second.differs() == ""
    assert (last["status"], last["progress_percent"]) == ("completed", 100)
    assert last["vm_path"] == "/DC1/vm/pgtest1"
    assert json.loads(progress)["bytes_transferred"] == 12 * MIB
    asked = {path for method, path, _ in heard if method == "GET"}
    assert asked == {f"/api/v1/backups/changeid?vm_name=pgtest1&disk_id={n}" for n in (0, 1)}
    done = hub.completions("job-1")
    sizes = {body["disk_id"]: body["bytes_transferred"] for body in done}
    assert (len(done), sizes) == (2, {0: 8 * MIB, 1: 4 * MIB})
    assert len({body["change_id"] for body in done} - {""}) == 2
    assert [disk["disk_index"] for disk in told[0]["disks"]] == [1, 0]
    telemetry = [body for _, path, body in heard if path.startswith("/api/v1/telemetry/")]
    assert {bool(body["disks"]) for body in telemetry if body["status"] == "running"} <= {False}
    assert {disk["previous"] for disk in end["disks"]} == {"before/1"}


def test_a_slow_copy_is_seen_half_way_and_tells_no_password(
    tmp_path: Path, export: Exporter
) -> None:
    disk = export("2000", 0, 16 * MIB)
    with running(tmp_path, "--slow=0.6") as node:
        began = time.monotonic()
        node.post(order("job-1", disk.target))
        wait_for(lambda: disk.image.stat().st_blocks * 512 > 3 * MIB, "the image grow")
        assert disk.clients() == 2
        assert node.status("job-1")["status"] == "running"
        argv = [read(Path(f"/proc/{pid}/cmdline")) for pid in (node.process.pid, *node.children())]
        assert len(argv) == 2
        assert node.ended("job-1")["status"] == "completed"
        assert time.monotonic() - began > 0.6
        node.end("job-1")
        (start,) = node.events("start", "job-1")
        answers = [node.ask("GET", f"/api/v1/{what}/job-1")[1] for what in ("status", "progress")]
    assert disk.differs() == ""
    sent = order("job-1", disk.target)
    fields = ("job_id", "vm_name", "nbd_targets", "backup_type", "previous_change_id")
    assert {name: start[name] for name in fields} == {name: sent[name] for name in fields}
    assert start["idempotency_key"] == "key-1"
    seen = [(tmp_path / name).read_text() for name in ("log", "stderr")]
    assert PASSWORD not in "".join([*argv, *answers, *seen])


def test_a_disk_without_a_source_fails_the_job_but_not_the_other_disk(
    node: Node, export: Exporter
) -> None:
    there, missing = export("2000", 0), export("2001", 1)
    missing.source.unlink()
    node.post(order("job-1", there.target, missing.target))
    last = node.ended("job-1")
    assert last["status"] == "failed"
    assert "cannot copy disk 2001: there is no source disk" in last["current_operation"]
    assert there.differs() == ""


def test_a_copy_that_nbdcopy_refuses_fails_with_its_last_line(node: Node, export: Exporter) -> None:
    small = export("2000", 0, 4 * MIB, server_size=2 * MIB)
    node.post(order("job-1", small.target))
    last = node.ended("job-1")
    assert last["status"] == "failed"
    assert "destination size is smaller than source size" in last["current_operation"]


def test_the_same_job_twice_is_two_writers(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    assert [node.post(order("twice", disk.target))[0] for _ in range(2)] == [200, 200]
    wait_for(lambda: len(node.events("end", "twice")) == 2, "both ends")
    first, second = node.events("start", "twice")
    assert first["n"] < second["n"]


def test_a_hub_that_is_not_there_is_complained_about_once(tmp_path: Path, export: Exporter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    disks = [export("2000", 0), export("2001", 1)]
    with running(tmp_path, f"--hub=http://127.0.0.1:{port}") as node:
        node.post(order("job-1", *(disk.target for disk in disks)))
        assert node.ended("job-1")["status"] == "completed"
    assert (tmp_path / "stderr").read_text().count("cannot report to the hub at") == 1


def test_health_and_the_call_share_a_connection(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    with contextlib.closing(node.connect()) as connection:
        connection.request("GET", "/api/v1/health")
        assert json.loads(connection.getresponse().read())["status"] == "healthy"
        kept = connection.sock
        body = json.dumps(order("kept", disk.target))
        connection.request("POST", "/api/v1/backup/start", body)
        assert connection.getresponse().read()
        assert connection.sock is kept
    assert node.ended("kept")["status"] == "completed"


# What it refuses

GOOD: Final = "2000:nbd://127.0.0.1:10100/a-disk0"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vcenter_password": None}, "vcenter_password is missing"),
        ({"vm_path": ""}, "vm_path is missing, empty"),
        ({"vm_name": 7}, "vm_name is missing, empty or not a string"),
        ({"vm_name": "../else"}, "vm_name is no folder name"),
        ({"job_id": "a/b"}, "job_id is not"),
        ({"job_id": "x" * 65}, "job_id is not"),
        ({"backup_type": "differential"}, "backup_type is neither"),
        ({"backup_type": "incremental"}, "previous_change_id is empty"),
        ({"previous_change_id": 4}, "previous_change_id is not a string"),
        ({"nbd_targets": "2000"}, "nbd_targets holds '2000'"),
        ({"nbd_targets": f"{GOOD},"}, "nbd_targets holds ''"),
        ({"nbd_targets": f"{GOOD}, {GOOD}"}, "nbd_targets holds ' 2000"),
        ({"nbd_targets": GOOD.replace("10100", "70000")}, "nbd_targets holds"),
        ({"nbd_targets": GOOD.replace("disk0", "d")}, "nbd_targets holds"),
        ({"nbd_targets": f"{GOOD},{GOOD.replace('disk0', 'disk1')}"}, "repeats a key"),
        ({"nbd_targets": f"{GOOD},{GOOD.replace('2000', '2001')}"}, "repeats a key, an export"),
    ],
)
def test_a_bad_start_is_answered_400_in_plain_text(
    shared: tuple[Node, Export], changes: Json, why: str
) -> None:
    node, _ = shared
    status, text = node.post(order("bad", GOOD, **changes))
    assert (status, text.startswith("cannot accept the start: ")) == (400, True)
    assert why in text
    assert PASSWORD not in text
    assert not node.events("start", "bad")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'"text"'])
def test_a_body_that_is_no_json_object_is_answered_400(
    shared: tuple[Node, Export], body: bytes
) -> None:
    node, _ = shared
    assert node.post(body) == (400, "cannot read the body: send one JSON object\n")


def test_what_is_not_served_is_not_found(shared: tuple[Node, Export]) -> None:
    node, _ = shared
    assert node.ask("GET", "/api/v1/status/nobody")[0] == 404
    assert node.ask("GET", "/api/v1/nothing")[0] == 404
    assert node.ask("POST", "/elsewhere", order("lost", GOOD))[0] == 404


@pytest.mark.parametrize(
    "body", [{"misbehave": "dance"}, {"misbehave": "die", "times": 0}, {"times": 1}]
)
def test_an_order_to_misbehave_that_makes_no_sense_is_refused(
    shared: tuple[Node, Export], body: Json
) -> None:
    node, _ = shared
    status, text = node.ask("PUT", "/_control", body)
    assert (status, text.startswith("cannot misbehave")) == (400, True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--sources=/nowhere"], "cannot start: /nowhere is no directory"),
        (["--sources=/", "--listen=127.0.0.1:{taken}"], "Address already in use"),
        (["--sources=/", "--listen=8081"], "cannot listen on '8081'"),
    ],
)
def test_it_says_why_it_cannot_start(options: list[str], why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [option.format(taken=taken.getsockname()[1]) for option in options]
        command = [sys.executable, str(APPLIANCE), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert why in done.stderr


# How it misbehaves


@pytest.mark.parametrize(
    ("mode", "answer", "started"),
    [
        ("refuse", 400, False),
        ("forbidden", 403, False),
        ("conflict", 409, False),
        ("redirect", 307, False),
        ("error-before", 500, False),
        ("error-after", 500, True),
        ("stranger", 200, False),
        ("answer-twice", 200, True),
        ("forget", 200, True),
        ("die", 200, True),
    ],
)
def test_an_answer_may_lie(
    shared: tuple[Node, Export], mode: str, answer: int, started: bool
) -> None:
    node, disk = shared
    node.control(mode, times=1)
    status, text = node.post(order(mode, disk.target))
    assert status == answer
    assert len(node.events("start", mode)) == started
    assert len(node.events("refused", mode)) == (not started)
    if mode == "stranger":
        assert json.loads(text)["job_id"] != mode
    if mode == "forget":
        assert node.status(mode)["status"] == 404
        assert node.end(mode)["status"] == "completed"
    if mode == "die":
        last = node.ended(mode)
        assert last["status"] == "failed"
        assert "nbdcopy was ended by signal 9" in last["current_operation"]
        assert not last["progress_percent"]
    if mode in {"error-after", "answer-twice"}:
        assert node.ended(mode)["status"] == "completed"
    assert node.post(order(f"after-{mode}", disk.target))[0] == 200  # it was for once
    assert node.ended(f"after-{mode}")["status"] == "completed"


@pytest.mark.parametrize(
    ("mode", "fault", "started"),
    [
        ("hang-before", TimeoutError, False),
        ("hang-after", TimeoutError, True),
        ("drop-before", http.client.RemoteDisconnected, False),
        ("drop-after", http.client.RemoteDisconnected, True),
    ],
)
def test_an_answer_may_never_come(
    shared: tuple[Node, Export], mode: str, fault: type[Exception], started: bool
) -> None:
    node, disk = shared
    node.control(mode, times=1)
    with pytest.raises(fault):
        node.post(order(mode, disk.target), timeout=0.3)
    assert len(node.events("start", mode)) == started
    assert node.ended(mode)["status"] == "completed" if started else not node.children()


@pytest.mark.parametrize(
    ("mode", "reported"), [("repeat", [0, 0, 0, 1, 1, 1]), ("one-disk", [0]), ("late", [0, 1])]
)
def test_a_report_may_come_again_or_late_or_never(
    tmp_path: Path, export: Exporter, hub: Hub, mode: str, reported: list[int]
) -> None:
    disks = [export("2000", 0), export("2001", 1)]
    with running(tmp_path, f"--hub={hub.url}", f"--misbehave={mode}") as node:
        node.post(order("job-1", *(disk.target for disk in disks)))
        if mode == "late":
            progress = "/api/v1/progress/job-1"
            wait_for(
                lambda: json.loads(node.ask("GET", progress)[1])["percent"] == 100, "the copies"
            )
            assert node.status("job-1")["status"] == "running"
            assert hub.completions("job-1") == []
            node.control("none")
        assert node.ended("job-1")["status"] == "completed"
        wait_for(lambda: len(hub.completions("job-1")) == len(reported), "the reports")
    told = hub.completions("job-1")
    assert sorted(body["disk_id"] for body in told) == reported
    assert len({body["change_id"] for body in told}) == len(set(reported))


def test_it_may_be_gone_half_way(tmp_path: Path, export: Exporter, hub: Hub) -> None:
    disk = export("2000", 0)
    with running(tmp_path, f"--hub={hub.url}", "--misbehave=crash") as node:
        assert node.post(order("job-1", disk.target))[0] == 200
        assert node.process.wait(PATIENCE) == -signal.SIGKILL
        wait_for(lambda: not disk.clients(), "the end of its copy")
        assert [line["event"] for line in node.lines()] == ["start"]
    assert hub.completions("job-1") == []


def test_two_answers_are_on_the_wire_for_one_start(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    node.control("answer-twice", times=1)
    body = json.dumps(order("wire", disk.target))
    head = f"POST /api/v1/backup/start HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", node.port), PATIENCE) as wire:
        wire.sendall((head + body).encode())
        wire.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(lambda: wire.recv(4096), b""))
    assert len(re.findall(rb"^HTTP/1.1 200 ", answers, re.MULTILINE)) == 2
    assert answers.count(b'"job_id": "wire"') == 2
    assert len(node.events("start", "wire")) == 1


def test_a_redirect_leads_nowhere(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    node.control("redirect", times=1)
    with contextlib.closing(node.connect()) as connection:
        connection.request("POST", "/api/v1/backup/start", json.dumps(order("moved", disk.target)))
        answer = connection.getresponse()
        answer.read()
    assert (answer.status, answer.headers["Location"]) == (307, "/elsewhere")


def test_it_forgets_the_jobs_it_knew(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    node.post(order("known", disk.target))
    assert node.ended("known")["status"] == "completed"
    node.control("forget")
    node.control("none")
    assert node.status("known")["status"] == 404


def test_it_may_be_unhealthy_and_still_take_a_start(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    node.control("unhealthy", times=2)
    answers = [node.ask("GET", "/api/v1/health")[0], node.post(order("ill", disk.target))[0]]
    answers += [node.ask("GET", "/api/v1/health")[0] for _ in range(2)]
    assert answers == [503, 200, 503, 200]
    node.ended("ill")


def test_every_connection_is_closed_until_a_signal(shared: tuple[Node, Export]) -> None:
    node, disk = shared
    with contextlib.closing(node.connect()) as kept:
        kept.request("GET", "/api/v1/health")
        kept.getresponse().read()
        node.control("close-all")
        with pytest.raises(ConnectionError):  # a new one
            node.ask("GET", "/api/v1/health")
        kept.request("POST", "/api/v1/backup/start", json.dumps(order("deaf", disk.target)))
        with pytest.raises(ConnectionError):  # and one from before
            kept.getresponse()
    node.process.send_signal(signal.SIGUSR1)

    def healthy() -> bool:
        with contextlib.suppress(ConnectionError):
            return node.ask("GET", "/api/v1/health")[0] == 200
        return False

    wait_for(healthy, "health after SIGUSR1")
    assert not node.events("start", "deaf")


# How it ends


def test_sigterm_ends_it_at_once_and_leaves_no_child(tmp_path: Path, export: Exporter) -> None:
    disks = [export("2000", 0), export("2001", 1)]
    with running(tmp_path, "--slow=30", "--misbehave=hang-after") as node:
        with pytest.raises(TimeoutError):
            node.post(order("job-1", *(disk.target for disk in disks)), timeout=0.2)
        wait_for(lambda: [disk.clients() for disk in disks] == [2, 2], "both copies at work")
        children = node.children()
        assert len(children) == 2
        began = time.monotonic()
        node.process.terminate()
        assert node.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 1.0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert node.end("job-1")["status"] == "failed"


def test_after_a_restart_jobs_are_forgotten_and_log_numbers_go_on(
    tmp_path: Path, export: Exporter
) -> None:
    disk = export("2000", 0)
    with running(tmp_path) as node:
        node.post(order("job-1", disk.target))
        ends = [node.end("job-1")]
    with running(tmp_path) as node:
        assert node.status("job-1")["status"] == 404
        node.post(order("job-2", disk.target))
        ends += [node.end("job-2")]
    assert [end["n"] for end in ends] == [2, 4]
