"""qemu-nbd servers that the ledger does not know: what they serve, as a spec; why they are left.

Whatever is not known is left empty in the spec, with a TODO, so that `validate` refuses it: nothing
is made up.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field

from reconciler.core.actual import Identity, Image
from reconciler.core.declared import EXPORT, MAX_NAME, NAME
from reconciler.core.mark import Mark
from reconciler.core.settings import Settings
from reconciler.core.units import Bytes, Endpoint, natural

if TYPE_CHECKING:
    from reconciler.core.inventory import Inventory

FORMAT_VERSION: Final = "1.0"
"""Of the JSON document; more may be added to it."""

# -- an argv

_VALUED: Final = {
    "b": "bind", "p": "port", "k": "socket", "o": "offset", "f": "format", "e": "shared",
    "x": "export-name", "D": "description", "c": "connect", "l": "load-snapshot", "B": "bitmap",
    "T": "trace", "": "cache aio discard detect-zeroes object tls-creds tls-authz tls-hostname "
    "pid-file selinux-label",
}  # fmt: skip
_FLAGS: Final = {
    "r": "read-only", "t": "persistent", "s": "snapshot", "n": "nocache", "v": "verbose",
    "L": "list", "d": "disconnect", "A": "allocation-depth", "h": "help", "V": "version",
    "": "fork image-opts",
}  # fmt: skip
"""Source: qemu-nbd(8) and the option table of qemu-nbd.c, 7.2."""
_LONG_VALUED: Final = frozenset(" ".join(_VALUED.values()).split())
_LONG: Final = _LONG_VALUED | frozenset(" ".join(_FLAGS.values()).split())


class Options(Struct, frozen=True, kw_only=True):
    """What the argv of a qemu-nbd says."""

    values: Mapping[str, str] = field(default_factory=dict)
    """Long name → value; empty of a flag."""
    image: str = ""

    @property
    def shared(self) -> int:
        """Clients at once; 0: any number."""
        text = self.values.get("shared", "1")
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 1

    @property
    def read_only(self) -> bool:
        return "read-only" in self.values

    @property
    def persistent(self) -> bool:
        return "persistent" in self.values

    @property
    def export(self) -> str:
        return self.values.get("export-name", "")


def options(line: Sequence[str]) -> Options:
    """The options of an argv as getopt_long(3) reads them: short ones may be run together, long
    ones cut short where that is not ambiguous."""
    values: dict[str, str] = {}
    image = ""
    words = list(line[1:])
    while words:
        word = words.pop(0)
        if word == "--":
            image = words[-1] if words else image
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = _whole(name)
            if name in _LONG_VALUED and not equals:
                value = words.pop(0) if words else ""
            values[name] = value
        elif word.startswith("-") and len(word) > 1:
            _short(word[1:], words, values)
        else:
            image = word
    return Options(values=values, image=image)


def _whole(name: str) -> str:
    found = [one for one in _LONG if one.startswith(name)]
    return found[0] if len(found) == 1 and name not in _LONG else name


def _short(letters: str, words: list[str], values: dict[str, str]) -> None:
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter in _VALUED and letter:
            values[_VALUED[letter]] = letters or (words.pop(0) if words else "")
            return
        values[_FLAGS.get(letter, letter)] = ""


def shown(line: Sequence[str]) -> str:
    """An argv for people: one line, and nothing in it that may be a secret."""
    words = []
    secret = False
    for word in line:
        name = word.partition("=")[0]
        if secret:
            words.append("…")
        elif name == "--object" and name != word:
            words.append("--object=…")
        else:
            words.append(shlex.quote(re.sub(r"//[^/@\s]*@", "//…@", printable(word))))
        secret = word == "--object"
    return " ".join(words)


def printable(text: str) -> str:
    """What a terminal would obey, and what no file can hold, in letters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# -- what was seen


class Seen(Struct, frozen=True, kw_only=True):
    """A qemu-nbd, and all that an onlooker can tell of it."""

    identity: Identity
    argv: tuple[str, ...]
    mark: Mark | None = None
    listeners: tuple[Endpoint, ...] = ()
    """Where it listens by TCP."""
    visible: bool = True
    """Its descriptors are ours to see; if not, the listeners are what its argv says."""
    clients: int = 0
    path: str = ""
    """Its image, absolute; empty: it is not known."""
    image: Image | None = None
    """What is in the file's header."""
    size: Bytes | None = None
    source: str = ""
    """What tells the size."""
    leased: bool = False
    """The ledger has its port, so it is no stranger."""

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def options(self) -> Options:
        return options(self.argv)


