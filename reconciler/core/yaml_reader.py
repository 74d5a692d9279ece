"""YAML text → plain values that still know where they were written.

YAML 1.2's core schema: `yes`, `on`, `22:00`, `2026-11-23` and `0123` stay text. A duplicate key
is an error, a key is always text, and aliases cannot blow a small file up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias

import yaml

from reconciler.core.document import Document, Path
from reconciler.core.errors import Diagnostic, Place, nearest
from reconciler.core.findings import lines

MAX_VALUES: Final = 500_000
"""Values in one file after aliases are followed. 10,000 VMs of 10 disks need about 400,000."""
MAX_DEPTH: Final = 32
"""Nesting. The deepest key of a spec is at 6."""
MAX_TEXT: Final = 16 * 1024 * 1024
"""Characters in one file."""
MAX_KEY: Final = 1_000
"""Characters of one key. The longest names are a tenth of it."""
MAX_NUMBER: Final = 1_000
"""Characters of one number. Python prints whole numbers of 4,300 digits and no longer ones."""


_MERGE: Final = "tag:yaml.org,2002:merge"
_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {word: word.lower() == "true" for word in "true True TRUE false False FALSE".split()}
# A number with a leading zero is somebody's name for something, not octal and not decimal.
_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(
    r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+"
)
_NUMERIC: Final = frozenset("-+.0123456789")


def _kind(text: str) -> str:
    """What a plain scalar is in YAML 1.2's core schema."""
    if text in _NULL:
        return "null"
    if text in _BOOL:
        return "bool"
    if text[0] in _NUMERIC:
        if _INT.fullmatch(text):
            return "int"
        if _FLOAT.fullmatch(text):
            return "float"
    return "str"


def read(text: str, file: str) -> tuple[Document | None, list[Diagnostic]]:
    """One YAML document. Everything that is wrong with it comes back at once; nothing is raised."""
    reader = _Reader(file)
    if len(text) > MAX_TEXT:
        return None, [reader.error(f"cannot read {file}: more than {MAX_TEXT:,} characters", 1, 1)]
    value: object = None
    wrong: list[Diagnostic] = []
    try:
        loader = yaml.CSafeLoader(text)
        try:
            value = reader.document(loader.get_event)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line, column = _position(error.problem_mark or error.context_mark)
        said = " ".join(part for part in (error.context, error.problem) if part)
        tab = _tab(text, line, column)
        if tab:
            column, said = tab, _TAB
        # libyaml looks ahead on a line, and has had a limit of its own since 0.2.6.
        deep = "maximum nesting depth" in said
        said = _TOO_DEEP if deep else f"cannot read this as YAML: {said}"
        wrong = [reader.error(said, line, column)]
    except UnicodeEncodeError as error:
        before = text[: error.start].splitlines() or [""]
        said = f"cannot read this as YAML: {text[error.start]!r} is half of a character"
        wrong = [reader.error(said, len(before), len(before[-1]) + 1)]
    except yaml.YAMLError as error:
        said = str(error).splitlines()[0]
        wrong = [reader.error(f"cannot read this as YAML: {said}", 1, 1)]
    except _TooBigError as error:
        wrong = [error.diagnostic]
    wrong = list(dict.fromkeys([*reader.diagnostics, *wrong]))
    return (None if wrong else Document(file, value, reader.values, reader.keys)), wrong


def _position(mark: Any) -> tuple[int, int]:
    """Line and column from 1, of a mark that PyYAML counts from 0."""
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


_TAB: Final = (
    "a tab stands where the line is indented, and YAML forbids tabs for that: write spaces"
)


def _tab(text: str, line: int, column: int) -> int:
    """The column of the tab for which YAML cannot be read on at a place; 0: it is for another
    reason. A tab may stand between words, so only one in front of what was to come is meant."""
    there = lines(text)[line - 1 :]
    found = re.match(r"[ \t-]*", there[0]) if there else None
    if not found or column - 1 > found.end():
        return 0
    return found.group().find("\t") + 1


_TOO_DEEP: Final = f"cannot read this: it is nested more than {MAX_DEPTH} levels deep"
_TOO_MANY: Final = (
    f"cannot read this: with its aliases followed it holds more than {MAX_VALUES:,} values"
)


class _TooBigError(Exception):
    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.summary)
        self.diagnostic = diagnostic


_Next: TypeAlias = Callable[[], Any]
"""The next event of libyaml's parser."""


