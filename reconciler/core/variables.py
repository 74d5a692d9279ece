"""The variables of a file and of each VM in it: layers, the later over the earlier.

A variable is evaluated where it is used, with the layers of the VM that uses it: so the `vars` of a
file may lean on what `host_vars` says, and the other way round. What does not depend on a VM is
evaluated once for all of them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from reconciler.core.document import Document, Path
from reconciler.core.errors import Place
from reconciler.core.template import (
    TemplateError,
    evaluate,
    is_template,
    names_in,
    render,
    render_tree,
)

VM_NAME: Final = "vm_name"
GROUP_NAMES: Final = "group_names"
INVENTORY: Final = "inventory"
FUNCTIONS: Final = frozenset({"range", "dict", "lookup"})
RESERVED: Final = frozenset({VM_NAME, GROUP_NAMES, INVENTORY, *FUNCTIONS})
"""Names that are ours, in every expression."""
MAX_ITEMS: Final = 2_000_000
"""Characters and values in all items of a loop. 10,000 VMs with three disks have 1,000,000."""


class Layer(Struct, frozen=True):
    """Variables that are written in one place."""

    origin: str
    """What people call it, such as `group_vars/gold` or `vars`."""
    values: Mapping[str, object]
    """As they are written, not evaluated."""
    document: Document
    path: Path
    """Where they stand in it."""

    def place(self, name: str, *, key: bool = False) -> Place:
        return self.document.place((*self.path, name), key=key)


class VariableError(TemplateError):
    """A variable cannot be evaluated: said where it is written, not where it is used."""

    def __init__(self, message: str, place: Place) -> None:
        super().__init__(message)
        self.place = place


class Variable(Struct, frozen=True):
    """One variable of a VM, for people."""

    name: str
    value: object
    """Evaluated; None beside an `error`."""
    origin: str
    place: Place | None
    under: tuple[tuple[str, Place], ...] = ()
    """The origins over which it was written, the strongest first."""
    error: str = ""


Facts = Callable[[], Mapping[str, Any] | None]


class Frame:
    """Layers that several VMs have in common, and what was evaluated of them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        facts: Facts,
        fixed: Mapping[str, object] | None = None,
    ) -> None:
        """`fixed`: values that are not evaluated. `facts`: what `inventory` is, asked for only
        where something leads there."""
        self.layers = tuple(layers)
        self.facts = facts
        self.top: dict[str, Layer] = {}
        for layer in layers:
            self.top |= dict.fromkeys(layer.values, layer)
        self.fixed = dict(fixed or {})
        self.done: dict[str, object] = dict(self.fixed)
        self.broken: dict[str, VariableError] = {}
        self._reach: dict[str, frozenset[str]] = {}
        self._shared: dict[tuple[str, frozenset[str]], bool] = {}
        self._rendered: dict[str, object] = {}

    def uses(self, name: str) -> frozenset[str]:
        """The names that one variable of the layers uses itself."""
        layer = self.top.get(name)
        return names_of(layer.values[name]) if layer else frozenset()

    def reach(self, name: str) -> frozenset[str]:
        """All names that a variable leads to, itself among them."""
        known = self._reach.get(name)
        if known is None:
            found = {name}
            todo = [name]
            while todo:
                new = self.uses(todo.pop()) - found
                found |= new
                todo += new
            known = self._reach[name] = frozenset(found)
        return known

    def evaluate(self, names: Iterable[str]) -> None:
        """Evaluate some variables, and what they lean on. Raises TemplateError."""
        missing = [name for name in names if name not in self.done]
        if INVENTORY in missing:
            self._load()
        missing = [name for name in missing if name in self.top]
        if not missing:
            return
        for name in missing:
            if name in self.broken:
                raise self.broken[name]
        uses: dict[str, frozenset[str]] = {}
        todo = missing[::-1]
        while todo:
            name = todo.pop()
            if name not in uses and name not in self.done:
                found = self.uses(name)
                if INVENTORY in found and INVENTORY not in self.done:
                    self._load(name)
                uses[name] = found & self.top.keys()
                todo += sorted(uses[name], reverse=True)
        self._circles(uses)
        order, _ = ordered(uses)
        for name in order:
            if name not in self.done and name in uses:
                self._evaluate(name, uses[name])
        for name in missing:
            if name in self.broken:
                raise self.broken[name]

    def _load(self, name: str = "") -> None:
        """Ask for the inventory; `name`: the variable that leads there. Raises TemplateError."""
        found = self.facts()
        if found is None:
            said = (
                "cannot evaluate this: there is no inventory that can be read; write `inventory: "
                "{file: inventory.yaml}` into the config"
            )
            raise VariableError(said, self.top[name].place(name)) if name else TemplateError(said)
        self.done[INVENTORY] = found

    def _circles(self, uses: Mapping[str, frozenset[str]]) -> None:
        for circle in ordered(uses)[1]:
            shown = circle if len(circle) < 10 else [*circle[:5], "…", *circle[-3:]]
            said = f"the vars go round in a circle: {' → '.join(shown)}"
            place = self.top[circle[0]].place(circle[0])
            self.broken.setdefault(circle[0], VariableError(said, place))

    def _evaluate(self, name: str, uses: frozenset[str]) -> None:
        if name in self.broken:
            return
        error = next((self.broken[used] for used in sorted(uses) if used in self.broken), None)
        if error is not None:
            self.broken[name] = error  # said already, where it begins
            return
        layer = self.top[name]
        try:
            self.done[name] = render_tree(layer.values[name], self.done, self.names)
        except TemplateError as found:
            place = layer.place(name)
            self.broken[name] = VariableError(str(found), place)

    @property
    def names(self) -> Iterable[str]:
        """All that can be written here."""
        return {**self.top, **self.done}

    def shared(self, text: str, own: frozenset[str]) -> bool:
        """Whether the variables that a text uses lead to none of these names, which are a VM's own:
        they are then the same for every VM of the frame. The text itself may use them."""
        key = (text, own)
        known = self._shared.get(key)
        if known is None:
            names = names_in(text)
            known = not any(name not in own and self.reach(name) & own for name in names)
            self._shared[key] = known
        return known

    def render(self, text: str) -> object:
        """The value of a text that uses no VM's own names. Raises TemplateError."""
        if text not in self._rendered:
            self.evaluate(names_in(text))
            self._rendered[text] = render(text, self.done, _Names(self, self.done))
        return self._rendered[text]