class Place(Struct, frozen=True):
    """Which disk of which VM a server is of, as far as names tell."""

    vm: str
    key: int | None
    """VMware's disk key; None: no name tells it."""
    position: int | None
    by: str
    """What tells."""


_DISK: Final = re.compile(r"(?P<vm>.*?)[-_.]?disk(?P<n>[0-9]{1,9})")
_FOLDER: Final = re.compile(r"(?:disk[-_]?)?(?P<n>[0-9]{1,9})")
KEYS: Final = 1000
"""A number below is an index: VMware's keys of disks begin at 2000. In the field: 2000, 16000."""


def place(one: Seen) -> Place:
    """`/r/ctx-1/2000/x.qcow2`, `/r/ctx-1/disk-2000/x.qcow2`, `ctx-1-disk0`; a mark says it all."""
    export = one.options.export
    named = _DISK.fullmatch(export)
    if one.mark:
        position = int(named["n"]) if named else None
        return Place(one.mark.vm, one.mark.disk, position, "its mark")
    parts = posixpath.dirname(one.path).strip("/").split("/")
    folder = _FOLDER.fullmatch(parts[-1]) if len(parts) > 1 else None
    key = int(folder["n"]) if folder and int(folder["n"]) >= KEYS else None
    position = int(named["n"]) if named else None
    above = parts[-2] if folder else ""
    if _is_name(above):
        return Place(above, key, position, "its path")
    if named and _is_name(named["vm"]):
        return Place(named["vm"], key, position, "its export name")
    stem = posixpath.splitext(posixpath.basename(one.path))[0]
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem).strip("-.")
    return Place(stem[:MAX_NAME] if _is_name(stem[:MAX_NAME]) else "unnamed", key, position,
                 "its image's name")  # fmt: skip


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and NAME.fullmatch(text) is not None


# -- why it is, and stays, somebody else's


def reasons(one: Seen, settings: Settings) -> list[str]:
    """Why a server cannot be taken over; empty: it carries our mark, and `apply` adopts it."""
    if one.mark and one.mark.hub == settings.hub:
        return []
    if one.mark:
        return [f"it carries the mark of hub {one.mark.hub}, and this is hub {settings.hub}"]
    found = ["it carries no mark, and a running server cannot be given one"]
    found += _unsafe(one, settings)
    return found


def _unsafe(one: Seen, settings: Settings) -> Iterator[str]:
    """What it does not promise that a server of ours does."""
    said = one.options
    if not said.read_only:
        yield (
            "it is writable: what a client was told is written may not be on the disk, and only "
            "who started it knows of which run it is, and whether its writer comes back"
        )
    if one.clients:
        many = "clients are" if one.clients > 1 else "client is"
        yield f"{one.clients} {many} connected"
    if not one.listeners:
        way = next((w for w in ("socket", "connect") if w in said.values), "")
        yield f"it listens on no TCP port{f' (--{way})' if way else ''}"
    for listener in one.listeners:
        if not listener.loopback and listener.host != settings.bind:
            yield f"it listens on {listener}, where others than this machine may reach it"
        elif listener.port not in settings.ports:
            yield f"port {listener.port} is not in the range {settings.ports}"
    if not said.persistent:
        yield "it ends with its first client (no --persistent)"
    if said.shared == 1:
        yield "--shared 1: a second connection waits for ever, and two per disk are the norm"
    if "format" not in said.values:
        yield "its --format is not stated, so it is guessed from what is in the image"
    yield from _unfit(one, settings)
    if not EXPORT.fullmatch(said.export):
        name = printable(said.export)[:80]
        yield f"its export name {name!r} is none that an appliance can be told (…disk<N>)"


def _unfit(one: Seen, settings: Settings) -> Iterator[str]:
    """What is wrong with its image, in our eyes."""
    image = one.image
    if not one.path:
        yield "which file it serves is not known"
        return
    if image is None or image.error:
        yield f"its image cannot be looked at{f': {image.error}' if image else ''}"
    elif not image.exists:
        yield f"no file is at {printable(one.path)} any more"
    elif image.format != "qcow2":
        yield f"its image is {image.format or 'of no known format'}, not qcow2"
    if settings.repository_of(one.path) is None:
        yield f"its image is in no repository of the config: {printable(one.path)}"


def usable(one: Seen, settings: Settings) -> bool:
    """Its image can be served by us as it is, read-only."""
    image = one.image
    return bool(
        one.options.read_only
        and image
        and image.exists
        and not image.error
        and image.format == "qcow2"
        and settings.repository_of(one.path)
    )


