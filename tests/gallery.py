"""The gallery of mistakes, docs/errors.md, made by making them: `python -m tests.gallery`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from unittest import mock

from reconciler.cli.main import run

REFRESH: Final = "python -m tests.gallery"
PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
CONFIG: Final = """\
hub: hub-a
state: state
inventory: {file: inventory.yaml}
snas:
  site-a: {url: "http://127.0.0.1:9081"}
vcenters:
  vc1: {host: vcenter.example, user: backup, password: {file: password}}
"""
INVENTORY: Final = """\
vms:
  ctx-123:
    vm: {name: pgtest1, path: /DC1/vm/pgtest1, vcenter: vc1}
    disks: [{key: 2000, size: 40GiB}, {key: 2001, size: 100GiB}]
  ctx-124:
    vm: {name: pgtest2, path: /DC1/vm/pgtest2, vcenter: vc1}
    disks: [{key: 2000, size: 40GiB}]
"""
USUAL: Final = {"reconciler.yaml": CONFIG, "inventory.yaml": INVENTORY}
SPEC: Final = "specs/db.yaml"


def vm(body: str, name: str = "ctx-123", top: str = "") -> str:
    """One VM with a run; `body` is indented below it."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"{top}vms:\n  - name: {name}\n    backup: {{run: monday}}\n{lines}"


@dataclass(frozen=True)
class Mistake:
    """Something that people write, and what they are told."""

    title: str
    text: str
    says: tuple[str, ...]
    """Where it is, what is wrong, and what helps."""
    file: str = SPEC
    more: Mapping[str, str] = field(default_factory=dict)
    """Other files, beside the usual config and inventory."""
    command: tuple[str, ...] = ("validate",)
    code: int = 65

    @property
    def files(self) -> dict[str, str]:
        own = {self.file: self.text} if self.file else {}
        return {**USUAL, **self.more, **own}


