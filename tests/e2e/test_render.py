"""The units: systemd accepts them, they are hardened, and say what the config says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.cli.main import run
from reconciler.cli.rendering import argument, literal, word
from reconciler.core.errors import HostError
from tests.e2e.site import ROOT

MOST_EXPOSED = 4.0
"""systemd's own score, from 0 (nothing is exposed) to 10."""


class Site:
    """A folder with a config, and the command in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str, code: int = 0) -> str:
        """stdout and stderr, in this very process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert run(arguments) == code, err.getvalue()
        self.printed = out.getvalue()
        return self.printed + err.getvalue()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield Site(tmp_path)
    signal.signal(signal.SIGTERM, before)


def units(site: Site, *arguments: str) -> tuple[str, str, str]:
    """Service, socket, and what was said."""
    said = site.run("render", "systemd", "--output", "units", *arguments)
    folder = site.folder / "units"
    return (folder / "reconciler.service").read_text(), (
        folder / "reconciler.socket"
    ).read_text(), said  # fmt: skip


def config(site: Site, **changes: object) -> None:
    (site.folder / "reconciler.yaml").write_text(json.dumps({"hub": "hub-a", **changes}))


def values(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)


def analyze(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_systemd_accepts_the_units(site: Site) -> None:
    config(
        site,
        repositories={"local": {"root": "/srv/backup"}, "odd": {"root": '/srv/a "b" $c %d'}},
        snas={"a": {"url": "http://127.0.0.1:1", "token": {"credential": "sna"}}},
    )
    service, socket, _ = units(site)
    assert service and socket
    done = analyze(
        "verify", "./reconciler.service", "./reconciler.socket", folder=site.folder / "units"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_finds_the_service_hardened(site: Site) -> None:
    config(site, repositories={"local": {"root": "/srv/backup"}})
    units(site)
    done = analyze(
        "security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager",
        "./reconciler.service", folder=site.folder / "units",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = re.search(r"Overall exposure level for reconciler.service: ([0-9.]+)", done.stdout)
    assert found and float(found[1]) <= MOST_EXPOSED


def test_a_unit_that_is_not_hardened_would_be_found_out(site: Site) -> None:
    config(site)
    service, _, _ = units(site)
    kept = [line for line in service.splitlines() if not line.startswith(("Protect", "System"))]
    (site.folder / "units" / "reconciler.service").write_text("\n".join(kept))
    done = analyze(
        "security", "--offline=true", "--threshold=40", "--no-pager", "./reconciler.service",
        folder=site.folder / "units",
    )  # fmt: skip
    assert done.returncode == 1


def test_what_the_config_says_is_in_the_units(site: Site) -> None:
    config(
        site,
        state="/var/lib/hubs/a",
        repositories={"local": {"root": "/srv/backup"}, "near": {"root": "/var/lib/hubs/a/images"}},
        snas={"a": {"url": "http://127.0.0.1:1", "token": {"credential": "sna"}}},
        vcenters={"v": {"host": "h", "user": "u", "password": {"file": "/etc/vc"}}},
        notify={"url": "https://a.example/the-way-in", "secret": {"credential": "hook"}},
        api={"listen": "localhost:8099"},
    )
    service, socket, _ = units(
        site, "--user", "backup", "--directory", "/etc/hub/specs", "--repository", "/mnt/more"
    )
    (command,) = values(service, "ExecStart")
    assert command.startswith("/") and command.endswith(" watch /etc/hub/specs")
    assert f" --config {site.folder}/reconciler.yaml " in command
    assert values(service, "User") == values(service, "Group") == ["backup"]
    assert values(service, "StateDirectory") == ["hubs/a"]
    assert values(service, "ReadWritePaths") == ["/mnt/more", "/srv/backup"]
    assert values(service, "RequiresMountsFor") == ["/mnt/more", "/srv/backup"]
    assert values(service, "LoadCredential") == [
        "hook:/etc/reconciler/credentials/hook",
        "sna:/etc/reconciler/credentials/sna",
    ]
    assert "the-way-in" not in service + socket
    assert values(socket, "ListenStream") == ["127.0.0.1:8099"]
    assert values(socket, "FileDescriptorName") == ["api"]


def test_a_state_elsewhere_is_made_writable(site: Site) -> None:
    config(site, state="/srv/state", inventory={"file": "/srv/state/inventory.yaml"})
    service, _, _ = units(site)
    assert values(service, "StateDirectory") == []
    assert values(service, "ReadWritePaths") == ["/srv/state", "/srv/state/repository"]
    assert values(service, "ReadOnlyPaths") == ["/srv/state/inventory.yaml"]


def test_a_remote_branch_is_watched_in_place_of_a_directory(site: Site) -> None:
    config(site, git={"url": "https://git.example/specs"})
    service, _, _ = units(site)
    assert values(service, "ExecStart")[0].endswith(" watch")
    said = site.run("render", "systemd", "--directory", "/x", code=64)
    assert "no --directory is watched" in said


def test_what_the_unit_does_not_see_is_said(site: Site) -> None:
    config(site, repositories={"local": {"root": "/home/me/backup"}})
    _, _, said = units(site)
    assert "the unit will not see /home/me/backup" in said
    config(site, repositories={"local": {"root": "/homely/backup"}})
    _, _, said = units(site)
    assert "backup" not in said


def test_what_is_printed_is_what_is_written(site: Site) -> None:
    config(site)
    service, socket, _ = units(site)
    site.run("render", "systemd")
    assert site.printed == f"# reconciler.service\n{service}\n# reconciler.socket\n{socket}"


def test_the_shell_of_who_renders_does_not_matter(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(site)
    before, _, _ = units(site)
    monkeypatch.setenv("RECONCILER_STATE", "/x")
    monkeypatch.setenv("STATE_DIRECTORY", "/y")
    assert units(site)[0] == before
    assert values(before, "StateDirectory") == ["reconciler"]


def test_units_that_cannot_be_written_are_an_error(site: Site) -> None:
    config(site)
    (site.folder / "file").touch()
    said = site.run("render", "systemd", "--output", "file/units", code=1)
    assert "cannot write file/units/reconciler.service" in said


@pytest.mark.parametrize(
    ("text", "as_word", "as_argument"),
    [
        ("/a/b-c_d.e", "/a/b-c_d.e", "/a/b-c_d.e"),
        ("/a b", '"/a b"', '"/a b"'),
        ('/a"b\\', '"/a\\"b\\\\"', '"/a\\"b\\\\"'),
        ("/a%n", "/a%%n", "/a%%n"),
        ("/a$B", '"/a$B"', '"/a$$B"'),
        ("/ä;", '"/ä;"', '"/ä;"'),
        ("", '""', '""'),
    ],
)
def test_nothing_in_a_value_is_special(text: str, as_word: str, as_argument: str) -> None:
    assert (word(text), argument(text)) == (as_word, as_argument)


def test_a_value_cannot_begin_another_line() -> None:
    with pytest.raises(HostError, match="holds a control character"):
        literal("a\nExecStartPre=/bin/sh")


def test_templates_are_part_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "templates/*.j2" in package["package-data"]["reconciler"]
    assert os.listdir(ROOT / "reconciler" / "templates")
