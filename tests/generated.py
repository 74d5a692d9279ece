"""Files that are made from the code: `python -m tests.generated` writes them, a test compares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from reconciler.core.schema import KINDS, schema

ROOT: Final = Path(__file__).resolve().parents[1]


def schemas() -> Mapping[Path, str]:
    """What editors read: the output of `reconciler schema`."""
    return {
        ROOT / "docs" / "schema" / f"{kind}.schema.json": (
            json.dumps(schema(kind), indent=2, ensure_ascii=False) + "\n"
        )
        for kind in KINDS
    }


def everything() -> Mapping[Path, str]:
    return {**schemas()}


if __name__ == "__main__":
    for path, text in everything().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
