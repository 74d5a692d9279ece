"""What `verify` found of a run's images, disk by disk, as it is kept between looks.

A look without digests reads the tables of an image, not what it holds. So it is weaker than one
that compares the digest, and takes back nothing that such a one has found.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct, json, to_builtins
from msgspec.structs import replace

from reconciler.core.ledger import VERIFY, Proof
from reconciler.core.units import Seconds, stamp


class Finding(Struct, frozen=True, kw_only=True):
    """What is known of one image by looking at it."""

    key: str
    """Of its disk."""
    image: str
    wrong: tuple[str, ...] = ()
    """What is the matter with it; empty: it is well, as far as it was looked at."""
    digest: str = ""
    """`same`, `differs`, `none was taken`; empty: it was not asked for, or could not be read."""
    deep: bool = False
    """The look was with its digest: nothing that is wrong is hidden from it."""
    at: Seconds = 0.0
    """When that was found."""
    digested: Seconds = 0.0
    """When its digest was last that of its publication, with nothing found wrong since; 0: never.
    """


class _Result(Struct, frozen=True):
    """What of a proof's result is read here."""

    disks: tuple[Finding, ...] = ()


def proof_of(job_id: str, found: Sequence[Finding], at: Seconds, who: str) -> Proof:
    """Some findings, to be written down."""
    bare = Proof(job_id=job_id, kind=VERIFY, at=at, ok=True, result="{}", who=who)
    return _proof(bare, [_dated(one, at) for one in found])


def _proof(base: Proof, found: Sequence[Finding]) -> Proof:
    ok = not any(one.wrong for one in found)
    result = {"summary": _summary(found, base.at), "disks": to_builtins(found)}
    return replace(base, ok=ok, result=json.encode(result).decode())


def findings(proof: Proof) -> tuple[Finding, ...]:
    """What is kept of each disk. Empty: an older version has kept nothing of them."""
    found = json.decode(proof.result, type=_Result).disks
    return tuple(one if one.at else _dated(one, proof.at) for one in found)


def _dated(one: Finding, at: Seconds) -> Finding:
    """A finding with its moment. Those of older versions have none, nor how deep they looked."""
    same = at if one.digest == "same" and not one.wrong else 0.0
    deep = one.deep or one.digest in ("same", "differs")
    return replace(one, at=at, deep=deep, digested=same)


def merged(before: Proof | None, new: Proof) -> Proof:
    """What is known after another look at the same run."""
    if before is None or new.kind != VERIFY or not (found := findings(new)):
        return new
    known = {one.image: one for one in findings(before)}
    return _proof(new, [_after(known.get(one.image), one) for one in found])


def _after(old: Finding | None, new: Finding) -> Finding:
    if old is None:
        return new
    stays = old.wrong and old.deep and not new.deep
    if stays:
        more = tuple(why for why in new.wrong if why not in old.wrong)
        return replace(old, wrong=old.wrong + more)
    if new.wrong:
        return replace(new, digested=0.0)
    return replace(new, digested=new.digested or old.digested)


def damage(proof: Proof | None, images: Collection[str]) -> str:
    """What is the matter with some images of a run, by the looks at them; empty: nothing."""
    if proof is None or proof.ok:
        return ""
    found = findings(proof)
    if not found:
        return f"its images were found damaged at {stamp(proof.at)}"
    return "; ".join(
        f"disk {one.key} was found damaged at {stamp(one.at)}: {one.wrong[0]}"
        for one in found
        if one.wrong and one.image in images
    )


def needs_digests(proof: Proof | None) -> bool:
    """Whether only a look with digests can take back what is wrong."""
    return proof is not None and any(one.wrong and one.deep for one in findings(proof))


def digested(proof: Proof) -> Seconds:
    """Since when the digests of all images are known to be right; 0: not of all."""
    return min((one.digested for one in findings(proof)), default=0.0)


def stands(proof: Proof | None) -> str:
    """How well a run is proved whose images are not known to be damaged, in a word or two."""
    if proof is None:
        return "not verified"
    since = digested(proof)
    return f"digests verified {stamp(since)}" if since else f"tables checked {stamp(proof.at)}"


def summary(proof: Proof) -> str:
    """What was found, in a sentence."""
    found = findings(proof)
    if found:
        return _summary(found, proof.at)
    return "its images are well" if proof.ok else "its images are damaged"


def _summary(found: Sequence[Finding], at: Seconds) -> str:
    wrong = [f"disk {one.key}: {', '.join(one.wrong)}" for one in found if one.wrong]
    if wrong:
        return "; ".join(wrong)
    images = f"{len(found)} image{'s' if len(found) != 1 else ''}"
    since = min((one.digested for one in found), default=0.0)
    if since and since >= at:
        return f"the digests of {images} are those that were published"
    tables = f"the tables of {images} are in order"
    if since:
        return f"{tables}; digests were compared last at {stamp(since)}"
    missing = [one.key for one in found if one.digest == "none was taken"]
    if missing:
        return f"{tables}; no digest was taken of disk {', '.join(missing)}"
    return f"{tables}; digests were not compared"
