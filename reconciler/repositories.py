"""What the repositories hold: images, claims, intents, space; each root asked with a deadline."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from msgspec.structs import replace

from reconciler.core import space
from reconciler.core.actual import FileSystem, Identity, Image, Server
from reconciler.core.call import CallState
from reconciler.core.desired import Desired, Export, Vm
from reconciler.core.errors import HostError
from reconciler.core.ledger import Ledger
from reconciler.core.parents import layers
from reconciler.core.settings import Settings, below
from reconciler.host import images, patience, proc
from reconciler.host.images import Owner


@dataclass(slots=True)
class Found:
    """What one look at the repositories found; the fields are those of `Actual`."""

    images: dict[str, Image] = field(default_factory=dict)
    owners: dict[tuple[str, str], Owner] = field(default_factory=dict)
    intents: set[tuple[str, str, int]] = field(default_factory=set)
    tainted: set[tuple[str, str, int]] = field(default_factory=set)
    troubles: dict[str, str] = field(default_factory=dict)
    hangs: dict[str, str] = field(default_factory=dict)
    file_systems: dict[int, FileSystem] = field(default_factory=dict)
    others: dict[str, Image] = field(default_factory=dict)
    detached: set[Identity] = field(default_factory=set)
    """Servers that have another file open than the one at their image's path."""


Note = Callable[[Found], None]
"""An answer: what it adds to what was found. Done by who asked, not by the thread that may hang."""


@dataclass(slots=True)
class Question:
    """Something that one root is asked."""

    ask: Callable[[], Note]
    vms: set[str] = field(default_factory=set)
    """Those of which nothing is known without the answer; none, if they can do without it."""


def roots_of(settings: Settings, path: str) -> list[str]:
    """The roots that a file lies in; where none is configured (any more), its directory."""
    found = sorted({root for root in settings.repositories.values() if below(root, path)})
    return found or [posixpath.dirname(path)]


def look(settings: Settings, desired: Desired, ledger: Ledger, servers: Sequence[Server]) -> Found:
    """Everything that the VMs in scope need to know of their repositories.

    A root that does not answer in time makes every VM that needed its answers one that hangs; the
    others do not notice.
    """
    round_ = _Round(settings, desired, ledger, servers)
    round_.claims()
    round_.images()
    round_.holds()
    asked = {root: list(questions.values()) for root, questions in round_.questions.items()}
    answers, silent = patience.ask({root: [q.ask for q in qs] for root, qs in asked.items()})
    found = Found()
    for root in sorted(answers):
        for note in answers[root]:
            note(found)
    for root in sorted(silent):
        said = f"{patience.silence(root)} within {silent[root]:g} s"
        for question in asked[root][len(answers[root]) :]:
            for vm in question.vms:
                found.hangs[vm] = f"cannot look at the repository {root}: {said}"
    return found


