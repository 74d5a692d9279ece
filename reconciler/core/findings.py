"""Findings taken apart, for people and programs: by what rule, what is wrong, what helps, where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.errors import Diagnostic, Place

RULES: Final[Mapping[str, str]] = {
    "bad-value": "A value is of the right type and cannot be used.",
    "clash": "Two VMs cannot both be as they are declared.",
    "config": "The configuration, or what it names, cannot be used.",
    "contradiction": "Two things are written that cannot both be meant.",
    "disks-unverified": "No inventory confirms that these are all disks of the VM.",
    "duplicate-disk": "Two disks of one VM have the same key, image or export name.",
    "duplicate-key": "A key is written twice.",
    "duplicate-vm": "A VM is declared twice.",
    "inventory-mismatch": "The spec names other disks than the inventory knows.",
    "inventory-unknown": "The inventory does not know the VM, or cannot be read.",
    "limit": "There is more of something than can be meant.",
    "missing-key": "A key that is needed is not there.",
    "no-effect": "A key has no effect beside the others.",
    "no-run": "No run of the VM is asked for.",
    "not-a-backup": "What is to be read or built on is no completed run.",
    "secret-in-place": "A secret is written where only its place may be named.",
    "superseded": "A run that was asked for was never called, and a newer one has ended.",
    "template": "An expression cannot be evaluated.",
    "unknown-key": "A key that nothing reads.",
    "unknown-name": "A name that neither the config, the specs nor the inventory has.",
    "unreadable": "A file cannot be read.",
    "wrong-type": "A value is of another type than is meant.",
    "yaml": "The text is no YAML that is read here.",
}
"""Rule → what it finds. The names are part of the interface: `validate -o json` and `-o sarif`."""

WARNINGS: Final = frozenset({"disks-unverified", "no-effect", "no-run", "superseded"})
"""Rules that find nothing that is wrong, but what somebody should know."""

_BY_SUMMARY: Final = (
    ("yaml", r"cannot read this as YAML|cannot use the tag !!|cannot use this as a key"),
    ("yaml", r"^cannot read .* as !!|cannot merge this|alias holds itself"),
    ("template", r"cannot read .*\{\{|cannot read the pattern|cannot repeat this"),
    ("limit", r"cannot read this: |more than [\d,]+ (characters|values)"),
    ("unreadable", r"^(the inventory: )?cannot read |cannot be read (now|and)"),
    ("duplicate-key", r"is written twice"),
    ("duplicate-vm", r"is declared twice"),
    ("duplicate-disk", r"two disks (have|with) |has two disks "),
    ("secret-in-place", r"a secret is never written in place|URL with a password in it"),
    # What stands there may be a password, a private key, or what was to be encrypted.
    ("secret-in-place", r"this URL cannot be read|is a private key|secret encrypt` prints"),
    ("template", r"cannot evaluate|go round in a circle|cannot be used in \{\{|`when` must"),
    (
        "template",
        r"a list to loop over|cannot be a variable|cannot look up|^loop_var|`loop_var`",
    ),
    (
        "contradiction",
        r"but the run is full|`of` names what|a restore makes no backup|no images",
    ),
    ("contradiction", r" is asked for, but "),
    ("limit", r"at most [\d,]+|has more than|declares more than|the expressions of "),
    ("inventory-mismatch", r"the inventory knows .*One snapshot"),
    ("inventory-unknown", r"the inventory .*(does not know|knows no)|that can be read"),
    ("disks-unverified", r"\(DisksUnverified\)"),
    ("no-run", r"no run is asked for"),
    ("unknown-key", r"unknown key "),
    ("missing-key", r"the key '.*' is missing|is empty: write|names no |needs its `image`"),
    ("missing-key", r"is not known, and|has no size|either `of:"),
    ("unknown-name", r"is not in the config|there is no VM "),
    ("clash", r", as has VM |, written by VM "),
    ("not-a-backup", r"not a backup|no completed run"),
    ("superseded", r"supersedes it"),
    ("bad-value", r"expected one of "),
    ("wrong-type", r"expected .*, found "),
    ("config", r"cannot use .* for hub"),
)
"""The first that matches says the rule of a finding that does not carry one. Each is compiled where
there is a finding, not by every command."""

_MEANT: Final = re.compile(r"; (did you mean (?:'(?:[^'\\]|\\.)*'|\"[^\"]*\")\?)")
_ADVICE: Final = re.compile(
    r"(?:: |; )(?=(?:add|give|keep|leave|mend|move|name|quote|remove|split|type|write|if you mean|"
    r"if that is meant|the next one up|`\| list` makes)\b)"
)
_BARE: Final = re.compile(r"(?:in the inventory: )?[\w.-]*")
"""Of `timeout: write a duration like 10s`, the advice is all that it says."""


class Finding(Struct, frozen=True):
    """A diagnostic, taken apart."""

    rule: str
    severity: str
    summary: str
    """What is wrong, without what helps."""
    help: str
    """What to write or type; empty: nothing more is known."""
    place: Place | None
    vm: str


def finding(diagnostic: Diagnostic) -> Finding:
    """What a diagnostic says, the suggestion and the advice apart from it."""
    summary, helps = diagnostic.summary, [diagnostic.help] if diagnostic.help else []
    advice = next(
        (found for found in _ADVICE.finditer(summary) if _whole(summary[: found.start()])),
        None,
    )
    if advice:
        helps.insert(0, summary[advice.end() :])
        summary = summary[: advice.start()]
    if meant := _MEANT.search(summary):
        helps.insert(0, meant.group(1))
        summary = summary[: meant.start()] + summary[meant.end() :]
    return Finding(
        rule_of(diagnostic),
        diagnostic.severity,
        summary,
        "; ".join(helps),
        diagnostic.place,
        diagnostic.vm,
    )


def _whole(text: str) -> bool:
    """Whether a sentence may end here: more than a key is said, and no bracket is open."""
    return not _BARE.fullmatch(text) and text.count("(") == text.count(")")


def rule_of(diagnostic: Diagnostic) -> str:
    """One of RULES."""
    if diagnostic.rule:
        return diagnostic.rule
    for rule, pattern in _BY_SUMMARY:
        if re.search(pattern, diagnostic.summary):
            return rule
    return "bad-value"


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Warnings first, then errors, so that the errors stand just above the count; within each,
    what has no place, then file by file, from the top down."""

    def key(one: Diagnostic) -> tuple[bool, str, int, int]:
        place = one.place or Place("", 0, 0)
        return one.severity == "error", place.file, place.line, place.column

    return sorted(diagnostics, key=key)


