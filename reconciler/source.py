"""The watched directory: read again where it moved, judged, and what follows from it.

Used by one thread. A file is read again only if its signature moved, and parsed again only if its
text did. See core/source.py for what a reading means.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from reconciler.core import joined, source, spec_files
from reconciler.core.declared import Found as Said
from reconciler.core.declared import Specs, join
from reconciler.core.desired import Desired, Vm, build
from reconciler.core.document import Document, parse
from reconciler.core.errors import Diagnostic, HostError
from reconciler.core.inventory import Inventory
from reconciler.core.joined import Joined, Moved, Taken
from reconciler.core.ledger import Declaration, Ledger
from reconciler.core.runs import newest
from reconciler.core.settings import SecretRef, Settings
from reconciler.core.source import Decision, Found, Revision, decide, settled
from reconciler.core.tunnel import PREFIX
from reconciler.core.tunnel_spec import dumped
from reconciler.core.units import Seconds
from reconciler.host import files, git
from reconciler.host.files import Listing, Signature, Text
from reconciler.host.git import Commit, Mirror
from reconciler.host.store import Event, Store
from reconciler.inventories import Answer, Reader, reader_of
from reconciler.library import YOUNG, Beside, Library, digest_of

TRIES: Final = 5
"""Readings of one `read`, while files move under it; then it is not a clean one."""

Describe = Callable[[str], Commit | None]
"""What Git knows of a directory's content."""


@dataclass(slots=True)
class _File:
    """One file as it was read last."""

    signature: Signature
    read: int
    """When; in ns since the epoch."""
    digest: str
    """Of its text, or of why it has none."""
    found: Said
    wrong: Sequence[Diagnostic]
    """Why it has no more to say; empty: it could be parsed."""
    vms: Mapping[str, str]
    """VM → digest of what is written of it here."""
    beside: Beside | None = None
    """What lies around it, and was asked."""
    line: bytes = b""
    """What the digest of the directory is made of; empty: not made yet."""

    def stale(self, signature: Signature) -> bool:
        """Whether it may have another content by now."""
        return signature != self.signature or max(self.signature[3:]) > self.read - YOUNG

    @property
    def moved(self) -> bool:
        """Whether it may mean something else by now, though it is the same."""
        return self.beside is not None and not self.beside.holds()


Parsed = Callable[[Text], tuple[Said, Sequence[Diagnostic], Beside | None]]


class _Shelf:
    """The files of one directory, each read when it moved."""

    def __init__(self, parsed: Parsed, root: str = "") -> None:
        """`root`: the directory that was named."""
        self._parsed = parsed
        self.root = root
        self.files: dict[str, _File] = {}
        """In reading order."""
        self.unread: Mapping[str, str] = {}
        self.young: set[str] = set()
        """Files that were written so shortly before they were read that nobody can tell whether
        that was all."""
        self.moved = False
        """Whether anything is not as it was, since it was asked last."""

    def refresh(self, listing: Listing) -> bool:
        """Read what moved; whether anything was read."""
        before, self.files = self.files, {}
        read = False
        for path, signature in _once(listing.files):
            known = before.get(path)
            if known is None or known.stale(signature) or known.moved:
                known, read = self._read(path, signature, known), True
            self.files[path] = known
        if list(before) != list(self.files) or self.unread != listing.unread:
            self.moved = True
        self.unread = listing.unread
        return read

    def refresh_some(self, listing: Listing, paths: Collection[str]) -> dict[str, _File | None]:
        """The same where nothing but some paths can have moved; path → the file as it was, of those
        that say something else now."""
        before: dict[str, _File | None] = {}
        files: dict[str, _File | None] = {**self.files}
        if listing.files.keys() != files.keys():
            files = {path: self.files.get(path) for path in listing.files}
        for path in self.files.keys() - files.keys():
            before[path] = self.files[path]
            self.young.discard(path)
        for path in paths:
            signature = listing.files.get(path)
            if signature is None:
                continue
            known = files[path]
            if known is None or known.stale(signature):
                files[path] = now = self._read(path, signature, known)
                if known is None or now.found is not known.found:
                    before[path] = known
        self.files = {path: file for path, file in files.items() if file}
        self.moved |= bool(before)
        return before

    def _read(self, path: str, signature: Signature, known: _File | None) -> _File:
        at, text = time.time_ns(), files.read(path, pipe=False)  # nobody may ever write into one
        text, digest = replace(text, root=self.root), digest_of(text)
        young = max(signature[3:]) > at - YOUNG
        self.young.add(path) if young else self.young.discard(path)
        if known and known.digest == digest and not known.moved:
            self.moved |= known.signature != signature
            return _File(signature, at, digest, known.found, known.wrong, known.vms, known.beside)
        self.moved = True
        found, wrong, beside = self._parsed(text)
        return _File(signature, at, digest, found, wrong, _digests(found), beside)


