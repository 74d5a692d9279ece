"""What lies around the specs: variables of groups and VMs, files that specs name, the environment.

One `Library` serves all files of a source. It reads each file once, and again where it moved. It
knows all that was asked of it, so that the same can be answered elsewhere: by the daemon to which a
command hands its work.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from reconciler.core.around import Side
from reconciler.core.document import parse
from reconciler.core.errors import Diagnostic
from reconciler.core.inventory import Inventory
from reconciler.core.limits import MAX_RESULT, TemplateError
from reconciler.core.settings import SpecRules
from reconciler.host import files
from reconciler.host.files import SUFFIXES, Given, Signature, Text

YOUNG: Final = 2_000_000_000
"""How long before a reading a file may have been written last for its signature not to be trusted,
in ns. A tick of the kernel's clock is 10 ms at most; other machines' clocks are off by more."""
MAX_TEXT: Final = MAX_RESULT
"""Bytes of a file that `lookup('file', …)` reads: as many as a value may have characters."""


class _Known:
    """A file as it was read last."""

    def __init__(self, path: str, signature: Signature, text: Text) -> None:
        self.path, self.signature, self.text = path, signature, text
        self.read = time.time_ns()
        self.digest = digest_of(text)
        self.checked = True

    def stale(self, signature: Signature) -> bool:
        """Whether it may have another content by now."""
        return signature != self.signature or max(self.signature[3:]) > self.read - YOUNG

    @cached_property
    def side(self) -> Side:
        if self.text.error:
            return Side(self.text.file, None, (Diagnostic("error", self.text.error),))
        document, wrong = parse(self.text.text, self.text.file)
        return Side(self.text.file, document, tuple(wrong))


def digest_of(text: Text) -> str:
    """Of what a file says, or of why it says nothing."""
    return hashlib.sha256((text.error or text.text).encode(errors="replace")).hexdigest()


class Library:
    """The files around the specs of one source. Used by one thread."""

    def __init__(
        self,
        rules: SpecRules,
        environment: Mapping[str, str],
        *,
        extra: Sequence[Text] = (),
        given: Given | None = None,
    ) -> None:
        """`given`: there is nothing but this; else the files are there to be read."""
        self.rules = rules
        self.environment = environment
        self.closed = given
        self.extra_texts = given.extra if given else tuple(extra)
        self.inventory: Inventory | None = None
        self.named = False
        """Whether any spec ever named a file, which may be another spec."""
        self.relative = True
        """Whether the specs are named from where we are."""
        self.specs: Collection[str] = ()
        """The files that are read as specs by themselves."""
        self._alone: tuple[Collection[str], frozenset[str]] = ((), frozenset())
        self._known: dict[str, _Known] = {}
        self._folders: dict[str, tuple[str, ...]] = {}
        self._digests: dict[str, str] = {}
        self._chains: dict[tuple[str, ...], tuple[str, Mapping[str, Sequence[Side]]]] = {}
        """Folders of variables → a digest of all that they hold, and the files by name."""
        self._variables: dict[str, str | None] = {}
        self._facts: tuple[Inventory | None, Mapping[str, Any] | None, str] = (None, None, "")

    def refresh(self) -> None:
        """Look anew at what is there, when it is asked for next."""
        self._folders.clear()
        self._digests.clear()
        self._variables.clear()
        for known in self._known.values():
            known.checked = False

    @property
    def given(self) -> Given:
        """All that was asked for."""
        return Given(
            extra=self.extra_texts,
            texts={path: known.text for path, known in self._known.items()},
            folders=dict(self._folders),
            variables=dict(self._variables),
            here=self.here,
        )

    @property
    def here(self) -> str:
        """Where relative paths begin: where whoever read the files was."""
        return (self.closed.here if self.closed else "") or os.getcwd()

    def absolute(self, path: str) -> str:
        """A path as who read the files meant it."""
        return os.path.normpath(path if os.path.isabs(path) else os.path.join(self.here, path))

    @property
    def paths(self) -> Sequence[str]:
        """The files that were read, and the folders that were looked into."""
        return (*self._known, *self._folders)

    def digests(self) -> Mapping[str, str]:
        """File, or question → digest of the answer: other ones where anything else is given."""
        found = {path: known.digest for path, known in self._known.items()}
        found |= {text.file: digest_of(text) for text in self.extra_texts}
        found |= {f"${name}": _hash(value or "") for name, value in self._variables.items()}
        return found

    @cached_property
    def extra(self) -> tuple[Side, ...]:
        sides = []
        for text in self.extra_texts:
            known = _Known(text.file, (0, 0, 0, 0, 0), text)
            sides.append(known.side)
        return tuple(sides)

    def around(self, text: Text) -> Beside:
        """What lies around one file of specs."""
        self.relative = not os.path.isabs(text.file)
        return Beside(self, text)

    def shown(self, path: str) -> str:
        """An absolute path as people wrote those of the specs."""
        here = self.here
        inside = self.relative and path.startswith(f"{here}/")
        return path.removeprefix(f"{here}/") if inside else path

    # -- what is there

    def read(self, path: str) -> _Known:
        """A file by its absolute path."""
        known = self._known.get(path)
        if known and known.checked:
            return known
        if self.closed is not None:
            text = self.closed.texts.get(path) or Text(path, error=f"cannot read {path}: not given")
            known = self._known[path] = _Known(path, (0, 0, 0, 0, 0), text)
            return known
        signature = files.signature(path)
        if known is None or known.stale(signature):
            text = files.read(self.shown(path), pipe=False)
            before, known = known, _Known(path, signature, text)
            if before and before.digest == known.digest:
                known.__dict__["side"] = before.side
            self._known[path] = known
        known.checked = True
        return known

    def exists(self, path: str) -> bool:
        return path in self.closed.texts if self.closed else os.path.isfile(path)

    def folder(self, path: str) -> tuple[str, ...]:
        """The files of a folder of variables, those of its sub-folders among them, in order."""
        found = self._folders.get(path)
        if found is None:
            if self.closed is not None:
                found = tuple(self.closed.folders.get(path, ()))
            else:
                listing = files.listing(path) if os.path.isdir(path) else None
                found = tuple(listing.files) if listing else ()
            self._folders[path] = found
        return found

    def digest(self, folder: str) -> str:
        """A digest of all that a folder of variables holds."""
        found = self._digests.get(folder)
        if found is None:
            texts = [(path, self.read(path).digest) for path in self.folder(folder)]
            found = self._digests[folder] = _hash(repr(texts)) if texts else ""
        return found

    def by_name(self, folders: tuple[str, ...]) -> Mapping[str, Sequence[Side]]:
        """What some folders of variables hold, by the group or the VM that it is for; the same for
        all specs beside which they lie."""
        digest = "/".join(map(self.digest, folders))
        known = self._chains.get(folders)
        if known is None or known[0] != digest:
            found: dict[str, list[Side]] = {}
            for folder in folders:
                for path in self.folder(folder):
                    name = path[len(folder) + 1 :].split("/", 1)[0]
                    for suffix in SUFFIXES:
                        name = name.removesuffix(suffix)
                    found.setdefault(name, []).append(self.read(path).side)
            known = self._chains[folders] = (digest, found)
        return known[1]

    def alone(self, path: str) -> bool:
        """Whether a file is read as specs by itself."""
        if self._alone[0] is not self.specs:
            self._alone = (self.specs, frozenset(map(os.path.realpath, self.specs)))
        return os.path.realpath(path) in self._alone[1]

    def variable(self, name: str) -> str | None:
        """A variable of the environment. Raises TemplateError."""
        if self.closed is not None:
            if name not in self.closed.variables:
                raise TemplateError(f"cannot read the variable {name}: not given")
            self._variables[name] = self.closed.variables[name]
            return self._variables[name]
        if not any(fnmatch.fnmatchcase(name, allowed) for allowed in self.rules.env):
            raise TemplateError(
                f"cannot look up env {name[:60]!r}: the config does not let specs read it; write "
                f"`specs: {{env: [{name[:60]}]}}` there, or give it by -e"
            )
        self._variables[name] = self.environment.get(name)
        return self._variables[name]

    # -- what the inventory says

    def facts(self) -> tuple[Mapping[str, Any] | None, str]:
        """VM → what is known of it, and a digest of it all."""
        known, facts, digest = self._facts
        if self.inventory is not known or (known is None and not digest):
            known = self.inventory
            facts = known.facts() if known else None
            digest = _hash(repr(facts)) if known else "none"
            self._facts = (known, facts, digest)
        return facts, digest


class Beside:
    """What lies around one file, and what was asked of it; see `Around` in core/around.py."""

    def __init__(self, library: Library, text: Text) -> None:
        self.library = library
        self.file_name = text.file
        self.root = library.absolute(text.root or os.path.dirname(text.file) or ".")
        self._chains: dict[str, tuple[str, ...]] = {}
        self.asked: dict[tuple[str, str], str] = {}
        """Question → digest of the answer."""

    def holds(self) -> bool:
        """Whether every answer would be the same now."""
        return all(self._digest(*question) == answer for question, answer in self.asked.items())

    def _digest(self, kind: str, name: str) -> str:
        match kind:
            case "vars":
                return "/".join(map(self.library.digest, self._folders(name)))
            case "file":
                return self.library.read(name).digest if self.library.exists(name) else "none"
            case "alone":
                return str(self.library.alone(name))
            case "inventory":
                return self.library.facts()[1]
            case "groups":
                known = self.library.inventory
                return _hash(repr(known.groups)) if known else "none"
            case _:
                return _hash(repr(self.library.environment.get(name)))

    def _note(self, kind: str, name: str) -> None:
        if (kind, name) not in self.asked:
            self.asked[kind, name] = self._digest(kind, name)

    @property
    def extra(self) -> Sequence[Side]:
        return self.library.extra

    def inventory(self) -> Mapping[str, Any] | None:
        self._note("inventory", "")
        return self.library.facts()[0]

    def groups_of(self, vm: str) -> Sequence[str]:
        self._note("groups", "")
        known = self.library.inventory
        return known.groups_of(vm) if known else ()

    def group_vars(self, group: str) -> Sequence[Side]:
        return self._vars("group_vars", group)

    def host_vars(self, vm: str) -> Sequence[Side]:
        return self._vars("host_vars", vm)

    def _vars(self, folder: str, name: str) -> Sequence[Side]:
        self._note("vars", folder)
        return self.library.by_name(self._folders(folder)).get(name, ())

    def _folders(self, name: str) -> tuple[str, ...]:
        """The folders of that name from the root down to the file: the nearest is the last."""
        if name not in self._chains:
            self._chains[name] = tuple(os.path.join(one, name) for one in self._above())
        return self._chains[name]

    def _above(self) -> list[str]:
        here = self.library.absolute(os.path.dirname(self.file_name) or ".")
        if self.file_name == "<stdin>":
            here = self.root
        root = self._root()
        inside = here == root or here.startswith(f"{root.rstrip('/')}/")
        chain = [here]
        while inside and chain[-1] != root:
            chain.append(os.path.dirname(chain[-1]))
        return chain[::-1]

    def _root(self) -> str:
        return self.library.rules.root or self.root

    def _path(self, path: str, beside: str) -> str:
        """The absolute path of what a file names. Raises TemplateError where it may not be read."""
        if "\0" in path or not path:
            raise TemplateError(f"cannot read {path!r}: it is not the name of a file")
        base = self.root if beside == "<stdin>" else os.path.dirname(self.library.absolute(beside))
        found = os.path.normpath(os.path.join(base, path))
        if self.library.closed is not None:
            return found  # it was judged where it was read
        root = os.path.realpath(self._root())
        real = os.path.realpath(found)
        if real != root and not real.startswith(f"{root.rstrip('/')}/"):
            raise TemplateError(
                f"cannot read {path}: it leads to {real}, outside of {root}; if that is meant: "
                "`specs: {root: DIRECTORY}` in the config"
            )
        return found

    def folder(self, file: str) -> str:
        return self.root if file == "<stdin>" else os.path.dirname(self.library.absolute(file))

    def file(self, path: str, beside: str, *, spec: bool = False) -> Side:
        self.library.named = True
        found = self._path(path, beside)
        self._note("file", found)
        if not self.library.exists(found):
            raise TemplateError(f"cannot read {path}: there is no file {self.library.shown(found)}")
        self._note("alone", found)
        if self.library.closed is None and self.library.alone(found):
            folder = "includes" if spec else "vars"
            raise TemplateError(
                f"cannot use {path} here: it is read as specs by itself; move it to a folder that "
                f"is called `{folder}`"
            )
        return self.library.read(found).side

    def text(self, path: str, beside: str) -> str | None:
        self.library.named = True
        found = self._path(path, beside)
        self._note("file", found)
        if not self.library.exists(found):
            return None
        known = self.library.read(found).text
        if known.error:
            raise TemplateError(known.error)
        if len(known.text) > MAX_TEXT:
            raise TemplateError(f"cannot use {path}: it has more than {MAX_TEXT:,} characters")
        return known.text.removesuffix("\n")

    def variable(self, name: str) -> str | None:
        found = self.library.variable(name)
        self._note("env", name)
        return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
