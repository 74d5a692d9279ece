"""What a site costs to validate and to plan: one short spec, an inventory of many VMs.

`python bench/site.py [--vms 100,1000,5000] [--runs 3]`. CPU seconds of the whole command, its most
memory, and the share of reading (inventory, specs, templates) alone; each also as a ratio to the
first row's, per VM. Nothing is started: a plan changes nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DISKS = 3
SPEC = """\
vars:
  night: "{{ run | default('nightly-2026-11-26') }}"
  tier: "{{ 'gold' if 'gold' in group_names else 'silver' }}"
defaults:
  disks: inventory
  repository: local
  backup: {run: "{{ night }}", type: full}
  labels: {tier: "{{ tier }}", site: "{{ site | default('a') }}"}
vms:
  - loop: "{{ inventory | list }}"
    name: "{{ item }}"
    when: item is match('ctx-')
"""
CONFIG = """\
hub: bench
state: state
inventory: {file: inventory.yaml}
repositories: {local: {root: repository, min_free: 0}}
ports: {range: 1024-65535}
snas: {a: {url: "http://127.0.0.1:1", max_running: 100000}}
vcenters: {v: {host: v, user: u, password: {file: password}}}
"""
READING = """\
import gc, os, time
gc.set_threshold(50_000, 50, 50)
from reconciler.core import config, desired, inventory, spec_files
from reconciler.loop import load_settings, load_source
settings = load_settings(None, os.environ)
before = time.process_time()
source = load_source((), settings)
print(time.process_time() - before, len(source.specs.vms))
"""


def site(folder: Path, vms: int) -> None:
    """A directory in which `reconciler plan` plans so many VMs."""
    folder.mkdir()
    (folder / "specs" / "group_vars").mkdir(parents=True)
    (folder / "specs" / "site.yaml").write_text(SPEC)
    (folder / "specs" / "group_vars" / "gold.yaml").write_text("site: b\n")
    (folder / "reconciler.yaml").write_text(CONFIG)
    (folder / "password").write_text("x")
    disks = ", ".join(f"{{key: {2000 + n}, size: 1MiB}}" for n in range(DISKS))
    lines = ["groups: {gold: ['ctx-*7'], db: ['ctx-1*']}", "vms:"]
    for n in range(vms):
        lines += [f"  ctx-{n}:", f"    vm: {{name: vm{n}, path: /DC1/vm/vm{n}}}"]
        lines += [f"    disks: [{disks}]"]
    (folder / "inventory.yaml").write_text("\n".join(lines) + "\n")


def spent(command: list[str], folder: Path) -> tuple[float, float, str]:
    """CPU seconds and MiB of a command, and what it printed last."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed[-500:]
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, printed.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", default="100,1000,5000")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    reconciler = shutil.which("reconciler")
    assert reconciler, "install it first: make install"
    first: dict[str, float] = {}
    lines = SPEC.count("\n")
    print(f"a spec of {lines} lines, {DISKS} disks a VM; medians of {given.runs} runs")
    print("  VMs  what      CPU s  MiB   CPU per VM against the first")
    with tempfile.TemporaryDirectory() as top:
        for vms in map(int, given.vms.split(",")):
            folder = Path(top) / str(vms)
            site(folder, vms)
            for what in ("reading", "validate", "plan"):
                command = (
                    [sys.executable, "-c", READING] if what == "reading" else [reconciler, what]
                )
                runs = [spent(command, folder) for _ in range(given.runs)]
                cpu = [
                    float(said.split()[0]) if what == "reading" else one for one, _, said in runs
                ]
                took = statistics.median(cpu)
                memory = max(memory for _, memory, _ in runs)
                ratio = took / vms / first.setdefault(what, took / vms)
                said = runs[-1][2] if what != "reading" else ""
                print(f"{vms:>5}  {what:<8} {took:>6.2f} {memory:>4.0f}   {ratio:>5.2f}   {said}")


if __name__ == "__main__":
    main()