class _Round:
    """The questions of one look, by root; those first without which a VM cannot be planned."""

    def __init__(
        self, settings: Settings, desired: Desired, ledger: Ledger, servers: Sequence[Server]
    ) -> None:
        self.settings, self.desired, self.ledger = settings, desired, ledger
        self.servers = servers
        self.served = {server.argv[-1] for server in servers}
        self.questions: dict[str, dict[object, Question]] = defaultdict(dict)
        self.paths: dict[str, images.Paths] = defaultdict(images.Paths)
        """Root → what its questions know of directories; its thread's own."""
        self.systems: dict[str, dict[int, FileSystem | None]] = defaultdict(dict)
        """Root → the file systems that its questions have come upon; its thread's own."""

    def claims(self) -> None:
        """The claim of every run that is wanted or served, and the intent of one that is due."""
        wanted: dict[tuple[str, str], set[str]] = defaultdict(set)
        for vm in self.desired.vms.values():
            if vm.exported and vm.purpose == "backup":
                wanted[vm.name, vm.run].add(vm.root)
        for server in self.servers:
            mark = server.mark
            if mark.vm in self.desired.vms and "--read-only" not in server.argv:
                wanted[mark.vm, mark.run].update(self.claimable(server.argv[-1]))
        for (vm_name, run), roots in wanted.items():
            call = self.ledger.latest(vm_name, run)
            due = call and call.state in (CallState.DUE, CallState.REJECTED)
            attempt = call.attempt if call and due else None
            served = {
                s.mark.attempt for s in self.servers if (s.mark.vm, s.mark.run) == (vm_name, run)
            }
            attempts = served | {call.attempt if call else 1}
            for root in roots:
                ask = partial(_claim, root, vm_name, run, attempt, sorted(attempts))
                self.questions[root]["claim", vm_name, run] = Question(ask, {vm_name})

    def claimable(self, image: str) -> Iterable[str]:
        """Where the run of a served image may have been claimed."""
        inside = [root for root in self.settings.repositories.values() if below(root, image)]
        return inside or self.settings.repositories.values()

    def images(self) -> None:
        """Every image in scope, with its parent; and others whose space is reckoned with."""
        before = space.earlier(self.ledger, {*self.desired.vms, *space.writing(self.ledger)})
        others: list[Export] = []
        for vm in self.desired.vms.values():
            call = self.ledger.active(vm.name) or self.ledger.latest(vm.name, vm.run)
            begun = call and call.state not in (CallState.DUE, CallState.REJECTED)
            mine = [(export, vm.root) for export in vm.exports]
            mine += [(e, self.nearest(e.image)) for e in (call.exports if call else ())]
            for export, root in mine:
                self.image(vm, export.image, root)
                if export.backing:
                    self.image(vm, export.backing, root)
                    below = () if begun else layers(self.ledger, vm.name, export.backing)
                    for layer in below:
                        self.image(vm, layer.path, self.nearest(layer.path))
                last = before.get((vm.name, export.key))
                if last and not export.read_only and (vm.fallback or not export.backing):
                    others.append(last)
        for call in self.ledger.open:
            if call.state.active and call.vm not in self.desired.vms:
                others.extend(call.exports)
                others += [one for e in call.exports if (one := before.get((call.vm, e.key)))]
        for export in others:
            # Of use, and not needed: a root that is in no question is not asked for their sake.
            root = self.nearest(export.image)
            if root in self.questions:
                ask = partial(_other, export.image, self.systems[root])
                self.questions[root]["other", export.image] = Question(ask)

    def nearest(self, path: str) -> str:
        """The root that answers for a file: the innermost."""
        return roots_of(self.settings, path)[-1]

    def image(self, vm: Vm, path: str, root: str) -> None:
        """`root`: what the image must not lead out of."""
        group = root if below(root, path) else self.nearest(path)
        question = self.questions[group].get(("image", path))
        if question is None:
            served = path in self.served
            ask = partial(_image, path, root, self.systems[group], self.paths[group], served=served)
            question = self.questions[group]["image", path] = Question(ask)
        question.vms.add(vm.name)

    def holds(self) -> None:
        """Whether each server of a VM in scope has the file open that is at its image's path.

        One whose root hangs is not judged.
        """
        for server in self.servers:
            if server.mark.vm in self.desired.vms and not server.starting:
                group = self.questions[self.nearest(server.argv[-1])]
                group["holds", server.identity] = Question(partial(_holds, server))


def _claim(root: str, vm: str, run: str, attempt: int | None, attempts: Sequence[int]) -> Note:
    """Who claimed a run; whether an attempt of it, if one is named, was intended; and which of its
    attempts lost writes."""
    try:
        owner = images.owner_of(root, vm, run)
        intent = None
        if owner and attempt is not None and images.intended(root, vm, run, attempt):
            intent = (vm, run, attempt)
        tainted = {(vm, run, one) for one in attempts if images.tainted(root, vm, run, one)}
    except HostError as error:
        return partial(_trouble, vm, str(error))
    return partial(_claimed, (vm, run), owner, intent, tainted)


def _nothing(_found: Found) -> None:
    return None


def _trouble(vm: str, why: str, found: Found) -> None:
    found.troubles[vm] = why


def _claimed(
    run: tuple[str, str],
    owner: Owner | None,
    intent: tuple[str, str, int] | None,
    tainted: Collection[tuple[str, str, int]],
    found: Found,
) -> None:
    if owner:
        found.owners[run] = owner
    found.tainted.update(tainted)
    if intent:
        found.intents.add(intent)


def _image(
    path: str,
    root: str,
    systems: dict[int, FileSystem | None],
    paths: images.Paths,
    *,
    served: bool,
) -> Note:
    image = images.look(path, root, paths)
    if image.locked and not served:
        who = [f"{proc.name_of(pid)} (pid {pid})" for pid in proc.openers(path)]
        if who:
            image = replace(image, holder=", ".join(who))
    return partial(_seen, image, _system(image, systems))


def _other(path: str, systems: dict[int, FileSystem | None]) -> Note:
    image = images.space(path)
    return partial(_weighed, image, _system(image, systems))


def _system(image: Image, systems: dict[int, FileSystem | None]) -> FileSystem | None:
    """The file system of an image; each is asked once in a look."""
    if image.device and image.device not in systems:
        systems[image.device] = images.file_system(image.path)
    return systems.get(image.device)


def _seen(image: Image, system: FileSystem | None, found: Found) -> None:
    found.images[image.path] = image
    if system:
        found.file_systems[image.device] = system


def _weighed(image: Image, system: FileSystem | None, found: Found) -> None:
    found.others[image.path] = image
    if system:
        found.file_systems[image.device] = system


def _holds(server: Server) -> Note:
    if proc.has_open(server.pid, server.argv[-1]):
        return _nothing
    return partial(_detached, server.identity)


def _detached(server: Identity, found: Found) -> None:
    found.detached.add(server)
