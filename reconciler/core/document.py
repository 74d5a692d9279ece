"""YAML text → plain values that still know where they were written.

YAML 1.2's core schema: `yes`, `on`, `22:00`, `2026-11-23` and `0123` stay text. A duplicate key
is an error, a key is always text, and aliases cannot blow a small file up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import yaml
from msgspec import Struct

from reconciler.core.errors import Diagnostic, Place, nearest

Path: TypeAlias = tuple[str | int, ...]

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


class _Loader(yaml.CSafeLoader):
    """libyaml's parser with the scalars of YAML 1.2's core schema."""


_MERGE: Final = "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    # A number with a leading zero is somebody's name for something, not octal and not decimal.
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])


class Document(Struct, frozen=True):
    """One file's value, with the line and column (from 1) of every value and every key in it."""

    file: str
    value: object
    values: Mapping[Path, tuple[int, int]]
    keys: Mapping[Path, tuple[int, int]]

    def place(self, path: Path, *, key: bool = False) -> Place:
        """Where the value (or its key) at `path` stands; the nearest thing around it if absent."""
        while True:
            found = (self.keys.get(path) if key else None) or self.values.get(path)
            if found:
                return Place(self.file, *found)
            if not path:
                return Place(self.file, 1, 1)
            path = path[:-1]


def parse(text: str, file: str) -> tuple[Document | None, list[Diagnostic]]:
    """One YAML document. Everything that is wrong with it comes back at once; nothing is raised."""
    reader = _Reader(file)
    if len(text) > MAX_TEXT:
        return None, [reader.error(f"cannot read {file}: more than {MAX_TEXT:,} characters", 1, 1)]
    try:
        loader = _Loader(text)
        try:
            reader.check_nodes(loader)
        finally:
            loader.dispose()
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line, column = _position(error.problem_mark or error.context_mark)
        said = " ".join(part for part in (error.context, error.problem) if part)
        if "but found another document" in said:
            said = "a second document starts here: write one document a file"
        if "maximum nesting depth" in said:
            # libyaml looks ahead on a line, and has had a limit of its own since 0.2.6.
            return None, [reader.error(_TOO_DEEP, line, column)]
        return None, [reader.error(f"cannot read this as YAML: {said}", line, column)]
    except UnicodeEncodeError as error:
        before = text[: error.start].splitlines() or [""]
        said = f"cannot read this as YAML: {text[error.start]!r} is half of a character"
        return None, [reader.error(said, len(before), len(before[-1]) + 1)]
    except yaml.YAMLError as error:
        said = str(error).splitlines()[0]
        return None, [reader.error(f"cannot read this as YAML: {said}", 1, 1)]
    except _TooBigError as error:
        return None, [error.diagnostic]
    try:
        value = None if node is None else reader.value(node, ())
    except _TooBigError as error:
        return None, [*reader.diagnostics, error.diagnostic]
    document = Document(file, value, reader.values, reader.keys)
    return (None if reader.diagnostics else document), list(dict.fromkeys(reader.diagnostics))


def _position(mark: Any) -> tuple[int, int]:
    """Line and column from 1, of a mark that PyYAML counts from 0."""
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


_TOO_DEEP: Final = f"cannot read this: it is nested more than {MAX_DEPTH} levels deep"
_TOO_MANY: Final = (
    f"cannot read this: with its aliases followed it holds more than {MAX_VALUES:,} values"
)


class _TooBigError(Exception):
    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.summary)
        self.diagnostic = diagnostic


class _Reader:
    """Walks the nodes of one file once, aliases included."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.diagnostics: list[Diagnostic] = []
        self.values: dict[Path, tuple[int, int]] = {}
        self.keys: dict[Path, tuple[int, int]] = {}
        self.count = 0
        self.open: set[int] = set()
        """Nodes that we are in the middle of."""

    def error(self, summary: str, line: int, column: int) -> Diagnostic:
        return Diagnostic("error", summary, Place(self.file, line, column))

    def check_nodes(self, loader: _Loader) -> None:
        """Composing keeps every node, and recurses in C, where too deep is a crash: count first."""
        depth = nodes = 0
        while (event := loader.get_event()) is not None:
            nodes += isinstance(event, yaml.NodeEvent)
            if nodes > 2 * MAX_VALUES + 1:  # no value has more than one key
                raise _TooBigError(self.error(_TOO_MANY, *_position(event.start_mark)))
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise _TooBigError(self.error(_TOO_DEEP, *_position(event.start_mark)))
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1

    def value(self, node: yaml.Node, path: Path) -> object:
        self.count += 1
        line, column = _position(node.start_mark)
        if len(path) > MAX_DEPTH:
            raise _TooBigError(self.error("cannot read this: an alias holds itself", line, column))
        if self.count > MAX_VALUES:
            raise _TooBigError(self.error(_TOO_MANY, line, column))
        self.values[path] = (line, column)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            raise _TooBigError(self.error("cannot read this: an alias holds itself", line, column))
        self.open.add(id(node))
        found: object
        if isinstance(node, yaml.MappingNode):
            found = self.mapping(node, path)
        else:
            found = [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        self.open.discard(id(node))
        return found

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        """What `<<` brings comes first, so that what is written beside it has the last word."""
        merged: dict[str, object] = {}
        # Backwards: the first source has the last word, in the values and in where they stand.
        for key_node, value_node in reversed(node.value):
            if key_node.tag != _MERGE:
                continue
            many = isinstance(value_node, yaml.SequenceNode)
            for source in reversed(value_node.value) if many else [value_node]:
                inner = self.value(source, path)
                if isinstance(inner, dict):
                    merged.update(inner)
                else:
                    said = "cannot merge this: << takes a mapping"
                    self.diagnostics.append(self.error(said, *_position(key_node.start_mark)))
        self.values[path] = _position(node.start_mark)
        own: dict[str, object] = {}
        written: dict[str, tuple[int, int]] = {}
        for key_node, value_node in node.value:
            line, column = _position(key_node.start_mark)
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                said = (
                    "cannot use this as a key: a key is one word "
                    '(a value that starts with {{ needs quotes: "{{ … }}")'
                )
                self.diagnostics.append(self.error(said, line, column))
                continue
            key = str(key_node.value)
            if len(key) > MAX_KEY:
                said = f"this key has {len(key):,} characters; at most {MAX_KEY:,}"
                self.diagnostics.append(self.error(said, line, column))
                continue
            if key in own:
                said = f"the key {key!r} is written twice (first on line {written[key][0]})"
                self.diagnostics.append(self.error(f"{said}: keep one", line, column))
                continue
            own[key] = self.value(value_node, (*path, key))
            self.keys[(*path, key)] = written[key] = (line, column)
        return {**merged, **own}

    def scalar(self, node: yaml.Node) -> object:
        text, tag = str(node.value), node.tag.removeprefix("tag:yaml.org,2002:")
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
        self.diagnostics.append(self.error(summary, *_position(node.start_mark)))
        return None
