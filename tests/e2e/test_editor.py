"""Editors and other programs with our schemas: check-jsonschema, and yaml-language-server over LSP.

The language server comes from npm, about 25 MB: `make soak` fetches it where `npm` is installed.
RECONCILER_NPM names a directory that has it already.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "docs" / "schema"
SERVER = "yaml-language-server@1.25.0"


def check(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *arguments], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_check_jsonschema_takes_the_schemas_and_the_examples() -> None:
    assert check("--check-metaschema", *map(str, SCHEMAS.glob("*.json"))) == (
        0,
        "ok -- validation done\n",
    )
    specs = [*ROOT.glob("specs/*.yaml"), *ROOT.glob("examples/*/specs/*.yaml")]
    code, said = check("--schemafile", str(SCHEMAS / "spec.schema.json"), *map(str, specs))
    assert code == 0, said


def test_check_jsonschema_refuses_a_broken_spec(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("vms:\n  - name: ctx-1\n    disks:\n      - {key: 1, sise: 1GiB}\n")
    code, said = check("--schemafile", str(SCHEMAS / "spec.schema.json"), str(path))
    assert code == 1
    assert (
        "$.vms[0].disks[0]: Additional properties are not allowed ('sise' was unexpected)" in said
    )


# -- the language server


class Editor:
    """As much of an editor as it takes to have a file looked at. Source: LSP 3.17."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.found: dict[str, list[dict[str, Any]]] = {}
        self.answers: dict[int, Any] = {}
        self.buffer = b""
        self.process = subprocess.Popen(
            ["node", str(server), "--stdio"], cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.ask("initialize", processId=os.getpid(), rootUri=folder.as_uri(), capabilities={})
        self.tell("initialized")

    def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def tell(self, method: str, **params: Any) -> None:
        self.send(method=method, params=params)

    def ask(self, method: str, **params: Any) -> Any:
        self.number += 1
        number = self.number
        self.send(id=number, method=method, params=params)
        self.until(lambda: number in self.answers)
        return self.answers[number]

    def until(self, done: Any, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        assert self.process.stdout
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, f"never; so far {self.found}"
            if not select.select([self.process.stdout], [], [], min(1.0, left))[0]:
                continue
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, "the language server ended"
            self.buffer += chunk
            while (message := self.next()) is not None:
                self.take(message)

    def next(self) -> Any:
        head, mark, rest = self.buffer.partition(b"\r\n\r\n")
        length = (
            int(head.lower().rpartition(b"content-length:")[2].split(b"\r\n")[0]) if mark else 0
        )
        if not mark or len(rest) < length:
            return None
        self.buffer = rest[length:]
        return json.loads(rest[:length])

    def take(self, message: dict[str, Any]) -> None:
        if message.get("method") == "textDocument/publishDiagnostics":
            params = message["params"]
            self.found[params["uri"]] = params["diagnostics"]
        elif "method" in message and "id" in message:  # it asks us, say for our settings
            items = message.get("params", {}).get("items", [])
            settings = {"validate": True, "completion": True, "hover": True, "yamlVersion": "1.2"}
            asked = [settings if one.get("section") == "yaml" else {} for one in items]
            self.send(id=message["id"], result=asked if items else None)
        elif "id" in message:
            self.answers[message["id"]] = message.get("result")

    def open(self, name: str, text: str) -> tuple[str, list[tuple[int, int, str]]]:
        """Open a file; its address, and line and column (from 1) and text of all that is marked."""
        path = self.folder / name
        path.write_text(text)
        uri = path.as_uri()
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", textDocument=document)
        self.until(lambda: uri in self.found)
        return uri, [
            (
                one["range"]["start"]["line"] + 1,
                one["range"]["start"]["character"] + 1,
                one["message"],
            )
            for one in self.found[uri]
        ]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language server's program."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    given = os.environ.get("RECONCILER_NPM")
    folder = Path(given) if given else tmp_path_factory.mktemp("npm")
    program = folder / "node_modules" / "yaml-language-server" / "bin" / "yaml-language-server"
    if not program.exists():
        quietly = ["--silent", "--no-audit", "--no-fund"]
        done = subprocess.run(
            ["npm", "install", *quietly, "--prefix", str(folder), SERVER],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return program


@pytest.fixture
def editor(server: Path, tmp_path: Path) -> Iterator[Editor]:
    with contextlib.closing(_Closing(server, tmp_path)) as one:
        for schema in SCHEMAS.glob("*.json"):
            shutil.copy(schema, tmp_path)
        yield one.editor


class _Closing:
    def __init__(self, server: Path, folder: Path) -> None:
        self.editor = Editor(server, folder)

    def close(self) -> None:
        self.editor.end()


HEAD = "# yaml-language-server: $schema=spec.schema.json\n"


@pytest.mark.soak
def test_an_editor_marks_what_is_wrong(editor: Editor) -> None:
    _, found = editor.open(
        "broken.yaml",
        HEAD + "vms:\n"
        "  - name: ctx-1\n"
        "    stat: exported\n"
        "    disks:\n"
        '      - {key: "2000", size: 40GB}\n'
        "    backup: {run: nightly, type: ful}\n",
    )
    assert [(line, column) for line, column, _ in sorted(found)] == [
        (4, 5), (6, 15), (6, 29), (7, 34),
    ], found  # fmt: skip
    said = {line: message for line, _, message in found}
    assert "stat" in said[4]
    assert "full" in said[7]


@pytest.mark.soak
def test_an_editor_marks_nothing_of_what_is_right(editor: Editor) -> None:
    for number, path in enumerate(
        [*ROOT.glob("specs/*.yaml"), *ROOT.glob("examples/*/specs/*.yaml")]
    ):
        text = path.read_text().partition("\n")[2]
        _, found = editor.open(f"right-{number}.yaml", HEAD + text)
        assert found == [], path
    _, found = editor.open(
        "templates.yaml",
        HEAD + 'vms:\n  - name: "ctx-{{ item }}"\n    loop: "{{ range(3) | list }}"\n'
        '    protect: "{{ item == 1 }}"\n    disks: ["{{ disk }}", {key: "{{ 2000 + item }}"}]\n',
    )
    assert found == []


@pytest.mark.soak
def test_an_editor_completes_keys_and_explains_them(editor: Editor) -> None:
    text = HEAD + "vms:\n  - name: ctx-1\n    \n"
    uri, _ = editor.open("typing.yaml", text)
    answer = editor.ask(
        "textDocument/completion",
        textDocument={"uri": uri},
        position={"line": 3, "character": 4},
    )
    items = answer["items"] if isinstance(answer, dict) else answer
    labels = {one["label"] for one in items}
    assert {"state", "disks", "backup", "labels", "loop", "when"} <= labels
    answer = editor.ask(
        "textDocument/hover",
        textDocument={"uri": uri},
        position={"line": 2, "character": 6},
    )
    assert "The VM context, its identity here." in json.dumps(answer)