def advice(one: Seen, settings: Settings) -> str:
    """What to do instead of taking it over."""
    at = place(one)
    if one.mark and one.mark.hub == settings.hub:
        return "reconciler import --adopt, or apply its spec"
    if one.mark:
        hub = one.mark.hub
        return f"if this hub was {hub} before, write `hub: {hub}`; else leave it to that hub"
    if usable(one, settings):
        return (
            "apply its spec: the image is then served beside it, read-only, on a port of ours; "
            f"when its clients have moved, stop pid {one.pid} where it was started"
        )
    if one.options.read_only:
        return f"move its image into a repository as qcow2, or leave pid {one.pid} as it is"
    return (
        "let who started it end its run and stop it; then: "
        f"reconciler backup {at.vm} --run NAME --apply"
    )


# -- the spec


def spec_text(
    seen: Sequence[Seen], settings: Settings, inventory: Inventory | None, made: str
) -> str:
    """A spec file that describes the servers. `made`: by whom and when, for its first line."""
    lines = [
        f"# {made}",
        "# What qemu-nbd servers that this hub does not know serve. Where something is not known",
        "# it is left empty, with a TODO, and `reconciler validate` refuses it.",
        "vms:",
    ]
    blocks = [_block(name, group, settings, inventory) for name, group in _grouped(seen)]
    if not blocks:
        lines[-1] = "vms: []"
    for block in blocks:
        lines += block
    return "\n".join(lines) + "\n"


def _grouped(seen: Sequence[Seen]) -> list[tuple[str, list[Seen]]]:
    """The servers by VM; those that read and those that write apart, and ours from others'."""
    groups: dict[tuple[str, bool, bool, str], list[Seen]] = defaultdict(list)
    for one in seen:
        run = f"{one.mark.run}/{one.mark.attempt}" if one.mark else ""
        groups[place(one).vm, one.options.read_only, bool(one.mark), run].append(one)
    found = []
    for (vm, read_only, marked, _), group in groups.items():
        for index, part in enumerate([group] if marked else _parts(group)):
            suffix = "-restore" if read_only and not marked else ""
            suffix += f"-{index + 1}" if index else ""
            name = f"{vm[: MAX_NAME - len(suffix)]}{suffix}"
            found.append((name, sorted(part, key=_order)))
    return sorted(found, key=lambda item: natural(item[0]))


def _parts(group: Sequence[Seen]) -> list[list[Seen]]:
    """No disk twice in one: of two restores of a VM, each is one. The files of one have one name,
    or lie in one place."""
    parts: list[list[Seen]] = []
    for one in sorted(group, key=_order):
        fits = [part for part in parts if not any(_same_disk(one, other) for other in part)]
        akin = [part for part in fits if any(_family(one) == _family(other) for other in part)]
        if akin or fits:
            (akin or fits)[0].append(one)
        else:
            parts.append([one])
    return parts


def _same_disk(one: Seen, other: Seen) -> bool:
    mine, theirs = place(one), place(other)
    if mine.key is not None and mine.key == theirs.key:
        return True
    return mine.position is not None and mine.position == theirs.position


def _family(one: Seen) -> tuple[str, str]:
    """The repository's directory and the name of its file, in `…/VM/DISK/NAME.qcow2`."""
    above = posixpath.dirname(posixpath.dirname(posixpath.dirname(one.path)))
    return above, posixpath.splitext(posixpath.basename(one.path))[0]


def _order(one: Seen) -> tuple[Any, ...]:
    at = place(one)
    return (
        at.position if at.position is not None else 1 << 30,
        at.key if at.key is not None else 1 << 30,
        natural(one.path),
        one.pid,
    )


def _block(
    name: str, group: Sequence[Seen], settings: Settings, inventory: Inventory | None
) -> list[str]:
    lines = [""]
    for one in group:
        lines += _comment(one)
    lines += [f"  - name: {_scalar(name)}", "    state: exported"]
    if group[0].options.read_only:
        return [*lines, *_restore(name, group, settings)]
    return [*lines, *_backup(name, group, settings, inventory)]


def _comment(one: Seen) -> list[str]:
    """What was seen of a server."""
    where = ", ".join(map(str, one.listeners)) or "no TCP port"
    where += "" if one.visible else " as its argv says (it is another user's)"
    clients = f"{one.clients} client{'s' if one.clients != 1 else ''}"
    size = f", {one.size} bytes by {one.source}" if one.size is not None else ""
    return [
        f"  # pid {one.pid} on {where}, {clients}{size}",
        f"  #   {shown(one.argv)}",
    ]


def _restore(name: str, group: Sequence[Seen], settings: Settings) -> list[str]:
    lines = ["    for: restore"]
    mark = group[0].mark
    if mark and mark.run != "restore":
        lines.append(f"    of: {{vm: , run: {mark.run}}}    # TODO: the VM whose run this is")
        return [*lines, *_repository(group, settings)]
    lines += [*_repository(group, settings), "    disks:"]
    for index, one in enumerate(group):
        inside, why = _inside(one, settings)
        lines += _disk(one)
        if one.size is not None and not one.size % 512:
            lines.append(f"        size: {one.size}")
        lines.append(f"        image: {_scalar(inside)}" if inside else f"        image:   {why}")
        lines += _export(name, "restore", index, one)
    return lines


