"""Spec files → texts; configuration and secrets by reference."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.errors import Exit, HostError
from reconciler.core.settings import Secret, SecretRef
from reconciler.host.places import config_path as config_path

MAX_SECRET: Final = 65_536
MAX_FILE: Final = 64 << 20
"""Bytes of a spec, config or inventory: 16 Mi characters of at most four bytes each."""


SPECS: Final = "specs"
"""Where the specs are, if nobody says."""
SUFFIXES: Final = (".yaml", ".yml")
BESIDE: Final = frozenset({"group_vars", "host_vars", "vars", "includes"})
"""Folders of what specs name: nothing below them is read as specs by itself. The first three are
called as Ansible calls them."""


class Text(Struct, frozen=True):
    """A file as it was read; `error` if it could not be."""

    file: str
    text: str = ""
    error: str = ""
    root: str = ""
    """The directory that was named, and below which it was found; else its own."""


class Given(Struct, frozen=True):
    """All that specs were given from around them."""

    extra: tuple[Text, ...] = ()
    """What `-e` says."""
    texts: Mapping[str, Text] = field(default_factory=dict)
    """Absolute path → the file."""
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Absolute path of a folder of variables → the paths of the files in it."""
    variables: Mapping[str, str | None] = field(default_factory=dict)
    """Of the environment; None: not set."""
    here: str = ""
    """The directory from which relative paths were read; empty: the one that we are in."""


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
            text = _decoded("<stdin>", sys.stdin.buffer.read(MAX_FILE + 1))
            found["-"] = replace(text, root=".")
            continue
        if not os.path.exists(path):
            hint = " (a symlink to nothing)" if os.path.islink(path) else ""
            raise NothingNamed(f"cannot read {path}: there is no such file or directory{hint}")
        root = path
        if os.path.isdir(path):
            files = list(_below(path))
            if not files:
                raise NothingNamed(f"cannot find a spec in {path}: no *.yaml or *.yml is there")
        else:
            root, files = os.path.dirname(path) or ".", [path]
        for file in files:
            name = os.path.realpath(file)
            if name not in found:
                found[name] = replace(read(file), root=root)
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

    return (
        entry.path
        for entry, beside in _walk(directory, failed)
        if not beside and not _is_folder(entry)
    )


