"""Findings for code scanning. Source: SARIF 2.1.0, and what GitHub asks of it."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote, urljoin

import pytest

from reconciler.core.errors import Diagnostic, Place
from reconciler.core.findings import RULES, WARNINGS
from reconciler.core.sarif import log

TEXT = "vms:\n  - name: 日本\n    stat: x  # 😀\n"


def run(*found: Diagnostic, sources: dict[str, str] | None = None) -> dict[str, Any]:
    made = log(found, sources or {}, "1.2.3", "/srv/hub")
    assert json.loads(json.dumps(made)) == made
    assert made["version"] == "2.1.0"
    assert made["$schema"].endswith("sarif-2.1.0.json")
    (one,) = made["runs"]
    driver = one["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("reconciler", "1.2.3")
    assert one["columnKind"] == "unicodeCodePoints"
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(ids) == len(set(ids))
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"] == RULES[rule["id"]]
        level = "warning" if rule["id"] in WARNINGS else "error"
        assert rule["defaultConfiguration"]["level"] == level
    for result in one["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning")
        assert result["message"]["text"]
        for location in result.get("locations", ()):
            region = location["physicalLocation"]["region"]
            assert region["startLine"] >= 1
            assert region["startColumn"] >= 1
            assert region.get("endColumn", region["startColumn"] + 1) > region["startColumn"]
    assert isinstance(one, dict)
    return one


def test_a_finding_is_a_result_with_its_place() -> None:
    said = "unknown key 'stat'; did you mean 'state'?"
    made = run(
        Diagnostic("error", said, Place("specs/a.yaml", 3, 5)), sources={"specs/a.yaml": TEXT}
    )
    assert made["results"] == [
        {
            "ruleId": "unknown-key",
            "ruleIndex": 0,
            "level": "error",
            "message": {"text": "unknown key 'stat'. Help: did you mean 'state'?"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": "specs/a.yaml", "uriBaseId": "SRCROOT"},
                        "region": {"startLine": 3, "startColumn": 5, "endColumn": 9},
                    }
                }
            ],
        }
    ]


def test_columns_count_characters_and_not_bytes_or_cells() -> None:
    made = run(Diagnostic("error", "x", Place("a.yaml", 2, 11)), sources={"a.yaml": TEXT})
    region = made["results"][0]["locations"][0]["physicalLocation"]["region"]
    assert (region["startColumn"], region["endColumn"]) == (11, 13)


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("specs/a.yaml", "specs/a.yaml"),
        ("./specs/../specs/a.yaml", "specs/a.yaml"),
        ("/srv/hub/specs/a.yaml", "specs/a.yaml"),
        ("/etc/reconciler/config.yaml", "file:///etc/reconciler/config.yaml"),
        ("../inventory.yaml", "file:///srv/inventory.yaml"),
        ("a b/ü#?.yaml", "a%20b/%C3%BC%23%3F.yaml"),
        ("<stdin>", "%3Cstdin%3E"),
        ("a:b.yaml", "a%3Ab.yaml"),
    ],
)
def test_files_are_named_from_where_the_command_is(file: str, uri: str) -> None:
    made = run(Diagnostic("error", "x", Place(file, 1, 1)))
    found = made["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert found["uri"] == uri
    base = made["originalUriBaseIds"]["SRCROOT"]["uri"]
    assert base == "file:///srv/hub/"
    if "uriBaseId" in found:
        path = unquote(urljoin(base, found["uri"]).removeprefix("file://"))
        assert path == f"/srv/hub/{unquote(uri)}"


def test_a_finding_without_a_place_has_none() -> None:
    made = run(Diagnostic("error", "cannot read x: Permission denied"))
    assert "locations" not in made["results"][0]
    assert run()["results"] == []


def test_no_line_of_a_file_is_in_it() -> None:
    made = run(Diagnostic("error", "x", Place("a.yaml", 3, 5)), sources={"a.yaml": TEXT})
    assert "😀" not in json.dumps(made, ensure_ascii=False)
