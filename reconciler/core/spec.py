"""YAML → Spec: what a person may write about VMs, checked, every value with file:line:column."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal

from msgspec import Struct
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from reconciler.core.document import Document, Path
from reconciler.core.errors import Diagnostic, Place, nearest
from reconciler.core.explain import described, explained
from reconciler.core.limits import Looks
from reconciler.core.template import (
    MAX_LOOP,
    TemplateError,
    evaluate,
    is_template,
    names_in,
    render,
    render_tree,
)
from reconciler.core.units import format_size, parse_size, whole_sectors

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""VM contexts, runs, repositories, SNAs: safe in paths, URLs, argv and the targets string."""
MAX_NAME: Final = 100
"""Characters of a name. Two of them and a disk number fit a file name (255) and an export name."""
MAX_PATH: Final = 4_095
"""Characters of a path. Source: PATH_MAX in linux/limits.h, which counts a zero byte at the end."""
MAX_DECLARED: Final = 1_000_000
"""Values in all VMs of one file, loops followed, defaults filled in. 10,000 VMs of 10 disks hold
about 500,000."""
VM_COSTS: Final = 10
"""What a VM counts for beside its values: as much memory and time goes into it."""
MAX_LOOKS: Final = 100_000_000
"""Items and characters that all expressions of one file may look at. 10,000 VMs with ten plain
expressions each look at about 10,000,000."""
EXPORT: Final = re.compile(r"[A-Za-z0-9._-]*disk(\d+)")
"""The field's client takes the position from the end of the export name. Source: its parser."""


def _text(value: object) -> object:
    """A whole number where a name is meant is that name: `run: 20261123`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _name(value: str) -> str:
    if len(value) > MAX_NAME:
        raise ValueError(f"{value[:20]!r}… has {len(value)} characters; at most {MAX_NAME}")
    if not NAME.fullmatch(value):
        wrong = next((char for char in value if not re.match(r"[A-Za-z0-9._-]", char)), value[:1])
        raise ValueError(
            f"{value!r} holds {wrong!r} where only letters, digits, dot, dash and underscore can "
            "be (a letter or digit first)"
            if value
            else "a name cannot be empty"
        )
    return value


def _size(value: object) -> int:
    if not isinstance(value, str | int):
        raise ValueError("write a size like 40GiB")
    size = parse_size(value)
    if size == 0:
        raise ValueError("a disk of 0 bytes cannot be exported")
    if size > 1 << 60:
        raise ValueError(f"{format_size(size)} is more than any disk can hold")
    if size != whole_sectors(size):
        raise ValueError(
            f"{value} is {size} bytes, not a multiple of 512; the next one up is "
            f"{whole_sectors(size)} bytes"
        )
    return size


def _inside(value: str) -> str:
    """A path below the repository, as far as its text can tell; symlinks are looked at later."""
    if len(value) > MAX_PATH:
        raise ValueError(f"a path has at most {MAX_PATH:,} characters, this one {len(value):,}")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{value!r} leads out of the repository: write a path relative to its root, "
            "without '..'"
        )
    if not path.parts or "\0" in value or "\n" in value:
        raise ValueError(f"{value!r} is not a file name")
    if path.name.startswith("."):
        raise ValueError(f"{value!r} begins with a dot, as only files of our own do")
    return str(path)


def _export(value: str) -> str:
    if not EXPORT.fullmatch(value):
        wrong = next((char for char in value if not re.match(r"[A-Za-z0-9._-]", char)), None)
        problem = f"it holds {wrong!r}" if wrong else "it does not end in disk<N>"
        raise ValueError(
            f"{value!r} cannot be an export name: {problem}; the appliance splits targets at "
            "commas and colons and takes the disk's position from the end, so write letters, "
            "digits, dot, dash, underscore, and disk<N> last"
        )
    if len(value) > 255:
        raise ValueError(f"an export name has at most 255 characters, this one {len(value)}")
    return value


Name = Annotated[str, BeforeValidator(_text), AfterValidator(_name)]
Size = Annotated[int, BeforeValidator(_size)]
Inside = Annotated[str, AfterValidator(_inside)]
ExportName = Annotated[str, AfterValidator(_export)]
Label = Annotated[str, BeforeValidator(_text)]


class Strict(BaseModel):
    """A misspelt key is an error, and no value is bent into another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class DiskSpec(Strict):
    """One disk as a person writes it."""

    key: Annotated[int, Field(ge=0, lt=2**31)]
    size: Size | None = None
    image: Inside | None = None
    export: ExportName | None = None
    backing: Inside | None = None


