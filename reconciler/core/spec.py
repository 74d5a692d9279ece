"""YAML → Spec: what may be written about VMs and runs, checked, each value with its place."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal, TypeVar

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
MAX_WHO: Final = 200
"""Characters of who asked for a run; it is kept for ever, and shown on one line."""
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


def checked_name(value: str) -> str:
    """A name that is safe wherever it goes. Raises ValueError."""
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


def _who(value: str) -> str:
    if len(value) > MAX_WHO or not value.isprintable():
        raise ValueError(f"write one line of at most {MAX_WHO} characters")
    return value


Name = Annotated[str, BeforeValidator(_text), AfterValidator(checked_name)]
Size = Annotated[int, BeforeValidator(_size)]
Inside = Annotated[str, AfterValidator(_inside)]
ExportName = Annotated[str, AfterValidator(_export)]
Label = Annotated[str, BeforeValidator(_text)]


class Strict(BaseModel):
    """A misspelt key is an error, and no value is bent into another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


_Model = TypeVar("_Model", bound=Strict)


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


class RunSpec(Strict):
    """A run that is asked for beside the VM's own declaration."""

    vm: Name
    run: Name
    type: Literal["full", "incremental"] = "full"
    by: Annotated[str, AfterValidator(_who)] = ""
    """Who asked; written by tools."""


class Asked(Struct, frozen=True):
    """A checked entry of `runs:` with the way back to the text that has it."""

    spec: RunSpec
    document: Document
    path: Path
    aside: bool = False
    """It stands among the requests while `-f` says what this is about: then it brings no VM in."""

    def place(self, *path: str | int, key: bool = False) -> Place:
        return self.document.place((*self.path, *path), key=key)


class Declared(Struct, frozen=True):
    """A checked VM with the way back to the text that declares it."""

    spec: VmSpec
    document: Document
    path: Path
    entry: Asked | None = None
    """What asks for its run, where that is not its own `backup`."""

    def place(self, *path: str | int, key: bool = False) -> Place:
        if self.entry and path[:1] == ("backup",):
            return self.entry.place(*path[1:], key=key)
        return self.document.place((*self.path, *path), key=key)


class Specs(Struct, frozen=True, dict=True):
    """All that could be read of all files, and all that is wrong with the rest."""

    vms: tuple[Declared, ...]
    diagnostics: tuple[Diagnostic, ...]
    runs: tuple[Asked, ...] = ()
    """In reading order."""
    refused: frozenset[str] = frozenset()
    """VMs that are declared, and in such a way that they cannot be used."""
    unread: frozenset[str] = frozenset()
    """Files that declare or ask for something that could not be read."""

    @property
    def failed(self) -> bool:
        return any(one.severity == "error" for one in self.diagnostics)

    def only(self, names: Collection[str]) -> Specs:
        """The same of some VMs: cheap, however many others there are."""
        vms, runs = self._by_name
        return Specs(
            vms=tuple(vms[name] for name in names if name in vms),
            diagnostics=tuple(one for one in self.diagnostics if one.vm in names),
            runs=tuple(one for name in names for one in runs.get(name, ())),
            refused=self.refused.intersection(names),
            unread=self.unread,
        )

    @cached_property
    def _by_name(self) -> tuple[Mapping[str, Declared], Mapping[str, Sequence[Asked]]]:
        runs: dict[str, list[Asked]] = {}
        for one in self.runs:
            runs.setdefault(one.spec.vm, []).append(one)
        return {one.spec.name: one for one in self.vms}, runs


_TOP: Final = ("vars", "defaults", "vms", "runs")
_REQUESTS: Final = ("vars", "runs")
"""What may stand in a file of requests: it asks for runs and declares nothing."""
_ITEM: Final = ("loop", "when")
_DEFAULTS: Final = tuple(
    field.alias or name for name, field in VmSpec.model_fields.items() if name != "name"
)


class Found(Struct, frozen=True):
    """What one file says, and what is wrong with it; whoever reads it again need not, if it did
    not change."""

    file: str
    vms: tuple[Declared, ...] = ()
    runs: tuple[Asked, ...] = ()
    """In reading order."""
    diagnostics: tuple[Diagnostic, ...] = ()
    refused: frozenset[str] = frozenset()
    """VMs with an error."""
    lost: bool = False
    """There may be a VM or a run here of which not even the name could be read."""


def read(
    documents: Sequence[Document], requests: Sequence[Document] = (), *, scoped: bool = False
) -> Specs:
    """Every VM and every run of every file. One with an error is left out; the others stand.

    `requests`: files of runs alone, read last. `scoped`: they are not what this is about, so they
    count only for VMs that the other files name.
    """
    found = [read_file(document) for document in documents]
    found += [read_request(document, aside=scoped) for document in requests]
    return join(found)


