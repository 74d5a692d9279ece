"""What a shell completes: asked as shells ask, and in real shells."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from reconciler.cli.completing import MOST, answer
from reconciler.cli.completion import SCRIPTS
from reconciler.core.places import state_directory
from reconciler.host.store import Store

CONFIG = "hub: h\nstate: hub-state   # of this hub\n"
SPECS = """\
vars: {name: no-vm}
vms:
  - name: ctx-new
    vm: {name: pgtest1}
  - {name: "ctx-flow", state: absent}
  - name: "ctx-{{ item }}"
    loop: [1]
  - state: absent
    name: ctx-last
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a config, specs, and a store that knows some VMs and runs."""
    (tmp_path / "reconciler.yaml").write_text(CONFIG)
    (tmp_path / "specs" / "sub").mkdir(parents=True)
    (tmp_path / "specs" / "sub" / "vms.yaml").write_text(SPECS)
    state = tmp_path / "hub-state"
    state.mkdir()
    store = Store(state, "h")
    store.apply({}, {name: {"name": name} for name in ("ctx-1", "ctx-2", "db-1")}, 1.0)
    store.close()
    binary = tmp_path / "bin" / "reconciler"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m reconciler "$@"\n')
    binary.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("RECONCILER_CONFIG", "RECONCILER_STATE", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    return tmp_path


def offered(*words: str, shell: str = "bash") -> list[str]:
    kind, *found = answer(shell, words, os.environ).splitlines()
    return found if kind == "words" else [f"<{kind}>"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["st"], ["stop", "status", "state"]),
        (["status", "ctx-1"], ["ctx-1"]),
        (["status", "d"], ["db-1"]),
        (["status", ""], ["ctx-1", "ctx-2", "ctx-flow", "ctx-last", "ctx-new", "db-1"]),
        (["status", "ctx-1", "ctx-"], ["ctx-2", "ctx-flow", "ctx-last", "ctx-new"]),
        (["explain", "ctx-1", ""], []),
        (["apply", "--te"], ["--textfile"]),
        (["apply", "-o", ""], ["text", "json"]),
        (["apply", "--output", "=", "j"], ["json"]),
        (["apply", "--output", "="], ["text", "json"]),
        (["apply", "-f", "spe"], ["<files>"]),
        (["--config", ""], ["<files>"]),
        (["--config", "other.yaml", "hist"], ["history"]),
        (["watch", ""], ["<dirs>"]),
        (["state", ""], ["backup", "info", "restore"]),
        (["state", "backup", ""], ["<files>"]),
        (["render", "s"], ["sshd", "systemd"]),
        (["wait", "ctx-1", "--for", "R"], ["Ready"]),
        (["stop", "--", "-"], []),
        (["stop", "-y", "db"], ["db-1"]),
        (["schema", ""], ["spec", "config", "inventory"]),
        (["completion", "z"], ["zsh"]),
        (["nonsense", ""], []),
        (["status", "'ctx-2"], ["ctx-2"]),
    ],
)
def test_what_is_offered(place: Path, words: list[str], found: list[str]) -> None:
    assert offered(*words) == found


def test_zsh_and_fish_are_told_what_words_mean(place: Path) -> None:
    assert (
        "status\tWhat was applied last, against what really runs" in offered("sta", shell="zsh")[0]
    )
    assert offered("apply", "--output=j", shell="fish") == ["--output=json"]
    assert offered("apply", "--output=j", shell="zsh") == ["json"]


def test_the_specs_that_are_named_are_looked_through(place: Path) -> None:
    (place / "other.yaml").write_text("vms:\n- name: zzz\n")
    assert offered("backup", "-f", "other.yaml", "z") == ["zzz"]
    assert offered("backup", "z") == []


def test_the_state_directory_is_the_one_of_the_command(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "empty.yaml").write_text("state: nowhere\n")
    assert "db-1" not in offered("status", "--config", "empty.yaml", "")
    monkeypatch.setenv("RECONCILER_STATE", "hub-state")
    assert "db-1" in offered("status", "--config", "empty.yaml", "")
    assert state_directory(None, os.environ, root=True) == "hub-state"


def test_runs_are_offered_the_newest_first(place: Path) -> None:
    import sqlite3

    with contextlib.closing(sqlite3.connect(place / "hub-state" / "state.db")) as db, db:
        for created, run in enumerate(("monday", "tuesday", "wednesday")):
            db.execute(
                "INSERT INTO calls (hub, vm, run, attempt, state, job_id, sna, type, request, "
                "exports, created, changed, reason, message) VALUES "
                "('h', 'ctx-1', ?, 1, 'COMPLETED', ?, 's', 'full', '', '[]', ?, 0, '', '')",
                (run, run, created),
            )
    assert offered("wait", "ctx-1", "--run", "") == ["wednesday", "tuesday", "monday"]
    assert offered("wait", "ctx-1", "--run", "m") == ["monday"]
    assert offered("wait", "ctx-2", "--run", "") == []


def test_nothing_is_written_and_nothing_is_said_where_there_is_nothing(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(place.rglob("*"))
    offered("status", "")
    assert sorted(place.rglob("*")) == before
    (place / "hub-state" / "state.db").write_bytes(b"no database" * 100)
    assert "ctx-new" in offered("status", "")
    monkeypatch.chdir(tmp_path_factory.mktemp("bare"))
    monkeypatch.setenv("RECONCILER_STATE", "nowhere")
    assert offered("status", "") == []


def test_ten_thousand_vms_are_not_all_told(place: Path) -> None:
    store = Store(place / "hub-state", "h")
    store.apply({}, {f"vm-{n:05}": {"name": f"vm-{n:05}"} for n in range(10_000)}, 1.0)
    store.close()
    assert len(offered("status", "vm-")) == MOST
    assert offered("status", "vm-09999") == ["vm-09999"]


def test_it_loads_next_to_nothing(place: Path) -> None:
    """A Tab costs little more than Python itself."""
    code = (
        "import json, os, sys\nbefore = set(sys.modules)\nimport re, sqlite3\n"
        "known = set(sys.modules)\nfrom reconciler.cli.completing import answer\n"
        "answer('bash', ['status', ''], os.environ)\n"
        "print(json.dumps(sorted(set(sys.modules) - known)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(json.loads(done.stdout))
    assert {name.split(".")[0] for name in found} <= {
        "__future__",
        "_typing",
        "reconciler",
        "typing",
    }
    assert len(found) < 20, sorted(found)


# -- real shells


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, line: Sequence[str], folder: Path, prompt: str) -> None:
        self.prompt = prompt
        self.seen = ""
        environment = {**os.environ, "TERM": "dumb", "PS1": prompt, "HOME": str(folder)}
        pid, self.fd = pty.fork()
        if pid == 0:  # pragma: no cover
            os.chdir(folder)
            os.execvpe(line[0], list(line), environment)
        self.pid = pid

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, wanted: str, seconds: float = 30.0) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(wanted, self.seen):
            left = deadline - time.monotonic()
            assert left > 0, f"never {wanted!r} in {self.seen!r}"
            if select.select([self.fd], [], [], min(left, 0.5))[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        found, self.seen = self.seen, ""
        return found

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


@contextlib.contextmanager
def terminal(line: Sequence[str], folder: Path, prompt: str) -> Iterator[Terminal]:
    if shutil.which(line[0]) is None:
        pytest.skip(f"{line[0]} is not installed")
    one = Terminal(line, folder, prompt)
    try:
        yield one
    finally:
        one.end()


def test_bash_completes(place: Path) -> None:
    (place / "completion.bash").write_text(SCRIPTS["bash"])
    with terminal(["bash", "--norc", "--noprofile", "-i"], place, "READY> ") as bash:
        bash.until("READY> ")
        bash.type("source completion.bash; echo lo''aded\n")
        bash.until("loaded")
        bash.type("echo reconciler hist\b\b\b\b\x15")  # an empty line again
        bash.type("reconciler hist\t")
        bash.until("reconciler history ")
        bash.type("db\t")
        bash.until("db-1 ")
        bash.type("-o js\t")
        bash.until("json ")
        bash.type("\x15reconciler apply --output=js\t")
        bash.until("--output=json ")
        bash.type("\x15reconciler validate -f reconciler.y\t")
        bash.until(r"reconciler\.yaml ")


def test_zsh_completes(place: Path) -> None:
    (place / "functions").mkdir()
    (place / "functions" / "_reconciler").write_text(SCRIPTS["zsh"].lstrip("\n"))
    with terminal(["zsh", "-f", "-i"], place, "READY> ") as zsh:
        zsh.until("READY> ")
        zsh.type("fpath=($PWD/functions $fpath); autoload -U compinit; compinit -u -D\n")
        zsh.type("echo lo''aded\n")
        zsh.until("loaded")
        zsh.type("reconciler hist\t")
        zsh.until("ory ")
        zsh.type("db\t")
        zsh.until("-1 ")
        zsh.type("-o js\t")
        zsh.until("on ")
        zsh.type("\x15reconciler apply --output=js\t")
        zsh.until("on ")


def test_fish_completes(place: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    script = place / "reconciler.fish"
    script.write_text(SCRIPTS["fish"])

    def completed(line: str) -> list[str]:
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
            capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(place)},
        )  # fmt: skip
        assert done.stderr == ""
        return [found.split("\t")[0] for found in done.stdout.splitlines()]

    assert completed("reconciler hist") == ["history"]
    assert completed("reconciler status db") == ["db-1"]
    assert completed("reconciler apply -o js") == ["json"]
    assert completed("reconciler apply --output=js") == ["--output=json"]
    assert completed("reconciler validate -f reconciler.y") == ["reconciler.yaml"]
    assert "ctx-2" in completed("reconciler status ")


def test_the_scripts_are_sound(place: Path) -> None:
    for shell in SCRIPTS:
        if shutil.which(shell):
            path = place / f"script.{shell}"
            path.write_text(SCRIPTS[shell])
            subprocess.run([shell, "-n", str(path)], check=True)
