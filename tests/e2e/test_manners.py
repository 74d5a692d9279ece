"""How commands speak: -o and -q everywhere the same, errors as documents, narrow terminals."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from reconciler.cli.main import cli
from reconciler.cli.manual import STATUSES, contexts, page
from reconciler.cli.tables import table
from reconciler.cli.terminal import cells, coloured
from reconciler.core.errors import Exit
from tests.e2e.site import Appliance, Site

DATA = {"validate", "plan", "diff", "vars", "apply", "backup", "status", "explain", "events"}
DATA |= {"wait", "history", "version", "state info"}
DOING = {"apply", "stop", "backup", "resolve", "retry", "pause", "resume", "approve", "plan"}


def commands() -> dict[str, click.Context]:
    top = click.Context(cli, info_name="reconciler")
    return {one.command_path.removeprefix("reconciler").strip(): one for one in contexts(top)}


def test_every_command_that_shows_data_has_the_same_output_option() -> None:
    for name, context in commands().items():
        found = [one for one in context.command.params if "--output" in one.opts]
        if not found or not isinstance(found[0].type, click.Choice):
            assert name not in DATA, name
            continue
        choices = list(found[0].type.choices)
        assert found[0].opts == ["-o", "--output"], name
        assert choices[0] == found[0].default == "text", name
        assert "json" in choices, name


def test_every_command_that_does_something_can_be_quiet() -> None:
    for name in DOING:
        assert any(one.opts == ["-q", "--quiet"] for one in commands()[name].command.params), name


# -- quiet


def quiet(site: Site, *arguments: str, code: int) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "reconciler", *arguments],
        cwd=site.folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_quiet_says_nothing_but_errors(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    assert quiet(site, "plan", "-q", "--detailed-exitcode", code=2) == ("", "")
    assert quiet(site, "apply", "-q", "-y", code=0) == ("", "")
    assert quiet(site, "pause", "ctx-1", "--reason", "x", "-q", code=0) == ("", "")
    out, said = quiet(site, "apply", "-q", "-y", code=4)
    assert out == ""
    assert said.startswith("ctx-1: hold: Paused: ")
    assert quiet(site, "resume", "ctx-1", "--quiet", code=0) == ("", "")
    assert quiet(site, "backup", "ctx-1", "--run", "r2", "-q", code=0) == ("", "")
    assert quiet(site, "stop", "ctx-1", "-q", "-y", "--cancel-run", code=0) == ("", "")
    site.spec(site.vm("ctx-1", stat="absent"))
    out, said = quiet(site, "apply", "-q", "-y", code=65)
    assert out == ""
    assert "error: unknown key 'stat'" in said
    assert "= did you mean 'state'?" in said


def test_quiet_asks_nothing(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    _, said = quiet(site, "apply", "-q", code=64)
    assert "--quiet asks nothing: add -y" in said
    assert site.servers() == {}


# -- errors as documents


def documents(site: Site, *arguments: str, code: int) -> Any:
    out, said = quiet(site, *arguments, code=code)
    assert said
    return json.loads(out)


def test_an_error_is_a_document_where_one_was_asked_for(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    (site.folder / "reconciler.yaml").write_text("hubb: x\n")
    for command in (["validate"], ["plan"], ["apply", "-y"]):
        found = documents(site, *command, "-o", "json", code=78)
        assert found["format_version"] == "1.0"
        assert found["error"]["exit"] == 78
        (one,) = found["diagnostics"]
        assert (one["rule"], one["line"], one["column"]) == ("unknown-key", 1, 1)
        assert (one["end_column"], one["help"]) == (5, "did you mean 'hub'?")
    log = documents(site, "validate", "-o", "sarif", code=78)
    assert log["runs"][0]["results"][0]["ruleId"] == "unknown-key"
    found = documents(site, "validate", "-f", "nowhere", "-o", "json", code=78)
    site.write_config()
    found = documents(site, "validate", "-f", "nowhere", "-o", "json", code=65)
    assert "there is no such file" in found["error"]["message"]
    assert found["diagnostics"] == []


def test_a_secret_in_a_config_is_not_shown_with_an_error_beside_it(site: Site) -> None:
    text = "vcenters: {v: {host: h, usr: u, password: geheim-4711}}\n"
    (site.folder / "reconciler.yaml").write_text(text)
    out, said = quiet(site, "validate", "-o", "json", code=78)
    assert "unknown key 'usr'" in said
    assert "= did you mean 'user'?" in said
    assert "geheim-4711" not in out + said


def test_the_other_documents(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    found = site.json("explain", "ctx-1")
    assert found["vm"]["name"] == "ctx-1"
    assert found["next"]
    assert found["events"]
    assert found["actions"] == []
    assert site.json("version")["version"]
    found = site.json("wait", "ctx-1", "--for", "Ready")
    assert [(one["vm"], one["met"]) for one in found["vms"]] == [("ctx-1", True)]
    found = site.json("backup", "ctx-1", "--run", "r2")
    assert [(one["vm"], one["written"]) for one in found["asked"]] == [("ctx-1", True)]
    found = site.json("backup", "--list")
    assert [(one["vm"], one["run"], one["state"]) for one in found["requests"]] == [
        ("ctx-1", "r2", None)
    ]
    assert site.json("status")["vms"][0]["name"] == "ctx-1"

    def ours(kind: str) -> list[str]:
        """Other tests start and end servers meanwhile, which are counted as not ours."""
        lines = site.run("status", "-o", kind).splitlines()
        return [line for line in lines if not line.startswith("not ours")]

    assert ours("text") == ours("table")


# -- terminals


def on_terminal(folder: Path, columns: int, *arguments: str, **environment: str) -> str:
    """What a command writes on a terminal of some columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "reconciler", *arguments],
        cwd=folder, stdout=theirs, stderr=theirs, stdin=theirs,
        env={**kept, "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 65536):
            out += chunk
    except OSError:
        pass  # the other end is closed
    process.wait(30)
    os.close(ours)
    return out.decode().replace("\r\n", "\n")


def test_tables_fit_a_narrow_terminal(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    plan = on_terminal(site.folder, 40, "plan", NO_COLOR="1")
    assert "disk 2000" in plan
    # The first line of a finding stays whole, so that it can be searched for.
    long = [one for one in plan.splitlines() if cells(one) > 40 and ": warning: " not in one]
    assert all(" " not in line.strip() for line in long), plan  # one word that is longer
    site.apply()
    status = on_terminal(site.folder, 40, "status", NO_COLOR="1")
    rows = status.splitlines()
    start = rows.index("VM")
    assert rows[start + 1] == "ctx-1"
    assert any(line.startswith("    reason  ") for line in rows)
    assert all(cells(line) <= 40 for line in rows if line.startswith("    run "))
    history = on_terminal(site.folder, 40, "history", "ctx-1", NO_COLOR="1")
    assert "    state   ACCEPTED" in history


def test_colours_only_where_they_are_wanted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.specs / "a.yaml").write_text("vmss: []\n")
    assert "\x1b[" in on_terminal(site.folder, 80, "validate")
    assert "\x1b" not in on_terminal(site.folder, 80, "validate", NO_COLOR="1")
    assert "\x1b" not in on_terminal(site.folder, 80, "validate", TERM="dumb")
    assert "\x1b" not in site.run("validate", code=65)
    monkeypatch.setenv("TERM", "dumb")
    assert not coloured(sys.stdout)


def test_a_table_becomes_blocks_where_it_does_not_fit() -> None:
    rows = [["ctx-1", "nightly", "-"], ["日本", "x" * 20, "y"]]
    wide = table(rows, ["VM", "RUN", "STATE"])
    assert wide[0] == "VM      RUN                    STATE"
    assert cells(wide[1].partition("nightly")[0]) == cells(wide[2].partition("xxx")[0])
    assert table(rows, ["VM", "RUN", "STATE"], 36) == wide
    assert table(rows, ["VM", "RUN", "STATE"], 30) == [
        "VM",
        "ctx-1\n    run    nightly",
        f"日本\n    run    {'x' * 20}\n    state  y",
    ]
    assert "\x1b" not in "".join(table([["\x1b[31m"]], ["VM"]))


# -- manual pages


def test_every_page_is_sound(tmp_path: Path) -> None:
    for path, context in commands().items():
        text = page(context)
        file = tmp_path / "page.1"
        file.write_text(text)
        for check in (
            ["groff", "-man", "-ww", "-Tutf8", "-z"],
            ["mandoc", "-T", "lint", "-W", "warning"],
        ):
            try:
                done = subprocess.run([*check, str(file)], capture_output=True, text=True)
            except FileNotFoundError:
                continue
            assert (done.stdout, done.stderr) == ("", ""), path
        assert text.isascii()
        for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"):
            assert f".SH {section}\n" in text, path


def test_the_pages_say_all_that_help_says() -> None:
    assert set(STATUSES) == set(Exit)
    text = page(commands()["apply"])
    assert "\\-\\-lock\\-timeout" in text
    assert '.TH "RECONCILER\\-APPLY" "1"' in text
    top = page(commands()[""])
    assert "\\fBreconciler\\-state\\fR(1)" in top
    assert ".nf\nreconciler plan  \\-f specs/" in top


def test_pages_are_written(site: Site) -> None:
    site.run("man", "--output", "man1")
    written = {path.name for path in (site.folder / "man1").iterdir()}
    assert {"reconciler.1", "reconciler-apply.1", "reconciler-render-systemd.1"} <= written
    assert site.run("man", "state", "info").startswith('.TH "RECONCILER\\-STATE\\-INFO"')
    assert "did you mean 'apply'?" in site.run("man", "aply", code=64)
