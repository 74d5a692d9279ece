"""Filters, tests and look-ups that Ansible's users know, within our limits.

Each gives the same on every pass. Patterns are RE2's (google-re2), whose time is linear in what it
reads: Python's own `re` takes years for `(a+)+$` on a short line.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

from reconciler.core import limits
from reconciler.core.errors import described, nearest
from reconciler.core.limits import TemplateError
from reconciler.core.units import format_size, parse_size

MAX_PATTERN: Final = 1_000
"""Characters of a pattern."""
PATTERN_MEMORY: Final = 1 << 20
"""Bytes that a pattern may take when it is compiled; RE2's own default is 8 MiB."""
MATCHING: Final = 2
"""Looks that a character costs where a pattern is tried on it. Measured: 10 ns."""
KINDS: Final = ("env", "file")
"""What `lookup` looks up."""

Lookup = Callable[[str, str], str | None]
"""Kind and name → the text; None: there is none. Raises TemplateError where it may not be read."""

_lookup: ContextVar[Lookup | None] = ContextVar("_lookup", default=None)


@contextmanager
def looking_up(found: Lookup) -> Iterator[None]:
    """While it is entered, `lookup` asks there."""
    token = _lookup.set(found)
    try:
        yield
    finally:
        _lookup.reset(token)


def _given(value: object) -> Any:
    """`value`, unless it is undefined: then the error that names it."""
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        limits.text(value)
    return value


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(_given(value), Mapping):
        raise TemplateError(f"cannot use {what} on {described(value)}: it takes keys and values")
    return value  # type: ignore[return-value]


def _items(value: object, what: str) -> list[Any]:
    if isinstance(_given(value), str | Mapping) or not isinstance(value, Iterable):
        raise TemplateError(f"cannot use {what} on {described(value)}: it takes a list")
    found = list(value)
    limits.spend(len(found))
    return found


def mandatory(value: object, message: object = "") -> object:
    """`value`, which must be there. Raises TemplateError with `message`, if one is given."""
    from jinja2 import Undefined

    if not isinstance(value, Undefined):
        return value
    if message:
        raise TemplateError(limits.text(message))
    return limits.text(value)  # raises the error that names it


def to_size(value: object) -> int:
    """Bytes: of `40GiB` or a number."""
    if isinstance(_given(value), bool) or not isinstance(value, str | int):
        raise TemplateError(f"cannot read {described(value)} as a size: write one like 40GiB")
    try:
        return parse_size(value)
    except ValueError as error:
        raise TemplateError(str(error)) from None


def human_size(value: object) -> str:
    """`40 GiB`: of a number of bytes."""
    if isinstance(_given(value), bool) or not isinstance(value, int) or value < 0:
        raise TemplateError(f"cannot show {described(value)} as a size: it takes a number of bytes")
    return format_size(value)


def to_bool(value: object) -> bool:
    """true of `true`, `yes`, `on`, `1`; false of `false`, `no`, `off`, `0` and the empty text."""
    if isinstance(_given(value), bool):
        return value  # type: ignore[return-value]
    said = limits.text(value).strip().lower()
    if said in ("true", "yes", "on", "1", "y", "t"):
        return True
    if said in ("false", "no", "off", "0", "n", "f", ""):
        return False
    raise TemplateError(f"cannot read {said[:40]!r} as true or false: write yes or no")


def split(value: object, between: object = None) -> list[str]:
    """The parts of a text; at spaces, if nothing else is said."""
    source = limits.text(value)
    if between is None:
        return source.split()
    at = limits.text(between)
    if not at:
        raise TemplateError("cannot split at an empty text: name what stands between the parts")
    return source.split(at)


def dict2items(value: object, key_name: str = "key", value_name: str = "value") -> list[Any]:
    """`[{key: …, value: …}, …]`, to loop over."""
    return [{key_name: key, value_name: one} for key, one in _mapping(value, "dict2items").items()]