def once(diagnostics: Iterable[Diagnostic]) -> list[tuple[Diagnostic, tuple[str, ...]]]:
    """Each finding once, with the VMs that it hurts: what is wrong with a variable or a default is
    written in one place, and found again for every VM that needs it."""
    found: dict[Diagnostic, list[str]] = {}
    for one in diagnostics:
        vms = found.setdefault(replace(one, vm=""), [])
        if one.vm:
            vms.append(one.vm)
    return [(one, tuple(vms)) for one, vms in found.items()]


_BREAK: Final = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""Where a line ends in YAML. Source: libyaml, IS_BREAK."""


def lines(text: str) -> list[str]:
    """The lines of a text, as YAML counts them."""
    return _BREAK.split(text)


_KEY: Final = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^\s:,{}\[\]]+""")
_QUOTED: Final = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")
_FLOW: Final = re.compile(r"""[,\[\]{}]|:(?=\s)|\s#""")
_BLOCK: Final = re.compile(r""":(?=\s|$)|\s#""")


def end_of(line: str, column: int) -> int:
    """Where that which begins at a column ends; columns count from 1, and the end is the column
    behind it. A value that goes on below ends with the line."""
    rest = line[column - 1 :]
    if not rest.strip():
        return column
    if rest[0].isspace():
        return column + 1
    if item := re.match("(?:- +)+(?=[^ ])", rest):
        return end_of(line, column + item.end())
    if quoted := _QUOTED.match(rest):
        return column + quoted.end()
    if rest[0] in "[{":
        return column + _bracketed(rest)
    inside = sum(line[: column - 1].count(one) for one in "[{")
    inside -= sum(line[: column - 1].count(one) for one in "]}")
    stop = (_FLOW if inside > 0 else _BLOCK).search(rest, 1)
    return column + max(1, len((rest[: stop.start()] if stop else rest).rstrip()))


