"""Feeds the loader of specs with what a fuzzer makes up: no traceback, no hang, no memory.

`python -m tests.fuzzing CORPUS -max_total_time=600 …` with libFuzzer's options. One input is up to
five files, separated by a line of `%`: a spec, group_vars, host_vars, a file that it may include or
take variables from, and an inventory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from reconciler.core import inventory_file, spec_files
from reconciler.core.around import Nothing, Side
from reconciler.core.declared import join
from reconciler.core.desired import build
from reconciler.core.document import parse
from reconciler.core.errors import Diagnostic
from reconciler.core.inventory import Inventory
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Settings

BETWEEN: Final = "\n%\n"
SECONDS: Final = 20
"""What one input may take: the limits of one file are set for about a second of looks, on a machine
that has nothing else to do and runs no fuzzer's instrumentation."""
MEMORY: Final = 2_048
"""MiB."""
WORDS: Final = """
vars: vars_files: include: defaults: vms: runs: loop: loop_var: when: groups: name: state: exported
absent for: backup restore repository: sna: vm: path: vcenter: run: type: full incremental release:
protect: labels: disks: inventory key: size: image: export: backing: of: file: {{ }} item vm_name
group_names range( lookup('env', lookup('file', default( mandatory regex_replace( regex_search(
combine( dict2items items2dict flatten union( to_size human_size map( select( selectattr( join(
replace( ~ ** * <<: &a *a !!str !!int - ? | > { } [ ] ' " , # %
""".split()


class Given(Nothing):
    """Whatever is asked for is one of a few texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.sides = [self.side(f"{n}.yaml", text) for n, text in enumerate(texts)]
        self.texts = texts
        self.known: Inventory | None = None

    def side(self, name: str, text: str) -> Side:
        document, wrong = parse(text, name)
        return Side(name, document, tuple(wrong))

    def inventory(self) -> Mapping[str, Any] | None:
        return self.known.facts() if self.known else None

    def groups_of(self, vm: str) -> Sequence[str]:
        return self.known.groups_of(vm) if self.known else ()

    def group_vars(self, _group: str) -> Sequence[Side]:
        return self.sides[:1]

    def host_vars(self, _vm: str) -> Sequence[Side]:
        return self.sides[1:2]

    def file(self, _path: str, _beside: str, *, spec: bool = False) -> Side:
        return self.sides[2] if len(self.sides) > 2 else self.side("none", "")

    def text(self, _path: str, _beside: str) -> str | None:
        return self.texts[0] if self.texts else None

    def variable(self, name: str) -> str | None:
        return name if len(name) % 2 else None


def load(text: str) -> int:
    """Everything from the text to what is desired; how many VMs that is. Raises nothing."""
    spec, *others = text.split(BETWEEN, 4)
    given = Given(others)
    wrong: list[Diagnostic] = []
    if len(others) > 3 and given.sides[3].document:
        given.known, wrong = inventory_file.read(given.sides[3].document)
    document, found = parse(spec, "a.yaml")
    for one in (*wrong, *found):
        str(one)
    if document is None:
        return 0
    read = spec_files.read_file(document, given, explain="a")
    specs = join([read])
    settings = Settings(hub="h", state="/s", repositories={"local": "/r"})
    desired = build(specs, given.known, settings, Ledger(hub="h", state_id=""))
    for one in desired.diagnostics:
        assert one.place is None or one.place.line > 0
        assert "\n" not in str(one) or "\n" in spec, one
    return len(desired.vms)


def seeds(root: Path) -> list[str]:
    """Every spec of the repository, and some with what lies around them."""
    texts = [path.read_text() for path in sorted(root.glob("examples/**/*.y*ml"))]
    texts += [path.read_text() for path in sorted(root.glob("specs/**/*.y*ml"))]
    site = (
        "vars: {run: 'n-{{ night }}', tier: \"{{ 'gold' if 'g' in group_names else 's' }}\"}\n"
        "vars_files: [vars/x.yaml]\n"
        "include: [{file: includes/x.yaml, vars: {x: 1}}]\n"
        "defaults: {disks: inventory, backup: {run: '{{ run }}'}, labels: {t: '{{ tier }}'}}\n"
        "vms:\n"
        "  - loop: '{{ inventory | list }}'\n"
        "    loop_var: one\n"
        "    name: '{{ one }}'\n"
        "    groups: [g]\n"
        "    when: \"one is match('a') and lookup('env', 'X', default='') == ''\"\n"
        "    vars: {y: \"{{ one | regex_replace('a(.)', '\\\\1') }}\"}\n"
    )
    around = ["night: 1", "z: '{{ y }}'", "vms: []", "groups: {g: ['a*']}\nvms: {a: {disks: []}}"]
    return [*texts, BETWEEN.join([site, *around])]


def main(arguments: Sequence[str]) -> None:
    """Until libFuzzer's limits, or the first input that fails."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    atheris.instrument_all()

    def one(data: bytes) -> None:
        load(data.decode("utf-8", "surrogateescape"))

    atheris.Setup(list(arguments), one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
