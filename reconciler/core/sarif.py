"""Findings as SARIF 2.1.0, for code scanning. Source: OASIS, SARIF version 2.1.0."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from reconciler.core.errors import Diagnostic
from reconciler.core.findings import RULES, WARNINGS, Finding, finding, lines, once, span

SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
VERSION: Final = "2.1.0"
_ROOT: Final = "SRCROOT"


def log(
    diagnostics: Sequence[Diagnostic], sources: Mapping[str, str], version: str, directory: str
) -> dict[str, Any]:
    """One run of `validate`. `sources`: file → its text. `directory`: what relative names are
    relative to, absolute."""
    found = [finding(one) for one, _ in once(diagnostics)]
    named = {one.place.file for one in found if one.place}
    texts = {file: lines(text) for file, text in sources.items() if file in named}
    used = sorted({one.rule for one in found})
    return {
        "$schema": SCHEMA,
        "version": VERSION,
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "reconciler",
                        "version": version,
                        "rules": [_rule(one) for one in used],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "originalUriBaseIds": {
                    _ROOT: {"uri": f"file://{quote(posixpath.join(directory, ''))}"}
                },
                "results": [_result(one, used, texts, directory) for one in found],
            }
        ],
    }


def _rule(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": {"text": RULES.get(name, name)},
        "defaultConfiguration": {"level": "warning" if name in WARNINGS else "error"},
    }


def _result(
    found: Finding, rules: Sequence[str], texts: Mapping[str, Sequence[str]], directory: str
) -> dict[str, Any]:
    text = f"{found.summary}. Help: {found.help}" if found.help else found.summary
    result: dict[str, Any] = {
        "ruleId": found.rule,
        "ruleIndex": rules.index(found.rule),
        "level": found.severity,
        "message": {"text": text},
    }
    place = found.place
    if place is None:
        return result
    region = {"startLine": place.line, "startColumn": place.column}
    if (end := span(found, texts)) is not None and end > place.column:
        region["endColumn"] = end
    result["locations"] = [
        {
            "physicalLocation": {
                "artifactLocation": _artifact(place.file, directory),
                "region": region,
            }
        }
    ]
    return result


def _artifact(file: str, directory: str) -> dict[str, str]:
    """A file by its name below the directory; one that is elsewhere by its whole name."""
    whole = posixpath.normpath(posixpath.join(directory, file))
    inside = posixpath.join(directory, "")
    if whole.startswith(inside):
        return {"uri": quote(whole.removeprefix(inside)), "uriBaseId": _ROOT}
    return {"uri": f"file://{quote(whole)}"}