class BackupSpec(Strict):
    """Which run is asked for. The run is the identity of the one call."""

    run: Name
    type: Literal["full", "incremental"] = "full"


class AddressSpec(Strict):
    """Where the VM is found at its vCenter."""

    name: str | None = None
    path: str | None = None
    vcenter: Name | None = None


class RestoreSpec(Strict):
    """The completed run that a restore reads."""

    vm: Name
    run: Name


class VmSpec(Strict):
    """One VM as a person writes it."""

    name: Name
    state: Literal["exported", "absent"] = "exported"
    purpose: Literal["backup", "restore"] = Field("backup", alias="for")
    repository: Name | None = None
    sna: Name | None = None
    vm: AddressSpec = AddressSpec()
    backup: BackupSpec | None = None
    release: Literal["on_completion", "keep"] = "on_completion"
    protect: bool = False
    labels: Mapping[str, Label] = Field(default_factory=dict)
    disks: Literal["inventory"] | list[DiskSpec] | None = None
    of: RestoreSpec | None = None


class Declared(Struct, frozen=True):
    """A checked VM with the way back to the text that declares it."""

    spec: VmSpec
    document: Document
    path: Path

    def place(self, *path: str | int, key: bool = False) -> Place:
        return self.document.place((*self.path, *path), key=key)


class Specs(Struct, frozen=True):
    """All that could be read of all files, and all that is wrong with the rest."""

    vms: tuple[Declared, ...]
    diagnostics: tuple[Diagnostic, ...]


_TOP: Final = ("vars", "defaults", "vms")
_ITEM: Final = ("loop", "when")
_DEFAULTS: Final = tuple(
    field.alias or name for name, field in VmSpec.model_fields.items() if name != "name"
)


def read(documents: Sequence[Document]) -> Specs:
    """Every VM of every file. A VM with an error is left out and reported; the others stand."""
    vms: list[Declared] = []
    diagnostics: list[Diagnostic] = []
    for document in documents:
        with Looks(MAX_LOOKS, "the expressions of this file look") as looks:
            vms.extend(_File(document, diagnostics, looks).vms())
    first: dict[str, Declared] = {}
    doubled: set[str] = set()
    for declared in vms:
        name = declared.spec.name
        if name not in first:
            first[name] = declared
            continue
        doubled.add(name)
        diagnostics.append(
            Diagnostic(
                "error",
                f"the VM {name!r} is declared twice (first at {first[name].place('name')}); "
                "neither is used: keep one",
                declared.place("name"),
            )
        )
    kept = tuple(one for one in vms if one.spec.name not in doubled)
    return Specs(kept, tuple(dict.fromkeys(diagnostics)))


