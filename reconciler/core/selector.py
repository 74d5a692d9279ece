"""Which VMs are meant, by their labels: `tier=gold,site!=b`, as kubectl has it; or by their names:
`ctx-1*`, as shells have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from msgspec import Struct

from reconciler.core.errors import MAX_TYPO
from reconciler.core.units import natural


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


class Choice(Struct, frozen=True):
    """Some VMs of many: those with one of the names, and with all of the labels."""

    patterns: tuple[str, ...] = ()
    """Names, or globs of names; none: whatever the name is."""
    selector: Selector | None = None

    @classmethod
    def read(cls, patterns: Iterable[str], selector: str | None) -> Choice:
        """As it is typed. Raises ValueError."""
        return cls(tuple(patterns), None if selector is None else parse(selector))

    def __bool__(self) -> bool:
        """Whether it leaves anybody out at all."""
        return bool(self.patterns) or self.selector is not None

    def of(self, known: Mapping[str, Mapping[str, str] | None], beside: str = "") -> list[str]:
        """The names that are meant, of VMs with their labels. Raises ValueError if a pattern or the
        labels match none.

        Labels None: they cannot be read, so the VM may be meant. `beside`: what else to say where
        something matches none.
        """
        named = set(known) if not self.patterns else set[str]()
        for pattern in self.patterns:
            found = [name for name in known if fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(f"there is no VM {pattern!r} here{near(pattern, known)}{beside}")
            named.update(found)
        selector = self.selector
        if selector is not None:
            named = {
                name
                for name in named
                if (labels := known[name]) is None or selector.matches(labels)
            }
            if not named:
                raise ValueError(
                    f"no VM{' of these' if self.patterns else ''} has the labels "
                    f"'{selector}'{_labels(known)}{beside}"
                )
        return sorted(named, key=natural)


MOST = 20
"""Labels or names that a message has at most."""


def near(pattern: str, known: Iterable[str]) -> str:
    """The names that may have been meant; all, if none is like it."""
    import difflib  # only when something is already wrong: start-up does not pay for it

    names = sorted(known, key=natural)
    plain = re.sub(r"[*?\[\]]+", "", pattern)[:MAX_TYPO]
    like = difflib.get_close_matches(plain, names, n=3, cutoff=0.6)
    like = like or [name for name in names if plain and name.startswith(plain)][:3]
    if like:
        return f"; did you mean {' or '.join(like)}?"
    return f" (there are: {_some(names)})"


def _labels(known: Mapping[str, Mapping[str, str] | None]) -> str:
    pairs = {f"{key}={value}" for one in known.values() if one for key, value in one.items()}
    return f"; there are: {_some(sorted(pairs))}"


def _some(words: list[str]) -> str:
    rest = len(words) - MOST
    return (", ".join(words[:MOST]) or "none") + (f" and {rest} more" if rest > 0 else "")


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