def _walk(
    directory: str, failed: Callable[[OSError], None]
) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """The spec files of a directory by name, then each sub-folder, before what is in it; each with
    whether it is only beside the specs.

    Hidden ones are left out; symlinks to folders are not followed.
    """
    todo: list[tuple[str | os.DirEntry[str], bool]] = [(directory, False)]
    while todo:  # no recursion: a path may be deeper than Python's stack
        folder, beside = todo.pop()
        if isinstance(folder, os.DirEntry):
            beside = beside or folder.name in BESIDE
            yield folder, beside
        try:
            with os.scandir(os.fspath(folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            failed(error)
            continue
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        for one in entries:
            if one.name.endswith(SUFFIXES) and not _leads_in(one):
                yield one, beside
        todo += [(entry, beside) for entry in reversed(entries) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _leads_in(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a symlink to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False  # a symlink to itself: reading it says so


Signature: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, size, and when content and inode were changed, in ns: another content has
another one, unless it is written within a tick of the clock."""


class Listing(Struct, frozen=True):
    """What spec files are below a directory, without reading them."""

    files: Mapping[str, Signature]
    """In the order in which they are read."""
    folders: tuple[str, ...]
    """The directory itself, and all below it."""
    links: tuple[str, ...] = ()
    """The files that are symlinks."""
    beside: Mapping[str, Signature] = field(default_factory=dict)
    """Files in the folders of what specs name, which are not read by themselves."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Folder → why it could not be looked into; the directory itself, if it is missing."""

    def moved(self, found: Mapping[str, Signature | None]) -> Listing:
        """The same after some files in these folders were written, made or removed (None)."""
        every = dict(self.files)
        fresh = [path for path, one in found.items() if one and path not in every]
        for path, one in found.items():
            if one:
                every[path] = one
            else:
                every.pop(path, None)
        if fresh:
            order = {folder: number for number, folder in enumerate(self.folders)}

            def rank(path: str) -> tuple[int, str]:
                return order[os.path.dirname(path)], os.path.basename(path)

            names = [path for path in every if path not in fresh]
            for path in fresh:
                import bisect  # late: only a daemon adds files one by one

                bisect.insort(names, path, key=rank)
            every = {path: every[path] for path in names}
        return replace(self, files=every)


def listing(directory: str) -> Listing:
    """The spec files below a directory as they are now; nothing is raised."""
    files: dict[str, Signature] = {}
    besides: dict[str, Signature] = {}
    folders, links = [directory], []
    unread: dict[str, str] = {}

    def failed(error: OSError) -> None:
        unread[str(error.filename)] = f"cannot read {error.filename}: {error.strerror}"

    for entry, beside in _walk(directory, failed):
        try:
            entry.path.encode()
        except UnicodeEncodeError:
            shown = ascii(entry.path)
            unread[shown] = f"cannot read {shown}: its name is not UTF-8 text"
            continue
        if _is_folder(entry):
            folders.append(entry.path)
            continue
        if entry.is_symlink():
            links.append(entry.path)
        (besides if beside else files)[entry.path] = signature(entry.path)
    return Listing(files, tuple(folders), tuple(links), besides, unread)


def signature(path: str) -> Signature:
    """What tells that a file was written since; of one that cannot be looked at, zeros."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0, 0, 0)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read(path: str, *, pipe: bool = True) -> Text:
    """One file's text, if it is a file or, where one is meant, a pipe, and not beyond all sense."""
    try:
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or (pipe and stat.S_ISFIFO(kind))):
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


def secret(ref: SecretRef, environment: Mapping[str, str]) -> Secret:
    """The secret behind a reference, one trailing newline removed. Raises HostError."""
    path = ref.name
    if ref.kind == "age":
        return _opened(ref, environment)
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


def _opened(ref: SecretRef, environment: Mapping[str, str]) -> Secret:
    """A secret that age has encrypted. Raises HostError; none holds it, or a key."""
    where = f"cannot decrypt the secret{f' at {ref.place}' if ref.place else ''}"
    if ref.identity is None:
        raise HostError(
            f"{where}: the config names no key; write `secrets: {{age_identity: {{file: PATH}}}}`",
            "SecretUnreadable",
        )
    try:
        key = secret(ref.identity, environment).reveal()
    except HostError as error:
        raise HostError(f"{where}: its key: {error}", "SecretUnreadable") from error
    import base64  # only who decrypts loads these

    import pyrage

    data = ref.sealed.encode()
    if not data.startswith(b"-----"):
        data = base64.b64decode(data)
    identities = _identities(key, ref.identity)
    try:
        text = pyrage.decrypt(data, identities).decode()
    except pyrage.DecryptError as error:
        if "No matching keys" in str(error):
            why = f"it was encrypted for none of the {len(identities)} keys in {ref.identity}"
        else:
            why = f"it is broken ({error}); write anew what reconciler secret encrypt prints"
        raise HostError(f"{where}: {why}", "SecretUnreadable") from None
    except UnicodeDecodeError:
        raise HostError(f"{where}: not text", "SecretUnreadable") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise HostError(f"{where}: it is empty", "SecretUnreadable")
    return Secret(text)


def _identities(key: str, ref: SecretRef) -> list[Any]:
    """The private keys of a file: those of age-keygen, one a line, or one of ssh-keygen.

    Raises HostError.
    """
    import pyrage

    try:
        if "PRIVATE KEY-----" in key:
            return [pyrage.ssh.Identity.from_buffer(f"{key}\n".encode())]
        lines = [line.strip() for line in key.splitlines()]
        written = [line for line in lines if line and not line.startswith("#")]
        found = [pyrage.x25519.Identity.from_str(line) for line in written]
    except pyrage.IdentityError:
        found = []
    if not found:
        raise HostError(
            f"cannot use the key in {ref}: it is no line AGE-SECRET-KEY-1… as age-keygen writes, "
            "and no private key of ssh-keygen without a passphrase (ed25519 or rsa)",
            "SecretUnreadable",
        )
    return found
