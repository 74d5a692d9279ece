"""Bad input gets a clear error and changes nothing of its own; nobody else is hurt."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.site import Appliance, Site

MIB = 1 << 20

GOOD = (
    "vms: [{name: good, vm: {path: /p, vcenter: vc1}, disks: [{key: 1, size: 1MiB}], "
    "backup: {run: r1}}]"
)
DISK = "vm: {path: /q, vcenter: vc1}, backup: {run: r1}, disks: "

BAD = [
    ("not YAML", "vms: [", "bad.yaml:2:1", "cannot read this as YAML"),
    ("text", "hello", "bad.yaml:1:1", "include, defaults, vms, runs, tunnels, found the text"),
    ("binary", "\x00\x01", "bad.yaml:1:1", "control characters are not allowed"),
    ("empty", "", "bad.yaml:1:1", "the file is empty"),
    ("wrong type", "vms: {a: b}", "bad.yaml:1:6", "expected a list of VMs"),
    ("wrong type of a value", f"vms: [{{name: a, {DISK}3}}]", "bad.yaml:1:73",
     "disks: expected `inventory` or a list, found the number 3"),
    ("unknown key", f"vms: [{{name: a, stat: absent, {DISK}inventory}}]", "bad.yaml:1:17",
     "unknown key 'stat'; did you mean 'state'?"),
    ("unknown top key", "vmss: []", "bad.yaml:1:1", "unknown key 'vmss'; did you mean 'vms'?"),
    ("duplicate key", "vms: [{name: a, name: b}]", "bad.yaml:1:17", "'name' is written twice"),
    ("undefined variable", 'vars: {site: a}\nvms: [{name: "x-{{ sit }}", state: absent}]',
     "bad.yaml:2:14", "the variable 'sit' is not defined; did you mean 'site'?"),
    ("export name with a comma",
     f"vms: [{{name: a, {DISK}[{{key: 1, size: 1MiB, export: 'a-r1,disk0'}}]}}]",
     "bad.yaml:1:103", "it holds ','"),
    ("size", f"vms: [{{name: a, {DISK}[{{key: 1, size: 1000}}]}}]", "bad.yaml:1:89",
     "not a multiple of 512; the next one up is 1024 bytes"),
    ("path out of the repository",
     f"vms: [{{name: a, {DISK}[{{key: 1, size: 1MiB, image: ../../x.qcow2}}]}}]",
     "bad.yaml:1:102", "leads out of the repository"),
    ("absolute path", f"vms: [{{name: a, {DISK}[{{key: 1, size: 1MiB, image: /x.qcow2}}]}}]",
     "bad.yaml:1:102", "leads out of the repository"),
    ("two disks of one key",
     f"vms: [{{name: a, {DISK}[{{key: 1, size: 1MiB}}, {{key: 1, size: 1MiB}}]}}]",
     "bad.yaml:1:102", "two disks have the key 1"),
    ("no disks", "vms: [{name: a, vm: {path: /q}, backup: {run: r}}]", "bad.yaml:1:7",
     "the key 'disks' is missing"),
    ("unknown SNA", f"vms: [{{name: a, sna: site-b, {DISK}[{{key: 1, size: 1MiB}}]}}]",
     "bad.yaml:1:22", "'site-b' is not in the config; did you mean 'site-a'?"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "where", "what"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_broken_file_is_explained_and_the_other_file_goes_on(
    site: Site, appliance: Appliance, text: str, where: str, what: str
) -> None:
    (site.specs / "bad.yaml").write_text(text)
    (site.specs / "good.yaml").write_text(GOOD)
    said = site.run("validate", code=65)
    assert f"{where}: error: " in said, said
    for part in what.split("; "):  # what helps stands in a line of its own
        assert part in said, said
    found = site.json("validate", code=65)["diagnostics"]
    assert any(what in one["summary"] for one in found)
    first = next(one for one in found if one["severity"] == "error")
    assert f"bad.yaml:{first['line']}:{first['column']}" == where
    site.apply(code=65)
    assert set(site.pids()) == {("good", 1)}


def test_all_errors_of_all_files_come_at_once(site: Site, appliance: Appliance) -> None:
    for index, (_, text, _, _) in enumerate(BAD):
        (site.specs / f"bad{index}.yaml").write_text(text)
    said = site.run("validate", code=65)
    for index, (name, _, _, what) in enumerate(BAD):
        assert f"bad{index}.yaml" in said, name
        for part in what.split("; "):
            assert part in said, name


def test_a_file_that_is_not_text(site: Site, appliance: Appliance) -> None:
    (site.specs / "bad.yaml").write_bytes(b"vms: []\nname: \xff\xfe")
    assert "bad.yaml: line 2 is not UTF-8 text" in site.run("validate", code=65)


def test_a_directory_that_is_not_there(site: Site, appliance: Appliance) -> None:
    for command in (["plan"], ["apply", "-y"], ["validate"]):
        said = site.run(*command, "-f", "nowhere", code=65)
        assert "cannot read nowhere: there is no such file or directory" in said
    (site.folder / "hollow").mkdir()
    assert "no *.yaml or *.yml is there" in site.run("plan", "-f", "hollow", code=65)


def test_a_hub_that_is_asked_at_its_api_has_no_specs_and_is_checked_all_the_same(
    site: Site, appliance: Appliance
) -> None:
    assert "cannot find a spec in specs" in site.run("validate", code=65)
    site.inventory({"ctx-1": {2000: 1 << 20, 2001: 1 << 20}, "ctx-2": {2000: 1 << 20}})
    checked = "no VM is declared; inventory: 2 VMs, 3 disks; 0 errors, 0 warnings.\n"
    assert site.run("validate") == checked
    site.specs.rmdir()
    assert site.run("validate") == checked
    site.run("plan", code=65)  # with nothing asked for there is nothing to plan
    (site.folder / "inventory.yaml").write_text("vms: [")
    out = site.run("validate", code=65)
    assert "inventory.yaml:2:" in out
    assert "; inventory: " not in out


def test_the_same_vm_in_two_files(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"), file="a.yaml")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"), file="b.yaml")
    said = site.apply(code=65)
    assert "the VM 'ctx-1' is declared twice (first at specs/a.yaml:" in said
    assert set(site.pids()) == {("ctx-2", 2000)}


def test_the_same_image_in_two_vms(site: Site, appliance: Appliance) -> None:
    disks = [{"key": 2000, "size": MIB, "image": "shared.qcow2"}]
    site.spec(site.vm("ctx-1", disks=disks), site.vm("ctx-2", disks=disks), site.vm("ctx-3"))
    said = site.apply(code=65)
    assert "shared.qcow2, as has VM ctx-1" in said
    assert "shared.qcow2, as has VM ctx-2" in said
    assert set(site.pids()) == {("ctx-3", 2000)}


def test_the_same_path_in_vcenter_in_two_vms(site: Site, appliance: Appliance) -> None:
    vm = {"path": "/DC/vm/one", "vcenter": "vc1"}
    site.spec(site.vm("ctx-1", vm=vm), site.vm("ctx-2", vm=vm))
    assert "it has the vCenter path '/DC/vm/one', as has VM ctx-1" in site.apply(code=65)
    assert site.servers() == {}


def make_image(path: Path, kind: str, size: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, str(path), size], check=True)


def test_an_image_of_another_size(site: Site, appliance: Appliance) -> None:
    make_image(site.image("ctx-1"), "qcow2", "2M")
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    said = site.apply(code=3)
    assert "SizeMismatch" in said
    assert "has 2 MiB (2097152 bytes), the disk 1 MiB (1048576 bytes)" in said
    assert set(site.pids()) == {("ctx-2", 2000)}


def test_an_image_of_another_format(site: Site, appliance: Appliance) -> None:
    make_image(site.image("ctx-1"), "raw", "1M")
    site.spec(site.vm("ctx-1"))
    assert "is raw, not qcow2" in site.apply(code=1)
    assert site.servers() == {}


def test_an_image_that_holds_data_of_nobody_knows_what(site: Site, appliance: Appliance) -> None:
    make_image(site.image("ctx-1"), "qcow2", "1M")
    line = ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(site.image("ctx-1"))]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    site.spec(site.vm("ctx-1"))
    assert "holds data that is not of this run" in site.apply(code=1)
    assert appliance.starts() == []


def test_a_symlink_out_of_the_repository(site: Site, appliance: Appliance) -> None:
    outside = site.folder / "outside"
    outside.mkdir()
    (site.folder / "repository").mkdir()
    (site.folder / "repository" / "ctx-1").symlink_to(outside)
    site.spec(site.vm("ctx-1"))
    said = site.apply(code=1)
    assert "leads out of its repository" in said
    assert list(outside.iterdir()) == []


def test_a_restore_without_its_image(site: Site, appliance: Appliance) -> None:
    site.spec(
        {"name": "look", "for": "restore", "disks": [{"key": 1, "image": "ctx-1/1/gone.qcow2"}]}
    )
    assert "there is no image" in site.apply(code=1)
    site.spec({"name": "look", "for": "restore", "of": {"vm": "ctx-1", "run": "never"}})
    assert "the run 'never' of ctx-1 is not in the ledger" in site.apply(code=65)


def test_a_secret_that_cannot_be_read(site: Site, appliance: Appliance) -> None:
    (site.folder / "password").unlink()
    site.spec(site.vm("ctx-1"))
    said = site.run("plan")
    assert "SecretUnreadable" not in said or "password: No such file or directory" in said
    said = site.apply(code=1)
    assert "cannot read the secret file" in said
    assert "password: No such file or directory" in said
    assert appliance.starts() == []


def test_a_password_in_place_is_refused_and_not_repeated(site: Site) -> None:
    site.write_config(vcenters={"vc1": {"host": "h", "user": "u", "password": "hunter2"}})
    site.spec(site.vm("ctx-1"))
    said = site.run("plan", code=78)
    assert "a secret is never written in place" in said
    assert "hunter2" not in said


def test_disks_that_no_inventory_confirms(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    assert "DisksUnverified" in site.run("plan")
    site.apply()
    assert site.condition("ctx-1", "DisksUnverified")[0] == "True"
    assert "DisksUnverified" in site.run("status")


def test_a_list_that_is_not_the_inventorys_is_refused_with_both(
    site: Site, appliance: Appliance
) -> None:
    site.inventory({"ctx-1": {2000: MIB, 2001: 2 * MIB}})
    site.spec(site.vm("ctx-1", [MIB]))
    said = site.apply(code=65)
    assert "the spec lists the disks 2000 (1 MiB)" in said
    assert "the inventory knows 2000 (1 MiB), 2001 (2 MiB)" in said
    assert site.servers() == {}
    site.spec(site.vm("ctx-1", [MIB, 2 * MIB]))
    assert "DisksUnverified" not in site.apply()


def test_an_inventory_that_is_required_must_know_the_vm(site: Site, appliance: Appliance) -> None:
    site.inventory({"ctx-1": {2000: MIB}})
    site.write_config(inventory={"file": "inventory.yaml", "required": True})
    site.spec(site.vm("ctx-12"))
    said = site.apply(code=65)
    assert "does not know this VM" in said
    assert "= did you mean 'ctx-1'?" in said


def test_a_changed_spec_of_a_run_that_was_asked_for_shows_both_sides(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [MIB]))
    site.apply()
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    pids = site.pids()
    said = site.apply(code=1)
    assert "was asked for with the disks 2000, the spec now names 2000, 2001" in said
    assert site.pids() == pids
    assert len(appliance.starts()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["aply"], 64, "there is no command 'aply'; did you mean 'apply'?"),
        (["apply", "--yess"], 64, "No such option"),
        (["plan", "-o", "xml"], 64, "'xml' is not one of"),
        (["apply"], 64, "cannot ask without a terminal: add -y"),
        (["apply", "--timeout", "5s"], 64, "--timeout goes with --wait"),
        (["resolve", "ctx-1", "--reason", "x", "-y"], 64, "say one of --accepted"),
        (["--config", "nowhere.yaml", "plan"], 78, "cannot read nowhere.yaml"),
    ],
)
def test_a_mistyped_command(
    site: Site, appliance: Appliance, arguments: list[str], code: int, what: str
) -> None:
    site.spec(site.vm("ctx-1"))
    assert what in site.run(*arguments, code=code)
    assert site.servers() == {}


def test_a_lock_that_is_held_is_waited_for_and_named(site: Site, appliance: Appliance) -> None:
    appliance.misbehave("hang-before", 1)
    site.appliance_at(appliance.url, timeout="6s")
    site.spec(site.vm("ctx-1"))
    first = site.start("apply", "-y")
    from tests.e2e.site import until

    until(lambda: len(site.servers()) == 1, "the first apply at work")
    said = site.apply("--lock-timeout", "300ms", code=6)
    assert f"pid {first.pid} (reconciler apply" in said
    assert "being changed by" in site.run("status")
    first.communicate(timeout=60)
    assert first.returncode == 7


def test_a_state_directory_that_cannot_be_written(site: Site) -> None:
    site.write_config(state="/proc/nowhere")
    site.spec(site.vm("ctx-1"))
    assert "cannot use the state directory" in site.apply(code=1)
