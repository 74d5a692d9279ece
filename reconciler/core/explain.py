"""Pydantic's findings as sentences for the author of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from reconciler.core.document import Path
from reconciler.core.errors import described, nearest, shortened


def explained(
    error: ValidationError, raw: object, model: type[BaseModel]
) -> Iterator[tuple[Path, str]]:
    """Pydantic's findings as a path and a sentence each."""
    findings = error.errors(include_url=False, include_context=True)
    listed = {found["loc"][:1] for found in findings if "list[DiskSpec]" in map(str, found["loc"])}
    for found in findings:
        loc = found["loc"]
        if loc[:1] in listed and isinstance(_at(raw, loc[:1]), list):
            if "list[DiskSpec]" not in map(str, loc):
                continue  # the branch of the union that was not meant
        elif "list[DiskSpec]" in map(str, loc):
            continue
        path: Path = tuple(part for part in loc if not _is_branch(part))
        yield path or ("",), _sentence(dict(found), path, model)


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part)


def _at(raw: object, path: Path) -> object:
    for part in path:
        try:
            raw = raw[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """The keys that may stand at `path`."""
    current: Any = model
    named = False
    for part in path:
        if isinstance(part, int):
            continue
        if named:  # the name of one of many, as in `snas: {site-a: …}`
            named = False
            continue
        fields = getattr(current, "model_fields", {})
        found = next((f for n, f in fields.items() if part in (n, f.alias)), None)
        named = found is not None and get_origin(found.annotation) is Mapping
        current = next(iter(_models(found.annotation)), None) if found else None
        if current is None:
            return []
    return [f.alias or n for n, f in current.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _sentence(found: Mapping[str, Any], path: Path, model: type[BaseModel]) -> str:
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    value = found["input"]
    match found["type"]:
        case "extra_forbidden":
            known = _keys_at(model, path[:-1])
            listing = f" (known here: {', '.join(known)})" if known else ""
            return f"unknown key {key!r}{nearest(key, known)}{listing}"
        case "missing":
            return f"the key {key!r} is missing"
        case "literal_error" if key == "disks":
            hint = nearest(str(value), ["inventory"])
            return f"disks: expected `inventory` or a list, found {described(value)}{hint}"
        case "literal_error":
            options = str(found["ctx"]["expected"]).replace(" or ", ", ").replace("'", "")
            hint = nearest(str(value), options.split(", "))
            return f"{key}: expected one of {options}, found {described(value)}{hint}"
        case "string_type":
            quoted = f'; if you mean the text, quote it: "{value}"'
            return f"{key}: expected text, found {described(value)}" + (
                quoted if isinstance(value, float | bool) else ""
            )
        case "int_type" | "int_from_float" | "int_parsing":
            hint = "; write it without quotes" if isinstance(value, str) and value.isdigit() else ""
            return f"{key}: expected a whole number, found {described(value)}{hint}"
        case "bool_type":
            return f"{key}: expected true or false, found {described(value)}"
        case "list_type":
            return f"{key}: expected a list, found {described(value)}"
        case "model_type" | "model_attributes_type" | "mapping_type" | "dict_type":
            return f"{key or 'this'}: expected keys and values, found {described(value)}"
        case "value_error":
            return f"{key}: {shortened(str(found['ctx']['error']))}"
        case _:
            return f"{key}: {str(found['msg'])[:1].lower()}{str(found['msg'])[1:]}"