def _once(listed: Mapping[str, Signature]) -> Iterator[tuple[str, Signature]]:
    """Each file under one name, as where they are named on a command line."""
    seen: dict[tuple[int, int], str] = {}
    for path, signature in listed.items():
        other = seen.setdefault(signature[:2], path)
        if other == path or os.path.realpath(other) != os.path.realpath(path):
            yield path, signature


def _json(value: Struct) -> str:
    text: str = msgspec.json.encode(value).decode()
    return text


def _digests(found: Said) -> Mapping[str, str]:
    said = {one.spec.name: _json(one.spec) for one in found.vms}
    said |= {one.subject: dumped(one) for one in found.tunnels}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in said.items()}


class Reading(Struct, frozen=True, kw_only=True):
    """What one reading came to."""

    revision: Revision
    specs: Specs
    answer: Answer
    """What the inventory says."""
    reader: Reader
    settings: Settings
    decision: Decision
    digests: Mapping[str, str]
    changed: bool
    """Whether anything else is desired of any VM than at the reading before."""
    before: Mapping[str, Any]
    """What was remembered of the reading before."""

    @property
    def inventory(self) -> Inventory | None:
        """What is known of all disks, as far as that could be read."""
        return self.answer.inventory

    @property
    def vms(self) -> Collection[str]:
        """Every VM that there is something to say about: those that are declared or asked for,
        those that stay as they were, and those that are to go."""
        return self.digests.keys()

    @property
    def again(self) -> Seconds | None:
        """When to read again although nothing happens; None: at the next resync."""
        return self.decision.again

    @property
    def diagnostics(self) -> Sequence[Diagnostic]:
        """All that is wrong with the files."""
        return self.specs.diagnostics

    @property
    def source(self) -> Mapping[str, Any]:
        """What is remembered of it, for `status`."""
        return self.decision.source

    @property
    def declarations(self) -> Sequence[Declaration]:
        return self.decision.declared

    @property
    def forget(self) -> Sequence[str]:
        return self.decision.forget

    def desired(self, ledger: Ledger) -> Desired:
        """What should be true of every VM, given what is remembered now."""
        return settled(self._built(self.specs, ledger), self.decision, ledger, self._outdated)

    def vm(self, name: str, ledger: Ledger) -> Desired:
        """The same of one VM alone; cheap, however many others there are."""
        one = {name}
        decision = replace(
            self.decision,
            holds={n: held for n, held in self.decision.holds.items() if n == name}
            if name in self.decision.holds
            else {},
            removed=self.decision.removed & one,
            leaving=self.decision.leaving & one,
        )
        built = self._built(self.specs.only(one), ledger)
        return settled(built, decision, ledger, self._outdated).only(one)

    def digest_of(self, name: str) -> str:
        """Another one where something else is desired of a VM. Empty: nothing is."""
        return self.digests.get(name, "")

    def version_of(self, name: str) -> object:
        """Another one where a VM is to be worked out anew: also where it is written elsewhere."""
        return self.digest_of(name), self.specs.written(name), self.specs.unread

    def note(self, store: Store, who: str, now: Seconds) -> bool:
        """Write down what is to be remembered, if that is not known; whether it was not."""
        with contextlib.suppress(HostError):  # it is for a time when something else is broken too
            self.reader.remember()
        before = {k: v for k, v in self.before.items() if k != "approved"}
        decision = self.decision
        if decision.source == before and not decision.declared and not decision.forget:
            return False
        store.declare(decision.source, decision.declared, decision.forget)
        events = list(_events(before, decision.source))
        if events:
            store.record(events, who, now)
        return True

    def _outdated(self, vm: Vm) -> str:
        known = self.answer.inventory
        return known.unlike(vm) if known else ""

    def _built(self, specs: Specs, ledger: Ledger) -> Desired:
        return build(specs, self.answer.inventory, self.settings, ledger)


