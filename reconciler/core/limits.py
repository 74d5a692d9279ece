"""What one expression may cost: every step is counted, and none returns what has grown too large.

Nothing is timed, so that the same text is refused on every machine and on every pass.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Set, ValuesView
from contextvars import ContextVar
from typing import Any, Final

MAX_RESULT: Final = 65_536
"""Characters or items in what one expression, or one step inside it, may return."""
MAX_BITS: Final = 128
"""Of a whole number that a step returns."""
MAX_LOOKS: Final = 5_000_000
"""Items and characters that all steps of one expression may look at. Measured: a second at most."""
STEP: Final = 20
"""What a step costs beside its items: a filter's call takes as long as looking at so many."""


LETTERS: Final = 16
"""Characters of a text that are compared or copied while one item is looked at."""


class TemplateError(ValueError):
    """A value cannot be evaluated; the message is the sentence for the author."""


class Looks:
    """At most so many looks while it is entered; they count in the limit around it, too."""

    __slots__ = ("_around", "_token", "left", "most", "who")

    def __init__(self, most: int, who: str) -> None:
        self.most = self.left = most
        self.who = who

    def __enter__(self) -> Looks:
        self._around = _looks.get()
        self._token = _looks.set(self)
        return self

    def __exit__(self, *_error: object) -> None:
        _looks.reset(self._token)

    def spend(self, count: int) -> None:
        """Raises TemplateError where that is too much."""
        self.left -= count
        if self.left < 0:
            raise TemplateError(
                f"cannot evaluate this: {self.who} at more than {self.most:,} items and characters"
            )
        if self._around is not None:
            self._around.spend(count)


_looks: ContextVar[Looks | None] = ContextVar("_looks", default=None)


def spend(count: int) -> None:
    """Before looking at so many items or characters. Raises TemplateError where it is too much."""
    looks = _looks.get()
    if looks is not None:
        looks.spend(count)


def too_large(most: int = MAX_RESULT) -> TemplateError:
    return TemplateError(f"cannot use this value: it has more than {most:,} parts")


def too_many_bits() -> TemplateError:
    return TemplateError(f"cannot use this number: it has more than {MAX_BITS} bits")


_MANY: Final = (list, tuple, dict, range, KeysView, ValuesView, ItemsView)
_SIZED: Final = (str, *_MANY)
_FLAT: Final = frozenset({int, float, bool, type(None)})


def size(value: object) -> int:
    """Characters or items in `value` itself; what is inside its items does not count."""
    return len(value) if isinstance(value, _SIZED) else 0


def weigh(value: object) -> None:
    """Spend what comparing, sorting or hashing `value` may look at, at whatever depth."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str | range) or not isinstance(one, _MANY):
            spend(1 + size(one) // LETTERS)
            continue
        spend(STEP + size(one))
        inner = [*one.keys(), *one.values()] if isinstance(one, dict) else list(one)
        kinds = set(map(type, inner))
        if kinds == {str}:
            spend(sum(map(len, inner)) // LETTERS)
        elif not kinds <= _FLAT:
            todo.extend(inner)


def weighed(value: Any) -> Any:
    """`value`, once it is weighed."""
    weigh(value)
    return value


def search(value: object, among: object) -> None:
    """Spend what `value in among` looks at. Raises TemplateError."""
    weigh(value)
    if isinstance(among, dict):
        return  # found by its hash
    if size(value) and not isinstance(value, str):
        weigh(among)
    else:
        spend(size(among) // 8)  # single values are compared that much faster than they are weighed


def look_up(key: object) -> None:
    """Before `value[key]`. Raises TemplateError."""
    spend(STEP)
    if size(key) and not isinstance(key, str):
        raise TemplateError("cannot look up a list or keys: name one value")


def returned(value: Any) -> Any:
    """What a step returns, if it may: as it is, or counting its items where they are yet to come.

    Raises TemplateError.
    """
    spend(STEP + size(value))
    if size(value) > MAX_RESULT:
        raise too_large()
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise too_many_bits()
    return _counted(value) if isinstance(value, Iterator) else value


def part(value: Any, start: object, stop: object, step: object) -> Any:
    """`value[start:stop:step]`, if it may."""
    return returned(value[start:stop:step])


def whole(value: str) -> str:
    """`value`, if it can be written anywhere. Raises TemplateError."""
    if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
        raise TemplateError("cannot use this text: it holds half of a character (\\ud800-\\udfff)")
    return value


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        spend(STEP)
        yield value


def text(value: object) -> str:
    """Text of a single value. Raises TemplateError: text of many grows without anyone's intent."""
    if isinstance(value, str | int | float | bool):
        return str(value)
    from jinja2 import Undefined

    from reconciler.core.errors import described

    if isinstance(value, Undefined):
        return str(value)  # raises the error that names it
    hint = "give it a default" if value is None else "name one value in it"
    raise TemplateError(f"cannot make text of {described(value)}: {hint}")


def join(values: Iterable[object], between: object = "") -> str:
    """The texts of all values as one, unless that would be too large. Raises TemplateError."""
    spend(3 * size(values))
    parts, separator = [text(value) for value in values], text(between)
    if sum(map(len, parts)) + len(separator) * len(parts) > MAX_RESULT:
        raise TemplateError("cannot join this: the result grows too large")
    return separator.join(parts)


def replace(value: object, old: object, new: object) -> str:
    """The text with each `old` made `new`, unless that would be too large. Raises TemplateError."""
    source, before, after = text(value), text(old), text(new)
    found = source.count(before) if before else len(source) + 1
    if len(source) + found * len(after) > MAX_RESULT:
        raise TemplateError("cannot replace this: the result grows too large")
    return source.replace(before, after)


def operate(operator: str, left: object, right: object) -> None:
    """Before `left operator right`. Raises TemplateError where the result has no bounds."""
    if (
        operator == "**"
        and isinstance(left, int | float)
        and isinstance(right, int | float)
        and (abs(left) > 2**64 or abs(right) > 64)
    ):
        raise TemplateError("cannot use **: it grows too large")
    if operator == "%" and isinstance(left, str):
        raise TemplateError("cannot use % on text: join the parts with ~")
    if operator == "-" and (isinstance(left, Set) or isinstance(right, Set)):
        # The result would come in another order on every pass.
        raise TemplateError("cannot use - on keys: leave some out with reject('in', …)")
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if (
                isinstance(one, str | list | tuple)
                and isinstance(times, int)
                and len(one) * times > MAX_RESULT
            ):
                raise TemplateError(f"cannot repeat this {times:,} times: it grows too large")