def _disk(one: Seen) -> list[str]:
    key = place(one).key
    if key is not None:
        return [f"      - key: {key}"]
    return ["      - key:   # TODO: VMware's disk key; no name of it tells"]


def _export(name: str, run: str, index: int, one: Seen) -> list[str]:
    """Its export name, where a spec can keep it and it is not what would come by itself."""
    export = one.options.export
    if export == f"{name}-{run}-disk{index}":
        return []
    found = EXPORT.fullmatch(export)
    if found and int(found[1]) == index and (run == "restore" or run in export):
        return [f"        export: {export}"]
    said = printable(export)[:200] or "no name"
    return [f"        # it was served as {json.dumps(said)}, which cannot be kept"]


def _backup(
    name: str, group: Sequence[Seen], settings: Settings, inventory: Inventory | None
) -> list[str]:
    known = inventory.vms.get(name) if inventory else None
    mark = group[0].mark
    lines = _repository(group, settings)
    if known is None:
        lines.append("    vm:   # TODO: {path: /DC1/vm/NAME}, where it is in vCenter")
    if mark:
        incremental = any(one.image and one.image.backing for one in group)
        kind = ", type: incremental" if incremental else ""
        lines.append(f"    backup: {{run: {mark.run}{kind}}}")
    else:
        lines.append("    # No run is asked for. When its hub has ended the one above:")
        lines.append(f"    # reconciler backup {name} --run NAME")
    if known is not None and not mark:
        return [*lines, "    disks: inventory"]
    lines.append("    disks:")
    for index, one in enumerate(group):
        lines += _disk(one)
        if known is None:
            lines.append(_size(one))
        inside, _ = _inside(one, settings)
        usual = f"{name}/{place(one).key}/{mark.run}.qcow2" if mark else inside
        if mark and mark.attempt == 1:
            if inside and inside != usual:
                lines.append(f"        image: {_scalar(inside)}")
            lines += _export(name, mark.run, index, one)
    return lines


def _size(one: Seen) -> str:
    if one.size is not None and not one.size % 512:
        return f"        size: {one.size}"
    return "        size:   # TODO: the disk's size, like 40GiB"


def _repository(group: Sequence[Seen], settings: Settings) -> list[str]:
    """Which one, where it has to be said."""
    if len(settings.repositories) < 2:
        return []
    names = {settings.repository_of(one.path) for one in group} - {None}
    if len(names) == 1:
        return [f"    repository: {names.pop()}"]
    return ["    repository:   # TODO: its images are in more than one, or in none"]


def _inside(one: Seen, settings: Settings) -> tuple[str, str]:
    """Its image relative to its repository; or why there is none to write."""
    name = settings.repository_of(one.path)
    if name is None:
        where = printable(one.path) or "nobody knows where"
        return "", f"# TODO: it is in no repository, but {where}"
    return one.path.removeprefix(settings.repositories[name].rstrip("/") + "/"), ""


def _scalar(text: str) -> str:
    """Text in YAML, in quotes where it could be taken for something else."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*", text)
    words = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return text if plain and text.lower() not in words else json.dumps(text)


# -- the document


def document(
    seen: Sequence[Seen], settings: Settings, spec: str, adopted: Collection[int] = ()
) -> dict[str, Any]:
    """What `-o json` prints. `adopted`: the pids that were taken over."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": settings.hub,
        "servers": [_json(one, settings, adopted) for one in seen],
        "spec": spec,
    }


def _json(one: Seen, settings: Settings, adopted: Collection[int]) -> dict[str, Any]:
    at, said = place(one), one.options
    return {
        "pid": one.pid,
        "argv": shown(one.argv),
        "hub": one.mark.hub if one.mark else None,
        "vm": at.vm,
        "disk": None if at.key is None else str(at.key),
        "position": at.position,
        "told_by": at.by,
        "listeners": [{"address": e.host, "port": e.port} for e in one.listeners],
        "clients": one.clients,
        "export": printable(said.export),
        "read_only": said.read_only,
        "persistent": said.persistent,
        "shared": said.shared,
        "image": printable(one.path) or None,
        "repository": settings.repository_of(one.path),
        "format": one.image.format or None if one.image else None,
        "size": one.size,
        "adopted": one.pid in adopted,
        "why_not": reasons(one, settings),
        "next": advice(one, settings),
    }
