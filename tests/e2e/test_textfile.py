"""What an apply leaves for node_exporter: whole, true, and in nobody's way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reconciler.core.errors import Exit, HostError
from reconciler.textfile import write
from tests.e2e.site import Appliance, Site


def read(path: Path) -> dict[tuple[str, ...], float]:
    """(name without prefix, labels but the hub's) → value."""
    return {
        (
            sample.name.removeprefix("reconciler_apply_"),
            *(value for name, value in sorted(sample.labels.items()) if name != "hub"),
        ): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_an_apply_says_how_it_went(site: Site, appliance: Appliance, tmp_path: Path) -> None:
    path = tmp_path / "reconciler.prom"
    site.spec(site.vm("ctx-1"))
    site.run("apply", "-y", "-f", str(site.specs), "--textfile", str(path))
    first = read(path)
    assert first["exit_code",] == 0
    assert first["last_success_timestamp_seconds",] == first["last_run_timestamp_seconds",] > 1e9
    assert first["vms", "ok"] == 1 and first["vms", "error"] == 0
    assert first["steps", "create", "true"] == 1
    assert first["steps", "call", "true"] == 1
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in tmp_path.glob(".reconciler.prom*")] == []

    (site.specs / "broken.yaml").write_text("vms: [")
    site.run("apply", "-y", "-f", str(site.specs), "--textfile", str(path), code=65)
    second = read(path)
    assert second["exit_code",] == 65
    assert second["last_success_timestamp_seconds",] == first["last_success_timestamp_seconds",]
    assert second["last_run_timestamp_seconds",] > first["last_run_timestamp_seconds",]
    for word in ("ctx-1", str(site.ports[0]), str(site.folder)):
        assert word not in path.read_text()


def test_figures_that_cannot_be_written_stop_no_backup(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    said = site.run("apply", "-y", "-f", str(site.specs), "--textfile", "nowhere/a.prom")
    assert "warning: cannot write nowhere/a.prom: No such file or directory" in said
    assert len(appliance.starts()) == 1


def test_the_last_success_is_that_of_this_hub(tmp_path: Path) -> None:
    path = tmp_path / "a.prom"
    write(path, "other", Exit.OK, {}, [], 10.0)
    write(path, "h", Exit.ERROR, {}, [], 20.0)
    assert ("last_success_timestamp_seconds",) not in read(path)
    write(path, "h", Exit.OK, {"ctx-1": Exit.OK}, [], 30.0)
    write(path, "h", Exit.HELD, {"ctx-1": Exit.HELD}, [], 40.0)
    assert read(path)["last_success_timestamp_seconds",] == 30.0
    path.write_bytes(b"\xff{}{")
    write(path, "h", Exit.ERROR, {}, [], 50.0)
    assert ("last_success_timestamp_seconds",) not in read(path)


def test_a_draft_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(HostError, match="No space left on device"):
        write(tmp_path / "a.prom", "h", 0, {}, [], 1.0)
    assert list(tmp_path.iterdir()) == []


def test_only_who_asks_loads_what_writes_it(site: Site, appliance: Appliance) -> None:
    from tests.e2e.test_startup import loaded

    site.spec(site.vm("ctx-1"))
    found = loaded(site, "apply", "-y", "-f", str(site.specs))
    assert not {one for one in found if one.startswith("prometheus_client")}
