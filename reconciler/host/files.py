"""Spec files → texts; configuration and secrets by reference."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from reconciler.core.errors import Exit, HostError
from reconciler.core.settings import Secret, SecretRef

MAX_SECRET: Final = 65_536
MAX_FILE: Final = 64 << 20
"""Bytes of a spec, config or inventory: 16 Mi characters of at most four bytes each."""


SPECS: Final = "specs"
"""Where the specs are, if nobody says."""


class Text(Struct, frozen=True):
    """A file as it was read; `error` if it could not be."""

    file: str
    text: str = ""
    error: str = ""


class NothingNamed(HostError):  # noqa: N818 what it is
    """A path on the command line names no file and no directory."""

    exit = Exit.INVALID


def texts(paths: Sequence[str]) -> list[Text]:
    """Every spec file below the paths, in the order of their names. Raises NothingNamed.

    A directory means its *.yaml and *.yml, sub-folders included; hidden ones are left out, so
    that an editor's or git's temporary files do not count. `-` is standard input.
    """
    found: dict[str, Text] = {}
    for path in paths:
        if path == "-":
            found["-"] = _decoded("<stdin>", sys.stdin.buffer.read(MAX_FILE + 1))
            continue
        if not os.path.exists(path):
            hint = " (a symlink to nothing)" if os.path.islink(path) else ""
            raise NothingNamed(f"cannot read {path}: there is no such file or directory{hint}")
        if os.path.isdir(path):
            files = list(_below(path))
            if not files:
                raise NothingNamed(f"cannot find a spec in {path}: no *.yaml or *.yml is there")
        else:
            files = [path]
        for file in files:
            found.setdefault(os.path.realpath(file), read(file))
    return list(found.values())


def texts_of(
    paths: Sequence[str], requests: str, *, asking: bool = False
) -> tuple[list[Text], list[Text]]:
    """The spec files below the paths, or below `specs/` if none is named, and all requests.

    Where runs are asked for, or are about to be (`asking`), `specs/` need not be there. Raises
    NothingNamed, HostError.
    """
    asked = requested(requests)
    try:
        return texts(paths or (SPECS,)), asked
    except NothingNamed:
        if paths or not (asked or asking):
            raise
        return [], asked


def requested(directory: str) -> list[Text]:
    """The files of the directory of requests, which need not be there. Raises HostError."""
    try:
        os.stat(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"cannot read {directory}: {error.strerror}") from error
    return [read(path) for path in _below(directory)]


def _below(directory: str) -> Iterator[str]:
    def failed(error: OSError) -> None:
        raise HostError(f"cannot read {error.filename}: {error.strerror}")

    for root, folders, files in os.walk(directory, onerror=failed):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in sorted(files):
            if name.endswith((".yaml", ".yml")) and not name.startswith("."):
                yield os.path.join(root, name)


def read(path: str) -> Text:
    """One file's text, if it is a file or a pipe and not beyond all sense."""
    try:
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            return Text(path, error=f"cannot read {path}: it is no file")
        with open(path, "rb") as file:
            return _decoded(path, file.read(MAX_FILE + 1))
    except OSError as error:
        return Text(path, error=f"cannot read {path}: {error.strerror}")


def _decoded(name: str, data: bytes) -> Text:
    if len(data) > MAX_FILE:
        return Text(name, error=f"cannot read {name}: it has more than {MAX_FILE >> 20} MiB")
    try:
        return Text(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return Text(name, error=f"cannot read {name}: line {line} is not UTF-8 text")


def config_path(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The first configuration that is named or exists; None: the built-in defaults."""
    for named in (given, environment.get("RECONCILER_CONFIG")):
        if named:
            return named
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(
        environment.get("HOME", "/"), ".config"
    )
    for usual in (
        "reconciler.yaml",
        os.path.join(home, "reconciler", "config.yaml"),
        "/etc/reconciler/config.yaml",
    ):
        if os.path.exists(usual):
            return usual
    return None


def secret(ref: SecretRef, environment: Mapping[str, str]) -> Secret:
    """The secret behind a reference, one trailing newline removed. Raises HostError."""
    path = ref.name
    if ref.kind == "env":
        value = environment.get(ref.name)
        if not value:
            raise HostError(
                f"cannot read the secret: the variable {ref.name} is not set", "SecretUnreadable"
            )
        return Secret(value)
    if ref.kind == "credential":
        directory = environment.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise HostError(
                f"cannot read the credential {ref.name}: not started by systemd with "
                "LoadCredential=",
                "SecretUnreadable",
            )
        path = os.path.join(directory, ref.name)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SECRET)
        text = data.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise HostError(
            f"cannot read the secret file {path}: {error.strerror}", "SecretUnreadable"
        ) from error
    except UnicodeDecodeError:
        raise HostError(
            f"cannot read the secret file {path}: not text", "SecretUnreadable"
        ) from None
    if not text:
        raise HostError(f"cannot use the secret file {path}: it is empty", "SecretUnreadable")
    return Secret(text)