MISTAKES: Final = (
    Mistake(
        "A misspelt key",
        vm("disks: inventory\nlables: {tier: gold}"),
        (f"{SPEC}:5:5", "unknown key 'lables'", "did you mean 'labels'?"),
    ),
    Mistake(
        "A misspelt key at the top",
        "vmss:\n  - {name: ctx-123, state: absent}\n",
        (f"{SPEC}:1:1", "unknown key 'vmss'", "did you mean 'vms'?"),
    ),
    Mistake(
        "A misspelt value",
        vm("state: exportet\ndisks: inventory"),
        (f"{SPEC}:4:12", "expected one of exported, absent", "did you mean 'exported'?"),
    ),
    Mistake(
        "`yes` is text in YAML 1.2",
        vm("disks: inventory\nprotect: yes"),
        (f"{SPEC}:5:14", "protect: expected true or false, found the text 'yes'"),
    ),
    Mistake(
        "A VM without a name",
        "vms:\n  - state: absent\n",
        (f"{SPEC}:2:5", "the key 'name' is missing"),
    ),
    Mistake(
        "A name that cannot be one",
        vm("disks: inventory", name='"ctx 123"'),
        (f"{SPEC}:2:11", "'ctx 123' holds ' '", "letters, digits, dot, dash and underscore"),
    ),
    Mistake(
        "A key that is written twice",
        vm("disks: inventory\nlabels: {a: b}\nlabels: {c: d}"),
        (f"{SPEC}:6:5", "the key 'labels' is written twice (first on line 5)", "keep one"),
    ),
    Mistake(
        "A tab where spaces are meant",
        "vms:\n\t- name: ctx-123\n",
        (f"{SPEC}:2:1", "cannot read this as YAML"),
    ),
    Mistake(
        "An expression without quotes",
        "vms:\n  - name: {{ site }}\n    state: absent\n",
        (f"{SPEC}:2:12", "cannot use this as a key", 'needs quotes: "{{ … }}"'),
    ),
    Mistake(
        "A quote that is not closed",
        'vms:\n  - name: "ctx-123\n    state: absent\n',
        (SPEC, "cannot read this as YAML", "quoted scalar"),
    ),
    Mistake(
        "Two documents in one file",
        "vms: []\n---\nvms: []\n",
        (f"{SPEC}:2:1", "a second document starts here", "write one document a file"),
    ),
    Mistake("An empty file", "", (f"{SPEC}:1:1", "the file is empty", "write `vms:` and a list")),
    Mistake(
        "An indent that makes a list of nothing",
        "vms:\nname: ctx-123\nstate: absent\n",
        (f"{SPEC}:2:1", "unknown key 'name'", "`vms:` is empty"),
    ),
    Mistake(
        "One VM in two files",
        vm("disks: inventory"),
        ("the VM 'ctx-123' is declared twice", "first at specs/db.yaml:2:11", "keep one"),
        more={"specs/other.yaml": "vms:\n  - {name: ctx-123, state: absent}\n"},
    ),
    Mistake(
        "A variable that is not there",
        vm("disks: inventory\nlabels: {site: '{{ sit }}'}", top="vars: {site: a}\n"),
        (f"{SPEC}:6:20", "the variable 'sit' is not defined", "did you mean 'site'?"),
    ),
    Mistake(
        "A part of a variable that is not there",
        vm("disks: inventory\nlabels: {a: '{{ inventory[vm_name].pth }}'}"),
        (f"{SPEC}:5:17", "there is no key 'pth' in it", "did you mean 'path'?"),
    ),
    Mistake(
        "A variable that somebody must give",
        "vms:\n  - name: ctx-123\n    disks: inventory\n"
        "    backup: {run: \"{{ night | mandatory('give the night: -e night=monday') }}\"}\n",
        (f"{SPEC}:4:19", "give the night: -e night=monday"),
    ),
    Mistake(
        "Variables that lean on each other",
        "vars:\n  a: 'x{{ b }}'\n  b: 'y{{ a }}'\nvms: []\n",
        (f"{SPEC}:2:6", "the vars go round in a circle: a → b → a"),
    ),
    Mistake(
        "A variable with a name of ours",
        "vars: {vm_name: x}\nvms: []\n",
        (f"{SPEC}:1:8", "'vm_name' cannot be a variable"),
    ),
    Mistake(
        "An expression that is not complete",
        "vms:\n  - {name: 'ctx-{{ 1 + }}', state: absent}\n",
        (f"{SPEC}:2:12", "cannot read ctx-{{ 1 + }}"),
    ),
    Mistake(
        "A statement where expressions are read",
        "vms:\n  - {name: 'a{% if true %}b{% endif %}{{ 1 }}', state: absent}\n",
        (f"{SPEC}:2:12", "cannot evaluate {% %}", "write expressions, {{ … }}, only"),
    ),
    Mistake(
        "A filter that is not there",
        "vms:\n  - {name: \"{{ 'A' | lowr }}\", state: absent}\n",
        (f"{SPEC}:2:12", "No filter named 'lowr'"),
    ),
    Mistake(
        "A value that grows out of hand",
        "vars: {a: \"{{ 'x' * 10**8 }}\"}\nvms: []\n",
        (f"{SPEC}:1:11", "cannot repeat this 100,000,000 times"),
    ),
    Mistake(
        "A pattern that RE2 does not have",
        "vms:\n  - {name: \"{{ 'ctx-1' | regex_replace('(?=c)', '') }}\", state: absent}\n",
        (f"{SPEC}:2:12", "cannot read the pattern '(?=c)'", "no look-around"),
    ),
    Mistake(
        "A loop over what is no list",
        "vms:\n  - {loop: '{{ inventory }}', name: '{{ item }}', state: absent}\n",
        (f"{SPEC}:2:12", "expected a list to loop over, found keys and values", "`| list`"),
    ),
    Mistake(
        "A condition that is neither true nor false",
        "vms:\n  - {name: ctx-123, state: absent, when: \"'gold'\"}\n",
        (f"{SPEC}:2:42", "`when` must come out as true or false, not as the text 'gold'"),
    ),
    Mistake(
        "A file outside of the specs",
        "vars_files: [../secret.yaml]\nvms: []\n",
        (f"{SPEC}:1:14", "outside of", "specs: {root: DIRECTORY}"),
        more={"secret.yaml": "a: 1\n"},
    ),
    Mistake(
        "An included file that is read by itself too",
        "include: [more.yaml]\n",
        (f"{SPEC}:1:11", "it is read as specs by itself", "move it to a folder", "`includes`"),
        more={"specs/more.yaml": "vms: []\n"},
    ),
    Mistake(
        "A variable of the environment that specs may not read",
        "vars: {home: \"{{ lookup('env', 'HOME') }}\"}\nvms: []\n",
        (f"{SPEC}:1:14", "cannot look up env 'HOME'", "specs: {env: [HOME]}"),
    ),
    Mistake(
        "A broken file of variables",
        vm("disks: inventory\ngroups: [gold]"),
        ("specs/group_vars/gold.yaml:1:7", "cannot read this as YAML"),
        more={"specs/group_vars/gold.yaml": "tier: : gold\n"},
    ),
    Mistake(
        "A size in decimal units",
        vm("disks:\n  - {key: 2000, size: 40GB}\n  - {key: 2001, size: 100GiB}"),
        (f"{SPEC}:5:27", "40GB", "40GiB"),
    ),
    Mistake(
        "A size that no disk can have",
        vm("disks:\n  - {key: 2000, size: 1000}"),
        (f"{SPEC}:5:27", "not a multiple of 512", "the next one up is 1024 bytes"),
    ),
    Mistake(
        "An image outside of the repository",
        vm("disks:\n  - {key: 2000, image: ../../etc/x.qcow2}\n  - {key: 2001}"),
        (f"{SPEC}:5:28", "leads out of the repository", "write a path relative to its root"),
    ),
    Mistake(
        "An export name with the wrong number",
        vm("disks:\n  - {key: 2000, export: ctx-123-monday-disk1}\n  - {key: 2001}"),
        (f"{SPEC}:5:29", "ends in disk1, but this disk is at position 0"),
    ),
    Mistake(
        "A disk that the spec forgets",
        vm("disks:\n  - {key: 2000, size: 40GiB}"),
        (f"{SPEC}:5:7", "the inventory knows 2000 (40 GiB), 2001 (100 GiB)", "disks: inventory"),
    ),
    Mistake(
        "A VM that the inventory does not know",
        vm("disks: inventory", name="ctx-134"),
        (f"{SPEC}:2:11", "does not know this VM", "did you mean 'ctx-124'?"),
    ),
    Mistake(
        "An appliance that the config does not know",
        vm("disks: inventory\nsna: site-b"),
        (f"{SPEC}:5:10", "sna 'site-b' is not in the config", "did you mean 'site-a'?"),
    ),
    Mistake(
        "An incremental without anything before it",
        "vms:\n  - name: ctx-123\n    disks: inventory\n"
        "    backup: {run: tuesday, type: incremental}\n",
        (f"{SPEC}:4:13", "no completed run to build an incremental on", "`type: full`"),
    ),
    Mistake(
        "One VM of vCenter under two names",
        "defaults: {disks: [{key: 1, size: 1GiB}], backup: {run: monday}}\n"
        "vms:\n  - {name: a, vm: {path: /DC1/vm/x}}\n  - {name: b, vm: {path: /DC1/vm/x}}\n",
        ("specs/db.yaml:", "/DC1/vm/x"),
    ),
    Mistake(
        "A run of a VM that is to be absent",
        "vms: [{name: ctx-123, state: absent}]\nruns: [{vm: ctx-123, run: monday}]\n",
        (f"{SPEC}:2:13", "`state: absent`", "remove one of the two"),
    ),
    Mistake(
        "A restore that also makes a backup",
        vm("for: restore\nof: {vm: ctx-123, run: sunday}", name="look"),
        (f"{SPEC}:3:13", "a restore makes no backup", "remove `backup`, or `for: restore`"),
    ),
    Mistake(
        "A VM of which nobody asks for a run",
        "vms:\n  - {name: ctx-123, disks: inventory}\n",
        (f"{SPEC}:2:12: warning", "no run is asked for", "reconciler backup ctx-123 --run NAME"),
        code=0,
    ),
    Mistake(
        "An inventory with one disk twice",
        "vms:\n  ctx-123:\n    disks: [{key: 2000, size: 1GiB}, {key: 2000, size: 2GiB}]\n",
        ("inventory.yaml:3:", "VM ctx-123 has two disks with the key 2000"),
        file="inventory.yaml",
        more={SPEC: vm("disks: inventory")},
    ),
    Mistake(
        "A misspelt key of the config",
        CONFIG.replace("inventory:", "inventry:"),
        ("reconciler.yaml:3:1", "unknown key 'inventry'", "did you mean 'inventory'?"),
        file="reconciler.yaml",
        more={SPEC: "vms: []\n"},
        code=78,
    ),
    Mistake(
        "A secret that is written into the config",
        CONFIG.replace("{file: password}", "hunter2"),
        ("reconciler.yaml:7:56", "never written in place", "{file: PATH}"),
        file="reconciler.yaml",
        more={SPEC: "vms: []\n"},
        code=78,
    ),
    Mistake(
        "Specs that are not there",
        "",
        ("cannot read nothing: there is no such file or directory",),
        file="",
        command=("validate", "-f", "nothing"),
    ),
    Mistake(
        "`-e` without a value",
        "vms: []\n",
        ("cannot read -e 'night'", "write key=value"),
        command=("validate", "-e", "night"),
        code=64,
    ),
    Mistake(
        "A misspelt command",
        "",
        ("there is no command 'aply'", "did you mean 'apply'?"),
        file="",
        command=("aply",),
        code=64,
    ),
)


