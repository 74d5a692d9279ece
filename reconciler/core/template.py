"""`{{ }}` in values: Jinja2 expressions, sandboxed and strict, evaluated after YAML is parsed.

A value that is one whole expression keeps its native type; any other mix is text. Nothing that
an expression returns is parsed again, so no value can inject YAML or another expression.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache, wraps
from typing import Any, Final, cast

from reconciler.core import filters, limits
from reconciler.core.errors import nearest
from reconciler.core.limits import MAX_BITS, MAX_LOOKS, MAX_RESULT, STEP, TemplateError

__all__ = [
    "MAX_LOOP",
    "MAX_RESULT",
    "MAX_TEMPLATE",
    "TemplateError",
    "evaluate",
    "is_template",
    "names_in",
    "render",
    "render_tree",
]

MAX_TEMPLATE: Final = 4_096
"""Characters in one templated value."""
MAX_LOOP: Final = 10_000
"""Items of one `loop`. The largest site known has fewer VMs."""
COMPARED: Final = 100
"""Looks that a name takes to be told from another."""
MAX_KEPT: Final = 20_000
"""Texts that stay compiled from one pass to the next."""


def is_template(value: object) -> bool:
    return isinstance(value, str) and "{{" in value


def render(
    text: str,
    variables: Mapping[str, object],
    known: Iterable[str] | None = None,
    *,
    most: int = MAX_RESULT,
) -> object:
    """The value of a templated text. Raises TemplateError.

    `known`: the names that might have been meant where one is not defined; else `variables`.
    `most`: characters and items that it may have.
    """
    return _guarded(text, lambda: _compiled(text)(variables), variables, known, most)


def evaluate(
    expression: str, variables: Mapping[str, object], known: Iterable[str] | None = None
) -> object:
    """The value of a bare expression, as in `when:`. Raises TemplateError."""
    return _guarded(expression, lambda: _expression(expression)(variables), variables, known)


def render_tree(
    value: object, variables: Mapping[str, object], known: Iterable[str] | None = None
) -> object:
    """`value` with every templated text in it evaluated. Raises TemplateError at the first."""
    if is_template(value):
        return render(str(value), variables, known)
    if isinstance(value, dict):
        return {key: render_tree(item, variables, known) for key, item in value.items()}
    if isinstance(value, list):
        return [render_tree(item, variables, known) for item in value]
    return value


@lru_cache(MAX_KEPT)
def names_in(text: str) -> frozenset[str]:
    """The variables that a templated text uses."""
    if len(text) > MAX_TEMPLATE:
        return frozenset()
    from jinja2 import meta

    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(text)))
    except Exception:  # whatever it is: the evaluation says what is wrong with the text
        return frozenset()


def _guarded(
    text: str,
    evaluate_it: Callable[[], object],
    variables: Mapping[str, object],
    known: Iterable[str] | None,
    most: int = MAX_RESULT,
) -> object:
    if len(text) > MAX_TEMPLATE:
        raise TemplateError(f"cannot evaluate this: it is longer than {MAX_TEMPLATE} characters")
    if "{%" in text or "{#" in text:
        raise TemplateError("cannot evaluate {% %} or {# #}: write expressions, {{ … }}, only")
    import jinja2

    try:
        with limits.Looks(MAX_LOOKS, "it looks"):
            return _sized(evaluate_it(), most)
    except TemplateError:
        raise
    except jinja2.UndefinedError as error:
        said = str(error)
        match = re.match(r"'(\w+)' is undefined", said)
        if match:
            said = f"the variable {match.group(1)!r} is not defined"
            names = list(variables if known is None else known)
            limits.spend(len(names) * COMPARED)  # every item of a loop may come here
            said += nearest(match.group(1), names) or _known(names)
        raise TemplateError(f"cannot evaluate {_short(text)}: {_short(said, 300)}") from None
    except jinja2.TemplateSyntaxError as error:
        said = _short(str(error.message), 300)
        raise TemplateError(f"cannot read {_short(text)}: {said}") from None
    except jinja2.sandbox.SecurityError as error:  # type: ignore[attr-defined]
        said = _short(str(error), 300)
        raise TemplateError(f"cannot evaluate {_short(text)}: not allowed here: {said}") from None
    except Exception as error:
        # Python's parser has a limit of its own for what Jinja2 makes of the text.
        deep = isinstance(error, RecursionError) or "too many nested" in str(error)
        said = "it is nested too deeply" if deep else _short(str(error), 300) or repr(error)
        raise TemplateError(f"cannot evaluate {_short(text)}: {said}") from None


def _known(variables: Iterable[str]) -> str:
    names = ", ".join(sorted(variables)[:8])
    return f"; defined here: {names}" if names else "; no vars are defined here"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "…"


def _sized(value: object, most: int) -> object:
    """Only plain values leave an expression, at any depth, and none that has grown out of hand."""
    import jinja2

    left = most

    def plain(value: object, depth: int) -> object:
        nonlocal left
        left -= max(1, limits.size(value)) if isinstance(value, str) else 1
        if left < 0 or depth > 32:
            raise limits.too_large(most)
        match value:
            case None | bool() | float():
                return value
            case str():
                return limits.whole(str(value))
            case int() if value.bit_length() <= MAX_BITS:
                return value
            case int():
                raise limits.too_many_bits()
            case list() | tuple() | range():
                return [plain(item, depth + 1) for item in value]
            case dict():
                return {
                    str(plain(limits.text(key), depth)): plain(item, depth + 1)
                    for key, item in value.items()
                }
            case jinja2.Undefined():
                return str(value)  # raises the error that names it
            case _:
                kind = type(value).__name__
                raise TemplateError(f"cannot use this value: it is a {kind}, not data")

    found = plain(value, 0)
    limits.spend(STEP + most - left)
    return found


_METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: frozenset(
        "lower upper strip lstrip rstrip split startswith endswith removeprefix "
        "removesuffix title capitalize isdigit count".split()
    ),
    list: frozenset({"index", "count"}),
    dict: frozenset({"get", "keys", "values", "items"}),
}
"""Methods that cannot make anything grow."""
_FILTERS: Final = frozenset(
    "abs capitalize count d default dictsort first float int items last length list "
    "lower map max min reject rejectattr reverse round select selectattr sort title "
    "trim unique upper".split()
)
"""Jinja2's filters that give the same on every pass, and nothing larger than what goes in."""
_OF_TEXT: Final = frozenset({"capitalize", "lower", "title", "trim", "upper"})
"""Filters and tests of Jinja2 that would make text of whatever they get."""
_LOOKING_INSIDE: Final = frozenset({"dictsort", "max", "min", "sort", "unique"})
"""Filters that compare the items."""
SORTED: Final = 10
"""Looks that an item costs there: Jinja2 makes a key of each. Measured: 1 µs."""
MAX_DIGITS: Final = 32
"""Of `round`, on either side of the point. A float has 17."""


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the limits."""
    before = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        passed, value, more = given[:before], given[before], given[before + 1 :]
        options = (*more, *named.values())
        if name in _OF_TEXT:
            value = limits.text(value)
        if name in _LOOKING_INSIDE:
            value = list(value) if isinstance(value, Iterator) else value
            limits.weigh(value)
            limits.spend(limits.size(value) * SORTED)
        if name == "round" and any(isinstance(n, int) and abs(n) > MAX_DIGITS for n in options):
            raise TemplateError(f"cannot round this: to at most {MAX_DIGITS} digits")
        limits.spend(STEP + _looks(value, options))
        return limits.returned(function(*passed, value, *more, **named))

    return run


def _looks(value: object, options: Iterable[object]) -> int:
    """Looks at `value`, of a filter or method with such options: `strip` tries letter by letter."""
    letters = sum(map(limits.size, options))
    return limits.size(value) * (1 + letters // 100) + letters


def _test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A test within the limits: `select` may run it on each of many items."""

    @wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        limits.spend(STEP)
        if name in _OF_TEXT:
            limits.text(given[0])
        if name == "in":
            limits.search(*given, **named)
        else:
            for one in (*given, *named.values()):
                limits.weigh(one)
        return function(*given, **named)

    return run


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            limits.operate(operator, left, right)
            return limits.returned(super().call_binop(context, operator, left, right))

        def getitem(self, obj: Any, argument: Any) -> Any:
            limits.look_up(argument)
            return super().getitem(obj, argument)

        def call_filter(self, name: Any, *given: Any, **named: Any) -> Any:
            return super().call_filter(limits.text(name), *given, **named)

        def call_test(self, name: Any, *given: Any, **named: Any) -> Any:
            return super().call_test(limits.text(name), *given, **named)

        def call(self, context: Any, obj: Any, /, *given: Any, **named: Any) -> Any:
            owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "this")
            if name in ("format", "format_map"):
                raise TemplateError("cannot use format: join the parts with ~")
            if not self.is_safe_callable(obj):
                raise SecurityError(f"{name!r} cannot be called")
            options = (*given, *named.values())
            for one in options:
                limits.weigh(one)
            if isinstance(owner, list):
                limits.weigh(owner)
            limits.spend(STEP + _looks(owner if isinstance(owner, str) else "", options))
            return limits.returned(context.call(obj, *given, **named))

        def is_safe_callable(self, obj: Any) -> bool:
            if isinstance(obj, StrictUndefined):
                return True  # calling it raises the error that names it
            owner = getattr(obj, "__self__", None)
            for kind, names in _METHODS.items():
                if isinstance(owner, kind):
                    return getattr(obj, "__name__", "") in names
            return any(obj is known for known in self.globals.values())

    class Missing(StrictUndefined):
        """Says what might have been meant."""

        @property
        def _undefined_message(self) -> str:
            name, around = self._undefined_name, self._undefined_obj
            if self._undefined_hint or not isinstance(around, dict) or not isinstance(name, str):
                return str(super()._undefined_message)
            known = [key for key in around if isinstance(key, str)]
            limits.spend(len(known) * COMPARED)
            listing = ", ".join(sorted(known)[:8]) or "none"
            return f"there is no key {name!r} in it{nearest(name, known)} (keys there: {listing})"

    # Nothing is worked out while a text is compiled: there it would not be counted.
    environment = Environment(undefined=Missing, keep_trailing_newline=True, optimized=False)
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "lookup": filters.lookup,
    }
    kept = {name: known for name, known in environment.filters.items() if name in _FILTERS}
    own = {"replace": limits.replace, "string": limits.text}
    joining = {"join": limits.join, _JOINED: limits.join}
    all_of_them = {**kept, **own, **filters.FILTERS, **joining}
    environment.filters = {name: _filter(name, one) for name, one in all_of_them.items()}
    environment.filters |= {_PART: limits.part, _WEIGHED: limits.weighed}
    tests: dict[str, Any] = {**environment.tests, **filters.TESTS}
    environment.tests = {name: _test(name, one) for name, one in tests.items()}
    return environment


