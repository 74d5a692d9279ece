"""Files of specs → what they declare and ask for, each finding with its place.

Templates are evaluated after YAML is parsed, value by value. A VM with an error is left out; the
others stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from msgspec.structs import replace
from pydantic import ValidationError

from reconciler.core.around import Around, Nothing, Side
from reconciler.core.declared import (
    Asked,
    Declared,
    Found,
    Specs,
    contradictions,
    join,
)
from reconciler.core.document import Document, Path
from reconciler.core.errors import Diagnostic, described, nearest
from reconciler.core.explain import explained
from reconciler.core.filters import looking_up, merged
from reconciler.core.limits import Looks
from reconciler.core.spec import RunSpec, Strict, VmSpec, checked_name
from reconciler.core.template import MAX_LOOP, TemplateError, is_template
from reconciler.core.tunnel import PREFIX
from reconciler.core.variables import (
    EXTRA,
    GROUP_NAMES,
    RESERVED,
    VM_NAME,
    Frame,
    Layer,
    Scope,
    Variable,
    VariableError,
    names_of,
)

if TYPE_CHECKING:  # it is imported where a file has a tunnel: its models cost 3 ms
    from reconciler.core.tunnel_spec import DeclaredTunnel

MAX_DECLARED: Final = 1_000_000
"""Values in all VMs of one file, loops followed, defaults filled in. 10,000 VMs of 10 disks hold
about 500,000."""
VM_COSTS: Final = 10
"""What a VM counts for beside its values: as much memory and time goes into it."""
MAX_LOOKS: Final = 100_000_000
"""Items and characters that all expressions of one file may look at. 10,000 VMs with ten plain
expressions each look at about 10,000,000."""
MAX_INCLUDES: Final = 100
"""Files that one file includes, and those that they include, and so on."""
ALL: Final = "all"
"""The group of every VM."""

_TOP: Final = ("vars", "vars_files", "include", "defaults", "vms", "runs", "tunnels")
_REQUESTS: Final = ("vars", "runs")
"""What may stand in a file of requests: it asks for runs and declares nothing."""
_ITEM: Final = ("loop", "loop_var", "when", "vars", "groups")
"""What may stand beside the keys of a VM or a run, and is no part of it."""
_DEFAULTS: Final = (
    *(field.alias or name for name, field in VmSpec.model_fields.items() if name != "name"),
    "groups",
)

_Model = TypeVar("_Model", bound=Strict)


def _model_of(path: Path) -> type[Strict]:
    """What stands at a place of a file of specs."""
    if path[0] == "tunnels":
        from reconciler.core.tunnel_spec import TunnelSpec

        return TunnelSpec
    return RunSpec if path[0] == "runs" else VmSpec


def read(
    documents: Sequence[Document], requests: Sequence[Document] = (), *, scoped: bool = False
) -> Specs:
    """Every VM and every run of files around which there is nothing.

    `requests`: files of runs alone, read last. `scoped`: they are not what this is about, so they
    count only for VMs that the other files name.
    """
    found = [read_file(document) for document in documents]
    found += [read_request(document, aside=scoped) for document in requests]
    return join(found)


def read_file(document: Document, around: Around | None = None, *, explain: str = "") -> Found:
    """What a file of specs says. `explain`: a VM of which the variables are to be told."""
    return _Reading(around or Nothing(), explain=explain).found(document)


def read_request(document: Document, *, aside: bool = False) -> Found:
    """What a file of requests says: it asks for runs and declares nothing."""
    return _Reading(Nothing(), aside=aside, top=_REQUESTS).found(document)


class _Unusable(Exception):  # noqa: N818 never leaves this module
    """What was found is written down already; nothing more can be made of this thing."""

    def __init__(self, found: Sequence[Diagnostic] = ()) -> None:
        super().__init__()
        self.found = found
        """What it was; it hurts each VM that needs it."""


class _Reading:
    """One file, and those that it includes."""

    def __init__(
        self,
        around: Around,
        *,
        aside: bool = False,
        top: Sequence[str] = _TOP,
        explain: str = "",
    ) -> None:
        self.around = around
        self.aside = aside
        self.top = top
        self.explain = explain
        self.explained: tuple[Variable, ...] | None = None
        self.main = "vms" if "vms" in top else "runs"
        self.diagnostics: dict[Diagnostic, None] = {}
        self.refused: set[str] = set()
        """VMs with an error."""
        self.lost = False
        """There may be a VM or a run here of which not even the name could be read."""
        self.looks = Looks(MAX_LOOKS, "the expressions of this file look")
        self.declared = 0
        """Values in the VMs and runs so far."""
        self.included = 0
        self.layers: dict[tuple[str, str], Layer | tuple[Diagnostic, ...]] = {}
        """(Origin, file) → the layer that was made of it, or what is wrong with it."""

    @property
    def full(self) -> bool:
        """Whether there is more in this file than anybody can have meant."""
        return self.declared > MAX_DECLARED or self.looks.left < 0

    def found(self, document: Document) -> Found:
        """Every VM and run of the file, as far as its expressions keep within their limit."""
        with self.looks, looking_up(self.looked_up(document.file)):
            everything = list(_Part(self, document).everything())
        vms: list[Declared] = []
        tunnels: list[DeclaredTunnel] = []
        for one in everything:
            match one:
                case Declared():
                    problems, name = list(contradictions(one)), one.spec.name
                case Asked():
                    continue
                case _:
                    from reconciler.core import tunnel_spec

                    problems, name = list(tunnel_spec.contradictions(one)), one.subject
            self.diagnostics |= dict.fromkeys(problems)
            if problems:
                self.refused.add(name)
            elif isinstance(one, Declared):
                vms.append(one)
            else:
                tunnels.append(one)
        return Found(
            document.file,
            tuple(vms),
            tuple(one for one in everything if isinstance(one, Asked)),
            tuple(tunnels),
            tuple(self.diagnostics),
            frozenset(self.refused),
            self.lost,
            self.explained,
        )

    def looked_up(self, file: str) -> _LookUp:
        return _LookUp(self.around, file)

    def layer(self, side: Side, origin: str) -> Layer:
        """The variables of a file beside. Raises _Unusable."""
        key = (origin, side.file)
        if key not in self.layers:
            self.layers[key] = side.wrong
            if side.document is not None and not side.wrong:
                try:
                    self.layers[key] = self.checked_layer(
                        side.document.value, origin, side.document, ()
                    )
                except _Unusable as error:
                    self.layers[key] = tuple(error.found)
        known = self.layers[key]
        if isinstance(known, Layer):
            return known
        raise _Unusable(known)

    def checked_layer(self, value: object, origin: str, document: Document, path: Path) -> Layer:
        """Variables as a layer. Raises _Unusable."""
        if value is None:
            return Layer(origin, {}, document, path)
        if not isinstance(value, dict):
            summary = f"expected variables, as keys and values, found {described(value)}"
            raise _Unusable([Diagnostic("error", summary, document.place(path))])
        for name in value:
            why = not_a_variable(name)
            if why:
                self.error(why, document, (*path, name), key=True)
        return Layer(origin, value, document, path)

    def unusable(self, error: _Unusable, vm: str = "") -> None:
        """What hurts a VM; without a name, it may hurt any."""
        self.diagnostics |= dict.fromkeys(replace(one, vm=vm) for one in error.found)
        if vm:
            self.refused.add(vm)
        else:
            self.lost = True

    def error(
        self, summary: str, document: Document, path: Path, *, key: bool = False, vm: str = ""
    ) -> None:
        self.diagnostics[Diagnostic("error", summary, document.place(path, key=key), vm)] = None


def not_a_variable(name: str) -> str:
    """Why a name cannot be a variable's; empty: it can."""
    if not name.isidentifier():
        return f"{name!r} cannot be used in {{{{ }}}}: letters, digits and _ make a variable"
    if name in RESERVED:
        return f"{name!r} cannot be a variable: it has a meaning of its own in {{{{ }}}}"
    return ""