@contextlib.contextmanager
def made(mistake: Mistake) -> Iterator[Path]:
    """A directory in which it was made, where we are."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as top:
        for name, text in mistake.files.items():
            path = Path(top) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        os.chdir(top)
        try:
            yield Path(top)
        finally:
            os.chdir(before)


def told(mistake: Mistake) -> tuple[str, int]:
    """What the command prints, in 100 columns without colours, and its exit code."""
    out = io.StringIO()
    clean = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "COLUMNS": "100", "NO_COLOR": "1"}
    with made(mistake) as top, mock.patch.dict(os.environ, clean, clear=True):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = run(mistake.command)
        said = out.getvalue().replace(os.path.realpath(top), "/srv/hub")
        return said.replace(
            " -h' for help", " --help' for help"
        ), code  # as click before 8.2 has it


def page() -> str:
    """The gallery as it should be now."""
    parts = [
        f"""# What mistakes look like

{len(MISTAKES)} of them, made on purpose, with what is printed. This page is made by making them:
`{REFRESH}`. All are in a directory with the `reconciler.yaml` and `inventory.yaml` at its end. What
is wrong with one VM or one file is left out; the rest is applied ([exit code](exit-codes.md) 65).
"""
    ]
    for number, mistake in enumerate(MISTAKES, 1):
        said, code = told(mistake)
        parts.append(f"## {number}. {mistake.title}\n")
        shown = {**mistake.more, mistake.file: mistake.text} if mistake.file else {}
        for name, text in shown.items():
            if text or name == mistake.file:
                body = text or "\n"
                parts.append(f"`{name}`:\n\n```yaml\n{body}```\n")
        line = " ".join(["reconciler", *mistake.command])
        parts.append(f"```text\n$ {line}    # exit {code}\n{said.rstrip()}\n```\n")
    parts.append("## The config and the inventory\n")
    for name, text in USUAL.items():
        parts.append(f"`{name}`:\n\n```yaml\n{text}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        print(page())
    else:
        PAGE.write_text(page())