class _Reader:
    """Makes values of one file's events, as they come; what aliases repeat is kept and replayed."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.diagnostics: list[Diagnostic] = []
        self.values: dict[Path, tuple[int, int]] = {}
        self.keys: dict[Path, tuple[int, int]] = {}
        self.count = 0
        self.depth = 0
        self.anchors: dict[str, tuple[Sequence[Any], tuple[int, int]]] = {}
        """Name → the events of what it names, and where; no events yet: we are in the middle."""

    def error(self, summary: str, line: int, column: int) -> Diagnostic:
        return Diagnostic("error", summary, Place(self.file, line, column))

    def document(self, following: _Next) -> object:
        """The value of the one document there is; None: there is none."""
        following()  # the stream begins
        if isinstance(following(), yaml.StreamEndEvent):
            return None
        value = self.value(following(), following, ())
        following()  # the document ends
        another = following()
        if not isinstance(another, yaml.StreamEndEvent):
            said = "cannot read this as YAML: a second document starts here: write one document "
            place = _position(another.start_mark)
            self.diagnostics.append(self.error(f"{said}a file", *place))
        return value

    def value(self, event: Any, following: _Next, path: Path) -> object:
        self.count += 1
        line, column = _position(event.start_mark)
        if self.count > MAX_VALUES:
            raise _TooBigError(self.error(_TOO_MANY, line, column))
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, path)
        if event.anchor is not None:
            return self.anchored(event, following, path)
        self.values[path] = (line, column)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooBigError(self.error(_TOO_DEEP, line, column))
        found: object
        if isinstance(event, yaml.MappingStartEvent):
            found = self.mapping(following, path)
        else:
            found = self.sequence(following, path)
        self.depth -= 1
        return found

    def alias(self, event: Any, path: Path) -> object:
        events, place = self.anchors.get(event.anchor, ((), (0, 0)))
        if place == (0, 0):
            said = f"cannot read this as YAML: found undefined alias {event.anchor!r}"
            raise _TooBigError(self.error(said, *_position(event.start_mark)))
        if not events:
            raise _TooBigError(self.error("cannot read this: an alias holds itself", *place))
        self.count -= 1  # it is what it stands for
        replayed = iter(events)
        return self.value(next(replayed), partial(next, replayed), path)

    def anchored(self, event: Any, following: _Next, path: Path) -> object:
        """A value that aliases may repeat: its events are kept."""
        name, place = event.anchor, _position(event.start_mark)
        self.name(event, ())
        kept = [event, *self.rest(event, following)]
        self.anchors[name] = (kept, place)
        if any(isinstance(one, yaml.AliasEvent) and one.anchor == name for one in kept):
            self.anchors[name] = ((), place)
        self.count -= 1
        replayed = iter(kept)
        return self.value(next(replayed), partial(next, replayed), path)

    def name(self, event: Any, events: Sequence[Any]) -> None:
        """Note what an anchor names; whoever replays its events does not come here again."""
        place = _position(event.start_mark)
        if event.anchor in self.anchors:
            first = self.anchors[event.anchor][1][0]
            said = (
                f"the anchor &{event.anchor} is written twice (first on line {first}): rename one"
            )
            self.diagnostics.append(self.error(said, *place))
        self.anchors[event.anchor] = (events, place)
        event.anchor = None

    def key(self, event: Any) -> Any:
        """The event that a key is: what an alias stands for, if that is one word."""
        if isinstance(event, yaml.AliasEvent):
            known = self.anchors.get(str(event.anchor))
            return known[0][0] if known and len(known[0]) == 1 else event
        if isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            self.name(event, [event])
        return event

    def sequence(self, following: _Next, path: Path) -> list[object]:
        found: list[object] = []
        while not isinstance(event := following(), yaml.SequenceEndEvent):
            found.append(self.value(event, following, (*path, len(found))))
        return found

    def mapping(self, following: _Next, path: Path) -> dict[str, object]:
        """What `<<` brings comes first, so that what is written beside it has the last word."""
        own: dict[str, object] = {}
        merges: list[tuple[Any, list[Any]]] = []
        while not isinstance(event := following(), yaml.MappingEndEvent):
            line, column = _position(event.start_mark)
            event = self.key(event)
            if not isinstance(event, yaml.ScalarEvent):
                said = (
                    "cannot use this as a key: a key is one word "
                    '(a value that starts with {{ needs quotes: "{{ … }}")'
                )
                self.diagnostics.append(self.error(said, line, column))
                self.skip(event, following)
                self.skip(following(), following)
                continue
            if event.tag == _MERGE or (event.value == "<<" and event.implicit[0]):
                merges.append((event, self.kept(following(), following)))
                continue
            key = event.value
            if len(key) > MAX_KEY:
                said = f"this key has {len(key):,} characters; at most {MAX_KEY:,}"
                self.diagnostics.append(self.error(said, line, column))
                self.skip(following(), following)
                continue
            where = (*path, key)
            if key in own:
                said = f"the key {key!r} is written twice (first on line {self.keys[where][0]})"
                self.diagnostics.append(self.error(f"{said}: keep one", line, column))
                self.skip(following(), following)
                continue
            self.keys[where] = (line, column)
            own[key] = self.value(following(), following, where)
        return {**self.merged(merges, own, path), **own} if merges else own

    def merged(
        self, merges: Sequence[tuple[Any, list[Any]]], own: Mapping[str, object], path: Path
    ) -> dict[str, object]:
        """What `<<` brings: the first source has the last word, in the values and in where they
        stand, after what is written beside it."""
        found: dict[str, object] = {}
        for key, events in merges:
            sources = [self.apart(iter(events), path)]
            if isinstance(sources[0][0], list):
                many = events[1:-1] if isinstance(events[0], yaml.SequenceStartEvent) else ()
                replayed = iter(many)
                sources = []
                for first in replayed:
                    sources.append(self.apart(chain([first], replayed), path))
            for value, values, keys in sources:
                if not isinstance(value, dict):
                    said = "cannot merge this: << takes a mapping"
                    self.diagnostics.append(self.error(said, *_position(key.start_mark)))
                    continue
                new = {name for name in value if name not in own and name not in found}
                depth = len(path)
                self.values |= {
                    k: v for k, v in values.items() if k[depth : depth + 1] and k[depth] in new
                }
                self.keys |= {k: v for k, v in keys.items() if k[depth] in new}
                found |= {k: v for k, v in value.items() if k in new}
        return found

    def apart(
        self, events: Iterator[Any], path: Path
    ) -> tuple[object, dict[Path, tuple[int, int]], dict[Path, tuple[int, int]]]:
        """A value with where its parts stand, which does not count yet."""
        values, keys = self.values, self.keys
        self.values, self.keys = {}, {}
        try:
            value = self.value(next(events), partial(next, events), path)
            return value, self.values, self.keys
        finally:
            self.values, self.keys = values, keys

    def skip(self, event: Any, following: _Next) -> None:
        """Pass over a value that cannot be used; what it names can be used elsewhere."""
        self.kept(event, following)

    def kept(self, event: Any, following: _Next) -> list[Any]:
        """The events of a value; what is named in it can be used from now on."""
        events = [event, *self.rest(event, following)]
        for index, one in enumerate(events):
            alias = isinstance(one, yaml.AliasEvent)
            if not alias and isinstance(one, yaml.NodeEvent) and one.anchor is not None:
                behind = map(events.__getitem__, range(index + 1, len(events)))
                self.name(one, [one, *self.rest(one, partial(next, behind))])
        return events

    def rest(self, event: Any, following: _Next) -> list[Any]:
        """The events of a value after its first, kept before anybody looks into them."""
        depth = int(isinstance(event, yaml.CollectionStartEvent))
        found: list[Any] = []
        while depth:
            event = following()
            found.append(event)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise _TooBigError(self.error(_TOO_DEEP, *_position(event.start_mark)))
            if len(found) > 3 * MAX_VALUES:  # a key, a value and the end of one, at most
                raise _TooBigError(self.error(_TOO_MANY, *_position(event.start_mark)))
        return found

    def scalar(self, event: Any) -> object:
        text: str = event.value
        if event.tag is None or event.tag == "!":
            tag = _kind(text) if event.implicit[0] else "str"
        else:
            tag = event.tag.removeprefix("tag:yaml.org,2002:")
        match tag:
            case "str":
                return text
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int" | "float" if len(text) <= MAX_NUMBER:
                try:
                    return int(text, 0) if tag == "int" else float(text)
                except ValueError:
                    pass  # a tag on what is none
            case _:
                pass
        shown = text if len(text) <= 40 else f"{text[:20]}… ({len(text)} characters)"
        known = ("str", "int", "float", "bool", "null")
        summary = (
            f"cannot read {shown} as !!{tag}"
            if tag in known
            else f"cannot use the tag !!{tag}: only plain values are read{nearest(tag, known)}"
        )
        self.diagnostics.append(self.error(summary, *_position(event.start_mark)))
        return None
