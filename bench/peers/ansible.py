"""Ansible: a playbook that asks once and does what is missing, and one as its books teach it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from bench.hubs import Floor
from bench.peers import CALL, Peer, Unavailable, commands, environment, job, run, venv
from bench.workplace import Took, timed

CONFIG = """\
[defaults]
inventory = {root}/hosts
gathering = explicit
forks = {forks}
stdout_callback = default
display_ok_hosts = false
display_skipped_hosts = false
retry_files_enabled = false
host_key_checking = false
local_tmp = {root}/tmp
remote_tmp = {root}/tmp
interpreter_python = {python}
strategy = {strategy}
{plugins}
[connection]
pipelining = true
"""
TUNED = """\
- hosts: hub
  gather_facts: false
  vars:
    lines: {lines}
    vms: {vms}
  tasks:
    - name: look
      ansible.builtin.shell: "ss -Hltn | awk '{{print $4}}'; ls {root}/called 2>/dev/null || true"
      register: seen
      changed_when: false
    - name: servers
      vars:
        missing: "{{{{ lines | dict2items | rejectattr('key', 'in', seen.stdout_lines) }}}}"
      ansible.builtin.shell: |
        {{% for one in missing %}}
        {{{{ one.value }}}} >/dev/null 2>&1 </dev/null &
        {{% endfor %}}
      when: missing | length > 0
    - name: calls
      ansible.builtin.command: "{python} {call} {job}"
      when: vms | difference(seen.stdout_lines) | length > 0
"""
CAREFUL = """\
- hosts: vms
  gather_facts: false
  tasks:
    - name: is it up
      ansible.builtin.wait_for: {{host: 127.0.0.1, port: "{{{{ item.port }}}}", timeout: 1}}
      loop: "{{{{ disks }}}}"
      register: up
      ignore_errors: true
    - name: server
      ansible.builtin.command: "{{{{ item.item.line }}}}"
      loop: "{{{{ up.results }}}}"
      when: item is failed
    - name: it answers
      ansible.builtin.command: "nbdinfo --size {{{{ item.uri }}}}"
      loop: "{{{{ disks }}}}"
      changed_when: false
    - name: was it called for
      ansible.builtin.stat: {{path: "{root}/called/{{{{ inventory_hostname }}}}"}}
      register: called
    - name: is the appliance well
      ansible.builtin.uri: {{url: "{url}/api/v1/health"}}
      when: not called.stat.exists
    - name: note the call
      ansible.builtin.copy: {{content: "", dest: "{root}/called/{{{{ inventory_hostname }}}}"}}
      when: not called.stat.exists
    - name: call
      ansible.builtin.uri:
        url: "{url}/api/v1/backup/start"
        method: POST
        body_format: json
        body: "{{{{ request }}}}"
      when: not called.stat.exists
"""


class Ansible(Peer):
    """Three tasks on one host: one look, one command for all that is missing, one for all calls."""

    name = "ansible, tuned"
    packages: ClassVar[tuple[str, ...]] = ("ansible-core",)
    forks: ClassVar[int] = 4
    strategy: ClassVar[str] = "linear"

    def install(self) -> str:
        self.bin = venv(self.home, *self.packages)
        return run([self.bin / "ansible", "--version"]).split("]")[0].split("core ")[-1]

    def plugins(self) -> str:
        """Where the strategy is, if it is not Ansible's own."""
        return ""

    def prepare(self, floor: Floor) -> None:
        root = floor.site.root / "ansible"
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(floor.site.root / "called", ignore_errors=True)
        (floor.site.root / "called").mkdir()
        root.mkdir()
        self.root = root
        config = CONFIG.format(
            root=root,
            forks=self.forks,
            strategy=self.strategy,
            plugins=self.plugins(),
            python=sys.executable,
        )
        (root / "ansible.cfg").write_text(config)
        self.write(floor, root)

    def write(self, floor: Floor, root: Path) -> None:
        """The hosts, and the playbook."""
        addresses = [f"127.0.0.1:{disk.port}" for disk in floor.site.disks]
        lines = dict(zip(addresses, commands(floor).values(), strict=True))
        (root / "hosts").write_text("hub ansible_connection=local\n")
        (root / "play.yaml").write_text(
            TUNED.format(
                lines=json.dumps(lines),
                vms=json.dumps(list(floor.site.vms)),
                root=floor.site.root,
                python=sys.executable,
                call=CALL,
                job=job(floor),
            )
        )

    def cold(self, floor: Floor) -> Took:
        return self.again(floor)

    def again(self, floor: Floor) -> Took:  # noqa: ARG002
        line = [str(self.bin / "ansible-playbook"), "play.yaml"]
        return timed(line, self.root, environment(self.bin))


class AnsibleMitogen(Ansible):
    """The same with mitogen's strategy, which keeps an interpreter at the other end."""

    name = "ansible, tuned, mitogen"
    packages = ("ansible-core", "mitogen")
    strategy = "mitogen_linear"

    def install(self) -> str:
        version = super().install()
        found = list(self.home.glob("lib/python*/site-packages/ansible_mitogen/plugins/strategy"))
        if not found:
            raise Unavailable("mitogen has no strategy for Ansible")
        self.strategies = found[0]
        return version

    def plugins(self) -> str:
        return f"strategy_plugins = {self.strategies}"


class AnsibleCareful(Ansible):
    """A task for each step and a loop over disks, hosts side by side: as one would write it."""

    name = "ansible, careful"
    slow = True
    forks = 8
    strategy = "free"

    def write(self, floor: Floor, root: Path) -> None:
        site = floor.site
        lines = commands(floor)
        hosts = {
            vm: {
                "ansible_connection": "local",
                "request": site.request(vm),
                "disks": [
                    {
                        "port": disk.port,
                        "uri": f"nbd://127.0.0.1:{disk.port}/{disk.export}",
                        "line": lines[disk.export].replace("qemu-nbd", "qemu-nbd --fork", 1),
                    }
                    for disk in disks
                ],
            }
            for vm, disks in site.vms.items()
        }
        (root / "hosts").write_text(json.dumps({"vms": {"hosts": hosts}}))
        (root / "hosts").rename(root / "hosts.yaml")
        config = (root / "ansible.cfg").read_text()
        (root / "ansible.cfg").write_text(config.replace(f"{root}/hosts", f"{root}/hosts.yaml"))
        text = CAREFUL.format(root=site.root, url=site.appliance.url)
        (root / "play.yaml").write_text(text)