class _File:
    """One file's vars, defaults and VMs."""

    def __init__(self, document: Document, diagnostics: list[Diagnostic], looks: Looks) -> None:
        self.document = document
        self.diagnostics = diagnostics
        self.looks = looks
        self.declared = 0
        """Values in the VMs so far."""

    def error(self, summary: str, *path: str | int, key: bool = False) -> None:
        self.diagnostics.append(Diagnostic("error", summary, self.document.place(path, key=key)))

    def vms(self) -> Iterator[Declared]:
        value = self.document.value
        if value is None:
            self.error("the file is empty: write `vms:` and a list, or remove the file")
            return
        if not isinstance(value, dict):
            self.error(f"expected the keys {', '.join(_TOP)}, found {described(value)}")
            return
        for key in value:
            if key not in _TOP:
                self.error(
                    f"unknown key {key!r}{nearest(key, _TOP)} (known here: {', '.join(_TOP)})",
                    key,
                    key=True,
                )
        if "vms" not in value and all(key in _TOP for key in value):
            self.error("the key 'vms' is missing: write `vms:` and a list of VMs")
        variables = self.variables(value.get("vars"))
        defaults = self.mapping(value.get("defaults"), "defaults")
        for key in [key for key in defaults if key not in _DEFAULTS]:
            hint = nearest(key, _DEFAULTS)
            self.error(f"unknown key {key!r} in defaults{hint}", "defaults", key, key=True)
            del defaults[key]
        items = value.get("vms")
        if items is None:
            if "vms" in value:
                self.error("`vms:` is empty: write a list of VMs, or [] for none", "vms")
            return
        if not isinstance(items, list):
            self.error(f"expected a list of VMs, found {described(items)}", "vms")
            return
        for index, item in enumerate(items):
            yield from self.item(item, index, variables, defaults)
            if self.full():
                many = f"this file declares more than {MAX_DECLARED:,} values, its loops followed; "
                said = "the VMs from here on are not read: split this file"
                self.error((many if self.looks.left >= 0 else "") + said, "vms", index)
                return

    def mapping(self, value: object, *path: str | int) -> dict[str, object]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.error(f"expected keys and values, found {described(value)}", *path)
            return {}
        return dict(value)

    def variables(self, value: object) -> dict[str, object]:
        """`vars:`, each of which may use the others, in any order."""
        raw = self.mapping(value, "vars")
        for name in raw:
            if not name.isidentifier():
                self.error(
                    f"{name!r} cannot be used in {{{{ }}}}: letters, digits and _ make a variable",
                    "vars",
                    name,
                    key=True,
                )
        uses = {name: _names(inner) & raw.keys() for name, inner in raw.items()}
        order, circles = _ordered(uses)
        for circle in circles:
            shown = circle if len(circle) < 10 else [*circle[:5], "…", *circle[-3:]]
            said = f"the vars go round in a circle: {' → '.join(shown)}"
            self.error(said, "vars", circle[0])
        done: dict[str, object] = {}
        broken = {circle[0] for circle in circles}
        for name in order:
            if name in broken or uses[name] & broken:
                broken.add(name)  # said already, where it begins
                continue
            try:
                done[name] = render_tree(raw[name], done)
            except TemplateError as error:
                broken.add(name)
                self.error(str(error), "vars", name)
        return done

    def full(self) -> bool:
        """Whether there is more in this file than anybody can have meant."""
        return self.declared > MAX_DECLARED or self.looks.left < 0

    def item(
        self,
        item: object,
        index: int,
        variables: dict[str, object],
        defaults: Mapping[str, object],
    ) -> Iterator[Declared]:
        path: Path = ("vms", index)
        if not isinstance(item, dict):
            self.error(f"expected a VM with at least a name, found {described(item)}", *path)
            return
        for scope in self.scopes(item, path, variables):
            if not self.wanted(item, path, scope):
                continue
            merged = merge(
                {k: v for k, v in defaults.items() if _applies(k, item, defaults)},
                {k: v for k, v in item.items() if k not in _ITEM},
            )
            raw = self.evaluated(merged, item, path, scope)
            if raw is not None:
                yield from self.checked(raw, item, path)
            if self.full():
                return

    def scopes(
        self, item: Mapping[str, object], path: Path, variables: dict[str, object]
    ) -> Iterator[Mapping[str, object]]:
        if "loop" not in item:
            yield variables
            return
        loop = item["loop"]
        try:
            items = render_tree(loop, variables)
        except TemplateError as error:
            self.error(str(error), *path, "loop")
            return
        if not isinstance(items, list):
            self.error(f"expected a list to loop over, found {described(items)}", *path, "loop")
            return
        if len(items) > MAX_LOOP:
            self.error(f"this loop has {len(items):,} items; at most {MAX_LOOP:,}", *path, "loop")
            return
        for each in items:
            yield ChainMap({"item": each}, variables)

    def wanted(self, item: Mapping[str, object], path: Path, scope: Mapping[str, object]) -> bool:
        condition = item.get("when", True)
        try:
            if is_template(condition):
                condition = render(str(condition), scope)
            elif isinstance(condition, str):
                condition = evaluate(condition, scope)
        except TemplateError as error:
            self.error(str(error), *path, "when")
            return False
        if not isinstance(condition, bool):
            self.error(
                f"`when` must come out as true or false, not as {described(condition)}",
                *path,
                "when",
            )
            return False
        return condition

    def evaluated(
        self,
        merged: Mapping[str, object],
        item: Mapping[str, object],
        path: Path,
        scope: Mapping[str, object],
    ) -> dict[str, object] | None:
        raw: dict[str, object] = {}
        self.declared += VM_COSTS
        failed = False
        for key, value in merged.items():
            try:
                raw[key] = render_tree(value, scope)
                self.declared += _count(raw[key])
            except TemplateError as error:
                failed = True
                where: Path = (*path, key) if key in item else ("defaults", key)
                self.error(str(error), *self.first_template(value, where))
        return None if failed else raw

    def first_template(self, value: object, path: Path) -> Path:
        """Where in a tree the templated text is; good enough where there is only one."""
        if isinstance(value, dict):
            for key, inner in value.items():
                if _names(inner):
                    return self.first_template(inner, (*path, key))
        if isinstance(value, list):
            for index, inner in enumerate(value):
                if _names(inner):
                    return self.first_template(inner, (*path, index))
        return path

    def checked(
        self, raw: Mapping[str, object], item: Mapping[str, object], path: Path
    ) -> Iterator[Declared]:
        try:
            spec = VmSpec.model_validate(raw)
        except ValidationError as error:
            for place, summary in explained(error, raw, VmSpec):
                key = isinstance(place[0], str) and place[0] in item
                where: Path = (*path, *place) if key or not place[0] else ("defaults", *place)
                if not key and place and place[0] not in self.mapping_keys("defaults"):
                    where = path
                self.diagnostics.append(
                    Diagnostic(
                        "error",
                        summary,
                        self.document.place(where, key=summary.startswith("unknown key")),
                    )
                )
            return
        declared = Declared(spec, self.document, path)
        problems = list(_contradictions(declared))
        self.diagnostics.extend(problems)
        if not problems:
            yield declared

    def mapping_keys(self, key: str) -> frozenset[str]:
        value = self.document.value
        inner = value.get(key) if isinstance(value, dict) else None
        return frozenset(inner) if isinstance(inner, dict) else frozenset()


def merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """`over` on top of `base`: keys and values go into each other, anything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _applies(key: str, item: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
    """Whether a default means this VM: a restore has no backup, and `of` names its disks."""
    if key == "backup" and item.get("for", defaults.get("for")) == "restore":
        return False
    return not (key == "disks" and "of" in item)


def _ordered(uses: Mapping[str, frozenset[str]]) -> tuple[list[str], list[list[str]]]:
    """The names, each after those that it uses; and the circles that are among them."""
    order: dict[str, None] = {}
    circles: dict[str, list[str]] = {}
    for name in uses:
        waiting = {} if name in order else {name: sorted(uses[name], reverse=True)}
        while waiting:
            current = next(reversed(waiting))
            if not waiting[current]:
                del waiting[current]
                order[current] = None
                continue
            needed = waiting[current].pop()
            if needed in waiting and needed not in circles:
                trail = list(waiting)
                circles[needed] = [*trail[trail.index(needed) :], needed]
            elif needed not in waiting and needed not in order:
                waiting[needed] = sorted(uses[needed], reverse=True)
    return list(order), list(circles.values())


def _count(value: object) -> int:
    """Values in a tree, keys left out."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def _names(value: object) -> frozenset[str]:
    if is_template(value):
        return names_in(str(value)) or frozenset([""])
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return frozenset().union(*map(_names, value)) if value else frozenset()
    return frozenset()


def _contradictions(declared: Declared) -> Iterator[Diagnostic]:
    """What no single key can tell."""
    spec = declared.spec

    def error(summary: str, *path: str | int) -> Diagnostic:
        return Diagnostic("error", f"VM {spec.name}: {summary}", declared.place(*path))

    if spec.state == "absent":
        return
    if spec.purpose == "backup":
        if spec.backup is None:
            yield error("the key 'backup' is missing: write `backup: {run: NAME}`")
        if spec.disks is None:
            yield error("the key 'disks' is missing: write `disks: inventory` or a list of disks")
        if spec.of is not None:
            yield error("`of` names what a restore reads: write `for: restore` with it", "of")
    else:
        if spec.backup is not None:
            yield error("a restore makes no backup: remove `backup`, or `for: restore`", "backup")
        if (spec.of is None) == (spec.disks is None):
            yield error("a restore takes either `of: {vm, run}` or `disks` with images, not both")
        if spec.disks == "inventory":
            yield error("the inventory knows no images: write `of: {vm, run}`", "disks")
    if not isinstance(spec.disks, list):
        return
    if not spec.disks:
        yield error("`disks` is an empty list: name at least one disk", "disks")
    run = spec.backup.run if spec.backup else ""
    seen: dict[tuple[str, object], int] = {}
    for index, disk in enumerate(spec.disks):
        for what, value in (("key", disk.key), ("export", disk.export), ("image", disk.image)):
            if value is None:
                continue
            other = seen.setdefault((what, value), index)
            if other != index:
                line = declared.place("disks", other, what).line
                yield error(
                    f"two disks have the {what} {value!r} (the other on line {line})",
                    "disks",
                    index,
                    what,
                )
        if spec.purpose == "restore" and disk.image is None:
            yield error(f"disk {disk.key} of a restore needs its `image`", "disks", index)
        if disk.export is None:
            continue
        position = int(EXPORT.fullmatch(disk.export).group(1))  # type: ignore[union-attr]
        if position != index:
            yield error(
                f"the export name {disk.export!r} ends in disk{position}, but this disk is at "
                f"position {index}: the appliance would write another disk into it",
                "disks",
                index,
                "export",
            )
        if run not in disk.export:
            yield error(
                f"the export name {disk.export!r} does not contain the run {run!r}, so a late "
                "writer of an older run would find it; leave `export` out to get a right one",
                "disks",
                index,
                "export",
            )
