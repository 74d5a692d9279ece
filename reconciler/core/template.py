"""`{{ }}` in values: Jinja2 expressions, sandboxed and strict, evaluated after YAML is parsed.

A value that is one whole expression keeps its native type; any other mix is text. Nothing that
an expression returns is parsed again, so no value can inject YAML or another expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final

from reconciler.core.errors import nearest

MAX_TEMPLATE: Final = 4_096
"""Characters in one templated value."""
MAX_RESULT: Final = 65_536
"""Characters or items in what one expression, or one step inside it, may return."""
MAX_LOOP: Final = 10_000
"""Items of one `loop`. The largest site known has fewer VMs."""


class TemplateError(ValueError):
    """A value cannot be evaluated; the message is the sentence for the author."""


def is_template(value: object) -> bool:
    return isinstance(value, str) and "{{" in value


def render(text: str, variables: Mapping[str, object]) -> object:
    """The value of a templated text. Raises TemplateError."""
    return _guarded(text, lambda: _compiled(text)(variables), variables)


def evaluate(expression: str, variables: Mapping[str, object]) -> object:
    """The value of a bare expression, as in `when:`. Raises TemplateError."""
    return _guarded(expression, lambda: _expression(expression)(variables), variables)


def render_tree(value: object, variables: Mapping[str, object]) -> object:
    """`value` with every templated text in it evaluated. Raises TemplateError at the first."""
    if is_template(value):
        return render(str(value), variables)
    if isinstance(value, dict):
        return {key: render_tree(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [render_tree(item, variables) for item in value]
    return value


def names_in(text: str) -> frozenset[str]:
    """The variables that a templated text uses."""
    from jinja2 import meta

    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(text)))
    except Exception:  # whatever it is: the evaluation says what is wrong with the text
        return frozenset()


def _guarded(
    text: str, evaluate_it: Callable[[], object], variables: Mapping[str, object]
) -> object:
    if len(text) > MAX_TEMPLATE:
        raise TemplateError(f"cannot evaluate this: it is longer than {MAX_TEMPLATE} characters")
    if "{%" in text or "{#" in text:
        raise TemplateError("cannot evaluate {% %} or {# #}: write expressions, {{ … }}, only")
    import jinja2

    try:
        return _sized(evaluate_it())
    except TemplateError:
        raise
    except jinja2.UndefinedError as error:
        said = str(error)
        match = re.match(r"'(\w+)' is undefined", said)
        if match:
            said = f"the variable {match.group(1)!r} is not defined"
            said += nearest(match.group(1), variables) or _known(variables)
        raise TemplateError(f"cannot evaluate {_short(text)}: {said}") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"cannot read {_short(text)}: {error.message}") from None
    except jinja2.sandbox.SecurityError as error:  # type: ignore[attr-defined]
        raise TemplateError(f"cannot evaluate {_short(text)}: not allowed here: {error}") from None
    except RecursionError:
        raise TemplateError(f"cannot evaluate {_short(text)}: it is nested too deeply") from None
    except Exception as error:
        raise TemplateError(f"cannot evaluate {_short(text)}: {error}") from None


def _known(variables: Mapping[str, object]) -> str:
    names = ", ".join(sorted(variables)[:8])
    return f"; defined here: {names}" if names else "; no vars are defined here"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _sized(value: object) -> object:
    """Only plain values leave an expression, at any depth, and none that has grown out of hand."""
    import jinja2

    left = MAX_RESULT

    def plain(value: object, depth: int) -> object:
        nonlocal left
        left -= len(value) if isinstance(value, str) else 1
        if left < 0 or depth > 32:
            raise TemplateError(f"cannot use this value: it has more than {MAX_RESULT:,} parts")
        match value:
            case None | bool() | float():
                return value
            case str():
                return str(value)
            case int() if value.bit_length() <= 128:
                return value
            case int():
                raise TemplateError("cannot use this number: it has more than 128 bits")
            case list() | tuple() | set() | frozenset() | range():
                return [plain(item, depth + 1) for item in value]
            case dict():
                return {str(key): plain(item, depth + 1) for key, item in value.items()}
            case jinja2.Undefined():
                return str(value)  # raises the error that names it
            case _:
                kind = type(value).__name__
                raise TemplateError(f"cannot use this value: it is a {kind}, not data")

    return plain(value, 0)


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


def _join(values: Iterable[object], between: str = "") -> str:
    """Jinja's `join`, unless the result would be too large."""
    parts = [_text(value) for value in values]
    if sum(map(len, parts)) + len(between) * len(parts) > MAX_RESULT:
        raise TemplateError("cannot join this: the result grows too large")
    return between.join(parts)


def _text(value: object) -> str:
    """Jinja's `string`, of single values."""
    if not isinstance(value, str | int | float | bool):
        raise TemplateError(f"cannot make text of a {type(value).__name__}: name one value in it")
    return str(value)


def _replace(text: object, old: str, new: str) -> str:
    """Jinja's `replace`, unless the result would be too large."""
    source = str(text)
    if len(source) + (source.count(old) if old else len(source) + 1) * len(new) > MAX_RESULT:
        raise TemplateError("cannot replace this: the result grows too large")
    return source.replace(old, new)


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "%"])

        def call_binop(self, context: object, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and not (
                isinstance(left, int | float)
                and isinstance(right, int | float)
                and abs(left) <= 2**64
                and abs(right) <= 64
            ):
                raise TemplateError("cannot use **: it grows too large")
            if operator == "%" and isinstance(left, str):
                raise TemplateError("cannot use % on text: join the parts with ~")
            if operator == "*":
                for one, times in ((left, right), (right, left)):
                    if (
                        isinstance(one, str | list | tuple)
                        and isinstance(times, int)
                        and len(one) * times > MAX_RESULT
                    ):
                        raise TemplateError(
                            f"cannot repeat this {times:,} times: it grows too large"
                        )
            return super().call_binop(context, operator, left, right)  # type: ignore[arg-type]

        def is_safe_callable(self, obj: Any) -> bool:
            if isinstance(obj, StrictUndefined):
                return True  # calling it raises the error that names it
            owner = getattr(obj, "__self__", None)
            for kind, names in _METHODS.items():
                if isinstance(owner, kind):
                    return getattr(obj, "__name__", "") in names
            return any(obj is known for known in self.globals.values())

        def format_string(self, *_arguments: Any, **_named: Any) -> str:
            raise TemplateError("cannot use format: join the parts with ~")

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals = {"range": environment.globals["range"], "dict": dict}
    own = {"replace": _replace, "join": _join, "string": _text}
    kept = {name: known for name, known in environment.filters.items() if name in _FILTERS}
    environment.filters = {**kept, **own}
    return environment


@cache
def _expression(expression: str) -> Callable[[Mapping[str, object]], object]:
    compiled = _environment().compile_expression(expression, undefined_to_none=False)

    def run(variables: Mapping[str, object]) -> object:
        value = compiled(**variables)
        if type(value).__name__.endswith("Undefined"):
            str(value)  # raises the error that names it
        return value

    return run


@cache
def _compiled(text: str) -> Callable[[Mapping[str, object]], object]:
    from jinja2 import nodes

    body = _environment().parse(text).body
    if (
        len(body) == 1
        and isinstance(body[0], nodes.Output)
        and len(body[0].nodes) == 1
        and not isinstance(body[0].nodes[0], nodes.TemplateData)
    ):
        inner = text.strip().removeprefix("{{").removesuffix("}}").strip("-+")
        return _expression(inner.strip())
    template = _environment().from_string(text)
    return lambda variables: template.render(dict(variables))
