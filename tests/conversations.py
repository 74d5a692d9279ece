"""Conversations with a hub, recorded in tests/cases/wire: what is asked, and what is answered.

Every answer is compared field by field. A word in angle brackets stands for a value: `<job>` is the
backup's id once it is known, `<time>` any moment, `<text>` any words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

CASES: Final = Path(__file__).parent / "cases" / "wire"
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

Ask = Callable[[str, str, object, Mapping[str, str]], tuple[int, Any]]
"""Method, path, body, headers → status, body."""


def cases() -> dict[str, dict[str, Any]]:
    """Name → conversation."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CASES.glob("*.yaml"))}


class Conversation:
    """One of them, with the VM that it is about."""

    def __init__(
        self,
        case: Mapping[str, Any],
        vm: str,
        ask: Ask,
        until: Callable[[str, str], None],
        looked: Callable[[str], None],
    ) -> None:
        """`until`: has a job come to a status; `looked`: has the hub looked at a VM again."""
        self.case, self.vm, self.ask, self.until, self.looked = case, vm, ask, until, looked
        self.known = {"vm": vm, "vm name": case["vm"]["name"]}

    def play(self) -> None:
        for number, step in enumerate(self.case["steps"], 1):
            where = f"step {number}: {step}"
            if "ask" in step:
                self._ask(step, where)
            elif "until" in step:
                self.until(self.known["job"], step["until"])
            elif "looked" in step:
                self.looked(self.vm)
            else:
                self.known[step["keep"]] = self.known.pop("job")

    def _ask(self, step: Mapping[str, Any], where: str) -> None:
        method, path = self._filled(step["ask"]).split(" ", 1)
        body = self._filled(step["body"]) if "body" in step else None
        status, found = self.ask(method, path, body, step.get("headers", {}))
        assert status == step["status"], f"{where}: {status}: {found}"
        if "answer" in step:
            optional = {name for name, value in step["answer"].items() if str(value).endswith("?>")}
            assert found.keys() | optional == step["answer"].keys(), where
        wanted = step.get("answer", step.get("has", {}))
        for name in step.get("lacks", ()):
            assert name not in found, f"{where}: {name}"
        for name, value in wanted.items():
            if name in found or not str(value).endswith("?>"):
                self._same(found[name], value, f"{where}: {name}")

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._filled(one) for name, one in value.items()}
        if isinstance(value, str):
            for name, known in self.known.items():
                value = value.replace(f"<{name}>", known)
        return value

    def _same(self, found: Any, wanted: Any, where: str) -> None:
        if isinstance(wanted, list):
            assert len(found) == len(wanted), where
            for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
                self._same(one, other, f"{where}[{number}]")
        elif isinstance(wanted, dict):
            assert isinstance(found, dict), where
            assert found.keys() == wanted.keys(), where
            for name, value in wanted.items():
                self._same(found[name], value, f"{where}.{name}")
        elif isinstance(wanted, str) and (match := re.fullmatch(r"<(.*?)\??>", wanted)):
            assert self._is(match.group(1), found), f"{where}: {found!r} is no {wanted}"
        else:
            assert found == wanted, f"{where}: {found!r}"

    def _is(self, kind: str, found: Any) -> bool:
        if kind == "job" and "job" not in self.known:
            self.known["job"] = found
            return bool(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", found))
        if kind in self.known:
            return bool(found == self.known[kind])
        match kind.split():
            case ["time"]:
                return bool(_TIME.fullmatch(found))
            case ["number"]:
                return isinstance(found, int) and found > 0
            case ["path"]:
                return isinstance(found, str) and found.startswith("/")
            case ["export", position]:
                name = rf"{re.escape(self.vm)}-[A-Za-z0-9._-]+disk{position}"
                return bool(re.fullmatch(name, found))
            case ["targets"]:
                pairs = [pair.split(":", 1) for pair in found.split(",")]
                keys = [str(key) for key in self.case["vm"]["disks"]]
                url = re.compile(rf"nbd://127\.0\.0\.1:\d+/{re.escape(self.vm)}-\S+disk\d+")
                return [key for key, _ in pairs] == keys and all(url.fullmatch(u) for _, u in pairs)
            case ["begun"]:  # the appliance may have been called by now
                return found in ("pending", "running")
            case ["names", what]:
                return self.known[what] in found
            case _:
                return isinstance(found, str) and bool(found)
