"""What lies around a file of specs and may be asked for while it is read.

The core opens nothing: whoever reads files hands in an `Around` per file, and remembers what was
asked, so that the file is read again when an answer would be another one.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from reconciler.core.document import Document
from reconciler.core.errors import Diagnostic
from reconciler.core.limits import TemplateError


class Side(Struct, frozen=True):
    """A file beside the specs: what it says, or what is wrong with it."""

    file: str
    document: Document | None
    wrong: tuple[Diagnostic, ...] = ()


class Around(Protocol):
    """The answers, for one file of specs. Each raises TemplateError where it has none to give."""

    @property
    def extra(self) -> Sequence[Side]:
        """What was given by `-e`, in that order."""
        ...

    def inventory(self) -> Mapping[str, Any] | None:
        """VM → what the inventory knows of it, as plain values; None: there is no inventory."""
        ...

    def groups_of(self, vm: str) -> Sequence[str]:
        """The groups of a VM, as the inventory has them."""
        ...

    def group_vars(self, group: str) -> Sequence[Side]:
        """The variables of a group: what lies nearest to the specs comes last."""
        ...

    def host_vars(self, vm: str) -> Sequence[Side]:
        """The variables of a VM, in the same order."""
        ...

    def file(self, path: str, beside: str, *, spec: bool = False) -> Side:
        """The YAML file that `beside` names. `spec`: it is to be included, and must not be one of
        those that are read by themselves."""
        ...

    def folder(self, file: str) -> str:
        """The absolute path of the directory that a file of specs lies in."""
        ...

    def text(self, path: str, beside: str) -> str | None:
        """The text of a file that `beside` names; None: there is none."""
        ...

    def variable(self, name: str) -> str | None:
        """A variable of the environment; None: it is not set."""
        ...


class Nothing:
    """There is nothing around: for texts that stand alone."""

    extra: Sequence[Side] = ()

    def inventory(self) -> Mapping[str, Any] | None:
        return None

    def groups_of(self, _vm: str) -> Sequence[str]:
        return ()

    def group_vars(self, _group: str) -> Sequence[Side]:
        return ()

    def host_vars(self, _vm: str) -> Sequence[Side]:
        return ()

    def file(self, path: str, _beside: str, *, spec: bool = False) -> Side:  # noqa: ARG002
        raise TemplateError(f"cannot read {path}: no other files are read from here")

    def folder(self, file: str) -> str:
        return posixpath.dirname(posixpath.join("/", file))

    def text(self, path: str, _beside: str) -> str | None:
        raise TemplateError(f"cannot read {path}: no other files are read from here")

    def variable(self, name: str) -> str | None:
        raise TemplateError(f"cannot read the variable {name}: none are read from here")