_JOINED: Final = "~"
_PART: Final = "[:]"
_WEIGHED: Final = "=="
"""Names of filters that stand where Jinja2 lets nobody look: no expression can write them."""


@cache
def _counting() -> Any:
    """What puts those filters into a parsed expression."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def through(name: str, node: nodes.Expr, more: list[nodes.Expr] | None = None) -> nodes.Filter:
        return nodes.Filter(node, name, more or [], [], None, None)

    class Counting(NodeTransformer):
        def visit(self, node: nodes.Node, *_args: Any, **_kwargs: Any) -> nodes.Node:
            self.generic_visit(node)
            match node:
                case nodes.Concat():
                    return through(_JOINED, nodes.List(node.nodes))
                case nodes.Getitem(node=whole, arg=nodes.Slice(start=start, stop=stop, step=step)):
                    ends = [end or nodes.Const(None) for end in (start, stop, step)]
                    return through(_PART, whole, ends)
                case nodes.Pair():
                    node.key = through(_WEIGHED, node.key)  # it will be hashed
                case nodes.Compare(ops=[nodes.Operand(op="in" | "notin" as op, expr=among)]):
                    found = nodes.Test(node.expr, "in", [among], [], None, None)
                    return found if op == "in" else nodes.Not(found)
                case nodes.Compare():
                    node.expr = through(_WEIGHED, node.expr)
                    for one in node.ops:
                        one.expr = through(_WEIGHED, one.expr)
                case _:
                    pass
            return node

    return Counting()


@lru_cache(MAX_KEPT)
def _expression(expression: str) -> Callable[[Mapping[str, object]], object]:
    from jinja2 import TemplateSyntaxError, nodes

    pieces = _pieces(f"{{{{ {expression} }}}}")
    if len(pieces) != 1 or isinstance(pieces[0], nodes.TemplateData):
        raise TemplateSyntaxError("write one expression", 1)
    return _function(pieces[0])


@lru_cache(MAX_KEPT)
def _compiled(text: str) -> Callable[[Mapping[str, object]], object]:
    from jinja2 import nodes

    pieces = _pieces(text)
    if len(pieces) == 1 and not isinstance(pieces[0], nodes.TemplateData):
        return _function(pieces[0])
    return _function(
        nodes.Concat(
            [
                nodes.Const(piece.data) if isinstance(piece, nodes.TemplateData) else piece
                for piece in pieces
            ]
        )
    )


def _pieces(text: str) -> list[Any]:
    """The expressions of a text, and what stands between them, as Jinja2 reads it."""
    return [piece for output in _environment().parse(text).body for piece in output.nodes]


def _function(expression: Any) -> Callable[[Mapping[str, object]], object]:
    from jinja2 import nodes

    result = nodes.Assign(nodes.Name("result", "store"), _counting().visit(expression))
    tree = nodes.Template([result]).set_lineno(1).set_environment(_environment())
    template = _environment().from_string(tree)
    known = _environment().globals

    def run(variables: Mapping[str, object]) -> object:
        scope = ChainMap(cast("dict[str, object]", variables), known)  # it is only read
        context = template.new_context(scope, shared=True)
        for _ in template.root_render_func(context):
            pass  # the one assignment prints nothing
        return context.vars["result"]

    return run
