"""What may be written about VMs and runs: the models that check it.

What they let through goes on as the plain values of `declared.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from msgspec import convert
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from reconciler.core.declared import (
    EXPORT,
    MAX_NAME,
    MAX_PATH,
    MAX_TAG,
    MAX_TAGS,
    MAX_WHO,
    NAME,
    CheckedRun,
    CheckedVm,
)
from reconciler.core.units import format_size, parse_size, whole_sectors


def _text(value: object) -> object:
    """A whole number where a name is meant is that name: `run: 20261123`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def checked_name(value: str) -> str:
    """A name that is safe wherever it goes. Raises ValueError."""
    if len(value) > MAX_NAME:
        raise ValueError(f"{value[:20]!r}… has {len(value)} characters; at most {MAX_NAME}")
    if not NAME.fullmatch(value):
        wrong = next((char for char in value if not re.match(r"[A-Za-z0-9._-]", char)), value[:1])
        raise ValueError(
            f"{value!r} holds {wrong!r} where only letters, digits, dot, dash and underscore can "
            "be (a letter or digit first)"
            if value
            else "a name cannot be empty"
        )
    return value


def _size(value: object) -> int:
    if not isinstance(value, str | int):
        raise ValueError("write a size like 40GiB")
    size = parse_size(value)
    if size == 0:
        raise ValueError("a disk of 0 bytes cannot be exported")
    if size > 1 << 60:
        raise ValueError(f"{format_size(size)} is more than any disk can hold")
    if size != whole_sectors(size):
        raise ValueError(
            f"{value} is {size} bytes, not a multiple of 512; the next one up is "
            f"{whole_sectors(size)} bytes"
        )
    return size


def _inside(value: str) -> str:
    """A path below the repository, as far as its text can tell; symlinks are looked at later."""
    if len(value) > MAX_PATH:
        raise ValueError(f"a path has at most {MAX_PATH:,} characters, this one {len(value):,}")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{value!r} leads out of the repository: write a path relative to its root, "
            "without '..'"
        )
    if not path.parts or "\0" in value or "\n" in value:
        raise ValueError(f"{value!r} is not a file name")
    if path.name.startswith("."):
        raise ValueError(f"{value!r} begins with a dot, as only files of our own do")
    return str(path)


def _export(value: str) -> str:
    if not EXPORT.fullmatch(value):
        wrong = next((char for char in value if not re.match(r"[A-Za-z0-9._-]", char)), None)
        problem = f"it holds {wrong!r}" if wrong else "it does not end in disk<N>"
        raise ValueError(
            f"{value!r} cannot be an export name: {problem}; the appliance splits targets at "
            "commas and colons and takes the disk's position from the end, so write letters, "
            "digits, dot, dash, underscore, and disk<N> last"
        )
    if len(value) > 255:
        raise ValueError(f"an export name has at most 255 characters, this one {len(value)}")
    return value


def _who(value: str) -> str:
    if len(value) > MAX_WHO or not value.isprintable():
        raise ValueError(f"write one line of at most {MAX_WHO} characters")
    return value


def checked_tags(value: Mapping[str, str]) -> Mapping[str, str]:
    """Tags that can be kept and shown. Raises ValueError."""
    if len(value) > MAX_TAGS:
        raise ValueError(f"write at most {MAX_TAGS} tags; these are {len(value)}")
    for name, text in value.items():
        if not name:
            raise ValueError("a tag needs a name")
        if max(len(name), len(text)) > MAX_TAG or not f"{name}{text}".isprintable():
            raise ValueError(
                f"the tag {name[:40]!a}: write a name and a value of one line, of at most "
                f"{MAX_TAG} characters each"
            )
    return value


Name = Annotated[str, BeforeValidator(_text), AfterValidator(checked_name)]
Size = Annotated[int, BeforeValidator(_size)]
Inside = Annotated[str, AfterValidator(_inside)]
ExportName = Annotated[str, AfterValidator(_export)]
Label = Annotated[str, BeforeValidator(_text)]
Tags = Annotated[Mapping[str, str], AfterValidator(checked_tags)]


class Strict(BaseModel):
    """A misspelt key is an error, and no value is bent into another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class DiskSpec(Strict):
    """One disk as a person writes it."""

    key: Annotated[int, Field(ge=0, lt=2**31)]
    size: Size | None = None
    image: Inside | None = None
    export: ExportName | None = None
    backing: Inside | None = None


class BackupSpec(Strict):
    """Which run is asked for. The run is the identity of the one call."""

    run: Name
    type: Literal["full", "incremental"] = "full"
    fallback: Literal["full"] | None = None


class AddressSpec(Strict):
    """Where the VM is found at its vCenter."""

    name: str | None = None
    path: str | None = None
    vcenter: Name | None = None


class RestoreSpec(Strict):
    """The completed run that a restore reads."""

    vm: Name
    run: Name


class KeepSpec(Strict):
    """How many of a VM's backups are kept at least."""

    full: Annotated[int, Field(ge=1, le=100_000)] | None = None
    days: Annotated[int, Field(ge=0, le=100_000)] | None = None

    @model_validator(mode="after")
    def _something(self) -> KeepSpec:
        if self.full is None and self.days is None:
            raise ValueError("write how many full chains are kept, or for how many days, or both")
        return self


class VmSpec(Strict):
    """One VM as a person writes it."""

    name: Name
    state: Literal["exported", "absent"] = "exported"
    purpose: Literal["backup", "restore"] = Field("backup", alias="for")
    repository: Name | None = None
    sna: Name | None = None
    vm: AddressSpec = AddressSpec()
    backup: BackupSpec | None = None
    release: Literal["on_completion", "keep"] = "on_completion"
    protect: bool = False
    keep: KeepSpec | None = None
    labels: Mapping[str, Label] = Field(default_factory=dict)
    disks: Literal["inventory"] | list[DiskSpec] | None = None
    of: RestoreSpec | None = None

    def checked(self) -> CheckedVm:
        """The same as a plain value."""
        return convert(self, CheckedVm, from_attributes=True)


class RunSpec(Strict):
    """A run that is asked for beside the VM's own declaration."""

    vm: Name
    run: Name
    type: Literal["full", "incremental"] = "full"
    fallback: Literal["full"] | None = None
    by: Annotated[str, AfterValidator(_who)] = ""
    """Who asked; written by tools."""
    policy: Annotated[str, AfterValidator(_who)] = ""
    """The rule by which a scheduler asked."""
    tags: Tags = Field(default_factory=dict)

    def checked(self) -> CheckedRun:
        """The same as a plain value."""
        return convert(self, CheckedRun, from_attributes=True)


def checked_run(**written: Any) -> CheckedRun:
    """A run that is asked for. Raises ValidationError."""
    return RunSpec.model_validate(written).checked()