class Source:
    """A directory of specs, what `backup` asked for beside it, and the inventory."""

    def __init__(
        self,
        directory: str,
        settings: Settings,
        *,
        describe: Describe = git.describe,
        fetcher: Fetcher | None = None,
        allow_empty: bool = False,
        environment: Mapping[str, str] | None = None,
        extra: Sequence[Text] = (),
    ) -> None:
        """`directory` may be a symlink, and need not be there.

        `allow_empty`: that it holds no spec is meant so, until it holds one. `environment`: what
        specs may look into, as far as the config lets them. `extra`: variables over all others.
        """
        self.directory = directory
        self.settings = settings
        self.describe = describe
        self.fetcher = fetcher
        self.allow_empty = allow_empty
        self.parsed = 0
        """Files that were parsed so far."""
        self._library = Library(settings.specs, environment or {}, extra=extra)
        self._reader = reader_of(settings, environment)
        self._answer = Answer()
        self._specs = _Shelf(self._parse, directory)
        self._requests = _Shelf(self._parse_request)
        self._commit: Commit | None = None
        self._listing = Listing({}, ())
        self._began = 0.0
        """When the reading began; monotonic."""
        self._last: Joined | None = None
        self._places: Mapping[str, str] = {}
        """Folder, without symlinks → as it is named."""
        self._digests: Mapping[str, str] = {}

    def watched(self) -> list[str]:
        """What a watch has to be armed with now; then comes `read`, after which it may be more."""
        listing = self._listing if self._last else files.listing(self.directory)
        inventory = [self.settings.inventory] if self.settings.inventory else []
        beside = [path for path in self._library.paths if path not in listing.folders]
        return [*listing.folders, *listing.links, self.settings.requests, *inventory, *beside]

    def read(self, ledger: Ledger, now: Seconds, paths: Collection[str] | None = None) -> Reading:
        """Read what moved, and judge it. Whatever is wrong with the files is in the reading.

        `paths`: the only files that were written, made or removed since; None: anything may have
        moved.
        """
        before, last, self._began = self._answer, self._last, time.monotonic()
        step = self._refresh_some(paths, ledger) if paths is not None and last else None
        still = step is not None or self._refresh()
        moved = any(shelf.moved for shelf in self._shelves) or self._answer != before
        if step:
            last = self._last = step
        elif moved or last is None or last.errors or not still:
            last = self._last = self._join(ledger)
        if moved or (self._commit and self._commit.dirty):
            # A commit ends after its files are written: then nothing tells that it is complete.
            revision = self._revision(last.found.revision.digest)
            last = self._last = replace(last, found=replace(last.found, revision=revision))
        for shelf in self._shelves:
            shelf.moved = False
        decision = decide(replace(last.found, settled=still), ledger, self.settings.loop, now)
        told = {**decision.source, **self._fetching()}
        if last.specs.tunnels or ledger.tunnels:
            told["tunnels"] = sorted({one.spec.name for one in last.specs.tunnels})
        if self._answer.inventory:
            told["inventory"] = self._answer.inventory.to_source()
        decision = replace(decision, source=told)
        vms = (*last.digests, *decision.holds, *decision.removed, *decision.leaving)
        stale = " stale" if self._answer.error else ""
        digests = last.digests
        if stale or len(vms) > len(digests):
            digests = {name: _digest_of(name, decision, last.digests) + stale for name in vms}
        changed, self._digests = digests != self._digests, digests
        return Reading(
            revision=last.found.revision,
            specs=last.specs,
            answer=self._answer,
            reader=self._reader,
            settings=self.settings,
            decision=decision,
            digests=digests,
            changed=changed,
            before=ledger.source,
        )

    @property
    def _shelves(self) -> Sequence[_Shelf]:
        return self._specs, self._requests

    def _refresh(self) -> bool:
        """Read what moved until nothing moves any more; whether it came to that."""
        for _ in range(TRIES):
            self._listing = listing = files.listing(self.directory)
            self._places = {os.path.realpath(folder): folder for folder in listing.folders}
            answer = self._reader.read(since=self._began)
            read, self._answer = answer != self._answer, answer
            known = answer.inventory
            self._library.refresh()
            self._library.inventory = known if known and known.readable else None
            self._library.specs = listing.files.keys()
            read |= self._specs.refresh(listing)
            read |= self._requests.refresh(_requested(self.settings.requests))
            if not read or files.listing(self.directory) == listing:
                return True
        return False

    def _refresh_some(self, paths: Collection[str], ledger: Ledger) -> Joined | None:
        """Read these files; what all say by now. None: that takes a look at all of them."""
        last, shelf, answer = self._last, self._specs, self._answer
        if last is None or not last.plain or self._requests.moved or self._requests.young:
            return None
        if self._library.named or self._reader.read(since=self._began) != answer:
            return None
        for _ in range(TRIES):
            found = self._found(paths)
            if found is None:
                return None
            listing = self._listing.moved(found)
            self._library.specs, self._listing = listing.files.keys(), listing
            before = shelf.refresh_some(listing, {*found, *shelf.young})
            if self._found(paths) == found:
                break
            if before:
                return None  # it goes on; `shelf.moved` is true by now
        else:
            return None
        if not before:
            return last
        here = {path: now for path in before if (now := shelf.files.get(path))}
        moved = [
            Moved(
                self._name(path),
                was.found if was else None,
                here[path].found if path in here else None,
            )
            for path, was in before.items()
        ]
        said = (file.found for file in shelf.files.values())
        step = joined.step(last, moved, said, answer.inventory, self.settings, ledger)
        if step is None:
            return None
        own = {name: digest for file in here.values() for name, digest in file.vms.items()}
        digests = dict(last.digests)
        for name in last.found.named.keys() - step.found.named.keys():
            digests.pop(name, None)
        digests |= self._of_vms(step.specs.only(own.keys()), own.keys(), own)
        revision = replace(step.found.revision, digest=self._digest())
        return replace(step, found=replace(step.found, revision=revision), digests=digests)

    def _found(self, paths: Iterable[str]) -> dict[str, Signature | None] | None:
        """The plain spec files at some paths as they are now, named as the listing does. None: not
        all of them are that."""
        if self._listing.links or self._listing.unread:
            return None
        found: dict[str, Signature | None] = {}
        for path in paths:
            directory, name = os.path.split(path)
            folder = self._places.get(directory)
            if folder is None or not name.endswith(files.SUFFIXES):
                return None
            place = os.path.join(folder, name)
            if not files.BESIDE.isdisjoint(self._name(place).split("/")[:-1]):
                return None
            try:
                seen = os.lstat(place)
            except FileNotFoundError:
                found[place] = None
                continue
            except OSError:
                return None
            if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
                return None
            found[place] = files.signature(place)
        return found

    def _parse(self, text: Text) -> tuple[Said, Sequence[Diagnostic], Beside | None]:
        document, wrong = self._document(text)
        if document is None:
            return Said(text.file, lost=True), wrong, None
        beside = self._library.around(text)
        return spec_files.read_file(document, beside), [], beside

    def _parse_request(self, text: Text) -> tuple[Said, Sequence[Diagnostic], None]:
        document, wrong = self._document(text)
        if document is None:
            return Said(text.file, lost=True), wrong, None
        return spec_files.read_request(document), [], None

    def _document(self, text: Text) -> tuple[Document | None, Sequence[Diagnostic]]:
        if text.error:
            return None, [Diagnostic("error", text.error)]
        self.parsed += 1
        return parse(text.text, text.file)

    # -- what all files say together

    def _join(self, ledger: Ledger) -> Joined:
        wrong = [
            one for shelf in self._shelves for file in shelf.files.values() for one in file.wrong
        ]
        wrong += self._answer.diagnostics
        unread = {**self._listing.unread, **self._requests.unread}
        wrong += [Diagnostic("error", why) for why in unread.values()]
        specs = join(
            [file.found for file in (*self._specs.files.values(), *self._requests.files.values())]
        )
        trouble = self._trouble(ledger)
        lost = {*unread, *([self.directory] if trouble else ())}
        specs = replace(specs, diagnostics=(*wrong, *specs.diagnostics), unread=specs.unread | lost)
        known = self._last.found.revision if self._last else Revision()
        built = build(specs, self._answer.inventory, self.settings, ledger)
        errors = source.errors(built.diagnostics, {*built.vms, *built.tunnels})
        found = Found(
            directory=os.path.abspath(self.directory),
            revision=replace(known, digest=self._digest()),
            named=dict(self._named()),
            unread=dict(self._unread()),
            errors=errors,
            identities=source.identities(built),
            trouble=trouble,
        )
        vms = tuple(dict.fromkeys((*found.named, *built.vms, *built.tunnels, *errors)))
        own = {n: d for file in self._specs.files.values() for n, d in file.vms.items()}
        return Joined(
            specs=specs,
            found=found,
            errors=errors,
            digests=self._of_vms(specs, vms, own),
            taken=Taken(built.vms.values()),
            plain=joined.is_plain(specs, found, built),
        )

    def _trouble(self, ledger: Ledger) -> str:
        """Why the directory as a whole is not believed; empty: it is."""
        why = self._listing.unread.get(self.directory)
        if why:
            return why
        if self._specs.files or self._listing.unread:
            self.allow_empty = False
            return ""
        if self.allow_empty or not ledger.declared:
            return ""
        return (
            f"cannot believe that {self.directory} is empty: no *.yaml or *.yml is there, and it "
            f"declared {len(ledger.declared)} VMs; if that is meant: watch --allow-empty"
        )

    def _unread(self) -> Iterator[tuple[str, str]]:
        """File or folder, as it is named below the directory → why it is not wholly read."""
        for path, why in (*self._listing.unread.items(), *self._requests.unread.items()):
            yield f"{self._name(path)}/", why
        for shelf in (self._specs, self._requests):
            for path, file in shelf.files.items():
                wrong = [*file.wrong, *file.found.diagnostics]
                if file.found.lost and wrong:
                    yield self._name(path), source.told(wrong[0])

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self.directory.rstrip('/')}/")

    def _named(self) -> Iterator[tuple[str, str]]:
        """VM → the file of the directory that declares it, or asks for its run if none does."""
        for path, file in self._specs.files.items():
            for one in file.found.runs:
                yield one.spec.vm, self._name(path)
        for path, file in self._specs.files.items():
            for name in (*(one.spec.name for one in file.found.vms), *file.found.refused):
                if not name.startswith(PREFIX):  # what stays of those is judged by no number
                    yield name, self._name(path)

    def _digest(self) -> str:
        whole = hashlib.sha256()
        for path, file in self._specs.files.items():
            if not file.line:
                file.line = f"{self._name(path)}\0{file.digest}\n".encode(errors="replace")
        whole.update(b"".join(file.line for file in self._specs.files.values()))
        for name, digest in sorted(self._library.digests().items()):
            whole.update(f"{self._name(name)}\0{digest}\n".encode(errors="replace"))
        return whole.hexdigest()

    def _revision(self, digest: str) -> Revision:
        self._commit = found = self.describe(self.directory)
        if found is None:
            return Revision(digest=digest)
        return Revision(
            digest=digest,
            commit=found.commit,
            author=found.author,
            subject=found.subject,
            dirty=found.dirty,
        )

    def _of_vms(
        self, specs: Specs, vms: Iterable[str], own: Mapping[str, str]
    ) -> Mapping[str, str]:
        """VM → digest of all that is written about it. `own`: of their declarations."""
        asked = newest(specs.runs)
        inventory = self._answer.inventory
        known = inventory.vms if inventory else {}
        unusable = inventory.unusable if inventory else {}
        return {
            name: " ".join(
                (
                    own.get(name, ""),
                    _json(asked[name].spec) if name in asked else "",
                    _json(known[name]) if name in known else unusable.get(name, ""),
                )
            )
            for name in vms
        }

    def _fetching(self) -> Mapping[str, Any]:
        return {"fetch": self.fetcher.to_json()} if self.fetcher else {}


