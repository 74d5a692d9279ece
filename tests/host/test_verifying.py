"""What `verify` finds, on real images: each looked at by itself, with all that it needs."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.call import Call, CallState
from reconciler.core.chains import chains_of
from reconciler.core.errors import HostError, UsageError
from reconciler.core.ledger import Archived, Kept, Ledger, Shelf
from reconciler.core.settings import Settings
from reconciler.host import images
from reconciler.verifying import Verified, chosen, verify
from tests.core.builders import a_settings, remembered
from tests.core.test_chains import a_run

MIB = 1 << 20
S = CallState


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the images f1, i1 on it, and i2 on that, each with some data."""
    root = tmp_path_factory.mktemp("repository")
    below: Path | None = None
    for number, run in enumerate(("f1", "i1", "i2")):
        path = root / "ctx-1" / "2000" / f"{run}.qcow2"
        images.create(str(path), MIB, str(root), str(below) if below else None)
        write = f"write -P {number + 1} {number * 65536} 65536"
        subprocess.run(["qemu-io", "-c", write, str(path)], check=True, capture_output=True)
        below = path
    return root


@pytest.fixture
def site(made: Path, tmp_path: Path) -> tuple[Settings, Ledger, Path]:
    """A copy of it, and the ledger that has published it."""
    root = tmp_path / "repository"
    subprocess.run(["cp", "-r", str(made), str(root)], check=True)
    folder = root / "ctx-1" / "2000"

    def moved(call: Call) -> Call:
        exports = tuple(
            replace(
                one,
                image=one.image.replace("/backup", str(root)),
                backing=one.backing.replace("/backup", str(root)) if one.backing else None,
                size=MIB,
            )
            for one in call.exports
        )
        return replace(call, exports=exports)

    calls = [
        moved(a_run(run, on, at=at, disks=1))
        for at, (run, on) in enumerate((("f1", None), ("i1", "f1"), ("i2", "i1")))
    ]
    kept = {
        call.job_id: Kept(
            archived={
                0: Archived(
                    job_id=call.job_id,
                    position=0,
                    size=MIB,
                    allocated=0,
                    digest=images.digest(call.exports[0].image),
                    at=call.ended,
                )
            }
        )
        for call in calls
    }
    shelf = Shelf(lambda jobs: {job: kept[job] for job in jobs if job in kept})
    settings = a_settings(repositories={"local": str(root)})
    return settings, remembered(calls=calls, shelf=shelf), folder


def looked(site: tuple[Settings, Ledger, Path], *, digests: bool = False) -> list[Verified]:
    settings, ledger, _ = site
    backups = chosen(chains_of(ledger, "ctx-1"), ledger.runs("ctx-1"), "ctx-1", "")
    return list(verify(settings, backups, digests=digests))


def wrong(found: list[Verified]) -> dict[str, str]:
    return {one.backup.run: " / ".join(one.disks[0].wrong) for one in found if one.disks[0].wrong}


def test_a_chain_is_looked_at_from_the_full_run_up(site: tuple[Settings, Ledger, Path]) -> None:
    found = looked(site, digests=True)
    assert [(one.backup.run, one.disks[0].wrong, one.disks[0].digest) for one in found] == [
        ("f1", (), "same"),
        ("i1", (), "same"),
        ("i2", (), "same"),
    ]
    proof = found[0].proof(5.0, "me")
    assert (proof.kind, proof.ok, proof.at) == ("verify", True, 5.0)
    assert json.loads(proof.result)["disks"][0]["digest"] == "same"


def corrupt(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack("!Q", 2))


def tear(path: Path) -> None:
    """The table of the first level leads beyond the end of the file."""
    with path.open("r+b") as file:
        head = file.read(48)
        (table,) = struct.unpack_from("!Q", head, 40)
        file.seek(table)
        file.write(struct.pack("!Q", (1 << 63) | (1 << 40)))


def rebase(path: Path) -> None:
    line = ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "other.qcow2", str(path)]
    subprocess.run(line, check=True)


def grow(path: Path) -> None:
    subprocess.run(["qemu-img", "resize", "-q", str(path), "2M"], check=True)


@pytest.mark.parametrize(
    ("run", "harm", "said"),
    [
        ("f1", Path.unlink, "it is missing"),
        ("f1", lambda path: path.write_bytes(b"x" * 4096), "it is not qcow2"),
        ("i1", corrupt, "qemu has marked it as corrupt"),
        ("i1", tear, "ERROR"),
        ("i2", rebase, "is built on"),
        ("f1", grow, "it has 2 MiB, and had 1 MiB"),
    ],
)
def test_what_is_wrong_is_told_of_the_image_that_has_it(
    site: tuple[Settings, Ledger, Path], run: str, harm: Callable[[Path], object], said: str
) -> None:
    harm(site[2] / f"{run}.qcow2")
    found = wrong(looked(site))
    assert list(found) == [run]
    assert said in found[run]


def test_a_byte_that_no_check_sees_is_seen_by_its_digest(
    site: tuple[Settings, Ledger, Path],
) -> None:
    path = site[2] / "i1.qcow2"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the cluster that was written last: the guest's data
    path.write_bytes(data)
    assert wrong(looked(site)) == {}
    found = looked(site, digests=True)
    assert list(wrong(found)) == ["i1"]
    kept = found[1].proof(5.0, "")
    weaker = looked(site)[1]
    remembered_too = replace(weaker, backup=replace(weaker.backup, proofs={"verify": kept}))
    (still,) = remembered_too.known(9.0)
    assert (still.digest, still.at) == ("differs", 5.0), "a look at tables takes nothing back"


def test_a_run_that_is_no_backup_cannot_be_verified(site: tuple[Settings, Ledger, Path]) -> None:
    _, ledger, _ = site
    failed = a_run("torn", "f1", state=S.FAILED)
    other = a_run("alone", at=-5.0, disks=1)  # of a chain of its own, and older
    ledger = replace(ledger, calls=[*ledger.calls, failed, other])
    found, calls = chains_of(ledger, "ctx-1"), ledger.runs("ctx-1")
    assert [one.run for one in chosen(found, calls, "ctx-1", "i1")] == ["f1", "i1"]
    with pytest.raises(UsageError) as none:
        chosen(found, calls, "ctx-1", "alnoe")
    assert str(none.value) == (
        "ctx-1 has no run 'alnoe'; did you mean 'alone'? (its newest backups: i2, i1, f1, alone)"
    )
    with pytest.raises(HostError, match="run torn of ctx-1: it is FAILED, so it is no backup"):
        chosen(found, calls, "ctx-1", "torn")
    with pytest.raises(HostError, match="no run of it is completed"):
        chosen((), (), "ctx-1", "")
