"""A site in a few lines: variables, groups and -e on real servers, by hand and through a daemon."""

from __future__ import annotations

from tests.core.builders import says
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching

SITE = """\
vars: {run: "nightly-{{ night }}"}
defaults: {disks: inventory, backup: {run: "{{ run }}"}, labels: {tier: "{{ tier }}"}}
vms:
  - loop: "{{ inventory | list }}"
    name: "{{ item }}"
"""


def written(site: Site) -> None:
    site.inventory({f"ctx-{n}": {2000: 1 << 20} for n in (1, 2)})
    (site.specs / "site.yaml").write_text(SITE)
    for name, text in (("group_vars", "tier: silver"), ("host_vars", "tier: gold")):
        folder = site.specs / name
        folder.mkdir()
        (folder / ("all.yaml" if name == "group_vars" else "ctx-2.yaml")).write_text(text)


def test_a_site_is_exported_from_five_lines(site: Site, appliance: Appliance) -> None:
    written(site)
    says(site.run("validate", code=65), "'night' is not defined")
    assert site.servers() == {}
    site.apply("-e", "night=1")
    runs = {name: one["run"] for name, one in site.status().items()}
    assert runs == {"ctx-1": "nightly-1", "ctx-2": "nightly-1"}
    assert len({one["job_id"] for one in appliance.starts()}) == 2
    shown = site.json("vars", "ctx-2", "-e", "night=1")["vars"]
    (tier,) = [one for one in shown if one["name"] == "tier"]
    assert (tier["value"], tier["origin"]) == ("gold", "host_vars/ctx-2")
    assert [one["origin"] for one in tier["over"]] == ["group_vars/all"]
    says(site.run("vars", "ctx-9", "-e", "night=1", code=64), "declares a VM 'ctx-9'", "ctx-")
    says(site.run("apply", "-y", "-e", "night", code=64), "key=value")
    site.apply("-e", "night=1")
    assert len(appliance.starts()) == 2


def test_what_lies_around_the_specs_goes_to_the_daemon_with_them(
    site: Site, appliance: Appliance
) -> None:
    written(site)
    aside = site.folder / "aside"
    site.specs.rename(aside)
    site.specs.mkdir()
    with watching(site, "--allow-empty"):
        site.apply("-f", str(aside), "-e", "night=7")
        runs = {name: one["run"] for name, one in site.status().items()}
        assert runs == {"ctx-1": "nightly-7", "ctx-2": "nightly-7"}
        assert site.changes("-f", str(aside), "-e", "night=7") == []


def test_a_daemon_acts_on_variables_that_are_saved(site: Site, appliance: Appliance) -> None:
    written(site)
    with watching(site, "-e", "night=1"):
        until(lambda: len(appliance.starts()) == 2, "both called")
        (site.specs / "host_vars" / "ctx-3.yaml").write_text("tier: gold")
        site.inventory({f"ctx-{n}": {2000: 1 << 20} for n in (1, 2, 3)})
        until(lambda: len(appliance.starts()) == 3, "the third called")