def items2dict(value: object, key_name: str = "key", value_name: str = "value") -> dict[str, Any]:
    """The other way round."""
    found = {}
    for one in _items(value, "items2dict"):
        if not isinstance(one, Mapping) or not {key_name, value_name} <= one.keys():
            raise TemplateError(
                f"cannot use items2dict: an item has no {key_name!r} and {value_name!r}"
            )
        found[limits.text(one[key_name])] = one[value_name]
    return found


def combine(value: object, *others: object, recursive: bool = False) -> dict[str, Any]:
    """Keys and values, the later ones over the earlier; `recursive`: into each other."""
    found = dict(_mapping(value, "combine"))
    for other in others:
        over = _mapping(other, "combine")
        limits.weigh(over)
        found = merged(found, over) if recursive else {**found, **over}
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: keys and values go into each other, anything else is replaced."""
    found = dict(base)
    for key, value in over.items():
        below = found.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        found[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return found


def ternary(value: object, yes: object, no: object) -> object:
    """`yes` if the value is true, else `no`."""
    return yes if _given(value) else no


def flatten(value: object) -> list[Any]:
    """The items of a list, and of the lists in it."""
    found: list[Any] = []
    todo = [iter(_items(value, "flatten"))]
    while todo:
        for one in todo[-1]:
            if isinstance(one, list | tuple):
                todo.append(iter(one))
                break
            found.append(one)
            limits.spend(1)
            if len(found) > limits.MAX_RESULT:
                raise limits.too_large()
        else:
            todo.pop()
    return found


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each once, in the order in which they come."""
    found: list[Any] = []
    seen: set[Any] = set()
    for one in values:
        plain = isinstance(one, str | int | float | bool | type(None))
        if not plain:
            raise TemplateError(
                f"cannot compare {described(one)} here: name lists of texts or numbers"
            )
        if one not in seen:
            seen.add(one)
            found.append(one)
    return found


def union(value: object, other: object) -> list[Any]:
    """What is in one list or the other."""
    return _distinct([*_items(value, "union"), *_items(other, "union")])


def intersect(value: object, other: object) -> list[Any]:
    """What is in both lists."""
    among = set(_distinct(_items(other, "intersect")))
    return [one for one in _distinct(_items(value, "intersect")) if one in among]


def difference(value: object, other: object) -> list[Any]:
    """What is in the first list and not in the second."""
    among = set(_distinct(_items(other, "difference")))
    return [one for one in _distinct(_items(value, "difference")) if one not in among]


def basename(value: object) -> str:
    """The last part of a path."""
    return posixpath.basename(limits.text(value))


def dirname(value: object) -> str:
    """A path without its last part."""
    return posixpath.dirname(limits.text(value))


