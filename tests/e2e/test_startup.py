"""Start-up is a feature: what the light commands load, counted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.site import Appliance, Site

HEAVY = {
    "asyncio",
    "fastapi",
    "httpx2",
    "jinja2",
    "prometheus_client",
    "psutil",
    "pydantic",
    "rich",
    "stamina",
    "starlette",
    "structlog",
    "uvicorn",
    "yaml",
}
COUNT = """
import json, sys
import click
before = set(sys.modules)
from reconciler.cli.main import run
run({arguments!r})
print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded(site: Site, *arguments: str) -> set[str]:
    """The modules that a command loads beyond those of `import click`."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(arguments=list(arguments))],
        cwd=site.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (["--help"], 38),
        (["--version"], 38),
        (["version"], 100),
        (["status"], 100),
        (["status", "-o", "json"], 100),
        (["state", "--help"], 104),  # of which seven are what lays out a help text
        (["state", "info"], 100),
        (["events"], 100),
        (["events", "-o", "json"], 100),
    ],
)
def test_light_commands_load_little(site: Site, arguments: list[str], most: int) -> None:
    found = loaded(site, *arguments)
    assert {name.split(".")[0] for name in found} & HEAVY == set()
    assert len(found) <= most, sorted(found)


def test_status_of_what_runs_loads_little(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    for arguments in (
        ["status"],
        ["explain", "ctx-1"],
        ["status", "-o", "wide"],
        ["history", "ctx-1"],
        ["history", "ctx-1", "-o", "json"],
        ["chain", "ctx-1"],
        ["chain", "ctx-1", "-o", "json"],
        ["events", "ctx-1"],
        ["wait", "ctx-1", "--for", "Ready"],
        ["state", "backup", "copy.db"],
    ):
        found = loaded(site, *arguments)
        assert {name.split(".")[0] for name in found} & HEAVY == set()
        assert len(found) <= 110, sorted(found)


def test_only_who_waits_loads_what_takes_callbacks(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    serving = {"fastapi", "starlette", "uvicorn"}
    for arguments in (["plan"], ["apply", "-y"], ["stop", "-y", "--cancel-run", "ctx-1"]):
        found = {name.split(".")[0] for name in loaded(site, *arguments)}
        assert found & serving == set(), arguments
    assert not {name for name in found if name.startswith("reconciler.api")}


def test_a_look_that_changes_nothing(site: Site, appliance: Appliance) -> None:
    """`plan`, `status` and friends leave no file, no port and no row."""
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = {p: p.stat().st_mtime_ns for p in site.folder.rglob("*") if "appliance" not in p.parts}
    ports, pids = site.listening(), site.pids()
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    before[site.specs / "vms.yaml"] = (site.specs / "vms.yaml").stat().st_mtime_ns
    looks = (["plan"], ["diff"], ["validate"], ["status"], ["explain", "ctx-1"])
    more = (["events"], ["wait", "ctx-1", "--for", "Ready"], ["backup", "--list"])
    for command in (*looks, ["history", "ctx-1"], *more):
        site.run(*command, code=None)
    after = {p: p.stat().st_mtime_ns for p in site.folder.rglob("*") if "appliance" not in p.parts}
    assert after == before
    assert (site.listening(), site.pids()) == (ports, pids)