def _end(found: Finding, line: str, column: int) -> int:
    """The same for a finding: where YAML cannot be read on, there is no word that is meant."""
    end = end_of(line, column)
    return min(end, column + 1) if found.summary.startswith("cannot read this as YAML") else end


def _bracketed(text: str) -> int:
    """Characters up to the bracket that closes the first one; to the end where none does."""
    depth, at = 0, 0
    while at < len(text):
        if text[at] in "\"'" and (quoted := _QUOTED.match(text, at)):
            at = quoted.end()
            continue
        depth += (text[at] in "[{") - (text[at] in "]}")
        at += 1
        if depth == 0:
            return at
    return len(text.rstrip())


class Shown(Struct, frozen=True):
    """A line of a file and the part of it that is meant; `start` and `end` count from 0."""

    text: str
    start: int
    end: int


def shown(found: Finding, everything: Sequence[str], *, private: bool = False) -> Shown | None:
    """The line of a file that a finding is about; None: there is none, or it might hold a secret.

    `private`: the file may hold what nobody is to read over a shoulder or in a log, so no more is
    shown than the key, and of the value no more than the finding says itself.
    """
    if found.place is None or found.rule == "secret-in-place":
        return None
    if not 1 <= found.place.line <= len(everything):
        return None
    line = everything[found.place.line - 1]
    start = min(found.place.column - 1, len(line))
    if private and found.rule in ("yaml", "duplicate-key"):
        tab = line[start : start + 1] == "\t" and not line[:start].strip()
        indent = line[: len(line) - len(line.lstrip())]
        return Shown(f"{indent}…", start, start + 1) if tab else None
    end = _end(found, line, start + 1) - 1
    if private:
        line, start, end = _covered(line, start, end, found)
    return Shown(*_without_passwords(line, start, end))


_OWN_KEY: Final = re.compile(r"\s*(?:- +)*[\w.-]*(?::\s+)?")
_LAST_KEY: Final = re.compile(r"(?<=[{,\s])[\w.-]+:\s+$")
"""The key of a value within brackets: what a colon and a space stand behind is no value."""


def _tells(summary: str, value: str) -> bool:
    """Whether a finding says a value itself, as it stands or as Python writes it."""
    return value in summary or repr(value)[1:-1] in summary


def _covered(line: str, start: int, end: int, found: Finding) -> tuple[str, int, int]:
    """The same line with nothing in it but a key, and a value that the finding tells anyway."""
    before, meant, after = line[:start], line[start:end], line[end:]
    key = found.rule == "unknown-key" or after.startswith(":")
    if not _OWN_KEY.fullmatch(before):
        own = _LAST_KEY.search(before)
        kept = own.group() if own and not key else ""
        before = f"{before[: len(before) - len(before.lstrip())]}… {kept}"
    if meant[:1] in "[{|>":
        meant = meant[:1]
    elif not key and not _tells(found.summary, meant.strip("\"'")):
        meant = "…"
    if after.strip():
        after = ": …" if key else " …"
    return before + meant + after, len(before), len(before) + len(meant)


_USERINFO: Final = re.compile(r"(?<=://)[^\s/@\"']*(?=@)")


def _without_passwords(line: str, start: int, end: int) -> tuple[str, int, int]:
    """The same line, with what stands before the host of a URL covered."""
    for found in reversed(list(_USERINFO.finditer(line))):
        shorter = found.end() - found.start() - 1
        line = f"{line[: found.start()]}…{line[found.end() :]}"
        start -= shorter if start >= found.end() else 0
        end -= shorter if end >= found.end() else 0
    return line, start, max(start, end)


def span(found: Finding, sources: Mapping[str, Sequence[str]]) -> int | None:
    """The column behind that which is meant; None: its text is not at hand. `sources`: lines."""
    place = found.place
    if place is None or not 1 <= place.line <= len(sources.get(place.file, ())):
        return None
    return _end(found, sources[place.file][place.line - 1], place.column)