@lru_cache(1_000)
def _pattern(pattern: str, *, ignorecase: bool) -> Any:
    import re2  # type: ignore[import-untyped]

    if len(pattern) > MAX_PATTERN:
        raise TemplateError(f"cannot use this pattern: it is longer than {MAX_PATTERN} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = PATTERN_MEMORY
    options.case_sensitive = not ignorecase
    try:
        return re2.compile(pattern, options=options)
    except re2.error as error:
        said = error.args[0] if error.args else error
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        shown = pattern if len(pattern) < 60 else f"{pattern[:57]}…"
        raise TemplateError(
            f"cannot read the pattern {shown!r}: {said} (patterns are RE2's: no look-around, no "
            "back-references inside)"
        ) from None


def _source(value: object) -> str:
    found = limits.whole(limits.text(value))
    limits.spend(MATCHING * len(found))
    return found


def regex_replace(
    value: object, pattern: object, new: object = "", ignorecase: bool = False, count: int = 0
) -> str:
    r"""The text with each match of `pattern` made `new`, where `\1` stands for the first group."""
    source, by = _source(value), limits.text(new)
    compiled = _pattern(limits.text(pattern), ignorecase=bool(ignorecase))
    groups = compiled.groups
    pieces = _template(by, groups, compiled.groupindex)
    found: list[str] = []
    size = at = 0
    for number, match in enumerate(compiled.finditer(source)):
        if count and number >= count:
            break
        said = "".join(one if isinstance(one, str) else (match.group(one) or "") for one in pieces)
        found += [source[at : match.start()], said]
        size += match.start() - at + len(said)
        limits.spend(limits.STEP + len(said))
        if size > limits.MAX_RESULT:
            raise TemplateError("cannot replace this: the result grows too large")
        at = match.end()
    return "".join([*found, source[at:]])


def _template(new: str, groups: int, names: Mapping[str, int]) -> list[str | int]:
    r"""What stands for a match: texts, and numbers of groups. `\1`, `\g<1>`, `\g<name>`, `\\`."""
    pieces: list[str | int] = []
    for text, number, name, other in re.findall(r"([^\\]+)|\\(\d)|\\g<(\w+)>|\\(.?)", new):
        if text:
            pieces.append(text)
        elif number or name:
            index = int(number or name) if (number or name).isdigit() else names.get(name, -1)
            if not 0 <= index <= groups:
                raise TemplateError(
                    f"cannot replace by {new[:60]!r}: the pattern has no group "
                    f"{number or name!r}; it has {groups}"
                )
            pieces.append(index)
        else:
            pieces.append({"n": "\n", "t": "\t"}.get(other, other or "\\"))
    return pieces


def regex_search(value: object, pattern: object, ignorecase: bool = False) -> str:
    """What matches first: the whole match, or its first group if there is one; else nothing."""
    compiled = _pattern(limits.text(pattern), ignorecase=bool(ignorecase))
    match = compiled.search(_source(value))
    if match is None:
        return ""
    return match.group(1 if compiled.groups else 0) or ""


def regex_findall(value: object, pattern: object, ignorecase: bool = False) -> list[str]:
    """Everything that matches, as `regex_search` has the first."""
    compiled = _pattern(limits.text(pattern), ignorecase=bool(ignorecase))
    found = []
    for match in compiled.finditer(_source(value)):
        limits.spend(limits.STEP)
        found.append(match.group(1 if compiled.groups else 0) or "")
    return found


def matches(value: object, pattern: object, ignorecase: bool = False) -> bool:
    """Whether the text begins with a match."""
    return bool(_pattern(limits.text(pattern), ignorecase=bool(ignorecase)).match(_source(value)))


def searches(value: object, pattern: object, ignorecase: bool = False) -> bool:
    """Whether a match is somewhere in the text."""
    return bool(_pattern(limits.text(pattern), ignorecase=bool(ignorecase)).search(_source(value)))


_NONE: Final = object()


def lookup(kind: object, name: object, default: object = _NONE) -> object:
    """A variable of the environment, or the text of a file. Raises TemplateError.

    `default`: what it is where there is none; else that is an error.
    """
    what, which = limits.text(kind), limits.text(name)
    if what not in KINDS:
        raise TemplateError(
            f"cannot look up {what[:40]!r}{nearest(what, KINDS)} (known: {', '.join(KINDS)})"
        )
    ask = _lookup.get()
    if ask is None:
        raise TemplateError(f"cannot look up {what} {which[:60]!r} here")
    found = ask(what, which)
    if found is not None:
        limits.spend(len(found))
        return found
    if default is not _NONE:
        return default
    missing = "is not set" if what == "env" else "is not there"
    raise TemplateError(
        f"cannot look up {what} {which[:60]!r}: it {missing}; "
        f"lookup('{what}', …, default='') gives it one"
    )


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "basename": basename,
    "bool": to_bool,
    "combine": combine,
    "dict2items": dict2items,
    "difference": difference,
    "dirname": dirname,
    "flatten": flatten,
    "human_size": human_size,
    "intersect": intersect,
    "items2dict": items2dict,
    "mandatory": mandatory,
    "regex_findall": regex_findall,
    "regex_replace": regex_replace,
    "regex_search": regex_search,
    "split": split,
    "ternary": ternary,
    "to_size": to_size,
    "union": union,
}
TESTS: Final[Mapping[str, Callable[..., bool]]] = {"match": matches, "search": searches}