def _digest_of(name: str, decision: Decision, written: Mapping[str, str]) -> str:
    if name in decision.removed:
        return "removed"
    held = decision.holds.get(name)
    if held:
        return f"held: {held.reason}"
    return "leaving" if name in decision.leaving else written.get(name, "")


def _requested(directory: str) -> Listing:
    """What is in the directory of requests, which need not be there."""
    found = files.listing(directory)
    if directory in found.unread and not os.path.lexists(directory):
        return Listing({}, ())
    return found


def _events(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Event]:
    """What to tell of a reading that is not as the one before."""
    revision = Revision.from_json(after["revision"])
    if after["revision"] != before.get("revision"):
        by = f" by {revision.author}: {revision.subject}" if revision.commit else ""
        dirty = ", changed since" if revision.dirty else ""
        yield Event(vm="", reason="RevisionRead", message=f"revision {revision.name}{by}{dirty}")
    if after["unread"] and after["unread"] != before.get("unread"):
        for file, why in list(after["unread"].items())[:10]:
            reason = "SourceUnreadable" if file else "EmptySource"
            yield Event(vm="", severity="Warning", reason=reason, message=why)
    elif before.get("unread") and not after["unread"]:
        yield Event(vm="", reason="SourceReadable", message="all of it can be read again")
    inventory, was = after.get("inventory") or {}, before.get("inventory") or {}
    if inventory.get("error") and inventory["error"] != was.get("error"):
        text = f"cannot read the inventory {inventory['origin']}: {inventory['error']}"
        yield Event(vm="", severity="Warning", reason="InventoryStale", message=text)
    elif was.get("error") and not inventory.get("error"):
        yield Event(vm="", reason="InventoryRead", message="the inventory can be read again")
    waiting = after["waiting"]
    if waiting and waiting != before.get("waiting"):
        many = len(waiting["vms"])
        text = (
            f"revision {waiting['name']} takes away {many} VMs, more than {waiting['limit']}; "
            f"nothing is removed: reconciler approve {waiting['name']}"
        )
        yield Event(vm="", severity="Warning", reason="TooMany", message=text)
    gone = set(after["removed"].get("vms", ())) - set((before.get("removed") or {}).get("vms", ()))
    for name in sorted(gone):
        yield Event(vm=name, reason="Pruned", message=f"{source.NO_SPEC}: {revision.name}")