class _LookUp:
    """`lookup`, for what stands in one file."""

    def __init__(self, around: Around, file: str) -> None:
        self.around, self.file = around, file

    def __call__(self, kind: str, name: str) -> str | None:
        if kind == "env":
            return self.around.variable(name)
        return self.around.text(name, self.file)


class _Part:
    """One file's variables, defaults, VMs and runs; an included file is a part of its own."""

    def __init__(self, reading: _Reading, document: Document, within: _Part | None = None) -> None:
        self.reading = reading
        self.around = reading.around
        self.document = document
        self.trail: tuple[str, ...] = (*(within.trail if within else ()), document.file)
        self.vars: list[Layer] = list(within.vars) if within else []
        self.files: list[Layer] = list(within.files) if within else []
        self.given: list[Layer] = list(within.given) if within else []
        """`vars` of the includes."""
        self.defaults: list[tuple[Document, dict[str, object]]] = (
            list(within.defaults) if within else []
        )
        """The outermost first."""
        self.frames: dict[tuple[tuple[str, ...] | None, str], Frame] = {}

    # -- findings

    def error(self, summary: str, *path: str | int, key: bool = False, vm: str = "") -> None:
        self.reading.error(summary, self.document, path, key=key, vm=vm)

    def unusable(self, summary: str, *path: str | int, key: bool = False) -> None:
        """An error after which nobody knows what else the file says."""
        self.reading.lost = True
        self.error(summary, *path, key=key)

    def failed(self, error: TemplateError, *path: str | int, vm: str = "") -> None:
        """An expression cannot be evaluated; where a variable is to blame, there."""
        if isinstance(error, VariableError):
            self.reading.diagnostics[Diagnostic("error", str(error), error.place, vm)] = None
        else:
            self.error(str(error), *path, vm=vm)

    # -- the file as a whole

    def everything(self) -> Iterator[Declared | Asked | DeclaredTunnel]:
        value, top = self.document.value, self.reading.top
        main = self.reading.main
        if value is None:
            self.unusable(f"the file is empty: write `{main}:` and a list, or remove the file")
            return
        if not isinstance(value, dict):
            self.unusable(f"expected the keys {', '.join(top)}, found {described(value)}")
            return
        for key in value:
            if key not in top:
                self.unusable(
                    f"unknown key {key!r}{nearest(key, top)} (known here: {', '.join(top)})",
                    key,
                    key=True,
                )
        known = all(key in top for key in value)
        if not {"vms", "runs", "tunnels", "include"} & value.keys() and known:
            self.unusable(f"the key {main!r} is missing: write `{main}:` and a list")
        self.defaults.append((self.document, self.own_defaults(value.get("defaults"))))
        try:
            base = self.prepared(value)
        except _Unusable as error:
            self.reading.unusable(error)
            return
        readers = (
            ("vms", "VMs", self.vm),
            ("runs", "runs", self.run),
            ("tunnels", "tunnels", self.tunnel),
        )
        for key, what, read in readers:
            if key not in value or key not in top:
                continue
            for path, item in self.items(value[key], key, what):
                yield from read(item, path, base)
                if self.reading.full:
                    many = f"this file declares more than {MAX_DECLARED:,} values, loops followed; "
                    said = f"the {what} from here on are not read: split this file"
                    self.unusable((many if self.reading.looks.left >= 0 else "") + said, *path)
                    return
        if "include" in value and "include" in top:
            yield from self.includes(value["include"], base)
        self.check(base)

    def own_defaults(self, value: object) -> dict[str, object]:
        defaults = self.mapping(value, "defaults")
        for key in [key for key in defaults if key not in _DEFAULTS]:
            hint = nearest(key, _DEFAULTS)
            self.error(f"unknown key {key!r} in defaults{hint}", "defaults", key, key=True)
            del defaults[key]
        return defaults

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

    # -- variables

    def prepared(self, value: Mapping[str, object]) -> Frame:
        """The variables of the file, before there is a VM. Raises _Unusable."""
        own = self.mapping(value.get("vars"), "vars")
        self.vars.append(self.reading.checked_layer(own, "vars", self.document, ("vars",)))
        written = value.get("vars_files") if "vars_files" in self.reading.top else None
        for path, name in self.names(written, "vars_files"):
            try:
                file = str(Scope(self.frame(None, "")).render(name))
                side = self.around.file(file, self.document.file)
            except TemplateError as error:
                self.failed(error, *path)
                raise _Unusable from None
            self.files.append(self.reading.layer(side, f"vars_files {file}"))
            self.frames.clear()
        return self.frame(None, "")

    def names(self, value: object, key: str) -> Iterator[tuple[Path, str]]:
        """The file names that stand under a key: one, or a list of them."""
        if value is None:
            return
        many = isinstance(value, list)
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            path: Path = (key, index) if many else (key,)
            if isinstance(one, str) and one:
                yield path, one
            else:
                self.unusable(f"{key}: expected the path of a file, found {described(one)}", *path)

    def frame(self, groups: Sequence[str] | None, vm: str) -> Frame:
        """The layers of a VM of some groups; shared with all that have the same. None: there is no
        VM yet. Raises _Unusable where one of them is broken."""
        sides = [
            (f"group_vars/{group}", side)
            for group in (ALL, *(groups or ()))
            for side in self.around.group_vars(group)
        ]
        hosts = self.around.host_vars(vm) if vm else ()
        key = (None if groups is None else tuple(groups), vm if hosts else "")
        known = self.frames.get(key)
        if known is not None:
            return known
        sides += [(f"host_vars/{vm}", side) for side in hosts]
        layers = [self.reading.layer(side, origin) for origin, side in sides]
        layers += [*self.vars, *self.files, *self.given]
        layers += [self.reading.layer(side, EXTRA) for side in self.around.extra]
        fixed = {} if groups is None else {GROUP_NAMES: list(groups)}
        self.frames[key] = frame = Frame(layers, self.around.inventory, fixed)
        return frame

    def check(self, base: Frame) -> None:
        """Say what is wrong with the file's variables that nobody used; those that lean on what
        only a VM has are not looked at."""
        theirs = {VM_NAME, GROUP_NAMES, "item", *self.loop_variables()}
        theirs |= {name for frame in self.frames.values() for name in frame.top}
        theirs -= base.top.keys()
        said = {one.place for one in self.reading.diagnostics}
        for name in self.vars[-1].values:
            if not name.isidentifier() or name in base.done:
                continue
            if base.reach(name) & theirs:
                continue
            try:
                base.evaluate([name])
            except VariableError as error:
                if error.place not in said:
                    self.failed(error)

    def loop_variables(self) -> set[str]:
        value = self.document.value
        found = set()
        for key in ("vms", "runs", "tunnels"):
            items = value.get(key) if isinstance(value, dict) else None
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict):
                    found |= {str(item.get("loop_var", "item"))}
                    inner = item.get("vars")
                    found |= set(inner) if isinstance(inner, dict) else set()
        return found

    # -- included files

    def includes(self, value: object, base: Frame) -> Iterator[Declared | Asked | DeclaredTunnel]:
        many = isinstance(value, list)
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            path: Path = ("include", index) if many else ("include",)
            yield from self.include(one, path, base)

    def include(
        self, one: object, path: Path, base: Frame
    ) -> Iterator[Declared | Asked | DeclaredTunnel]:
        written = one if isinstance(one, dict) else {"file": one}
        for key in written:
            if key not in ("file", "vars"):
                hint = nearest(key, ("file", "vars"))
                self.unusable(f"unknown key {key!r}{hint} (known here: file, vars)", *path, key)
                return
        name = written.get("file")
        if not isinstance(name, str) or not name:
            self.unusable(f"include: expected the path of a file, found {described(name)}", *path)
            return
        self.reading.included += 1
        if self.reading.included > MAX_INCLUDES:
            self.unusable(f"include: more than {MAX_INCLUDES} files are included", *path)
            return
        try:
            file = str(Scope(base).render(name))
            side = self.around.file(file, self.document.file, spec=True)
        except TemplateError as error:
            self.reading.lost = True
            self.failed(error, *path)
            return
        self.reading.diagnostics |= dict.fromkeys(side.wrong)
        if side.document is None:
            self.reading.lost = True
            return
        if side.document.file in self.trail:
            circle = " → ".join((*self.trail, side.document.file))
            self.unusable(f"include: the files go round in a circle: {circle}", *path)
            return
        part = _Part(self.reading, side.document, self)
        try:
            given = self.reading.checked_layer(
                written.get("vars"), "vars of the include", self.document, (*path, "vars")
            )
        except _Unusable as error:
            self.reading.unusable(error)
            return
        part.given.append(given)
        with looking_up(self.reading.looked_up(side.document.file)):
            yield from part.everything()

    # -- VMs and runs

    def vm(self, item: object, path: Path, base: Frame) -> Iterator[Declared]:
        if not isinstance(item, dict):
            self.unusable(f"expected a VM with at least a name, found {described(item)}", *path)
            return
        whole: dict[str, object] = {}
        for _, defaults in self.defaults:
            whole = merged(
                whole, {k: v for k, v in defaults.items() if _applies(k, item, defaults)}
            )
        whole = merged(whole, {k: v for k, v in item.items() if k not in (*_ITEM, "name")})
        if "groups" in item:
            whole["groups"] = item["groups"]
        for name, scope in self.scopes(item, path, base, "name", whole.pop("groups", None)):
            if name == self.reading.explain:
                self.reading.explained = tuple(scope.explained())
            raw = self.evaluated(whole, item, path, scope, {"name": name})
            spec = None if raw is None else self.checked(VmSpec, raw, item, path)
            if spec is not None:
                yield Declared(spec.checked(), self.document, path)
                if self.reading.full:
                    return
            elif isinstance(name, str):
                self.reading.refused.add(name)
            else:
                self.reading.lost = True

    def run(self, item: object, path: Path, base: Frame) -> Iterator[Asked]:
        if not isinstance(item, dict):
            self.unusable(f"expected a run with `vm` and `run`, found {described(item)}", *path)
            return
        written = {key: value for key, value in item.items() if key not in (*_ITEM, "vm")}
        for name, scope in self.scopes(item, path, base, "vm", item.get("groups")):
            raw = self.evaluated(written, item, path, scope, {"vm": name})
            spec = None if raw is None else self.checked(RunSpec, raw, item, path)
            if spec is None:
                self.reading.lost = True
            else:
                yield Asked(spec.checked(), self.document, path, self.reading.aside)

    def tunnel(self, item: object, path: Path, base: Frame) -> Iterator[DeclaredTunnel]:
        from reconciler.core.tunnel_spec import DeclaredTunnel, TunnelSpec

        if not isinstance(item, dict):
            found = described(item)
            self.unusable(f"expected a tunnel with at least a name, found {found}", *path)
            return
        written = {key: value for key, value in item.items() if key not in (*_ITEM, "name")}
        for name, scope in self.scopes(item, path, base, "name", None):
            subject = f"{PREFIX}{name}"
            raw = self.evaluated(written, item, path, scope, {"name": name}, subject)
            spec = None if raw is None else self.checked(TunnelSpec, raw, item, path, subject)
            if spec is not None:
                folder = self.around.folder(self.document.file)
                yield DeclaredTunnel(spec, self.document, path, folder)
            elif isinstance(name, str):
                self.reading.refused.add(subject)
            else:
                self.reading.lost = True

    def scopes(
        self, item: Mapping[str, object], path: Path, base: Frame, key: str, groups: object
    ) -> Iterator[tuple[object, Scope]]:
        """The name and the variables of each thing that an item stands for and that is meant."""
        try:
            own = self.reading.checked_layer(
                item.get("vars"), "vars of the VM", self.document, (*path, "vars")
            )
        except _Unusable as error:
            name = item.get(key)
            sure = isinstance(name, str) and not is_template(name)
            self.reading.unusable(error, name if sure and isinstance(name, str) else "")
            return
        for fixed in self.looped(item, path, base):
            before = Scope(base, fixed, own)
            condition = item.get("when", True)
            try:
                name = before.render(item.get(key))
            except TemplateError as error:
                # `when` may be there because this is one without a name.
                if self.wanted(condition, path, before):
                    self.reading.lost = True
                    self.failed(error, *path, key)
                    self.misspelt(item, path, _model_of(path))
                continue
            scope = self.scope_of(name, fixed, own, path, before, groups)
            if scope is not None and self.wanted(condition, path, scope):
                yield name, scope

    def misspelt(self, item: Mapping[str, object], path: Path, model: type[Strict]) -> None:
        """Say which keys nothing reads: a `lop` may be why there is no `item`."""
        fields = (field.alias or name for name, field in model.model_fields.items())
        known = (*fields, *_ITEM)
        for key in item:
            if key not in known:
                said = f"unknown key {key!r}{nearest(key, known)} (known here: {', '.join(known)})"
                self.error(said, *path, key, key=True)

    def scope_of(
        self,
        name: object,
        fixed: Mapping[str, object],
        own: Layer,
        path: Path,
        before: Scope,
        groups: object,
    ) -> Scope | None:
        """The variables of one VM; None: they cannot be had, and it is said why."""
        vm = str(name) if isinstance(name, str | int) and not isinstance(name, bool) else ""
        try:
            named = self.groups(vm, groups, before)
            frame = self.frame(named, vm)
        except TemplateError as error:
            self.failed(error, *path, "groups", vm=vm)
            self.reading.unusable(_Unusable(), vm)
            return None
        except _Unusable as error:
            self.reading.unusable(error, vm)
            return None
        return Scope(frame, {**fixed, VM_NAME: vm}, own)

    def groups(self, vm: str, written: object, scope: Scope) -> list[str]:
        """The groups of a VM: those of the inventory, then those that are written."""
        found = scope.render(written)
        listed = found if isinstance(found, list) else [] if found is None else [found]
        for one in listed:
            if not isinstance(one, str):
                raise TemplateError(f"groups: expected a list of names, found {described(one)}")
            try:
                checked_name(one)
            except ValueError as error:
                raise TemplateError(f"groups: {error}") from None
        known = self.around.groups_of(vm) if vm else ()
        return [name for name in dict.fromkeys((*known, *listed)) if name != ALL]

    def looped(
        self, item: Mapping[str, object], path: Path, base: Frame
    ) -> Iterator[Mapping[str, object]]:
        """What is fixed for each item of a loop."""
        variable = item.get("loop_var", "item")
        if "loop" not in item:
            if "loop_var" in item:
                self.unusable("`loop_var` names the item of a `loop`: write one", *path, "loop_var")
                return
            yield {}
            return
        if not isinstance(variable, str) or not_a_variable(variable):
            why = not_a_variable(variable) if isinstance(variable, str) else described(variable)
            self.unusable(f"loop_var: {why}", *path, "loop_var")
            return
        try:
            items = Scope(base).render_items(item["loop"])
        except TemplateError as error:
            self.reading.lost = True
            self.failed(error, *path, "loop")
            return
        if not isinstance(items, list):
            hint = "; `| list` makes one of its keys" if isinstance(items, dict) else ""
            said = f"expected a list to loop over, found {described(items)}{hint}"
            self.unusable(said, *path, "loop")
            return
        if len(items) > MAX_LOOP:
            self.unusable(
                f"this loop has {len(items):,} items; at most {MAX_LOOP:,}", *path, "loop"
            )
            return
        for each in items:
            yield {variable: each}

    def wanted(self, condition: object, path: Path, scope: Scope) -> bool:
        try:
            if is_template(condition):
                condition = scope.render(condition)
            elif isinstance(condition, str):
                condition = scope.evaluate(condition)
        except TemplateError as error:
            self.reading.lost = True
            self.failed(error, *path, "when")
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
        whole: Mapping[str, object],
        item: Mapping[str, object],
        path: Path,
        scope: Scope,
        named: Mapping[str, object],
        subject: str = "",
    ) -> dict[str, object] | None:
        """`subject`: whom an error is about, where that is no VM."""
        raw = {key: value for key, value in named.items() if key in item}
        vm = subject or next((name for name in named.values() if isinstance(name, str)), "")
        self.reading.declared += VM_COSTS + len(raw)
        failed = False
        for key, value in whole.items():
            try:
                raw[key] = scope.render(value)
                self.reading.declared += _count(raw[key])
            except TemplateError as error:
                failed = True
                if isinstance(error, VariableError):
                    self.failed(error, vm=vm)
                    continue
                document, where = self.where(key, item, path)
                where = first_template(value, where)
                self.reading.error(str(error), document, where, vm=vm)
        return None if failed else raw

    def where(self, key: object, item: Mapping[str, object], path: Path) -> tuple[Document, Path]:
        """Where a key of a VM is written: with it, or in the defaults."""
        if key in item:
            return self.document, (*path, str(key))
        for document, defaults in reversed(self.defaults):
            if key in defaults:
                return document, ("defaults", str(key))
        return self.document, path

    def checked(
        self,
        model: type[_Model],
        raw: Mapping[str, object],
        item: Mapping[str, object],
        path: Path,
        subject: str = "",
    ) -> _Model | None:
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            vm = subject or raw.get("name" if model is VmSpec else "vm")
            for place, summary in explained(error, raw, model):
                document, where = self.where(place[0], item, path)
                inner = where != path
                self.reading.error(
                    summary,
                    document,
                    (*where, *place[1:]) if inner else path,
                    key=summary.startswith("unknown key"),
                    vm=vm if isinstance(vm, str) else "",
                )
            return None


def first_template(value: object, path: Path) -> Path:
    """Where in a tree the templated text is; good enough where there is only one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if names_of(inner):
                return first_template(inner, (*path, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            if names_of(inner):
                return first_template(inner, (*path, index))
    return path


def _applies(key: str, item: Mapping[str, object], defaults: Mapping[str, object]) -> bool:
    """Whether a default means this VM: a restore has no backup, and `of` names its disks."""
    if key == "backup" and item.get("for", defaults.get("for")) == "restore":
        return False
    return not (key == "disks" and "of" in item)


def _count(value: object) -> int:
    """Values in a tree, keys left out."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1