class Scope:
    """The variables of one VM, or of a file before there is one."""

    def __init__(
        self,
        frame: Frame,
        fixed: Mapping[str, object] | None = None,
        own: Layer | None = None,
    ) -> None:
        """`fixed`: values of this VM that are not evaluated. `own`: its `vars`."""
        self.frame = frame
        self.fixed = dict(fixed or {})
        strong = {name for name, layer in frame.top.items() if layer.origin == EXTRA}
        values = {k: v for k, v in own.values.items() if k not in strong} if own else {}
        self.own = own
        self._names = frozenset((*self.fixed, *values))
        self._late: Frame | None = None
        self._values = values
        self._seen: ChainMap[str, object] = ChainMap(self.fixed, frame.done)

    def render(self, value: object) -> object:
        """A value with everything that is templated in it evaluated. Raises TemplateError."""
        if is_template(value):
            text = str(value)
            if not names_in(text) & self._names and self._shares(text):
                return self.frame.render(text)
            variables = self._prepared(text)
            return render(text, variables, self._known(variables))
        if isinstance(value, dict):
            return {key: self.render(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.render(item) for item in value]
        return value

    def render_items(self, value: object) -> object:
        """The same, of what is looped over, which may be as much as all VMs of a site."""
        if not is_template(value):
            return self.render(value)
        text = str(value)
        variables = self._prepared(text)
        return render(text, variables, self._known(variables), most=MAX_ITEMS)

    def evaluate(self, expression: str) -> object:
        """The value of a bare expression. Raises TemplateError."""
        variables = self._prepared(f"{{{{ {expression} }}}}")
        return evaluate(expression, variables, self._known(variables))

    def _prepared(self, text: str) -> Mapping[str, object]:
        """The variables that a text needs, evaluated. Raises TemplateError."""
        if self._shares(text):
            self.frame.evaluate(name for name in names_in(text) if name not in self._names)
            return self._seen
        if self._late is None:
            own = (
                [Layer(self.own.origin, self._values, self.own.document, self.own.path)]
                if (self.own)
                else []
            )
            layers = [
                Layer(
                    layer.origin,
                    {k: v for k, v in layer.values.items() if k not in self.fixed},
                    layer.document,
                    layer.path,
                )
                for layer in self.frame.layers
            ]
            strong = [layer for layer in layers if layer.origin == EXTRA]
            weak = [layer for layer in layers if layer.origin != EXTRA]
            fixed = {**self.frame.fixed, **self.fixed}
            self._late = Frame([*weak, *own, *strong], self.frame.facts, fixed)
        self._late.evaluate(names_in(text))
        return self._late.done

    def _shares(self, text: str) -> bool:
        if not self._names:
            return True
        own = self._values and not names_in(text).isdisjoint(self._values)
        return not own and self.frame.shared(text, self._names)

    def _known(self, variables: Mapping[str, object]) -> Iterable[str]:
        return _Names(self.frame, variables)

    def explained(self) -> list[Variable]:
        """Every variable, with where it comes from."""
        names = {*self.frame.top, *self.frame.fixed, *self._names}
        return [self._explained(name) for name in sorted(names)]

    def _explained(self, name: str) -> Variable:
        layers = [layer for layer in self.frame.layers if name in layer.values]
        if self.own and name in self.own.values:
            at = sum(layer.origin != EXTRA for layer in layers)
            layers.insert(at, self.own)
        layers.reverse()
        places = tuple((layer.origin, layer.place(name, key=True)) for layer in layers)
        for fixed in (self.fixed, self.frame.fixed):
            if name in fixed:
                return Variable(name, fixed[name], OURS, None, places)
        (origin, place), *under = places
        try:
            value = self.render(f"{{{{ {name} }}}}")
        except TemplateError as error:
            return Variable(name, None, origin, place, tuple(under), str(error))
        return Variable(name, value, origin, place, tuple(under))


EXTRA: Final = "-e"
OURS: Final = "reconciler"
"""The origin of what no file says."""


class _Names(Iterable[str]):
    """All names that could have been meant, gathered only where one is missing."""

    def __init__(self, frame: Frame, variables: Mapping[str, object]) -> None:
        self.frame, self.variables = frame, variables

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.frame.top, *self.variables, VM_NAME, GROUP_NAMES)))


def names_of(value: object) -> frozenset[str]:
    """The names that a tree of values uses; with "" among them where it is templated at all."""
    if is_template(value):
        return names_in(str(value)) or frozenset([""])
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return frozenset().union(*map(names_of, value)) if value else frozenset()
    return frozenset()


def ordered(uses: Mapping[str, frozenset[str]]) -> tuple[list[str], list[list[str]]]:
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
                waiting[needed] = sorted(uses.get(needed, ()), reverse=True)
    return list(order), list(circles.values())