def read_file(document: Document) -> Found:
    """What a file of specs says."""
    return _File(document).found()


def read_request(document: Document, *, aside: bool = False) -> Found:
    """What a file of requests says: it asks for runs and declares nothing."""
    return _File(document, aside=aside, top=_REQUESTS).found()


def join(files: Sequence[Found]) -> Specs:
    """All that some files say, in their order."""
    diagnostics = [one for file in files for one in file.diagnostics]
    refused = {name for file in files for name in file.refused}
    first: dict[str, Declared] = {}
    doubled: set[str] = set()
    for declared in (one for file in files for one in file.vms):
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
                name,
            )
        )
    used = {name: one for name, one in first.items() if name not in doubled}
    return Specs(
        vms=tuple(used.values()),
        diagnostics=tuple(dict.fromkeys(diagnostics)),
        runs=tuple(one for file in files for one in file.runs),
        refused=frozenset((refused | doubled) - used.keys()),
        unread=frozenset(file.file for file in files if file.lost),
    )


class _File:
    """One file's vars, defaults, VMs and runs."""

    def __init__(
        self, document: Document, *, aside: bool = False, top: Sequence[str] = _TOP
    ) -> None:
        self.document = document
        self.aside = aside
        self.top = top
        self.main = "vms" if "vms" in top else "runs"
        self.diagnostics: list[Diagnostic] = []
        self.refused: set[str] = set()
        """VMs with an error."""
        self.lost = False
        """There may be a VM or a run here of which not even the name could be read."""
        self.looks = Looks(MAX_LOOKS, "the expressions of this file look")
        self.declared = 0
        """Values in the VMs and runs so far."""

    def error(self, summary: str, *path: str | int, key: bool = False, vm: str = "") -> None:
        place = self.document.place(path, key=key)
        self.diagnostics.append(Diagnostic("error", summary, place, vm))

    def unusable(self, summary: str, *path: str | int, key: bool = False) -> None:
        """An error after which nobody knows what else the file says."""
        self.lost = True
        self.error(summary, *path, key=key)

    def found(self) -> Found:
        """Every VM and run of the file, as far as its expressions keep within their limit."""
        with self.looks:
            everything = list(self.everything())
        vms: list[Declared] = []
        for one in everything:
            problems = list(_contradictions(one)) if isinstance(one, Declared) else []
            self.diagnostics += problems
            if isinstance(one, Declared) and problems:
                self.refused.add(one.spec.name)
            elif isinstance(one, Declared):
                vms.append(one)
        return Found(
            self.document.file,
            tuple(vms),
            tuple(one for one in everything if isinstance(one, Asked)),
            tuple(self.diagnostics),
            frozenset(self.refused),
            self.lost,
        )

    def everything(self) -> Iterator[Declared | Asked]:
        value = self.document.value
        if value is None:
            self.unusable(f"the file is empty: write `{self.main}:` and a list, or remove the file")
            return
        if not isinstance(value, dict):
            self.unusable(f"expected the keys {', '.join(self.top)}, found {described(value)}")
            return
        for key in value:
            if key not in self.top:
                self.unusable(
                    f"unknown key {key!r}{nearest(key, self.top)} "
                    f"(known here: {', '.join(self.top)})",
                    key,
                    key=True,
                )
        if not {"vms", "runs"} & value.keys() and all(key in self.top for key in value):
            self.unusable(f"the key {self.main!r} is missing: write `{self.main}:` and a list")
        variables = self.variables(value.get("vars"))
        defaults = self.mapping(value.get("defaults"), "defaults")
        for key in [key for key in defaults if key not in _DEFAULTS]:
            hint = nearest(key, _DEFAULTS)
            self.error(f"unknown key {key!r} in defaults{hint}", "defaults", key, key=True)
            del defaults[key]
        for key, what in (("vms", "VMs"), ("runs", "runs")):
            if key not in value or key not in self.top:
                continue
            for path, item in self.items(value[key], key, what):
                if key == "vms":
                    yield from self.vm(item, path, variables, defaults)
                else:
                    yield from self.run(item, path, variables)
                if self.full():
                    many = f"this file declares more than {MAX_DECLARED:,} values, loops followed; "
                    said = f"the {what} from here on are not read: split this file"
                    self.unusable((many if self.looks.left >= 0 else "") + said, *path)
                    return

    def items(self, value: object, key: str, what: str) -> Iterator[tuple[Path, object]]:
        if value is None:
            self.unusable(f"`{key}:` is empty: write a list of {what}, or [] for none", key)
        elif not isinstance(value, list):
            self.unusable(f"expected a list of {what}, found {described(value)}", key)
        else:
            for index, item in enumerate(value):
                yield (key, index), item

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

    def vm(
        self,
        item: object,
        path: Path,
        variables: dict[str, object],
        defaults: Mapping[str, object],
    ) -> Iterator[Declared]:
        if not isinstance(item, dict):
            self.unusable(f"expected a VM with at least a name, found {described(item)}", *path)
            return
        for scope in self.scopes(item, path, variables):
            merged = merge(
                {k: v for k, v in defaults.items() if _applies(k, item, defaults)},
                {k: v for k, v in item.items() if k not in _ITEM},
            )
            raw = self.evaluated(merged, item, path, scope)
            spec = None if raw is None else self.checked(VmSpec, raw, item, path)
            if spec is not None:
                yield Declared(spec, self.document, path)
                if self.full():
                    return
                continue
            name = (raw or item).get("name")
            if isinstance(name, str) and not is_template(name):
                self.refused.add(name)
            else:
                self.lost = True

    def run(self, item: object, path: Path, variables: dict[str, object]) -> Iterator[Asked]:
        if not isinstance(item, dict):
            self.unusable(f"expected a run with `vm` and `run`, found {described(item)}", *path)
            return
        for scope in self.scopes(item, path, variables):
            written = {key: value for key, value in item.items() if key not in _ITEM}
            raw = self.evaluated(written, item, path, scope)
            spec = None if raw is None else self.checked(RunSpec, raw, item, path)
            if spec is None:
                self.lost = True
            else:
                yield Asked(spec, self.document, path, self.aside)

    def scopes(
        self, item: Mapping[str, object], path: Path, variables: dict[str, object]
    ) -> Iterator[Mapping[str, object]]:
        """The variables of each thing that an item stands for and that is meant."""
        for scope in self.looped(item, path, variables):
            if self.wanted(item, path, scope):
                yield scope

    def looped(
        self, item: Mapping[str, object], path: Path, variables: dict[str, object]
    ) -> Iterator[Mapping[str, object]]:
        if "loop" not in item:
            yield variables
            return
        loop = item["loop"]
        try:
            items = render_tree(loop, variables)
        except TemplateError as error:
            self.unusable(str(error), *path, "loop")
            return
        if not isinstance(items, list):
            self.unusable(f"expected a list to loop over, found {described(items)}", *path, "loop")
            return
        if len(items) > MAX_LOOP:
            self.unusable(
                f"this loop has {len(items):,} items; at most {MAX_LOOP:,}", *path, "loop"
            )
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
            self.unusable(str(error), *path, "when")
            return False
        if not isinstance(condition, bool):
            self.unusable(
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
        name = item.get("name", item.get("vm"))
        vm = name if isinstance(name, str) and not is_template(name) else ""
        self.declared += VM_COSTS
        failed = False
        for key, value in merged.items():
            try:
                raw[key] = render_tree(value, scope)
                self.declared += _count(raw[key])
            except TemplateError as error:
                failed = True
                where: Path = (*path, key) if key in item else ("defaults", key)
                self.error(str(error), *self.first_template(value, where), vm=vm)
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
        self,
        model: type[_Model],
        raw: Mapping[str, object],
        item: Mapping[str, object],
        path: Path,
    ) -> _Model | None:
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            vm = raw.get("name" if model is VmSpec else "vm")
            for place, summary in explained(error, raw, model):
                key = isinstance(place[0], str) and place[0] in item
                where: Path = (*path, *place) if key or not place[0] else ("defaults", *place)
                if not key and place and place[0] not in self.mapping_keys("defaults"):
                    where = path
                self.error(
                    summary,
                    *where,
                    key=summary.startswith("unknown key"),
                    vm=vm if isinstance(vm, str) else "",
                )
            return None

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
        return _about(declared, summary, *path)

    if spec.state == "absent":
        return
    if spec.purpose == "backup":
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


def run_contradictions(declared: Declared) -> Iterator[Diagnostic]:
    """What is wrong with a VM and the run that is asked for, once it is known which one that is."""
    spec = declared.spec
    if spec.state == "absent":
        return
    run = spec.backup.run if spec.backup else ""
    for index, disk in enumerate(spec.disks if isinstance(spec.disks, list) else ()):
        if disk.export is not None and run not in disk.export:
            yield _about(
                declared,
                f"the export name {disk.export!r} does not contain the run {run!r}, so a late "
                "writer of an older run would find it; leave `export` out to get a right one",
                "disks",
                index,
                "export",
            )


def _about(declared: Declared, summary: str, *path: str | int) -> Diagnostic:
    name = declared.spec.name
    return Diagnostic("error", f"VM {name}: {summary}", declared.place(*path), name)
