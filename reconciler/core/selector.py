"""Which VMs are meant, by their labels: `tier=gold,site!=b`, as kubectl has it."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct


class Term(Struct, frozen=True):
    """One condition on one label. `value` None: that it is there, whatever it says."""

    key: str
    value: str | None = None
    equal: bool = True

    def matches(self, labels: Mapping[str, str]) -> bool:
        if self.value is None:
            return self.key in labels
        return (labels.get(self.key) == self.value) is self.equal

    def __str__(self) -> str:
        if self.value is None:
            return self.key
        return f"{self.key}{'=' if self.equal else '!='}{self.value}"


class Selector(Struct, frozen=True):
    """Conditions that must all hold."""

    terms: tuple[Term, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(term.matches(labels) for term in self.terms)

    def __str__(self) -> str:
        return ",".join(map(str, self.terms))


def parse(text: str) -> Selector:
    """From `tier=gold`, `tier!=gold`, `tier`; a comma means and. Raises ValueError.

    `!=` also holds where there is no such label.
    """
    return Selector(tuple(_term(part.strip(), text) for part in text.split(",")))


def _term(part: str, text: str) -> Term:
    key, sign, value = part.partition("=")
    equal = not key.endswith("!")
    key, value = key.removesuffix("!").strip(), value.strip()
    if not key or set("!=") & {*key, *value} or (not sign and not equal):
        raise ValueError(
            f"cannot read the selector {text!r}: write tier=gold, tier!=gold or tier; a comma "
            "means and"
        )
    return Term(key, value if sign else None, equal)
