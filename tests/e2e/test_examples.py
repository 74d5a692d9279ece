"""The examples do what their READMEs say, on real servers and the reference appliance."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from reconciler.core.document import parse
from reconciler.core.units import PortRange, parse_size
from tests.e2e.site import PASSWORD, ROOT, Appliance, Site
from tests.ports import Dealer

EXAMPLES: Final = ROOT / "examples"
TELLING: Final = ("incremental",)
"""Examples whose appliance is told where the hub is."""
NAMES: Final = ("one-disk", "many-disks", "fleet", "site", "restore", "incremental", "nightly")

SHOWN: Final = (".yaml", ".service", ".timer")
"""Kinds of files that a README may show, and then as they are."""

Answer = tuple[int, str]
CLEAN: Final = "0 errors, 0 warnings."
FILES: Final[Mapping[str, Mapping[str, Answer]]] = {
    "one-disk": {"specs": (0, "1 VM valid"), "absent.yaml": (0, "1 VM valid")},
    "many-disks": {"specs": (0, "1 VM valid"), "absent.yaml": (0, "1 VM valid")},
    "fleet": {"specs": (0, "22 VMs valid"), "absent.yaml": (0, "22 VMs valid")},
    "site": {
        "specs": (65, "which night? add: -e night=2026-11-26"),
        "absent.yaml": (0, "6 VMs valid"),
    },
    "restore": {
        "backup.yaml": (0, "1 VM valid"),
        "by-images.yaml": (0, "1 VM valid"),
        "absent.yaml": (0, "2 VMs valid"),
        "by-run.yaml": (65, "the run 'monday' of ctx-4 is not in the ledger"),
    },
    "incremental": {
        "full.yaml": (0, "1 VM valid"),
        "explicit-parent.yaml": (0, "1 VM valid"),
        "absent.yaml": (0, "1 VM valid"),
        "default-parent.yaml": (65, "has no completed run to build an incremental on"),
    },
    "nightly": {
        "specs": (0, "0 VMs valid, 0 errors, 3 warnings."),
        "absent.yaml": (0, "3 VMs valid"),
    },
}
"""Example → what `-f` may name in it → exit code and text of `validate` before anything is done."""


class Example(Site):
    """A copy of an example folder, with free ports, a hub and an appliance of its own."""

    def __init__(self, name: str, folder: Path, dealer: Dealer) -> None:
        self.name = name
        self.folder = folder / name
        shutil.copytree(EXAMPLES / name, self.folder)
        (self.folder / "password").write_text(f"{PASSWORD}\n")
        self.hub = f"example-{name}-{os.getpid()}"
        self.others = []
        self.api = dealer.deal(1)[0]
        hub = ("--hub", f"http://127.0.0.1:{self.api}") if name in TELLING else ()
        self.appliance = Appliance(folder / "appliance", *hub)
        for vm in self.read("inventory.yaml")["vms"].values():
            for disk in vm["disks"]:
                size = parse_size(disk["size"])
                self.appliance.source(vm["vm"]["name"], disk["key"], os.urandom(size))
        config = self.folder / "reconciler.yaml"
        text = config.read_text()
        match = re.search(r"range: (\S+)}", text)
        assert match
        self.ports = dealer.deal(len(PortRange.parse(match.group(1))))
        for pattern, value in (
            (r"range: \S+}", f"range: {self.ports[0]}-{self.ports[-1]}}}"),
            (r"http://127\.0\.0\.1:\d+", self.appliance.url),
            (r"^hub: .*", f"hub: {self.hub}"),
            (r"poll: 500ms", "poll: 50ms"),
        ):
            text, count = re.subn(pattern, value, text, flags=re.MULTILINE)
            assert count == 1, pattern
        config.write_text(f"{text}api: {{listen: 127.0.0.1:{self.api}}}\n")

    def read(self, file: str) -> Any:
        """A YAML file as plain values."""
        document, wrong = parse((self.folder / file).read_text(), file)
        assert document and not wrong
        return document.value

    def finish(self, *arguments: str) -> None:
        """Apply, and stay until the runs have ended."""
        self.apply(*arguments, "--wait", "--timeout", "60s")

    def same(self, source: str, image: str) -> None:
        """The image holds what the source disk holds."""
        raw = self.appliance.sources / source
        path = self.folder / "repository" / image
        line = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(raw), str(path)]
        assert subprocess.run(line, check=False).returncode == 0

    def backing(self, image: str) -> str:
        """The parent as an image names it."""
        path = self.folder / "repository" / image
        line = ["qemu-img", "info", str(path)]
        said = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        match = re.search(r"^backing file: (\S+)", said, re.MULTILINE)
        return match.group(1) if match else ""

    def clean_up(self) -> None:
        self.appliance.end()
        super().clean_up()


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, dealer: Dealer) -> Iterator[Example]:
    found = Example(request.param, tmp_path, dealer)
    yield found
    found.clean_up()


def one_disk(example: Example) -> None:
    planned = example.run("plan")
    assert "Plan: 1 to create, 1 to start, 1 call." in planned
    example.finish()
    assert example.status()["ctx-1"]["call"]["state"] == "COMPLETED"
    assert example.servers() == {}
    example.same("web1/2000.raw", "ctx-1/2000/first.qcow2")
    example.apply()
    assert len(example.appliance.starts()) == 1
    example.apply("-f", "absent.yaml")
    assert "No VM is exported." in example.run("status")


def many_disks(example: Example) -> None:
    example.finish()
    start, first = example.appliance.starts()[0], example.ports[0]
    names = [
        "2000:nbd://127.0.0.1:{}/ctx-2-weekly-48-disk0",
        "2001:nbd://127.0.0.1:{}/ctx-2-weekly-48-disk1",
        "2002:nbd://127.0.0.1:{}/ctx-2-weekly-48-disk2",
        "2016:nbd://127.0.0.1:{}/db1-weekly-48-log-disk3",
        "2017:nbd://127.0.0.1:{}/ctx-2-weekly-48-disk4",
    ]
    wanted = [name.format(first + index) for index, name in enumerate(names)]
    assert start["nbd_targets"] == ",".join(wanted)
    for key, image in ((2000, "system"), (2001, "tables"), (2002, "indexes"), (2016, "log")):
        example.same(f"db1/{key}.raw", f"databases/weekly-48/{image}.qcow2")
    example.same("db1/2017.raw", "ctx-2/2017/weekly-48.qcow2")
    spec = example.folder / "specs" / "vms.yaml"
    text, count = re.subn(r" +- key: 2016\n(?:(?! +- key).*\n)*", "", spec.read_text())
    assert count == 1
    spec.write_text(text)
    refused = example.run("validate", code=65)
    assert "One snapshot holds all disks of a VM" in refused
    example.apply("-f", "absent.yaml")
    assert len(example.appliance.starts()) == 1


def fleet(example: Example) -> None:
    summary = example.json("plan")["summary"]
    assert (summary["create"], summary["start"]) == (30, 30)
    assert (summary["call"], summary["wait"]) == (8, 12)
    assert not (example.folder / "state").exists()


def site(example: Example) -> None:
    """The README's own commands."""
    readme = (example.folder / "README.md").read_text()
    night = ("-e", "night=1")
    shown = [line.split() for line in example.run("vars", "ctx-310", *night).splitlines()]
    told = re.search(r"^```text\n(NAME.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert told
    assert [line.split() for line in told.group(1).splitlines()] == shown
    saving = ("plan", *night, "-l", "tier=gold", "--out", "gold.plan")
    for words in (saving, ("show", "gold.plan"), ("apply", "gold.plan")):
        assert " ".join(("reconciler", *words)) in readme
        example.run(*words)
    assert sorted(one["vm_name"] for one in example.appliance.starts()) == ["db1", "db2"]
    example.run("apply", "gold.plan", code=5)
    example.finish(*night)
    names = ["db1", "db2", "lab1", "web1", "web2"]
    assert sorted(one["vm_name"] for one in example.appliance.starts()) == names
    night_of_db1 = example.folder / "repository-fast" / "ctx-310" / "2001" / "nightly-1.qcow2"
    assert night_of_db1.exists()
    example.same("web1/2000.raw", "ctx-301/2000/nightly-1.qcow2")
    example.apply("-f", "absent.yaml")
    assert example.servers() == {}


def restore(example: Example) -> None:
    example.finish("-f", "backup.yaml")
    example.apply("-f", "by-run.yaml", "-f", "by-images.yaml")
    status, calls = example.status(), len(example.appliance.starts())
    assert calls == 1
    for vm, keys in (("look-into-ctx-4", ["2000", "2001"]), ("one-disk-of-ctx-4", ["2001"])):
        disks = status[vm]["disks"]
        assert [disk["key"] for disk in disks] == keys
        for disk in disks:
            url = f"nbd://127.0.0.1:{disk['port']}/{disk['export']}"
            copy = example.folder / "copy.raw"
            subprocess.run(["nbdcopy", url, str(copy)], check=True)
            source = example.appliance.sources / "files1" / f"{disk['key']}.raw"
            assert copy.read_bytes() == source.read_bytes()
    example.apply("-f", "absent.yaml")
    assert example.servers() == {}


def incremental(example: Example) -> None:
    example.finish("-f", "full.yaml")
    source = example.appliance.sources / "mail1" / "2000.raw"
    with source.open("r+b") as file:
        file.seek(8 << 20)
        file.write(os.urandom(1 << 20))
    example.finish("-f", "default-parent.yaml")
    example.finish("-f", "explicit-parent.yaml")
    assert len(example.appliance.starts()) == 3
    for key in (2000, 2001):
        assert example.backing(f"ctx-5/{key}/sunday.qcow2") == ""
        for run in ("monday", "tuesday"):
            assert example.backing(f"ctx-5/{key}/{run}.qcow2") == "sunday.qcow2"
            example.same(f"mail1/{key}.raw", f"ctx-5/{key}/{run}.qcow2")
    example.apply("-f", "absent.yaml")
    assert example.servers() == {}


def nightly(example: Example) -> None:
    """The README's own commands, one by one, and then the unit's, which is the same night."""
    readme = (example.folder / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("reconciler ")]
    assert [words[0] for words in commands[:4]] == ["validate", "backup", "backup", "backup"]
    *before, down = commands
    for words in before:
        example.run(*words)
    starts = [one["vm_name"] for one in example.appliance.starts()]
    assert sorted(starts) == ["shop1", "shop1", "shop2", "test1"]
    (night,) = (vm["run"] for vm in example.json("status", "ctx-7")["vms"])
    example.same("shop1/2001.raw", f"ctx-6/2001/{night}.qcow2")
    unit = (example.folder / "reconciler-nightly.service").read_text()
    start = re.search(r"^ExecStart=\S+/reconciler (.*)$", unit, re.MULTILINE)
    assert start
    assert start.group(1).split()[:5] == shlex.split(lines_of(readme, "backup -l"))[1:6]
    assert "COMPLETED already" in example.run(*start.group(1).split())
    assert len(example.appliance.starts()) == 4
    example.run(*down)
    assert example.servers() == {}


def lines_of(text: str, words: str) -> str:
    """The first command of a README with these words."""
    return next(line for line in text.splitlines() if line.startswith(f"reconciler {words}"))


STORIES: Final[Mapping[str, Callable[[Example], None]]] = {
    "one-disk": one_disk,
    "many-disks": many_disks,
    "fleet": fleet,
    "site": site,
    "restore": restore,
    "incremental": incremental,
    "nightly": nightly,
}


@pytest.mark.parametrize("example", NAMES, indirect=True)
def test_the_example_does_what_its_readme_says(example: Example) -> None:
    for file, (code, said) in FILES[example.name].items():
        text = example.run("validate", "-f", file, code=code)
        assert said in text
        assert code or CLEAN in text or said.endswith(" warnings.")
    STORIES[example.name](example)


MODELINE = "# yaml-language-server: "


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_the_files_as_they_are(name: str) -> None:
    there = [path for path in (EXAMPLES / name).rglob("*") if path.suffix in SHOWN]
    # The line for editors is of no use on a page.
    texts = [path.read_text() for path in there]
    files = {text.partition("\n")[2] if text.startswith(MODELINE) else text for text in texts}
    readme = (EXAMPLES / name / "README.md").read_text()
    for block in re.findall(r"^```(?:yaml|ini)\n(.*?)^```", readme, re.DOTALL | re.MULTILINE):
        assert block in files


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("", "", ""),
        ("KillMode", "KilMode", "Unknown key"),
        ("OnCalendar=*-*-* 01:30", "OnCalendar=nightly", "Failed to parse"),
    ],
)
def test_systemd_takes_the_units_of_the_nightly_example(
    tmp_path: Path, was: str, now: str, said: str
) -> None:
    paths = []
    for kind in ("service", "timer"):
        text = (EXAMPLES / "nightly" / f"reconciler-nightly.{kind}").read_text()
        text = text.replace("/usr/local/bin/reconciler", "/bin/true").replace(was, now)
        paths.append(tmp_path / f"reconciler-nightly.{kind}")
        paths[-1].write_text(text)
    line = ["systemd-analyze", "verify", *map(str, paths)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "reconciler-nightly" in line]
    assert said in done.stderr
    assert bool(ours) is bool(said), done.stderr