def mirror_of(
    settings: Settings, environment: Mapping[str, str], url: str = "", branch: str = ""
) -> Mirror | None:
    """The remote branch that is to be watched; None: none is named. Raises HostError.

    `url` and `branch` go before those of the config.
    """
    own = settings.git
    url, branch = url or own.url, branch or own.branch
    if not url:
        return None
    if own.token and not url.startswith("https://"):
        raise HostError(
            f"cannot fetch {url}: `git.token` is for an https URL; ssh has `key`", "Git"
        )
    return Mirror(
        url=url,
        branch=branch,
        into=settings.checkouts,
        key=_key_file(own.key, environment) if own.key else None,
        token=partial(files.secret, own.token, environment) if own.token else None,
        signers=own.allowed_signers,
    )


def _key_file(key: SecretRef, environment: Mapping[str, str]) -> str:
    if key.kind == "file":
        return key.name
    directory = environment.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise HostError(
            f"cannot read the credential {key.name}: not started by systemd with LoadCredential=",
            "SecretUnreadable",
        )
    return os.path.join(directory, key.name)


class Fetcher:
    """Fetches a mirror every interval in a thread of its own, and kicks when `current` moved."""

    def __init__(self, mirror: Mirror, interval: Seconds, kick: Callable[[], None]) -> None:
        """`interval`: from the end of one fetch to the beginning of the next."""
        self.mirror = mirror
        self.interval = interval
        self.kick = kick
        self.last_success: Seconds = 0.0
        """When a fetch was done last; 0: none was."""
        self.error = ""
        """Why the last fetch was not done; empty: it was."""
        self.since: Seconds = 0.0
        """Since when none is done."""
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it, and a fetch that is under way."""
        self._stopping.set()
        self._hurry.set()
        self.mirror.stop()
        if self._thread.is_alive():
            self._thread.join(10)

    def now(self) -> None:
        """Fetch at once."""
        self._hurry.set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def to_json(self) -> dict[str, Any]:
        """What `status` tells of it."""
        mirror = self.mirror
        found = {"url": mirror.url, "branch": mirror.branch}
        return {**found, "fetch_error": self.error, "fetch_since": self.since}

    def fetch(self) -> bool:
        """Fetch once; whether there is something new to be read or told."""
        before, was = self._target(), self.error
        try:
            self.mirror.fetch()
        except HostError as error:
            self.since = self.since or time.time()
            self.error = str(error)
        else:
            self.error, self.since, self.last_success = "", 0.0, time.time()
        return self._target() != before or self.error != was

    def _target(self) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(self.mirror.current)
        return ""

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._hurry.clear()
            if self.fetch() and not self._stopping.is_set():
                self.kick()
            self._hurry.wait(self.interval)
